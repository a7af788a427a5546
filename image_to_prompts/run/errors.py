"""The one exception that a user can cause, and the one line it becomes."""

import errno
import os
from collections.abc import Iterator
from concurrent.futures import BrokenExecutor

NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
NOT_ALLOWED = (errno.EROFS, errno.EACCES, errno.EPERM)
NO_MEMORY = (
    *("can't allocate memory", "cannot allocate memory", "out of memory", "bad_alloc", "bad allocation"),
    *("can't start new thread", "could not create a primitive", "failed to map segment"),
)
EXTRAS = {"gradio": "demo", "starlette": "demo", "ray": "cluster", "kaggle": "kaggle", "six": "kaggle"}
AGAIN = "run the same command again to continue"


class UserError(ValueError):
    """Something the user can mend: what is wrong, where, and what to do, in one line.

    The command line prints the message without a traceback and exits with code 2; in a notebook it is an ordinary
    exception.
    """

    def __init__(self, message: str) -> None:
        super().__init__(" ".join(message.split()))


def explained(error: BaseException) -> UserError | None:
    """What to say of an error that the user or the machine, not the program, is to blame for; None of any other.

    A full disk and missing memory reach the program as errors of many kinds, since libraries wrap them.
    """
    if isinstance(error, UserError):
        return error
    for one in causes(error):
        said = str(one).lower()
        code = getattr(one, "errno", None)
        where = getattr(one, "filename", None) or "a disk"
        if isinstance(one, ModuleNotFoundError) and one.name and not one.name.startswith("image_to_prompts"):
            package = one.name.partition(".")[0]
            extra = EXTRAS.get(package, "full")
            return UserError(f"{package} is not installed; python -m pip install 'image-to-prompts[{extra}]'")
        if code in NO_ROOM or "no space left on device" in said:
            return UserError(f"{where}: no space left; free some: {AGAIN}")
        if code in NOT_ALLOWED:
            return UserError(f"{where}: {os.strerror(code)}; allow it, or choose another path: {AGAIN}")
        if code == errno.EIO:
            return UserError(f"{where}: the disk fails ({os.strerror(code)}); copy the data to another one: {AGAIN}")
        if isinstance(one, BrokenExecutor):
            return UserError(f"a helping process was ended, by a person or because memory ran out: {AGAIN}")
        if isinstance(one, MemoryError) or code == errno.ENOMEM or any(text in said for text in NO_MEMORY):
            return UserError(f"out of memory; close other programs, or lower --batch-size if there is one: {AGAIN}")
    return None


def causes(error: BaseException | None) -> Iterator[BaseException]:
    """An error, then those it came from."""
    seen: list[BaseException] = []
    while error is not None and error not in seen:
        seen.append(error)
        yield error
        error = error.__cause__ or error.__context__
