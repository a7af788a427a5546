"""A checkpoint averaged with the weights from which it started."""

import sys
from pathlib import Path

import pytest
import torch

from image_to_prompts.models import checkpoints
from image_to_prompts.run.errors import UserError

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tools"))
import wise_ft


@pytest.mark.parametrize("share", [0.0, 0.25, 1.0])
def test_the_backbone_is_the_mean_of_two(small_checkpoint, share, tmp_path):
    wise_ft.average(small_checkpoint, share, tmp_path / "averaged")
    trained = checkpoints.load(small_checkpoint)
    before = checkpoints.pretrained(trained.spec)
    found = checkpoints.load(tmp_path / "averaged")
    for name, tensor in found.model.state_dict().items():
        own, old = trained.model.state_dict()[name], before.state_dict()[name]
        if name.startswith("head."):
            assert torch.equal(tensor, own)
        elif tensor.is_floating_point():
            torch.testing.assert_close(tensor, share * own + (1 - share) * old)
    assert found.config["wise_ft"] == share and (found.mean == trained.mean).all()


def test_a_share_beyond_one_is_refused(small_checkpoint, tmp_path):
    with pytest.raises(UserError, match="from 0 to 1"):
        wise_ft.average(small_checkpoint, 1.5, tmp_path / "averaged")
