# %% [markdown]
# # 05 · Embed the images
#
# The second system sees no pixels. It starts from what **pretrained encoders** make of each picture: CLIP ViT-B/32
# (512 numbers), ConvNeXt-Tiny (768), and the text that CLIP Interrogator writes about it, as an all-MiniLM-L6-v2
# embedding (384). The `embedded` profile takes EfficientNet-Lite0 and -Lite2 (1,280 each) and an interrogator that
# names ImageNet classes and the nearest words of the prompt grammar.
#
# Every picture is read once for all encoders. Stop and run again: finished blocks of 512 pictures are kept.
#
# Reads: `images/train`, on Kaggle attached sets of pairs, too. Writes: `embeddings/*.npy`, named in `*.names.csv`.

# %% tags=["parameters"]
run_folder = None  # None: /kaggle/working on Kaggle, runs/default elsewhere
profile = None
encoders = None  # None: the profile's; else names as in image_to_prompts.encode.encoders, with spaces between them
image_size = None
processes = None  # None: one a GPU

# %%
from image_to_prompts import notebook, profiles

run, profile = notebook.start(run_folder, profile)
overrides = {"encoders": tuple((encoders or "").split()), "image_size": image_size}
overrides = {name: value for name, value in overrides.items() if value}
config = profiles.default_config("embed", run, profile, **notebook.training_rows(run, profile), **overrides)

# %% [markdown]
# ## Embed

# %%
notebook.run(config, processes)

# %% [markdown]
# ## What the interrogator said
#
# Its text is kept beside its embedding. It is right where a picture shows what ImageNet knows, and wrong in an
# instructive way elsewhere: the numbers count, not the words.

# %%
import pandas as pd

from image_to_prompts.data import images, pictures
from image_to_prompts.encode import embeddings

table = embeddings.load(config.out)
names = table.frame["image_name"]
found = zip(*(images.join(names, images.find(folder), folder) for folder in config.images), strict=True)
file_of = {name: next(filter(None, some), None) for name, some in zip(names, found, strict=True)}
tables = [embeddings.read(config.out, name)[1] for name in table.arrays]
said = next((rows.head(12) for rows in tables if "text" in rows), pd.DataFrame(columns=["image_name", "text"]))
tiles = [pictures.tile(file_of[name], text) for name, text in zip(said["image_name"], said["text"], strict=True)]
pictures.grid(tiles, 6).quantize(96) if tiles else "no interrogator among the encoders"

# %% [markdown]
# ## What each encoder looks at
#
# One picture, and in each row the five that one encoder finds most like it, with their cosines. Image encoders go by
# shapes and colours; the interrogator goes by its own words.

# %%
from image_to_prompts.models import metrics
from image_to_prompts.search import nearest

tiles = []
for name, vectors in table.arrays.items():
    some = metrics.unit(vectors[:20_000])
    (rows,), (cosines,) = nearest.nearest(some[:1], some, 6)
    said = [name, *(f"{cosine:.2f}" for cosine in cosines[1:])]
    tiles += [pictures.tile(file_of[names[row]], text) for row, text in zip(rows, said, strict=True)]
pictures.grid(tiles, 6).quantize(96)

# %% [markdown]
# ## What each embedding knows
#
# The mean cosine that a ridge regression on one embedding reaches on pictures of a fold that it has not seen;
# `constant` answers every picture with the mean prompt embedding.

# %%
from image_to_prompts import ensemble

rows, _ = ensemble.load_rows(table, fold=0, test_fold=1)
train, truth = table.targets[rows.train], table.targets[rows.valid]
scores = {"constant": metrics.constant_score(train.mean(0), truth)}
for name, vectors in table.arrays.items():
    weight, bias = metrics.ridge(vectors[rows.train], train)
    scores[name] = metrics.mean_cosine(vectors[rows.valid] @ weight + bias, truth)
pd.Series(scores).round(4)

# %% [markdown]
# `06_train_ensemble` fuses them.

# %%
print(notebook.outlook(config))
