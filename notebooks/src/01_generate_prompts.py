# %% [markdown]
# # 01 · Generate prompts
#
# To learn which prompt made a picture, one needs many pairs of prompt and picture. The competition's pictures were
# made by Stable Diffusion 2, so the pictures can be made at home; what is scarce is **varied prompts**. The reference
# writes them with [MagicPrompt](https://huggingface.co/Gustavosta/MagicPrompt-Stable-Diffusion), a GPT-2 trained on
# prompts that people typed.
#
# This run uses the profile that is printed below. `full` is the reference; `embedded` needs no GPU and no download:
# a grammar takes MagicPrompt's place and writes scenes that a small renderer can draw.
#
# Reads: a language model (or nothing). Writes: `prompts/generated.csv`.

# %% tags=["parameters"]
run_folder = None  # None: /kaggle/working on Kaggle, runs/default elsewhere
profile = None  # None: full on Kaggle, embedded elsewhere
count = None  # None: 100,000 with MagicPrompt, 3,800 with the grammar
collect = None  # "<source>:<file> ..." of public sources; None: data_meta's 10,000 prompts, in a clone

# %%
from image_to_prompts import generate, notebook, profiles

run, profile = notebook.start(run_folder, profile)
overrides = {"count": count} if count else {}
config = profiles.default_config("generate", run, profile, **overrides)
print(f"profile {profile}: {config.count:,} prompts from {config.source}")

# %% [markdown]
# ## Write
#
# After the first block a line says how long the rest will take.
#
# Candidate i depends on the seed and i alone: not on the batch, the GPU or what was written before. Empty and repeated
# ones are passed over until there are as many prompts as were asked for. A killed run continues where it stopped.
#
# With MagicPrompt, `temperature`, `top_k` and `top_p` set how daring it is, and `starts` names a file of phrases to
# start from.

# %%
prompts = generate.run(config)
for prompt in prompts["prompt"].head(12):
    print("·", prompt)

# %% [markdown]
# ## How varied are they?
#
# The embedded grammar names a thing as often as 55,494 real prompts do (bounded at both ends): a few things stand in
# many prompts, most in few. The phrases behind the commas are drawn by nothing. They are noise, as half of the words
# of real prompts are.

# %%
from collections import Counter

import matplotlib.pyplot as plt

from image_to_prompts.embedded import grammar

scenes = prompts["prompt"].map(grammar.parse)
named = Counter(name for scene in scenes for name, _ in scene.things)
words = prompts["prompt"].str.split().str.len()

figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3), layout="constrained")
left.hist(words, bins=range(0, words.max() + 2))
left.set(xlabel="words in a prompt", ylabel="prompts")
right.loglog(range(1, len(named) + 1), [n for _, n in named.most_common()], ".-")
right.set(xlabel="rank of a thing", ylabel="prompts that name it")
plt.show()
print(f"{len(named)} different things; most frequent: {', '.join(name for name, _ in named.most_common(8))}")

# %% [markdown]
# ## Prompts that others wrote
#
# The winners trained on millions of prompts and captions from public sources. `generate --source NAME --input FILE`
# reads each in its own format: DiffusionDB's metadata and image parts, Conceptual Captions, LAION-COCO, COCO and
# VizWiz, and any table. Rules clean the prompts, one after the other; each says how many it changed and dropped.
# `image-to-prompts catalogue` lists the CSVs that the reference trained on and the commands that rebuild them.

# %%
from pathlib import Path

import pandas as pd

from image_to_prompts.data import metadata

if collect is None:
    collect = "table:data_meta/embedded_meta_10k.csv" if Path("data_meta").is_dir() else ""
written, reports = {config.source: prompts["prompt"].tolist()}, {}
for number, (source, file) in enumerate(given.split(":", 1) for given in collect.split()):
    out = run.prompts.with_name(f"{number}_{Path(file).stem}.csv")
    reading = profiles.default_config("generate", run, profile, source=source, input=(file,), out=out)
    reports[Path(file).stem] = generate.run(reading)
    written[Path(file).stem] = metadata.read(out)["prompt"].tolist()
did = {name: report.set_index("rule")[["changed", "dropped"]] for name, report in reports.items()}
pd.concat(did, axis=1).astype("Int64") if reports else "nothing to collect; give collect"

# %%
for name, report in reports.items():
    print(f"{name}: {len(written[name]):,} prompts, for example: {written[name][0]}")
    for rule, pairs in zip(report["rule"], report["examples"], strict=True):
        for before, after in pairs:
            print(f"  {rule}: {before[:60]!r} -> {(after or '(dropped)')[:60]!r}")

# %% [markdown]
# How long are they, and how many prompts of one source (row) are within cosine 0.8 of one of another (column)? What
# overlaps much adds little; `dedupe --against` drops it.

# %%
from image_to_prompts.models import text_encoder
from image_to_prompts.search.near_pairs import near

figure, axes = plt.subplots(figsize=(6, 3), layout="constrained")
for name, texts in written.items():
    lengths = [min(len(text.split()), 80) for text in texts]
    axes.hist(lengths, range(0, 82, 2), density=True, histtype="step", label=name)
axes.set(xlabel="words in a prompt (80: or more)", ylabel="share of prompts")
axes.legend()
plt.show()
vectors = {name: text_encoder.encode(texts[:: -(-len(texts) // 20_000)]) for name, texts in written.items()}
shares = {b: {a: near(vectors[a], vectors[b], 0.8).mean() for a in vectors} for b in vectors}
pd.DataFrame(shares).style.format("{:.1%}").background_gradient(vmin=0, vmax=1, axis=None)

# %% [markdown]
# `02_dedupe_prompts` drops the ones that say the same.

# %%
print(notebook.outlook(config))
