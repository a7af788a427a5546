"""Where a stage's blocks of rows are worked on: in this process, or by the actors of a Ray cluster.

    image-to-prompts embed --engine ray [--address head:6379] [--actors 16] ...

For those who outgrow `--shard` and `accelerate launch`. A stage cuts its rows into the same blocks either way, and what
a block gives depends on the block alone, so the results are the same. Ray Data hands the blocks out, keeps their order
and begins those of a lost actor anew (https://docs.ray.io/en/latest/data/data.html); the stage itself, its journals and
its files stay in the process that was started. All nodes need this package and see the same files under the same paths
(docs/scale.md).
"""

import functools
import logging
import os
import pickle
import socket
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Literal, TypeVar
from urllib.parse import urlsplit

from .bounds import NotNegative
from .errors import UserError

log = logging.getLogger(__name__)
T = TypeVar("T")
R = TypeVar("R")


@dataclass
class EngineConfig:
    """A cluster, for those who outgrow one machine."""

    engine: Literal["local", "ray"] = "local"
    """Who works on the rows: this process (and those of accelerate launch), or actors of a Ray cluster."""
    address: str = ""
    """Ray cluster, as ray.init takes it; left out: one is started on this machine."""
    actors: NotNegative = 0
    """Ray actors, each with the models of its own; 0: one a GPU of the cluster, without GPUs one a core."""


class _Actor:
    """Gets ready with its first block, then works on one after the other."""

    def __init__(self, start: Callable[[], Callable[[Any], Any]]) -> None:
        self.start = start
        self.work: Callable[[Any], Any] | None = None

    def __call__(self, batch: dict[str, Any]) -> dict[str, list[bytes]]:
        # Pickles go between this run's own processes alone, as all that Ray hands on does; no file is made of them.
        return {"found": [pickle.dumps(self._found(pickle.loads(item))) for item in batch["item"]]}

    def _found(self, block: Any) -> Any:
        try:
            self.work = self.work or self.start()
            return self.work(block)
        except UserError as error:  # Ray would wrap it in a page of traceback
            return error


def _task(start: Callable[[], Callable[[Any], Any]], batch: dict[str, Any]) -> dict[str, list[bytes]]:
    """An actor's work, of a process that holds nothing."""
    return _Actor(start)(batch)


def over_blocks(
    config: EngineConfig, start: Callable[[], Callable[[T], R]], blocks: Iterable[T], holds: bool = True
) -> Iterator[R]:
    """Works on blocks, in order.

    Args:
        config: Which engine, and where it is.
        start: Gets a worker ready: loads its models, and returns what works on a block. For Ray it can be pickled.
        blocks: Blocks of rows.
        holds: Whether what `start` gives is worth keeping between blocks, a model for example. Without, Ray takes tasks
            for actors, whose processes it uses again in the next call.

    Yields:
        What each block gives.

    Raises:
        UserError: If Ray is not installed or the cluster cannot be reached, or if `start` or the work raises it.
    """
    if config.engine == "local":
        work = None
        for block in blocks:
            work = work or start()
            yield work(block)
        return
    items = [{"item": pickle.dumps(block)} for block in blocks]
    if not items:
        return
    ray = _connected(config)
    begun = time.monotonic()
    gpus = int(ray.cluster_resources().get("GPU", 0))
    actors = min(len(items), config.actors or gpus or int(ray.cluster_resources()["CPU"]))
    context = ray.data.DataContext.get_current()
    context.execution_options.preserve_order = True
    context.enable_progress_bars = False  # the stage has its own
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    how: dict[str, Any] = {
        "fn": _Actor,
        "fn_constructor_args": (start,),
        "compute": ray.data.ActorPoolStrategy(size=actors),
    }
    if not holds:
        how = {"fn": functools.partial(_task, start), "compute": ray.data.TaskPoolStrategy(size=actors)}
    made = ray.data.from_items(items, override_num_blocks=len(items)).map_batches(
        **how,
        batch_size=1,
        num_gpus=1 if gpus else None,
        num_cpus=None if gpus else 1,
    )
    for number, row in enumerate(made.iter_rows()):
        if not number and holds:
            log.info("%d actors; the first block after %.1f s", actors, time.monotonic() - begun)
        found = pickle.loads(row["found"])
        if isinstance(found, UserError):
            raise found
        yield found


def _connected(config: EngineConfig) -> Any:
    """The ray module, connected to the cluster or with a local one started."""
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")  # it reports each lost actor, which it replaces
    import ray
    import ray.data

    if ray.is_initialized():
        return ray
    begun = time.monotonic()
    if ":" in config.address:
        _check_reachable(config.address)
    try:
        ray.init(config.address or "local", include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)
    except (ConnectionError, RuntimeError, ValueError, OSError) as error:
        said = str(error).splitlines()[0]
        remedy = "correct it, run this on one of its nodes, or, if it asks for a token, set RAY_AUTH_MODE=token"
        raise UserError(f"--address {config.address}: no Ray cluster there: {said}; {remedy}") from error
    where = config.address or "a cluster on this machine"
    log.info("Ray %s, %s: connected in %.1f s", ray.__version__, where, time.monotonic() - begun)
    return ray


def _check_reachable(address: str) -> None:
    """Raises UserError where nothing answers; Ray itself would try for minutes."""
    found = urlsplit(address if "//" in address else f"ray://{address}")
    try:
        socket.create_connection((found.hostname, found.port), timeout=10).close()
    except (OSError, ValueError) as error:
        raise UserError(f"--address {address}: no Ray cluster there: {error}; correct it") from error
