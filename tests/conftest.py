"""Shared fixtures: a small embedded run, and tiny random models of the reference's classes, saved to disk."""

import gc
import importlib
import json
import logging
import os
import shutil
import subprocess
import sys
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
if "PYTEST_XDIST_WORKER" in os.environ:  # two workers with two threads each would be in each other's way
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import caption_stub
import chaos_report
import numpy as np
import pytest
from hypothesis import HealthCheck, Phase, settings
from kaggle_stub import ME, Stub, assert_redirected, environment, serving, sign_in
from PIL import Image
from tiny_models import save_blip, save_clip, save_convnext, save_diffusion, save_tokenizer

from image_to_prompts import dedupe, generate, profiles, render
from image_to_prompts.__main__ import main
from image_to_prompts.kaggle import kernels
from image_to_prompts.models import text_cache, weights
from image_to_prompts.run import folders

ROOT = Path(__file__).resolve().parents[1]

for name in os.environ.get("PRELOADED", "").split():  # make mutants forks a process for each fault
    importlib.import_module(name)
if "PRELOADED" in os.environ:  # the forks share what is loaded as long as nothing walks over it
    gc.collect()
    gc.freeze()
    gc.disable()
# Shared machines are slow at times; how long an example takes says nothing about the code.
quick = "HYPOTHESIS_EXAMPLES" in os.environ  # make mutants needs fewer examples, and not the smallest that fails
settings.register_profile(
    "project",
    deadline=None,
    derandomize="PYTEST_XDIST_WORKER" in os.environ,  # CI tries what it tried before; a developer's pytest new inputs
    suppress_health_check=[HealthCheck.too_slow],
    max_examples=int(os.environ.get("HYPOTHESIS_EXAMPLES", 100)),
    phases=(Phase.explicit, Phase.generate) if quick else tuple(Phase),
)
settings.load_profile("project")


def pytest_addoption(parser):
    parser.addoption("--rounds", type=int, default=0, help="how often the failure suite does each thing")
    parser.addoption("--reliability", type=Path, help="file for the failure suite's table")


def pytest_configure(config):
    file = config.getoption("--reliability")
    if file and "PYTEST_XDIST_WORKER" not in os.environ:
        config.pluginmanager.register(chaos_report.Table(file))


def pytest_collection_modifyitems(items):
    """Files with slow tests come first: the last file that a worker starts on should be a short one."""
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)


SHARED = Path(__file__).resolve().parents[2] / "shared" / "data"


@pytest.fixture(scope="module")
def ray():
    """A cluster on this machine, with room for three actors."""
    ray = pytest.importorskip("ray")
    ray.shutdown()  # of a command that another test ran in this process
    for left in (2, 1, 0):
        try:
            ray.init("local", num_cpus=3, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
            break
        except Exception:  # it waits 30 seconds for its own processes, which slow machines exceed
            ray.shutdown()
            if not left:
                raise
    yield ray
    ray.shutdown()


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory):
    """Keeps embeddings of tests out of the user's cache."""
    os.environ[text_cache.FOLDER] = str(tmp_path_factory.mktemp("cache"))
    os.environ[weights.FOLDER] = str(tmp_path_factory.mktemp("weights"))
    os.environ["HF_HUB_CACHE"] = str(tmp_path_factory.mktemp("hub"))


@pytest.fixture(autouse=True)
def own_weights(monkeypatch):
    """Forgets the folder of weights that a command was told."""
    monkeypatch.setenv(weights.FOLDER, os.environ[weights.FOLDER])


@pytest.fixture
def shared_data() -> Path:
    if not SHARED.is_dir():
        pytest.skip("the folder of shared data is not beside this checkout")
    return SHARED


@pytest.fixture
def command(capsys):
    """Runs the command line in this process; returns (exit code, standard output, standard error)."""

    def run(*words) -> tuple[int, str, str]:
        try:
            main([str(word) for word in words])
            code = 0
        except SystemExit as exit_:
            code = exit_.code or 0
        finally:  # its handler writes to this test's standard error
            logger = logging.getLogger("image_to_prompts")
            logger.handlers, logger.propagate = [], True
            logger.setLevel(logging.NOTSET)
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run


@pytest.fixture
def refused(command):
    """Runs a command that must fail with exit code 2 and one line that holds every given fragment."""

    def run(words, *fragments):
        code, out, err = command(*words)
        lines = [line for line in err.splitlines() if line.startswith("image-to-prompts:")]
        assert code == 2, (code, out, err)
        assert len(lines) == 1 and "Traceback" not in err, err
        for fragment in fragments:
            assert str(fragment) in lines[0], (fragment, lines[0])
        return lines[0]

    return run


@pytest.fixture
def caption_server():
    """The address of a server that captions images; see `caption_stub`."""
    with caption_stub.serve() as address:
        yield address


@pytest.fixture(scope="session")
def small_run(tmp_path_factory) -> folders.Run:
    """An embedded run of about 60 prompts up to the images."""
    run = folders.open_run(tmp_path_factory.mktemp("small"), "embedded")
    generate.run(profiles.default_config("generate", run, "embedded", count=60))
    dedupe.run(profiles.default_config("dedupe", run, "embedded", folds=4))
    render.run(profiles.default_config("render", run, "embedded", workers=1))
    return run


@pytest.fixture(scope="session")
def small_checkpoint(small_run, tmp_path_factory) -> Path:
    """A checkpoint trained for one epoch on the small run."""
    from image_to_prompts import finetune

    out = tmp_path_factory.mktemp("checkpoint") / "convnext"
    finetune.run(profiles.default_config("finetune", small_run, "embedded", out=out, epochs=1, image_size=64))
    return out


@pytest.fixture(scope="session")
def trained_run(small_run, small_checkpoint, tmp_path_factory) -> folders.Run:
    """A run with a checkpoint and known prompts, and nothing else."""
    run = folders.open_run(tmp_path_factory.mktemp("trained"), "embedded")
    shutil.copytree(small_checkpoint, run.checkpoint)
    run.metadata.parent.mkdir()
    shutil.copyfile(small_run.metadata, run.metadata)
    return run


@pytest.fixture(scope="session")
def strange_picture(tmp_path_factory) -> Path:
    """Fine stripes, three times as far from the scenes as the border, even if eight images drew it."""
    stripes = np.tile(np.arange(256) // 4 % 2 * 255, (256, 1)).astype(np.uint8)
    path = tmp_path_factory.mktemp("strange") / "stripes.png"
    Image.fromarray(stripes).convert("RGB").save(path)
    return path


@pytest.fixture(scope="session")
def small_embeddings(small_run, tmp_path_factory) -> Path:
    """Two arrays of embeddings of the small run's images."""
    from image_to_prompts import embed

    out = tmp_path_factory.mktemp("embedded") / "embeddings"
    encoders = ("timm:tf_efficientnet_lite2", "classes")
    embed.run(embed.Config(images=(small_run.images,), out=out, image_size=64, encoders=encoders))
    return out


@pytest.fixture(scope="session")
def tiny_gpt2(tmp_path_factory) -> Path:
    """GPT2LMHeadModel with random weights."""
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel, GPT2TokenizerFast

    folder = tmp_path_factory.mktemp("MagicPrompt-Stable-Diffusion")
    save_tokenizer(folder)
    tokenizer = GPT2TokenizerFast(str(folder / "vocab.json"), str(folder / "merges.txt"))
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=len(tokenizer), n_embd=32, n_layer=2, n_head=2, n_positions=128, bos_token_id=0, eos_token_id=0
    )
    GPT2LMHeadModel(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def bench_table():
    """benchmarks/table.py."""
    sys.path.insert(0, str(ROOT / "benchmarks"))
    yield importlib.import_module("table")
    sys.path.remove(str(ROOT / "benchmarks"))


@pytest.fixture(scope="session")
def tiny_sd2(tmp_path_factory) -> Path:
    """The right kind: v-prediction at 768 px."""
    return save_diffusion(tmp_path_factory.mktemp("stable-diffusion-2"), "v_prediction", 96)


@pytest.fixture(scope="session")
def tiny_sd2_base(tmp_path_factory) -> Path:
    """The wrong kind: epsilon at 512 px."""
    return save_diffusion(tmp_path_factory.mktemp("stable-diffusion-2-base"), "epsilon", 64)


@pytest.fixture(scope="session")
def tiny_open_clip(tmp_path_factory) -> Path:
    """An open_clip model with a small ConvNeXt tower and random weights, in the hub's folder format."""
    import open_clip
    import torch
    from safetensors.torch import save_file

    folder = tmp_path_factory.mktemp("open_clip") / "tiny-convnext"
    folder.mkdir()
    model_config = {
        "embed_dim": 32,
        "vision_cfg": {"timm_model_name": "convnext_atto", "timm_pool": "", "timm_proj": "linear", "image_size": 64},
        "text_cfg": {"context_length": 16, "vocab_size": 64, "width": 16, "heads": 2, "layers": 1},
    }
    torch.manual_seed(0)
    model = open_clip.CLIP(model_config["embed_dim"], model_config["vision_cfg"], model_config["text_cfg"])
    save_file(model.state_dict(), folder / "open_clip_model.safetensors")
    preprocess = {"mean": [0.48, 0.46, 0.41], "std": [0.27, 0.26, 0.28]}
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": model_config, "preprocess_cfg": preprocess}))
    return folder


@pytest.fixture(scope="session")
def tiny_encoders(tmp_path_factory) -> dict[str, Path]:
    """Folders of tiny random models of the classes that the reference embeds with, and short term lists."""
    folder = tmp_path_factory.mktemp("encoders")
    terms = folder / "terms"
    terms.mkdir()
    lists = {
        "artists": ["Ann Black", "Bo White"],
        "flavors": ["sharp focus", "intricate", "dark", "4k", "very long and winding phrase of many small words"],
        "mediums": ["a painting", "a photo"],
        "movements": ["cubism", "realism"],
        "trendings": ["pixiv", "trending on pixiv"],
    }
    for kind, phrases in lists.items():
        (terms / f"{kind}.txt").write_text("\n".join(phrases) + "\n", encoding="utf-8")
    return {
        "blip": save_blip(folder / "blip"),
        "clip": save_clip(folder / "clip"),
        "convnext": save_convnext(folder / "convnext"),
        "terms": terms,
    }


@pytest.fixture
def chain(tmp_path):
    """The committed kernels, with an owner."""
    folder = tmp_path / "kernels"
    shutil.copytree(ROOT / "kernels", folder)
    for path in [*folder.glob(f"*/{kernels.FILE}"), folder / "owner.json"]:
        path.write_text(path.read_text().replace(kernels.PLACEHOLDER, ME))
    return folder


@pytest.fixture
def home(tmp_path, monkeypatch):
    for name in ("KAGGLE_API_TOKEN", "KAGGLE_USERNAME", "KAGGLE_KEY", "KAGGLE_CONFIG_DIR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / ".kaggle").mkdir()
    return tmp_path


@pytest.fixture
def kaggle(home, chain):
    """Runs `image-to-prompts kaggle ...` in a process of its own against a stub."""
    sign_in(home)
    stub = Stub()
    owner = json.loads((ROOT / "kernels" / "owner.json").read_text())
    stub.datasets = {f"{ME}/{owner[name]}" for name in ("wheels", "weights", "metadata", "embeddings")}
    with serving(stub) as port:
        env = environment(port, home, IMAGE_TO_PROMPTS_ASK_EVERY="0")
        assert_redirected(env)

        def run(*words):
            argv = [sys.executable, "-m", "image_to_prompts", "kaggle", *map(str, words)]
            argv += ["--kernels", str(chain)]
            result = subprocess.run(argv, env=env, capture_output=True, text=True, cwd=ROOT, timeout=600)
            assert "0123456789abcdef" not in result.stdout + result.stderr
            assert "Traceback" not in result.stderr, result.stderr
            return result.returncode, result.stdout, result.stderr

        run.stub, run.chain, run.home = stub, chain, home
        yield run
