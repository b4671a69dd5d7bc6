"""An exception at any point of a step leaves the run as it was before the step."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import batches, tiny

import zo2ext
from zo2ext import ops
from zo2ext.engine import engine as engine_module
from zo2ext.engine.update_rule import StepRecord
from zo2ext.journal.journal import Journal
from zo2ext.parallel.agreement import Alone
from zo2ext.streaming.pending import PendingUpdates
from zo2ext.streaming.pipeline import Pipeline

DATA = batches("opt", 4)
POINTS = {
    "kernel": (ops, "update_perturb"),
    "upload": (Pipeline, "acquire"),
    "end of the forward passes": (Pipeline, "end_step"),
    "report": (Alone, "report"),
    "decision": (engine_module, "decide"),
    "record": (Journal, "_write"),
    "wait for the disk": (Journal, "settle"),
    "sync": (ThreadPoolExecutor, "submit"),
    "publish": (Alone, "publish"),
    "step record": (StepRecord, "of"),
    "update": (PendingUpdates, "append"),
}
FINISHED = ("update", True)  # the update finishes the step


def interrupt_once(
    monkeypatch: pytest.MonkeyPatch, owner: Any, name: str, *, late: bool
) -> Callable[[], bool]:
    """Raise KeyboardInterrupt in the next call of `owner.name`; returns whether that happened."""
    original, raised = getattr(owner, name), False

    def interrupted(*args: Any, **kwargs: Any) -> Any:
        nonlocal raised
        if raised:
            return original(*args, **kwargs)
        if late:
            original(*args, **kwargs)
        raised = True
        raise KeyboardInterrupt

    monkeypatch.setattr(owner, name, interrupted)
    return lambda: raised


def run(path: Path, at_step: Callable[[int, zo2ext.ZOEngine, Any], None]) -> dict[str, Any]:
    model = tiny("opt", dropout=0.3)
    model.train()
    torch.manual_seed(3)
    config = zo2ext.ZOConfig(device="cpu", lr=1e-3, write_back=3, storage="bf16")
    with zo2ext.offload(model, config, journal=path) as zo:
        losses = []
        for step, batch in enumerate(DATA):
            at_step(step, zo, lambda batch=batch: model(**batch).loss)
            losses.append(zo.step(lambda batch=batch: model(**batch).loss))
    weights = {n: p.detach().view(torch.uint8).clone() for n, p in model.named_parameters()}
    return {"losses": losses, "journal": path.read_bytes(), "weights": weights}


@pytest.mark.parametrize(
    ("point", "late"),
    [(point, late) for point in POINTS for late in (False, True) if (point, late) != FINISHED],
)
def test_an_interrupted_step_can_be_repeated(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, point: str, late: bool
) -> None:
    expected = run(tmp_path / "expected", lambda step, zo, loss: None)

    def interrupt(step: int, zo: zo2ext.ZOEngine, loss: Any) -> None:
        if step != 2:
            return
        journal = zo.journal
        assert journal is not None

        def state() -> tuple[Any, ...]:
            random = torch.get_rng_state().tolist()
            return (zo.steps, zo.pending(), zo.last, zo.skipped, journal.path.read_bytes(), random)

        before = state()
        with monkeypatch.context() as patch:
            raised = interrupt_once(patch, *POINTS[point], late=late)
            with pytest.raises(KeyboardInterrupt):
                zo.step(loss)
            assert raised()
        assert state() == before

    found = run(tmp_path / "found", interrupt)
    assert found["losses"] == expected["losses"]
    assert found["journal"] == expected["journal"]
    for name, values in expected["weights"].items():
        assert torch.equal(found["weights"][name], values), name
