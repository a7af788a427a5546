"""What the first cell of a notebook needs."""

import logging
from pathlib import Path

from .kaggle import mounts
from .run import progress
from .run.folders import Run, default_run, on_kaggle, open_run, profile_of

log = logging.getLogger(__name__)


def start(folder: str | Path | None = None, profile: str | None = None) -> tuple[Run, str]:
    """Opens a run: `folder` or the default one, with `profile` or the run's own; on Kaggle it logs what is attached.

    Returns:
        The run and its profile.
    """
    progress.show_log()
    if on_kaggle():
        log.info("%s", mounts.table())
    folder = Path(folder) if folder else default_run()
    profile = profile_of(folder, profile)
    return open_run(folder, profile), profile
