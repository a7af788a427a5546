# %% [markdown]
# # 02 · Deduplicate prompts
#
# Thousands of prompts say nearly the same. If one of a pair trains and the other validates, the score is too high; and
# rendering both wastes GPU hours. The remedy of most teams: embed each prompt with all-MiniLM-L6-v2, the
# competition's own target space, and drop every prompt **within cosine 0.8** of one that is kept.
#
# Reads: `prompts/generated.csv`. Writes: `data_meta/prompts.csv` and, with the reason for each, `.removed.csv`.

# %% tags=["parameters"]
run_folder = None  # None: /kaggle/working on Kaggle, runs/default elsewhere
profile = None
threshold = 0.8
test_folds = None  # held out for notebook 07; None: [1, 2], on Kaggle [], where the competition has its own images

# %%
from image_to_prompts import notebook
from image_to_prompts.data import metadata
from image_to_prompts.run import folders

run, profile = notebook.start(run_folder, profile)
if test_folds is None:
    test_folds = [] if folders.on_kaggle() else [1, 2]
frame = metadata.read(run.have(run.prompts))

# %% [markdown]
# ## The idea in fifteen lines
#
# FAISS holds all vectors. Each prompt, in order, asks for everything within the threshold, and what comes later in the
# list and is not yet gone is dropped. The first of each cluster stays. (The reference dropped *both* members of every
# pair, and so lost whole clusters.)

# %%
import faiss
import numpy as np

from image_to_prompts.models import text_encoder

vectors = text_encoder.encode(frame["prompt"].tolist())  # unit length: the inner product is the cosine

index = faiss.IndexFlatIP(vectors.shape[1])
index.add(vectors)
limits, cosines, neighbours = index.range_search(vectors, threshold)

kept = np.ones(len(vectors), bool)
for i in range(len(vectors)):
    if kept[i]:
        near = neighbours[limits[i] : limits[i + 1]]
        kept[near[near > i]] = False

print(f"{kept.sum()} of {len(kept)} prompts stay")

# %% [markdown]
# ## The stage
#
# The same rule, exact too but far faster (`search/near_pairs.py`), with the kept row for each dropped prompt, and two
# more columns: `group`, the prompt's leader at cosine 0.7, and `fold`, a hash of the group. Splitting by fold never
# puts near-twins on both sides.

# %%
from image_to_prompts import dedupe, profiles
from image_to_prompts.dedupe import pictures

config = profiles.default_config("dedupe", run, profile, threshold=threshold)
meta = dedupe.run(config)
known, removed = pictures.read(run.metadata, dedupe.removed_path(run.metadata))
assert len(meta) == kept.sum()
meta.head()

# %%
removed.head()

# %% [markdown]
# ## Is 0.8 the right threshold?
#
# One pass finds all pairs from 0.7 up, so that every higher threshold comes for free. Judge by the pairs just below
# and just above it: would you render both?

# %%
from IPython.display import Image

found = dedupe.dedupe(frame, text_encoder.encode, threshold)
Image(str(dedupe.picture_path(run.metadata)))

# %%
pictures.curve(found).T

# %%
import pandas as pd

pd.set_option("display.max_colwidth", 120)
pictures.borderline(found)

# %% [markdown]
# Why was one dropped, and what else is like it?

# %%
print(pictures.explain(removed["prompt"].iloc[0] if len(removed) else "a red fox", known, removed, threshold))

# %% [markdown]
# ## Are they varied enough?
#
# A model that always answers with the mean embedding scores the mean cosine to the mean. The lower, the more varied
# the prompts.

# %%
import matplotlib.pyplot as plt

unit_mean = vectors[kept].mean(0) / np.linalg.norm(vectors[kept].mean(0))
index = faiss.IndexFlatIP(vectors.shape[1])
index.add(vectors[kept])
nearest = index.search(vectors[kept][:5000], 2)[0][:, 1]  # the first is the prompt itself

plt.figure(figsize=(8, 3), layout="constrained")
plt.hist(vectors[kept] @ unit_mean, np.linspace(0, 1, 51), alpha=0.6, label="to the mean prompt")
plt.hist(nearest, np.linspace(0, 1, 51), alpha=0.6, label="to the nearest other prompt")
plt.xlabel("cosine")
plt.legend()
plt.show()

# %%
constant = float((vectors[kept] @ unit_mean).mean())
largest_group = float(meta["group"].value_counts(normalize=True).max())
train, test = dedupe.hold_out(meta, test_folds, run.train_metadata, run.test_metadata)
print(f"constant {constant:.3f}, largest group {largest_group:.1%}, {len(train)} rows to train, {len(test)} held out")

# %% [markdown]
# Next: `03_render_images` draws them.
