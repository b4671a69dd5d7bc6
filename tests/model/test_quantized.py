"""Adapters on a frozen base in few bits: they are trained, the base is only uploaded."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import reference
import torch
from numeric import assert_same_bits
from plan_rates import RATES
from quantized_models import (
    BASES,
    NAME,
    Codes,
    Repacked,
    Silent,
    Unflattenable,
    adapted,
    blocks_linears,
    save_base,
    wrap,
)
from tiny_models import batches, tiny
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from trainer_runs import trainer
from transformers import AutoModelForCausalLM

import zo2ext
from zo2ext.config import Granularity
from zo2ext.model.quantized import components, rebuild
from zo2ext.planning.plan import hollow_model, make_plan
from zo2ext.planning.quantized_sizes import StoredWeight
from zo2ext.streaming.devices.simulated import SimulatedDevice

SETTINGS: dict[str, Any] = {"lr": 1e-2, "eps": 1e-3, "seed": 5}
DATA = batches(NAME, 3)

pytestmark = [
    pytest.mark.filterwarnings("ignore:The use of `x.T` on tensors:UserWarning"),  # bitsandbytes
    pytest.mark.filterwarnings("ignore::DeprecationWarning:torchao"),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_base(tmp_path_factory.mktemp("base"))


@pytest.fixture(params=BASES)
def make(request: pytest.FixtureRequest, folder: Path) -> Callable[[], nn.Module]:
    """Makes a quantised model with adapters, always the same."""
    return lambda: adapted(BASES[request.param](folder))


@pytest.fixture
def wrapped(folder: Path) -> nn.Module:
    return adapted(BASES["wrapper"](folder))


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(**DATA[0]).logits
    return found


def offload(model: nn.Module, **settings: Any) -> zo2ext.ZOEngine:
    return zo2ext.offload(model, zo2ext.ZOConfig(**{"device": "simulated"} | SETTINGS | settings))


def train(model: nn.Module, zo: zo2ext.ZOEngine) -> list[tuple[float, float]]:
    """A few steps; the losses at +eps and -eps."""
    losses = []
    for batch in DATA:
        zo.step(lambda batch=batch: model(**batch).loss)
        assert zo.last is not None
        losses.append((zo.last.losses_plus[0], zo.last.losses_minus[0]))
    return losses


def trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    return {n: p for n, p in model.named_parameters() if p.requires_grad}


def plainly_trained(model: nn.Module) -> tuple[list[tuple[float, float]], nn.Module]:
    """The losses of the plain loop, and `model` with the weights that it comes to."""
    expected = reference.mezo(model, DATA, **SETTINGS)
    with torch.no_grad():
        for name, parameter in trainable(model).items():
            parameter.copy_(expected.weights[name])
    return [step[0] for step in expected.losses], model


@pytest.mark.parametrize("granularity", ["block", "module"])
@pytest.mark.parametrize("device", ["cpu", "simulated"])
def test_losses_and_weights_are_the_plain_loops(
    make: Callable[[], nn.Module], device: str, granularity: str
) -> None:
    expected, plain = plainly_trained(make())
    model = make()
    classes = {name: type(p) for name, p in model.named_parameters()}
    with offload(model, device=device, granularity=granularity, slots=2) as zo:
        assert train(model, zo) == expected
        assert_same_bits(logits(model), logits(plain))
        model.state_dict()  # where bitsandbytes puts codes back as they were
        assert_same_bits(logits(model), logits(plain))
    assert classes == {name: type(p) for name, p in model.named_parameters()}
    for name, parameter in trainable(plain).items():
        assert_same_bits(model.get_parameter(name).data, parameter.data, name)
    assert_same_bits(logits(model), logits(plain))
    assert_same_bits(logits(model), logits(plain))


def test_a_model_that_has_computed_before(make: Callable[[], nn.Module]) -> None:
    """Libraries repack, and move scales elsewhere, in the first forward pass."""
    expected, plain = plainly_trained(make())
    model = make()
    logits(model)
    with offload(model) as zo:
        first = [layout.nbytes for layout in zo.layouts]
        assert train(model, zo) == expected
    assert_same_bits(logits(model), logits(plain))
    with offload(model, lr=0.0) as zo:
        assert [layout.nbytes for layout in zo.layouts] == first, "nothing hangs about"
        train(model, zo)
    assert_same_bits(logits(model), logits(plain))


def test_every_byte_goes_up_once_and_only_adapters_come_back(
    make: Callable[[], nn.Module],
) -> None:
    model = make()
    up = down = 0
    for parameter in model.parameters():
        if parameter.requires_grad:
            down += padded(parameter.nbytes, 128 * 4)
        else:
            up += sum(padded(nbytes, 256) for nbytes in bytes_of(parameter))
    with offload(model, slots=2, granularity="module") as zo:
        train(model, zo)
        before = (zo.traffic.uploaded, zo.traffic.offloaded)
        train(model, zo)
        uploaded, offloaded = zo.traffic.uploaded - before[0], zo.traffic.offloaded - before[1]
    assert offloaded == len(DATA) * down
    assert uploaded == len(DATA) * (up + down)


def padded(nbytes: int, to: int) -> int:
    return -(-nbytes // to) * to


def bytes_of(parameter: nn.Parameter) -> Iterator[int]:
    """Bytes of each tensor that a parameter consists of, as its library documents it."""
    if is_traceable_wrapper_subclass(parameter):
        yield from (getattr(parameter, name).nbytes for name in parameter.__tensor_flatten__()[0])
        return
    yield parameter.nbytes
    if isinstance(parameter, Repacked):
        yield parameter.state.scales.nbytes
    if (state := getattr(parameter, "quant_state", None)) is not None:
        tensors = [state.absmax, state.code]
        tensors += [state.state2.absmax, state.state2.code, state.offset] if state.nested else []
        yield from (tensor.nbytes for tensor in tensors)
    if (scales := getattr(parameter, "SCB", None)) is not None:
        yield scales.nbytes


def test_weights_in_few_bits_take_few_bytes(folder: Path) -> None:
    """Of four bits with a float32 for 64: what a block takes, against float32."""
    model, plain = BASES["bnb-nf4"](folder), AutoModelForCausalLM.from_pretrained(folder)
    names = [n for n, p in model.named_parameters() if p.dtype is torch.uint8]
    packed = sum(sum(bytes_of(model.get_parameter(name))) for name in names)
    assert packed < 0.16 * sum(plain.get_parameter(name).nbytes for name in names)


def test_from_the_disk(make: Callable[[], nn.Module]) -> None:
    expected, plain = plainly_trained(make())
    model = make()
    with offload(model, store="disk", host_memory="64MiB", write_back=2) as zo:
        assert train(model, zo) == expected
        assert_same_bits(logits(model), logits(plain))
    assert_same_bits(logits(model), logits(plain))


def test_adapters_are_saved(make: Callable[[], nn.Module], folder: Path, tmp_path: Path) -> None:
    from peft import PeftModel

    model = make()
    with offload(model) as zo:
        train(model, zo)
        model.save_pretrained(tmp_path)
        expected = logits(model)
    assert (tmp_path / "adapter_model.safetensors").stat().st_size < 40_000
    base = make().unload()
    assert_same_bits(logits(PeftModel.from_pretrained(base, tmp_path).eval()), expected)


def test_the_state_is_the_bases(make: Callable[[], nn.Module]) -> None:
    """With what libraries add to it: bitsandbytes' modules read their weights' scales for it."""
    expected = make().state_dict()
    model = make()
    with offload(model) as zo:
        train(model, zo)
        state = model.state_dict()
        train(model, zo)  # does not reach into it
    assert state.keys() == expected.keys()
    for name in (n for n in state if "lora" not in n):
        pairs = zip(plain_tensors(state[name]), plain_tensors(expected[name]), strict=True)
        for found, wanted in pairs:
            assert_same_bits(found, wanted, name)


def plain_tensors(tensor: Tensor) -> list[Tensor]:
    if not is_traceable_wrapper_subclass(tensor):
        return [tensor.detach()]
    return [getattr(tensor, name) for name in tensor.__tensor_flatten__()[0]]


def test_the_trainer(
    request: pytest.FixtureRequest, make: Callable[[], nn.Module], tmp_path: Path
) -> None:
    settings = {"save_strategy": "steps", "save_steps": 4, "simulate": True, "max_steps": 6}
    if request.node.callspec.params["make"] == "torchao-int4":
        with pytest.raises(ValueError, match="do not support training"):  # says transformers
            trainer(tmp_path, make(), **settings)
        return
    whole = trainer(tmp_path / "whole", make(), **settings)
    whole.evaluate()  # streams the model once before
    whole.train()
    again = trainer(tmp_path / "again", make(), **settings)
    again.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-4"))
    for name, parameter in trainable(whole.model).items():
        assert_same_bits(again.model.get_parameter(name).data, parameter.data, name)
    assert_same_bits(logits(again.model), logits(whole.model))


def test_between_turns_nothing_can_be_used_unnoticed(wrapped: nn.Module) -> None:
    weight = next(p for p in wrapped.parameters() if isinstance(p, Codes))
    x = torch.randn(2, weight.shape[1])
    with offload(wrapped):
        assert weight.scales.isnan().all()
        assert torch.nn.functional.linear(x, weight).isnan().all()
        assert isinstance(wrapped.base_model.model.model.layers[0].mlp.up_proj.weight, Codes)


class Shift(Codes):
    """Nothing but integers: the scales are powers of two."""

    def plain(self) -> Tensor:
        return self.codes * torch.exp2(self.scales)

    @staticmethod
    def __new__(cls, codes: Tensor, scales: Tensor) -> Codes:
        return Tensor._make_wrapper_subclass(cls, codes.shape, dtype=torch.float32)

    @classmethod
    def of(cls, weight: Tensor) -> Codes:
        return cls(Codes.of(weight).codes, torch.full((len(weight), 1), -9, dtype=torch.int8))


def test_integers_alone_cannot_be_used_unnoticed(folder: Path) -> None:
    base = wrap(AutoModelForCausalLM.from_pretrained(folder), Shift)
    model = adapted(base)
    weight = next(p for p in model.parameters() if isinstance(p, Shift))
    expected = logits(model)
    with offload(model, lr=0.0) as zo:
        assert weight.plain().isnan().all()
        assert weight.shape == weight.plain().shape
        train(model, zo)
    assert_same_bits(logits(model), expected)


class Halves(Codes):
    """Two codes a byte, in a dtype that torch holds, but can neither copy nor fill."""

    dtype_of_codes: torch.dtype

    @staticmethod
    def __new__(cls, codes: Tensor, scales: Tensor) -> Codes:
        shape = (codes.shape[0], 2 * codes.shape[1])
        return Tensor._make_wrapper_subclass(cls, shape, dtype=torch.float32)

    @classmethod
    def of(cls, weight: Tensor) -> Codes:
        return cls(halves(weight).view(cls.dtype_of_codes), torch.full((len(weight), 1), 0.03))

    def plain(self) -> Tensor:
        return whole(self.codes) * self.scales


def halves(weight: Tensor) -> Tensor:
    codes = (weight / 0.03).round().clamp(-8, 7).to(torch.int16) + 8
    return (codes[:, ::2] + 16 * codes[:, 1::2]).to(torch.uint8)


def whole(codes: Tensor) -> Tensor:
    both = codes.view(torch.uint8).int()
    return torch.stack((both % 16, both // 16), -1).flatten(1) - 8


class HalvesLinear(nn.Module):
    """The same codes in a plain parameter; the scale is no tensor."""

    def __init__(self, linear: nn.Linear, dtype: torch.dtype) -> None:
        super().__init__()
        codes = halves(linear.weight.detach()).view(dtype)
        self.weight = nn.Parameter(codes, requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return torch.nn.functional.linear(x, whole(self.weight) * 0.03)


@pytest.mark.parametrize("store", [{}, {"store": "disk", "host_memory": "64MiB"}])
@pytest.mark.parametrize("name", ["float4_e2m1fn_x2", "uint4", "bits8"])
@pytest.mark.parametrize("kind", ["wrapper", "parameter"])
def test_dtypes_of_less_than_a_byte(
    folder: Path, kind: str, name: str, store: dict[str, str]
) -> None:
    dtype = getattr(torch, name)

    def make() -> nn.Module:
        base = AutoModelForCausalLM.from_pretrained(folder)
        if kind == "wrapper":
            return adapted(wrap(base, type("OfHalves", (Halves,), {"dtype_of_codes": dtype})))
        for module_name, module in blocks_linears(base).items():
            if "mlp" in module_name:
                base.set_submodule(module_name, HalvesLinear(module, dtype))
        return adapted(base)

    losses = []
    for device in ("cpu", "simulated"):
        model = make()
        weights = [p for p in model.parameters() if isinstance(p, Halves) or p.dtype == dtype]
        codes = [w.codes if isinstance(w, Halves) else w.data for w in weights]
        expected = logits(model)
        with offload(model, device=device, **store) as zo:
            assert_same_bits(logits(model), expected)
            shown = [w.plain() if isinstance(w, Halves) else w for w in weights]
            assert shown
            assert all(tensor.isnan().all() for tensor in shown), "nothing is used unnoticed"
            losses.append(train(model, zo))
            expected = logits(model)
        for weight, before in zip(weights, codes, strict=True):
            after = weight.codes if isinstance(weight, Halves) else weight.data
            assert after.dtype == dtype
            assert torch.equal(after.view(torch.uint8), before.view(torch.uint8))
        assert_same_bits(logits(model), expected)
    assert losses[0] == losses[1]


@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor:UserWarning")  # deprecated
@pytest.mark.parametrize("name", ["bits16", "qint8"])
def test_dtypes_that_cannot_be_moved(name: str) -> None:
    if name == "qint8":
        codes = torch.quantize_per_tensor(torch.ones(4, 4), 0.5, 0, torch.qint8)
    else:
        codes = torch.zeros(4, 8, dtype=torch.uint8).view(torch.bits16)
    model = nn.Sequential(nn.Linear(4, 4))
    model[0].weight = nn.Parameter(codes, requires_grad=False)
    with pytest.raises(TypeError, match=rf"0.weight is a Parameter, .* neither copy torch.{name}"):
        offload(model)


def test_tensors_keep_the_order_of_their_dimensions(wrapped: nn.Module) -> None:
    weight = next(p for p in wrapped.parameters() if isinstance(p, Codes))
    strides = weight.codes.stride()
    assert strides == (1, len(weight))
    with offload(wrapped):
        assert weight.codes.shape == weight.shape
        assert wrapped.base_model.model.model.layers[0].mlp.up_proj.weight.codes.stride()[0] == 1
    assert weight.codes.stride() == strides


def test_wrappers_follow_their_tensors_to_a_device() -> None:
    linear = nn.Linear(6, 4, bias=False)
    weight = linear.weight = nn.Parameter(Codes.of(linear.weight.detach()), requires_grad=False)
    for tensor in components("weight", weight, [linear]):
        tensor.data = tensor.data.to("meta")
    assert weight.device == torch.device("cpu")
    rebuild(weight)
    assert linear.weight is weight
    assert isinstance(weight, nn.Parameter)
    assert isinstance(weight, Codes)
    assert weight.device == torch.device("meta")
    assert not weight.requires_grad


class Pair(Codes):
    """A wrapper whose tensors are wrappers."""

    @classmethod
    def of(cls, weight: Tensor) -> Codes:
        return cls(Codes.of(weight), Codes.of(weight / 2))

    def plain(self) -> Tensor:
        return self.codes.plain() + self.scales.plain()


def test_wrappers_within_wrappers(folder: Path) -> None:
    def make() -> nn.Module:
        return adapted(wrap(AutoModelForCausalLM.from_pretrained(folder), Pair))

    expected, plain = plainly_trained(make())
    model = make()
    with offload(model) as zo:
        assert train(model, zo) == expected
    weight = next(p for p in model.parameters() if isinstance(p, Pair))
    tensors = components("weight", weight, [])
    assert len(tensors) == 4
    assert_same_bits(logits(model), logits(plain))
    for tensor in tensors:
        tensor.data = tensor.data.to("meta")
    rebuild(weight)
    assert weight.device == weight.codes.device == torch.device("meta")


def test_weights_can_be_replaced_between_steps(folder: Path) -> None:
    state = BASES["wrapper"](folder).state_dict()
    state = {n: t + 0.01 if type(t) is Tensor else Codes.of(2 * t) for n, t in state.items()}
    plain, model = BASES["wrapper"](folder), BASES["wrapper"](folder)
    plain.load_state_dict(state)
    for store in ({"store": "host"}, {"store": "disk", "host_memory": "64MiB"}):
        with offload(model, **store):
            model.load_state_dict(state)
            assert_same_bits(logits(model), logits(plain))
            shown = model.state_dict(keep_vars=True)
            name = next(n for n, t in state.items() if isinstance(t, Codes))
            assert_same_bits(shown[name].plain(), state[name].plain())
        assert_same_bits(logits(model), logits(plain))


@pytest.mark.gpu
@pytest.mark.parametrize("name", BASES)
def test_on_a_gpu(folder: Path, name: str) -> None:
    """Wherever the weights are: each run has the losses of the first, and gives the base back."""
    places = ({"resident": "all"}, {"slots": 2}, {"slots": 2, "granularity": "module"})
    runs = []
    for place in places:
        model = adapted(BASES[name](folder))
        before = logits(model)
        model = adapted(BASES[name](folder))
        with offload(model, device="cuda", lr=0.0, **place) as zo:
            data = [{k: v.to(zo.device) for k, v in batch.items()} for batch in DATA]
            runs.append([zo.step(lambda batch=batch: model(**batch).loss) for batch in data])
        assert {p.device.type for p in model.parameters()} == {"cpu"}
        assert_same_bits(logits(model), before)
    assert runs == [runs[0]] * len(places)


# What cannot be done is refused


def test_quantised_weights_cannot_be_trained(folder: Path) -> None:
    model = wrap(AutoModelForCausalLM.from_pretrained(folder))
    name, linear = next(iter(blocks_linears(model).items()))
    linear.weight.requires_grad_()
    with pytest.raises(TypeError, match=rf"{name}.weight is a quantized weight \(Codes\), which"):
        offload(model)
    linear.weight.requires_grad_(False)
    with offload(model) as zo:  # the rest is trained
        train(model, zo)


@pytest.mark.parametrize(
    ("weight_class", "reason"),
    [(Unflattenable, "no layout is known"), (Silent, "its class has no __tensor_flatten__")],
)
def test_weights_that_cannot_be_taken_apart(
    folder: Path, weight_class: type[Tensor], reason: str
) -> None:
    model = wrap(AutoModelForCausalLM.from_pretrained(folder), weight_class)
    message = f"q_proj.weight is a {weight_class.__name__}, which cannot be taken apart .*{reason}"
    with pytest.raises(TypeError, match=message):
        offload(model)
    logits(model)  # nothing was moved


@pytest.mark.parametrize("name", ["bnb-nf4", "bnb-fp4-nested"])
def test_what_is_packed_for_cpus_is_not_for_gpus(folder: Path, name: str) -> None:
    """Not wherever bitsandbytes packs of its own accord: that depends on the CPU."""
    model = BASES[name](folder)
    device = SimulatedDevice()
    device.torch_device = torch.device("cuda")
    functional = pytest.importorskip("bitsandbytes.functional")
    weight = model.model.layers[1].mlp.up_proj.weight
    codes, _ = functional._convert_weight_packed_for_cpu(weight.data, weight.quant_state)
    weight.data = codes
    message = r"layers.1.mlp.up_proj.weight is to be used on cuda, .* has repacked them for CPUs"
    with pytest.raises(ValueError, match=message):
        zo2ext.ZOEngine(model, zo2ext.ZOConfig(), device)
    assert torch.equal(weight.data, codes), "nothing was moved"
    offload(model).close()


@pytest.mark.gpu
def test_models_that_a_cpu_has_packed_are_refused_on_a_gpu(folder: Path) -> None:
    model = BASES["bnb-nf4"](folder).eval()
    logits(model)
    packed = model.model.layers[0].mlp.up_proj.weight.quant_state
    if not getattr(packed, "packing_format_for_cpu", False):
        pytest.skip("bitsandbytes packs nothing for this CPU: it has no AVX512-BF16")
    with pytest.raises(ValueError, match="has repacked them for CPUs"):
        offload(model, device="cuda")


@pytest.mark.parametrize(
    ("name", "library"), [("bnb-nf4", "bitsandbytes"), ("torchao-int8", "torchao")]
)
def test_quantised_checkpoints(
    folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, name: str, library: str
) -> None:
    """`load` has them from transformers; what is not quantised is trained."""
    BASES[name](folder).save_pretrained(tmp_path / "quantised")
    with caplog.at_level(logging.WARNING):
        model, zo = zo2ext.load(tmp_path / "quantised", zo2ext.ZOConfig(device="cpu", **SETTINGS))
    assert f"is quantized ({library}): transformers loads all of it" in caplog.text
    with zo:
        assert 0 < zo.trainable < sum(p.numel() for p in model.parameters())
        start = logits(model)
        train(model, zo)
        assert not torch.equal(logits(model), start)
        with pytest.raises(TypeError, match="cannot save this quantized Llama"):
            zo.save_pretrained(tmp_path / "tuned")
        assert not (tmp_path / "tuned").exists()


@pytest.mark.parametrize("name", ["bnb-nf4", "bnb-int8", "torchao-int8"])
def test_quantized_models_are_saved(folder: Path, tmp_path: Path, name: str) -> None:
    """As transformers saves them: with more than their parameters."""
    model = BASES[name](folder).eval()
    with offload(model) as zo:
        train(model, zo)
        zo.save_pretrained(tmp_path / "tuned")
        with pytest.raises(TypeError, match="quantized"):
            zo.compare(tmp_path / "tuned")
        expected = logits(model)
    assert_same_bits(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "tuned")), expected)


@pytest.mark.parametrize("granularity", list(Granularity))
@pytest.mark.parametrize("name", ["bnb-nf4", "bnb-fp4-nested", "bnb-int8", "torchao-int8"])
def test_plans_of_quantised_checkpoints(
    folder: Path, tmp_path: Path, name: str, granularity: Granularity
) -> None:
    BASES[name](folder).save_pretrained(tmp_path)
    config = zo2ext.ZOConfig(
        device="simulated", storage=torch.float32, granularity=granularity, write_back=1
    )
    hollow = hollow_model(str(tmp_path))
    plan = make_plan(hollow, config, tokens=33, rates=RATES)
    quantised = sum(isinstance(p, StoredWeight) for p in hollow.parameters())
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    for parameter in model.parameters():  # torchao's are not frozen yet
        parameter.requires_grad_(type(parameter) is nn.Parameter and parameter.requires_grad)
    with zo2ext.offload(model, config) as zo:
        assert (
            quantised == sum(bool(t.components) for lay in zo.layouts for t in lay.unit.tensors) > 0
        )
        # bitsandbytes' files have a description of each weight, too, of less than 256 bytes.
        assert 0 <= plan.host - zo.host_nbytes <= 256 * quantised
        assert 0 <= plan.slots + plan.copies - zo.device_nbytes <= 256 * quantised
        for batch in DATA:
            before = zo.traffic.offloaded
            zo.step(lambda batch=batch: model(**batch).loss)
        assert zo.traffic.offloaded - before == plan.step.offloaded


def test_ordinary_models_know_nothing_of_it() -> None:
    model = tiny("llama")
    for name, parameter in model.named_parameters():
        assert components(name, parameter, [model]) == ()
