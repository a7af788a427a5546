"""Embedding texts: as sentence-transformers does, once each, through kills, from a cache that may be unusable."""

import multiprocessing
import os
import signal
import sqlite3

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from image_to_prompts.embedded import grammar
from image_to_prompts.models import minilm, text_cache, text_encoder, weights

PROMPTS = [grammar.prompt(3, i) for i in range(60)] + ["", "x", "word " * 400, "Ünïcode 中文 🦊 ???"]
PROMPTS += ["ﬁne\u200b naïve CAFÉ", "[MASK] [CLS] a token", "\x00a\x01b\ttab"]


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty cache."""
    monkeypatch.setenv(text_cache.FOLDER, str(tmp_path / "cache"))


@pytest.fixture
def encoded(monkeypatch):
    """Texts that the model was given, counted in batches."""
    batches, plain = [], minilm.MiniLM.encode
    monkeypatch.setattr(
        minilm.MiniLM, "encode", lambda self, tokens: (batches.append(len(tokens)), plain(self, tokens))[1]
    )
    return batches


@pytest.mark.parametrize(("fast", "least"), [(False, 0.999999), (True, 0.9999)])
def test_same_vectors_as_sentence_transformers(cache, fast, least):
    from sentence_transformers import SentenceTransformer  # slow to import, as other processes of this file need not do

    plain = SentenceTransformer(str(weights.locate(text_encoder.NAME)), device="cpu")
    theirs = plain.encode(PROMPTS, normalize_embeddings=True)
    tokens = plain.tokenizer(PROMPTS, truncation=True, max_length=plain.max_seq_length)["input_ids"]
    assert [found.ids for found in text_encoder.tokenizer().encode_batch(PROMPTS)] == tokens
    ours = text_encoder.encode(PROMPTS, fast=fast)
    assert ours.dtype == np.float32 and ours.shape == theirs.shape
    np.testing.assert_allclose(np.linalg.norm(ours, axis=1), 1, atol=1e-6)
    assert (ours * theirs).sum(1).min() >= least


def test_each_text_is_embedded_once(cache, encoded):
    first = text_encoder.encode([*PROMPTS, *PROMPTS[:10]])
    assert sum(encoded) == len(PROMPTS)
    np.testing.assert_array_equal(first[-10:], first[:10])
    again = text_encoder.encode(["another", *PROMPTS[::-1]])
    assert sum(encoded) == len(PROMPTS) + 1
    np.testing.assert_array_equal(again[1:], first[: len(PROMPTS)][::-1])
    text_encoder.encode(PROMPTS[:5], fast=True)  # another precision is another vector
    assert sum(encoded) == len(PROMPTS) + (6 if text_encoder._precision(True) != "no" else 1)
    assert text_encoder.encode([]).shape == (0, 384)


@given(st.lists(st.integers(1, 256), max_size=80))
def test_batches_hold_every_row_once_by_length(lengths):
    tokens = [[1] * length for length in lengths]
    cut = list(minilm.batches(tokens))
    assert sorted(row for batch in cut for row in batch) == list(range(len(lengths)))
    for batch in cut:
        own = [lengths[row] for row in batch]
        assert own == sorted(own) and sum(own[:-1]) < minilm.TOKENS[1]


def test_without_the_private_product_texts_embed_alike(monkeypatch):
    before = text_encoder.encode_once(PROMPTS)
    monkeypatch.setattr(torch.ops.mkldnn, "_linear_pointwise", None)
    after = text_encoder.encode_once(PROMPTS)
    assert (before * after).sum(1).min() > 0.9999


@pytest.mark.parametrize("fast", [False, True])
def test_a_texts_vector_does_not_depend_on_its_company(fast, tmp_path, monkeypatch):
    def encode(texts, name):
        monkeypatch.setenv(text_cache.FOLDER, str(tmp_path / name))
        return text_encoder.encode(texts, fast=fast)

    together = encode(PROMPTS, "together")
    backwards = encode(PROMPTS[::-1], "backwards")[::-1]
    by_seven = np.concatenate([encode(PROMPTS[i : i + 7], f"seven-{i}") for i in range(0, len(PROMPTS), 7)])
    alone = np.concatenate([encode([text], f"alone-{i}") for i, text in enumerate(PROMPTS)])
    for other in (backwards, by_seven, alone):
        assert together.tobytes() == other.tobytes()


def _work(folder, prompts, out, kill_at):
    os.environ[text_cache.FOLDER] = folder
    text_encoder.BLOCK = 8
    plain, blocks = text_cache.TextCache.write, []

    def write(self, keys, vectors):
        if len(blocks) == kill_at:
            os.kill(os.getpid(), signal.SIGKILL)
        blocks.append(len(keys))
        plain(self, keys, vectors)

    text_cache.TextCache.write = write
    np.savez(out, vectors=text_encoder.encode(prompts), blocks=blocks)


@pytest.mark.slow
def test_killed_and_started_again_embeds_no_finished_block_twice(tmp_path):
    context = multiprocessing.get_context("forkserver")

    def work(name, kill_at):
        process = context.Process(target=_work, args=(str(tmp_path / name), PROMPTS, tmp_path / f"{name}.npz", kill_at))
        process.start()
        process.join()
        return process.exitcode

    assert work("whole", -1) == 0
    assert [work("torn", kill_at) for kill_at in (3, 0, 2)] == [-signal.SIGKILL] * 3
    assert work("torn", -1) == 0
    whole, torn = np.load(tmp_path / "whole.npz"), np.load(tmp_path / "torn.npz")
    np.testing.assert_array_equal(whole["vectors"], torn["vectors"])
    assert whole["blocks"].sum() == len(PROMPTS) and len(torn["blocks"]) == len(whole["blocks"]) - 5


def test_an_unusable_cache_is_told_and_passed_over(tmp_path, monkeypatch, caplog):
    (tmp_path / "file").write_text("x")
    monkeypatch.setenv(text_cache.FOLDER, str(tmp_path / "file"))
    assert text_encoder.encode(["a fox"]).shape == (1, 384) and "not used" in caplog.text
    text_encoder.encode(["an owl"])
    assert caplog.text.count("not used") == 1  # it is not tried again
    caplog.clear()
    (tmp_path / "torn").mkdir()
    (tmp_path / "torn" / "text.sqlite").write_bytes(b"no database" * 500)
    monkeypatch.setenv(text_cache.FOLDER, str(tmp_path / "torn"))
    assert text_encoder.encode(["a fox"]).shape == (1, 384) and "not used" in caplog.text


def test_vectors_of_another_width_are_made_anew(cache, encoded):
    text_encoder.encode(["a fox"])
    with sqlite3.connect(text_cache.path()) as database:
        database.execute("UPDATE vectors SET vector = x'00'")
    assert np.linalg.norm(text_encoder.encode(["a fox"])) == pytest.approx(1) and sum(encoded) == 2


def test_a_vector_that_a_disk_has_changed_is_made_anew(cache, encoded):
    """One bit, in a place where no database notices it."""
    (first,) = text_encoder.encode(["a fox"])
    with sqlite3.connect(text_cache.path()) as database:
        ((key, vector),) = database.execute("SELECT key, vector FROM vectors").fetchall()
        changed = bytes([vector[0] ^ 1]) + vector[1:]
        database.execute("UPDATE vectors SET vector = ? WHERE key = ?", (changed, key))
    np.testing.assert_array_equal(text_encoder.encode(["a fox"])[0], first)
    assert sum(encoded) == 2
