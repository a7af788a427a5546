"""Given a Stable Diffusion image, recover its prompt.

One module a stage (see `stages.py`): generate, dedupe, render, finetune, infer. Each offers plain functions for
notebooks and a `Config` dataclass plus `run(config)` for the command line.
"""

import os

# PyTorch then asks Linux for large memory pages, which spares a large model on a CPU page faults (docs/log.md). It has
# no effect on GPUs.
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")

__version__ = "0.1.0"
