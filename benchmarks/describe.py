"""`describe` on a run's images: what its texts are worth, and how fast it is beside a loop over one image at a time.

python benchmarks/describe.py quality [--run runs/default]                prints a table, writes describe.json
python benchmarks/describe.py texts [--run runs/default] [--prompts real_prompts.txt.gz]
python benchmarks/describe.py speed [--run runs/default] [--count 500] [--rounds 5]

The run is what `make run` leaves: the images are its held-out ones, and no known prompt is one of theirs. Speed: the
loop decodes an image, shows it to the same checkpoints, asks FAISS's flat index and composes with
sentence-transformers; each way has a process of its own, and they take turns, a part of the images each round, so that
both have described all of them at the end. Loading is not counted.

Texts: how near composed prompts come to the true ones, and whether they read like prompts. One half of the known
prompts guides the search, a trigram model of the other half judges: its perplexity of composed prompts, beside that of
the true ones. The same for real prompts, a text a line, whose own embeddings are the predictions.
"""

from __future__ import annotations

import argparse
import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING

import numpy as np
from turns import Prepared, in_turns, lines, ratio, record

if TYPE_CHECKING:
    from image_to_prompts.describe import Describer


def _describer(run: Path) -> Describer:
    from image_to_prompts import describe, profiles
    from image_to_prompts.run import folders

    return describe.Describer(profiles.default_config("describe", folders.Run(run), "embedded"))


def parts(run: Path, count: int, rounds: int) -> Iterator[list[Path]]:
    """A part of `count` images for each round."""
    from image_to_prompts.data import images
    from image_to_prompts.run import folders

    of = folders.Run(run)
    found = [*images.find(of.test_images), *images.find(of.train_images)][:count]
    yield from (found[part::rounds] for part in range(rounds))


def ours(run: Path, count: int, rounds: int) -> Prepared:
    describer, some = _describer(run), parts(run, count, rounds)
    describer.describe(next(parts(run, 2, 1)))
    return lambda: describer.describe(next(some))


def loop(run: Path, count: int, rounds: int) -> Prepared:
    import faiss
    from sentence_transformers import SentenceTransformer

    from image_to_prompts.models import text_encoder, weights

    describer, some = _describer(run), parts(run, count, rounds)
    model, prompts = SentenceTransformer(str(weights.locate(text_encoder.NAME))), describer.index.prompts
    index = faiss.IndexFlatIP(text_encoder.DIMENSION)
    index.add(np.ascontiguousarray(describer.index.vectors))

    def encode(texts: list[str]) -> np.ndarray:
        if not texts:
            return np.zeros((0, text_encoder.DIMENSION), np.float32)
        return model.encode(texts, batch_size=32, normalize_embeddings=True, show_progress_bar=False)

    def search(queries: np.ndarray, count: int) -> list[list[tuple[str, float]]]:
        cosines, rows = index.search(queries, count)
        return [
            [(prompts[row].as_py(), cosine) for row, cosine in zip(*both, strict=True)]
            for both in zip(rows.tolist(), cosines.tolist(), strict=True)
        ]

    text_encoder.encode_once = encode
    describer.index = SimpleNamespace(search=search, some=describer.index.some)
    describer.describe(next(parts(run, 2, 1)))
    return lambda: [describer.describe([file]) for file in next(some)]


def quality(run: Path) -> None:
    """Each way's mean cosine to prediction and truth, and how often it is nearer than the nearest known prompt."""
    import pandas as pd

    from image_to_prompts.data import metadata
    from image_to_prompts.encode import encoders
    from image_to_prompts.models import metrics, text_encoder
    from image_to_prompts.run import folders

    of, describer = folders.Run(run), _describer(run)
    frame = metadata.read(of.test_images / folders.MANIFEST)
    files, truth = [of.test_images / file for file in frame["file"]], frame["prompt"].tolist()
    found = describer.describe(files)
    predicted = np.stack([one.vector for one in found])
    targets = text_encoder.encode(truth)
    ten = [[text for text, _ in some] for some in describer.index.search(predicted, 10)]
    flat = text_encoder.encode([text for some in ten for text in some]).reshape(len(ten), -1, text_encoder.DIMENSION)
    luckiest = np.einsum("ikd,id->ik", flat, targets).argmax(1)
    ways = {
        "nearest known prompt": flat[:, 0],
        "composed": text_encoder.encode([one.prompt for one in found]),
        "of the ten nearest the one nearest to the truth": flat[np.arange(len(ten)), luckiest],
        "the prediction itself, no text": predicted,
    }
    ways["ImageNet classes"] = encoders.encode([encoders.build("classes", 224)], files)[0].vectors
    base = (metrics.unit(flat[:, 0]) * targets).sum(1)
    rows = {}
    for name, vectors in ways.items():
        to_truth = (metrics.unit(vectors) * targets).sum(1)
        low, high = metrics.bootstrap(to_truth)
        rows[name] = {
            "to the prediction": metrics.mean_cosine(vectors, predicted),
            "to the truth": float(to_truth.mean()),
            "from": low,
            "to": high,
            "nearer than nearest": float((to_truth > base).mean()),
            "farther": float((to_truth < base).mean()),
        }
    table = pd.DataFrame(rows).T.round(4)
    print(f"{len(files)} images")
    print(table.to_string())
    record(__file__, "quality", {"images": len(files), **table.T.to_dict()})


def texts(run: Path, prompts: Path | None) -> None:
    """Cosine to the truth and perplexity of composed prompts, for scenes and for real prompts, with examples."""
    import gzip
    import random

    from image_to_prompts.data import metadata
    from image_to_prompts.describe import ways
    from image_to_prompts.models import text_encoder
    from image_to_prompts.run import folders

    of, describer = folders.Run(run), _describer(run)
    frame = metadata.read(of.test_images / folders.MANIFEST)
    found = describer.describe([of.test_images / file for file in frame["file"]])
    predicted = np.stack([one.vector for one in found])
    result = {"scenes": _texts(frame["prompt"].tolist(), predicted, describer.index.some(ways.KNOWN))}
    if prompts:
        rows = list(dict.fromkeys(gzip.decompress(prompts.read_bytes()).decode("utf-8").splitlines()))
        random.Random(0).shuffle(rows)
        truth = rows[ways.KNOWN :][: len(frame)]
        result["real prompts"] = _texts(truth, text_encoder.encode(truth), rows[: ways.KNOWN])
    record(__file__, "texts", result)


def _texts(truth: list[str], predicted: np.ndarray, known: list[str]) -> dict[str, float]:
    import random

    from image_to_prompts.describe import compose, phrases
    from image_to_prompts.describe.phrases import Trigrams
    from image_to_prompts.models import text_encoder
    from image_to_prompts.search import nearest

    targets = text_encoder.encode(truth)
    rows, _ = nearest.nearest(predicted, text_encoder.encode(known), compose.NEIGHBOURS)
    near = [[known[row] for row in some] for some in rows.tolist()]
    random.Random(1).shuffle(halves := [*known])
    guide, judge = (Trigrams(halves[start::2]) for start in (0, 1))
    composed = compose.compose(predicted, near, phrases.vocabulary(known=known), guide)
    first = [some[0] for some in composed]
    result = {"targets": len(truth), "known prompts": len(known)}
    ways = {"nearest": [some[0] for some in near], "composed": first, "true": truth}
    for name, said in ways.items():
        perplexities = [judge.perplexity(text) for text in said]
        result[f"{name}: to the truth"] = float((text_encoder.encode(said) * targets).sum(1).mean())
        result |= {f"{name}: perplexity, {p}th percentile": float(np.percentile(perplexities, p)) for p in (25, 50, 75)}
    result["different candidates"] = float(np.mean([len(some) for some in composed]))
    result["the nearest one shown"] = float(np.mean([a == b[0] for a, b in zip(first, near, strict=True)]))
    for name, value in result.items():
        print(f"{name:45} {value:.4g}")
    for row in random.Random(2).sample(range(len(truth)), 20):
        print(f"- {truth[row]}\n  - {first[row]}")
    return result


def speed(run: Path, count: int, rounds: int) -> None:
    with contextlib.suppress(KeyError):
        del os.environ["OPENBLAS_CORETYPE"]  # FAISS's own BLAS is faster without
    ways = {"loop": (loop, (run, count, rounds), {}), "describe": (ours, (run, count, rounds), {})}
    seconds, memory = in_turns(ways, rounds, warm=False)
    print(f"{count} images, a {rounds}th each round: seconds")
    print(lines(seconds, memory, "loop"))
    result = {"images": count, "seconds": seconds, "peak GB": memory}
    record(__file__, "speed", result | {"times as fast": ratio(seconds, "loop", "describe")})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["quality", "texts", "speed"])
    parser.add_argument("--run", type=Path, default=Path("runs/default"))
    parser.add_argument("--prompts", type=Path)
    parser.add_argument("--count", type=int, default=500)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    if options.what == "quality":
        quality(options.run)
    elif options.what == "texts":
        texts(options.run, options.prompts)
    else:
        speed(options.run, options.count, options.rounds)


if __name__ == "__main__":
    main()
