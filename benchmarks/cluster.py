"""Ray with two actors beside the local engine on two cores: texts embedded, scenes drawn; the results are compared.

python benchmarks/cluster.py [--texts 50000] [--pictures 2000] [--rounds 3]        writes cluster.json

Start-up (Ray itself, then an actor with its models) is timed with 40 texts or 64 pictures first and stands apart.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
from turns import record

RAY = {"engine": "ray", "actors": 2}


def texts(count: int) -> list[str]:
    """Different prompts of the embedded grammar."""
    from image_to_prompts.generate import grammar

    found: dict[str, None] = {}
    index = 0
    while len(found) < count:
        found[grammar.prompt(0, index)] = None
        index += 1
    return list(found)


def encoded(prompts: list[str], values: dict[str, object]) -> np.ndarray:
    from image_to_prompts import text_cache, text_encoder
    from image_to_prompts.engine import EngineConfig

    with tempfile.TemporaryDirectory() as folder:
        os.environ[text_cache.FOLDER] = folder
        return text_encoder.encode(prompts, engine=EngineConfig(**values))


def drawn(prompts: list[str], values: dict[str, object]) -> list[str]:
    from image_to_prompts import metadata, render

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        frame = metadata.with_keys(pd.DataFrame({"prompt": prompts}), folder)
        metadata.write_table(folder / "m.csv", frame)
        return render.run(render.Config(metadata=folder / "m.csv", out=folder / "i", **values))["sha256"].tolist()


def seconds(do: Callable[[], object]) -> tuple[float, object]:
    begun = time.perf_counter()
    found = do()
    return time.perf_counter() - begun, found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--texts", type=int, default=50_000)
    parser.add_argument("--pictures", type=int, default=2000)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    result = {}
    for name, work, prompts, few in (
        ("encode", encoded, texts(options.texts), 40),
        ("render", drawn, texts(options.pictures), 64),
    ):
        start_up, _ = seconds(lambda work=work, some=prompts[:few]: work(some, RAY))
        again, _ = seconds(lambda work=work, some=prompts[:few]: work(some, RAY))
        work(prompts[:few], {})
        taken, same = {"local": [], "ray": []}, True
        for _ in range(options.rounds):
            local, expected = seconds(lambda work=work, prompts=prompts: work(prompts, {}))
            ray, found = seconds(lambda work=work, prompts=prompts: work(prompts, RAY))
            same &= np.array_equal(found, expected)
            taken["local"].append(round(local, 2))
            taken["ray"].append(round(ray, 2))
        ratios = sorted(ray / local for ray, local in zip(taken["ray"], taken["local"], strict=True))
        print(f"{name}, {len(prompts)} rows: {taken}, ray / local {', '.join(f'{one:.2f}' for one in ratios)}")
        print(
            f"  start-up with {few} rows: {start_up:.1f} s the first time, {again:.1f} s with Ray running; same: {same}"
        )
        found = {"rows": len(prompts), "seconds": taken, "ray / local": ratios, "same": bool(same)}
        result[name] = found | {"start-up": [round(start_up, 2), round(again, 2)]}
    record(__file__, "two actors", result)


if __name__ == "__main__":
    main()
