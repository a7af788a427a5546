"""Kaggle from the command line: kernels and datasets checked before they are sent, replies read after.

kernels.py     the kernels that `make kernels` built, and the chain as a table
remote.py      the `kaggle` package underneath: push, status, submit, datasets
folders.py     folders that become datasets: wheels, weights, metadata, embeddings
mounts.py      what is attached to a kernel
push.py        `image-to-prompts kaggle push`: which sources a kernel gets, and how sessions go on
sessions.py    within a kernel: publishes what a session has rendered
commands.py    the other commands of `image-to-prompts kaggle`
"""
