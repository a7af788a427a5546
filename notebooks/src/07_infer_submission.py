# %% [markdown]
# # 07 · Predict and submit
#
# Any folder of images in, `submission.csv` out: for each image, sorted by name, 384 rows `<id>_<0..383>`. A picture
# that cannot be read, or is not reached in time, gets the mean prediction, so that the file is always complete.
#
# On Kaggle the images are the competition's and the internet is off. The best that is attached predicts: the
# checkpoints of notebooks 04 and 06 and the bank of kernel `bank`, blended with weights that are fitted on the pictures
# that all kept for validation; else the nearest neighbours in an embeddings dataset; else CLIP Interrogator, where its
# weights are attached; else, before anybody has trained anything, the mean embedding of the attached prompts. The log
# says which, and why not a better one. Elsewhere the images are the held-out pictures of notebook 03, whose prompts are
# known, so that the prediction can be scored.
#
# Reads: images, `checkpoints/`. Writes: `submission.csv` (on Kaggle) or `submission/submission.csv`.

# %% tags=["parameters"]
run_folder = None  # None: /kaggle/working on Kaggle, runs/default elsewhere
profile = None
checkpoint_folder = None  # None: the newest of each kind; several, with spaces between them, are blended
processes = None  # None: one a GPU

# %%
from pathlib import Path

from image_to_prompts import infer, notebook, profiles
from image_to_prompts.data import pictures
from image_to_prompts.infer import submission
from image_to_prompts.run import folders

run, profile = notebook.start(run_folder, profile)
known = run.test_metadata.is_file()  # held-out pictures with known prompts
folder = run.test_images if known else folders.competition_images()
config = profiles.default_config(
    "infer",
    run,
    profile,
    images=folder,
    checkpoint=tuple(map(Path, (checkpoint_folder or "").split())),
    out=run.submission if known else run.folder / "submission.csv",
    key=run.test_metadata if known else folders.competition_key(folder),
    bank=(run.train_metadata,) if known else (),
)

# %% [markdown]
# ## Predict

# %%
import pandas as pd

notebook.run(config, processes)
result = infer.read(config)
print(f"{len(result.files)} images, {len(result.broken)} of them unreadable, {result.unreached} not reached in time")
print(f"predicted by {result.how}")
print(f"{submission.check(config.out, config.images)} images in a valid submission")
pd.read_csv(config.out, nrows=5)

# %% [markdown]
# ## Score
#
# The competition's measure is the mean cosine. Beside it, what each checkpoint alone and the mean prediction would
# have scored. On Kaggle these are the competition's seven public images, the only ones whose prompts are known: a score
# below the constant's says that something is wrong, a difference of .05 says nothing.

# %%
alone = {f"{Path(folder).name} alone": score for folder, score in result.alone.items()}
scores = {"score": result.score, **alone, "constant": result.constant}
pd.Series({name: round(value, 4) for name, value in scores.items()}) if config.key else "the leaderboard tells"

# %% [markdown]
# ## In words
#
# The nearest known prompt to each prediction. It can only be as right as the list it is chosen from.

# %%
from IPython.display import Image

if known:
    prompts = result.prompts.head(12)
    tiles = [
        pictures.tile(folder / image, f"{cosine:.2f} · {prompt}")
        for image, prompt, cosine in zip(prompts["image"], prompts["prompt"], prompts["cosine"], strict=True)
    ]
    pictures.save(pictures.grid(tiles, 6).quantize(96), run.report / "nearest.png")
Image(filename=str(run.report / "nearest.png")) if known else "no list of known prompts given"
