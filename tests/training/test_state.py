"""The state of a training: read as it was saved, or not at all."""

import torch

from image_to_prompts.training import state


def test_a_state_is_read_back_or_told_to_be_damaged(tmp_path, caplog):
    path, content = tmp_path / "state.pt", {"model": {"w": torch.arange(300.0)}, "micro": 3}
    assert state.read(path, "cpu") is None and not caplog.text
    state.save(path, content)
    found = state.read(path, "cpu")
    assert found["micro"] == 3 and torch.equal(found["model"]["w"], content["model"]["w"])
    data = bytearray(path.read_bytes())
    place = data.index(torch.arange(300.0).numpy().tobytes()[:64])
    data[place + 40] ^= 1
    path.write_bytes(data)
    assert state.read(path, "cpu") is None and f"{path}: damaged" in caplog.text
    path.write_bytes(b"no archive")
    assert state.read(path, "cpu") is None and caplog.text.count("damaged") == 2


def test_nothing_is_left_of_a_training_that_has_ended(tmp_path, caplog):
    names = ("unfinished-1.pt", "unfinished-2.pt", ".unfinished-1.pt.77.part", ".unfinished-3.pt.78.part")
    for name in (*names, "history.csv", ".history.csv.77.part"):
        (tmp_path / name).write_text("x")
    state.forget(tmp_path / "unfinished-1.pt")
    assert {path.name for path in tmp_path.iterdir()} == {"history.csv", ".history.csv.77.part"}
    assert caplog.text.count("removed") == 1 and "unfinished-2.pt" in caplog.text
