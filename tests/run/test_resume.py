"""Stamps, journals and blocks: what is finished is not made again, what is damaged is."""

import os

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import load_file

from image_to_prompts.run import files, resume
from image_to_prompts.run.errors import UserError


@given(st.lists(st.dictionaries(st.text(), st.text(), max_size=3), max_size=6), st.integers(0, 40))
def test_a_torn_journal_keeps_its_whole_lines(tmp_path_factory, records, cut):
    path = tmp_path_factory.mktemp("journal") / "j.jsonl"
    for record in records:
        resume.append_line(path, record)
    assert resume.read_journal(path) == records
    if records:
        whole = path.read_bytes()
        path.write_bytes(whole[: max(0, len(whole) - cut)])
        kept = resume.read_journal(path)
        assert kept == records[: len(kept)]
        resume.append_line(path, {"after": "cut"})
        assert resume.read_journal(path) == [*kept, {"after": "cut"}]


def test_stamps_know_settings_inputs_and_outputs(tmp_path):
    source, out = tmp_path / "in.txt", tmp_path / "out.txt"
    source.write_text("a")
    out.write_text("result")
    stamp = resume.Stamp(tmp_path / ".done", "x", {"count": 1}, [source])
    assert not stamp.is_current()
    stamp.write([out])
    assert resume.Stamp(tmp_path / ".done", "x", {"count": 1}, [source]).is_current()
    assert not resume.Stamp(tmp_path / ".done", "x", {"count": 2}, [source]).is_current()
    out.write_text("damaged result")
    assert not stamp.is_current()
    out.write_text("result")
    source.write_text("b")
    assert not resume.Stamp(tmp_path / ".done", "x", {"count": 1}, [source]).is_current()


def test_work_killed_between_its_stamp_and_the_clearing_up_is_cleared_by_the_next_run(tmp_path, monkeypatch):
    out, stamp = tmp_path / "out.txt", resume.Stamp(tmp_path / ".out.done", "x", {})
    out.write_text("result")
    files.write_text(stamp.work_folder() / "half.txt", "half")
    with monkeypatch.context() as killed:
        killed.setattr(resume.shutil, "rmtree", lambda *_, **__: None)
        stamp.write([out])
    assert (stamp.work_folder() / "half.txt").is_file()
    assert stamp.is_current()
    assert sorted(path.name for path in tmp_path.iterdir()) == [".out.done", "out.txt"]


def stamp_of(folder, by="x", settings="", inputs=()):
    return resume.Stamp(folder / ".out.done", by, {"settings": settings}, inputs)


def test_only_what_was_written_before_is_claimed(tmp_path):
    out, other = tmp_path / "out.txt", tmp_path / "other.txt"
    stamp = stamp_of(tmp_path)
    stamp.claim([out])
    out.write_text("half-done")
    stamp_of(tmp_path, settings="changed").claim([out])  # killed before it had finished: still its own
    stamp.write([out])
    stamp_of(tmp_path, settings="changed").claim([out])
    with pytest.raises(UserError, match=r"out\.txt: not written by y") as error:
        stamp_of(tmp_path, by="y").claim([out])
    assert "\n" not in str(error.value)
    other.write_text("mine")
    with pytest.raises(UserError, match=r"other\.txt: not written by x"):
        stamp.claim([out, other])
    assert out.read_text() == "half-done" and other.read_text() == "mine"


def test_an_input_is_never_claimed_by_whatever_path(tmp_path):
    (tmp_path / "in.txt").write_text("mine")
    (tmp_path / "link.txt").symlink_to(tmp_path / "in.txt")
    os.link(tmp_path / "in.txt", tmp_path / "hard.txt")
    for name in ("in.txt", "link.txt", "hard.txt"):
        with pytest.raises(UserError, match=r"is read here"):
            stamp_of(tmp_path, inputs=[tmp_path / "in.txt"]).claim([tmp_path / name])


def test_a_damaged_stamp_still_tells_whose_outputs_they_are(tmp_path):
    out, stamp = tmp_path / "out.txt", stamp_of(tmp_path)
    stamp.claim([out])
    out.write_text("result")
    stamp.write([out])
    (tmp_path / ".out.done").write_bytes(b"{")
    stamp_of(tmp_path).claim([out])


def test_what_is_no_output_any_more_goes_with_what_other_settings_left(tmp_path):
    one, two, foreign = (tmp_path / name for name in ("one.txt", "two.txt", ".out-notes"))
    foreign.mkdir()
    first = stamp_of(tmp_path)
    first.claim([one, two])
    one.write_text("1")
    two.write_text("2")
    first.write([one, two])
    half = stamp_of(tmp_path, settings="never finished").work_folder()
    (tmp_path / ".one.txt.4194399.part").write_text("half-written by a killed process")
    second = stamp_of(tmp_path, settings="changed")
    second.claim([one])
    assert two.exists() and half.exists()
    second.write([one])
    assert sorted(path.name for path in tmp_path.iterdir()) == [".out-notes", ".out.done", "one.txt"]


def test_what_a_killed_process_left_of_tensors_goes(tmp_path):
    """The library's own temporary file too, whose name nobody can foretell."""
    import numpy as np
    import torch
    from safetensors.numpy import load_file

    for tensors in ({"a": np.arange(3, dtype=np.float32)}, {"a": torch.arange(3.0)}):
        files.write_tensors(tmp_path / "out.safetensors", tensors)
        assert load_file(tmp_path / "out.safetensors")["a"].tolist() == [0, 1, 2]
    assert [path.name for path in tmp_path.iterdir()] == ["out.safetensors"]
    left = tmp_path / ".out.safetensors.4194399.part"
    left.mkdir()
    (left / ".tmpAbC123").write_bytes(b"half")
    resume.sweep([tmp_path / "out.safetensors"])
    assert [path.name for path in tmp_path.iterdir()] == ["out.safetensors"]


def makes(asked, rows):
    """What makes blocks of a list of numbers, and notes which were asked for."""

    def make(blocks):
        for block in blocks:
            asked.append((block.start, block.stop))
            yield {"rows": np.array(rows[block.start : block.stop])}

    return make


def test_blocks_are_made_once_and_again_where_they_are_damaged(tmp_path):
    asked, rows = [], [5, 6, 7, 8, 9, 10, 11]
    found = resume.blocks(tmp_path, 7, 3, makes(asked, rows))
    assert asked == [(0, 3), (3, 6), (6, 7)]
    assert np.concatenate([load_file(one)["rows"] for one in found]).tolist() == rows
    assert resume.blocks(tmp_path, 7, 3, makes(asked, rows)) == found and len(asked) == 3
    found[1].write_bytes(found[1].read_bytes()[:-1] + b"x")
    found[2].unlink()
    assert resume.blocks(tmp_path, 7, 3, makes(asked, rows)) == found
    assert asked[3:] == [(3, 6), (6, 7)]
    assert np.concatenate([load_file(one)["rows"] for one in found]).tolist() == rows


def test_blocks_end_where_it_is_over_and_go_on_from_there(tmp_path):
    asked, answers = [], iter([False, True])
    found = resume.blocks(tmp_path, 7, 3, makes(asked, range(7)), over=lambda: next(answers))
    assert asked == [(0, 3)] and [one.name for one in found] == ["block-000000000.safetensors"]
    assert len(resume.blocks(tmp_path, 7, 3, makes(asked, range(7)))) == 3 and asked[1:] == [(3, 6), (6, 7)]
