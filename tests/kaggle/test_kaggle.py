"""Kernels on Kaggle: what is checked before anything is sent, and the real `kaggle` package against a stub server."""

import io
import json
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import yaml
from kaggle_stub import ME, sign_in

from image_to_prompts.encode import embeddings
from image_to_prompts.kaggle import folders, kernels, remote
from image_to_prompts.pipeline import BANK_SLUG, COMPETITION, IMAGES, PAIRS, STAGES
from image_to_prompts.run.errors import UserError

ROOT = Path(__file__).resolve().parents[2]


def change(folder, name, **fields):
    path = folder / name / kernels.FILE
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


def test_every_stage_has_a_kernel_that_reads_its_predecessor(chain):
    *found, bank, benchmark = kernels.find(chain)
    assert [one.folder.name for one in (bank, benchmark)] == ["bank", "benchmark"]
    assert not (bank.submits or benchmark.submits)
    assert [kernel.folder.name for kernel in found] == [stage.notebook.replace("_", "-") for stage in STAGES]
    reads = [kernel.metadata["kernel_sources"] for kernel in found]
    ids = {stage.name: kernel.id for stage, kernel in zip(STAGES, found, strict=True)}
    named = [[ids[name] for name in (*stage.kernel.after, *stage.kernel.also)] for stage in STAGES]
    assert reads == [some + [bank.id] * stage.kernel.bank for some, stage in zip(named, STAGES, strict=True)]
    assert all(STAGES[0] is stage or reads[stage.number - 1] for stage in STAGES)
    assert [kernel.folder.name for kernel in found if kernel.submits] == ["07-infer-submission"]
    assert all(kernel.submits == (not kernel.metadata["enable_internet"]) for kernel in found)
    for kernel in found:
        notebook = json.loads((kernel.folder / kernel.metadata["code_file"]).read_text())
        assert not any(cell.get("outputs") for cell in notebook["cells"])


SLUG, REFERENCE, MODEL = r"[a-z0-9]+(-[a-z0-9]+)*", r"[\w-]+/[a-z0-9][a-z0-9-]*", r"([^/\s]+/){4}\d+"
SOURCES = {
    "dataset_sources": REFERENCE,
    "kernel_sources": REFERENCE,
    "competition_sources": SLUG,
    "model_sources": MODEL,
}


def test_the_built_kernels_are_what_kaggle_takes(chain):
    """It says nothing of a title that makes another slug, nor of an unknown key; without enable_internet it is on."""
    for kernel in kernels.find(chain):
        said = kernel.metadata
        slug, title = kernel.id.partition("/")[2], said["title"]
        assert re.sub(r"[^a-z0-9]+", "-", title.lower()).strip("-") == slug and 5 <= len(title) <= 50
        assert said["language"] == "python" and said["kernel_type"] == "notebook"
        switches = {"is_private", "enable_gpu", "enable_tpu", "enable_internet"}
        assert all(isinstance(said[name], bool) for name in switches)
        others = {"id", "title", "code_file", "language", "kernel_type", "machine_shape", "docker_image_pinning_type"}
        assert said.keys() <= switches | SOURCES.keys() | others | {"keywords"}
        for name, form in SOURCES.items():
            assert all(re.fullmatch(form, source) for source in said[name]), (kernel.id, name)
        assert (kernel.folder / said["code_file"]).stat().st_size < 1_000_000  # what Kaggle takes


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"id": "ada"}, "must be owner/slug"),
        ({"id": "ada/07-infer-submission/3"}, "must be owner/slug"),
        ({"id": 7}, "not what make kernels writes"),
        ({"id": f"{kernels.PLACEHOLDER}/07-infer-submission"}, "placeholder"),
        ({"code_file": "missing.ipynb"}, "no such file"),
        ({"kernel_sources": ["ada/05-nothing"]}, "no such kernel"),
        ({"machine_shape": ""}, "P100"),
    ],
)
def test_a_kernel_that_was_changed_is_refused(chain, fields, said):
    change(chain, "07-infer-submission", **fields)
    with pytest.raises(UserError, match=said) as error:
        kernels.find(chain)
    assert "\n" not in str(error.value)
    (chain / "07-infer-submission" / kernels.FILE).write_text("[]")
    with pytest.raises(UserError, match="not what make kernels writes"):
        kernels.find(chain)


def test_a_dry_run_shows_the_chain_and_asks_nothing(chain, command):
    code, out, _ = command("kaggle", "push", "--all", "--dry-run", "--kernels", chain)
    assert code == 0 and len(out.splitlines()) == len(STAGES) + 1
    assert f"{ME}/07-infer-submission   NvidiaTeslaT4  off" in out
    code, out, _ = command("kaggle", "push", "infer", "--dry-run", "-v", "--kernels", chain)
    assert code == 0 and f'competition_sources: ["{COMPETITION}"]' in out
    for words in (["push"], ["push", "infer", "--all"], ["push", "paint"], ["pull"], []):
        code, _, err = command("kaggle", *words, *(["--kernels", chain] if words[1:] else []))
        assert code == 2 and err.count("\n") == 1


def test_the_committed_kernels_are_placeholders_that_push_refuses(command):
    code, _, err = command("kaggle", "push", "--all", "--dry-run", "--kernels", ROOT / "kernels")
    assert code == 2 and "put your Kaggle name into owner.json" in err


def test_credentials_are_checked_and_never_shown(home, caplog):
    with pytest.raises(UserError, match="no Kaggle credentials"):
        remote.credentials()
    for text in ("", "{", "[]", '{"username": "ada"}', (ROOT / "kaggle.json.example").read_text()):
        sign_in(home, text)
        with pytest.raises(UserError, match=r"kaggle\.json") as error:
            remote.credentials()
        assert "\n" not in str(error.value)
    path = sign_in(home)
    assert remote.credentials() == str(path) and not caplog.text
    path.chmod(0o644)
    assert remote.credentials() == str(path)
    assert f"chmod 600 {path}" in caplog.text and "0123456789abcdef" not in caplog.text


def test_push_all_sends_what_the_folders_say(kaggle):
    code, out, err = kaggle("push", "--all", "--wait")
    assert code == 0, err
    assert out.count("version 3 pushed") == len(STAGES)
    for other in ("bank", "benchmark"):
        code, out, err = kaggle("push", other)
        assert code == 0, err
    sent = kaggle.stub.asked("SaveKernel")
    for kernel, request in zip(kernels.find(kaggle.chain), sent, strict=True):
        said = kernel.metadata
        assert request["slug"] == said["id"] and request["newTitle"] == said["title"]
        assert request.get("enableInternet", False) == said["enable_internet"]
        assert request.get("enableGpu", False) == said["enable_gpu"]
        assert request.get("kernelDataSources", []) == said["kernel_sources"]
        assert request.get("datasetDataSources", []) == [one for one in said["dataset_sources"] if one not in PAIRS]
        assert request.get("competitionDataSources", []) == said["competition_sources"]
        assert request.get("modelDataSources", []) == said["model_sources"]
        code_file = json.loads((kernel.folder / said["code_file"]).read_text())
        assert len(json.loads(request["text"])["cells"]) == len(code_file["cells"])


@pytest.mark.parametrize("answer", [403, 404])
def test_sources_that_are_not_there_are_left_out_or_refused(kaggle, answer):
    stub = kaggle.stub
    stub.not_found = (answer, {"code": answer, "message": "Permission denied or not found"})
    stub.datasets = {f"{ME}/image-to-prompts-wheels", f"{ME}/image-to-prompts-metadata"}
    stub.absent = {"04-finetune-convnext", "06-train-ensemble", BANK_SLUG}
    code, _, err = kaggle("push", "infer")
    assert code == 0, err
    (sent,) = stub.asked("SaveKernel")
    assert sent["datasetDataSources"] == [f"{ME}/image-to-prompts-wheels", f"{ME}/image-to-prompts-metadata"]
    assert sent.get("kernelDataSources", []) == []
    for left_out in ("image-to-prompts-weights", "image-to-prompts-embeddings", *sorted(stub.absent)):
        assert f"goes without {ME}/{left_out}" in err
    stub.absent = {"02-dedupe-prompts"}
    code, _, err = kaggle("push", "render")
    assert code == 2 and "ada/02-dedupe-prompts (push that kernel first)" in err
    stub.datasets = set()
    code, _, err = kaggle("push", "--all")
    assert code == 2 and err.count("ada/") == 1, err
    assert "ada/image-to-prompts-wheels (image-to-prompts kaggle wheels --publish)" in err
    assert len(stub.asked("SaveKernel")) == 1


def test_training_needs_neither_rendering_nor_any_set_that_has_vanished(kaggle):
    kaggle.stub.absent = {"03-render-images"}
    kaggle.stub.datasets |= set(PAIRS[1:])
    code, _, err = kaggle("push", "finetune")
    assert code == 0 and f"goes without {PAIRS[0]}" in err, err
    (sent,) = kaggle.stub.asked("SaveKernel")
    assert sent["datasetDataSources"] == [f"{ME}/image-to-prompts-wheels", *PAIRS[1:]]
    assert sent.get("kernelDataSources", []) == []


def test_the_quota_is_told_before_anything_runs(kaggle):
    code, _, err = kaggle("push", "infer")
    assert code == 0 and "21.5 of 30 GPU hours are left this week, until 2026-11-28; 1 kernel with a GPU" in err, err
    del kaggle.stub.replies["GetAcceleratorQuotaStatistics"]
    code, _, err = kaggle("push", "infer")
    assert code == 0 and "not known" in err


def test_sessions_of_training_alternate(kaggle):
    """Each session sees the last one's output, which is the other kernel's, and the newest is what infer reads."""
    code, _, err = kaggle("push", "infer", "--continue")
    assert code == 2 and "only render and finetune" in err
    first, other = f"{ME}/04-finetune-convnext", f"{ME}/04-finetune-convnext-b"
    for words in ([], ["--continue"], ["--continue"], ["--continue"]):
        code, _, err = kaggle("push", "finetune", *words)
        assert code == 0, err
    sent = kaggle.stub.asked("SaveKernel")
    assert [one["slug"] for one in sent] == [first, other, first, other]
    assert [one["newTitle"] for one in sent[:2]] == ["04 finetune convnext", "04 finetune convnext b"]
    render = f"{ME}/03-render-images"
    assert [one["kernelDataSources"] for one in sent] == [[render], [render, first], [render, other], [render, first]]
    assert kaggle("push", "infer")[0] == 0
    assert kaggle.stub.asked("SaveKernel")[-1]["kernelDataSources"] == [
        other,
        f"{ME}/06-train-ensemble",
        f"{ME}/{BANK_SLUG}",
    ]
    kaggle.stub.replies["GetKernelSessionStatus"] = {"status": "RUNNING"}
    code, _, err = kaggle("push", "finetune", "--continue")
    assert code == 2 and f"{other} is running" in err
    kaggle.stub.replies["GetKernelSessionStatus"] = {"status": "ERROR"}
    code, _, err = kaggle("push", "finetune", "--continue")
    assert code == 0 and f"{other}: error; it runs again" in err
    again = kaggle.stub.asked("SaveKernel")[-1]
    assert (again["slug"], again["kernelDataSources"]) == (other, [render, first])
    code, _, err = kaggle("push", "infer")
    assert code == 0 and f"{other}: error; {first} is attached in its place" in err, err
    assert kaggle.stub.asked("SaveKernel")[-1]["kernelDataSources"][0] == first
    assert f"{first}: error\n{other}: error\n" in kaggle("status", "finetune")[1]


def test_a_session_of_another_clone_is_not_replaced(kaggle):
    other = f"{ME}/04-finetune-convnext-b"
    code, _, err = kaggle("push", "finetune", "--continue")
    assert code == 2 and f"{other} was pushed from another clone" in err and not kaggle.stub.asked("SaveKernel")
    code, _, err = kaggle("push", "infer")
    assert code == 0 and f"{other} was pushed from another clone" in err
    kaggle.stub.absent = {other.partition("/")[2]}
    assert kaggle("push", "finetune", "--continue")[0] == 0


def test_parameters_of_a_notebook_are_set_where_it_is_pushed(kaggle):
    code, _, err = kaggle("push", "finetune", "--set", "recipe=vit-l-336", "epochs=4", "image_size=none")
    assert code == 0, err
    cells = json.loads(kaggle.stub.asked("SaveKernel")[-1]["text"])["cells"]
    place = next(i for i, cell in enumerate(cells) if "parameters" in cell["metadata"].get("tags", []))
    assert "".join(cells[place + 1]["source"]) == "recipe = 'vit-l-336'\nepochs = 4\nimage_size = None\n"
    assert {cell["cell_type"] for cell in cells[place : place + 2]} == {"code"}
    for words in (["finetune", "--set", "recipes=x"], ["finetune", "--set", "recipe"], ["--all", "--set", "epochs=1"]):
        code, _, err = kaggle("push", *words)
        assert code == 2 and err.count("\n") == 1 and "--set" in err
    assert len(kaggle.stub.asked("SaveKernel")) == 1


def test_sessions_of_rendering_get_what_was_published(kaggle):
    code, _, err = kaggle("push", "render", "--continue")
    assert code == 2 and "no session has published images" in err
    kaggle.stub.datasets |= {f"{ME}/{IMAGES}-1", f"{ME}/{IMAGES}-2"}
    for words in (["render"], ["render", "--continue"], ["finetune"]):
        code, _, err = kaggle("push", *words)
        assert code == 0 and (f"{IMAGES}-1 gets a new version" in err) == (words == ["render"]), err
    wheels, both = f"{ME}/image-to-prompts-wheels", [f"{ME}/{IMAGES}-1", f"{ME}/{IMAGES}-2"]
    sent = [one["datasetDataSources"] for one in kaggle.stub.asked("SaveKernel")]
    assert sent == [[wheels], [wheels, *both], [wheels, *both]]


def test_a_push_that_waits_asks_until_the_kernel_is_complete(kaggle):
    answers = [{"status": "QUEUED"}, (502, {"code": 502, "message": "Bad gateway"}), {"status": "RUNNING"}]
    complete = {"status": "COMPLETE"}
    kaggle.stub.replies["GetKernelSessionStatus"] = lambda asked: (
        answers.pop(0) if answers and BANK_SLUG not in str(asked) else complete
    )
    code, _, err = kaggle("push", "--all", "--wait")
    assert code == 0 and not answers and "asking again" in err, err
    assert len(kaggle.stub.asked("SaveKernel")) == len(STAGES)


def test_a_kernel_that_fails_ends_a_push_that_waits(kaggle):
    kaggle.stub.replies["GetKernelSessionStatus"] = {"status": "ERROR", "failureMessage": "no GPU left"}
    code, _, err = kaggle("push", "--all", "--wait")
    assert code == 2 and "01-generate-prompts: error, no GPU left; those after it were not pushed" in err
    assert len(kaggle.stub.asked("SaveKernel")) == 1


@pytest.fixture
def data(tmp_path):
    """A checkpoint-like folder, metadata and embeddings, small."""
    folder = tmp_path / "made"
    (folder / "convnext" / "last").mkdir(parents=True)
    for name in ("config.json", "model.safetensors", "last/model.safetensors", ".finetune.done"):
        (folder / "convnext" / name).write_bytes(name.encode() * 1000)
    (folder / "convnext" / "config.json").write_text('{"backbone": {}}')
    metadata = folder / "data_meta"
    metadata.mkdir()
    (metadata / "prompts.csv").write_text("image_name,prompt,seed\na.png,a cat,1\nb.png,a dog,2\n")
    (metadata / "prompts.removed.csv").write_text("image_name,prompt,seed\n")  # dedupe has removed nothing
    names = pd.DataFrame({"image_name": ["a.png", "b.png"], "prompt": ["a cat", "a dog"], "source": "s"})
    names = names.assign(group=names["image_name"], fold=0)
    about = {"backbone": {"name": "timm:x"}}
    embeddings.write(folder / "embeddings", "x", np.eye(2, 5), names[["image_name"]], about)
    embeddings.write(folder / "embeddings", "old", np.eye(2, 5), names[["image_name"]], {"imported": "old.npy"})
    said = names[["image_name"]].assign(text="cat")
    embeddings.write(folder / "embeddings", "said", np.eye(2, 384), said, {"encoder": "interrogator"})
    embeddings.write(folder / "embeddings", embeddings.PROMPTS, np.eye(2, 384), names, {"encoder": "all-MiniLM-L6-v2"})
    return folder


def uploaded(stub):
    """Bytes of the files of the last dataset by name, those of archives too."""
    found = {}
    for path, content in stub.uploads.items():
        name = path.rsplit("/", 1)[1]
        if name.endswith(".zip"):
            with zipfile.ZipFile(io.BytesIO(content)) as archive:
                found |= {
                    f"{name[:-4]}/{inner}": archive.read(inner) for inner in archive.namelist() if inner[-1] != "/"
                }
        else:
            found[name] = content
    return found


@pytest.mark.parametrize("which", ["weights", "metadata", "embeddings"])
def test_a_dataset_is_made_published_and_published_again(kaggle, data, tmp_path, which):
    stub, out = kaggle.stub, tmp_path / "out"
    words = {
        "weights": [data / "convnext", "all-MiniLM-L6-v2"],
        "metadata": ["--data", data / "data_meta"],
        "embeddings": ["--data", data / "embeddings"],
    }[which]
    code, said, err = kaggle(which, *words, "--out", out)
    assert code == 0 and "--publish" in said, err
    assert not stub.calls
    stub.datasets = set()
    code, said, err = kaggle(which, *words, "--out", out, "--publish")
    assert code == 0 and "published as https://" in said, err
    written = {
        path.relative_to(out).as_posix(): path.read_bytes()
        for path in out.rglob("*")
        if path.is_file() and path.name != "dataset-metadata.json"
    }
    assert uploaded(stub) == written
    (sent,) = stub.asked("CreateDataset")
    assert sent["slug"] == f"image-to-prompts-{which}" and sent["ownerSlug"] == ME and sent["isPrivate"]
    described = {file["token"]: file for file in sent["files"]}
    if which == "metadata":
        columns = described["t-prompts.csv"]["columns"]
        assert [column["name"] for column in columns] == ["image_name", "prompt", "seed"]
        assert all(column["description"] for column in columns)
    if which == "weights":
        sums = subprocess.run(["sha256sum", "-c", "SHA256SUMS"], cwd=out, capture_output=True, text=True)
        assert sums.returncode == 0 and "convnext/last/model.safetensors: OK" in sums.stdout
        assert "all-MiniLM-L6-v2/model.safetensors" in written and "convnext/.finetune.done" not in written

    stub.datasets, stub.uploads = {f"{ME}/image-to-prompts-{which}"}, {}
    code, said, err = kaggle(which, *words, "--out", out, "--publish")
    assert code == 0, err
    assert len(stub.asked("CreateDatasetVersion")) == 1 and len(stub.asked("CreateDataset")) == 1
    assert uploaded(stub) == written


def test_terms_that_are_kept_beside_a_file_of_weights_go_with_it(tmp_path):
    (tmp_path / "clip" / "terms").mkdir(parents=True)
    for name in ("open_clip_model.safetensors", "terms/0123.npy", "other.safetensors", ".hidden"):
        (tmp_path / "clip" / name).write_bytes(name.encode())
    owner = {"owner": ME, "weights": "image-to-prompts-weights"}
    out = folders.weights(tmp_path / "out", [str(tmp_path / "clip" / "open_clip_model.safetensors")], owner)
    found = {path.relative_to(out).as_posix() for path in out.rglob("*") if path.is_file()}
    target = "open_clip_model.safetensors"
    assert found == {f"{target}/{target}", f"{target}/terms/0123.npy", "SHA256SUMS", "dataset-metadata.json"}


def test_of_a_model_one_format_is_copied_and_a_folder_needs_no_owner(tmp_path, command):
    model = tmp_path / "blip"
    model.mkdir()
    for name in ("config.json", "model.safetensors", "pytorch_model.bin", "flax_model.msgpack"):
        (model / name).write_text(name)
    code, out, err = command("kaggle", "weights", model, "--out", tmp_path / "out", "--kernels", ROOT / "kernels")
    assert code == 0 and "--publish" in out, err
    assert sorted(path.name for path in (tmp_path / "out" / "blip").iterdir()) == ["config.json", "model.safetensors"]


def test_what_goes_wrong_with_a_dataset_is_said(kaggle, data, tmp_path):
    stub, words = kaggle.stub, ("metadata", "--data", data / "data_meta", "--out", tmp_path / "out", "--publish")
    stub.datasets, stub.upload_status = set(), 400
    code, _, err = kaggle(*words)
    assert code == 2 and "the upload failed" in err
    assert not stub.asked("CreateDataset")
    stub.upload_status = 200
    for reply, said in (
        ({"status": "error", "error": "The title is taken"}, "The title is taken"),
        ((401, {"code": 401, "message": "Unauthenticated"}), "refuses the credentials"),
        ((500, {"code": 500, "message": "Internal error"}), "try again later"),
    ):
        stub.replies["CreateDataset"] = reply
        code, _, err = kaggle(*words)
        assert code == 2 and said in err.splitlines()[-1]
    (data / "data_meta" / "prompts.csv").write_text("image_name,prompt,mood\na.png,a cat,calm\n")
    code, _, err = kaggle(*words)
    assert code == 2 and "column 'mood' is not in" in err
    code, _, err = kaggle("weights", tmp_path / "nothing", "--out", tmp_path / "out")
    assert code == 2 and "nothing" in err
    twice = tmp_path / "other" / "convnext"
    twice.mkdir(parents=True)
    code, _, err = kaggle("weights", data / "convnext", twice, "--out", tmp_path / "out")
    assert code == 2 and "have one name" in err


@pytest.mark.parametrize(
    ("reply", "said"),
    [
        ({"error": "Your GPU quota is used up"}, "GPU quota"),
        ({"versionNumber": 1, "invalidDatasetSources": ["ada/image-to-prompts-wheels"]}, "dataset sources ada/image"),
        ({"versionNumber": 1, "invalidModelSources": ["a/b/c/d/1"]}, "model sources a/b/c/d/1"),
        ({"versionNumber": 1, "invalidKernelSources": ["ada/04-finetune-convnext"]}, "kernel sources"),
        ({"url": "u"}, "without a version number"),
        ((401, {"code": 401, "message": "Unauthenticated"}), "refuses the credentials"),
        ((429, {"code": 429, "message": "Too many requests"}), "wait a few minutes"),
        ((500, {"code": 500, "message": "Internal error"}), "try again later"),
    ],
)
def test_refusals_end_with_one_line_and_exit_code_2(kaggle, reply, said):
    kaggle.stub.replies["SaveKernel"] = reply
    code, out, err = kaggle("push", "infer")
    assert code == 2 and said in err.splitlines()[-1] and "pushed" not in out
    assert len(kaggle.stub.asked("SaveKernel")) >= 1


def test_no_answer_ends_within_the_time_limit(kaggle):
    kaggle.stub.delays["SaveKernel"] = 30
    code, _, err = kaggle("push", "infer", "--timeout", 1)
    assert code == 2 and "no answer from Kaggle within 1 s" in err


def test_status_and_submission(kaggle):
    kaggle.stub.absent = {"02-dedupe-prompts"}
    code, out, _ = kaggle("status")
    assert code == 0 and "ada/02-dedupe-prompts: not on Kaggle\n" in out and "ada/07-infer-submission: complete" in out
    code, out, _ = kaggle("status", "infer")
    assert (code, out) == (0, "ada/07-infer-submission: complete\n")
    stub = kaggle.stub

    code, _, err = kaggle("submit")
    assert code == 2 and "was not pushed from here" in err
    assert kaggle("push", "infer")[0] == 0
    code, out, err = kaggle("submit", "--message", "first")
    assert (code, out) == (0, "Successfully submitted\n"), err
    (sent,) = stub.asked("CreateCodeSubmission")
    assert sent["competitionName"] == COMPETITION and sent["kernelVersion"] == 3
    assert sent["fileName"] == "submission.csv" and sent["kernelSlug"] == "07-infer-submission"

    stub.replies["GetKernelSessionStatus"] = {"status": "ERROR", "failureMessage": "out of memory"}
    code, _, err = kaggle("submit")
    assert code == 2 and "is error, out of memory" in err


def test_the_pre_commit_check_keeps_credentials_out(tmp_path):
    shutil.copy(ROOT / ".pre-commit-config.yaml", tmp_path)
    git = ["git", "-C", str(tmp_path)]
    subprocess.run([*git, "init", "-q"], check=True)

    def refused(name, text):
        (tmp_path / name).write_text(text)
        subprocess.run([*git, "add", "-f", name], check=True)
        words = [sys.executable, "-m", "pre_commit", "run", "--files", name]
        return subprocess.run(words, cwd=tmp_path, capture_output=True).returncode != 0

    assert refused("kaggle.json", "{}")
    assert refused("notes.md", 'my key is {"username": "ada", "key": "%s"}' % ("0123456789abcdef" * 2))
    assert refused("run.sh", "export KAGGLE_KEY=%s" % ("0123456789abcdef" * 2))
    assert not refused("kaggle.json.example", (ROOT / "kaggle.json.example").read_text())


def test_no_credentials_are_committed():
    check = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"][0]["hooks"]
    names, keys = re.compile(check[0]["files"]), re.compile(check[1]["entry"])
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("not a git checkout")
    files = [ROOT / name for name in listed.stdout.splitlines()]
    assert files and not [file for file in files if names.search(str(file.relative_to(ROOT)))]
    for file in files:
        if file.suffix not in (".png", ".npy", ".xz") and file.is_file():
            assert not keys.search(file.read_text(encoding="utf-8")), file
