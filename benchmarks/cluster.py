"""Ray with two actors and with one beside the local engine on two cores: texts embedded, scenes drawn; all compared.

python benchmarks/cluster.py [--texts 50000] [--pictures 2000] [--rounds 2]        writes cluster.json

Start-up (Ray itself, then an actor with its models) is timed with 40 texts or 64 pictures first and stands apart. Then
what the driver takes from actors that do nothing: what a cluster of many fast nodes could give it at most.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pandas as pd
import psutil
from turns import record

RAY = {"engine": "ray", "actors": 2}
WAYS = {"local": {}, "ray": RAY, "ray, one actor": RAY | {"actors": 1}}


def texts(count: int) -> list[str]:
    """Different prompts of the embedded grammar."""
    from image_to_prompts.embedded import grammar

    found: dict[str, None] = {}
    index = 0
    while len(found) < count:
        found[grammar.prompt(0, index)] = None
        index += 1
    return list(found)


def encoded(prompts: list[str], values: dict[str, object]) -> np.ndarray:
    from image_to_prompts.models import text_cache, text_encoder
    from image_to_prompts.run.engine import EngineConfig

    with tempfile.TemporaryDirectory() as folder:
        os.environ[text_cache.FOLDER] = folder
        return text_encoder.encode(prompts, engine=EngineConfig(**values))


def drawn(prompts: list[str], values: dict[str, object]) -> list[str]:
    from image_to_prompts import render
    from image_to_prompts.data import metadata

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        frame = metadata.with_keys(pd.DataFrame({"prompt": prompts}), folder)
        metadata.write_table(folder / "m.csv", frame)
        return render.run(render.Config(metadata=folder / "m.csv", out=folder / "i", **values))["sha256"].tolist()


def seconds(do: Callable[[], object]) -> tuple[float, object]:
    begun = time.perf_counter()
    found = do()
    return time.perf_counter() - begun, found


def from_idle_actors(size: int, blocks: int = 128) -> float:
    """MB a second that arrive from two actors whose blocks are of `size` bytes."""
    from image_to_prompts.run.engine import EngineConfig, over_blocks

    def start() -> Callable[[int], bytes]:
        return lambda number: os.urandom(64) * (size // 64)

    arrived = over_blocks(EngineConfig(**RAY), start, range(blocks))
    next(arrived)  # the actors are up
    return (blocks - 1) * size / 1e6 / seconds(lambda: sum(map(len, arrived)))[0]


@contextlib.contextmanager
def memory() -> Iterator[dict[str, float]]:
    """GB that this process, an actor, and the rest of Ray held at most, looked at once a second."""
    most: dict[str, float] = {}
    over = threading.Event()

    def watch() -> None:
        while not over.wait(1):
            now = {"driver": psutil.Process().memory_info().rss}
            for one in psutil.Process().children(recursive=True):
                with contextlib.suppress(psutil.Error):  # it is gone
                    name, held = one.name(), one.memory_info()
                    if name.startswith("ray::MapWorker"):
                        now["actor"] = max(now.get("actor", 0), held.rss - held.shared)
                    else:
                        now["rest of Ray"] = now.get("rest of Ray", 0) + held.rss - held.shared
            most.update({name: max(most.get(name, 0), round(held / 1e9, 2)) for name, held in now.items()})

    watching = threading.Thread(target=watch)
    watching.start()
    try:
        yield most
    finally:
        over.set()
        watching.join()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--texts", type=int, default=50_000)
    parser.add_argument("--pictures", type=int, default=2000)
    parser.add_argument("--rounds", type=int, default=2)
    options = parser.parse_args()
    result = {}
    for name, work, prompts, few in (
        ("encode", encoded, texts(options.texts), 40),
        ("render", drawn, texts(options.pictures), 64),
    ):
        start_up, _ = seconds(lambda work=work, some=prompts[:few]: work(some, RAY))
        again, _ = seconds(lambda work=work, some=prompts[:few]: work(some, RAY))
        work(prompts[:few], {})
        taken, held, same, expected = {way: [] for way in WAYS}, {}, True, None
        for _ in range(options.rounds):
            for way, values in WAYS.items():
                with memory() as held[way]:
                    took, found = seconds(lambda work=work, prompts=prompts, values=values: work(prompts, values))
                expected = found if expected is None else expected
                same &= np.array_equal(found, expected)
                taken[way].append(round(took, 2))
        ratios = {
            way: sorted(a / b for a, b in zip(taken[way], taken["local"], strict=True))
            for way in WAYS
            if way != "local"
        }
        print(f"{name}, {len(prompts)} rows: {taken}; same: {same}")
        print(
            f"  times the local engine's: { {way: [round(one, 2) for one in found] for way, found in ratios.items()} }"
        )
        print(f"  start-up with {few} rows: {start_up:.1f} s the first time, {again:.1f} s with Ray running")
        print(f"  GB at most: {held}")
        result[name] = {"rows": len(prompts), "seconds": taken, "times local": ratios, "same": bool(same), "GB": held}
        result[name]["start-up"] = [round(start_up, 2), round(again, 2)]
    sizes = {"blocks of 4,096 vectors": 4096 * 384 * 4, "blocks of 32 pictures": 32 * 462_000}
    result["MB a second from idle actors"] = {
        what: [round(from_idle_actors(size)) for _ in range(3)] for what, size in sizes.items()
    }
    print(f"MB a second from idle actors: {result['MB a second from idle actors']}")
    record(__file__, "Ray", result)


if __name__ == "__main__":
    main()
