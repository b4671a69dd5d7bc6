"""Runs of tiny models on the engine, and how they are compared with each other."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import reference
import torch
from numeric import assert_same_bits
from tiny_models import CASES, batches, tiny
from torch import nn

import zo2ext
from zo2ext.engine.engine import ZOEngine


def saved(
    folder: Path, name: str, dtype: torch.dtype = torch.float32, *, shard: str = "40KB"
) -> Path:
    """A tiny model of several shards."""
    tiny(name).to(dtype).save_pretrained(folder, max_shard_size=shard)
    return folder


def trained(model: nn.Module, zo: zo2ext.ZOEngine, name: str) -> dict[str, Any]:
    """Losses of a few steps, and the weights after them."""
    with zo:
        losses = [zo.step(lambda b=b: model(**b).loss) for b in batches(name, 3)]
        return {"losses": losses, **{n: w.clone() for n, w in model.state_dict().items()}}


def assert_same_run(found: dict[str, Any], expected: dict[str, Any]) -> None:
    assert found["losses"] == expected["losses"]
    assert found.keys() == expected.keys()
    for name in expected.keys() - {"losses"}:
        assert_same_bits(found[name], expected[name], name)


def usual(folder: Path, name: str, **config: Any) -> dict[str, Any]:
    """The same by `from_pretrained` and `offload`."""
    model = CASES[name][0].from_pretrained(folder)
    return trained(model, zo2ext.offload(model, zo2ext.ZOConfig(**config)), name)


def run(
    model: nn.Module, data: list[dict[str, Any]], journal: Path | None = None, **config: Any
) -> Iterator[ZOEngine]:
    """One step a batch that the journal lacks, and a flush at the end; yields the engine after each
    step."""
    with zo2ext.offload(model, zo2ext.ZOConfig(**config)) as zo:
        done = 0 if journal is None else zo.keep_journal(journal)
        for batch in data[done:]:
            zo.step(lambda batch=batch: model(**batch).loss)
            yield zo
        zo.flush()


def losses_of(zo: ZOEngine) -> tuple[float, ...]:
    """The losses of the last step."""
    assert zo.last is not None
    return (*zo.last.losses_plus, *zo.last.losses_minus)


def whole_run(model: nn.Module, data: list[dict[str, Any]], **config: Any) -> list[Any]:
    """The losses of each step of a run."""
    return [losses_of(zo) for zo in run(model, data, **config)]


def assert_run_equals(
    model: nn.Module, data: list[dict[str, Any]], expected: reference.Result, **config: Any
) -> None:
    for step, zo in enumerate(run(model, data, **config)):
        assert zo.last is not None
        losses = list(zip(*filter(None, (zo.last.losses_plus, zo.last.losses_minus)), strict=True))
        assert losses == expected.losses[step], f"losses of step {step}"
    for name, parameter in model.named_parameters():
        if name in expected.weights:
            # The engine hands weights back in the compute dtype, which holds every stored value.
            assert_same_bits(parameter.data, expected.weights[name].to(parameter.dtype), name)
