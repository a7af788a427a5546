"""The reference's path on tiny random models of its own classes, through all five stages, by the command line."""

import pandas as pd

from image_to_prompts.data import metadata
from image_to_prompts.infer import submission
from image_to_prompts.models import checkpoints


def test_all_five_stages(command, tiny_gpt2, tiny_sd2, tiny_open_clip, tmp_path):
    run = tmp_path / "run"

    def stage(name, *flags):
        code, _, err = command(name, "--run", run, "--profile", "full", *flags)
        assert code == 0, err

    stage("generate", "--count", 24, "--weights", tiny_gpt2, "--batch-size", 8)
    prompts = metadata.read(run / "prompts" / "generated.csv")
    assert 12 <= len(prompts) <= 24 and prompts["source"].eq("magicprompt").all()

    stage("dedupe", "--folds", 3, "--threshold", 0.97)
    kept = metadata.read(run / "data_meta" / "prompts.csv").assign(fold=lambda f: [i % 3 for i in range(len(f))])
    kept = kept.head(9)
    metadata.write_table(run / "data_meta" / "prompts.csv", kept)

    stage("render", "--weights", tiny_sd2, "--steps", 2, "--batch-size", 3)
    manifest = pd.read_csv(run / "images" / "prompts" / "manifest.csv")
    assert manifest["backend"].eq("sd2").all() and len(manifest) == 9

    stage("finetune", "--backbone", f"open_clip:{tiny_open_clip}", "--image-size", 64, "--epochs", 2, "--batch-size", 4)
    found = checkpoints.load(run / "checkpoints" / "convnext")
    assert found.spec.tower["vision_cfg"]["timm_model_name"] == "convnext_atto"
    assert found.spec.mean == [0.48, 0.46, 0.41] or tuple(found.spec.mean) == (0.48, 0.46, 0.41)

    stage("infer")
    assert submission.check(run / "submission" / "submission.csv", run / "images" / "prompts") == 9
