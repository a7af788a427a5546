"""The competition's submission file: one writer and one validator.

Format: header `imgId_eId,val`; for each image, sorted by its file's stem, 384 rows `<stem>_<0..383>` in numeric order.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import islice
from math import isfinite
from pathlib import Path

import numpy as np

from ..data import images
from ..models.text_encoder import DIMENSION
from ..run.errors import UserError
from ..run.files import atomic_path

HEADER = "imgId_eId,val"


def check_stems(files: Sequence[Path]) -> list[str]:
    """Stems of image files, by which a submission knows them; raises UserError if two share one, or one has a comma."""
    stems = [file.stem for file in files]
    if split := [file for file in files if "," in file.stem]:
        raise UserError(f"{split[0]}: a submission cannot hold a name with a comma; rename the file")
    twice = [stem for stem, count in Counter(stems).items() if count > 1]
    if twice:
        both = ", ".join(str(file) for file in files if file.stem == twice[0])
        raise UserError(f"two images share the stem {twice[0]!r}: {both}; rename one, a submission holds stems alone")
    return stems


def write(path: Path, stems: Sequence[str], vectors: np.ndarray) -> None:
    """Writes a submission atomically.

    Args:
        path: CSV to write.
        stems: File stem of each image, distinct, in any order.
        vectors: float32 (len(stems), 384), finite and not zero.

    Raises:
        UserError: If a stem repeats.
        ValueError: If the vectors have another shape, or one is zero or not finite.
    """
    if vectors.shape != (len(stems), DIMENSION):
        raise ValueError(f"vectors have shape {vectors.shape}, need {(len(stems), DIMENSION)}")
    if not np.isfinite(vectors).all() or not np.abs(vectors).sum(1).all():
        raise ValueError("a vector is zero or not finite")
    check_stems([Path(f"{stem}.png") for stem in stems])
    with atomic_path(path) as part, part.open("w", encoding="utf-8", newline="") as file:
        file.write(f"{HEADER}\n")
        for row in sorted(range(len(stems)), key=stems.__getitem__):
            stem = stems[row]
            file.writelines(f"{stem}_{i},{value:.9g}\n" for i, value in enumerate(vectors[row].tolist()))


def read(path: Path, stems: Sequence[str]) -> np.ndarray:
    """Reads a file that `write` wrote.

    Args:
        path: The submission.
        stems: Stems of its images, in the order that is wanted.

    Returns:
        float32 (len(stems), 384).
    """
    with path.open(encoding="utf-8") as file:
        next(file)
        values = np.array([float(line.rpartition(",")[2]) for line in file], np.float32)
    order = {stem: row for row, stem in enumerate(sorted(stems))}
    return values.reshape(-1, DIMENSION)[[order[stem] for stem in stems]]


def check(path: Path, image_folder: Path | None = None) -> int:
    """Validates a submission file.

    Args:
        path: The file.
        image_folder: Images that it must cover, one each.

    Returns:
        The number of images.

    Raises:
        UserError: With the line number, at the first thing that is wrong.
    """
    if not path.is_file():
        raise UserError(f"{path}: no such file; run infer first")
    expected = sorted(check_stems(images.find(image_folder))) if image_folder else None
    count, last, line = 0, "", 2
    for block in _blocks(path):
        stem = _check_block(path, line, block)
        if stem <= last:
            what = "stands twice; remove one" if stem == last else f"after {last!r}; sort images by stem, each once"
            raise UserError(f"{path}: line {line}: image {stem!r} {what}")
        if expected is not None and [stem] != (wanted := expected[count : count + 1]):
            what = f"expected {wanted[0]!r}" if wanted else "one image more than the folder has"
            raise UserError(f"{path}: line {line}: image {stem!r}, {what}; one image of the folder each")
        count, last, line = count + 1, stem, line + len(block)
    if not count:
        raise UserError(f"{path}: line 2: no rows")
    if expected is not None and count < len(expected):
        raise UserError(f"{path}: line {line}: image {expected[count]!r} is missing; one image of the folder each")
    return count


def _blocks(path: Path) -> Iterator[list[str]]:
    """The lines below the header, those of one image at a time."""
    try:
        with path.open(encoding="utf-8", newline="") as file:
            header = file.readline().rstrip("\r\n")
            if header != HEADER:
                raise UserError(f"{path}: line 1: header is {header[:60]!r}, must be {HEADER!r}")
            while block := [text.rstrip("\r\n") for text in islice(file, DIMENSION)]:
                yield block
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: bytes that are not UTF-8; write it again") from error


def _check_block(path: Path, line: int, block: list[str]) -> str:
    """Checks the up to 384 lines of one image, which begin at `line`; returns its stem."""
    stem = block[0].partition(",")[0].rpartition("_")[0]
    nonzero = False
    for i, text in enumerate(block):
        key, comma, value = text.partition(",")
        if not comma or key != f"{stem}_{i}" or not stem:
            raise UserError(f"{path}: line {line + i}: id is {key[:80]!r}, expected '{stem or '<stem>'}_{i}'")
        try:
            number = float(value)
        except ValueError:
            number = float("nan")
        if not isfinite(number):
            raise UserError(f"{path}: line {line + i}: value {value[:40]!r} is not a finite number")
        nonzero |= number != 0
    if len(block) < DIMENSION:
        raise UserError(f"{path}: line {line + len(block)}: image {stem!r} ends after {len(block)} of {DIMENSION} rows")
    if not nonzero:
        raise UserError(f"{path}: line {line}: image {stem!r} is a zero vector, its cosine is undefined")
    return stem
