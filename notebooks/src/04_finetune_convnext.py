# %% [markdown]
# # 04 · Fine-tune ConvNeXt
#
# An image backbone that has seen the world, its **last quarter unfrozen**, and a linear head to the 384 numbers of
# all-MiniLM-L6-v2. The reference takes OpenCLIP's ConvNeXt-XXLarge at 512 px. The `embedded` profile takes
# EfficientNet-Lite2 with its ImageNet weights at 224 px, and treats it the same way.
#
# Reads: `data_meta/train.csv`, `images/train`. Writes: `checkpoints/convnext/`.

# %% tags=["parameters"]
run_folder = None  # None: /kaggle/working on Kaggle, runs/default elsewhere
profile = None
epochs = None  # None: the profile's

# %%
import numpy as np
import pandas as pd
import torch
from IPython.display import Image

from image_to_prompts import backbones, dataset, evaluate, finetune, images, model, profiles, report, workspace

run, profile = workspace.start(run_folder, profile)

# %% [markdown]
# ## A quarter of ConvNeXt-XXLarge
#
# timm orders a network's layers in groups; ConvNeXt-XXLarge has 42. The last floor(42 / 4) = 10 and open_clip's
# projection train: 88 of 379 tensors, the very ones that the reference picked. (Built on the meta device, which has
# shapes but no numbers, this takes no memory.)

# %%
with torch.device("meta"):
    tower = backbones.build(backbones.describe("open_clip:convnext_xxlarge", 512))
trained = backbones.unfreeze_last_quarter(tower)
share = sum(p.numel() for p in tower.parameters() if p.requires_grad) / sum(p.numel() for p in tower.parameters())
print(f"{len(trained)} of {len(list(tower.parameters()))} tensors, {share:.0%} of the numbers; first: {trained[0]}")

# %% [markdown]
# ## Train
#
# One fold of groups validates, in eval mode. A validation prompt within cosine 0.8 of a training prompt would be left
# out. The head starts as a ridge regression on the frozen features; AdamW and a cosine schedule do the rest. Stop and
# run again: it goes on at the last finished epoch.

# %%
overrides = {"epochs": epochs} if epochs else {}
config = profiles.default_config("finetune", run, profile, images=run.rendered(run.train_images), **overrides)
history = finetune.run(config)
history

# %%
Image(filename=str(config.out / "history.png"))

# %% [markdown]
# ## Against what needs no training
#
# `constant` answers every picture with the mean embedding. `knn` averages the prompts of the nearest training pictures
# in the frozen backbone's features.

# %%
checkpoint = model.load(config.out)
metrics = checkpoint.config["metrics"]
pd.Series(metrics).round(4)

# %% [markdown]
# ## The best and the worst

# %%
rows = dataset.load_rows(config.metadata, config.images, config.fold)
valid = rows.valid
files = [rows.paths[i] for i in valid]
predicted = evaluate.extract(
    checkpoint.model, images.ImageRows(files, checkpoint.spec.image_size), 32, torch.device("cpu")
)
cosines = (evaluate.unit(predicted) * rows.targets[valid]).sum(1)
order = np.argsort(-cosines)
ends = [*order[:6], *order[-6:]]
tiles = [report.tile(files[i], f"{cosines[i]:.2f} · {rows.frame['prompt'].iloc[valid[i]]}") for i in ends]
report.save(report.grid(tiles, 6).quantize(96), run.report / "best_and_worst.png")
Image(filename=str(run.report / "best_and_worst.png"))

# %% [markdown]
# Next: `07_infer_submission` predicts pictures that nobody has trained on.
