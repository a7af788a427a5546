"""Ways to do one thing, each in a process of its own, in turns: for seconds and peak memory side by side."""

from __future__ import annotations

import json
import multiprocessing
import os
import platform
import resource
import statistics
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

Prepared = Callable[[], Any]
"""Does it once; what it returns is thrown away."""


def peak() -> float:
    """GB that this process had at most; getrusage would count what its parent had before it became this program."""
    status = Path("/proc/self/status")
    if status.is_file():
        return int(status.read_text().partition("VmHWM:")[2].split()[0]) * 1024 / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6


def _worker(pipe: Connection, prepare: Callable[..., Prepared], arguments: tuple[Any, ...]) -> None:
    do = prepare(*arguments)
    while pipe.recv():
        start = time.perf_counter()
        do()
        seconds = time.perf_counter() - start
        pipe.send((seconds, peak()))


def in_turns(
    ways: dict[str, tuple[Callable[..., Prepared], tuple[Any, ...], dict[str, str]]], rounds: int, warm: bool = True
) -> tuple[dict[str, list[float]], dict[str, float]]:
    """Runs each way `rounds` times, in turns, if `warm` after one time that does not count.

    Args:
        ways: By name, what makes a way ready in its process, its arguments, and its environment.
        rounds: How often.
        warm: False where a time is long and the first one no slower.

    Returns:
        Seconds of each time, and the peak memory in GB of the way's process.
    """
    context = multiprocessing.get_context("spawn")
    processes, pipes, seconds, memory = {}, {}, {name: [] for name in ways}, {}
    for name, (prepare, arguments, environment) in ways.items():
        before = dict(os.environ)
        os.environ.update(environment)
        pipes[name], theirs = context.Pipe()
        processes[name] = context.Process(target=_worker, args=(theirs, prepare, arguments), daemon=True)
        processes[name].start()
        os.environ.clear()
        os.environ.update(before)
    for number in range(rounds + warm):
        for name, pipe in pipes.items():
            pipe.send(True)
            taken, memory[name] = pipe.recv()
            if number or not warm:
                seconds[name].append(taken)
    for name, pipe in pipes.items():
        pipe.send(False)
        processes[name].join()
    return seconds, memory


def ratio(seconds: dict[str, list[float]], slow: str, fast: str) -> dict[str, float]:
    """How many times as fast `fast` is as `slow`: minimum, median and maximum over the rounds."""
    ratios = [a / b for a, b in zip(seconds[slow], seconds[fast], strict=True)]
    return {"min": min(ratios), "median": statistics.median(ratios), "max": max(ratios)}


def record(script: str, what: str, found: object) -> None:
    """Puts the figures of a part of a benchmark into the JSON file beside its script."""
    file = Path(script).with_suffix(".json")
    result = json.loads(file.read_text()) if file.is_file() else {}
    result |= {"machine": platform.processor() or platform.machine(), what: found}
    file.write_text(json.dumps(result, indent=2) + "\n")


def lines(seconds: dict[str, list[float]], memory: dict[str, float], slow: str) -> str:
    """A table to print: seconds of each round, peak memory, and times as fast as `slow`."""
    width = max(map(len, seconds))
    table = []
    for name, values in seconds.items():
        times = (
            ""
            if name == slow
            else "  times as fast {min:.2f} {median:.2f} {max:.2f}".format(**ratio(seconds, slow, name))
        )
        table.append(f"{name:{width}} " + "".join(f"{v:9.3f}" for v in values) + f"  peak {memory[name]:.2f} GB{times}")
    return "\n".join(table)
