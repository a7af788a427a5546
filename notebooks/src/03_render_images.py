# %% [markdown]
# # 03 · Render images
#
# The competition's images came from Stable Diffusion 2.0 (`768-v-ema`): 50 steps at 768 px, downsized to 512. The
# `full` profile does just that, with a random generator **per row**, so that a picture depends on its prompt and
# seed and not on its place in the list. It refuses a model that is not the 768-px v-prediction one.
#
# The `embedded` profile composes each scene from emoji pictures (Twemoji, CC-BY 4.0), also at 768 px downsized to 512.
# It sees the prompt and the seed and nothing else.
#
# Reads: `data_meta/train.csv`, `test.csv`. Writes: `images/train`, `images/test` with a `manifest.csv` each; with the
# `full` profile as tar shards of 1,000 images, because a kernel may leave 500 files.

# %% tags=["parameters"]
run_folder = None  # None: /kaggle/working on Kaggle, runs/default elsewhere
profile = None
fast = False  # with Stable Diffusion 2: DPM-Solver++ in 20 steps instead of DDIM in 50
seeds = 1  # images a prompt
steps = 0  # denoising steps; 0: 50, with fast 20

# %%
import pandas as pd
from IPython.display import Image

from image_to_prompts import notebook, profiles, render
from image_to_prompts.data import metadata, pictures

run, profile = notebook.start(run_folder, profile)
configs = [
    profiles.default_config("render", run, profile, metadata=csv, out=folder, fast=fast, seeds=seeds, steps=steps)
    for csv, folder in (
        (run.have(run.train_metadata), run.train_images),
        (run.have(run.test_metadata), run.test_images),
    )
    if csv.is_file()
]

# %% [markdown]
# ## Render
#
# After the first blocks a line says how long the rest will take and how much room it needs; `docs/scale.md` has the
# sums for other GPUs. A kernel has 12 hours and 20 GB: the `full` profile stops before 11 hours or 19 GB a folder.
# Attach this kernel's output to the next one, run it again, and it goes on.
#
# Encoding and writing go on while the next batch is rendered. A finished image is checked by its SHA-256 before it
# counts as done. Stop the kernel whenever you like; run the cell again and it goes on. With two GPUs, run
# `!accelerate launch -m image_to_prompts render` instead.

# %%
manifests = {config.out.name: render.run(config) for config in configs}
flags = {name: manifest["flag"].replace("", "fine").value_counts() for name, manifest in manifests.items()}
pd.DataFrame(flags).fillna(0).astype(int)

# %% [markdown]
# What a picture depends on stands in its manifest row.

# %%
manifests["train"].head(1).T

# %% [markdown]
# ## Look at them


# %%
def show(picture, name):
    path = run.report / name
    pictures.save(picture.quantize(96), path)
    return Image(filename=str(path))


show(pictures.gallery(manifests["train"], run.train_images, count=18), "gallery_train.png")

# %% [markdown]
# ## One prompt, four seeds
#
# The seed moves what the prompt does not say. Several seeds a prompt (`seeds` above, `--seeds`) are the cheapest
# augmentation; the winners rendered two or three.

# %%
prompt = "a robot riding a horse in the desert, watercolor painting"
csv = run.folder / "data_meta" / "seeds.csv"
metadata.write_table(csv, pd.DataFrame({"image_name": ["robot.png"], "prompt": prompt}))
out = run.images.with_name("seeds")
config = profiles.default_config("render", run, profile, metadata=csv, out=out, fast=fast, seeds=4, steps=steps)
four = render.run(config)
show(pictures.gallery(four, out, columns=4), "gallery_seeds.png")

# %% [markdown]
# Next: `04_finetune_convnext` learns to read the prompts back.
