"""The whole chain in one go: what it prints, what it leaves, and that a second run does nothing."""

import re

import pytest

from image_to_prompts.embedded import whole_run
from image_to_prompts.infer import submission

LINE = r"score (\d\.\d{4}) constant (\d\.\d{4}) knn (\d\.\d{4}) ceiling (\d\.\d{4}) skill (-?\d\.\d\d)"


@pytest.mark.slow
def test_chain_ends_in_a_report_and_a_score_line(tmp_path):
    config = whole_run.Config(run=tmp_path / "run", quick=True, count=120, epochs=1, quiet=True)
    printed = whole_run.run(config).splitlines()
    match = re.fullmatch(LINE, printed[-1])
    assert match, printed[-1]
    score, constant, knn, ceiling, skill = map(float, match.groups())
    assert constant < ceiling and skill == pytest.approx((score - constant) / (ceiling - constant), abs=0.01)
    assert knn > constant
    assert re.search(LINE, printed[-2]) and "OpenMoji" in printed[-2]
    assert {line.split()[0] for line in printed[1:6]} == {"generate", "dedupe", "render"}

    folder = tmp_path / "run"
    for name in ("gallery.png", "history.png", "strips.png", "cosines.png", "threshold.png"):
        assert (folder / "report" / name).stat().st_size > 5000
    images = list((folder / "images" / "test").glob("*.png"))
    assert {f.name for f in (folder / "report" / "strips").iterdir()} == {f.name for f in images}
    assert submission.check(folder / "submission" / "submission.csv", folder / "images" / "test") == len(images)

    def times():
        return {p: p.stat().st_mtime_ns for p in folder.rglob("*") if p.is_file() and p.parent.name != "data_meta"}

    before = times()
    assert whole_run.run(config).splitlines() == printed
    assert times() == before
