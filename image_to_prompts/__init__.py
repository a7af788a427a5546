"""Given a Stable Diffusion image, recover its prompt.

One module a stage (see `stages.py`): generate, dedupe, render, finetune, infer. Each offers plain functions for
notebooks and a `Config` dataclass plus `run(config)` for the command line.
"""

__version__ = "0.1.0"
