"""Encoders: the same as the models' own code, one image at a time, and as clip-interrogator's; terms of one's own."""

import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

from image_to_prompts.data import images, terms
from image_to_prompts.data import rows as image_rows
from image_to_prompts.data.rows import Fit
from image_to_prompts.encode import backbone, encoders, interrogator
from image_to_prompts.models import metrics, text_encoder
from image_to_prompts.run.errors import UserError


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """Images of the tiny models' own size, so that no resizing differs."""
    folder, rng = tmp_path_factory.mktemp("pictures"), np.random.default_rng(0)
    for number in range(7):
        colours = rng.integers(0, 256, (1 + number, 1 + number, 3), np.uint8)
        Image.fromarray(colours).resize((32, 32), Image.Resampling.NEAREST).save(folder / f"{number}.png")
    return images.find(folder)


def load(tiny_encoders, **settings):
    defaults = {"caption": str(tiny_encoders["blip"]), "ranker": f"open_clip:{tiny_encoders['clip']}"}
    return interrogator.load(**{**defaults, "terms": str(tiny_encoders["terms"]), **settings})


@pytest.fixture(scope="module")
def theirs(tiny_encoders, tmp_path_factory):
    """clip-interrogator itself, with the same models."""
    import open_clip
    from clip_interrogator import Config, Interrogator
    from transformers import BlipForConditionalGeneration, BlipProcessor

    config = Config(clip_model_name="ViT-B-32/openai", device="cpu", quiet=True, download_cache=False)
    config.cache_path = str(tmp_path_factory.mktemp("theirs"))
    config.data_path = str(tiny_encoders["terms"])
    config.caption_model = BlipForConditionalGeneration.from_pretrained(tiny_encoders["blip"]).eval()
    config.caption_processor = BlipProcessor.from_pretrained(tiny_encoders["blip"])
    config.caption_model_name = "blip-large"
    (tiny_encoders["terms"] / "negative.txt").write_text("ugly\n")
    clip, _, preprocess = open_clip.create_model_and_transforms(f"local-dir:{tiny_encoders['clip']}")
    config.clip_model, config.clip_preprocess = clip.eval(), preprocess
    return Interrogator(config)


@pytest.mark.parametrize("mode", interrogator.MODES)
def test_texts_are_those_of_clip_interrogator(mode, tiny_encoders, theirs, pictures, tmp_path):
    for path in tiny_encoders["terms"].glob("*.txt"):
        (tmp_path / path.name).write_text(path.read_text())
    sites = terms.read()["trendings"]  # clip-interrogator's own are in its code
    (tmp_path / "trendings.txt").write_text("\n".join(sites))
    ours = load(tiny_encoders, mode=mode, terms=str(tmp_path))
    (found,) = encoders.encode([ours], pictures, batch_size=3)
    ask = {"fast": theirs.interrogate_fast, "classic": theirs.interrogate_classic, "best": theirs.interrogate}[mode]
    expected = [ask(Image.open(path).convert("RGB")) for path in pictures]
    assert found.texts == expected
    assert len(set(expected)) >= 3  # the tiny models do tell images apart
    np.testing.assert_allclose(found.vectors, text_encoder.encode(expected), atol=1e-6)


def test_captions_of_a_batch_are_those_of_single_images(tiny_encoders, pictures):
    ours = load(tiny_encoders)
    together, alone = (encoders.encode([ours], pictures, batch_size=size)[0].texts for size in (7, 1))
    assert together == alone


def test_backbones_give_what_their_own_code_gives(tiny_encoders, pictures, monkeypatch):
    from transformers import AutoImageProcessor, ConvNextModel

    for module in ("run.devices", "encode.backbone"):
        monkeypatch.setattr(f"image_to_prompts.{module}.mixed_precision", lambda device: "no")
    ours = encoders.build(f"transformers:{tiny_encoders['convnext']}", 0)
    assert ours.fits == (Fit(32, 0.875),)
    (found,) = encoders.encode([ours], pictures, batch_size=4)
    processor = AutoImageProcessor.from_pretrained(tiny_encoders["convnext"])
    model = ConvNextModel.from_pretrained(tiny_encoders["convnext"]).eval()
    with torch.no_grad():
        rows = [processor(Image.open(path).convert("RGB"), return_tensors="pt")["pixel_values"] for path in pictures]
        expected = torch.cat([model(row).pooler_output for row in rows]).numpy()
    cosines = (metrics.unit(found.vectors) * metrics.unit(expected)).sum(1)
    np.testing.assert_allclose(cosines, 1, atol=2e-3)  # the processor resizes a little otherwise

    clip = encoders.build(f"open_clip:{tiny_encoders['clip']}", 32)
    assert encoders.encode([clip], pictures)[0].vectors.shape == (7, 24)


def test_several_encoders_read_each_image_once(tiny_encoders, pictures, tmp_path, monkeypatch):
    reads = []
    read = images.read
    monkeypatch.setattr(image_rows, "read", lambda path: reads.append(path) or read(path))
    torn = tmp_path / "torn.png"
    torn.write_bytes(b"torn")
    files = [pictures[0], torn, *pictures[1:]]
    both = [load(tiny_encoders), encoders.build(f"open_clip:{tiny_encoders['clip']}", 32)]
    said, seen = encoders.encode(both, files, batch_size=4)
    assert sorted(reads) == sorted(files)
    for one in (said, seen):
        assert np.isnan(one.vectors[1]).all() and np.isfinite(np.delete(one.vectors, 1, 0)).all()
    assert said.texts[1] == "" and all(said.texts[:1] + said.texts[2:])
    nothing = encoders.encode(both, [torn])
    assert nothing[0].vectors.shape == (1, 1) and np.isnan(nothing[0].vectors).all()


def test_an_encoder_is_rebuilt_from_what_it_says_about_itself(tiny_encoders, pictures):
    for one in (load(tiny_encoders, artists=False), encoders.build(f"transformers:{tiny_encoders['convnext']}", 32)):
        backbone._loaded.clear()
        again = encoders.rebuild(json.loads(json.dumps(one.about)))
        assert again is not one
        first, second = (encoders.encode([encoder], pictures)[0] for encoder in (one, again))
        np.testing.assert_array_equal(first.vectors, second.vectors)
        assert first.texts == second.texts


def test_terms_of_ones_own(tmp_path):
    theirs = terms.read()
    assert len(theirs["flavors"]) > 100_000 and "trending on pixiv" in theirs["trendings"]
    assert theirs["artists"][0].startswith("by ") and theirs["artists"][-1].startswith("inspired by ")
    assert terms.read(artists=False)["artists"] == []
    (tmp_path / "artists.txt").write_text("Ann Black\n\n", encoding="utf-8")
    (tmp_path / "flavors.txt").write_text("", encoding="utf-8")
    own = terms.read(tmp_path)
    assert own["artists"] == ["by Ann Black", "inspired by Ann Black"] and own["flavors"] == []
    assert own["mediums"] == theirs["mediums"]


def test_an_empty_list_leaves_a_kind_out(tiny_encoders, pictures, tmp_path):
    for kind in terms.KINDS:
        (tmp_path / f"{kind}.txt").write_text("" if kind in ("mediums", "trendings") else "thing\n")
    texts = encoders.encode([load(tiny_encoders, mode="classic", terms=str(tmp_path))], pictures)[0].texts
    assert all(text.endswith("by thing, thing, thing") for text in texts), texts


def test_wrong_weights_and_terms_are_one_line(tiny_encoders, tmp_path):
    with pytest.raises(UserError, match=r"none of artists\.txt"):
        load(tiny_encoders, terms=str(tmp_path))
    (tmp_path / "flavors.txt").write_bytes(b"caf\xe9\n")
    with pytest.raises(UserError, match=r"flavors\.txt: not UTF-8"):
        load(tiny_encoders, terms=str(tmp_path))
    with pytest.raises(UserError, match="--mode quick"):
        load(tiny_encoders, mode="quick")
    with pytest.raises(UserError, match="no such file or folder"):
        load(tiny_encoders, caption=str(tmp_path / "nowhere"))
    with pytest.raises(UserError, match="config\.json is not in it"):
        load(tiny_encoders, caption=str(tmp_path))
    with pytest.raises(UserError, match=r"weights not found: blip-large"):
        load(tiny_encoders, caption="blip-large")
    with pytest.raises(UserError, match="unknown backbone"):
        encoders.build("clip", 224)
    with pytest.raises(UserError, match=r"config\.json is not in it"):
        encoders.build(f"transformers:{tmp_path}", 32)


def test_the_embedded_interrogator_names_things(small_run):
    files = images.find(small_run.images)[:6]
    (found,) = encoders.encode([encoders.build("classes", 64)], files)
    assert found.vectors.shape == (6, 384) and all(text.count(",") >= 7 for text in found.texts)


def test_embeddings_of_terms_are_kept_beside_the_weights(tiny_encoders, tmp_path, monkeypatch, caplog):
    """In a new home, for example the next kernel with the same weights attached, nothing is embedded again."""
    caplog.set_level("INFO")
    clip = tmp_path / "clip"
    shutil.copytree(tiny_encoders["clip"], clip, ignore=shutil.ignore_patterns("terms"))
    monkeypatch.setenv("IMAGE_TO_PROMPTS_CACHE", str(tmp_path / "one"))
    first = load(tiny_encoders, ranker=f"open_clip:{clip}")
    assert "terms to embed" in caplog.text and str(clip) in caplog.text
    moved = tmp_path / "attached" / "clip"
    shutil.copytree(clip, moved)
    monkeypatch.setenv("IMAGE_TO_PROMPTS_CACHE", str(tmp_path / "two"))
    monkeypatch.setattr(interrogator.Interrogator, "embed_texts", lambda self, texts: pytest.fail("embedded again"))
    np.testing.assert_array_equal(first.features, load(tiny_encoders, ranker=f"open_clip:{moved}").features)


def test_terms_that_are_embedded_in_part_go_on(tiny_encoders, tmp_path, monkeypatch):
    monkeypatch.setattr(interrogator, "TEXTS", 4)
    clip = tmp_path / "clip"
    shutil.copytree(tiny_encoders["clip"], clip, ignore=shutil.ignore_patterns("terms"))
    plain, asked = interrogator.Interrogator.embed_texts, []

    def killed(self, texts):
        if len(asked) == 2:
            raise KeyboardInterrupt
        asked.append(texts)
        return plain(self, texts)

    with monkeypatch.context() as patch:
        patch.setattr(interrogator.Interrogator, "embed_texts", killed)
        with pytest.raises(KeyboardInterrupt):
            load(tiny_encoders, ranker=f"open_clip:{clip}")
    monkeypatch.setattr(
        interrogator.Interrogator, "embed_texts", lambda self, texts: asked.append(texts) or plain(self, texts)
    )
    whole = load(tiny_encoders, ranker=f"open_clip:{clip}")
    assert sum(len(texts) for texts in asked if len(texts) <= 4) == len(whole.labels)


def test_a_folder_that_cannot_be_written_leaves_terms_to_the_cache(tiny_encoders, tmp_path, monkeypatch):
    clip = tmp_path / "clip"
    shutil.copytree(tiny_encoders["clip"], clip, ignore=shutil.ignore_patterns("terms"))
    (clip / "terms").write_text("in the way, as a read-only mount would be")
    monkeypatch.setenv("IMAGE_TO_PROMPTS_CACHE", str(tmp_path / "cache"))
    first = load(tiny_encoders, ranker=f"open_clip:{clip}")
    monkeypatch.setattr(interrogator.Interrogator, "embed_texts", lambda self, texts: pytest.fail("embedded again"))
    np.testing.assert_array_equal(first.features, load(tiny_encoders, ranker=f"open_clip:{clip}").features)
    assert (clip / "terms").read_text().startswith("in the way")
