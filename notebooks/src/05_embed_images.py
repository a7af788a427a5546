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
tables = [embeddings.read(config.out, name)[1] for name in table.arrays]
said = next((names.head(12) for names in tables if "text" in names), pd.DataFrame(columns=["image_name", "text"]))
found = zip(*(images.join(said["image_name"], images.find(folder), folder) for folder in config.images), strict=True)
tiles = [pictures.tile(next(filter(None, some)), text) for some, text in zip(found, said["text"], strict=True)]
pictures.grid(tiles, 6).quantize(96) if tiles else "no interrogator among the encoders"

# %% [markdown]
# ## What each embedding knows
#
# The mean cosine that a ridge regression on one embedding reaches on pictures of a fold that it has not seen;
# `constant` answers every picture with the mean prompt embedding.

# %%
from image_to_prompts import ensemble
from image_to_prompts.models import metrics

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
