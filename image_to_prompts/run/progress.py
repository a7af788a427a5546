"""How far a stage is: one log and one progress bar for all of them, and an estimate before a long one starts."""

import contextlib
import logging
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import TypeVar

log = logging.getLogger(__name__)
T = TypeVar("T")
BEGUN = time.monotonic()  # a notebook may run more than one stage in a session, whose time they share
STOPPED = "stopped by --max-hours %g; run the same command again to continue"
_quiet = False


def set_quiet(quiet: bool) -> None:
    """Silences every later bar (`--quiet`)."""
    global _quiet
    _quiet = quiet


class _AboveBars(logging.StreamHandler):
    """Writes to standard error, above a bar that stands there."""

    def emit(self, record: logging.LogRecord) -> None:
        if "tqdm" not in sys.modules:  # no bar can be there
            super().emit(record)
            return
        from tqdm import tqdm

        tqdm.write(self.format(record), file=sys.stderr)


def say(text: str) -> None:
    """Writes to standard output, with a bar that stands on the terminal moved out of the way."""
    bars = sys.modules.get("tqdm")
    with bars.tqdm.external_write_mode(sys.stdout) if bars else contextlib.nullcontext():
        sys.stdout.write(text)
        sys.stdout.flush()


def show_log(quiet: bool = False) -> None:
    """Sends the package's log to standard error, warnings alone if quiet."""
    handler = _AboveBars(sys.stderr)
    handler.setFormatter(logging.Formatter("%(message)s"))
    logger = logging.getLogger("image_to_prompts")
    logger.handlers = [handler]
    logger.setLevel(logging.WARNING if quiet else logging.INFO)
    logger.propagate = False


def _watched() -> bool:
    return not _quiet and ("ipykernel" in sys.modules or sys.stderr.isatty())


def progress(items: Iterable[T], what: str, total: int | None = None) -> Iterable[T]:
    """Wraps `items` in a bar named `what` with an ETA; silent when asked to be or when nobody watches.

    In a notebook tqdm's notebook bar is used; without a terminal no bar is shown.
    """
    if not _watched():
        return items
    from tqdm.auto import tqdm

    return tqdm(items, desc=what, total=total, dynamic_ncols=True, leave=False)


@contextlib.contextmanager
def progress_to(total: int, what: str, done: int = 0) -> Iterator[Callable[[int], object]]:
    """A bar as `progress` shows, moved by hand; `done` of `total` were finished by an earlier run.

    Yields:
        What to call with the number of items just finished.
    """
    if not _watched():
        yield lambda finished: None
        return
    from tqdm.auto import tqdm

    with tqdm(desc=what, total=total, initial=done, dynamic_ncols=True, leave=False) as bar:
        yield bar.update


class Deadline:
    """Whether another piece of work, as long as the longest so far, still ends within the life of this process."""

    def __init__(self, max_hours: float) -> None:
        """Takes the hours that this process may live; 0: any."""
        self.seconds = max_hours * 3600
        self.last, self.longest = time.monotonic(), 0.0

    @property
    def left(self) -> float:
        """Seconds that are left; infinite where there is no limit."""
        return max(0.0, self.seconds - (time.monotonic() - BEGUN)) if self.seconds else float("inf")

    def passed(self, more: int = 1) -> bool:
        """To be asked after every piece, of so many more that will be done before the answer counts."""
        now = time.monotonic()
        self.longest, self.last = max(self.longest, now - self.last), now
        return bool(self.seconds) and now - BEGUN + more * self.longest > self.seconds


def short(value: float) -> str:
    """Two digits, or all those before the point: 0.028, 1.5, 266, 2,664."""
    return f"{value:,.0f}" if value >= 10 else f"{value:.2g}"


@dataclass(frozen=True)
class Estimate:
    """How long a stage will take, measured on its first block.

    Attributes:
        what: Name of the items, in the plural.
        total: How many there will be.
        left: How many of them are not done yet.
        seconds: Seconds an item.
        size: Bytes an item.
    """

    what: str
    total: int
    left: int
    seconds: float
    size: float

    def __str__(self) -> str:
        minutes, gigabytes = self.left * self.seconds / 60, self.total * self.size / 1e9
        if not self.left:
            return f"{self.total:,} {self.what}: all done"
        rate = f"{self.seconds:.2f} s each" if self.seconds >= 1 else f"{1 / self.seconds:.0f} a second"
        time = f"{short(minutes / 60)} h" if minutes >= 6 else f"{minutes:.1g} min"
        return f"{self.total:,} {self.what}, {self.left:,} to do, {rate}: {time}, {short(gigabytes)} GB in all"
