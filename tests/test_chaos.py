"""Every stage through every failure: afterwards the bytes of an undisturbed run, or one clear line and nothing lost.

`make test` kills every second stage twice and disturbs an eighth of them in each other way; `make chaos` disturbs all,
often, and writes docs/reliability.md.
"""

from __future__ import annotations

import os
import random
import re
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path

import chaos
import pytest
from chaos import TARGETS, Case

from image_to_prompts.data import metadata

pytestmark = [pytest.mark.chaos, pytest.mark.slow]
FOREIGN = ("MagicPrompt-Stable-Diffusion0", "unet", "vae", "text_encoder")  # weights whose checksums nobody knows
SAME, LINE = "same bytes", "one clear line"


class Bench:
    """Inputs, undisturbed runs, and what the suite reports about each disturbance."""

    def __init__(self, folder: Path, inputs: dict[str, Path]) -> None:
        self.folder, self.inputs = folder, inputs
        self.whole: dict[str, tuple[dict[str, bytes], float]] = {}
        self.cases = 0

    def case(self, target: str, inputs: dict[str, Path] | None = None) -> Case:
        self.cases += 1
        return Case(target, self.folder / f"{target}-{self.cases}", inputs or self.inputs)

    def undisturbed(self, target: str) -> tuple[dict[str, bytes], float]:
        """What a target's run leaves, and its seconds."""
        if target not in self.whole:
            case, begun = self.case(target), time.monotonic()
            self.whole[target] = (fresh_contents(case), time.monotonic() - begun)
            assert len(self.whole[target][0]) > 1  # run.json and what the stage makes
        return self.whole[target]


@pytest.fixture(scope="session")
def bench(tmp_path_factory, small_run, small_checkpoint, small_embeddings, tiny_encoders, tiny_gpt2, tiny_sd2):
    folder = tmp_path_factory.mktemp("chaos")
    (folder / "inputs").mkdir()
    fixtures = {"prompts": small_run.prompts, "metadata": small_run.metadata, "images": small_run.images}
    fixtures |= {"checkpoint": small_checkpoint, "embeddings": small_embeddings, "gpt2": tiny_gpt2, "sd2": tiny_sd2}
    fixtures["clip"] = tiny_encoders["clip"]
    return Bench(folder, chaos.make_inputs(folder / "inputs", fixtures))


@pytest.fixture
def rounds(request) -> int:
    """How often each disturbance; by default once, kills of half the stages, each other kind of an eighth of them."""
    rounds, test = request.config.getoption("--rounds"), request.node.originalname
    place = TARGETS.index(request.node.callspec.params["target"]) + len(test)
    if not rounds and place % (2 if test == "test_kill" else 8):
        pytest.skip("make chaos does it")
    return max(rounds, 1)


@pytest.fixture
def few(rounds) -> int:
    """The same for what takes long: a third."""
    return -(-rounds // 3)


@pytest.fixture
def note(request, record_property) -> Callable[[str, str], None]:
    """Tells the table of a disturbance of this test's target and how it ended."""
    target = request.node.callspec.params["target"]
    return lambda kind, outcome: record_property("chaos", f"{target}|{kind}|{outcome}")


@pytest.fixture
def rng(request) -> random.Random:
    return random.Random(request.node.name)


def goes_on(case: Case, expected: dict[str, bytes]) -> None:
    """The same command ends well and leaves what an undisturbed run leaves."""
    code, said = case.finish()
    assert code == 0, said
    assert "Traceback" not in said, said
    found = case.contents()
    assert {name for name in expected.keys() | found.keys() if expected.get(name) != found.get(name)} == set(), said


def stop_often(bench: Bench, target: str, how: signal.Signals, times: int, rng: random.Random) -> list[Case]:
    """Stops runs and starts them again; one that gets through is compared with the undisturbed one and begun anew."""
    expected, seconds = bench.undisturbed(target)
    case, hits = bench.case(target), 0
    cases = [case]
    while hits < times:
        if case.disturb(how, rng, seconds):
            hits += 1
            assert "Traceback" not in case.said(), case.said()
            continue
        assert case.processes[-1].exitcode == 0, case.said()
        assert case.contents() == expected
        case = bench.case(target)
        cases.append(case)
        assert len(cases) < 30, f"{hits} of {times} hit"
    goes_on(case, expected)
    return cases


def test_the_suite_notices_what_is_left_behind(bench):
    """Half-written files, work folders and states beside the files that are expected."""
    case = bench.case("generate")
    expected = fresh_contents(case)
    for name in ("prompts/.generated.csv.17.part", "prompts/.generated-0123456789ab/prompts.jsonl", "unfinished-0.pt"):
        left = case.run / name
        left.parent.mkdir(exist_ok=True)
        left.write_bytes(b"x")
        assert case.contents() != expected
        left.unlink()
        assert case.contents() == expected


@pytest.mark.parametrize("target", TARGETS)
def test_kill(target, bench, rounds, rng, note):
    times = 2 if rounds == 1 else rounds
    case = stop_often(bench, target, signal.SIGKILL, times, rng)[-1]
    for _ in range(times):
        note("kill -9 at a random moment", SAME)
    stamps = {path: path.stat().st_mtime_ns for path in case.run.rglob(".*.done")}
    goes_on(case, bench.undisturbed(target)[0])
    assert stamps == {path: path.stat().st_mtime_ns for path in case.run.rglob(".*.done")}  # nothing was done again
    assert not list(case.run.rglob("*.part"))


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGINT])
def test_stop(target, how, bench, few, rng, note):
    cases = stop_often(bench, target, how, few, rng)
    said = [case.said(number) for case in cases for number in range(len(case.processes))]
    codes = [process.exitcode for case in cases for process in case.processes]
    assert codes.count(128 + how) == few and set(codes) == {0, 128 + how}
    assert sum("stopped; run the same command again" in text for text in said) == few
    for _ in range(few):
        note(f"{how.name} at a random moment", f"{LINE}, then {SAME}")


@pytest.mark.parametrize("target", TARGETS)
def test_disk(target, bench, few, rng, note):
    if not chaos.can_mount():
        pytest.skip("cannot mount a small disk")
    expected, seconds = bench.undisturbed(target)
    whole = sum(map(len, expected.values())) + 65_536
    for number in range(few):
        case = bench.case(target)
        with chaos.small_disk(case.folder, max(16_384, int(whole * rng.uniform(0.05, 0.9)) // 4096 * 4096)):
            code, said = case.finish()
            if code == 0:
                assert case.contents() == expected
                note("disk full", f"{SAME}: it did not need more room")
            else:
                assert chaos.clear_line(code, said), said
                assert "no space left" in said or "needs" in said or "need " in said, said
            chaos.remount(case.folder, "size=1g")
            if code:
                goes_on(case, expected)
                note("disk full", f"{LINE}; with more room {SAME}")
        case = bench.case(target)
        with chaos.small_disk(case.folder, 2**30):
            if number % 2 == 0:
                case.disturb(signal.SIGKILL, rng, seconds)
            case.run.mkdir(exist_ok=True)
            chaos.remount(case.folder, "ro")
            code, said = case.finish()
            if code == 0:
                assert case.contents() == expected
                note("output made read-only", f"{SAME}: it was done already")
            else:
                assert chaos.clear_line(code, said), said
            chaos.remount(case.folder, "rw")
            if code:
                goes_on(case, expected)
                note("output made read-only", f"{LINE}; writable again {SAME}")


@pytest.mark.parametrize("target", TARGETS)
def test_memory(target, bench, few, rng, note):
    expected, _ = bench.undisturbed(target)
    for _ in range(few):
        case = bench.case(target)
        case.flags = ("--workers", "1") if "--workers" in case.words else ()  # processes of its own would count anew
        case.memory = int(10 ** rng.uniform(6.5, 8.3))
        try:
            code, said = case.finish()
        except chaos.HangsError:  # Python waits for ever for a thread that had no memory to begin
            assert re.search(r"threading.py.* in wait\n.*threading.py.* in start\n", case.said()), case.said()
            code, said, end = -signal.SIGKILL, "", "it hung in Thread.start (python/cpython#140746) and was killed"
        else:
            end = "the process was ended" if code < 0 else LINE
        assert "Traceback" not in said, said
        if code == 0:
            assert case.contents() == expected
            note("memory limit", f"{SAME}: it was enough")
            continue
        assert code < 0 or chaos.clear_line(code, said), (code, said)
        case.memory = 0
        goes_on(case, expected)
        note("memory limit", f"{end}; with more memory {SAME}")


@pytest.mark.parametrize("target", TARGETS)
def test_damaged_own_files(target, bench, rounds, rng, note):
    """Outputs, stamps, caches, and, after a kill, what was half done."""
    expected, seconds = bench.undisturbed(target)
    finished = bench.case(target)
    goes_on(finished, expected)
    kinds = rng.sample(chaos.DAMAGES, len(chaos.DAMAGES))
    for number in range(max(2, rounds)):
        case, when = bench.case(target), "finished"
        if number % 2:
            when = "half-done"
            while not case.disturb(signal.SIGKILL, rng, seconds):
                case = bench.case(target)
        else:
            shutil.copytree(finished.folder, case.folder)
        files = case.files()
        if not files:
            continue
        file, kind = chaos.choose(files, rng), kinds[number // 2 % len(kinds)]
        before = file.read_bytes()
        chaos.damage(file, kind, rng)
        what = f"{when} file: {kind}"
        code, said = case.finish()
        assert "Traceback" not in said, (file, kind, said)
        if code == 0:
            assert case.contents() == expected, (file, kind, said)
            note(what, SAME)
        else:
            assert chaos.clear_line(code, said), (file, kind, code, said)
            file.write_bytes(before)
            goes_on(case, expected)
            note(what, f"{LINE}; the file back, {SAME}")


@pytest.mark.parametrize("target", TARGETS)
def test_damaged_inputs(target, bench, rounds, rng, note, tmp_path):
    case = bench.case(target, inputs=chaos.copied(bench.inputs, target, tmp_path))
    files = chaos.input_files(case.inputs, target)
    if not files:
        pytest.skip("it has no inputs")
    expected = fresh_contents(case)
    kinds = rng.sample(chaos.DAMAGES, len(chaos.DAMAGES))
    for number in range(max(2, rounds)):
        file, kind = chaos.choose(files, rng), kinds[number % len(kinds)]
        before, times = file.read_bytes(), file.stat()
        chaos.damage(file, kind, rng)
        again = bench.case(target, inputs=case.inputs)
        code, said = again.finish()
        assert "Traceback" not in said, (file, kind, said)
        if code == 0:
            if again.contents() == expected:
                outcome = SAME
            elif file.stem in said:
                outcome = "went on without it and said so"
            else:
                assert file.suffix in (".csv", ".txt", ".json", ".png") or file.parent.parts[-1] in FOREIGN, (
                    file,
                    kind,
                )
                outcome = "taken for another input: still a valid one, of a kind that has no checksum"
        else:
            assert chaos.clear_line(code, said), (file, kind, code, said)
            outcome = LINE
        file.write_bytes(before)
        os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))
        if outcome.startswith("taken") and "render" in target:
            code, said = again.finish()
            if code:  # pictures of other prompts or by other weights are not overwritten
                assert chaos.clear_line(code, said), said
                outcome += f"; repaired, {LINE}"
                again = bench.case(target, inputs=case.inputs)
        goes_on(again, expected)
        note(f"input {file.suffix or file.name}: {kind}", f"{outcome}; repaired, {SAME}")


@pytest.mark.parametrize("target", TARGETS)
def test_two_processes(target, bench, few, rng, note):
    expected, seconds = bench.undisturbed(target)
    for _ in range(few):
        case = bench.case(target)
        one = case.start()
        time.sleep(rng.uniform(0, 0.5) * seconds)
        other = case.start()
        chaos.ended(one)
        chaos.ended(other)
        said = [case.said(0), case.said(1)]
        assert (one.exitcode, other.exitcode) == (0, 0), said
        assert "Traceback" not in "".join(said), said
        assert case.contents() == expected
        waited = sum("another process is working on it" in text for text in said)
        note("two processes on one output", f"one waited, {SAME}" if waited else f"one after the other, {SAME}")


@pytest.mark.parametrize("target", TARGETS)
def test_clock(target, bench, few, rng, note):
    """All that is there is younger than the clock says it is now, as after the clock was set back."""
    expected, seconds = bench.undisturbed(target)
    for _ in range(few):
        case = bench.case(target)
        case.disturb(signal.SIGKILL, rng, seconds)
        for path in case.folder.rglob("*"):
            os.utime(path, (4_102_444_800, 4_102_444_800))  # the year 2100
        goes_on(case, expected)
        note("clock set back between two runs", SAME)


@pytest.mark.parametrize("target", TARGETS)
def test_changed_inputs(target, bench, few, rng, note, tmp_path):
    """An input changes between a killed run and the next one.

    Stable Diffusion draws pictures together, so that their last bits depend on their neighbours: of it the rows are
    compared.
    """
    expected, seconds = bench.undisturbed(target)
    inputs = chaos.copied(bench.inputs, target, tmp_path)
    if change_input(inputs, target) is None:
        pytest.skip("nothing to change in its inputs")
    fresh = bench.case(target, inputs=inputs)
    goes_on(fresh, fresh_contents(fresh))
    for _ in range(few):
        case = bench.case(target)
        case.disturb(signal.SIGKILL, rng, seconds)
        case.inputs = inputs
        code, said = case.finish()
        assert "Traceback" not in said, said
        wanted = fresh.contents()
        if code == 0:
            found = case.contents()
            if "sd2" in target:
                manifests = [metadata.read(one.run / "images/prompts/manifest.csv") for one in (case, fresh)]
                columns = ["image_name", "prompt", "seed", "file", "flag"]
                assert manifests[0][columns].equals(manifests[1][columns]) and found.keys() >= wanted.keys()
            else:
                assert [name for name in wanted if found.get(name) != wanted[name]] == [], said
            note("input changed between two runs", "as a fresh run on the changed input")
        else:
            assert chaos.clear_line(code, said), said
            case.inputs = bench.inputs
            goes_on(case, expected)
            note("input changed between two runs", f"{LINE}; the old input back, {SAME}")


def fresh_contents(case: Case) -> dict[str, bytes]:
    code, said = case.finish()
    assert code == 0, said
    return case.contents()


def change_input(inputs: dict[str, Path], target: str) -> Path | None:
    """Leaves out the last rows of a table, or the images of a folder; returns what it changed."""
    for name in chaos.WORDS[target][1].values():
        path = inputs[name]
        if path.suffix == ".csv":
            metadata.write_table(path, metadata.read(path).iloc[:-2])
            return path
        if (path / "manifest.csv").is_file():
            metadata.write_table(path / "manifest.csv", metadata.read_table(path / "manifest.csv", ()).iloc[:-2])
        for image in sorted(path.glob("*.png"))[-2:]:
            image.unlink()
            return path
    return None
