"""Objects that a forward changes belong to its pass alone."""

from __future__ import annotations

import functools
import logging
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import reference
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.utils import parametrize
from torch.overrides import TorchFunctionMode

import zo2ext

SETTINGS = {"lr": 1e-2, "eps": 1e-2, "seed": 5}
DATA = [torch.linspace(-1, 1, 12).view(3, 4) * (k + 1) for k in range(3)]

Loss = Callable[[nn.Module, Tensor], Tensor]


class Net(nn.Module):
    """Three layers, each of which is a unit of its own."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = torch.tanh(layer(x))
        return x


def square(model: nn.Module, x: Tensor) -> Tensor:
    return model(x).square().mean()


def assert_equals_plain(make: Callable[[], nn.Module], loss: Loss = square) -> None:
    """All passes start from the same state, so the reference starts each with a new model."""
    plain = reference.mezo(make(), [{"x": x} for x in DATA], loss=lambda m, b: loss(m, b["x"]),
                           **SETTINGS)  # fmt: skip
    model = make()
    with zo2ext.offload(model, zo2ext.ZOConfig(device="simulated", **SETTINGS)) as zo:
        for step, x in enumerate(DATA):
            zo.step(lambda x=x: loss(model, x))
            assert zo.last is not None
            assert (zo.last.losses_plus[0], zo.last.losses_minus[0]) == plain.losses[step][0]


# 1. attributes


class KeepsLoss(Net):
    """As routers keep their auxiliary losses."""

    def forward(self, x: Tensor) -> Tensor:
        self.first = self.layers[0](x)
        for layer in (*self.layers[1:], self.layers[0]):
            x = torch.tanh(layer(x))
        return x + self.first.square().mean()


class KeepsInList(Net):
    def __init__(self) -> None:
        super().__init__()
        self.kept: list[Tensor] = []

    def forward(self, x: Tensor) -> Tensor:
        self.kept.clear()
        for layer in self.layers:
            x = torch.tanh(layer(x))
            self.kept.append(x)
        return torch.stack(self.kept).sum(0)


class CreatesItsList(Net):
    """In the first pass ever; later ones find it."""

    def forward(self, x: Tensor) -> Tensor:
        if not hasattr(self, "kept"):
            self.kept: dict[str, list[Tensor]] = {"all": []}
        self.kept["all"][:] = []
        for layer in self.layers:
            x = torch.tanh(layer(x))
            self.kept["all"].append(x)
        return torch.stack(self.kept["all"]).sum(0)


class Settings:
    scale = 1.0


class SwitchesSettings(Net):
    """In an object that several modules have, as transformers' configs are."""

    def __init__(self) -> None:
        super().__init__()
        self.settings = Settings()

    def forward(self, x: Tensor) -> Tensor:
        self.settings.scale = 1.0
        x = self.layers[0](x)
        self.settings.scale += float(x.sum())
        return self.layers[2](self.layers[1](x) * self.settings.scale)


class Notes:
    total: Any = 0.0


class NotesInside(nn.Module):
    """An object of a module that is neither the model nor in a list of it."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.outer, self.notes = nn.Linear(4, 4), nn.Linear(4, 4), Notes()

    def forward(self, x: Tensor) -> Tensor:
        self.notes.total = self.inner(x).sum()
        return self.outer(x) + self.notes.total


class HasNotes(Net):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([nn.Sequential(NotesInside()), NotesInside()])

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return super().forward(x)


class ReplacesModules(Net):
    """Early exit, as it is written with ``model.layers = model.layers[:k]``."""

    def forward(self, x: Tensor) -> Tensor:
        whole = self.layers
        out = super().forward(x)
        self.layers = whole[:2]
        try:
            return out + super().forward(x)
        finally:
            self.layers = whole


class Doubled(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * x


class Parametrizes(Net):
    """As PEFT does with the weights of fused experts."""

    def forward(self, x: Tensor) -> Tensor:
        layer = self.layers[1]
        parametrize.register_parametrization(layer, "bias", Doubled())
        try:
            return super().forward(x)
        finally:
            parametrize.remove_parametrizations(layer, "bias", leave_parametrized=False)


class WritesBuffer(Net):
    """In place, and reads it after other modules have run."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("memory", torch.zeros(3, 4))
        self.memory: Tensor

    def forward(self, x: Tensor) -> Tensor:
        self.memory.copy_(self.layers[0](x))
        return self.layers[2](self.layers[1](x)) + self.memory


class DrawsFromPython(Net):
    def forward(self, x: Tensor) -> Tensor:
        random.seed(4)
        for layer in self.layers:
            x = layer(x) * random.gauss(1, 1)
        return x


class DrawsFromNumPy(Net):
    def forward(self, x: Tensor) -> Tensor:
        np.random.seed(4)
        for layer in self.layers:
            x = layer(x) * float(np.random.standard_normal())
        return x


MODELS = [KeepsLoss, KeepsInList, CreatesItsList, SwitchesSettings, ReplacesModules]
MODELS.extend([HasNotes, Parametrizes, WritesBuffer, DrawsFromPython, DrawsFromNumPy])


@pytest.mark.parametrize("make", MODELS)
def test_each_pass_has_its_own(make: Callable[[], nn.Module]) -> None:
    assert_equals_plain(make)


def test_a_context_of_the_closure() -> None:
    """As ``disable_adapter``: an attribute is switched around a whole forward."""

    class Switched(Net):
        disabled = False

        def forward(self, x: Tensor) -> Tensor:
            for layer in self.layers:
                x = torch.tanh(layer(x)) * (0.5 if self.disabled else 1)
            return x

    @contextmanager
    def disable(model: Any) -> Iterator[None]:
        model.disabled = True
        try:
            yield
        finally:
            model.disabled = False

    def loss(model: nn.Module, x: Tensor) -> Tensor:
        with disable(model):
            base = model(x)
        return (model(x) - base).square().mean()

    assert_equals_plain(Switched, loss)


def inference_mode() -> Any:
    return torch.inference_mode()


def math_attention() -> Any:
    return sdpa_kernel(SDPBackend.MATH)


def plain_convolutions() -> Any:
    return torch.backends.cudnn.flags(enabled=False)


@contextmanager
def double_precision() -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def on_meta() -> Any:
    return torch.device("meta")


@pytest.mark.parametrize(
    "context", [inference_mode, math_attention, plain_convolutions, double_precision, on_meta]
)
def test_a_context_that_a_closure_enters_is_its_own(context: Callable[[], Any]) -> None:
    """Passes enter and leave it in turn, which must not mix up what it restores."""

    def settings() -> tuple[Any, ...]:
        flags = torch.backends.cudnn.enabled, torch.backends.cuda.flash_sdp_enabled()
        return (
            *flags,
            torch.is_inference_mode_enabled(),
            torch.empty(1).dtype,
            torch.empty(1).device,
        )

    model = Net()
    before, seen = settings(), []
    with context():
        inside = settings()
    assert before != inside

    def loss() -> Tensor:
        x = model.layers[0](DATA[0])
        seen.append(settings())
        with context():
            y = model.layers[1](DATA[1])
            seen.append(settings())
            y = y + model.layers[2](DATA[2])
            seen.append(settings())
        z = model.layers[0](x)
        seen.append(settings())
        return (z + y).square().mean()

    with zo2ext.offload(
        model, zo2ext.ZOConfig(lr=1e-2, device="cpu", directions=2, estimator="two_sided")
    ) as zo:
        zo.step(loss)
        seen.clear()
        zo.step(loss)
        assert seen.count(before) == seen.count(inside) == 8
        assert settings() == before


class PlainMode(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


def saved_tensors() -> Any:
    return torch.autograd.graph.saved_tensors_hooks(lambda x: x, lambda x: x)


@pytest.mark.parametrize("context", [PlainMode, saved_tensors])
def test_a_pass_that_fails_inside_a_context(context: Callable[[], Any]) -> None:
    """The others are unwound inside theirs; its own error is what comes out."""
    model, calls = Net(), 0

    def loss(fails: bool) -> Tensor:
        nonlocal calls
        with context():
            x = model.layers[1](model.layers[0](DATA[0]))
            calls += 1
            if fails and calls > 1:
                raise ValueError("broken loss")
            return model.layers[2](x).mean()

    with zo2ext.offload(model, zo2ext.ZOConfig(lr=0.0, device="cpu")) as zo, torch.no_grad():
        expected = zo.step(lambda: loss(False))
        calls = 0
        with pytest.raises(ValueError, match="broken loss"):
            zo.step(lambda: loss(True))
        assert not model(DATA[0]).isnan().any()
        assert zo.step(lambda: loss(False)) != expected  # another direction
        assert zo.steps == 2


def test_a_pass_that_calls_the_model_while_it_is_unwound() -> None:
    model = Net()

    def loss(fails: bool) -> Tensor:
        try:
            x = model.layers[1](model.layers[0](DATA[0]))
            if fails:
                raise ValueError("broken loss")
            return x.mean()
        finally:
            model.layers[2](DATA[0])

    with zo2ext.offload(model, zo2ext.ZOConfig(device="cpu")) as zo:
        with pytest.raises(ValueError, match="broken loss"):
            zo.step(lambda: loss(True))
        zo.step(lambda: loss(False))


def test_torchs_newer_setting_of_precision_may_be_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends, "fp32_precision", "tf32")
    model = Net()
    with zo2ext.offload(model, zo2ext.ZOConfig(device="cpu")) as zo:
        zo.step(lambda: square(model, DATA[0]))


# 2. hooks


class Collector:
    def __init__(self) -> None:
        self.seen: list[Tensor] = []

    def collect(self, module: nn.Module, args: Any, output: Tensor) -> None:
        self.seen.append(output)


def into_list() -> tuple[Any, Callable[[], list[Tensor]]]:
    seen: list[Tensor] = []
    return lambda module, args, output: seen.append(output), lambda: seen


def into_object() -> tuple[Any, Callable[[], list[Tensor]]]:
    collector = Collector()
    return collector.collect, lambda: collector.seen


def into_partial() -> tuple[Any, Callable[[], list[Tensor]]]:
    seen: list[Tensor] = []

    def collect(into: list[Tensor], module: nn.Module, args: Any, output: Tensor) -> None:
        into.append(output)

    return functools.partial(collect, seen), lambda: seen


def into_variable() -> tuple[Any, Callable[[], list[Tensor]]]:
    seen: tuple[Tensor, ...] = ()

    def collect(module: nn.Module, args: Any, output: Tensor) -> None:
        nonlocal seen
        seen = (*seen, output)

    return collect, lambda: list(seen)


@pytest.mark.parametrize("kind", [into_list, into_object, into_partial, into_variable])
def test_hooks_that_keep_activations(
    kind: Callable[[], tuple[Any, Callable[[], list[Tensor]]]],
) -> None:
    kept: dict[nn.Module, Callable[[], list[Tensor]]] = {}

    def make() -> nn.Module:
        model = Net()
        hook, kept[model] = kind()
        for layer in model.layers:
            layer.register_forward_hook(hook)
        return model

    def loss(model: nn.Module, x: Tensor) -> Tensor:
        out = model(x)
        return out.square().mean() + sum(a.abs().mean() for a in kept[model]()[-3:])

    assert_equals_plain(make, loss)


GLOBAL: list[Tensor] = []


def test_what_cannot_be_kept_apart_is_refused() -> None:
    model = Net()
    for layer in model.layers:
        layer.register_forward_hook(lambda module, args, output: GLOBAL.append(output))

    def loss() -> Tensor:
        GLOBAL.clear()
        return model(DATA[0]).mean() + torch.stack(GLOBAL).square().sum()

    with (
        zo2ext.offload(model, zo2ext.ZOConfig(device="cpu")) as zo,
        pytest.raises(zo2ext.UnsupportedModel, match=r"in the loss function.*a list that a hook"),
    ):
        zo.step(loss)
    GLOBAL.clear()


class KeepsOutside(Net):
    def forward(self, x: Tensor) -> Tensor:
        GLOBAL[:] = [self.layers[0](x)]
        return self.layers[2](self.layers[1](x) + GLOBAL[0])


def test_a_refusal_names_the_first_module_that_differs() -> None:
    model = nn.Sequential(nn.Linear(4, 4), KeepsOutside(), nn.Linear(4, 4))
    with (
        zo2ext.offload(model, zo2ext.ZOConfig(device="cpu")) as zo,
        pytest.raises(zo2ext.UnsupportedModel, match=r"in module '1.layers.2'"),
    ):
        zo.step(lambda: model(DATA[0]).mean())
    GLOBAL.clear()


def test_a_loss_that_is_never_the_same_is_warned_about(caplog: pytest.LogCaptureFixture) -> None:
    model, batches = Net(), iter(torch.arange(400.0).view(100, 1, 4) / 400)
    with (
        zo2ext.offload(model, zo2ext.ZOConfig(device="cpu")) as zo,
        caplog.at_level(logging.WARNING, logger="zo2ext"),
    ):
        zo.step(lambda: model(next(batches)).mean())
    assert "the loss differs from call to call with the same weights" in caplog.text


# 3. before and after a step


class Counts(Net):
    def __init__(self) -> None:
        super().__init__()
        self.calls, self.fail = 0, False

    def forward(self, x: Tensor) -> Tensor:
        x = self.layers[0](x)
        self.calls += 1
        x = self.layers[1](x)
        if self.fail:
            raise RuntimeError("broken model")
        return self.layers[2](x)


def test_after_a_step_what_one_pass_left_is_there() -> None:
    model = Counts()
    with zo2ext.offload(model, zo2ext.ZOConfig(device="cpu", directions=3)) as zo:
        for step in range(3):
            zo.step([lambda x=x: square(model, x) for x in DATA])
            assert model.calls == step + 1
        model.fail = True
        with pytest.raises(RuntimeError, match="broken model"):
            zo.step(lambda: square(model, DATA[0]))
        assert model.calls == 3


def test_a_failing_first_step_leaves_everything_as_it_was() -> None:
    class Fails(Counts):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.BatchNorm1d(4)

        def forward(self, x: Tensor) -> Tensor:
            return super().forward(self.norm(x))

    model = Fails()
    model.fail = True
    with zo2ext.offload(model.train(), zo2ext.ZOConfig(device="cpu")) as zo:
        with pytest.raises(RuntimeError, match="broken model"):
            zo.step(lambda: square(model, DATA[0]))
        assert model.calls == 0
        assert int(model.norm.num_batches_tracked) == 0
        assert torch.equal(model.norm.running_mean, torch.zeros(4))


def test_a_batch_norm_sees_all_passes_as_in_sequence() -> None:
    def make() -> nn.Module:
        torch.manual_seed(1)
        layers = [nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Linear(4, 4)]
        return nn.Sequential(*layers, nn.BatchNorm1d(4)).train()

    plain = make()
    reference.mezo(plain, [{"x": x} for x in DATA], loss=lambda m, b: square(m, b["x"]), **SETTINGS)
    model = make()
    with zo2ext.offload(model, zo2ext.ZOConfig(device="simulated", **SETTINGS)) as zo:
        for x in DATA:
            zo.step(lambda x=x: square(model, x))
    for (name, expected), (_, found) in zip(
        plain.named_buffers(), model.named_buffers(), strict=True
    ):
        assert torch.equal(expected, found), name


@pytest.mark.parametrize("draw", [random.random, np.random.random_sample])
def test_generators_that_are_used_from_a_later_step_on(draw: Callable[[], float]) -> None:
    """As SpecAugment does once a schedule switches it on."""
    model, seen = Net(), []

    def loss(step: int) -> Tensor:
        x = model.layers[0](DATA[0])
        noise = draw() if step > 1 else 0.0
        seen.append((step, noise))
        return (model.layers[1](x) + noise).square().mean() + 0 * model.layers[2](x).mean()

    random.seed(1)
    np.random.seed(1)
    expected = [draw(), draw()]
    random.seed(1)
    np.random.seed(1)
    with zo2ext.offload(model, zo2ext.ZOConfig(device="cpu")) as zo:
        for step in range(4):
            zo.step(lambda step=step: loss(step))
    # Passes of step 2 run twice: only the first time shows that they draw numbers.
    assert [noise for step, noise in seen if step == 2][-2:] == [expected[0]] * 2
    assert [noise for step, noise in seen if step == 3] == [expected[1]] * 2
