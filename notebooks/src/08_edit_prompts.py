# %% [markdown]
# # 08 · A prompt that can be edited
#
# The competition asks for 384 numbers an image. What you want is a text in which you can change a word and render it
# again. Two steps lead there. *Retrieval* looks up the known prompts whose embeddings are nearest to the predicted one.
# *Composition* starts from the nearest, cuts it into phrases, and drops, swaps and adds phrases, of the other known
# prompts and of a vocabulary, as long as the embedding of the text comes nearer to the prediction.
#
# Reads: images, `checkpoints/`, known prompts. Writes: `prompts.csv`.

# %% tags=["parameters"]
run_folder = None  # None: /kaggle/working on Kaggle, runs/default elsewhere
profile = None
image_folder = None  # None: the held-out pictures of notebook 03, else the competition's, else those trained on
scored = 200  # held-out pictures on which the ways are compared

# %%
from pathlib import Path

import pandas as pd
from IPython.display import display

from image_to_prompts import describe, notebook, profiles
from image_to_prompts.run import folders

pd.set_option("display.max_colwidth", 150)
run, profile = notebook.start(run_folder, profile)
found_images = run.target_images() or run.rendered(run.train_images)[0]
folder = Path(image_folder) if image_folder else found_images
known = folder.name == run.test_images.name and (folder / folders.MANIFEST).is_file()  # never trained on
config = profiles.default_config("describe", run, profile, paths=(folder,), out=run.folder / "prompts.csv")

# %% [markdown]
# ## Two pictures to begin with
#
# Most programs that make images write the prompt into the file. Then it is read, and nothing has to be predicted. The
# second picture, a fractal, is like nothing that a model of emoji scenes has seen: `familiar` is False, and the answer
# is a guess.

# %%
from PIL import Image as Picture
from PIL.PngImagePlugin import PngInfo

from image_to_prompts.data import images, pictures

two = run.report / "with_prompt.png", run.report / "strange.png"
two[0].parent.mkdir(parents=True, exist_ok=True)
about = PngInfo()
about.add_text("parameters", "a lighthouse in a storm\nSteps: 20, Sampler: Euler, CFG scale: 7, Seed: 1, Size: 512x512")
images.read(images.find(folder)[0]).save(two[0], pnginfo=about)
Picture.effect_mandelbrot((512, 512), (-1.5, -1, 0.5, 1), 50).convert("RGB").save(two[1])
seen = describe(list(two), run.folder, profile)
display(pictures.grid([pictures.tile(one.path, f"{one.source}: {one.prompt}") for one in seen], 2).quantize(96))
pd.DataFrame({"source": one.source, "familiar": one.familiar, "prompt": one.prompt, "seed": one.seed} for one in seen)

# %% [markdown]
# ## Describe a folder
#
# The same as `image-to-prompts describe FOLDER --out prompts.csv`; killed and started again it continues.

# %%
found = [one for one in describe.run(config) if not one.error]
pd.read_csv(config.out, nrows=5, usecols=["image", "prompt", "cosine", "nearest_1", "cosine_1"])

# %%
from IPython.display import Image

tiles = [pictures.tile(one.path, f"{one.cosine or 0:.2f} · {one.prompt}") for one in found[:12]]
pictures.save(pictures.grid(tiles, 6).quantize(96), run.report / "described.png")
Image(filename=str(run.report / "described.png"))

# %% [markdown]
# ## What the steps are worth
#
# For the pictures whose prompt is known: mean cosine of each text's embedding to that of the true prompt, with its 95 %
# interval, and the share of pictures in which a text is nearer to the truth than the nearest known prompt. None of the
# known prompts is one of the truths. The best of the nearest cannot be chosen without knowing the truth; it says how
# far choosing alone could lead.

# %%
import numpy as np

from image_to_prompts.data import metadata
from image_to_prompts.encode import encoders
from image_to_prompts.models import metrics, text_encoder, weights

if known:
    rendered = metadata.read(folder / folders.MANIFEST).set_index("file")["prompt"]
    files = [one.path for one in found[:scored]]
    truth = [rendered[file.relative_to(folder).as_posix()] for file in files]
    at_hand = all(weights.interrogator_at_hand(weights.CAPTION, weights.RANKER))
    speaks = "classes" if profile == "embedded" else "interrogator" if at_hand else ""
    described = zip(describe.Describer(config).predict(files), truth, strict=True)
    seen, truth = zip(*((one, text) for one, text in described if one.nearest), strict=True)  # not the strange ones
    files, targets = [one.path for one in seen], text_encoder.encode(truth)
    ten = [[text for text, _ in one.nearest[: config.top]] for one in seen]
    near = np.stack([text_encoder.encode(texts) for texts in ten])
    luckiest = np.einsum("ikd,id->ik", near, targets).argmax(1)
    ways = {
        "nearest known prompt": near[:, 0],
        "composed": text_encoder.encode([one.prompt for one in seen]),
        f"of the {config.top} nearest the one nearest to the truth": near[np.arange(len(near)), luckiest],
        "the prediction itself, no text": np.stack([one.vector for one in seen]),
    }
    if speaks:
        ways[speaks] = metrics.unit(encoders.encode([encoders.build(speaks, 224)], files)[0].vectors)
    cosines = pd.DataFrame({way: (vectors * targets).sum(1) for way, vectors in ways.items()})
    low, high = zip(*(metrics.bootstrap(cosines[way].to_numpy()) for way in ways), strict=True)
    table = pd.DataFrame({"cosine to the truth": cosines.mean(), "from": low, "to": high})
    table["nearer than nearest"] = cosines.gt(cosines["nearest known prompt"], axis=0).mean()
    display(table.round(3))
else:
    print("no list of the true prompts given")

# %% [markdown]
# ## Edit, and render again
#
# What each phrase of a prompt contributes, and the picture of the edited prompt beside the original. On your own
# machine `image-to-prompts demo` is a page for that.

# %%
from image_to_prompts.describe import phrases

one = max(found[:50], key=lambda one: one.cosine or 0)
vector = describe.Describer(config).describe([one.path])[0].vector
parts = phrases.cut(one.prompt)
texts = [one.prompt] + [phrases.join(parts[:i] + parts[i + 1 :]) for i in range(len(parts)) if len(parts) > 1]
edited = f"{one.prompt}, two cats"
similarity = text_encoder.encode([*texts, edited]) @ vector
pd.DataFrame({"prompt": [*texts, edited], "similarity to the prediction": similarity.round(3)})

# %%
from image_to_prompts.describe.session import painter, seed_of

paint = painter(profile).draw
tiles = [pictures.tile(one.path, "the image")]
tiles += [pictures.tile(paint(text, seed_of(text)), text) for text in (one.prompt, edited)]
pictures.save(pictures.grid(tiles, 3).quantize(128), run.report / "edited.png")
Image(filename=str(run.report / "edited.png"))
