"""Which device and which precision to compute with."""

from __future__ import annotations

import contextlib
import ctypes
import logging
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from .errors import UserError

if TYPE_CHECKING:
    import torch
    from accelerate import PartialState

log = logging.getLogger(__name__)
T = TypeVar("T")


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def rank_and_processes() -> tuple[int, int]:
    """This process's number, from 0, and how many `accelerate launch` or `torchrun` started; (0, 1) without them."""
    return int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))


def local_device() -> torch.device:
    """The device of this process: its own GPU under `accelerate launch`, without opening a process group.

    Processes that share no tensors need no group, and none of them then waits for, or times out with, another.
    """
    import torch

    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)) % torch.cuda.device_count())
        torch.cuda.set_device(device)
        return device
    has_mps = torch.backends.mps.is_available()
    return torch.device("mps" if has_mps else "cpu")


def only_cpus() -> bool:
    """Whether several processes share CPUs alone; accelerate must be told, or it takes each for the only one."""
    import torch

    return rank_and_processes()[1] > 1 and not torch.accelerator.is_available()


def process_state() -> PartialState:
    """accelerate's view of this process: its device, and its process group, opened on first use.

    Processes may wait a week for each other, where PyTorch would give up after ten minutes: some have more to do than
    others, and the launcher ends all of them when one fails.
    """
    from accelerate import PartialState

    state = PartialState(cpu=only_cpus(), timeout=timedelta(days=7))
    if state.device.type == "cpu":
        keep_memory()
    return state


def keep_memory() -> None:
    """Lets a process keep the memory of freed tensors for the next ones.

    By default glibc maps every large tensor anew, and Linux then fills it with zeros page by page: a tenth or more of a
    training step of ConvNeXt-XXLarge on two cores (docs/log.md). No effect with other C libraries and allocators. See
    mallopt(3); the constants are those of malloc.h.
    """
    m_trim_threshold, m_mmap_max = -1, -4
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if os.name == "posix" else None
    if mallopt:
        mallopt(m_mmap_max, 0)
        mallopt(m_trim_threshold, 2**31 - 1)


@contextlib.contextmanager
def one_core_each(device: torch.device) -> Iterator[ThreadPoolExecutor]:
    """Threads for independent pieces of work: on CPUs one a core, PyTorch's own threads switched off; on a GPU one.

    Small pieces gain a tenth to a fifth over PyTorch's threads, which meet after every operation (docs/log.md), and
    what a piece gives does not depend on how many threads there are.
    """
    import torch

    before, on_cpu = torch.get_num_threads(), device.type == "cpu"
    threads = ThreadPoolExecutor(before if on_cpu else 1)
    try:
        if on_cpu:
            torch.set_num_threads(1)
        yield threads
    finally:
        threads.shutdown(cancel_futures=True)
        torch.set_num_threads(before)


def mixed_precision(device: torch.device) -> str:
    """`bf16` where the hardware has it, `fp16` on older GPUs (T4), `no` on other CPUs."""
    import torch

    if device.type == "cuda":
        return "bf16" if torch.cuda.get_device_capability(device)[0] >= 8 else "fp16"
    has_bf16 = getattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)()
    return "bf16" if device.type == "cpu" and has_bf16 else "no"


def type_of(precision: str) -> torch.dtype:
    """The type of the matrices in a precision of `mixed_precision`."""
    import torch

    return {"bf16": torch.bfloat16, "fp16": torch.float16, "no": torch.float32}[precision]


def autocast(device: torch.device) -> contextlib.AbstractContextManager:
    """Autocast in the precision of `mixed_precision`."""
    import torch

    precision = mixed_precision(device)
    return contextlib.nullcontext() if precision == "no" else torch.autocast(device.type, type_of(precision))


def within_memory(
    work: Callable[[int], T], limit: int, count: int, may_halve: bool = True, remedy: str = "close other programs"
) -> tuple[T, int]:
    """Works on `count` items, at most `limit` at once; halves that whenever memory does not suffice.

    Args:
        work: Does all of it with so many items at once, and can be begun anew.
        limit: Items at once.
        count: Items.
        may_halve: False where other processes wait for this one to do as they do.
        remedy: What a user can do where memory does not suffice even so.

    Returns:
        What `work` gave, and the limit for the next time.

    Raises:
        UserError: If memory does not suffice.
    """
    from accelerate.utils.memory import clear_device_cache, should_reduce_batch_size

    at_once = min(limit, count)
    while True:
        try:
            return work(at_once), limit
        except RuntimeError as error:
            if not should_reduce_batch_size(error) and "ALLOC_FAILED" not in str(error):
                raise
            if at_once == 1 or not may_halve:
                said, what = str(error).splitlines()[0], "one image" if at_once == 1 else f"{at_once} images at once"
                raise UserError(f"memory does not suffice for {what}: {said}; {remedy}") from error
        log.warning("out of memory with %d images at once; continuing with %d", at_once, at_once // 2)
        limit = at_once = at_once // 2
        clear_device_cache(garbage_collection=True)  # out here the failed call's tensors are garbage


def gather(share: list[T], total: int) -> list[T]:
    """Puts the shares of all processes together, where process r of n holds items r, r + n, ... of `total`.

    Without `accelerate launch` or `torchrun` the share is everything.
    """
    _, processes = rank_and_processes()
    if processes == 1:
        return share
    from torch import distributed

    process_state()
    shares: list[list[T]] = [[] for _ in range(processes)]
    distributed.all_gather_object(shares, share)
    return [shares[i % processes][i // processes] for i in range(total)]


def wait_for_files(files: list[Path]) -> None:
    """Waits until every process has made its share of files.

    Raises:
        UserError: In every process, if one of them does not see what another made.
    """
    rank, processes = rank_and_processes()
    if processes == 1:
        return
    process_state().wait_for_everyone()
    missing = [f"{file}: not seen by process {rank}" for file in files if not file.is_file()]
    told = gather(missing[:1] or [""], processes)
    if any(told):
        raise UserError(f"{max(told)}; --out must lie on a file system that all nodes see under this path")
