"""Seconds and memory of reading, cleaning and writing DiffusionDB's metadata, and rows a second of each rule.

python benchmarks/sources.py collect [--rows 2000000]     a Parquet file of DiffusionDB's schema and half of it; memory
python benchmarks/sources.py rules                        each rule alone on 200,000 prompts, `english` as well

The prompts are real ones where ../shared/data is there, else the grammar's, two thirds of them put together from two,
so that few repeat, and a tenth with the mess that the rules are for. Figures go to benchmarks/sources.json.
"""

from __future__ import annotations

import argparse
import gzip
import tempfile
import time
from pathlib import Path

import numpy as np
from turns import Prepared, in_turns, record

SHARED = Path(__file__).resolve().parents[2] / "shared" / "data" / "real_prompts.txt.gz"
MESS = (
    "(masterpiece:1.2), ",
    "<lora:detail:0.8> ",
    "&amp; ",
    "PokÃ©mon, ",
    "https://a.b/c ",
    "  \t",
    "“quoted” ",
    "{{cute}} ",
)
CHUNK = 100_000
CHAIN = ("mojibake", "unicode", "interface", "html", "urls", "blank", "words", "characters", "size", "nsfw", "truncate")


def known() -> list[str]:
    if SHARED.is_file():
        with gzip.open(SHARED, "rt", encoding="utf-8") as file:
            return file.read().splitlines()
    from image_to_prompts.embedded import grammar

    return [grammar.prompt(0, number) for number in range(20_000)]


def prompts(count: int, seed: int) -> list[str]:
    """Prompts of which few repeat."""
    rng, texts = np.random.default_rng(seed), known()
    first, second, mess = (rng.integers(0, size, count) for size in (len(texts), 3 * len(texts) // 2, 10 * len(MESS)))
    return [
        (MESS[m] if m < len(MESS) else "") + texts[a] + (f", {texts[b]}" if b < len(texts) else "")
        for a, b, m in zip(first.tolist(), second.tolist(), mess.tolist(), strict=True)
    ]


def write_metadata(path: Path, rows: int) -> None:
    """A file of DiffusionDB's schema."""
    import pyarrow as pa
    from pyarrow import parquet

    writer = None
    for start in range(0, rows, CHUNK):
        count, rng = min(CHUNK, rows - start), np.random.default_rng(start)
        table = pa.table(
            {
                "image_name": [f"{start + number:032x}.png" for number in range(count)],
                "prompt": prompts(count, start),
                "part_id": pa.array(rng.integers(1, 2001, count), pa.uint16()),
                "seed": pa.array(rng.integers(0, 2**32, count), pa.uint32()),
                "step": pa.array(np.full(count, 50), pa.uint16()),
                "cfg": pa.array(np.full(count, 7.0), pa.float32()),
                "sampler": pa.array(np.full(count, 8), pa.uint8()),
                "width": pa.array(rng.choice([512, 512, 512, 1024], count), pa.uint16()),
                "height": pa.array(np.full(count, 512), pa.uint16()),
                "user_name": [f"{number % 10_000:064x}" for number in range(count)],
                "timestamp": pa.array(np.zeros(count, np.int64), pa.timestamp("us", "UTC")),
                "image_nsfw": pa.array(rng.random(count) ** 4, pa.float32()),
                "prompt_nsfw": pa.array(rng.random(count) ** 8, pa.float32()),
            }
        )
        writer = writer or parquet.ParquetWriter(path, table.schema)
        writer.write_table(table)
    writer.close()


def collecting(path: Path) -> Prepared:
    from image_to_prompts.generate import collect

    def run() -> None:
        with tempfile.TemporaryDirectory() as folder:
            report = collect.collect("diffusiondb", (str(path),), Path(folder) / "out.csv", rule_names=CHAIN)
        print(report.iloc[:, :4].to_string(index=False))

    return run


def grown(options: argparse.Namespace) -> dict[str, object]:
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        ways = {}
        for rows in (options.rows // 2, options.rows):
            path = Path(folder) / f"metadata_{rows}.parquet"
            write_metadata(path, rows)
            print(f"{rows:,} rows, {path.stat().st_size / 1e6:.0f} MB")
            ways[f"{rows:,} rows"] = (collecting, (path,), {})
        seconds, memory = in_turns(ways, options.rounds, warm=False)
        for name in ways:
            print(f"{name}: {', '.join(f'{one:.1f}' for one in seconds[name])} s, peak {memory[name]:.2f} GB")
            found[name] = {"seconds": seconds[name], "peak GB": memory[name]}
    return found


def rules(options: argparse.Namespace) -> dict[str, object]:
    import polars as pl

    from image_to_prompts.generate.rules import RULES

    texts, found = prompts(200_000, 0), {}
    frame = pl.DataFrame({"prompt": texts, "width": [512] * len(texts), "image_nsfw": [0.1] * len(texts)})
    for name, rule in RULES.items():
        rule(frame.head(1000))  # loads what it needs
        rates = []
        for _ in range(options.rounds):
            start = time.perf_counter()
            rule(frame)
            rates.append(len(frame) / (time.perf_counter() - start))
        print(f"{name:12}{', '.join(f'{rate:12,.0f}' for rate in rates)} rows a second")
        found[name] = rates
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("collect", "rules"))
    parser.add_argument("--rows", type=int, default=2_000_000)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    found = {"collect": grown, "rules": rules}[options.what](options)
    record(__file__, options.what, found)


if __name__ == "__main__":
    main()
