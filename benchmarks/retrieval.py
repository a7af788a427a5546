"""A thousand queries over a million prompts: FAISS's flat index, and ours from files; what a bank predicts.

python benchmarks/retrieval.py [nearest] [bank] [scenes] [blend] [pca] [--count 1000000] [--queries 1000] [--rounds 5]
    [--run runs/default]
Prints tables and writes retrieval.json.

nearest  The ten nearest of float32 vectors of 384 numbers.
bank     The 60 nearest of float16 vectors of 512 numbers, as CLIP's are kept, in two files, a tenth as many queries;
         FAISS is given a block of them after the other (`faiss.knn`), as float32. And ours over ten times as many.
scenes   How well a bank predicts the held-out scenes of a `make run`: retrieval, with a second tower, the text head and
         both, beside constant, kNN and ridge; the dual encoder is fitted three times, each without another fold.
blend    What the bank adds to the blend of a `make run`: backbone and ensemble trained three times, each with another
         seed and another fold to validate, and `infer` with the bank and without it on the same held-out scenes.
pca      The share of the 60 nearest of real prompts that stays among them with fewer numbers.

The vectors are those of prompts, each repeated with noise until there are enough; the queries are means of three, as
predictions lie between prompts. Each way has a process of its own; they run in turns. Ours reads the file anew.
"""

from __future__ import annotations

import argparse
import os
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from encode import REAL, read
from turns import Prepared, in_turns, lines, ratio, record

NOISE = 0.6  # length of what is added to a unit vector
NEAREST = 10


def make(folder: Path, count: int, queries: int) -> None:
    """Writes `vectors.npy` and `queries.npy`."""
    from image_to_prompts.models import metrics, text_encoder

    known = text_encoder.encode(read(REAL if REAL.is_file() else None, 20_000), fast=True)
    rng = np.random.default_rng(0)
    kept = np.lib.format.open_memmap(folder / "vectors.npy", "w+", np.float32, (count, known.shape[1]))
    for start in range(0, count, len(known)):
        noise = rng.standard_normal(known.shape, np.float32) * np.float32(NOISE / known.shape[1] ** 0.5)
        kept[start : start + len(known)] = metrics.unit(known + noise)[: count - start]
    kept.flush()
    means = known[rng.integers(0, len(known), (queries, 3))].mean(1)
    np.save(folder / "queries.npy", metrics.unit(means))


def theirs(folder: Path) -> Prepared:
    import faiss

    index = faiss.IndexFlatIP(np.load(folder / "queries.npy").shape[1])
    index.add(np.load(folder / "vectors.npy"))
    queries = np.load(folder / "queries.npy")
    return lambda: index.search(queries, NEAREST)


def ours(folder: Path) -> Prepared:
    from image_to_prompts.search import nearest

    queries = np.load(folder / "queries.npy")
    return lambda: nearest.nearest(queries, np.load(folder / "vectors.npy", mmap_mode="c"), NEAREST)


WIDTH, DEEP, BLOCK = 512, 60, 65_536  # of a bank: numbers a row, rows asked for, rows a block of FAISS


def make_bank(folder: Path, count: int, queries: int) -> None:
    """Writes two files of random unit vectors around 20,000 centres, and `asked.npy`, near to some of them."""
    rng = np.random.default_rng(0)
    centres = rng.standard_normal((20_000, WIDTH), np.float32) / np.float32(WIDTH**0.5)
    for number, rows in enumerate((count // 3, count - count // 3)):
        kept = np.lib.format.open_memmap(folder / f"bank-{number}.npy", "w+", np.float16, (rows, WIDTH))
        for start in range(0, rows, BLOCK):
            some = centres[rng.integers(0, len(centres), min(BLOCK, rows - start))]
            some = some + rng.standard_normal(some.shape, np.float32) * np.float32(NOISE / WIDTH**0.5)
            kept[start : start + len(some)] = some / np.linalg.norm(some, axis=1, keepdims=True)
        kept.flush()
    asked = centres[rng.integers(0, len(centres), (queries, 3))].mean(1)
    np.save(folder / "asked.npy", asked / np.linalg.norm(asked, axis=1, keepdims=True))


def files(folder: Path) -> list[Path]:
    return sorted(folder.glob("bank-*.npy"))


def block_wise(folder: Path) -> Prepared:
    import faiss

    queries = np.load(folder / "asked.npy")

    def search() -> np.ndarray:
        best = np.full((len(queries), DEEP), -np.inf, np.float32)
        for part in (np.load(file, mmap_mode="c") for file in files(folder)):
            for start in range(0, len(part), BLOCK):
                block = part[start : start + BLOCK].astype(np.float32)
                found, _ = faiss.knn(queries, block, DEEP, metric=faiss.METRIC_INNER_PRODUCT)
                best = -np.sort(-np.concatenate([best, found], 1), axis=1)[:, :DEEP]
        return best

    return search


def ours_in_bank(folder: Path) -> Prepared:
    from image_to_prompts.search import nearest

    queries = np.load(folder / "asked.npy")
    return lambda: nearest.nearest(queries, nearest.Parts([nearest.Stored(file) for file in files(folder)]), DEEP)


def told(title: str, slow: str, found: tuple[Any, ...], cosines: tuple[np.ndarray, np.ndarray]) -> dict[str, Any]:
    """Prints what `in_turns` found, and how far cosines are from the right ones; both for the JSON file."""
    seconds, memory = found
    differ = float(np.abs(cosines[0] - cosines[1]).max())
    print(f"{title}: seconds\n{lines(seconds, memory, slow)}\nlargest difference of a cosine {differ:.1e}")
    fast = ratio(seconds, slow, "ours")
    return {"seconds": seconds, "peak GB": memory, "times as fast": fast, "largest difference": differ}


def bench_bank(options: argparse.Namespace) -> None:
    count, queries, ten = options.count, options.queries // 10, "ours, ten times as many"
    with tempfile.TemporaryDirectory() as name, tempfile.TemporaryDirectory() as other:
        folder, large = Path(name), Path(other)
        make_bank(folder, count, queries)
        make_bank(large, 10 * count, queries)
        os.environ.pop("OPENBLAS_CORETYPE", None)
        ways = {"faiss.knn": (block_wise, (folder,), {}), "ours": (ours_in_bank, (folder,), {})}
        found = in_turns({**ways, ten: (ours_in_bank, (large,), {})}, options.rounds)
        cosines = block_wise(folder)(), ours_in_bank(folder)()[1]
    title = f"{count:,} float16 rows of {WIDTH}, {queries:,} queries, {DEEP} nearest"
    result = {"rows": count, "queries": queries, **told(title, "faiss.knn", found, cosines)}
    record(__file__, "bank", {**result, "ten times as many, times": ratio(found[0], ten, "ours")})


def bench_nearest(options: argparse.Namespace) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make(folder, options.count, options.queries)
        os.environ.pop("OPENBLAS_CORETYPE", None)  # FAISS's own BLAS is faster without
        ways = {"FAISS, flat": (theirs, (folder,), {}), "ours": (ours, (folder,), {})}
        found = in_turns(ways, options.rounds)
        cosines = theirs(folder)()[0], ours(folder)()[1]
    title = f"{options.count:,} prompts, {options.queries:,} queries, {NEAREST} nearest"
    result = {"prompts": options.count, "queries": options.queries}
    record(__file__, "nearest", {**result, **told(title, "FAISS, flat", found, cosines)})


def bench_scenes(options: argparse.Namespace) -> None:
    import pandas as pd

    from image_to_prompts import embed, profiles
    from image_to_prompts.encode import embeddings
    from image_to_prompts.run.folders import Run

    run, names = Run(options.run), ("timm-tf_efficientnet_lite2", "timm-tf_efficientnet_lite0")
    known = embeddings.load(run.embeddings, names)
    asked = {}
    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        for which in ("test", "test-openmoji"):
            encoders = tuple(one.replace("timm-", "timm:") for one in names)
            values = {"images": (run.test_images.with_name(which),), "encoders": encoders, "out": work / which}
            embed.run(profiles.default_config("embed", run, "embedded", **values))
            asked[which] = embeddings.load(work / which, names)
        rows = [_scenes(run, fold, known, asked, work / str(fold)) for fold in FOLDS]
    table = pd.concat([pd.DataFrame(row).T.assign(fold=fold) for fold, row in zip(FOLDS, rows, strict=True)])
    print(table.round(4).to_string())
    mean = table.drop(columns="fold").groupby(level=0, sort=False).agg(["mean", "std"])
    print(mean.round(4).to_string())
    record(__file__, "scenes", {str(fold): row for fold, row in zip(FOLDS, rows, strict=True)})


FOLDS = (0, 3, 4)  # 1 and 2 are held out


def _make_bank(run: Any, validates: np.ndarray, known: Any, work: Path) -> list[Any]:
    """Fits a dual encoder of each array on rows that do not validate; `pairs` of those that do; `bank` by the first."""
    from image_to_prompts import embed, profiles
    from image_to_prompts.embedded import dual

    towers = [dual.make(work / name, known, name, validates, work / "pairs") for name in known.arrays]
    texts = (run.train_metadata, run.bank.with_name("new.csv"))
    values = {"texts": texts, "encoders": (f"dual:{work / next(iter(known.arrays))}",), "out": work / "bank"}
    embed.run(profiles.default_config("embed", run, "embedded", **values))
    return towers


def bench_blend(options: argparse.Namespace) -> None:
    from image_to_prompts.encode import embeddings
    from image_to_prompts.models import metrics
    from image_to_prompts.run.folders import Run

    def gained(gain: np.ndarray) -> dict[str, Any]:
        """The mean of the images' gains, and its 95 % interval."""
        return {"gain": [float(gain.mean()), *metrics.bootstrap(gain)]}

    run = Run(options.run)
    known, found = embeddings.load(run.embeddings, ("timm-tf_efficientnet_lite2",)), {}
    gains: dict[str, list[np.ndarray]] = {}
    for seed, fold in enumerate(FOLDS):
        with tempfile.TemporaryDirectory() as name:
            for which, cosines in _blends(run, seed, fold, known, Path(name)).items():
                gain = cosines["with"] - cosines["without"]
                gains.setdefault(which, []).append(gain)
                found[f"{which}, seed {seed}"] = {way: float(one.mean()) for way, one in cosines.items()} | gained(gain)
    for which, each in gains.items():
        found[which] = gained(np.mean(each, 0))
    for name, scores in found.items():
        print(f"{name}: {scores}")
    record(__file__, "blend", found)


def _blends(run: Any, seed: int, fold: int, known: Any, work: Path) -> dict[str, dict[str, np.ndarray]]:
    """Cosines with the truth of the held-out scenes, by images: of the blend without the bank, and with it."""
    from image_to_prompts import ensemble, finetune, infer, profiles
    from image_to_prompts.data import metadata
    from image_to_prompts.models import text_encoder

    _make_bank(run, (known.frame["fold"] == fold).to_numpy(), known, work)
    common = {"seed": seed, "fold": fold, "quiet": True}
    values = {"images": (run.train_images,), "out": work / "backbone", **common}
    finetune.run(profiles.default_config("finetune", run, "embedded", **values))
    ensemble.run(profiles.default_config("ensemble", run, "embedded", out=work / "ensemble", **common))
    models, found = (work / "backbone", work / "ensemble"), {}
    for which in ("test", "test-openmoji"):
        folder = run.test_images.with_name(which)
        manifest = metadata.read_table(folder / "manifest.csv", ("file", "prompt")).set_index("file")
        found[which] = {}
        for way, places in (("without", ()), ("with", (work / "bank",))):
            values = {"images": folder, "checkpoint": models, "bank": places, "pairs": (work / "pairs",), "quiet": True}
            predicted = infer.run(
                profiles.default_config("infer", run, "embedded", out=work / f"{which}-{way}.csv", key=None, **values)
            )
            prompts = manifest.loc[[file.name for file in predicted.files], "prompt"].tolist()
            found[which][way] = (predicted.vectors * text_encoder.encode(prompts)).sum(1)
    return found


def _scenes(run: Any, fold: int, known: Any, asked: dict[str, Any], work: Path) -> dict[str, dict[str, float]]:
    """Scores by way and images, of a dual encoder fitted without a fold, which then fits the settings."""
    from image_to_prompts.models import metrics
    from image_to_prompts.predict import retrieval

    validates = (known.frame["fold"] == fold).to_numpy()
    train = known.targets[~validates]
    towers = _make_bank(run, validates, known, work)
    ways = {
        "no pairs": retrieval.Retrieval(work / "bank"),
        "retrieval and head": retrieval.Retrieval(work / "bank", [work / "pairs"]),
        "with a second tower": retrieval.Retrieval(work / "bank", [work / "pairs"], towers[1].about["encoder"]),
    }
    every = next(iter(known.arrays.values()))
    first = every[~validates]
    weight, bias = metrics.ridge(first, train)
    k = metrics.best_k(every[validates], known.targets[validates], first, train)
    both = ways["retrieval and head"]
    found: dict[str, dict[str, float]] = {}
    for which, table in asked.items():
        features, others = table.arrays.values()
        seen = [towers[0].images(features), towers[1].images(others)]
        predicted = {"constant": np.broadcast_to(train.mean(0), table.targets.shape)}
        predicted["kNN"] = metrics.nearest_mean(features, first, train, k)
        predicted["ridge on the features"] = features @ weight + bias
        predicted |= {name: way(seen if way.second else seen[:1]) for name, way in ways.items()}
        predicted["text head alone"] = both.head(both.bank.queries(seen[0]))
        both.how, kept = replace(both.how, weights=(1.0, 0.0)), both.how
        predicted["retrieval alone"], both.how = both(seen[:1]), kept
        for name, vectors in predicted.items():
            found.setdefault(name, {})[which] = metrics.mean_cosine(vectors, table.targets)
    return found


def bench_pca(options: argparse.Namespace) -> None:
    from image_to_prompts.encode import banks
    from image_to_prompts.models import text_encoder

    vectors = text_encoder.encode(read(REAL, 60_000), fast=True)
    part = np.random.default_rng(0).permutation(len(vectors))
    queries, sample = vectors[part[:1000]], vectors[part[1000:21_000]]
    found = {}
    for dimensions in (256, 192, 128, 64):
        found[str(dimensions)] = share = banks.kept_share(vectors, banks.principal(sample, dimensions), queries)
        print(f"{len(vectors):,} real prompts, 384 to {dimensions} numbers: {share:.3f} of the 60 nearest")
    record(__file__, "pca", {"prompts": len(vectors), "kept share of the 60 nearest": found})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", default=["nearest", "bank"])
    parser.add_argument("--count", type=int, default=1_000_000)
    parser.add_argument("--queries", type=int, default=1000)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--run", type=Path, default=Path("runs/default"))
    options = parser.parse_args()
    for part in options.parts:
        {"nearest": bench_nearest, "bank": bench_bank, "scenes": bench_scenes, "blend": bench_blend, "pca": bench_pca}[
            part
        ](options)


if __name__ == "__main__":
    main()
