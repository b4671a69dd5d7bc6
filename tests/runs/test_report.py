"""The log of a run survives whatever ends it, and a report shows what there is to see."""

from __future__ import annotations

import math
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from logged_runs import MODEL, run
from tiny_models import batches, tiny
from trainer_runs import trainer

import zo2ext
from zo2ext.commands import options
from zo2ext.commands.arguments import ReportArguments
from zo2ext.commands.report import report
from zo2ext.runs import plots
from zo2ext.runs.data import load_run
from zo2ext.runs.log import (
    EVALUATIONS_FILE,
    STEP_COLUMNS,
    STEPS_FILE,
    RunLog,
    Table,
    read_evaluations,
    read_steps,
)
from zo2ext.runs.meter import Meter
from zo2ext.runs.report import numbers_of

PNG = b"\x89PNG\r\n\x1a\n"
Capture = pytest.CaptureFixture[str]


@pytest.fixture(scope="module")
def usual(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("usual") / "run"
    run(folder)
    return folder


def copy(folder: Path, target: Path) -> Path:
    """The logs of `folder`, alone."""
    target.mkdir()
    for name in (STEPS_FILE, EVALUATIONS_FILE):
        (target / name).write_bytes((folder / name).read_bytes())
    return target


# -- the log


def test_a_line_a_step_has_what_the_step_measured(tmp_path: Path) -> None:
    records = run(tmp_path / "run")
    table = read_steps(tmp_path / "run")
    assert not table.torn
    assert table.columns == STEP_COLUMNS
    rows = [dict(zip(STEP_COLUMNS, map(float, row), strict=True)) for row in table.rows]
    for step, (row, record) in enumerate(zip(rows, records, strict=True)):
        assert row["step"] == record.step == step
        assert row["loss"] == record.loss
        assert row["loss_plus"] == sum(record.losses_plus) / 2
        assert row["loss_minus"] == sum(record.losses_minus) / 2
        size = math.hypot(*record.projected_grads) / math.sqrt(2)
        assert row["projected_grad"] == record.projected_grad == pytest.approx(size, rel=1e-15)
        assert row["lr"] == 3e-3
        assert row["seconds"] > 0
        assert row["tokens_per_s"] > 0
        assert row["device_memory_bytes"] == 0, "there is no GPU"
        assert row["host_memory_bytes"] > 2**20
        assert row["skipped"] == 0
    assert rows[2]["uploaded_bytes"] == rows[3]["uploaded_bytes"] > 0
    assert rows[2]["offloaded_bytes"] == rows[3]["offloaded_bytes"] > 0


def test_what_an_evaluation_moves_is_not_the_next_steps() -> None:
    model = tiny(MODEL)
    batch = batches(MODEL, 1)[0]
    uploaded = []
    with zo2ext.offload(model, zo2ext.ZOConfig(lr=1e-3, device="simulated")) as zo:
        meter = Meter(zo)
        for evaluations in (0, 0, 0, 2):
            for _ in range(evaluations):
                model(**batch)
            with meter.measure(tokens=8):
                zo.step(lambda: model(**batch).loss)
            uploaded.append(meter.uploaded)
    assert uploaded[3] == uploaded[2] > 0


def test_evaluations_are_logged_by_name(usual: Path) -> None:
    assert read_evaluations(usual).rows == [
        ["0", "held_out_loss", "5.0"],
        ["4", "held_out_loss", "4.5"],
        ["4", "dev_accuracy", "0.75"],
    ]


def test_nothing_is_written_before_the_first_step(tmp_path: Path) -> None:
    model = tiny(MODEL)
    with zo2ext.offload(model, zo2ext.ZOConfig(lr=1e-3, device="cpu")) as zo:
        log = RunLog(tmp_path / "run", zo, Meter(zo))
        log.evaluations(0, {"held_out_loss": 1.0})
        with pytest.raises(ValueError, match="name must be printable and on one line"):
            log.evaluations(0, {"two\nlines": 1.0})
    assert not (tmp_path / "run").exists()


def test_a_killed_run_leaves_every_line(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    code = f"""
import os, signal, sys
sys.path[:0] = {sys.path!r}
from pathlib import Path
import logged_runs
def stop(step):
    if step == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    return 1.0
logged_runs.run(Path({str(folder)!r}), steps=9, factor=stop)
"""
    done = subprocess.run([sys.executable, "-c", code], timeout=120, capture_output=True)
    assert done.returncode == -signal.SIGKILL, done.stderr.decode()
    assert [row[0] for row in read_steps(folder).rows] == ["0", "1", "2"]
    assert len(read_evaluations(folder).rows) == 1
    run(folder, steps=5, start=2)
    assert [row[0] for row in read_steps(folder).rows] == ["0", "1", "2", "3", "4"]
    steps = [row[0] for row in read_evaluations(folder).rows]
    assert steps == ["0", "2", "5", "5"]


def test_a_run_that_begins_again_replaces_its_log(tmp_path: Path) -> None:
    run(tmp_path / "run", steps=4)
    run(tmp_path / "run", steps=2)
    assert len(read_steps(tmp_path / "run").rows) == 2


@given(length=st.integers(0, 10**6), tail=st.sampled_from([b"", b"\0" * 64, b"\0\n", b"7,nan"]))
@settings(max_examples=60, deadline=None)
def test_a_log_cut_anywhere_keeps_its_whole_lines(
    usual: Path, tmp_path_factory: pytest.TempPathFactory, length: int, tail: bytes
) -> None:
    content = (usual / STEPS_FILE).read_bytes()
    head = len(content.split(b"\n")[0]) + 1
    cut = head + length % (len(content) - head + 1)
    folder = tmp_path_factory.mktemp("cut")
    (folder / STEPS_FILE).write_bytes(content[:cut] + tail)
    table = read_steps(folder)
    whole = content[:cut].count(b"\n") - 1
    assert table.rows == read_steps(usual).rows[:whole]
    assert table.torn == (not content[:cut].endswith(b"\n") or tail != b"")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            b"step,train_loss,held_out_loss\n0,1,2\n",
            "is not such a log: its first line must be step,",
        ),
        (b"\x89PNG\r\n\x1a\n\0\0", "is not such a log"),
        (",".join(STEP_COLUMNS).encode() + b"\n0,1\n1,2\n2,3\n", "line 2 is broken"),
    ],
    ids=["other-table", "binary", "middle"],
)
def test_what_is_no_log_is_refused(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / STEPS_FILE).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        read_steps(tmp_path)


def test_numbers_of_a_column() -> None:
    table = Table(("step", "loss"), [["0", "nan"], ["1", "2.5"]], torn=False)
    assert math.isnan(table.numbers("loss")[0])
    assert table.numbers("loss")[1] == 2.5


# -- the report


def make(folder: Path, **changes: Any) -> str:
    """The page of a report."""
    return report(ReportArguments(run=str(folder), **changes)).read_text()


def pictures(folder: Path) -> set[str]:
    found = {path.name for path in folder.glob("*.png")}
    assert all((folder / name).read_bytes().startswith(PNG) for name in found)
    return found


def test_a_report_shows_a_run(usual: Path, tmp_path: Path, capsys: Capture) -> None:
    words = ["--run", str(usual), "--out", str(tmp_path / "report")]
    report(options.parse(ReportArguments, words, prog="zo2ext report"))
    assert f"report: {tmp_path / 'report' / 'index.html'}" in capsys.readouterr().out
    page = (tmp_path / "report" / "index.html").read_text()
    names = {"loss", "evaluations", "projected_gradient", "throughput", "memory", "timeline"}
    assert pictures(tmp_path / "report") == {f"{name}.png" for name in names}
    assert page.count("data:image/png;base64,") == len(names)
    assert not re.search(r"<script|https?:|src=\"(?!data:)|href=|@import|url\(", page)
    assert "5 at step 0, 4.5 at step 4" in page
    assert "&lt;b&gt;&amp;&quot;&#x27;" in page
    assert "<b>" not in page
    assert 'class="warning"' not in page


def test_a_report_goes_into_the_runs_folder_and_can_be_made_again(
    usual: Path, tmp_path: Path
) -> None:
    folder = copy(usual, tmp_path / "run")
    first = make(folder)
    assert make(folder) == first
    assert (folder / "report" / "index.html").is_file()
    assert "timeline.png" not in pictures(folder / "report")


def test_what_went_wrong_is_said(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    run(folder, steps=6, factor=lambda step: math.nan if step in (2, 4) else 1.0)
    (folder / "arguments.json").write_text('{"steps": 100}')
    with (folder / STEPS_FILE).open("ab") as file:
        file.write(b"6,4.")
    with (folder / EVALUATIONS_FILE).open("ab") as file:
        file.write(b"8,held_out_loss,nan\n9,dev")
    page = make(folder)
    for warning in (
        "2 of 6 steps changed nothing, as their losses were not finite",
        "the run is not finished: 6 of 100 steps are logged",
        "the last line of steps.csv is incomplete",
        "the last line of evaluations.csv is incomplete",
        "held_out_loss is not finite in some evaluations",
    ):
        assert warning in page


def test_steps_that_taught_nothing_are_said(tmp_path: Path) -> None:
    run(tmp_path / "run", factor=lambda step: 0.0)
    assert "the projected gradient is exactly 0 in 4 of 4 logged steps" in make(tmp_path / "run")


def test_a_rising_loss_is_said(usual: Path, tmp_path: Path) -> None:
    folder = copy(usual, tmp_path / "run")
    with (folder / EVALUATIONS_FILE).open("ab") as file:
        file.write(b"5,held_out_loss,6.5\n")
    assert "held_out_loss rose, from 5 to 6.5" in make(folder)


def test_a_run_on_the_cpu_moves_nothing(tmp_path: Path) -> None:
    run(tmp_path / "run", steps=2, device="cpu")
    data = load_run(tmp_path / "run")
    assert {value for _, value in data.columns["uploaded_bytes"]} == {0}
    assert "memory.png" in {p.name for p in (Path(report_of(tmp_path / "run")).glob("*.png"))}


def report_of(folder: Path) -> Path:
    return report(ReportArguments(run=str(folder))).parent


def test_one_step_is_enough(tmp_path: Path) -> None:
    run(tmp_path / "run", steps=1)
    assert "loss.png" in pictures(report_of(tmp_path / "run"))


def test_losses_that_are_all_nan_make_pictures_still(tmp_path: Path) -> None:
    run(tmp_path / "run", factor=lambda step: math.nan)
    page = make(tmp_path / "run")
    assert "no loss is finite" in page
    assert "projected_gradient.png" in pictures(tmp_path / "run" / "report")


def test_steps_without_times_and_bytes_are_reported(usual: Path, tmp_path: Path) -> None:
    """As a log that was rebuilt from the journal has them."""
    folder = copy(usual, tmp_path / "run")
    header, *lines = (folder / STEPS_FILE).read_text().splitlines()
    first, last = STEP_COLUMNS.index("seconds"), STEP_COLUMNS.index("skipped")
    cells = [line.split(",") for line in lines]
    rows = [",".join([*row[:first], *["nan"] * (last - first), *row[last:]]) for row in cells]
    (folder / STEPS_FILE).write_text("\n".join([header, *rows, ""]))
    page = make(folder)
    assert "learning rate of the last step" in page
    assert "tokens per second" not in page


def test_folders_that_are_no_run_are_refused(tmp_path: Path, usual: Path) -> None:
    for folder, message in (
        (tmp_path / "none", "run is .*none', which is not a directory"),
        (tmp_path, r"it has no steps\.csv, as zo2ext train and ZOTrainer write it"),
    ):
        with pytest.raises(ValueError, match=message):
            make(folder)
    assert [*tmp_path.iterdir()] == []
    (tmp_path / STEPS_FILE).write_bytes((usual / STEPS_FILE).read_bytes().split(b"\n")[0] + b"\n")
    with pytest.raises(ValueError, match=r"steps\.csv has no step yet"):
        make(tmp_path)
    (tmp_path / STEPS_FILE).write_bytes(b"")
    with pytest.raises(ValueError, match=r"steps\.csv has no step yet"):
        make(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [STEPS_FILE]


@pytest.mark.parametrize("content", ["{", "[]"])
def test_settings_that_cannot_be_read_are_named(usual: Path, tmp_path: Path, content: str) -> None:
    folder = copy(usual, tmp_path / "run")
    (folder / "arguments.json").write_text(content)
    with pytest.raises(
        ValueError, match=r"arguments\.json (is not valid JSON|must hold an object)"
    ):
        make(folder)


def test_without_matplotlib_there_is_no_report(
    usual: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plots, "available", lambda: False)
    with pytest.raises(zo2ext.UserError, match=r"needs matplotlib.*pip install 'zo2ext\[plot\]'"):
        make(usual, out=str(tmp_path / "report"))
    assert not (tmp_path / "report").exists()


def test_an_outlier_does_not_flatten_a_curve() -> None:
    values = [2.0 + 0.01 * (i % 7) for i in range(200)]
    low, high = plots._usual([*values, 900.0, -900.0])
    assert (low, high) == (min(values), max(values))
    means = plots._smooth([*values, 900.0], 10)
    assert math.isnan(means[0])
    assert max(means[1:]) <= high
    assert plots._usual([0.0] * 99 + [5.0]) == (0.0, 0.0)
    wide = [0.0] * 90 + [5.0] * 10
    assert plots._usual(wide) == (0.0, 5.0), "what is common is no outlier"


# -- runs of a Trainer


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The output folder of a Trainer, TensorBoard's files included where it is installed."""
    out = tmp_path_factory.mktemp("trained") / "out"
    schedule = {"save_strategy": "steps", "save_steps": 4, "eval_strategy": "steps"}
    board = {"report_to": "tensorboard"} if has_tensorboard() else {}
    trainer(out, max_steps=8, eval_steps=2, simulate=True, **schedule, **board).train()
    return out


def has_tensorboard() -> bool:
    try:
        import tensorboard  # noqa: F401
    except ImportError:
        return False
    return True


def test_a_trainers_run_is_shown(trained: Path, tmp_path: Path) -> None:
    data = load_run(trained)
    assert (data.done, data.planned, data.skipped) == (8, 8, 0)
    assert [step for step, _ in data.columns["projected_grad"]] == list(range(8))
    assert [step for step, _ in data.evaluations["eval_loss"]] == [2, 4, 6, 8]
    assert set(data.evaluations) == {"eval_loss"}
    assert float(data.settings["eps"]) == 0.001
    page = make(trained, out=str(tmp_path / "report"))
    names = {"loss.png", "projected_gradient.png", "throughput.png", "memory.png"}
    assert pictures(tmp_path / "report") == names
    assert "eval loss" in page
    with pytest.raises(zo2ext.UserError, match=r"it has no steps\.csv"):
        load_run(trained / "checkpoint-4")


def test_tensorboard_gets_the_scalars(trained: Path) -> None:
    if not has_tensorboard():
        pytest.skip("tensorboard is not installed")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    (file,) = trained.rglob("events.out.tfevents.*")
    events = EventAccumulator(str(file))
    events.Reload()
    expected = load_run(trained).columns
    for tag, column in (
        ("train/loss", "loss"),
        ("train/zo/projected_grad", "projected_grad"),
        ("train/zo/loss_plus", "loss_plus"),
        ("train/zo/loss_minus", "loss_minus"),
        ("train/zo/uploaded_bytes_per_step", "uploaded_bytes"),
    ):
        written = [(event.step, event.value) for event in events.Scalars(tag)]
        rounded = [(s, float(torch.tensor(v, dtype=torch.float32))) for s, v in expected[column]]
        assert written == rounded, tag


def test_logs_of_before_lack_the_last_column(tmp_path: Path) -> None:
    run(tmp_path / "run")
    path = tmp_path / "run" / STEPS_FILE
    lines = [line.rsplit(",", 1)[0] for line in path.read_text().splitlines()]
    path.write_text("\n".join(lines) + "\n")
    table = read_steps(tmp_path / "run")
    assert table.columns == STEP_COLUMNS[:-1]
    data = load_run(tmp_path / "run")
    assert (data.clipped, data.done) == (0, len(lines) - 1)


def test_shortened_steps_are_in_the_report(tmp_path: Path) -> None:
    run(tmp_path / "run")
    path = tmp_path / "run" / STEPS_FILE
    head, first, *rest = path.read_text().splitlines()
    path.write_text("\n".join([head, first[:-1] + "1", *rest]) + "\n")
    assert ("steps shortened by clip", "1") in numbers_of(load_run(tmp_path / "run"))
