"""Deduplication: the law against a plain oracle, engines, thresholds, files, groups, reasons, refusals."""

import gzip
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import plain_dedupe
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from image_to_prompts import dedupe
from image_to_prompts.data import metadata
from image_to_prompts.dedupe import pictures, result
from image_to_prompts.models import metrics, text_encoder
from image_to_prompts.run.errors import UserError
from image_to_prompts.search import groups, near_pairs, with_faiss


def unit(vectors):
    return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)


def oracle(vectors, threshold, fixed=0):
    """The law, word by word: the first kept row that each resembles, or itself."""
    kept, leader = list(range(fixed)), list(range(fixed))
    for row in range(fixed, len(vectors)):
        near = [k for k in kept if vectors[k] @ vectors[row] >= np.float32(threshold)]
        leader.append(near[0] if near else row)
        if not near:
            kept.append(row)
    return np.array(leader)


def clustered(count, seed, width):
    """Vectors of which many nearly agree, as prompts do."""
    rng = np.random.default_rng(seed)
    centres = rng.normal(size=(max(1, count // 3), width))
    return unit(
        centres[rng.integers(len(centres), size=count)]
        + rng.uniform(0, 1, (count, 1)) * rng.normal(size=(count, width))
    )


@given(
    st.integers(1, 70),
    st.integers(0, 10**6),
    st.sampled_from([2, 4, 40, 200]),
    st.sampled_from([0.003, 0.5, 0.7, 0.8, 0.95, 1.0]),
    st.integers(0, 5),
    st.sampled_from([(8192, 2048, 2048), (16, 8, 8), (7, 3, 5)]),
    st.booleans(),
)
@settings(max_examples=160)
def test_the_law_in_blocks_of_any_size(count, seed, width, threshold, fixed, blocks, whole):
    vectors = clustered(count, seed, width)
    fixed = min(fixed, count)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(near_pairs, "fast_int8", lambda device: whole)
        for name, value in zip(("BLOCK", "TALL", "WIDE"), blocks, strict=True):
            patch.setattr(near_pairs, name, value)
        leader, cosine = near_pairs.leaders(vectors, threshold, fixed)
        pairs = near_pairs.pairs(vectors, threshold)
    products = vectors.astype(float) @ vectors.T.astype(float)
    earlier = np.tril(np.ones_like(products, bool), -1)
    kept = np.flatnonzero(leader == np.arange(count))
    inside = np.where(earlier, products, -1)[np.ix_(kept, kept)]
    inside[:fixed, :fixed] = -1
    assert inside.max(initial=-1) < threshold + 1e-6
    gone = np.flatnonzero(leader != np.arange(count))
    assert np.isin(leader[gone], kept).all() and (leader <= np.arange(count)).all() and (gone >= fixed).all()
    np.testing.assert_allclose(cosine[gone], products[gone, leader[gone]], atol=1e-6)
    assert (cosine[gone] >= np.float32(threshold)).all()
    assert (np.lexsort((pairs.earlier, pairs.later)) == np.arange(len(pairs.later))).all()
    # Random reals lie on the threshold by rounding alone; then float32 itself is ambiguous.
    if np.abs(products - threshold)[earlier].min(initial=1) > 1e-6:
        np.testing.assert_array_equal(leader, oracle(vectors, threshold, fixed))
        found = np.zeros_like(earlier)
        found[pairs.later, pairs.earlier] = True
        np.testing.assert_array_equal(found, earlier & (products >= threshold))
        if not fixed:
            np.testing.assert_array_equal(plain_dedupe.leaders(vectors, threshold)[0], leader)
        np.testing.assert_array_equal(result.resolved(pairs, count, threshold, fixed)[0], leader)


@given(st.integers(0, 40), st.integers(0, 40), st.integers(0, 10**6), st.sampled_from([0.5, 0.8, 1.0]))
@settings(max_examples=60)
def test_what_is_near_others(count, others, seed, threshold):
    vectors = clustered(count + others + 1, seed, 6)
    one, other = vectors[:count], vectors[count:]
    with pytest.MonkeyPatch.context() as patch:
        for name, value in zip(("BLOCK", "TALL", "WIDE"), (7, 3, 5), strict=True):
            patch.setattr(near_pairs, name, value)
        found = near_pairs.near(one, other, threshold)
    highest = np.array([max(float(vector @ some) for some in other) for vector in one]).reshape(-1)
    sure = np.abs(highest - threshold) > 1e-6
    assert found.shape == (count,) and found.dtype == bool
    np.testing.assert_array_equal(found[sure], (highest >= threshold)[sure])


def test_a_pair_that_just_reaches_the_threshold_counts():
    vectors = metrics.unit(np.array([[1, 0], [0.8, 0.6], [0.6, 0.8]]))
    found = near_pairs.pairs(vectors, 0.5)
    kept = found.at(float(found.cosine.min()))
    assert len(kept.later) == len(found.later) == 3 and len(found.at(float(found.cosine.max())).later) == 1
    for threshold in (0.0, 1.1):
        with pytest.raises(ValueError, match="threshold"):
            near_pairs.pairs(vectors, threshold)


def test_threads_and_precision_change_nothing(monkeypatch):
    vectors = clustered(3000, 3, 384)
    whole = near_pairs.leaders(vectors, 0.8)
    assert 100 < (whole[0] == np.arange(3000)).sum() < 2900
    monkeypatch.setattr(near_pairs, "mixed_precision", lambda device: "no")
    monkeypatch.setattr(near_pairs, "fast_int8", lambda device: False)
    threads = torch.get_num_threads()
    torch.set_num_threads(1 if threads > 1 else 3)
    try:
        again = near_pairs.leaders(vectors, 0.8)
    finally:
        torch.set_num_threads(threads)
    for one, other in zip(whole, again, strict=True):
        np.testing.assert_array_equal(one, other)


def memory_of(file):
    """Bytes of a mapped file that count as this process's memory."""
    _, _, rest = Path("/proc/self/smaps").read_text().partition(str(file))
    return 1024 * int(rest.partition("Rss:")[2].split()[0])


@pytest.mark.skipif(not Path("/proc/self/smaps").is_file(), reason="Linux tells the memory of a mapping")
def test_of_a_mapped_file_little_is_in_memory(tmp_path, monkeypatch):
    vectors, file, seen, real = clustered(40_000, 4, 384), tmp_path / "v.npy", [], near_pairs.let_go
    np.save(file, vectors)
    expected = near_pairs.leaders(vectors, 0.8)

    def let_go(array):
        seen.append(memory_of(file))
        real(array)

    monkeypatch.setattr(near_pairs, "let_go", let_go)
    monkeypatch.setattr(near_pairs, "LET_GO", 100)
    mapped = np.load(file, mmap_mode="c")
    found = near_pairs.leaders(mapped, 0.8)
    assert all(np.array_equal(*both) for both in zip(found, expected, strict=True))
    assert len(seen) > 20 and np.median(seen) < file.stat().st_size / 4
    real(mapped)
    assert memory_of(file) < 2e6


@pytest.fixture
def compared(monkeypatch):
    """The rows of which the exact engine compared each block, and how to kill it after some."""

    class Seen(list):
        stop = None

    seen, real = Seen(), near_pairs.product

    def product(rows, *others):
        if len(seen) == seen.stop:
            raise KeyboardInterrupt
        seen.append(len(rows))
        return real(rows, *others)

    monkeypatch.setattr(near_pairs, "product", product)
    monkeypatch.setattr(near_pairs, "BLOCK", 32)
    return seen


@pytest.mark.parametrize("stop", [0, 1, 6, 9])
def test_a_killed_search_goes_on_after_the_last_decided_block(compared, tmp_path, stop):
    vectors = clustered(300, 3, 20)
    expected = near_pairs.leaders(vectors, 0.8, 7)
    in_all = len(compared)
    assert in_all == 2 * -(-293 // 32)  # each block with what was kept, and with itself
    compared.clear()
    compared.stop = stop
    with pytest.raises(KeyboardInterrupt):
        near_pairs.leaders(vectors, 0.8, 7, tmp_path)
    compared.stop = None
    compared.clear()
    for todo in (in_all - stop // 2 * 2, 0):
        found = near_pairs.leaders(vectors, 0.8, 7, tmp_path)
        assert all(np.array_equal(*both) for both in zip(found, expected, strict=True)) and len(compared) == todo
        compared.clear()
    damaged = max(tmp_path.rglob("decided-*.safetensors"))
    damaged.write_bytes(damaged.read_bytes()[:-1])
    assert np.array_equal(near_pairs.leaders(vectors, 0.8, 7, tmp_path)[0], expected[0]) and len(compared) == 2
    for others in ((vectors[::-1], 0.8, 7), (vectors, 0.75, 7), (vectors, 0.8, 6)):
        compared.clear()
        assert np.array_equal(near_pairs.leaders(*others, tmp_path)[0], oracle(*others)) and compared, "other work"


def test_a_killed_deduplication_of_many_rows_goes_on(compared, small_run, tmp_path, monkeypatch):
    monkeypatch.setattr(dedupe, "IN_MEMORY", 10)
    monkeypatch.setattr(near_pairs, "BLOCK", 16)
    config = dedupe.Config(prompts=(small_run.prompts,), out=tmp_path / "m.csv", threshold=0.75)
    expected = dedupe.run(replace(config, out=tmp_path / "whole" / "m.csv"))
    in_all, compared.stop = len(compared), 9
    compared.clear()
    with pytest.raises(KeyboardInterrupt):
        dedupe.run(config)
    compared.stop = None
    pd.testing.assert_frame_equal(dedupe.run(config), expected)
    assert len(compared) == in_all + 1  # of the fifth block one half was done, and is done again
    assert not list(tmp_path.glob(".m-*")), "half-done work is removed"


def test_vectors_that_are_not_of_length_1_are_refused():
    vectors = clustered(20, 0, 8)
    with pytest.raises(ValueError, match="not of length 1"):
        near_pairs.leaders(vectors * 2, 0.8)
    vectors[7] = np.nan
    with pytest.raises(ValueError, match="not of length 1"):
        near_pairs.pairs(vectors, 0.8)
    with pytest.raises(ValueError, match="threshold"):
        near_pairs.leaders(clustered(5, 0, 8), 1.5)


def test_the_index_keeps_the_law_but_for_what_it_misses(monkeypatch):
    monkeypatch.setattr(with_faiss, "BLOCK", 500)
    vectors = clustered(4000, 1, 64)
    leader, cosine, missed = with_faiss.leaders(vectors, 0.8, fixed=10)
    gone = np.flatnonzero(leader != np.arange(4000))
    assert len(gone) > 500 and (leader[:10] == np.arange(10)).all() and (leader[gone] < gone).all()
    np.testing.assert_allclose(cosine[gone], (vectors[gone] * vectors[leader[gone]]).sum(1), atol=1e-6)
    assert (cosine[gone] >= 0.8 - 1e-6).all() and (leader[leader] == leader).all()
    assert 0 <= missed < 0.5
    monkeypatch.setattr(with_faiss, "PROBED", 1)
    everything, _, none = with_faiss.leaders(vectors, 0.8, fixed=10)
    assert none == 0
    np.testing.assert_array_equal(everything, near_pairs.leaders(vectors, 0.8, 10)[0])


def frame_of(*prompts, **columns):
    return pd.DataFrame({"prompt": prompts, **columns})


def test_thresholds_from_one_pass(monkeypatch):
    prompts = [f"{what} {where}" for where in ("in a wood", "at the sea", "on the moon") for what in ("a fox", "foxes")]
    found = dedupe.dedupe(frame_of(*prompts), text_encoder.encode)
    counts = {threshold: found.at(threshold).counts for threshold in (0.7, 0.75, 0.8, 0.9, 1.0)}
    fresh = {t: dedupe.dedupe(frame_of(*prompts), text_encoder.encode, t, engine="exact").counts for t in counts}
    assert counts == fresh and len({tuple(c.values()) for c in counts.values()}) > 1
    monkeypatch.setattr(result, "leaders", lambda *_, **__: pytest.fail("compared vectors again"))
    assert found.at(0.9).at(0.7).counts == counts[0.7]


def numbered(vectors):
    """Rows whose prompts end in their numbers, and what embeds each as the vector of its number."""
    frame = frame_of(*(f"prompt {number}" for number in range(len(vectors))))
    return frame, lambda texts: vectors[[int(text.split()[1]) for text in texts]]


@pytest.mark.parametrize("kept_pairs", [True, False])
def test_another_threshold_is_as_if_it_had_been_asked_for(monkeypatch, kept_pairs):
    """Also with rows of an earlier file, which copies of each other stay in, from pairs and from vectors."""
    vectors = clustered(200, 3, 20)
    frame, encode = numbered(vectors)
    if not kept_pairs:
        monkeypatch.setattr(result, "MOST_PAIRS", -1)

    def made(threshold, fixed=40):
        return dedupe.dedupe(frame, encode, threshold, fixed=fixed)

    found = made(0.8)
    assert (found.pairs is not None) == kept_pairs
    for threshold in (0.75, 0.8, 0.9):
        expected, other = made(threshold), found.at(threshold)
        assert other.threshold == expected.threshold == threshold and other.how == expected.how
        assert np.array_equal(expected.leader, oracle(vectors, threshold, 40))
        assert np.array_equal(other.leader, expected.leader) and np.array_equal(other.cosine, expected.cosine)
        assert not np.array_equal(expected.leader, made(threshold, 0).leader)
    assert np.array_equal(found.groups(), oracle(vectors[found.kept_rows], 0.7))
    assert found.at(0.5).how == "exact, 200 texts"  # pairs do not reach that far


def test_pairs_are_gone_through_in_lists_of_any_length(monkeypatch):
    monkeypatch.setattr(near_pairs, "LISTED", 7)
    vectors = clustered(200, 3, 20)
    found = near_pairs.pairs(vectors, 0.7)
    assert len(found.later) > 70 and found.cosine.dtype == np.float32
    assert np.array_equal(result.resolved(found, 200, 0.8)[0], oracle(vectors, 0.8))


def test_a_bare_table_is_taken_from_its_first_row():
    """Without the columns that `run` adds, and only texts that the tokenizer tells apart share no vector."""
    prompts = ["a fox", "A  Fox", "Straße", "strasse", "a fox"]
    encode = lambda texts: np.eye(3, dtype=np.float32)[: len(texts)]  # noqa: E731
    found = dedupe.dedupe(frame_of(*prompts), encode)
    assert found.kept["prompt"].tolist() == ["a fox", "Straße", "strasse"] and found.counts["rows"] == 5
    told = found.removed[["prompt", "reason", "file", "row", "kept_file", "kept_row"]].to_numpy().tolist()
    assert told == [["A  Fox", "normalised", "", 2, "", 1], ["a fox", "exact", "", 5, "", 1]]
    assert len(dedupe.dedupe(frame_of(*prompts), encode, 1.0).kept) == 3
    same = dedupe.dedupe(frame_of("a fox", "a red fox"), lambda texts: np.eye(2, dtype=np.float32)[[0, 0]], 1.0)
    assert same.removed["reason"].tolist() == ["similar"]  # a cosine that is the threshold itself
    assert same.cosine.dtype == near_pairs.leaders(same.vectors, 0.8)[1].dtype == np.float32


def test_rows_to_compare_with_stay_whoever_searches():
    vectors = np.eye(60, dtype=np.float32)[np.arange(120) % 60]
    for engine in ("exact", "faiss"):
        leader = groups.leaders(vectors, 0.8, 70, engine)[0]
        assert np.array_equal(leader[:70], np.arange(70)) and (leader[70:] < 60).all()


@pytest.mark.parametrize("block", [7, 50, 64])
def test_a_sample_tells_the_nearest_others_and_how_many_pairs_there_are(monkeypatch, block):
    monkeypatch.setattr(result, "BLOCK", block)
    vectors = np.concatenate([clustered(45, 2, 6), -np.eye(6, dtype=np.float32)[:5]])
    cosines = vectors @ vectors.T
    np.fill_diagonal(cosines, -2)
    for floor in (0.0, 0.7):  # axes are at right angles: their cosine is the first floor itself
        nearest, pairs = result.sampled(vectors, floor)
        np.testing.assert_allclose(nearest, cosines.max(1), atol=1e-6)
        assert pairs == (cosines >= floor).sum() // 2 and isinstance(pairs, int)
    away, none = result.sampled(np.array([[1, 0], [-1, 0]], np.float32), 0.7)
    assert away.tolist() == [-1, -1] and away.dtype == np.float32 and none == 0
    monkeypatch.setattr(result, "SAMPLE", 20)
    some, estimated = result.sampled(np.repeat(np.eye(30, dtype=np.float32), 3, 0), 0.7)  # each has two others
    assert some.tolist() == [1] * 20 and estimated == 90
    some, _ = result.sampled(vectors, 0.7)
    assert len(some) == 20 and np.array_equal(some, result.sampled(vectors, 0.7)[0])


def test_what_searched_is_said(monkeypatch):
    vectors = clustered(3000, 5, 384)
    frame, encode = numbered(vectors)

    def made(engine="auto"):
        found = dedupe.dedupe(frame, encode, engine=engine)
        assert found.threshold == 0.8
        return found, found.at(0.9)

    monkeypatch.setattr(groups, "MOST_EXACT", 100)
    asked, many, exactly = made("faiss"), made(), made("exact")
    for one, other in zip(asked, many, strict=True):
        assert one.how.startswith("faiss (asked for), ") and other.how.startswith("faiss (more than 100 texts), ")
        assert one.how.endswith("of the near rows missed")
        assert np.array_equal(one.leader, other.leader)
    assert all(one.how.startswith("exact, ") for one in exactly)
    alike = [(one.leader == other.leader).mean() for one, other in zip(asked, exactly, strict=True)]
    assert min(alike) > 0.95


def test_too_many_pairs_are_not_kept(monkeypatch):
    prompts = frame_of(*[f"a red fox, number {i}" for i in range(30)])
    whole = dedupe.dedupe(prompts, text_encoder.encode)
    monkeypatch.setattr(result, "MOST_PAIRS", 3)
    without = dedupe.dedupe(prompts, text_encoder.encode)
    assert dedupe.dedupe(frame_of("a fox", "a lamp", "the sea", "two owls"), text_encoder.encode, 0.01).pairs is None
    assert whole.pairs is not None and without.pairs is None
    pd.testing.assert_frame_equal(whole.removed, without.removed)
    assert without.at(0.95).counts == whole.at(0.95).counts
    assert pictures.borderline(without).empty and len(pictures.curve(without)) == 1 and len(pictures.curve(whole)) > 5


def write(path, *prompts, **columns):
    metadata.write_table(path, frame_of(*prompts, **columns))
    return path


def removed_of(out):
    return pd.read_csv(dedupe.removed_path(out))


def test_files_groups_and_reasons(tmp_path):
    a = write(tmp_path / "a.csv", "a cat sitting on a sofa", "a red sports car", "a cat sitting on a sofa")
    b = write(tmp_path / "b.csv", "a cat sitting on the sofa", "an astronaut riding a horse", "A red  sports Car")
    out = tmp_path / "meta" / "x.csv"
    kept = dedupe.run(dedupe.Config(prompts=(a, b), out=out))
    removed = removed_of(out)
    assert kept["prompt"].tolist() == ["a cat sitting on a sofa", "a red sports car", "an astronaut riding a horse"]
    columns = ["prompt", "kept_prompt", "similarity", "reason", "file", "row", "kept_file", "kept_row"]
    assert list(removed.columns) == columns
    assert removed["reason"].tolist() == ["exact", "similar", "normalised"]
    assert (removed["similarity"] >= 0.8).all()
    assert removed["kept_file"].tolist() == [str(a)] * 3 and removed["kept_row"].tolist() == [1, 1, 2]
    assert removed["file"].tolist() == [str(a), str(b), str(b)] and removed["row"].tolist() == [3, 1, 3]
    assert kept["source"].tolist() == ["a", "a", "b"] and "row" not in kept
    assert set(kept["group"]) <= set(kept["image_name"]) and kept["fold"].between(0, 4).all()
    assert metadata.read(out)["prompt"].tolist() == kept["prompt"].tolist()
    assert dedupe.picture_path(out).stat().st_size > 1000


def test_rows_of_two_files_with_one_name_are_named(tmp_path):
    paths = [tmp_path / "a.csv", tmp_path / "b.csv"]
    for path, prompts in zip(
        paths, (["a red fox", "a blue whale"], ["an oil lamp", "two owls on a roof"]), strict=True
    ):
        metadata.write_table(path, pd.DataFrame({"image_name": ["0.png", "1.png"], "prompt": prompts}))
    with pytest.raises(UserError, match=r"b\.csv: row 1: image_name '0\.png' stands in .*a\.csv, row 1, too"):
        dedupe.run(dedupe.Config(prompts=tuple(paths), out=tmp_path / "o.csv"))


def test_against_other_metadata(tmp_path, command):
    known = ["two owls on a roof", "two owls on a roof at night", "a red fox"]
    known = write(tmp_path / "known.csv", *known, model=["x"] * 3, fold=["1"] * 3)
    new = write(tmp_path / "new.csv", "A red fox", "a blue whale", "two owls on the roof")
    out = tmp_path / "o.csv"
    kept = dedupe.run(dedupe.Config(prompts=(new,), against=(known,), out=out))
    assert kept["prompt"].tolist() == ["a blue whale"]
    assert list(kept.columns) == ["image_name", "prompt", "seed", "source", "group", "fold"]
    assert metadata.read(out)["seed"].tolist() == kept["seed"].tolist()
    code, said, _ = command("explain", "two owls sitting on a roof", "--metadata", out)
    assert code == 0 and "would be removed" in said
    removed = removed_of(out)
    assert removed["prompt"].tolist() == ["A red fox", "two owls on the roof"]
    assert removed["reason"].tolist() == ["normalised", "similar"]
    assert set(removed["kept_file"]) == {str(known)} and removed["kept_row"].tolist() == [3, 1]


def test_nothing_new_and_columns_of_the_users_own(tmp_path):
    csv = write(tmp_path / "p.csv", "a red fox", "a lamp", file=["x", "y"], row=["7", "8"], position=["up", "down"])
    kept = dedupe.run(dedupe.Config(prompts=(csv,), out=tmp_path / "o.csv"))
    assert kept["file"].tolist() == ["x", "y"] and kept["row"].tolist() == ["7", "8"]
    assert kept["position"].tolist() == ["up", "down"] and not any(name.startswith("_") for name in kept)
    with pytest.raises(UserError, match="every row resembles one of --against"):
        dedupe.run(dedupe.Config(prompts=(csv,), against=(csv,), out=tmp_path / "again.csv"))
    assert not (tmp_path / "again.csv").exists()


def test_preferred_sources_win_and_the_order_stays(tmp_path):
    sources = ["poor", "poor", "good", "good"]
    prompts = ["a red fox in snow", "a small boat", "a red fox in the snow", "a lamp"]
    csv, out = write(tmp_path / "p.csv", *prompts, source=sources), tmp_path / "o.csv"
    assert dedupe.run(dedupe.Config(prompts=(csv,), out=out))["prompt"].tolist() == [prompts[i] for i in (0, 1, 3)]
    kept = dedupe.run(dedupe.Config(prompts=(csv,), out=out, prefer=("good",)))
    assert kept["prompt"].tolist() == prompts[1:]
    with pytest.raises(UserError, match=r"no row has this source \(sources: good, poor\)"):
        dedupe.run(dedupe.Config(prompts=(csv,), out=out, prefer=("best",)))


def test_half_precision_reports_what_float32_finds(tmp_path, caplog):
    caplog.set_level("INFO", "image_to_prompts")
    csv = write(tmp_path / "p.csv", *[f"{n} red foxes {where}" for n in range(9) for where in ("at sea", "in a car")])
    dedupe.run(dedupe.Config(prompts=(csv,), out=tmp_path / "fast.csv", fast=True))
    said = re.search(r"float32 would change (\d+\.\d\d) % of the fates \((\d+) sampled\)", caplog.text)
    assert float(said[1]) == 0 and int(said[2]) == 17  # no pair is near the threshold; the first row has no fate
    removed = removed_of(tmp_path / "fast.csv")
    exact_cosines = np.einsum(
        "ij,ij->i", *(text_encoder.encode(removed[name].tolist()) for name in ("prompt", "kept_prompt"))
    )
    assert len(removed) > 3
    np.testing.assert_allclose(removed["similarity"], exact_cosines, atol=2e-6)


def test_a_prompt_is_explained(tmp_path, command):
    csv = write(tmp_path / "p.csv", "a red fox in snow", "a small boat", "a red fox in the snow")
    out = tmp_path / "o.csv"
    dedupe.run(dedupe.Config(prompts=(csv,), out=out))
    for prompt, fate in {
        "A small boat": "kept\n",
        "a red fox in the snow": f"because of row 1 of {csv}: a red fox in snow\n",
        "red fox in snow": "would be removed: nearest kept row 0.9",
        "a steam engine": "would be kept: nearest kept row 0.",
    }.items():
        code, said, err = command("explain", prompt, "--metadata", out)
        assert code == 0 and fate in said and said.count("\n") >= 4, (said, err)
    assert command("explain", "a cat", "--metadata", tmp_path / "none.csv")[0] == 2


@pytest.mark.parametrize("fast", [False, True])
def test_vectors_in_a_file_change_nothing(small_run, tmp_path, monkeypatch, fast):
    mapped, real = [], text_encoder.encode_to
    monkeypatch.setattr(text_encoder, "encode_to", lambda *told: mapped.append(told[0]) or real(*told))
    monkeypatch.setattr(text_encoder, "MANY", 7)
    for name, most in (("memory", 1000), ("file", 10)):
        monkeypatch.setattr(dedupe, "IN_MEMORY", most)
        out = tmp_path / name / "m.csv"
        dedupe.run(dedupe.Config(prompts=(small_run.prompts,), out=out, threshold=0.7, fast=fast))
    assert len(mapped) == 1 and not mapped[0].exists(), "what it needed goes when it is done"
    for name in ("m.csv", "m.removed.csv"):
        assert (tmp_path / "file" / name).read_bytes() == (tmp_path / "memory" / name).read_bytes()


def test_adding_rows_at_the_end_moves_no_old_one(small_run, tmp_path):
    frame = metadata.read(small_run.prompts)
    metadata.write_table(tmp_path / "half.csv", frame.head(len(frame) // 2))
    half = dedupe.run(dedupe.Config(prompts=(tmp_path / "half.csv",), out=tmp_path / "h.csv"))
    whole = dedupe.run(dedupe.Config(prompts=(small_run.prompts,), out=tmp_path / "w.csv"))
    pd.testing.assert_frame_equal(half, whole.head(len(half)))


def test_variety_of_the_grammar():
    from image_to_prompts.embedded import grammar

    vectors = text_encoder.encode([grammar.prompt(0, i) for i in range(400)])
    mean = vectors.mean(0)
    assert (vectors @ mean).mean() / np.linalg.norm(mean) <= 0.50
    leader, _ = near_pairs.leaders(vectors, result.FLOOR)
    assert np.bincount(leader).max() <= 0.05 * len(vectors)


@pytest.mark.parametrize(
    "bad",
    [{"threshold": 0.0}, {"threshold": 1.5}, {"folds": 1}, {"prompts": ()}, {"search": "x"}, {"out": Path("o.png")}],
)
def test_bad_settings_are_refused(tmp_path, bad):
    source = write(tmp_path / "p.csv", "a cat")
    with pytest.raises(UserError):
        dedupe.run(dedupe.Config(**{"prompts": (source,), "out": tmp_path / "o.csv", **bad}))
    assert not (tmp_path / "o.csv").exists()


@pytest.mark.slow
def test_real_prompts_obey_the_law(shared_data):
    with gzip.open(shared_data / "real_prompts.txt.gz", "rt", encoding="utf-8") as file:
        prompts = [line.rstrip("\n") for line in file][:6000]
    found = dedupe.dedupe(frame_of(*prompts), text_encoder.encode)
    expected, cosine = plain_dedupe.leaders(found.vectors, 0.8)
    products = np.sort(np.abs(found.pairs.cosine - np.float32(0.8)))
    assert products[0] > 1e-6  # else float32 itself would be ambiguous
    np.testing.assert_array_equal(found.leader, expected)
    np.testing.assert_allclose(found.cosine, cosine, atol=1e-6)
    np.testing.assert_array_equal(near_pairs.leaders(found.vectors, 0.8)[0], expected)


def test_competition_prompts_embed_as_the_competition_did(shared_data):
    from image_to_prompts.infer import submission

    prompts = pd.read_csv(shared_data / "kaggle_sample" / "prompts.csv")
    ours = text_encoder.encode(prompts["prompt"].tolist())
    theirs = submission.read(shared_data / "kaggle_sample" / "sample_submission.csv", prompts["imgId"].tolist())
    assert np.abs(ours - theirs).max() <= 1e-5
