"""Rows to train on, as `finetune` makes them."""

from pathlib import Path
from typing import Any

from image_to_prompts.models import text_encoder
from image_to_prompts.training import dataset


def loaded_rows(csv: Path, folder: Path, **split: Any) -> dataset.Rows:
    """The rows of a CSV and their images, embedded and split."""
    frame = dataset.load_metadata(csv, folder)
    return dataset.split(frame, text_encoder.encode(frame["prompt"].tolist()), **split)
