"""The transformer ensemble as the project that this one grew from published it: its network, its bare arrays.

    python tools/earlier_ensemble.py import-checkpoint 10K_ensemble_model.ckpt --out checkpoints/earlier
    python tools/earlier_ensemble.py train --embeddings embeddings --out checkpoints/earlier --preset 43k
    python tools/earlier_ensemble.py predict checkpoints/earlier --embeddings embeddings --out submission.csv
    python tools/earlier_ensemble.py import-embeddings clip.npy prompt.npy --images images.txt --out embeddings
    python tools/earlier_ensemble.py export-embeddings embeddings --out bare

Its network attends across the images of a batch: its layers take (sequence, batch, width) and were given (batch, 3,
width). So what it says of an image depends on the others in the batch. The stage `ensemble` does not have this fault.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal, NamedTuple

import numpy as np
import pandas as pd
import torch
import tyro
from torch import nn
from torch.nn.functional import elu

from image_to_prompts.data import metadata
from image_to_prompts.encode import embeddings as stored
from image_to_prompts.ensemble import load_rows, loop
from image_to_prompts.infer import submission
from image_to_prompts.models import backbones, checkpoints, ensemble, metrics, networks, text_encoder
from image_to_prompts.run.errors import UserError
from image_to_prompts.run.files import write_array, write_json, write_tensors, write_text
from image_to_prompts.run.progress import show_log
from image_to_prompts.run.resume import writing

log = logging.getLogger(__name__)
PUBLISHED = (512, 768, 384)  # widths of CLIP ViT-B/32, ConvNeXt-Tiny and the interrogator's text
FILES = ("model.safetensors", "config.json")


class Preset(NamedTuple):
    """One of the seed's configurations, for about so many rows; it trained each for 500 epochs at one learning rate."""

    batch_size: int
    learning_rate: float
    seed: int


PRESETS = {"10k": Preset(64, 5e-4, 0), "43k": Preset(256, 1e-3, 0), "93k": Preset(256, 1e-3, 100)}


class SeedFusion(nn.Module):
    """The network. Its first embedding, CLIP's, has the width of the encoder and is a token as it is."""

    def __init__(self, widths: Sequence[int], width: int = networks.WIDTH, layers: int = networks.LAYERS) -> None:
        """Takes the width of each embedding, and the size of the encoder."""
        super().__init__()
        self.widths = list(widths)
        projected = {number: one for number, one in enumerate(widths) if number or one != width}
        self.projections = nn.ModuleDict({str(number): nn.Linear(one, width) for number, one in projected.items()})
        layer = nn.TransformerEncoderLayer(width, networks.HEADS, networks.FEED_FORWARD)
        self.encoder = nn.TransformerEncoder(layer, layers, enable_nested_tensor=False)
        self.head = nn.Linear(width, text_encoder.DIMENSION)

    def forward(self, inputs: Sequence[torch.Tensor]) -> torch.Tensor:
        """Maps embeddings, float32 (n, widths[i]), to float32 (n, 384); each row depends on all n."""
        tokens = list(inputs)
        for number, project in self.projections.items():
            tokens[int(number)] = elu(project(inputs[int(number)]))
        return self.head(self.encoder(torch.stack(tokens, 1).to(self.head.weight.dtype))[:, 0])

    def load_published(self, state: dict[str, torch.Tensor]) -> None:
        """Takes the state dict of a published checkpoint.

        Its keys begin with `model.`; `linear2` and `linear3` are the projections, `tranformer_encoder` (so spelled)
        the encoder, `linear_out` the head; `linear1` and `transformer_encoder_layer` were never used.

        Raises:
            RuntimeError: If a tensor is missing or has another shape.
        """
        names = {"linear_out.": "head.", "tranformer_encoder.": "encoder."}
        names |= {f"linear{int(number) + 1}.": f"projections.{number}." for number in self.projections}
        own = {}
        for key, value in state.items():
            key = key.removeprefix("model.")
            for theirs, ours in names.items():
                if key.startswith(theirs):
                    own[ours + key.removeprefix(theirs)] = value
        self.load_state_dict(own)


def _save(out: Path, network: SeedFusion, batch_size: int, arrays: Sequence[str], reads: Sequence[Path]) -> None:
    with writing(out / ".earlier-ensemble.done", "earlier_ensemble", [out / name for name in FILES], reads):
        write_tensors(out / "model.safetensors", network.state_dict())
        write_json(out / "config.json", {"widths": network.widths, "batch_size": batch_size, "arrays": list(arrays)})


def import_checkpoint(file: Annotated[Path, tyro.conf.Positional], out: Path = Path("checkpoints/earlier")) -> str:
    """Converts a published .ckpt, of which nothing is unpickled but tensors.

    Args:
        file: The .ckpt.
        out: Folder to write.
    """
    network = SeedFusion(PUBLISHED).eval()
    try:
        network.load_published(backbones.read_state(file))
    except RuntimeError as error:
        detail = str(error).splitlines()[1].strip()
        raise UserError(f"{file}: no checkpoint of the earlier ensemble's network: {detail}") from error
    _save(out, network, PRESETS["10k"].batch_size, (), [file])
    return f"{file}: imported to {out}"


def train(
    embeddings: Path,
    out: Path = Path("checkpoints/earlier"),
    arrays: tuple[str, ...] = (),
    preset: Literal["10k", "43k", "93k"] = "10k",
    epochs: int = 8,
) -> str:
    """Trains the network.

    Args:
        embeddings: What embed wrote.
        out: Folder to write.
        arrays: Arrays to fuse, in this order; left out: all of the folder.
        preset: The seed's batch size, learning rate and seed for about so many rows.
        epochs: Passes over the rows.
    """
    table = _table(embeddings, arrays)
    rows, _ = load_rows(table, 0, 1)
    found = list(table.arrays.values())
    how = PRESETS[preset]._asdict()
    network, history, _ = loop.fit(
        lambda: SeedFusion([one.shape[1] for one in found]), found, rows, epochs=epochs, **how
    )
    _save(out, network, PRESETS[preset].batch_size, table.arrays, [embeddings / f"{name}.npy" for name in table.arrays])
    return f"{out}: validation cosine {history['cosine'].max():.4f} after {epochs} epochs"


def predict(
    checkpoint: Annotated[Path, tyro.conf.Positional], embeddings: Path, out: Path = Path("submission/seed.csv")
) -> str:
    """Writes the network's predictions for all images of a folder of embeddings, as a submission.

    Args:
        checkpoint: What import-checkpoint or train wrote.
        embeddings: What embed wrote.
        out: Submission CSV to write.
    """
    network, about = load(checkpoint)
    table = _table(embeddings, about["arrays"])
    widths = [one.shape[1] for one in table.arrays.values()]
    if widths != about["widths"]:
        raise UserError(f"{embeddings}: arrays of {widths} numbers; {checkpoint} needs {about['widths']}")
    vectors = ensemble.predict(network, list(table.arrays.values()), about["batch_size"])
    with writing(out.with_name(f".{out.stem}.done"), "earlier_ensemble predict", [out], [checkpoint / FILES[0]]):
        submission.write(out, [metadata.stem(name) for name in table.frame["image_name"]], metrics.unit(vectors))
    return f"{out}: cosine {metrics.mean_cosine(vectors, table.targets):.4f} with the prompts of {len(vectors)} images"


def load(checkpoint: Path) -> tuple[SeedFusion, dict]:
    """The network of a folder, in eval mode, and its config.json.

    Raises:
        UserError: If a file is missing or damaged.
    """
    about, state = checkpoints.read(checkpoint)
    try:
        network = SeedFusion(about["widths"]).eval()
        network.load_state_dict(state)
    except (KeyError, TypeError, RuntimeError) as error:
        raise UserError(f"{checkpoint}: not what this tool wrote: {str(error).splitlines()[0]}") from error
    return network, about


def _table(folder: Path, names: Sequence[str]) -> stored.Table:
    """Arrays that all have the same images, as the network cannot do without one."""
    table = stored.load(folder, names)
    for name, vectors in table.arrays.items():
        missing = np.flatnonzero(np.isnan(vectors[:, 0]))
        if len(missing):
            raise UserError(f"{folder / name}.npy: no row for {table.frame['image_name'][missing[0]]}; embed it again")
    return table


def import_embeddings(
    files: Annotated[tuple[Path, ...], tyro.conf.Positional], images: Path, out: Path = Path("embeddings")
) -> str:
    """Takes over bare .npy arrays, whose rows are in the order of a list of images.

    Args:
        files: The arrays; prompt.npy holds the prompts' embeddings.
        images: Text file with the image name of each row, a line each; or a CSV with image_name and perhaps prompt.
        out: Folder to write.
    """
    if images.suffix == ".csv":
        names = metadata.read_table(images, ("image_name",))
    else:
        try:
            names = pd.DataFrame({"image_name": images.read_text(encoding="utf-8").splitlines()})
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"{images}: cannot be read: {error}; give the list of the arrays' images") from error
    names = names[[column for column in stored.KEPT if column in names]]
    metadata.check_names(names, images)
    arrays = {file.stem: _bare(file, names) for file in files}
    outputs = [out / f"{name}{end}" for name in arrays for end in stored.ENDS]
    with writing(out / ".import.done", "import-embeddings", outputs, [*files, images]):
        for name, vectors in arrays.items():
            own = names if name == stored.PROMPTS else names[["image_name"]]
            stored.write(out, name, vectors, own, {"imported": f"{name}.npy"})
    return f"{out}: {', '.join(f'{name} {vectors.shape}' for name, vectors in arrays.items())}"


def _bare(path: Path, names: pd.DataFrame) -> np.ndarray:
    try:
        vectors = np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise UserError(f"{path}: not a .npy array: {error}; give the seed's own file") from error
    if vectors.ndim != 2 or len(vectors) != len(names):
        raise UserError(f"{path}: shape {vectors.shape} for a list of {len(names)} images; correct --images")
    if path.stem == stored.PROMPTS and vectors.shape[1] != text_encoder.DIMENSION:
        raise UserError(f"{path}: {vectors.shape[1]} numbers a row; all-MiniLM-L6-v2's embeddings have 384")
    bad = np.flatnonzero(~np.isfinite(vectors).all(1))
    if len(bad):
        raise UserError(f"{path}: row {bad[0] + 1} ({names['image_name'].iloc[bad[0]]}) is not finite; embed it again")
    return vectors


def export_embeddings(folder: Annotated[Path, tyro.conf.Positional], out: Path = Path("bare")) -> str:
    """Writes the arrays of a folder as bare ones, rows sorted by image name, and the list of images as images.txt.

    Args:
        folder: What embed wrote.
        out: Folder to write.
    """
    table = _table(folder, ())
    names = table.frame["image_name"].to_numpy(str)
    order = np.argsort(names, kind="stable")
    every = {**table.arrays, stored.PROMPTS: table.targets}
    outputs = [*(out / f"{name}.npy" for name in every), out / "images.txt"]
    with writing(out / ".export.done", "export-embeddings", outputs, [folder / f"{name}.npy" for name in every]):
        for name, vectors in every.items():
            write_array(out / f"{name}.npy", vectors[order])
        write_text(out / "images.txt", "\n".join(names[order]) + "\n")
    return f"{out}: {', '.join(f'{name} {vectors.shape}' for name, vectors in every.items())}"


COMMANDS = {one.__name__.replace("_", "-"): one for one in (import_checkpoint, train, predict)}
COMMANDS |= {one.__name__.replace("_", "-"): one for one in (import_embeddings, export_embeddings)}

if __name__ == "__main__":
    show_log(quiet=False)
    try:
        sys.stdout.write(tyro.extras.subcommand_cli_from_dict(COMMANDS, description=__doc__) + "\n")
    except UserError as error:
        raise SystemExit(f"earlier_ensemble: {error}") from None
