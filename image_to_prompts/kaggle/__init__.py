"""Kaggle from the command line: kernels and datasets checked before they are sent, replies read after.

kernels.py     the kernels that `make kernels` built, and the chain as a table
remote.py      the `kaggle` package underneath: push, status, submit, datasets
folders.py     folders that become datasets: wheels, weights, metadata, embeddings
mounts.py      what is attached to a kernel
commands.py    `image-to-prompts kaggle ...`
"""
