"""Progress: a bar on a terminal, elsewhere a plain line now and then."""

from __future__ import annotations

import io
import sys

import pytest

from zo2ext.runs import progress
from zo2ext.runs.progress import Progress


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_terminal_gets_a_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    screen = Terminal()
    monkeypatch.setattr(sys, "stderr", screen)
    shown = Progress(4, done=1)
    shown.update("loss 2.500", 4)
    shown.close()
    assert "4/4" in screen.getvalue()
    assert "loss 2.500" in screen.getvalue()


def test_no_terminal_gets_a_line_now_and_then(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    now = 100.0
    monkeypatch.setattr(progress.time, "monotonic", lambda: now)
    shown = Progress(100, done=10)
    for step in range(11, 101):
        now += 1.0
        shown.update(f"loss {step}", step)
    shown.close()
    assert capsys.readouterr().err.splitlines() == [
        "step 40 of 100: loss 40, 60 s left",
        "step 70 of 100: loss 70, 30 s left",
        "step 100 of 100: loss 100, 0 s left",
    ]


def test_a_silent_one_shows_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    shown = Progress(2, silent=True)
    shown.update("loss 1", 2)
    shown.write("step 2")
    shown.close()
    assert capsys.readouterr() == ("", "")
