"""Runs of ``zo2ext train`` that are killed, stopped, given again, and given otherwise."""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import killed_train
import pytest

from zo2ext.commands import main as cli
from zo2ext.engine.engine import ZOEngine
from zo2ext.journal.journal import read_journal

Capture = pytest.CaptureFixture[str]
STEPS = 40
MEASURED = ("seconds", "tokens_per_s", "uploaded_bytes", "offloaded_bytes")
MEASURED += ("device_memory_bytes", "host_memory_bytes")


@pytest.fixture(scope="module")
def words(model_folder: Path, text_file: Path) -> list[str]:
    """A run on a text, without --out."""
    size = ["--batch-size=2", "--seq-len=16", "--eval-windows=4", "--eval-every=8"]
    return [f"--model={model_folder}", f"--text={text_file}", *size, "--device=cpu"]


@pytest.fixture(scope="module")
def task(model_folder: Path, task_data: Path) -> list[str]:
    """A run on SST-2, but for --out. It does best before its end."""
    size = ["--train-size=16", "--dev-size=12", "--test-size=6", "--batch-size=2"]
    model, data = f"--model={model_folder}", f"--data={task_data / 'sst2'}"
    more = ["--task=sst2", "--eval-every=8", "--lr=1e-3", "--seed=3", "--device=cpu"]
    return [model, data, *size, *more]


Start = Callable[..., Any]


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Start]:
    """Starts ``zo2ext train`` in a process of its own; `said` is the file with what it said."""
    said = tmp_path_factory.mktemp("said") / "output.txt"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join(sys.path))  # where it looks for the module
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["killed_train"])

        def begin(*words: str, moment: str | None = None) -> Any:
            process = context.Process(target=killed_train.run, args=([*words], said, moment))
            process.start()
            return process

        begin.said = said  # type: ignore[attr-defined]
        yield begin


def train(*words: str) -> int:
    return cli.main(["train", *words])


def whole(words: list[str], out: Path, steps: int = STEPS) -> Path:
    assert train(*words, f"--steps={steps}", f"--out={out}") == 0
    return out


@pytest.fixture(scope="module")
def undisturbed(words: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return whole(words, tmp_path_factory.mktemp("text") / "run")


@pytest.fixture(scope="module")
def undisturbed_task(task: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return whole(task, tmp_path_factory.mktemp("task") / "run")


def contents(run: Path) -> dict[str, Any]:
    """All that a run leaves and that is not measured of the machine, by file."""
    found: dict[str, Any] = {}
    for path in sorted(p for p in run.rglob("*") if p.is_file()):
        name = str(path.relative_to(run))
        if name == "steps.csv":
            heads, *rows = (line.split(",") for line in path.read_text().splitlines())
            kept = [i for i, head in enumerate(heads) if head not in MEASURED]
            found[name] = [[row[i] for i in kept] for row in (heads, *rows)]
        elif name == "arguments.json":
            found[name] = {**json.loads(path.read_text()), "out": ""}
        else:
            found[name] = "timeline" in name or path.read_bytes()
    return found


def assert_same_run(run: Path, other: Path) -> None:
    ours, theirs = contents(run), contents(other)
    assert ours.keys() == theirs.keys()
    for name in ours:
        assert ours[name] == theirs[name], name


def recorded(out: Path) -> int:
    journal = out / "journal.zo2"
    return read_journal(journal).next_step if journal.exists() and journal.stat().st_size else 0


def kill_at(start: Start, words: list[str], out: Path, steps: int, sign: int, wait: float) -> int:
    """Start the run, and end it by signal `sign` once it has made `steps`, and a moment later."""
    process = start("train", *words, f"--out={out}", f"--steps={STEPS}")
    while recorded(out) < steps and process.is_alive():
        time.sleep(0.002)
    time.sleep(wait)
    os.kill(process.pid, sign)
    process.join()
    return int(process.exitcode)


# -- kills


def test_a_run_that_is_killed_again_and_again_ends_as_if_it_was_not(
    words: list[str], undisturbed: Path, start: Start, tmp_path: Path
) -> None:
    out, rng = tmp_path / "run", random.Random(0)
    for steps in (0, 1, 9, 20, 25):
        before = recorded(out)
        if steps == 20:  # an interruption by hand ends it in order
            assert kill_at(start, words, out, steps, signal.SIGINT, 0.0) == 130
            assert "same command continues" in start.said.read_text()  # type: ignore[attr-defined]
        else:
            ended = kill_at(start, words, out, steps, signal.SIGKILL, rng.uniform(0, 0.02))
            assert ended == -signal.SIGKILL
        assert recorded(out) >= max(steps, before)
    for moment in ("a recorded step is logged", "the weights are whole", "the end is told"):
        process = start("train", *words, f"--out={out}", f"--steps={STEPS}", moment=moment)
        process.join()
        assert process.exitcode == -signal.SIGKILL, moment
    assert train(*words, f"--out={out}", f"--steps={STEPS}") == 0
    assert_same_run(out, undisturbed)


@pytest.mark.parametrize("moment", ["an evaluation", "an evaluation is logged"])
def test_a_kill_in_an_evaluation_loses_no_step(
    moment: str, words: list[str], undisturbed: Path, start: Start, tmp_path: Path
) -> None:
    process = start("train", *words, f"--out={tmp_path / 'run'}", f"--steps={STEPS}", moment=moment)
    process.join()
    assert process.exitcode == -signal.SIGKILL
    assert recorded(tmp_path / "run") == 8
    assert_same_run(whole(words, tmp_path / "run"), undisturbed)


def test_a_task_that_is_killed_ends_as_if_it_was_not(
    task: list[str], undisturbed_task: Path, start: Start, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    for moment in ("an evaluation of a task", "a recorded step is logged", "the weights are whole"):
        process = start("train", *task, f"--out={out}", f"--steps={STEPS}", moment=moment)
        process.join()
        assert process.exitcode == -signal.SIGKILL, moment
    assert_same_run(whole(task, out), undisturbed_task)


def test_lost_logs_are_made_again(words: list[str], undisturbed: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    shutil.copytree(undisturbed, out)
    for name in ("final", "results.json", "steps.csv", "evaluations.csv", "loss.csv", "loss.png"):
        if (out / name).is_dir():
            shutil.rmtree(out / name)
        else:
            (out / name).unlink()
    assert_same_run(whole(words, out), undisturbed)
    seconds = (out / "steps.csv").read_text().splitlines()[1].split(",")[6]
    assert seconds == "nan", "what no journal has"


# -- finished runs


def test_a_finished_run_is_left_as_it_is(
    words: list[str], task: list[str], undisturbed: Path, undisturbed_task: Path, capsys: Capture
) -> None:
    for command, run in ((words, undisturbed), (task, undisturbed_task)):
        paths = [run, *sorted(run.rglob("*"))]
        before = [(p.stat().st_mtime_ns, p.read_bytes() if p.is_file() else b"") for p in paths]
        other = ["--slots=2", "--resident=all", "--granularity=module"]  # these change no result
        assert train(*command, f"--out={run}", f"--steps={STEPS}", *other) == 0
        assert f"finished already: {STEPS} steps" in capsys.readouterr().out
        assert [run, *sorted(run.rglob("*"))] == paths
        after = [(p.stat().st_mtime_ns, p.read_bytes() if p.is_file() else b"") for p in paths]
        assert after == before


def test_more_steps_continue_a_finished_run(
    words: list[str], undisturbed: Path, start: Start, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    whole(words, out, 20)  # its last evaluation is not one of the longer run's
    weights = out / "final" / "model.safetensors"
    before = weights.read_bytes()
    process = start(
        "train",
        *words,
        f"--out={out}",
        f"--steps={STEPS}",
        moment="the new weights take their place",
    )
    process.join()
    assert process.exitcode == -signal.SIGKILL
    assert recorded(out) == STEPS
    assert weights.read_bytes() == before, "the weights of before are whole until the new ones are"
    assert_same_run(whole(words, out), undisturbed)


def test_fewer_steps_are_refused(words: list[str], undisturbed: Path, capsys: Capture) -> None:
    before = contents(undisturbed)
    assert train(*words, f"--out={undisturbed}", "--steps=20") == 1
    message = f"steps is 20, but the run in '{undisturbed}' has made {STEPS}: ask for at least"
    assert message in capsys.readouterr().err
    assert contents(undisturbed) == before


def test_a_run_can_be_shown(
    undisturbed: Path, undisturbed_task: Path, tmp_path: Path, capsys: Capture
) -> None:
    for run, shown in ((undisturbed, "held out loss"), (undisturbed_task, "dev accuracy")):
        out = tmp_path / shown
        assert cli.main(["report", f"--run={run}", f"--out={out}"]) == 0
        assert capsys.readouterr().err == ""
        assert shown in (out / "index.html").read_text()


# -- the best weights


def test_the_weights_that_did_best_on_dev_are_kept(
    task: list[str], undisturbed_task: Path, tmp_path: Path
) -> None:
    results = json.loads((undisturbed_task / "results.json").read_text())
    rows = (undisturbed_task / "evaluations.csv").read_text().splitlines()[1:]
    dev = [(int(s), float(v)) for s, n, v in (r.split(",") for r in rows) if n == "dev_accuracy"]
    best = max(value for step, value in dev if step)
    kept = results["kept_step"]
    assert kept == next(step for step, value in dev if step and value == best) < STEPS
    weights = "final/model.safetensors"
    short = whole([*task, "--keep=last"], tmp_path / "short", kept)
    assert (short / weights).read_bytes() == (undisturbed_task / weights).read_bytes()
    found = json.loads((short / "results.json").read_text())["results"]
    assert found == results["results"]

    # A finished run may keep the others.
    run = tmp_path / "run"
    shutil.copytree(undisturbed_task, run)
    whole([*task, "--keep=last"], run)
    results = json.loads((run / "results.json").read_text())
    assert (results["keep"], results["kept_step"]) == ("last", STEPS)
    assert (run / weights).read_bytes() != (undisturbed_task / weights).read_bytes()
    whole(task, run)
    assert_same_run(run, undisturbed_task)


# -- refusals


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("--lr=1e-3", "run.lr was 0.000119"),
        ("--batch-size=3", "run.batch_size was 2 and is 3"),
        ("--seq-len=17", "run.seq_len was 16 and is 17"),
        ("--eval-every=9", "run.eval_every was 8 and is 9"),
        ("--weight-decay=0.5", "run.weight_decay was 0.0 and is 0.5"),
        ("--seed=1", "config.seed was 0 and is 1"),
        ("--storage=bf16", "config.storage was None and is 'bf16'"),
        ("--eps=1e-2", "config.eps was 0.001 and is 0.01"),
        ("text", "run.text was '4051 + 457 tokens, "),
        ("model", "fingerprint was "),
    ],
)
def test_another_run_is_refused_by_what_differs(
    change: str,
    message: str,
    words: list[str],
    undisturbed: Path,
    text_file: Path,
    tmp_path: Path,
    capsys: Capture,
) -> None:
    if change == "text":
        (tmp_path / "text").write_text(text_file.read_text() + "the end .\n")
        change = f"--text={tmp_path / 'text'}"
    if change == "model":
        change = f"--model={undisturbed / 'final'}"
    before = contents(undisturbed)
    assert train(*words, f"--out={undisturbed}", f"--steps={STEPS + 1}", change) == 1
    said = capsys.readouterr().err
    assert "is the journal of another run: " in said
    assert message in said
    assert contents(undisturbed) == before


def test_other_examples_are_refused(
    task: list[str], undisturbed_task: Path, capsys: Capture
) -> None:
    assert train(*task, f"--out={undisturbed_task}", "--steps=50", "--train-size=17") == 1
    said = capsys.readouterr().err
    assert "run.examples was '16 + 12 + 6 examples, " in said
    assert "run.train_size was 16 and is 17" in said


def test_a_second_process_on_a_run_is_refused(
    words: list[str], start: Start, tmp_path: Path, capsys: Capture
) -> None:
    out = tmp_path / "run"
    first = start("train", *words, f"--out={out}", "--steps=100000")
    while recorded(out) < 2:
        assert first.is_alive()
        time.sleep(0.01)
    assert train(*words, f"--out={out}", "--steps=100000") == 1
    assert "is in use: another process is on this run" in capsys.readouterr().err
    first.kill()
    first.join()


def test_a_disk_that_fills_up_stops_a_run_that_can_go_on(
    words: list[str],
    undisturbed: Path,
    tmp_path: Path,
    capsys: Capture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    out, step = tmp_path / "run", ZOEngine.step

    def full(zo: ZOEngine, loss: Any, **options: Any) -> float:
        value = step(zo, loss, **options)
        if zo.steps == 13:  # the log's next line has nowhere to go
            log = zo.journal.path.with_name("steps.csv")
            log.rename(out / "kept.csv")
            log.symlink_to("/dev/full")
        return value

    with monkeypatch.context() as patch:
        patch.setattr(ZOEngine, "step", full)
        assert train(*words, f"--out={out}", f"--steps={STEPS}") == 1
    said = capsys.readouterr().err
    assert "No space left on device" in said
    assert "after 13 steps: all are in" in said
    assert "the same command continues" in said
    (out / "steps.csv").unlink()
    (out / "kept.csv").rename(out / "steps.csv")
    whole(words, out)
    assert_same_run(out, undisturbed)
