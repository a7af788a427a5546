"""`describe` on a run's images: what its texts are worth, and how fast it is beside a loop over one image at a time.

python benchmarks/describe.py quality [--run runs/default]                prints a table, writes describe.json
python benchmarks/describe.py speed [--run runs/default] [--count 500] [--rounds 3]

The run is what `make run` leaves: the images are its held-out ones, and no known prompt is one of theirs. Speed: the
loop decodes an image, shows it to the same checkpoints, asks FAISS's flat index and composes with
sentence-transformers; each way has a process of its own, and they run in turns. Loading is not counted.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import os
from pathlib import Path
from types import SimpleNamespace

import numpy as np
from turns import Prepared, in_turns, lines, ratio, record


def _describer(run: Path):
    from image_to_prompts import describer, profiles, workspace

    found = describer.Describer(profiles.default_config("describe", workspace.Run(run), "embedded"))
    gc.freeze()  # as the command does; without it accelerate's collections would slow the loops
    return found


def files(run: Path, count: int) -> list[Path]:
    from image_to_prompts import images, workspace

    of = workspace.Run(run)
    found = images.find(of.test_images)
    return [*found, *images.find(of.train_images)][:count]


def ours(run: Path, count: int) -> Prepared:
    from image_to_prompts.describer import BLOCK

    describer, some = _describer(run), files(run, count)
    describer.describe(some[:2])
    return lambda: [describer.describe(some[start : start + BLOCK]) for start in range(0, len(some), BLOCK)]


def same_code_one_by_one(run: Path, count: int) -> Prepared:
    describer, some = _describer(run), files(run, count)
    describer.describe(some[:2])
    return lambda: [describer.describe([file]) for file in some]


def loop(run: Path, count: int) -> Prepared:
    import faiss

    from image_to_prompts import text_encoder

    describer, some = _describer(run), files(run, count)
    model, prompts = text_encoder.load(), _describer(run).index.prompts
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
    describer.index = SimpleNamespace(search=search)
    describer.describe(some[:1])
    return lambda: [describer.describe([file]) for file in some]


def quality(run: Path) -> None:
    from image_to_prompts import metadata, text_scores, workspace

    of = workspace.Run(run)
    frame = metadata.read(of.test_images / workspace.MANIFEST)
    paths = [of.test_images / file for file in frame["file"]]
    table = text_scores.compare(_describer(run), paths, frame["prompt"].tolist(), "classes")
    print(f"{len(paths)} images")
    print(table.round(4).to_string())
    record(__file__, "quality", {"images": len(paths), **table.round(4).T.to_dict()})


def speed(run: Path, count: int, rounds: int) -> None:
    with contextlib.suppress(KeyError):
        del os.environ["OPENBLAS_CORETYPE"]  # FAISS's own BLAS is faster without
    ways = {
        "loop": (loop, (run, count), {}),
        "same code, one image at a time": (same_code_one_by_one, (run, count), {}),
    }
    ways["describe"] = (ours, (run, count), {})
    seconds, memory = in_turns(ways, rounds, warm=False)
    print(f"{count} images: seconds")
    print(lines(seconds, memory, "loop"))
    result = {"images": count, "seconds": seconds, "peak GB": memory}
    record(__file__, "speed", result | {"times as fast": ratio(seconds, "loop", "describe")})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["quality", "speed"])
    parser.add_argument("--run", type=Path, default=Path("runs/default"))
    parser.add_argument("--count", type=int, default=500)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    if options.what == "quality":
        quality(options.run)
    else:
        speed(options.run, options.count, options.rounds)


if __name__ == "__main__":
    main()
