"""One progress bar for all stages: with an ETA, silent when asked to be or when nobody watches."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import TypeVar

T = TypeVar("T")
_quiet = False


def set_quiet(quiet: bool) -> None:
    """Silences every later bar (`--quiet`)."""
    global _quiet
    _quiet = quiet


def progress(items: Iterable[T], what: str, total: int | None = None, done: int = 0) -> Iterable[T]:
    """Wraps `items` in a bar named `what`; `done` of `total` were finished by an earlier run.

    In a notebook tqdm's notebook bar is used; without a terminal no bar is shown.
    """
    in_notebook = "ipykernel" in sys.modules
    if _quiet or not (in_notebook or sys.stderr.isatty()):
        return items
    from tqdm.auto import tqdm

    return tqdm(items, desc=what, total=total, initial=done, dynamic_ncols=True, leave=False)
