# %% [markdown]
# # 04 · Fine-tune ConvNeXt
#
# A pretrained image backbone, its **last quarter unfrozen**, and a linear head to the 384 numbers of
# all-MiniLM-L6-v2. The reference takes OpenCLIP's ConvNeXt-XXLarge at 512 px. The `embedded` profile takes
# EfficientNet-Lite2 with its ImageNet weights at 224 px, and unfreezes ten of its 22 groups of layers.
#
# It trains on the images of notebook 03 and, on Kaggle, on the public sets of Stable Diffusion 2 images with prompts
# that are attached: more than 300,000 pairs that nobody has to render.
#
# Reads: `images/train`, attached sets. Writes: `checkpoints/convnext/`.

# %% tags=["parameters"]
run_folder = None  # None: /kaggle/working on Kaggle, runs/default elsewhere
profile = None
recipe = None  # None: the reference's (or the stand-in's); vit-b, vit-l-336, vit-h, ... of docs/recipes.md
backbone = None  # None: the recipe's; open_clip:<model> or timm:<model>
image_size = None
epochs = None
micro_batch = None  # images at once on each GPU; None: the recipe's; lower it where memory does not suffice
max_hours = None  # stop before the session is this old; None: 11 on Kaggle, which allows 12
processes = None  # None: one a GPU

# %%
from image_to_prompts import notebook

run, profile = notebook.start(run_folder, profile)

# %% [markdown]
# ## A quarter of ConvNeXt-XXLarge
#
# timm orders a network's layers in groups; ConvNeXt-XXLarge has 42. The last floor(42 / 4) = 10 and open_clip's
# projection train: 88 of 379 tensors, the very ones that the reference picked. (Built on the meta device, which has
# shapes but no numbers, this takes no memory.)

# %%
import torch

from image_to_prompts.models import backbones, freezing

with torch.device("meta"):
    tower = backbones.build(backbones.describe("open_clip:convnext_xxlarge", 512))
trained = freezing.unfreeze(tower)
share = sum(p.numel() for p in tower.parameters() if p.requires_grad) / sum(p.numel() for p in tower.parameters())
print(f"{len(trained)} of {len(list(tower.parameters()))} tensors, {share:.0%} of the numbers; first: {trained[0]}")

# %% [markdown]
# ## Recipes
#
# `recipe` among the parameters chooses one of these: an image tower with all settings of its training, as the best
# teams published them. Memory and speed are predictions. `docs/recipes.md` says what to train in one session, in a week
# and in a month.

# %%
from image_to_prompts.finetune import recipes

print(recipes.table())

# %% [markdown]
# ## What it will take
#
# Counted on the model, measured on one step; nothing is trained yet. `micro_batch` lowers the memory, `cache_features`
# stores the output of the frozen part on disk, so that an epoch runs the trained part alone.

# %%
from image_to_prompts import finetune, profiles

overrides = {"recipe": recipe, "backbone": backbone, "image_size": image_size, "epochs": epochs, "max_hours": max_hours}
overrides["micro_batch"] = micro_batch
overrides = {name: value for name, value in overrides.items() if value}
config = profiles.default_config("finetune", run, profile, **notebook.training_rows(run, profile), **overrides)
print(finetune.plan(config, processes or torch.cuda.device_count()))

# %% [markdown]
# ## Train
#
# One fold of groups validates, in eval mode. A validation prompt within cosine 0.8 of a training prompt would be left
# out. The head starts as a ridge regression on the frozen features; AdamW and a cosine schedule do the rest. Stop and
# run again: it continues at the step where its state was last saved, and ends with the same weights.

# %%
import pandas as pd

notebook.run(config, processes)
history = pd.read_csv(config.out / "history.csv")
history

# %%
from IPython.display import Image

Image(filename=str(config.out / "history.png"))

# %% [markdown]
# ## How well, and on what
#
# `cosine` is the mean over the validating fold, `low` and `high` its 95 % interval by bootstrap. `constant` answers
# every picture with the mean embedding. `knn` averages the prompts of the nearest training pictures in the frozen
# backbone's features, `ridge` is the head on those features, `left_out` the same head fitted without that source, and
# `clusters_out` without the clusters of prompts that a row is in: what to expect on prompts of a kind that was not
# trained on.

# %%
pd.read_csv(config.out / "sources.csv").round(4)

# %% [markdown]
# ## The best and the worst

# %%
Image(filename=str(config.out / "best_and_worst.png"))

# %% [markdown]
# ## How far is this from the pictures that matter?
#
# A classifier that tries to tell the validating pictures from the target pictures, by the frozen backbone's features:
# .5 means that it cannot, 1 that it always can, and then the score above says little about theirs.

# %%
from image_to_prompts.data import images
from image_to_prompts.training import by_source

target = run.target_images()
if target:
    gap, likeness = by_source.domain_gap(config.out, config.images, images.find(target)[:2000])
    print(f"area under the ROC curve {gap:.3f}")
likeness.sort_values("likeness", ascending=False).head(5).round(3) if target else "attach the competition to see"

# %% [markdown]
# `07_infer_submission` predicts pictures that nobody has trained on; `05_embed_images` and `06_train_ensemble` make a
# second system, which it blends with this one.

# %%
print(notebook.outlook(config))
