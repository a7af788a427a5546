# %% [markdown]
# # 03 · Render images
#
# The competition's images came from Stable Diffusion 2.0 (`768-v-ema`): 50 steps at 768 px, downsized to 512. The
# `kaggle` profile does just that, with a random generator **per row**, so that a picture depends on its prompt and
# seed and not on its place in the list. It refuses a model that is not the 768-px v-prediction one.
#
# The `embedded` profile composes each scene from emoji pictures (Twemoji, CC-BY 4.0), also at 768 px downsized to 512.
# It sees the prompt and the seed and nothing else.
#
# Reads: `data_meta/train.csv`, `test.csv`. Writes: `images/train`, `images/test` with a `manifest.csv` each.

# %% tags=["parameters"]
run_folder = None  # None: /kaggle/working on Kaggle, runs/default elsewhere
profile = None

# %%
import pandas as pd
from IPython.display import Image

from image_to_prompts import profiles, render, report, workspace

run, profile = workspace.start(run_folder, profile)

# %% [markdown]
# ## Render
#
# Each finished image is noted in a journal. Stop the kernel whenever you like; run the cell again and it goes on.

# %%
manifests = {}
for csv, folder in ((run.train_metadata, run.train_images), (run.test_metadata, run.test_images)):
    if csv.is_file():
        config = profiles.default_config("render", run, profile, metadata=csv, out=folder)
        manifests[folder.name] = render.run(config)
pd.DataFrame({name: [len(m), (m["flag"] != "").sum()] for name, m in manifests.items()}, index=["images", "flagged"])

# %% [markdown]
# ## Look at them


# %%
def show(picture, name):
    path = run.report / name
    report.save(picture.quantize(96), path)
    return Image(filename=str(path))


show(report.gallery(manifests["train"], run.train_images, count=18), "gallery_train.png")

# %% [markdown]
# ## One prompt, four seeds
#
# The seed moves what the prompt does not say. Several seeds a prompt are the cheapest augmentation; the winners
# rendered two or three.

# %%
prompt = "a robot riding a horse in the desert, watercolor painting"
seeds = pd.DataFrame({"image_name": [f"seed{i}.png" for i in range(4)], "prompt": prompt, "seed": range(4)})
csv = run.folder / "data_meta" / "seeds.csv"
seeds.to_csv(csv, index=False)
four = render.run(profiles.default_config("render", run, profile, metadata=csv, out=run.images.with_name("seeds")))
show(report.gallery(four, run.images.with_name("seeds"), columns=4), "gallery_seeds.png")

# %% [markdown]
# Next: `04_finetune_convnext` learns to read the prompts back.
