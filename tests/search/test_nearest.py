import threading
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from image_to_prompts.data import metadata
from image_to_prompts.models import metrics, text_cache, text_encoder
from image_to_prompts.run.errors import UserError
from image_to_prompts.search import nearest


def units(rows, seed=0, width=384):
    return metrics.unit(np.random.default_rng(seed).standard_normal((rows, width), np.float32))


@pytest.mark.parametrize("rows", [1, 7, 2049, 40_000])
def test_the_scan_finds_what_an_exact_search_finds(rows):
    vectors = units(rows)
    queries = np.concatenate([units(30, 1), vectors[:20] + 0.02])
    found, cosines = nearest.nearest(queries, vectors, 10)
    exact = metrics.unit(queries) @ vectors.T
    assert np.array_equal(found, np.argsort(-exact, axis=1, kind="stable")[:, :10])
    assert np.abs(cosines - np.take_along_axis(exact, found, 1)).max() < 1e-6


@settings(max_examples=30)
@given(st.integers(1, 60), st.integers(1, 12), st.integers(0, 10**6), st.booleans())
def test_crowds_of_near_twins_are_told_apart(rows, count, seed, close):
    """Cosines that half precision cannot tell apart."""
    middle = units(1, seed)
    vectors = metrics.unit(middle + (1e-3 if close else 1) * units(rows, seed + 1))
    found, cosines = nearest.nearest(middle, vectors, count)
    assert found.shape == (1, min(rows, count)) and (np.diff(cosines[0]) <= 0).all()
    best = np.sort(vectors @ middle[0])[::-1][: found.shape[1]]
    assert np.abs(cosines[0] - best).max() < 1e-6 and len(set(found[0])) == found.shape[1]


def test_the_worst_that_rounding_does_is_allowed_for():
    """Every component lies just beside the middle of two bf16 numbers, so that all errors add up."""
    below, above = (2.0**-4 * (1 + 2.0**-8 + shift) for shift in (-2e-5, 2e-5))
    query, one = np.zeros(384), np.zeros(384)
    query[:126], query[126:252] = below, above
    query[254] = np.sqrt(1 - (query**2).sum())
    one[:126], one[126:252] = below, -above
    other = -one
    one[254] = 0.003
    for vector in (one, other):
        vector[300] = np.sqrt(1 - (vector**2).sum())
    vectors = np.stack([one, other]).astype(np.float32)
    rows, _ = nearest.nearest(query[None].astype(np.float32), vectors, 1)
    assert vectors[0] @ query > vectors[1] @ query and rows[0, 0] == 0


@settings(max_examples=40)
@given(st.lists(st.integers(0, 3000), min_size=1, max_size=4), st.integers(1, 80), st.integers(0, 10**6), st.booleans())
def test_a_bank_in_half_precision_is_searched_exactly(tmp_path_factory, sizes, count, seed, from_files):
    """Several files, some of them empty, with rows that stand twice: as NumPy finds it in the stored vectors."""
    stored = units(sum(sizes), seed, 96).astype(np.float16)
    rng = np.random.default_rng(seed)
    stored[rng.integers(0, max(1, len(stored)), len(stored) // 4)] = stored[: len(stored) // 4]
    arrays = np.split(stored, np.cumsum(sizes)[:-1])
    if from_files:
        folder = tmp_path_factory.mktemp("bank")
        for number, array in enumerate(arrays):
            np.save(folder / f"{number}.npy", array)
        arrays = [nearest.Stored(folder / f"{number}.npy") for number in range(len(arrays))]
    parts = nearest.Parts(arrays)
    queries = units(5, seed + 1, 96)
    rows, cosines = nearest.nearest(queries, parts, count)
    exact = np.stack([np.einsum("ij,j->i", stored.astype(np.float32), query) for query in queries])
    expected = np.argsort(-exact, axis=1, kind="stable")[:, :count]
    assert rows.shape == (5, min(count, len(stored)))
    assert np.abs(cosines - np.take_along_axis(exact, expected, 1)).max(initial=0) < 1e-6
    assert np.abs(cosines - np.take_along_axis(exact, rows, 1)).max(initial=0) < 1e-6
    twins = (np.diff(cosines) == 0) & (np.diff(rows) < 0)
    assert not twins.any(), "the earlier of equals first"
    numbers = rng.integers(0, max(1, len(stored)), 9 if len(stored) else 0)
    assert np.array_equal(parts[numbers], stored[numbers]) and np.array_equal(parts[3:700], stored[3:700])


def test_no_queries_no_vectors_and_all_of_them():
    rows, cosines = nearest.nearest(np.zeros((0, 384), np.float32), units(3), 2)
    assert rows.shape == cosines.shape == (0, 2)
    nothing = nearest.nearest(units(3), units(0), 2)
    assert [part.shape for part in nothing] == [(3, 0), (3, 0)]
    for kinds in ((rows, cosines), nothing, nearest.nearest(units(2), units(5), 2)):
        assert [part.dtype for part in kinds] == [np.int64, np.float32]
    rows, _ = nearest.nearest(units(2), units(9000, 1), 6000)
    assert rows.shape == (2, 6000) and len(set(rows[0])) == 6000


def test_a_query_without_direction_holds_no_more_than_it_needs():
    rows, cosines = nearest.nearest(np.zeros((1, 384), np.float32), units(5000), 3)
    assert rows[0].tolist() == [0, 1, 2] and not cosines.any()


def write(path, prompts):
    metadata.write_table(path, pd.DataFrame({"prompt": prompts}))
    return path


def test_an_index_is_built_once_and_follows_its_csvs(tmp_path, monkeypatch):
    monkeypatch.setenv(text_cache.FOLDER, str(tmp_path / "cache"))
    one = write(tmp_path / "one.csv", ["a red fox", "two boats", "a red fox"])
    two = write(tmp_path / "two.csv", ["two boats", "an owl"])
    encoded = []
    encode = text_encoder.encode
    monkeypatch.setattr(
        text_encoder, "encode", lambda texts, *rest: encoded.append(list(texts)) or encode(texts, *rest)
    )
    index = nearest.open_index([one, two])
    assert index.prompts.to_pylist() == ["a red fox", "two boats", "an owl"] == encoded[0]
    ((first, second),) = index.search(encode(["an owl in a tree"]), 2)
    assert first[0] == "an owl" and 0.6 < first[1] <= 1 and second[1] < first[1]
    vectors = metrics.unit(np.random.default_rng(0).standard_normal((30, 384)))
    many = nearest.Index(pa.array(map(str, range(30))), vectors.astype(np.float32))
    assert len(many.search(vectors[:1])[0]) == 10
    assert many.some(10) == [str(row) for row in range(0, 30, 3)] and many.some(99) == many.prompts.to_pylist()

    again = nearest.open_index([one, two])
    assert len(encoded) == 1 and np.array_equal(again.vectors, index.vectors)
    nearest.open_index([two])  # an index of its own, beside the other
    encoded.clear()
    nearest.open_index([one, two])
    assert not encoded
    write(two, ["a lighthouse"])
    changed = nearest.open_index([one, two])
    assert changed.prompts.to_pylist() == ["a red fox", "two boats", "a lighthouse"]
    assert index.search(encode(["an owl"]), 1)[0][0][0] == "an owl"  # whoever has the old one open keeps it
    with pytest.raises(UserError, match="no such file"):
        nearest.open_index([tmp_path / "none.csv"])


def test_an_index_that_cannot_be_kept_is_searched_all_the_same(tmp_path, monkeypatch, caplog):
    (tmp_path / "index").write_text("a file where a folder would be made")
    monkeypatch.setenv(text_cache.FOLDER, str(tmp_path))
    one = write(tmp_path / "one.csv", ["a red fox", "two boats", "a red fox"])
    index = nearest.open_index([one])
    assert "the index is not kept" in caplog.text and index.prompts.to_pylist() == ["a red fox", "two boats"]
    assert index.search(text_encoder.encode(["boats"]), 1)[0][0][0] == "two boats"


def test_two_processes_with_one_index_do_not_mix_its_files(tmp_path, monkeypatch):
    """While one builds, the other waits, and then sees its own version of the CSV."""
    monkeypatch.setenv(text_cache.FOLDER, str(tmp_path / "cache"))
    csv = write(tmp_path / "one.csv", ["a red fox", "two boats"])
    building, version = threading.Event(), []
    build = nearest.build

    def slow(csvs, texts, vectors):
        build(csvs, texts, vectors)
        building.set()
        time.sleep(0.5)
        version.append("built")

    monkeypatch.setattr(nearest, "build", slow)
    with ThreadPoolExecutor(2) as threads:
        first = threads.submit(nearest.open_index, [csv])
        building.wait()
        second = threads.submit(nearest.open_index, [csv])
        indexes = first.result(), second.result()
    assert version == ["built"]
    assert all(index.prompts.to_pylist() == ["a red fox", "two boats"] for index in indexes)
    stale = next((tmp_path / "cache" / "index").iterdir()) / ".vectors.npy.1.part"
    stale.write_bytes(b"0" * 100)
    write(csv, ["an owl"])
    assert nearest.open_index([csv]).prompts.to_pylist() == ["an owl"] and not stale.exists()


def test_an_index_killed_between_its_files_is_built_anew(tmp_path, monkeypatch):
    monkeypatch.setenv(text_cache.FOLDER, str(tmp_path / "cache"))
    csv = write(tmp_path / "one.csv", ["a red fox", "two boats"])
    nearest.open_index([csv])
    write(csv, ["an owl", "a lighthouse"])

    def killed(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(nearest.Stamp, "write", killed)
        with pytest.raises(KeyboardInterrupt):
            nearest.open_index([csv])
    write(csv, ["a red fox", "two boats"])  # the stamp of these files must not vouch for the others'
    index = nearest.open_index([csv])
    for row, prompt in enumerate(["a red fox", "two boats"]):
        assert index.prompts[row].as_py() == prompt
        assert np.allclose(index.vectors[row], text_encoder.encode([prompt])[0], atol=1e-6)
