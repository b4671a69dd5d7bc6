"""The engine from its user's side: what it accepts, refuses, reports and leaves behind."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import reference
import torch
from numeric import assert_same_bits
from tiny_models import batches, tiny
from torch import Tensor, nn

import zo2ext
from zo2ext.engine.engine import ZOEngine
from zo2ext.streaming.devices.simulated import SimulatedDevice

SETTINGS = {"lr": 1e-2, "eps": 1e-3, "seed": 5}


def config(**changes: Any) -> zo2ext.ZOConfig:
    return zo2ext.ZOConfig(**{"device": "simulated", **SETTINGS, **changes})


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {n: p.data.clone() for n, p in model.named_parameters()}


# -- settings


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("eps", 0.0),
        ("eps", -1e-3),
        ("eps", math.nan),
        ("eps", "1e-3"),
        ("lr", math.nan),
        ("lr", math.inf),
        ("lr", -1.0),
        ("weight_decay", -0.1),
        ("directions", 0),
        ("directions", 1.5),
        ("directions", True),
        ("seed", -1),
        ("seed", 2**64),
        ("write_back", 0),
        ("slots", 1),
        ("one_copy", 1),
        ("distribution", "uniform"),
        ("rounding", "up"),
        ("granularity", "layer"),
        ("storage", torch.int8),
        ("compute_dtype", torch.float64),
        ("resident", -1),
        ("resident", "8 gigs"),
        ("device", 3),
    ],
)
def test_wrong_settings_are_refused_by_name(name: str, value: Any) -> None:
    with pytest.raises(ValueError, match=rf"^{name} must be .*{str(value)[:4]}"):
        zo2ext.ZOConfig(**{name: value})


def test_settings_are_positional_nowhere_and_unknown_ones_refused() -> None:
    with pytest.raises(TypeError):
        zo2ext.ZOConfig(1e-3)  # type: ignore[misc]
    with pytest.raises(TypeError, match="momentum"):
        zo2ext.ZOConfig(momentum=0.9)  # type: ignore[call-arg]


@pytest.mark.parametrize("device", ["tpu", "gpu0", "meta"])
def test_unknown_devices_are_refused(device: str) -> None:
    with pytest.raises(ValueError, match=f"device must be .*{device}"):
        zo2ext.offload(tiny("opt"), config(device=device))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there_is_said_to_be_missing() -> None:
    with pytest.raises(ValueError, match="no CUDA GPU; use device='cpu'"):
        zo2ext.offload(tiny("opt"), config(device="cuda"))


def test_every_setting_is_documented() -> None:
    documented = zo2ext.ZOConfig.__doc__ or ""
    for field in zo2ext.ZOConfig.__dataclass_fields__:
        assert re.search(rf"^        {field}: \w.{{10}}", documented, re.MULTILINE)


# -- models that cannot be taken


def test_models_without_trainable_parameters_are_refused() -> None:
    with pytest.raises(ValueError, match="no trainable parameter"):
        zo2ext.offload(tiny("opt").requires_grad_(False), config())
    model = tiny("opt").requires_grad_(False)
    expected = model(**batches("opt", 1)[0]).loss
    with zo2ext.offload(model, config(), train=False) as zo:
        assert torch.equal(model(**batches("opt", 1)[0]).loss, expected)
        with pytest.raises(ValueError, match="no trainable parameter"):
            zo.step(lambda: model(**batches("opt", 1)[0]).loss)
    with pytest.raises(TypeError, match=r"model must be a torch\.nn\.Module, got dict"):
        zo2ext.offload({}, config())  # type: ignore[arg-type]


def test_meta_tensors_are_refused_by_name() -> None:
    model = nn.Linear(4, 4)
    model.bias = nn.Parameter(torch.empty(4, device="meta"))
    with pytest.raises(ValueError, match="parameter bias is on the meta device"):
        zo2ext.offload(model, config())


def test_weights_that_cannot_be_perturbed_are_refused_by_name() -> None:
    for dtype in (torch.float64, torch.float8_e4m3fn):
        model = nn.Linear(4, 4)
        model.weight = nn.Parameter(torch.zeros(4, 4).to(dtype))
        with pytest.raises(TypeError, match=r"parameter weight is torch\.float"):
            zo2ext.offload(model, config())


class Quantised(nn.Module):
    """A frozen int8 weight with a trainable scale, as low-bit linear layers have them."""

    def __init__(self) -> None:
        super().__init__()
        values = torch.arange(-8, 8, dtype=torch.int8).view(4, 4)
        self.weight = nn.Parameter(values, requires_grad=False)
        self.scale = nn.Parameter(torch.full((4,), 0.1))

    def forward(self, x: Tensor) -> Tensor:
        return x @ (self.weight.float() * self.scale)


def test_frozen_integer_weights_travel_as_they_are() -> None:
    model, plain = Quantised(), Quantised()
    data = [{"x": torch.randn(3, 4)} for _ in range(4)]
    expected = reference.mezo(plain, data, loss=lambda m, b: m(**b).square().mean(), **SETTINGS)
    with zo2ext.offload(model, config()) as zo:
        for batch in data:
            zo.step(lambda batch=batch: model(**batch).square().mean())
    assert_same_bits(model.scale.data, expected.weights["scale"])
    assert_same_bits(model.weight.data, Quantised().weight.data)


def test_a_model_is_taken_once() -> None:
    model = tiny("opt")
    with (
        zo2ext.offload(model, config()),
        pytest.raises(ValueError, match="offloaded already"),
    ):
        zo2ext.offload(model, config())
    zo2ext.offload(model, config()).close()


# -- steps


def test_any_scalar_can_be_the_loss() -> None:
    """Accuracy, a number without a gradient: the step climbs what the closure returns."""
    torch.manual_seed(1)
    x = torch.randn(256, 8)
    y = (x[:, 0] > 0).long()
    model = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 2))

    def errors() -> float:
        return float((model(x).argmax(1) != y).sum()) / len(y)

    with zo2ext.offload(model, config(lr=5e-2, eps=0.1, directions=4)) as zo:
        losses = [zo.step(errors) for _ in range(100)]
    assert losses[0] > 0.3
    assert sum(losses[-5:]) / 5 < 0.15


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (1.5, 1.5),
        (torch.tensor([1.5]), 1.5),
        (np.float64(1.5), 1.5),
        (np.float32(1.5), 1.5),
        (np.float16(1.5), 1.5),
        (np.int64(3), 3.0),
        (np.array(1.5), 1.5),
        (np.array([1.5], dtype=np.float32), 1.5),
    ],
    ids=lambda value: f"{type(value).__name__}-{getattr(value, 'dtype', '')}",
)
def test_a_scalar_of_any_kind_is_a_loss(value: Any, expected: float) -> None:
    model = nn.Linear(4, 4)
    with zo2ext.offload(model, config()) as zo:
        assert zo.step(lambda: (model(torch.ones(1, 4)), value)[1]) == expected


SHAPE, KIND = "loss must be a scalar, got", "loss must be a tensor or a number, got"


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (torch.zeros(3), SHAPE),
        ("low", KIND),
        (None, KIND),
        ((0.1, 0.2), KIND),
        (np.ones(2), KIND),
        (np.str_("1.5"), KIND),
        (np.complex64(1), KIND),
    ],
)
def test_what_is_no_scalar_is_refused(value: Any, message: str) -> None:
    model = tiny("opt")
    before = weights(model)
    with zo2ext.offload(model, config()) as zo, pytest.raises(zo2ext.UserError, match=message):
        zo.step(lambda: value)
    for name, tensor in weights(model).items():
        assert_same_bits(tensor, before[name], name)


def test_each_step_keeps_its_own_learning_rate() -> None:
    rates = [1e-2, 0.0, 3e-3, 1e-4]
    model, data = tiny("llama"), batches("llama", 4)
    settings = {k: v for k, v in SETTINGS.items() if k != "lr"} | {"weight_decay": 0.3}
    expected = reference.mezo(tiny("llama"), data, lr=lambda step: rates[step], **settings)
    with zo2ext.offload(model, config(weight_decay=0.3, write_back=3)) as zo:
        for batch, lr in zip(data, rates, strict=True):
            zo.step(lambda batch=batch: model(**batch).loss, lr=lr)
    for name, tensor in weights(model).items():
        assert_same_bits(tensor, expected.weights[name], name)


@pytest.mark.parametrize("lr", [math.nan, math.inf, -1e-3])
def test_wrong_learning_rates_are_refused(lr: float) -> None:
    model = tiny("opt")
    with zo2ext.offload(model, config()) as zo, pytest.raises(ValueError, match="lr must be"):
        zo.step(lambda: 0.0, lr=lr)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_steps_with_losses_that_are_not_finite_are_skipped(
    bad: float, caplog: pytest.LogCaptureFixture
) -> None:
    model, data = tiny("opt"), batches("opt", 5)

    def loss(model: Any, batch: dict[str, Any]) -> Tensor:
        value: Tensor = model(**batch).loss
        return value * bad if torch.equal(batch["input_ids"], data[2]["input_ids"]) else value

    expected = reference.mezo(tiny("opt"), data, loss=loss, **SETTINGS)
    with zo2ext.offload(model, config()) as zo:
        for batch in data:
            zo.step(lambda batch=batch: loss(model, batch))
            assert zo.last is not None
            assert zo.last.skipped == (batch is data[2])
        assert zo.skipped == 1
        assert zo.steps == 5
    assert "step 2 is skipped" in caplog.text
    for name, tensor in weights(model).items():
        assert_same_bits(tensor, expected.weights[name], name)


def test_a_step_whose_update_overflows_is_skipped() -> None:
    model, data = tiny("opt"), batches("opt", 3)

    def loss(model: Any, batch: dict[str, Any]) -> Tensor:
        value: Tensor = model(**batch).loss
        return value * 1e37 if torch.equal(batch["input_ids"], data[1]["input_ids"]) else value

    expected = reference.mezo(tiny("opt"), data, loss=loss, **{**SETTINGS, "lr": 1e3})
    with zo2ext.offload(model, config(lr=1e3)) as zo:
        for batch in data:
            zo.step(lambda batch=batch: loss(model, batch))
        assert zo.skipped == 1
    for name, tensor in weights(model).items():
        assert_same_bits(tensor, expected.weights[name], name)


def test_the_record_of_a_step() -> None:
    model = tiny("opt")
    (batch,) = batches("opt", 1)
    with zo2ext.offload(model, config(directions=2, estimator="two_sided")) as zo:
        assert zo.last is None
        loss = zo.step(lambda: model(**batch).loss)
        record = zo.last
        assert record is not None
    assert len(record.losses_plus) == len(record.losses_minus) == 2
    assert loss == record.loss == sum(record.losses_plus + record.losses_minus) / 4
    for plus, minus, grad in zip(
        record.losses_plus, record.losses_minus, record.projected_grads, strict=True
    ):
        assert grad == (plus - minus) / 2e-3
    assert (record.step, record.lr, record.skipped) == (0, 1e-2, False)


def test_steps_inside_steps_are_refused() -> None:
    model = tiny("opt")
    with zo2ext.offload(model, config()) as zo, pytest.raises(RuntimeError, match="is running"):
        zo.step(lambda: zo.step(lambda: 0.0))


# -- after the run


@pytest.mark.parametrize("storage", [None, torch.bfloat16])
def test_closing_leaves_an_ordinary_model(storage: torch.dtype | None) -> None:
    model, data = tiny("llama-tied"), batches("llama-tied", 3)
    kind = type(model.model.embed_tokens)
    zo = zo2ext.offload(model, config(storage=storage))
    for batch in data:
        zo.step(lambda batch=batch: model(**batch).loss)
    zo.close()
    zo.close()
    assert type(model.model.embed_tokens) is kind
    assert model.lm_head.weight is model.model.embed_tokens.weight
    for module in model.modules():
        assert type(module._parameters) is dict
        assert not module._forward_pre_hooks
        assert not module._forward_hooks
        assert not module._state_dict_pre_hooks
        assert not module._state_dict_hooks
    model(**data[0]).loss.backward()
    assert model.lm_head.weight.grad is not None
    with pytest.raises(RuntimeError, match="closed"):
        zo.step(lambda: 0.0)


def test_flushing_early_changes_no_bit() -> None:
    finals = []
    for flushes in (False, True):
        model = tiny("opt").to(torch.bfloat16)
        with zo2ext.offload(model, config()) as zo:
            for batch in batches("opt", 5):
                zo.step(lambda batch=batch: model(**batch).loss)
                if flushes:
                    zo.flush()
        finals.append(weights(model))
    for name in finals[0]:
        assert_same_bits(finals[1][name], finals[0][name], name)


def test_host_memory_is_the_weights(tmp_path: Path) -> None:
    model = tiny("llama", hidden_size=256, intermediate_size=1024, vocab_size=1000)
    nbytes = sum(p.nbytes for p in model.parameters())
    with zo2ext.offload(model, config()) as zo:
        assert nbytes <= zo.host_nbytes <= 1.02 * nbytes
        largest = max(layout.nbytes for layout in zo.layouts)
        assert zo.device_nbytes <= 3 * largest + 2 * largest
    with zo2ext.offload(model, config(granularity="module", slots=2)) as zo:
        smaller = max(layout.nbytes for layout in zo.layouts)
        assert smaller < largest
        assert zo.device_nbytes <= 4 * smaller


def test_host_memory_never_holds_the_weights_twice() -> None:
    """Page-locked memory is taken at once, so it may not be locked before weights are dropped."""
    model = tiny("llama", hidden_size=128, intermediate_size=512)
    total = sum(p.nbytes for p in model.parameters())
    peaks: list[int] = []

    class Locking(SimulatedDevice):
        locked = 0

        def register(self, memory: Tensor) -> Callable[[], None]:
            self.locked += memory.nbytes
            own = sum(p.untyped_storage().nbytes() for p in model.parameters())
            peaks.append(self.locked + own)
            return lambda: self._unlock(memory.nbytes)

        def _unlock(self, nbytes: int) -> None:
            self.locked -= nbytes

    device = Locking()
    engine = ZOEngine(model, config(), device)
    assert max(peaks) <= 1.1 * total
    assert device.locked >= total
    engine.close()
    assert device.locked == 0


def test_too_little_device_memory_says_what_takes_it() -> None:
    model = tiny("opt")
    before = weights(model)
    with pytest.raises(zo2ext.OutOfDeviceMemory) as caught:
        ZOEngine(model, config(resident=2), SimulatedDevice(capacity=2000))
    message = str(caught.value)
    for expected in ("largest unit", "slots", "weight copies", "granularity='module'", "resident"):
        assert expected in message
    for name, tensor in weights(model).items():
        assert_same_bits(tensor, before[name], f"{name} after the refusal")


def test_running_out_of_memory_in_a_step() -> None:
    model = tiny("opt")

    def greedy() -> Tensor:
        raise torch.OutOfMemoryError("tried to allocate 20 GiB of activations")

    with (
        zo2ext.offload(model, config()) as zo,
        pytest.raises(zo2ext.OutOfDeviceMemory, match="20 GiB of activations") as caught,
    ):
        zo.step(greedy)
    for advice in ("zo2ext.chunk_loss(model)", "model.config.use_cache = False"):
        assert advice in str(caught.value)
        assert advice not in str(refused_of_a_thrifty_model())


def refused_of_a_thrifty_model() -> zo2ext.OutOfDeviceMemory:
    model: Any = tiny("opt")
    zo2ext.chunk_loss(model)
    model.config.use_cache = False
    with pytest.raises(zo2ext.OutOfDeviceMemory) as caught:
        ZOEngine(model, zo2ext.ZOConfig(), SimulatedDevice(capacity=2000))
    return caught.value


def test_direction_keys() -> None:
    keys = {zo2ext.direction_key(3, step, k) for step in range(50) for k in range(3)}
    assert len(keys) == 150
    assert zo2ext.direction_key(3, 7, 1) == reference.direction_key(3, 7, 1)


# -- several micro-batches, stopping and resuming


def test_micro_batches_are_summed_and_share_each_load() -> None:
    data = [batches("llama", 3, size=1 + step) for step in range(4)]

    def summed(model: nn.Module, micro: dict[int, Any]) -> Tensor:
        return sum(model(**batch).loss.double() for batch in micro.values())  # type: ignore[return-value]

    expected = reference.mezo(
        tiny("llama"), [dict(enumerate(micro)) for micro in data], loss=summed, **SETTINGS
    )
    model = tiny("llama")
    uploads = []
    with zo2ext.offload(model, config()) as zo:
        for micro in data:
            zo.step([lambda batch=batch: model(**batch).loss for batch in micro])
            uploads.append(zo.traffic.uploaded)
        with pytest.raises(ValueError, match="loss must be a function or several, got an empty"):
            zo.step([])
    for name, weights in expected.weights.items():
        assert_same_bits(model.get_parameter(name).data, weights, name)
    assert uploads[3] - uploads[2] <= 1.01 * zo.host_nbytes


@pytest.mark.parametrize(
    "dtypes",
    [
        {},
        {"storage": torch.bfloat16, "write_back": 3},
        {"storage": torch.bfloat16, "write_back": "never"},
        {"compute_dtype": torch.bfloat16},
        {"storage": torch.bfloat16, "compute_dtype": torch.float16},
        {"storage": "e4m3", "compute_dtype": torch.bfloat16},
        {"storage": "split", "write_back": 3},
    ],
    ids=str,
)
def test_resuming_continues_to_the_same_bits(dtypes: dict[str, Any]) -> None:
    data = batches("opt", 7)
    settings = config(**dtypes)

    def steps(zo: zo2ext.ZOEngine, model: nn.Module, part: list[Any]) -> None:
        for batch in part:
            zo.step(lambda: model(**batch).loss)

    whole, resumed = tiny("opt"), tiny("opt", seed=5)
    with zo2ext.offload(whole, settings) as zo:
        steps(zo, whole, data[:4])
        masters = {name: tensor.clone() for name, tensor in zo.exact_weights().items()}
        pending = zo.pending()
        state = {name: tensor.clone() for name, tensor in whole.state_dict().items()}
        steps(zo, whole, data[4:])
    assert bool(masters) == ("compute_dtype" in dtypes or "write_back" in dtypes)
    assert len(pending) == {1: 0, 3: 1, "never": 4}[zo.config.write_back]

    with zo2ext.offload(resumed, settings) as zo:
        steps(zo, resumed, data[:2])
        resumed.load_state_dict(state)
        zo.resume(steps=4, exact_weights=masters, pending=pending)
        steps(zo, resumed, data[4:])
        assert zo.steps == 7
    for name, parameter in whole.named_parameters():
        assert_same_bits(resumed.get_parameter(name).data, parameter.data, name)


def test_resuming_with_other_weights_is_refused() -> None:
    with zo2ext.offload(tiny("opt"), config(compute_dtype=torch.bfloat16)) as zo:
        masters = zo.exact_weights()
        masters["other"] = torch.zeros(3)
        with pytest.raises(ValueError, match=r"names, shapes and dtypes of \d+ .* differ in other"):
            zo.resume(steps=1, exact_weights=masters)
        with pytest.raises(ValueError, match="0 <= skipped <= steps must hold, got 3 and 2"):
            zo.resume(steps=2, skipped=3)


@pytest.mark.parametrize("write_back", [1, 4, "never"])
@pytest.mark.parametrize("frozen", [False, True], ids=["all", "adapter-like"])
def test_bytes_moved_are_those_of_the_formula(write_back: int | str, frozen: bool) -> None:
    """Up: every slab, each step. Down: what is trained, every `write_back`-th step."""
    model = tiny("opt-untied")
    if frozen:
        for name, parameter in model.named_parameters():
            parameter.requires_grad_("fc1" in name)
    data, moved = batches("opt-untied", 12), []
    settings = config(write_back=write_back, storage=torch.bfloat16)
    with zo2ext.offload(model, settings) as zo:
        for batch in data:
            zo.step(lambda batch=batch: model(**batch).loss)
            moved.append((zo.traffic.uploaded, zo.traffic.offloaded))
        trained = sum(layout.trainable_nbytes for layout in zo.layouts)
        up, down = (moved[11][i] - moved[3][i] for i in (0, 1))
        # What is uploaded ahead of a step differs from step to step.
        assert abs(up - 8 * zo.host_nbytes) <= zo._pipeline.device_nbytes
        assert down == {1: 8, 4: 2, "never": 0}[write_back] * trained


def test_one_copy_takes_half_the_memory_for_copies_and_a_pass_more() -> None:
    sizes, losses = [], []
    for one_copy in (False, True):
        model = tiny("opt")
        with zo2ext.offload(model, config(one_copy=one_copy, directions=4)) as zo:
            sizes.append(zo._loader.compute_nbytes)
            losses.append([zo.step(lambda: model(**b).loss) for b in batches("opt", 3)])
    assert sizes[1] * 4 == sizes[0]
    assert losses[0] == losses[1]


@pytest.mark.parametrize("granularity", ["block", "module"])
@pytest.mark.parametrize("slots", [2, 3, 5])
def test_one_large_unit_does_not_make_all_slots_large(slots: int, granularity: str) -> None:
    """And every unit is uploaded at most once per step all the same."""
    model = tiny("opt-untied", vocab_size=2000)
    data, moved = batches("opt-untied", 6), []
    with zo2ext.offload(model, config(slots=slots, granularity=granularity)) as zo:
        sizes = sorted((layout.nbytes for layout in zo.layouts), reverse=True)
        for batch in data:
            zo.step(lambda batch=batch: model(**batch).loss)
            moved.append(zo.traffic.uploaded)
        assert zo._pipeline.device_nbytes == sum(sizes[:slots])
        # Units that are still there from the step before are not uploaded again.
        uploaded, there = (moved[-1] - moved[1]) / 4, zo._pipeline.device_nbytes
        assert zo.host_nbytes - there <= uploaded <= zo.host_nbytes + there / 4
