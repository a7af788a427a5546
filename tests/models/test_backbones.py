"""Backbones: the reference's quarter, any tower, real EfficientNet weights, the cached frozen part."""

import json

import pytest
import torch

from image_to_prompts.models import backbones, checkpoints, fast_layers, weights
from image_to_prompts.run.errors import UserError


def on_meta(name, size=224):
    with torch.device("meta"):
        return backbones.build(backbones.describe(name, size))


def test_convnext_xxlarge_unfreezes_exactly_the_references_tensors():
    tower = on_meta("open_clip:convnext_xxlarge", 512)
    names = [name for name, _ in tower.named_parameters()]
    reference = names[next(i for i, name in enumerate(names) if "24" in name) :]
    groups = backbones.layer_groups(tower)
    assert len(groups) == 42
    trained = backbones.unfreeze_last_quarter(tower)
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
    groups = backbones.layer_groups(tower)
    trained = backbones.unfreeze_last_quarter(tower)
    total = sum(p.numel() for p in tower.parameters())
    share = sum(p.numel() for p in tower.parameters() if p.requires_grad) / total
    assert len(groups) > 10 and 0.05 < share < 0.9, (len(groups), share)
    assert set(groups[-1]) <= set(trained) and not set(groups[0]) & set(trained)


def test_frozen_modules_stay_in_eval_mode():
    tower = backbones.build(backbones.describe("timm:tf_efficientnet_lite2", 64))
    backbones.unfreeze_last_quarter(tower)
    backbones.set_training(tower, True)
    assert not tower.bn1.training and tower.bn2.training
    backbones.set_training(tower, False)
    assert not any(module.training for module in tower.modules())


def test_unknown_names_list_the_nearest():
    for name, near in (("timm:convnext_tinny", "convnext_tiny"), ("open_clip:convnext_xxlrge", "convnext_xxlarge")):
        with pytest.raises(UserError, match=near):
            backbones.describe(name, 224)
    with pytest.raises(UserError, match="open_clip:<model>, timm:<model> or transformers:<folder>"):
        backbones.describe("resnet50", 224)


def test_efficientnet_weights_are_imagenets():
    """The mapped tensors are right if the classifier they came with still knows a picture it was trained for."""
    import timm

    from image_to_prompts.embedded import scenes
    from image_to_prompts.embedded.grammar import Scene

    spec = backbones.describe("timm:tf_efficientnet_lite2", 260)
    backbone = backbones.build(spec).eval()
    backbones.load_pretrained(backbone, spec)
    state = backbones.read_state(weights.locate("timm:tf_efficientnet_lite2"))
    full = timm.create_model("tf_efficientnet_lite2").eval()
    full.load_state_dict(dict(zip(full.state_dict(), state.values(), strict=True)))
    for name, value in backbone.state_dict().items():
        assert torch.equal(value, full.state_dict()[name]), name
    image = scenes.draw(Scene((("strawberry", 1),)), 0).resize((260, 260))
    pixels = torch.tensor(bytearray(image.tobytes())).view(260, 260, 3).permute(2, 0, 1)[None] / 127.5 - 1
    with torch.inference_mode():
        top = full(pixels).topk(5).indices[0].tolist()
    assert 949 in top  # ImageNet's strawberry


def test_weights_of_another_shape_are_refused(tmp_path, tiny_open_clip):
    spec = backbones.describe("open_clip:ViT-B-32", 224)
    with torch.device("meta"):
        tower = backbones.build(spec)
    with pytest.raises(UserError, match="another shape"):
        backbones.load_pretrained(tower, spec, tiny_open_clip / "open_clip_model.safetensors")


def test_sha256_is_checked(tmp_path):
    fake = tmp_path / "efficientnet-lite2-9656183e.pth"
    fake.write_bytes(b"not the weights")
    with pytest.raises(UserError, match="SHA-256"):
        weights.locate("timm:tf_efficientnet_lite2", fake)


def test_kaggle_inputs_come_before_packages_and_hub(tmp_path, monkeypatch):
    folder = tmp_path / "datasets" / "someone" / "my-magicprompt" / "MagicPrompt-Stable-Diffusion"
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    other = tmp_path / "models" / "another-model"
    other.mkdir(parents=True)
    (other / "config.json").write_text("{}")
    monkeypatch.setattr(weights.folders, "KAGGLE_INPUT", tmp_path)
    assert weights.locate("magicprompt") == folder


@pytest.mark.parametrize("name", ["timm:tf_efficientnet_lite2", "timm:convnext_atto", "open_clip:tiny"])
def test_trained_tail_over_cached_activations_equals_the_whole(name, tiny_open_clip):
    name = f"open_clip:{tiny_open_clip}" if name == "open_clip:tiny" else name
    whole = checkpoints.build(backbones.describe(name, 64)).eval()
    backbones.unfreeze_last_quarter(whole.backbone)
    tail, first = backbones.trained_tail(whole.backbone)
    taken = []
    first.register_forward_pre_hook(lambda module, inputs: taken.append(inputs[0]))
    images = torch.randint(0, 255, (4, 3, 64, 64), dtype=torch.uint8)
    with torch.inference_mode():
        expected = whole.features(images)
        torch.testing.assert_close(tail(taken[0]), expected, rtol=1e-4, atol=1e-4)
    assert not any(not p.requires_grad for p in tail.parameters())


def test_frozen_matrices_in_half_precision_change_nothing_under_autocast(tiny_open_clip):
    net = checkpoints.build(backbones.describe(f"open_clip:{tiny_open_clip}", 64)).eval()
    backbones.unfreeze_last_quarter(net.backbone)
    images = torch.randint(0, 255, (2, 3, 64, 64), dtype=torch.uint8)

    def predicted():
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            return net(images)

    before, size = predicted(), sum(p.nbytes for p in net.parameters())
    backbones.half_frozen(net, torch.bfloat16)
    assert torch.equal(predicted(), before)
    assert sum(p.nbytes for p in net.parameters()) < size
    assert all(p.dtype == torch.float32 for p in net.parameters() if p.requires_grad)


@pytest.mark.parametrize("name", ["timm:tf_efficientnet_lite2", "open_clip:tiny"])
def test_the_faster_copy_computes_the_same_and_shares_its_parameters(name, tiny_open_clip):
    net = checkpoints.build(
        backbones.describe(f"open_clip:{tiny_open_clip}" if name == "open_clip:tiny" else name, 64)
    ).eval()
    backbones.unfreeze_last_quarter(net.backbone)
    fast = fast_layers.faster(net)
    images = torch.randint(0, 255, (2, 3, 64, 64), dtype=torch.uint8)
    with torch.no_grad():
        torch.testing.assert_close(fast(images), net(images), rtol=1e-4, atol=1e-4)
    assert {id(p) for p in fast.parameters()} == {id(p) for p in net.parameters()}


def test_a_model_without_weights_on_the_hub_is_one_line():
    with pytest.raises(UserError, match=r"weights of timm:efficientnet_b6 not found"):
        backbones.locate("timm:efficientnet_b6")


@pytest.fixture
def mounted(tmp_path, monkeypatch):
    """Puts open_clip weights into a folder of attached Kaggle inputs."""
    monkeypatch.setattr("image_to_prompts.run.folders.KAGGLE_INPUT", tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")

    def mount(folder, model=None):
        folder = tmp_path / folder
        folder.mkdir(parents=True)
        (folder / "open_clip_model.safetensors").write_bytes(b"x")
        if model:
            import open_clip

            config = {"model_cfg": open_clip.get_model_config(model), "preprocess_cfg": {}}
            (folder / "open_clip_config.json").write_text(json.dumps(config))
        return folder / "open_clip_model.safetensors"

    return mount


@pytest.mark.parametrize(
    ("name", "folder"),
    [
        ("open_clip:ViT-L-14", "datasets/me/weights/open_clip-ViT-L-14-quickgelu"),
        ("open_clip:ViT-H-14", "clip-vit-h-14-378"),
        ("open_clip:ViT-B-32", "ViT-B-32-256"),
        ("open_clip:convnext_xxlarge", "my-convnext_xxlarge_320"),
    ],
)
def test_weights_of_a_longer_name_are_another_models(mounted, name, folder):
    mounted(folder)
    with pytest.raises(UserError, match="not found"):
        backbones.locate(name)


@pytest.mark.parametrize(
    ("name", "folder"),
    [
        ("open_clip:ViT-L-14", "datasets/me/weights/open_clip-ViT-L-14"),
        ("open_clip:ViT-H-14", "CLIP-ViT-H-14-laion2B-s32B-b79K"),
        ("open_clip:ViT-H-14", "models/laion/vit-h-14/pytorch/1/1"),
        ("open_clip:ViT-L-14-quickgelu", "open_clip-ViT-L-14-quickgelu"),
        ("open_clip:convnext_xxlarge", "CLIP-convnext_xxlarge-laion2B-s34B-b82K-augreg-soup"),
    ],
)
def test_weights_in_a_folder_of_their_name_are_found(mounted, name, folder):
    file = mounted(folder)
    assert backbones.locate(name) == file


def test_a_configuration_beside_the_weights_decides(mounted):
    mounted("CLIP-ViT-H-14-laion2B-s32B-b79K", "ViT-L-14")
    with pytest.raises(UserError, match="not found"):
        backbones.locate("open_clip:ViT-H-14")
    right = mounted("some-dataset", "ViT-H-14")
    assert backbones.locate("open_clip:ViT-H-14") == right
