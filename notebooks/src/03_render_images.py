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
max_hours = None  # stop before the session is this old; None: 11 on Kaggle, which allows 12
max_gb = None  # stop before the run has so many GB; None: 19 on Kaggle, which allows 20
processes = None  # None: one a GPU
publish = True  # on Kaggle: make a private dataset of this session's images

# %%
from image_to_prompts import notebook, profiles, render
from image_to_prompts.data import metadata

run, profile = notebook.start(run_folder, profile)
limits = {name: value for name, value in (("max_hours", max_hours), ("max_gb", max_gb)) if value}
how = {"fast": fast, "steps": steps, **limits}
configs = [
    profiles.default_config("render", run, profile, metadata=csv, out=folder, seeds=seeds, **how)
    for csv, folder in (
        (run.have(run.test_metadata), run.test_images),
        (run.have(run.train_metadata), run.train_images),
    )
    if csv.is_file()
]

# %% [markdown]
# ## Render
#
# After the first blocks a line says how long the rest will take and how much room it needs; `docs/scale.md` has the
# sums for other GPUs. A kernel has 12 hours and 20 GB: on Kaggle the stage stops before 11 hours or 19 GB, and the last
# cell says how the next session continues.
#
# Encoding and writing go on while the next batch is rendered. A finished image is checked by its SHA-256 before it
# counts as done. Stop the kernel whenever you like; run the cell again and it continues. With several GPUs each gets a
# process.

# %%
import pandas as pd

for config in configs:
    notebook.run(config, processes)
folders = {config.out.name: run.rendered(config.out)[-1] for config in configs}  # the last session's, of several
folders = {name: folder for name, folder in folders.items() if (folder / "manifest.csv").is_file()}
manifests = {name: metadata.read_table(folder / "manifest.csv", ("flag",)) for name, folder in folders.items()}
shown = list(manifests)[-1]
flags = {name: manifest["flag"].replace("", "fine").value_counts() for name, manifest in manifests.items()}
pd.DataFrame(flags).fillna(0).astype(int)

# %% [markdown]
# Its manifest row has everything that a picture depends on.

# %%
manifests[shown].head(1).T

# %% [markdown]
# ## Look at them


# %%
from IPython.display import Image

from image_to_prompts.data import pictures


def show(picture, name):
    path = run.report / name
    pictures.save(picture.quantize(96), path)
    return Image(filename=str(path))


show(pictures.gallery(manifests[shown], folders[shown], count=18), "gallery_train.png")

# %% [markdown]
# ## One prompt, four seeds
#
# The seed changes what the prompt leaves open. Several seeds a prompt (`seeds` above, `--seeds`) are the cheapest
# augmentation; the winners rendered two or three.

# %%
prompt = "a robot riding a horse in the desert, watercolor painting"
csv = run.folder / "data_meta" / "seeds.csv"
metadata.write_table(csv, pd.DataFrame({"image_name": ["robot.png"], "prompt": prompt}))
out = run.images.with_name("seeds")
four = render.run(profiles.default_config("render", run, profile, metadata=csv, out=out, seeds=4, **how))
show(pictures.gallery(four, out, columns=4), "gallery_seeds.png") if len(four) else "no time or room is left for it"

# %% [markdown]
# ## What comes next
#
# On Kaggle the images of each session become a dataset of their own, which the next session and the training attach.

# %%
from image_to_prompts.kaggle import sessions

if publish:
    print(sessions.publish_images(run.images.parent))
for config in configs:
    print(f"{config.out.name}: {notebook.outlook(config)}")
