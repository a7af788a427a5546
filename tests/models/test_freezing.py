"""What trains of a backbone: the reference's tensors, frozen modules in eval mode, the cached frozen part."""

import pytest
import torch

from image_to_prompts.models import backbones, checkpoints, freezing


def on_meta(name, size=224):
    with torch.device("meta"):
        return backbones.build(backbones.describe(name, size))


def test_convnext_xxlarge_unfreezes_exactly_the_references_tensors():
    tower = on_meta("open_clip:convnext_xxlarge", 512)
    names = [name for name, _ in tower.named_parameters()]
    reference = names[next(i for i, name in enumerate(names) if "24" in name) :]
    groups = freezing.layer_groups(tower)
    assert len(groups) == 42
    trained = freezing.unfreeze(tower)
    assert set(trained) == set(reference)
    assert (len(trained), len(names)) == (88, 379)
    assert {name for name, p in tower.named_parameters() if p.requires_grad} == set(reference)


@pytest.mark.parametrize(
    "name",
    [
        "open_clip:ViT-B-32",
        "open_clip:RN50",
        "open_clip:convnext_base",
        "timm:convnext_tiny",
        "timm:tf_efficientnet_lite2",
        "timm:eva02_tiny_patch14_224",
        "timm:vit_tiny_patch16_224",
    ],
)
def test_any_backbone_has_ordered_groups_and_a_trained_end(name):
    tower = on_meta(name)
    groups = freezing.layer_groups(tower)
    trained = freezing.unfreeze(tower)
    total = sum(p.numel() for p in tower.parameters())
    share = sum(p.numel() for p in tower.parameters() if p.requires_grad) / total
    assert len(groups) > 10 and 0.05 < share < 0.9, (len(groups), share)
    assert set(groups[-1]) <= set(trained) and not set(groups[0]) & set(trained)


def test_frozen_modules_stay_in_eval_mode():
    tower = backbones.build(backbones.describe("timm:tf_efficientnet_lite2", 64))
    freezing.unfreeze(tower)
    freezing.set_training(tower, True)
    assert not tower.bn1.training and tower.bn2.training
    freezing.set_training(tower, False)
    assert not any(module.training for module in tower.modules())


@pytest.mark.parametrize("name", ["timm:tf_efficientnet_lite2", "timm:convnext_atto", "open_clip:tiny"])
def test_trained_tail_over_cached_activations_equals_the_whole(name, tiny_open_clip):
    name = f"open_clip:{tiny_open_clip}" if name == "open_clip:tiny" else name
    whole = checkpoints.build(backbones.describe(name, 64)).eval()
    freezing.unfreeze(whole.backbone)
    tail, first = freezing.trained_tail(whole.backbone)
    taken = []
    first.register_forward_pre_hook(lambda module, inputs: taken.append(inputs[0]))
    images = torch.randint(0, 255, (4, 3, 64, 64), dtype=torch.uint8)
    with torch.inference_mode():
        expected = whole.features(images)
        torch.testing.assert_close(tail(taken[0]), expected, rtol=1e-4, atol=1e-4)
    assert not any(not p.requires_grad for p in tail.parameters())


def test_frozen_matrices_in_half_precision_change_nothing_under_autocast(tiny_open_clip):
    net = checkpoints.build(backbones.describe(f"open_clip:{tiny_open_clip}", 64)).eval()
    freezing.unfreeze(net.backbone)
    images = torch.randint(0, 255, (2, 3, 64, 64), dtype=torch.uint8)

    def predicted():
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            return net(images)

    before, size = predicted(), sum(p.nbytes for p in net.parameters())
    freezing.half_frozen(net, torch.bfloat16)
    assert torch.equal(predicted(), before)
    assert sum(p.nbytes for p in net.parameters()) < size
    assert all(p.dtype == torch.float32 for p in net.parameters() if p.requires_grad)
