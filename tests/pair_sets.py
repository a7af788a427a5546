"""Public sets of images with prompts, in the layouts that people publish them in (../shared/docs/winners.md), small."""

import json
from pathlib import Path

import pandas as pd
import pyarrow as pa
from pyarrow import parquet


def _copy(rows, folder, name):
    """Copies the rows' images to `name(number)` below a folder; returns these names."""
    names = [name(number) for number in range(len(rows))]
    for (image, _), to in zip(rows, names, strict=True):
        (folder / to).parent.mkdir(parents=True, exist_ok=True)
        (folder / to).write_bytes(Path(image).read_bytes())
    return names


def absolute(folder, rows):
    """motono0223: two CSVs with `Prompt`, and paths of the machine on which it was made."""
    half = len(rows) // 2
    for side, some in (("train", rows[:half]), ("eval", rows[half:])):
        names = _copy(some, folder, lambda number, side=side: f"{side}_images/{number:08d}.jpg")
        paths = [f"/kaggle/input/{folder.name}/{name}" for name in names]
        frame = pd.DataFrame({"Prompt": [prompt for _, prompt in some], "image_path": paths})
        frame.to_csv(folder / f"{side}.csv", index=False)


def numbered(folder, rows, stem="gpt_generated"):
    """xiaozhouwang: row i is <i>.png."""
    _copy(rows, folder, lambda number: f"{stem}_images/{stem}_images/{number}.png")
    pd.DataFrame({"prompt": [prompt for _, prompt in rows]}).to_csv(folder / f"{stem}_prompts.csv", index=False)


def relative(folder, rows):
    """rturley: `prompt,image_file`."""
    names = _copy(rows, folder, lambda number: f"images/{number % 2}/custom_{number % 2}_{number}.png")
    frame = pd.DataFrame({"prompt": [prompt for _, prompt in rows], "image_file": names})
    frame.to_csv(folder / "custom_prompts_df.csv", index=False)


def json_lines(folder, rows):
    """The hub's image folder: `metadata.jsonl` with `file_name` beside the images."""
    names = _copy(rows, folder / "data", lambda number: f"{number:04d}.png")
    said = [{"file_name": name, "text": prompt, "seed": 7} for name, (_, prompt) in zip(names, rows, strict=True)]
    (folder / "data" / "metadata.jsonl").write_text("".join(f"{json.dumps(one)}\n" for one in said))


def named(folder, rows):
    """What was not seen: the likely columns, the images in a folder beside, the suffix left out."""
    _copy(rows, folder, lambda number: f"pictures/p{number}.webp")
    frame = pd.DataFrame({"filename": [f"p{number}" for number in range(len(rows))], "caption": [p for _, p in rows]})
    frame.to_csv(folder / "pictures" / "captions.csv", index=False)


def inside(folder, rows):
    """The hub's usual Parquet, DiffusionDB's columns: the pictures are in it."""
    folder.mkdir(parents=True, exist_ok=True)
    images = [{"bytes": Path(image).read_bytes(), "path": f"{number}.png"} for number, (image, _) in enumerate(rows)]
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    prompts, seeds = [prompt for _, prompt in rows], pa.array(range(len(rows)), pa.uint32())
    samplers = pa.array(["k_lms"] * len(rows))
    table = pa.table({"image": pa.array(images, kind), "prompt": prompts, "seed": seeds, "sampler": samplers})
    parquet.write_table(table, folder / "train-00000-of-00001.parquet", row_group_size=3)


SETS = {
    "motono0223/gustavosta-stable-diffusion-prompts-sd2": absolute,
    "motono0223/gustavosta-stable-diffusion-prompts-sd2-v2": absolute,
    "xiaozhouwang/sd2gpt2": numbered,
    "xiaozhouwang/sd2hardcode": lambda folder, rows: numbered(folder, rows, "hardcoded"),
    "rturley/stable-diffusion-100k-custom-prompts-and-images": relative,
    "jeinsong/chatgpt-images-w-prompts": json_lines,
    "jeinsong/sd2-images-211238": named,
}
