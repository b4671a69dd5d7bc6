"""``zo2ext train --lr auto``: what is found, what is written, and the run after it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import zo2ext.commands.learning_rate as learning_rate
from zo2ext.commands import main as cli
from zo2ext.commands.arguments import REVIEWS
from zo2ext.demo.task import MODEL_DIR
from zo2ext.engine.engine import ZOEngine
from zo2ext.journal.journal import read_journal
from zo2ext.runs import find_lr, plots

SMALL = ["--steps=3", "--batch-size=4", "--seq-len=32", "--eval-windows=4"]
TASK = [f"--task={REVIEWS.title.lower()}", "--steps=2", "--batch-size=4", "--dev-size=8"]
TASK += ["--test-size=8", "--eval-every=1"]


@pytest.fixture(autouse=True)
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    """A search of fewer steps."""
    monkeypatch.setattr(find_lr, "_FEWEST", 24)
    monkeypatch.setattr(find_lr, "_FORWARDS", 1)


def train(out: Path, *words: str) -> int:
    return cli.main(["train", f"--model={MODEL_DIR}", f"--out={out}", *words])


def results(out: Path) -> dict[str, object]:
    return json.loads((out / "results.json").read_text())


def weights(out: Path) -> bytes:
    return (out / "final" / "model.safetensors").read_bytes()


@pytest.fixture(scope="module")
def text(text_file: Path) -> str:
    return f"--text={text_file}"


@pytest.mark.parametrize("kind", ["text", "task"])
def test_the_run_has_the_bits_of_one_with_that_rate(
    tmp_path: Path, text: str, capsys: pytest.CaptureFixture[str], kind: str
) -> None:
    """And the rate is in its log, its journal, its results and its picture."""
    words = [text, *SMALL] if kind == "text" else TASK
    assert train(tmp_path / "auto", *words, "--lr=auto") == 0
    said = capsys.readouterr().out
    found = results(tmp_path / "auto")
    assert f"lr      {found['lr']:.3g}, found in " in said
    assert found["lr_found"] is True
    header = read_journal(tmp_path / "auto" / "journal.zo2").header["run"]
    curve = find_lr.RateCurve.from_json(header["lr_search"])
    assert header["lr"] == curve.lr == found["lr"]
    if plots.available():
        assert (tmp_path / "auto" / "lr.png").read_bytes() == curve.png()
    assert train(tmp_path / "number", *words, f"--lr={found['lr']!r}") == 0
    assert weights(tmp_path / "auto") == weights(tmp_path / "number")
    assert results(tmp_path / "number")["lr_found"] is False
    assert not (tmp_path / "number" / "lr.png").exists()


def test_a_continued_run_takes_the_recorded_rate(
    tmp_path: Path, text: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train(tmp_path / "whole", text, *SMALL, "--lr=auto") == 0
    step, made = ZOEngine.step, []

    def stopped(self: ZOEngine, *args: object, **kwargs: object) -> float:
        if self.journal is not None:
            made.append(self.steps)
            if len(made) == 2:
                raise KeyboardInterrupt
        return step(self, *args, **kwargs)  # type: ignore[arg-type]

    with monkeypatch.context() as patch:
        patch.setattr(ZOEngine, "step", stopped)
        assert train(tmp_path / "run", text, *SMALL, "--lr=auto") == 130
    with monkeypatch.context() as patch:
        patch.setattr(learning_rate, "search", lambda *_: pytest.fail("searched again"))
        assert train(tmp_path / "run", text, *SMALL, "--lr=auto") == 0
        assert "as recorded in the run" in capsys.readouterr().out
        again = [
            "--config",
            str(tmp_path / "run" / "arguments.json"),
            f"--out={tmp_path / 'again'}",
        ]
        assert cli.main(["train", *again]) == 0  # the file has the number
    whole = weights(tmp_path / "whole")
    assert whole == weights(tmp_path / "run") == weights(tmp_path / "again")
    assert results(tmp_path / "run")["lr_found"] is True
    assert (tmp_path / "run" / "lr.png").exists() == plots.available()


def test_a_search_that_was_stopped_finds_the_same_when_it_is_repeated(
    tmp_path: Path, text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    step, made = ZOEngine.step, []

    def stopped(self: ZOEngine, *args: object, **kwargs: object) -> float:
        made.append(self.steps)
        if len(made) == 5:
            raise KeyboardInterrupt
        return step(self, *args, **kwargs)  # type: ignore[arg-type]

    with monkeypatch.context() as patch:
        patch.setattr(ZOEngine, "step", stopped)
        assert train(tmp_path / "run", text, *SMALL, "--lr=auto") == 130
    assert not (tmp_path / "run").exists()
    for name in ("run", "whole"):
        assert train(tmp_path / name, text, *SMALL, "--lr=auto") == 0
    assert weights(tmp_path / "run") == weights(tmp_path / "whole")


def test_a_new_run_in_the_same_folder_searches_again(tmp_path: Path, text: str) -> None:
    assert train(tmp_path / "run", text, *SMALL, "--lr=1e-3") == 0
    assert train(tmp_path / "run", text, *SMALL, "--lr=auto", "--overwrite=yes") == 0
    assert results(tmp_path / "run")["lr_found"] is True


def test_a_report_shows_the_search(tmp_path: Path, text: str) -> None:
    pytest.importorskip("matplotlib")
    assert train(tmp_path / "run", text, *SMALL, "--lr=auto") == 0
    assert cli.main(["report", str(tmp_path / "run")]) == 0
    page = (tmp_path / "run" / "report" / "index.html").read_text()
    assert "Search for the learning rate" in page
    assert "learning rate, as found" in page


def test_other_words_are_refused(
    tmp_path: Path, text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train(tmp_path / "run", text, *SMALL, "--lr=best") == 1
    assert "lr must be a number >= 0 or 'auto', got 'best'" in capsys.readouterr().err
