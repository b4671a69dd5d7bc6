"""``directions="auto"``, and how many directions fit under one upload of the weights."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from test_clock import Place, shape
from tiny_models import batches, tiny

import zo2ext
from zo2ext.commands.main import main
from zo2ext.journal.journal import read_journal
from zo2ext.parallel.mesh import Mesh
from zo2ext.planning import directions
from zo2ext.planning.activations import Stage
from zo2ext.planning.directions import FEWEST, MOST, directions_under_an_upload, with_directions
from zo2ext.planning.gpus import named_rates
from zo2ext.planning.plan import make_plan


def under(gpu: str, tokens: int, **settings: Any) -> int | None:
    """The number for OPT-13B in bfloat16, with stages of passes over `tokens` tokens."""
    model, activations = shape("13b")
    stages = [replace(s, flops=s.flops * tokens // 2048) for s in activations.stages]
    return directions_under_an_upload(
        model, zo2ext.ZOConfig(**settings), named_rates(gpu), [Stage(**vars(s)) for s in stages]
    )


def test_fewer_fit_where_batches_are_large_or_the_link_is_fast() -> None:
    small, large = under("H200", 256), under("H200", 2048)
    assert small is not None
    assert large is not None
    assert 2 <= large < small <= 64
    assert under("H200", 256, resident="all") is None


def test_that_many_take_little_longer_than_two() -> None:
    model, activations = shape("13b")
    stages = tuple(replace(s, flops=s.flops // 8) for s in activations.stages)
    config = zo2ext.ZOConfig(write_back=1)
    most = directions_under_an_upload(model, config, named_rates("H200"), stages)
    assert most is not None

    def seconds(count: int) -> float:
        plan = make_plan(
            model,
            config.replace(directions=count),
            tokens=256,
            rates=named_rates("H200"),
            activations=replace(activations, stages=stages),
        )
        return plan.step.seconds

    assert seconds(most) <= 1.1 * seconds(2)
    assert seconds(most + 1) > 1.1 * seconds(2)


@pytest.mark.parametrize(("place", "least"), [("cpu", FEWEST), ("cuda", FEWEST)])
def test_auto(place: str, least: int, monkeypatch: pytest.MonkeyPatch) -> None:
    model, _ = shape("13b")
    monkeypatch.setattr(directions, "measure_rates", lambda *_: named_rates("A100"))
    config = zo2ext.ZOConfig(directions="auto")
    found = with_directions(model, config, Place(place)).directions
    assert least <= int(found) <= MOST
    assert with_directions(model, config, None).directions == FEWEST
    assert with_directions(model, zo2ext.ZOConfig(directions=3), Place(place)).directions == 3


def test_a_run_continues_with_the_number_that_it_began_with(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, data = zo2ext.ZOConfig(directions="auto", device="cpu", lr=1e-3), batches("opt", 4)
    path = tmp_path / "journal.zo2"
    for fewest, steps in ((3, 2), (5, 4)):  # as if it were on another machine
        monkeypatch.setattr(directions, "FEWEST", fewest)
        model = tiny("opt")
        with zo2ext.offload(model, config, journal=path) as zo:
            for batch in data[zo.steps : steps]:
                zo.step(lambda model=model, batch=batch: model(**batch).loss)
            assert zo.config.directions == 3
    content = read_journal(path)
    assert (len(content.steps), content.header["config"]["directions"]) == (4, 3)


def test_what_is_not_decided_is_refused_by_name() -> None:
    config = zo2ext.ZOConfig(directions="auto")
    with pytest.raises(ValueError, match="'auto', which is not decided yet"):
        _ = config.forwards
    with pytest.raises(ValueError, match="directions must be a number with several processes"):
        Mesh(2).check(config)
    with pytest.raises(ValueError, match=r"directions must be an integer from 1 .* got 'many'"):
        zo2ext.ZOConfig(directions="many")


def test_the_plan_says_how_many(model_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["plan", "--model", str(model_folder), "--seq-len", "64", "--gpu", "T4"]
    assert main([*command, "--directions", "auto"]) == 0
    printed = capsys.readouterr().out
    assert "8 forward passes" in printed
    assert "directions: each takes the time of its forward pass, as no weights stream" in printed
    assert main([*command, "--gpu-memory", "0.1"]) == 0
    assert "centered ones of this batch take little longer" in capsys.readouterr().out
