# %% [markdown]
# # A bank of prompts
#
# Prompts that people wrote, each with its vector by the **text** tower of a CLIP and its all-MiniLM-L6-v2 embedding.
# Kernel 07 looks at the competition's images with the same CLIP's image tower, takes the nearest prompts of the bank
# and averages their embeddings: a submission before anything is trained. The competition's fourth team got .612 with
# 56 million prompts and this idea; what fewer score is not known.
#
# By default the prompts are DiffusionDB's (1.8 million). Attach a dataset of metadata (a CSV with a column `prompt`)
# to use others. It takes about 10 minutes on two T4s by arithmetic: 13.3 GFLOP a prompt (open_clip's table of models)
# at 30 % of a T4's 65 TFLOPS; the log says what this machine takes before it starts.
#
# Reads: attached metadata, or the hub. Writes: `banks/prompts/`, and the tower's weights for kernel 07.

# %% tags=["parameters"]
run_folder = None  # None: /kaggle/working on Kaggle, runs/default elsewhere
profile = None
tower = "open_clip:ViT-L-14"  # any open_clip model, or a folder of one
dimensions = 0  # numbers a prompt, by principal components; 0: all. 192 make room for twice as many prompts
source = "hf://datasets/poloclub/diffusiondb/metadata.parquet"  # where nothing is attached
processes = None  # None: one a GPU

# %%
from image_to_prompts import notebook
from image_to_prompts.run import files

run, profile = notebook.start(run_folder, profile)
weights = files.make_folder(run.folder / "weights")  # the tower's go with the bank

# %% [markdown]
# ## Prompts

# %%
from image_to_prompts import profiles
from image_to_prompts.data import metadata
from image_to_prompts.run import folders

csvs = [path for path in folders.kaggle_inputs("*.csv") if metadata.has_prompts(path)]
csvs = [path for path in csvs if not (path.parent / "sample_submission.csv").exists()]  # not the competition's own
if not csvs:
    collected = profiles.default_config("generate", run, profile, source="diffusiondb", input=(source,))
    notebook.run(collected, processes=1)
    csvs = [collected.out]
rows = {path.name: len(metadata.read_prompts(path)) for path in csvs}
print(f"{sum(rows.values()):,} prompts: {rows}")
print(f"on two T4s by arithmetic: {sum(rows.values()) * 13.3e9 / (2 * 65e12 * 0.3) / 3600:.2f} h for a ViT-L-14")

# %% [markdown]
# ## Embed

# %%
import json

values = {"texts": tuple(csvs), "encoders": (tower,), "out": run.bank, "dimensions": dimensions, "weights_dir": weights}
config = profiles.default_config("embed", run, profile, **values)
notebook.run(config, processes)
about = json.loads((run.bank / folders.BANK).read_text())
print(f"{sum(about['shards']):,} prompts, {about['width']} numbers each, in {len(about['shards'])} shards")

# %% [markdown]
# Next: `image-to-prompts kaggle push infer`. It reads this kernel's output.
