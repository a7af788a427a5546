"""What is attached to a Kaggle kernel, as a table: the first thing to look at when something is not found."""

from pathlib import Path

from ..models import weights
from ..models.weights import WEIGHTS
from ..run import folders

# Folders of Kaggle's mount layout of 2026, and how deep below them an input lies; elsewhere it lies at the top.
DEPTHS = {"competitions": 1, "datasets": 2, "notebooks": 2, "models": 5}
MARKERS = {
    "sample_submission.csv": "competition",
    "image_to_prompts-*.whl": "wheels",
    folders.MANIFEST: "images",
    "prompt.npy": "embeddings",
    "prompts/*.csv": "prompts",
    "data_meta/*.csv": "metadata",
}


def find() -> list[Path]:
    """The folder of every attached input, whatever the layout."""
    found = []
    for top in sorted(folders.KAGGLE_INPUT.iterdir()) if folders.KAGGLE_INPUT.is_dir() else ():
        pattern = "/".join(["*"] * DEPTHS.get(top.name, 0))
        found += sorted(path for path in top.glob(pattern) if path.is_dir()) if pattern else [top]
    return found


def table() -> str:
    """One line an input: where it is mounted, how many files and GB it has, what of ours was found in it."""
    holds: dict[Path, list[str]] = {path: [] for path in find()}
    seen = [(what, folders.kaggle_inputs(marker)) for marker, what in MARKERS.items()]
    configs = [path for path in folders.kaggle_inputs("config.json") if folders.is_checkpoint(path.parent)]
    seen.append(("checkpoint", configs))
    seen += [(f"weights of {name}", weights.attached(name)) for name in WEIGHTS]
    for what, paths in seen:
        for mount in {mount for mount in holds for path in paths if path.is_relative_to(mount)}:
            holds[mount].append(what)
    lines = []
    for mount, held in holds.items():
        sizes = [file.stat().st_size for file in mount.rglob("*") if file.is_file()]
        lines.append(f"{mount}: {len(sizes)} files, {sum(sizes) / 1e9:.2f} GB: {', '.join(held) or 'nothing of ours'}")
    return "\n".join(lines) or f"nothing is attached under {folders.KAGGLE_INPUT}"
