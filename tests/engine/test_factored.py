"""Factored directions: the weights' bits, the forward passes, and the same run in every place."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import reference
import torch
from engine_runs import losses_of, run, whole_run
from numeric import assert_same_bits
from tiny_models import batches, tiny
from torch import nn

import zo2ext
from zo2ext.journal.journal import read_journal
from zo2ext.model.factored import is_factored

LEFT, RIGHT = 3, 4  # domains of docs/contracts.md
SETTINGS: dict[str, Any] = {"lr": 1e-2, "eps": 1e-3, "weight_decay": 0.1, "seed": 11, "rank": 2}
STEPS = 5
PERIODS = [1, 3, "never"]
PLACES: dict[str, dict[str, Any]] = {
    "streamed": {"device": "simulated"},
    "module": {"device": "simulated", "granularity": "module", "slots": 2},
    "resident-2": {"device": "simulated", "resident": 2},
    "one-copy": {"device": "simulated", "one_copy": True},
    "disk": {"device": "cpu", "store": "disk"},
}


class Twin:
    """The plain reference of one run: weights in NumPy, factors made from their definition.

    Args:
        compute: Dtype of V and of moved factors in forward passes.
    """

    def __init__(
        self, model: nn.Module, period: int | None, count: int, compute: torch.dtype, **_: Any
    ) -> None:
        self.rank, self.seed, self.eps = SETTINGS["rank"], SETTINGS["seed"], SETTINGS["eps"]
        self.period, self.count, self.compute, self.step = period, count, compute, 0
        self.names = {n: i for i, (n, _) in enumerate(model.named_parameters())}
        self.weights = {n: p.detach().float().numpy().copy() for n, p in model.named_parameters()}
        self.since: list[Any] = []  # updates of the steps since the last fold

    def factor(self, name: str, key: int, domain: int, size: int) -> Any:
        """Noise of shape [stack, rank, size]."""
        stack = math.prod(self.weights[name].shape[:-2])
        numel = stack * self.rank * size
        z = reference.normal(numel, key=key, tensor_id=self.names[name], domain=domain)
        return z.reshape(stack, self.rank, size)

    def right(self, name: str, k: int, step: int) -> Any:
        first = 0 if self.period is None else step - step % self.period
        key = reference.direction_key(self.seed, first, k)
        v = self.factor(name, key, RIGHT, self.weights[name].shape[-1])
        scaled = reference.fma(np.float32(1 / math.sqrt(self.rank)), v, np.float32(0))
        return torch.from_numpy(scaled).to(self.compute).float().numpy()

    def collected(self, name: str, k: int) -> Any:
        u = self.factor(name, 0, LEFT, self.weights[name].shape[-2]) * np.float32(0)
        for step, updates in self.since:
            key = reference.direction_key(self.seed, step, k)
            z = self.factor(name, key, LEFT, u.shape[-1])
            u = reference.fma(-np.float32(updates[k].coefficient), z, u)
        return u

    def moved(self, k: int, sign: int) -> dict[str, torch.Tensor]:
        """The weights that a forward pass stands for, in float64."""
        found = {}
        for name, w in self.weights.items():
            if not is_factored(w.shape, self.rank):
                key = reference.direction_key(self.seed, self.step, k)
                z = reference.normal(w.size, key=key, tensor_id=self.names[name]).reshape(w.shape)
                found[name] = torch.from_numpy(w + sign * self.eps * z.astype(np.float64))
                continue
            total = w.astype(np.float64).reshape(-1, *w.shape[-2:])
            for j in range(self.count):
                u = self.collected(name, j)
                if j == k:
                    key = reference.direction_key(self.seed, self.step, k)
                    z = self.factor(name, key, LEFT, w.shape[-2])
                    u = reference.fma(np.float32(sign * self.eps), z, u)
                u = torch.from_numpy(u).to(self.compute).double().numpy()
                v = self.right(name, j, self.step).astype(np.float64)
                total = total + np.swapaxes(u, -1, -2) @ v
            found[name] = torch.from_numpy(total.reshape(w.shape))
        return found

    def append(self, updates: Any) -> None:
        """Apply a step: to dense tensors at once, to factored ones when the period ends."""
        for name, w in self.weights.items():
            if updates and not is_factored(w.shape, self.rank):
                for u in updates:
                    z = reference.normal(w.size, key=u.key, tensor_id=self.names[name])
                    decay = np.float32(u.decay if w.ndim >= 2 else 1)
                    w = reference.updated(w, z.reshape(w.shape), u.coefficient, decay)
                self.weights[name] = w
        if updates:
            self.since.append((self.step, updates))
        self.step += 1
        if self.period is not None and self.step % self.period == 0:
            self.fold()

    def fold(self) -> None:
        for name, w in self.weights.items():
            if self.since and is_factored(w.shape, self.rank):
                decay = np.float32(1)
                for _, updates in self.since:
                    decay *= np.float32(updates[0].decay)
                stack = (w * decay).reshape(-1, *w.shape[-2:])
                first = self.since[0][0]
                for k in range(self.count):
                    u, v = self.collected(name, k), self.right(name, k, first)
                    for q in range(self.rank):
                        stack = reference.fma(u[:, q, :, None], v[:, q, None, :], stack)
                self.weights[name] = stack.reshape(w.shape)
        self.since = []


@pytest.mark.parametrize(
    ("name", "period", "directions"),
    [("opt", 1, 1), ("opt", "never", 1), ("opt", 1, 2), ("opt", 3, 2), ("mixtral", 3, 1)],
)
def test_runs_equal_the_reference(
    name: str, period: int | str, directions: int, tmp_path: Path
) -> None:
    """The weights to the bit; each loss as that of a dense model in float64."""
    data, model = batches(name, STEPS), tiny(name)
    count = None if period == "never" else int(period)
    twin = Twin(tiny(name), count, directions, torch.float32)
    dense = copy.deepcopy(tiny(name)).double()
    dense.config._experts_implementation = "eager"  # the others have no float64
    settings = SETTINGS | {"directions": directions, "write_back": period, "device": "cpu"}
    path = tmp_path / "journal"
    for zo in run(model, data, path, **settings):
        step = zo.steps - 1
        record = read_journal(path).steps[step]
        passes = [(k, sign) for k in range(directions) for sign in (1, -1)]
        if not record.losses_minus:
            passes = [(k, 1) for k in range(directions)]
        expected = []
        for k, sign in passes:
            with torch.no_grad():
                for parameter, w in zip(
                    dense.parameters(), twin.moved(k, sign).values(), strict=True
                ):
                    parameter.copy_(w)
                expected.append(dense(**data[step]).loss.item())
        plus, minus = record.losses_plus, record.losses_minus
        found = [x for pair in zip(plus, minus, strict=True) for x in pair] if minus else plus
        # Some hundred operations of float32 in a row, relative to losses of about 4.
        assert found == pytest.approx(expected, rel=2e-5)
        twin.append(record.updates)
    twin.fold()  # as `flush` does
    for parameter_name, parameter in model.named_parameters():
        expected_weights = torch.from_numpy(twin.weights[parameter_name])
        assert_same_bits(parameter.data, expected_weights, parameter_name)


@pytest.mark.parametrize(
    ("period", "storage"),
    [(1, None), (3, None), ("never", None), (1, "bf16"), (3, "bf16"), (3, "e4m3"), (3, "split")],
)
@pytest.mark.parametrize("place", PLACES)
def test_the_place_changes_no_bit(place: str, period: int | str, storage: str | None) -> None:
    data = batches("opt", STEPS)
    settings = SETTINGS | {"directions": 2, "write_back": period, "storage": storage}
    expected_model, model = tiny("opt"), tiny("opt")
    expected = whole_run(expected_model, data, device="cpu", **settings)
    assert whole_run(model, data, **settings | PLACES[place]) == expected
    for (name, found), wanted in zip(
        model.named_parameters(), expected_model.parameters(), strict=True
    ):
        assert_same_bits(found.data, wanted.data, name)


@pytest.mark.parametrize("name", ["gpt2", "llama-tied", "mixtral"])
@pytest.mark.parametrize("distribution", ["gaussian", "rademacher"])
def test_other_models_stream(name: str, distribution: str) -> None:
    data = batches(name, 3)
    settings = SETTINGS | {"directions": 2, "distribution": distribution, "write_back": 2}
    expected = whole_run(tiny(name), data, device="cpu", **settings)
    assert whole_run(tiny(name), data, device="simulated", **settings) == expected


@pytest.mark.parametrize(("period", "storage"), [(1, None), (3, "bf16"), ("never", None)])
def test_reading_between_steps_changes_nothing(period: int | str, storage: str | None) -> None:
    data, settings = batches("opt", STEPS), SETTINGS | {"directions": 2, "device": "simulated"}
    settings |= {"write_back": period, "storage": storage}
    expected = whole_run(tiny("opt"), data, **settings)
    model, found, states = tiny("opt"), [], []
    for zo in run(model, data, **settings):
        found.append(losses_of(zo))
        states.append({n: w.clone() for n, w in model.state_dict().items()})
        with torch.no_grad():
            loss = model(**data[0]).loss
        dense = tiny("opt")
        dense.load_state_dict(states[-1])
        with torch.no_grad():
            assert_same_bits(loss, dense(**data[0]).loss)
    assert found == expected


def test_a_unit_that_is_loaded_late_folds_late(tmp_path: Path) -> None:
    """Replaying a journal applies all periods when a unit is first loaded."""
    data, path = batches("opt", STEPS), tmp_path / "journal"
    settings = SETTINGS | {"directions": 2, "write_back": 2, "storage": "bf16", "device": "cpu"}
    model, replayed = tiny("opt"), tiny("opt")
    for _ in run(model, data, path, **settings):
        pass
    content = read_journal(path)
    with zo2ext.offload(replayed, zo2ext.ZOConfig(**settings)) as zo:
        zo.replay(content, until=STEPS)
        zo.flush()
    for (name, found), wanted in zip(replayed.named_parameters(), model.parameters(), strict=True):
        assert_same_bits(found.data, wanted.data, name)


@pytest.mark.parametrize("period", PERIODS)
def test_a_stopped_run_continues_with_the_same_bits(period: int | str, tmp_path: Path) -> None:
    data = batches("opt", STEPS)
    settings = SETTINGS | {"directions": 2, "write_back": period, "device": "cpu"}
    whole, stopped = tiny("opt"), tiny("opt")
    for _ in run(whole, data, tmp_path / "whole", **settings):
        pass
    for zo in run(tiny("opt"), data, tmp_path / "half", **settings):
        if zo.steps == 3:
            break
    for _ in run(stopped, data, tmp_path / "half", **settings):
        pass
    for (name, found), wanted in zip(stopped.named_parameters(), whole.parameters(), strict=True):
        assert_same_bits(found.data, wanted.data, name)


def test_a_journal_names_the_noise_and_the_factored_tensors(tmp_path: Path) -> None:
    for rank in (None, 2):
        model = tiny("opt")
        settings = SETTINGS | {"rank": rank, "device": "cpu"}
        for _ in run(model, batches("opt", 1), tmp_path / str(rank), **settings):
            pass
        header = read_journal(tmp_path / str(rank)).header
        if rank is None:
            assert header["noise"] == 1
            assert "rank" not in header["config"]
            assert "factored" not in header
            continue
        ids = [i for i, p in enumerate(model.parameters()) if is_factored(p.shape, rank)]
        assert (header["noise"], header["config"]["rank"], header["factored"]) == (2, rank, ids)
        assert 0 < len(ids) < len(list(model.parameters()))


def test_directions_take_only_the_memory_of_their_factors() -> None:
    (batch,), taken = batches("opt", 1), []
    for directions in (1, 16):
        model = tiny("opt")
        config = zo2ext.ZOConfig(device="simulated", rank=2, write_back=1, directions=directions)
        with zo2ext.offload(model, config) as zo:
            zo.step(lambda model=model: model(**batch).loss)
            taken.append(zo.device_nbytes)
            places = [p.factors for layout in zo.layouts for p in layout.parts if p.factors]
    largest = max(p.left_numel for p in places) + max(p.right_numel for p in places)
    assert taken[1] - taken[0] == 15 * 4 * largest


class _ReadsAround(nn.Module):
    """Reads a parameter in a way that no hook sees."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(64, 64)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.linear(x)
        return (x @ dict(self.linear.named_parameters())["weight"]).sum()


def test_a_parameter_that_is_read_around_its_module_is_refused() -> None:
    model = _ReadsAround()
    with (
        zo2ext.offload(model, zo2ext.ZOConfig(rank=1, device="cpu")) as zo,
        pytest.raises(zo2ext.UnsupportedModel, match=r"linear.weight .*rank=None"),
    ):
        zo.step(lambda: model(torch.ones(2, 64)))


class _UsesLate(nn.Module):
    """Uses a weight after other modules have run, from a variable."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.layers = nn.ModuleList(nn.Linear(64, 64) for _ in range(5))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        first = self.layers[0].weight
        for layer in self.layers[1:]:
            x = torch.tanh(layer(x))
        return (x @ first.t()).square().mean()


def test_a_weight_that_is_used_late_is_kept_loaded() -> None:
    losses = []
    for place in ({"resident": "all"}, {"slots": 2, "granularity": "module"}):
        model, x = _UsesLate(), torch.ones(2, 64)
        config = zo2ext.ZOConfig(rank=1, device="simulated", lr=1e-2, **place)
        with zo2ext.offload(model, config) as zo:
            for _ in range(3):
                zo.step(lambda model=model, x=x: model(x))
                losses.append(losses_of(zo))
    assert losses[:3] == losses[3:]


def test_compiled_models_are_refused() -> None:
    model = tiny("opt")
    zo2ext.compile_blocks(model)
    (batch,) = batches("opt", 1)
    with (
        zo2ext.offload(model, zo2ext.ZOConfig(rank=1, device="cpu")) as zo,
        pytest.raises(zo2ext.UnsupportedModel, match="compiled"),
    ):
        zo.step(lambda: model(**batch).loss)


@pytest.mark.parametrize("rank", [0, -1, 65, 1.5, "many", True])
def test_a_wrong_rank_is_refused(rank: Any) -> None:
    with pytest.raises(zo2ext.UserError, match="rank must be an integer from 1 to 64"):
        zo2ext.ZOConfig(rank=rank)
