"""Given a Stable Diffusion image, recover its prompt.

One folder a stage (see `pipeline.py`). Each offers plain functions for notebooks and a `Config` dataclass plus
`run(config)` for the command line. For the prompt of one image:

    from image_to_prompts import describe
    describe("cat.png").prompt
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .describe import describe

__version__ = "0.2.0"
__all__ = ["describe"]


def __getattr__(name: str) -> Any:
    """Imports `describe` when it is asked for; it needs pandas and more."""
    if name == "describe":
        return importlib.import_module(".describe", __name__)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
