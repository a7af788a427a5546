"""Ray with two actors and with one beside the local engine on two cores; what they give is compared.

python benchmarks/cluster.py stages [--texts 50000] [--pictures 2000] [--rounds 2]    texts embedded, scenes drawn
python benchmarks/cluster.py law                         deduplication by 1, 2 and 3 actors: what it keeps
python benchmarks/cluster.py dedupe [--rows 1000000]     how long it takes, and its parts, for ten nodes on paper

All write cluster.json. `stages` times start-up (Ray itself, then an actor with its models) with 40 texts or 64 pictures
apart; then what the driver takes from actors that do nothing: what a cluster of many fast nodes could give it at most.
`law` and `dedupe` take real prompts' vectors and rows made of them (benchmarks/dedupe.py).
"""

from __future__ import annotations

import argparse
import contextlib
import math
import os
import statistics
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pandas as pd
import psutil
import torch
from dedupe import THRESHOLD, grown
from turns import record

RAY = {"engine": "ray", "actors": 2}
CORES = (2, 16, 64, 640)  # the last: ten nodes
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


def real_vectors() -> np.ndarray:
    """Of the real prompts."""
    import encode

    from image_to_prompts.models import text_encoder

    return text_encoder.encode(encode.read(encode.REAL))


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


def law(options: argparse.Namespace) -> dict[str, object]:
    """Whether 1, 2 and 3 actors, with shards of odd sizes, keep the rows that a float32 range search keeps."""
    from plain_dedupe import leaders

    from image_to_prompts.run.engine import EngineConfig
    from image_to_prompts.search import on_cluster

    real = real_vectors()
    result: dict[str, object] = {}
    on_cluster.BLOCK, on_cluster.PIECE, on_cluster.SHARD = 30_011, 7_001, 9_973
    for what, vectors in {"real": real, "made of real ones": grown(real, 100_000), "no": real[:0]}.items():
        expected = leaders(vectors, THRESHOLD)[0] if len(vectors) else np.arange(0)
        for actors in (1, 2, 3):
            engine = EngineConfig(engine="ray", actors=actors)
            with tempfile.TemporaryDirectory() as folder:
                found, _ = on_cluster.leaders(vectors, THRESHOLD, 0, engine, Path(folder))
            name = f"{len(vectors)} rows, {what}, {actors} actors"
            result[name] = np.array_equal(found, expected)
            kept = int((found == np.arange(len(found))).sum())
            print(f"{name}: {kept} kept, the same as by range search: {result[name]}", flush=True)
    return result


def deduplicated(options: argparse.Namespace) -> dict[str, object]:
    """Seconds of a search by two actors, the part of the process that was started, and of each thing by itself."""
    from image_to_prompts.run.engine import EngineConfig, over_blocks
    from image_to_prompts.search import near_pairs, on_cluster

    vectors, engine = grown(real_vectors(), options.rows), EngineConfig(**RAY)
    own: list[float] = []
    decide = near_pairs.leaders

    def timed(*told: object) -> object:
        took, found = seconds(lambda: decide(*told))
        own.append(took)
        return found

    rounds = [seconds(lambda: list(over_blocks(engine, lambda: abs, range(-16, 0), holds=False)))[0] for _ in range(6)]
    near_pairs.leaders = timed
    with tempfile.TemporaryDirectory() as name, memory() as held:
        folder, used = Path(name), time.process_time()
        whole, (leader, _) = seconds(lambda: on_cluster.leaders(vectors, THRESHOLD, 0, engine, folder))
        used = time.process_time() - used
        near_pairs.leaders = decide
        file = next(folder.rglob(on_cluster.VECTORS))
        shards = sorted(file.parent.glob(f"kept-*-{on_cluster.SHARD}.npy"))
        work = on_cluster._start(file, THRESHOLD)
        tasks = [on_cluster.Task(len(vectors) - on_cluster.PIECE, len(vectors), shard) for shard in shards[:5]]
        torch.set_num_threads(1)
        each = [seconds(lambda task=task: work(task))[0] for task in tasks]
        torch.set_num_threads(2)
    kept = int((leader == np.arange(len(leader))).sum())
    found = {
        "seconds": whole,
        "kept": kept,
        "seconds in which the started process decided": sum(own),
        "of its processor time": used,
        "share": sum(own) / whole,
        "seconds of a block's decision": own,
        "seconds of a round of 16 tasks that do nothing": rounds[1:],
        "seconds of a task on one core": each,
        "GB": dict(held),
    }
    for what, value in found.items():
        print(f"{what}: {np.round(value, 3).tolist() if isinstance(value, float | list) else value}")
    parts = (statistics.median(each), statistics.median(own), statistics.median(rounds[1:]))
    found["hours"] = {
        f"{rows} rows": {cores: round(hours(rows, kept / options.rows, cores, *parts), 3) for cores in CORES}
        for rows in (10_000_000, 50_000_000, 100_000_000)
    }
    print(f"hours by these parts, by cores: {found['hours']}")
    return {f"{options.rows} rows": found}


def hours(rows: int, share: float, cores: int, task: float, decide: float, a_round: float) -> float:
    """Hours of a search by its parts, if the started process has two cores and a task one, and `share` is kept."""
    from image_to_prompts.search.on_cluster import BLOCK, PIECE, SHARD

    total = 0.0
    for start in range(0, rows, BLOCK):
        tasks = math.ceil(start * share / SHARD) * (BLOCK // PIECE)
        total += math.ceil(tasks / cores) * task + (a_round if tasks else 0) + decide
    return total / 3600


def stages(options: argparse.Namespace) -> dict[str, object]:
    result: dict[str, object] = {}
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
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("stages", "law", "dedupe"))
    parser.add_argument("--texts", type=int, default=50_000)
    parser.add_argument("--pictures", type=int, default=2000)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--rows", type=int, default=1_000_000)
    options = parser.parse_args()
    os.environ.pop("OPENBLAS_CORETYPE", None)
    if options.what == "stages":
        record(__file__, "Ray", stages(options))
    else:
        record(__file__, options.what, {"law": law, "dedupe": deduplicated}[options.what](options))


if __name__ == "__main__":
    main()
