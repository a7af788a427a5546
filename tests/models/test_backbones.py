"""Backbones: the reference's quarter, any tower, real EfficientNet weights, the cached frozen part."""

import json

import open_clip
import pytest
import timm
import torch
import transformers
from safetensors.torch import save_file
from timm.layers import resample_abs_pos_embed

from image_to_prompts.models import backbones, checkpoints, fast_layers, freezing, weights
from image_to_prompts.run.errors import UserError


def test_unknown_names_list_the_nearest():
    for name, near in (("timm:convnext_tinny", "convnext_tiny"), ("open_clip:convnext_xxlrge", "convnext_xxlarge")):
        with pytest.raises(UserError, match=near):
            backbones.describe(name, 224)
    with pytest.raises(UserError, match="open_clip:<model>, timm:<model> or transformers:<folder>"):
        backbones.describe("resnet50", 224)
    with pytest.raises(UserError, match=r"unknown backbone 'resnet50.typo'; nearest: .*resnet50\."):
        backbones.describe("timm:resnet50.typo")


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


OWN = {"layers": 1, "width": 64, "head_width": 32, "patch_size": 16}
OF_TIMM = {"timm_model_pretrained": False, "timm_pool": "token", "timm_proj": None}


@pytest.mark.parametrize(
    ("vision", "key"),
    [
        (None, "pos_embed"),
        (OWN, "positional_embedding"),
        ({**OF_TIMM, "timm_model_name": "vit_tiny_patch16_224"}, "trunk.pos_embed"),
        ({**OF_TIMM, "timm_model_name": "eva02_tiny_patch14_224"}, "trunk.pos_embed"),
    ],
    ids=["timm", "open_clip", "timm in open_clip", "EVA02"],
)
@pytest.mark.parametrize("side", [112, 224, 280])
def test_position_embeddings_of_another_size_are_those_that_timm_interpolates(vision, key, side, tmp_path):
    name = f"open_clip:{tmp_path}" if vision else "timm:vit_tiny_patch16_224"
    settings = {"embed_dim": 192, "vision_cfg": {"image_size": 224, **(vision or {})}}
    (tmp_path / "open_clip_config.json").write_text(json.dumps({"model_cfg": settings}))
    native = backbones.build(backbones.describe(name, 224)).state_dict()
    native[key] = torch.randn(native[key].shape, generator=torch.Generator().manual_seed(0))
    file = tmp_path / "open_clip_model.safetensors"
    save_file({("visual." if vision else "") + one: value for one, value in native.items()}, file)

    tower = backbones.build(spec := backbones.describe(name, side)).eval()
    backbones.load_pretrained(tower, spec, file)
    assert tower(torch.zeros(1, 3, side, side)).shape[1] == 192
    patch = 14 if vision and "eva02" in str(vision) else 16
    table = native[key] if native[key].ndim == 3 else native[key][None]
    expected = resample_abs_pos_embed(table, [side // patch] * 2, [224 // patch] * 2)
    torch.testing.assert_close(tower.state_dict()[key].reshape(expected.shape), expected)


@pytest.mark.parametrize(("name", "side"), [("timm:vit_tiny_patch16_224", 8), ("open_clip:ViT-B-32", 7)])
def test_a_size_that_a_backbone_cannot_take_is_one_line(name, side):
    with pytest.raises(UserError, match=f"{name} cannot take inputs of {side} px: .*; give another size"):
        checkpoints.build(backbones.describe(name, side), empty=True)


def test_sha256_is_checked(tmp_path):
    fake = tmp_path / "efficientnet-lite2-9656183e.pth"
    fake.write_bytes(b"not the weights")
    with pytest.raises(UserError, match="SHA-256"):
        weights.locate("timm:tf_efficientnet_lite2", fake)


def test_kaggle_inputs_come_before_packages_and_hub(tmp_path, monkeypatch):
    folder = tmp_path / "datasets" / "someone" / "my-magicprompt" / "MagicPrompt-Stable-Diffusion"
    folder.mkdir(parents=True)
    for name in ("config.json", "pytorch_model.bin"):
        (folder / name).write_text("{}")
    other = tmp_path / "models" / "another-model"
    other.mkdir(parents=True)
    for name in ("config.json", "pytorch_model.bin"):
        (other / name).write_text("{}")
    monkeypatch.setattr(weights.folders, "KAGGLE_INPUT", tmp_path)
    assert weights.locate("magicprompt") == folder


@pytest.mark.parametrize("name", ["timm:tf_efficientnet_lite2", "open_clip:tiny"])
def test_the_faster_copy_computes_the_same_and_shares_its_parameters(name, tiny_open_clip):
    net = checkpoints.build(
        backbones.describe(f"open_clip:{tiny_open_clip}" if name == "open_clip:tiny" else name, 64)
    ).eval()
    freezing.unfreeze(net.backbone)
    fast = fast_layers.faster(net)
    images = torch.randint(0, 255, (2, 3, 64, 64), dtype=torch.uint8)
    with torch.no_grad():
        torch.testing.assert_close(fast(images), net(images), rtol=1e-4, atol=1e-4)
    assert {id(p) for p in fast.parameters()} == {id(p) for p in net.parameters()}


def test_a_model_without_weights_on_the_hub_is_one_line():
    with pytest.raises(UserError, match="weights not found: timm:efficientnet_b6"):
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


@pytest.mark.parametrize(
    ("name", "repository"),
    [
        ("ViT-B-16", "laion/CLIP-ViT-B-16-laion2B-s34B-b88K"),
        ("ViT-L-14", "laion/CLIP-ViT-L-14-laion2B-s32B-b82K"),
        ("ViT-L-14-quickgelu", "timm/vit_large_patch14_clip_224.openai"),
        ("ViT-bigG-14", "laion/CLIP-ViT-bigG-14-laion2B-39B-b160k"),
        ("EVA02-L-14-336", "timm/eva02_large_patch14_clip_336.merged2b_s6b_b61k"),
    ],
)
def test_the_hubs_weights_were_trained_with_the_models_activation(name, repository):
    assert weights.named(f"open_clip:{name}").hub == (repository,)


def test_a_tower_sees_pixels_as_its_weights_were_trained_with():
    half = ((0.5,) * 3, (0.5,) * 3)
    for name in ("ViT-L-14", "ViT-B-16-SigLIP"):
        spec = backbones.describe(f"open_clip:{name}")
        assert (spec.mean, spec.std) == half, name
    for name in ("ViT-L-14-quickgelu", "ViT-B-16", "ViT-H-14", "convnext_xxlarge"):
        assert backbones.describe(f"open_clip:{name}").mean == open_clip.OPENAI_DATASET_MEAN, name


def test_a_model_of_the_hubs_user_without_a_repository_name_is_one_line():
    assert weights.named("open_clip:ViTamin-S").hub == ("jienengchen/ViTamin-S",)


def test_coca_gives_features_too():
    spec = backbones.describe("open_clip:coca_ViT-B-32")
    assert checkpoints.build(spec, empty=True).width == 512


@pytest.mark.parametrize("name", ["vit_small_patch14_reg4_dinov2", "vit_little_patch16_reg1_gap_256"])
def test_registers_without_positions(name):
    """timm's own interpolation is the oracle."""
    side = 112
    spec = backbones.describe(f"timm:{name}", side)
    state = timm.create_model(name, num_classes=0).state_dict()
    backbone = backbones.build(spec)
    found = backbones.resampled(dict(state), backbone)
    wanted = timm.models.vision_transformer.checkpoint_filter_fn(dict(state), backbone)
    torch.testing.assert_close(found["pos_embed"], wanted["pos_embed"])


def test_a_classifier_without_the_layer_that_features_come_from_is_refused(tmp_path):
    """Its pooler would be of random numbers, others in each process."""
    settings = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    config = transformers.ViTConfig(**settings, image_size=32, patch_size=16)
    for number, kind in enumerate((transformers.ViTForImageClassification, transformers.ViTModel)):
        folder = tmp_path / str(number)
        kind(config).save_pretrained(folder)
        transformers.ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(folder)
    checkpoints.pretrained(backbones.describe(f"transformers:{tmp_path / '1'}"))
    with pytest.raises(UserError, match=r"pooler\.dense\.weight"):
        checkpoints.pretrained(backbones.describe(f"transformers:{tmp_path / '0'}"))


def test_a_processor_that_crops_says_size_and_crop(tmp_path):
    settings = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    transformers.Dinov2Model(transformers.Dinov2Config(**settings, image_size=28)).save_pretrained(tmp_path)
    how = {"size": {"shortest_edge": 32}, "crop_size": {"height": 28, "width": 28}, "do_center_crop": True}
    transformers.BitImageProcessor(**how).save_pretrained(tmp_path)
    spec = backbones.describe(f"transformers:{tmp_path}")
    assert (spec.image_size, spec.crop) == (28, 28 / 32)


def test_a_name_whose_weights_need_the_other_activation_gets_the_right_one():
    with pytest.raises(UserError, match="trained with QuickGELU; write open_clip:ViT-L-14-336-quickgelu"):
        backbones.locate("open_clip:ViT-L-14-336")


def test_weights_of_the_other_activation_in_a_folder_of_the_name_are_not_taken(mounted, tmp_path, monkeypatch):
    monkeypatch.setenv(weights.FOLDER, str(tmp_path / "home"))
    mounted("home/open_clip-ViT-L-14", "ViT-L-14-quickgelu")
    with pytest.raises(UserError, match="not found"):
        backbones.locate("open_clip:ViT-L-14")


def test_a_configuration_beside_the_weights_decides(mounted):
    mounted("CLIP-ViT-H-14-laion2B-s32B-b79K", "ViT-L-14")
    with pytest.raises(UserError, match="not found"):
        backbones.locate("open_clip:ViT-H-14")
    right = mounted("some-dataset", "ViT-H-14")
    assert backbones.locate("open_clip:ViT-H-14") == right
