"""Atomic writes: a file is there whole, or not at all; and memory of mapped files."""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import json
import mmap
import os
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .errors import UserError, explained

if TYPE_CHECKING:
    import numpy as np


@contextlib.contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """Yields a temporary path beside `path` that replaces it only when the block ends without an error.

    Raises:
        UserError: If the folder cannot be made, for example because a part of the path is a regular file.
    """
    make_folder(path.parent)
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        yield part
        part.replace(path)
    except OSError as error:  # a full disk names no file, and nobody knows the temporary one
        if error.errno is not None and error.filename in (None, str(part)):
            error.filename = str(path)
        raise
    finally:
        part.unlink(missing_ok=True)


def make_folder(folder: Path) -> Path:
    """Makes `folder` and its parents; raises UserError where a regular file stands in the way."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError) as error:
        raise UserError(f"{folder}: a part of this path is a regular file; choose another output path") from error
    except PermissionError as error:
        raise UserError(f"{folder}: no permission to write here; choose another output path") from error
    return folder


def shown(path: Path | str) -> str:
    """A path, or what is said of one, as text that can be written anywhere; bytes that are not UTF-8 are replaced."""
    return os.fsencode(path).decode("utf-8", "replace")


def write_text(path: Path, text: str) -> None:
    """Writes UTF-8 text atomically."""
    with atomic_path(path) as part:
        part.write_text(text, encoding="utf-8", newline="")


def write_array(path: Path, array: np.ndarray) -> None:
    """Writes an array as .npy atomically."""
    write_blocks(path, array.shape, array.dtype, [array])


def write_blocks(path: Path, shape: tuple[int, ...], dtype: np.dtype, blocks: Iterable[np.ndarray]) -> None:
    """Writes an array as .npy atomically, without holding more than a block of it.

    Args:
        path: Where to.
        shape: Of the whole.
        dtype: Of the whole.
        blocks: Its rows, in order.
    """
    import numpy as np

    header = {"descr": np.lib.format.dtype_to_descr(np.dtype(dtype)), "fortran_order": False, "shape": shape}
    with atomic_path(path) as part, part.open("wb") as file:
        np.lib.format.write_array_header_1_0(file, header)
        for block in blocks:  # by Python: NumPy's own writing does not say that a disk is full, a mapped file kills
            file.write(np.ascontiguousarray(block, dtype).data)


def let_go(array: np.ndarray) -> None:
    """Has the system forget what it read of an array in a mapped file, which would count as memory in use."""
    base: Any = array
    while base is not None and not isinstance(base, mmap.mmap):
        base = getattr(base, "base", None)
    if base is not None and hasattr(mmap, "MADV_DONTNEED"):
        base.madvise(mmap.MADV_DONTNEED)


def write_tensors(path: Path, tensors: dict[str, Any]) -> None:
    """Writes tensors, all of PyTorch or all of NumPy, as .safetensors atomically.

    The library writes to a temporary file of its own first; here it lies in a folder that `sweep` knows.
    """
    import numpy as np

    are_arrays = isinstance(next(iter(tensors.values())), np.ndarray)
    library = importlib.import_module(f"safetensors.{'numpy' if are_arrays else 'torch'}")
    folder = make_folder(path.with_name(f".{path.name}.{os.getpid()}.part"))
    try:
        library.save_file(tensors, folder / path.name)
        (folder / path.name).replace(path)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def read_tensors(
    path: Path, remedy: str = "run the command that wrote it again", names: Iterable[str] = ()
) -> dict[str, np.ndarray]:
    """Reads arrays that `write_tensors` wrote; all of them, or those of some names.

    Raises:
        UserError: If the file is damaged or lacks a name; `remedy` says what helps.
    """
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    try:
        found = load_file(path)
        return {name: found[name] for name in names or found}
    except (OSError, KeyError, SafetensorError) as error:
        if explained(error):  # the disk or memory is to blame
            raise
        raise UserError(f"{path}: damaged: {error}; {remedy}") from error


def write_json(path: Path, value: Any) -> None:
    """Writes indented JSON atomically."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def sha256(path: Path) -> str:
    """SHA-256 of a file, as 64 hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
