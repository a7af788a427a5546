"""Which files of a folder of weights a model is loaded from, what identifies them, and what is said of damaged ones.

A repository of the Hugging Face hub often holds the same tensors several times: as safetensors and as PyTorch files,
whole and in shards, in float32 and in float16. One of these is downloaded, loaded and hashed: the first that is
complete, in the order safetensors, PyTorch; where a GPU computes in halves anyway, float16 comes first.
"""

import contextlib
import functools
import hashlib
import re
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from ..run.errors import UserError
from ..run.files import sha256, write_json
from ..run.folders import read_json
from . import text_cache

TRANSFORMERS = ("model", "pytorch_model")
CLIP = ("open_clip_model", "open_clip_pytorch_model")
DIFFUSERS = ("diffusion_pytorch_model", *TRANSFORMERS)
_TENSORS = re.compile(
    r"(?P<stem>\w+?)(?:\.(?P<variant>\w+))?(?:-\d{5}-of-(?P<parts>\d{5}))?\.(?P<format>safetensors|bin)"
)
_INDEX = ".index"
FROM_FOLDER = {"local_files_only": True, "trust_remote_code": False}
"""For transformers' from_pretrained: without the second it asks whether to run Python files that lie in the folder."""
REMEMBERED = 10_000_000  # bytes from which on a file's digest is remembered
# Without these a pipeline works: Stable Diffusion 2 has no safety checker, and the extractor serves it alone.
_SPARE = ("feature_extractor", "safety_checker")


@dataclass(frozen=True)
class Layout:
    """How the weights of one library lie in a folder.

    Attributes:
        marker: File that tells such a folder; "": the file of tensors does.
        stems: What files of tensors are called.
        components: Whether the tensors lie in sub-folders.
        settings: Its other files.
    """

    marker: str
    stems: tuple[str, ...]
    components: bool = False
    settings: tuple[str, ...] = ("*.json", "*.txt")


LAYOUTS = {
    "transformers": Layout("config.json", TRANSFORMERS),
    "sentence-transformers": Layout("modules.json", TRANSFORMERS),
    "diffusers": Layout("model_index.json", DIFFUSERS, components=True),
    "open_clip": Layout("", CLIP, settings=("open_clip_config.json",)),
    "timm": Layout("", TRANSFORMERS, settings=("config.json",)),
}


def tensors(names: Iterable[str], stems: tuple[str, ...], half: bool = False) -> list[str]:
    """The files of tensors that a model is loaded from: of each folder one complete format.

    Args:
        names: Paths of files, relative to the model's folder, with slashes.
        stems: What such files are called.
        half: Whether float16 comes before float32.

    Returns:
        Those of the paths that are loaded, in order.
    """
    found: dict[str, dict[tuple[str, str, str, int], list[str]]] = {}
    for name in sorted(names):
        path = PurePosixPath(name)
        match = _TENSORS.fullmatch(path.name)
        if match and match["stem"] in stems and match["variant"] in (None, "fp16"):
            kind = (match["format"], match["variant"] or "", match["stem"], int(match["parts"] or 1))
            found.setdefault(str(path.parent), {}).setdefault(kind, []).append(name)

    def rank(kind: tuple[str, str, str, int]) -> tuple[bool, bool, int, int]:
        suffix, variant, stem, parts = kind
        return (variant == "fp16") != half, suffix == "bin", stems.index(stem), parts

    chosen: list[str] = []
    for kinds in found.values():
        whole = [kind for kind, files in kinds.items() if len(files) == kind[3]]
        if whole:
            chosen += kinds[min(whole, key=rank)]
    return chosen


def needed(names: Iterable[str], layout: Layout, half: bool = False) -> list[str]:
    """The files that a model is loaded from, its settings among them; see `tensors`."""
    names = list(names)
    chosen = tensors((name for name in names if layout.components == ("/" in name)), layout.stems, half)
    folders = {PurePosixPath(name).parent for name in chosen}
    settings = []
    for name in names:
        path = PurePosixPath(name)
        of_others = _INDEX in path.suffixes and not (path.parent in folders and _of_index(path.name, chosen))
        if any(map(path.match, layout.settings)) and len(path.parts) <= 2 and not of_others:
            settings.append(name)
    return sorted({*settings, *chosen})


def _of_index(index: str, chosen: list[str]) -> bool:
    """Whether `model.safetensors.index.json`, or `.index.fp16.json`, belongs to chosen shards."""
    stem, _, rest = index.partition(".")
    kind, _, variant = rest.removesuffix(".json").partition(_INDEX)
    shard = f"{stem}{variant}-00001-of-"
    return any(PurePosixPath(name).name.startswith(shard) and name.endswith(kind) for name in chosen)


def names_in(folder: Path) -> list[str]:
    """Paths of the files in a folder and its sub-folders, relative to it."""
    return [path.relative_to(folder).as_posix() for path in (*folder.glob("*"), *folder.glob("*/*")) if path.is_file()]


def lacks(folder: Path, layout: Layout) -> str:
    """What a folder lacks of a model of a layout, in words; "" if it is complete."""
    if layout.marker and not (folder / layout.marker).is_file():
        return layout.marker
    names = names_in(folder)
    parts = [""]
    if layout.components:
        listed = read_json(folder / layout.marker)
        parts = [name for name, what in listed.items() if isinstance(what, list) and what[0] and name not in _SPARE]
        for part in parts or ["what it lists"]:
            if not (folder / part).is_dir():
                return f"{part}/"
    with_tensors = {name.rpartition("/")[0] for name in needed(names, layout) if _is_tensors(name)}
    for part in parts:
        if part not in with_tensors and (not part or f"{part}/config.json" in names):
            return f"{part}/*.safetensors or *.bin" if part else " or ".join(_files_of(layout))
    return ""


def _files_of(layout: Layout) -> list[str]:
    return [f"{stem}.{end}" for stem, end in zip(layout.stems, ("safetensors", "bin"), strict=False)]


def _is_tensors(name: str) -> bool:
    return bool(_TENSORS.fullmatch(PurePosixPath(name).name))


def files(path: Path, half: bool = False) -> list[Path]:
    """The files that a model is loaded from.

    Args:
        path: A file of tensors, the first of several shards, or a folder.
        half: See `tensors`.
    """
    if path.is_file():
        match = _TENSORS.fullmatch(path.name)
        if not match or not match["parts"]:
            return [path]
        ends = f"of-{match['parts']}.{match['format']}"
        return sorted(path.parent.glob(f"{path.name.removesuffix(ends)[:-6]}*{ends}"))
    components = (path / LAYOUTS["diffusers"].marker).is_file()
    layout = LAYOUTS["diffusers"] if components else LAYOUTS["transformers"]
    return [path / name for name in needed(names_in(path), layout, half)]


def variant(folder: Path, half: bool = False) -> str | None:
    """What `from_pretrained` of transformers and diffusers wants to be told: "fp16" where such files are loaded."""
    found = [file.name for file in files(folder, half) if _is_tensors(file.name)]
    return "fp16" if any(".fp16" in name for name in found) else None


def inside(path: Path, layout: Layout, single_files: Iterable[str] = ()) -> Path | None:
    """What a model of a layout is loaded from in a folder; None if the folder holds none, or not all of it.

    Args:
        path: The folder; also that of a repository in the hub's cache, of which the newest version counts.
        layout: Its layout.
        single_files: Names of files that are the model by themselves.

    Returns:
        The folder; of a library that loads files, the file of tensors or the first of its shards.
    """
    snapshots = sorted(path.glob("snapshots/*"), key=lambda one: one.stat().st_mtime, reverse=True)
    for folder in (path, *snapshots):
        if not lacks(folder, layout):
            first = tensors((name for name in names_in(folder) if "/" not in name), layout.stems)
            return folder if layout.marker else folder / first[0]
        for name in single_files:
            if (folder / name).is_file():
                return folder / name
    return None


def wants(layout: Layout) -> str:
    """What a folder of a layout must hold, in words."""
    if layout.components:
        return f"{layout.marker} and the folders that it lists"
    which = " or ".join(_files_of(layout))
    return f"{layout.marker} and {which}" if layout.marker else which


def check_shards(file: Path) -> list[Path]:
    """The shards of which a file is the first; raises UserError if one is missing."""
    found = files(file)
    match = _TENSORS.fullmatch(file.name)
    if match and match["parts"] and len(found) != int(match["parts"]):
        raise UserError(f"{file}: {len(found)} of {int(match['parts'])} shards are there; download it again")
    return found


def digest(path: Path, half: bool = False) -> str:
    """SHA-256 that identifies a model: of its file, or of the names and digests of all files that are loaded.

    Args:
        path: From `weights.locate`.
        half: Whether float16 is loaded where there is a choice.
    """
    found = files(path, half)
    if found == [path]:
        return file_digest(path)
    base = path if path.is_dir() else path.parent
    listing = [f"{file.relative_to(base).as_posix()} {file_digest(file)}" for file in found]
    return hashlib.sha256("\n".join(listing).encode()).hexdigest()


def file_digest(file: Path) -> str:
    """SHA-256 of a file; of a large one it is remembered by inode, size and times, from process to process."""
    about = file.stat()
    if about.st_size < REMEMBERED:
        return sha256(file)
    return _remembered(file, f"{about.st_dev} {about.st_ino} {about.st_size} {about.st_mtime_ns} {about.st_ctime_ns}")


@functools.cache
def _remembered(file: Path, key: str) -> str:
    memory = text_cache.path().with_name("digests.json")
    known = read_json(memory)
    if not isinstance(known.get(key), str):
        known = read_json(memory) | {key: sha256(file)}
        with contextlib.suppress(OSError, UserError):  # where nothing can be kept it is worked out again
            write_json(memory, known)
    return known[key]


@contextlib.contextmanager
def reading(path: Path, what: str) -> Iterator[None]:
    """Turns any failure to load the weights at `path` into one line that names the damaged file, if one is found."""
    if "transformers" in sys.modules:  # a stage has one bar, its own
        sys.modules["transformers"].utils.logging.disable_progress_bar()
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # each library raises its own kind for a missing, foreign or torn file
        for file in sorted(path.rglob("*.safetensors") if path.is_dir() else [path]):
            if file.suffix == ".safetensors" and (problem := damage(file)):
                raise UserError(f"{file}: damaged ({problem}); download it again") from error
        said = str(error).strip().splitlines() or [type(error).__name__]
        raise UserError(f"{path}: not {what}: {said[0]}") from error


def damage(file: Path) -> str:
    """What is wrong with a .safetensors file's head and length; "" if nothing is."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, "numpy"):
            return ""
    except (OSError, SafetensorError) as error:
        return str(error)
