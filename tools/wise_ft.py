"""Averages a checkpoint's backbone with the pretrained weights from which it started.

    python tools/wise_ft.py checkpoints/convnext --share 0.5 --out checkpoints/averaged

WiSE-FT (Wortsman et al. 2022, arXiv 2109.01903): the competition's 7th team found that it helps single models, and not
blends. The head stays as it was trained.
"""

import argparse
import shutil
from pathlib import Path

from image_to_prompts.models import checkpoints, doubt
from image_to_prompts.run.errors import UserError
from image_to_prompts.run.resume import writing


def average(folder: Path, share: float, out: Path, weights: Path | None = None) -> None:
    """Writes a checkpoint whose backbone has `share` of the trained weights and the rest of the pretrained ones.

    Raises:
        UserError: If `share` is not from 0 to 1, the checkpoint cannot be read, or the pretrained weights are nowhere.
    """
    if not 0 <= share <= 1:
        raise UserError(f"--share {share}: must be from 0 to 1")
    found = checkpoints.load(folder)
    before = checkpoints.pretrained(found.spec, weights).backbone.state_dict()
    for name, tensor in found.model.backbone.state_dict().items():
        if tensor.is_floating_point():
            tensor.lerp_(before[name].to(tensor.dtype), 1 - share)
    kept = [folder / name for name in (doubt.FILE,) if (folder / name).is_file()]
    outputs = [out / name for name in (*checkpoints.FILES, *(file.name for file in kept))]
    with writing(out / ".wise_ft.done", "wise_ft", outputs, [folder / "model.safetensors"]):
        out.mkdir(parents=True, exist_ok=True)
        for file in kept:
            shutil.copyfile(file, out / file.name)
        config = {**found.config, "wise_ft": share, "metrics": {}}  # those were the trained weights'
        checkpoints.save(out, found.model, config, found.mean)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--share", type=float, default=0.5, help="of the trained weights")
    parser.add_argument("--weights", type=Path, help="pretrained weights; left out: wherever they are found")
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    average(options.checkpoint, options.share, options.out, options.weights)


if __name__ == "__main__":
    main()
