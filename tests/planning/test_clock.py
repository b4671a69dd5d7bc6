"""The virtual clock: times by hand, steps near their floor, and the settings that follow."""

from __future__ import annotations

from dataclasses import replace
from functools import cache, partial
from typing import Any

import pytest
import torch
from plan_rates import RATES

import zo2ext
from zo2ext._choices import Distribution, Rounding
from zo2ext.commands.main import main
from zo2ext.config import Granularity
from zo2ext.ops.formats import Storage
from zo2ext.planning import period
from zo2ext.planning.activations import Activations, Stage
from zo2ext.planning.clock import LAUNCH, SUBMISSION, ClockDevice
from zo2ext.planning.gpus import GPUS, given_rates, named_rates
from zo2ext.planning.period import choose_period
from zo2ext.planning.plan import Plan, make_plan, recommend
from zo2ext.planning.rates import KernelCosts, Rates
from zo2ext.streaming.devices.device import Dependency, Queue

# -- the clock


def test_queues_run_side_by_side_and_events_order_them() -> None:
    device = ClockDevice(replace(RATES, share=0.5))
    queue = partial(device.submit, work=lambda: device.spend(1.0))
    up = queue(Queue.UPLOAD)
    kernel = queue(Queue.COMPUTE, after={Dependency.KERNEL_AFTER_UPLOAD: [up]})
    down = queue(Queue.OFFLOAD)
    device.wait(down)
    assert device.host == pytest.approx(2.0, abs=1e-3), "half the rate while both are busy"
    device.wait(kernel)
    assert device.host == pytest.approx(3.0, abs=1e-3)
    device.host += 5.0
    last = queue(Queue.UPLOAD)
    device.wait(last)
    assert device.host == pytest.approx(9.0, abs=1e-3), "not before the host queued it"
    assert device.busy == {Queue.UPLOAD: 2.0, Queue.COMPUTE: 1.0, Queue.OFFLOAD: 1.0}


def test_a_pass_takes_as_long_as_its_memory_or_its_instructions() -> None:
    def seconds(rates: Rates, updates: int, **options: Any) -> float:
        device = ClockDevice(rates)
        stored = torch.empty(1000, dtype=torch.bfloat16, device="meta")
        direction = zo2ext.ops.Direction(1, 1e-3, stored, stored)
        table = zo2ext.ops.update_table([zo2ext.ops.Update(k, 1.0) for k in range(updates)], "cpu")
        options = {"scales": None, "low": None, "write_back": None} | options
        event = device.submit(
            Queue.COMPUTE,
            lambda: device.update_perturb(stored, updates=table, directions=[direction], **options),
        )
        device.wait(event)
        return device.host - SUBMISSION - LAUNCH

    assert seconds(replace(RATES, copy=1e6), 1) == pytest.approx(3 * 2000 / 1e6)
    both_ways = seconds(replace(RATES, copy=1e6), 1, write_back=Rounding.STOCHASTIC)
    assert both_ways == pytest.approx(4 * 2000 / 1e6)
    slow = replace(RATES, kernel=KernelCosts.from_instructions(1e6))
    rounded = seconds(slow, 1, write_back=Rounding.STOCHASTIC)
    assert rounded == pytest.approx(1000 * 83.8 / 1e6), "of the default rounding"
    assert seconds(slow, 5) - seconds(slow, 1) == pytest.approx(1000 * 4 * 29.5 / 1e6)
    nearest = KernelCosts.from_instructions(1e6, Distribution.GAUSSIAN, Rounding.NEAREST)
    rounded = seconds(replace(slow, kernel=nearest), 1, write_back=Rounding.NEAREST)
    assert rounded == pytest.approx(1000 * 70.4 / 1e6)


# -- steps of known shapes


def stages(model: Any, tokens: int) -> tuple[Stage, ...]:
    """A pass with a stage per module, in the order of decoder models, from the weights' sizes."""
    from zo2ext.model.units import find_units
    from zo2ext.planning.activations import estimate_stages

    found = estimate_stages(model, find_units(model, Granularity.MODULE)[1], tokens)
    final = ("model.norm", "model.decoder.final_layer_norm")
    return tuple(sorted(found, key=lambda s: (s.module == "lm_head", s.module in final)))


@cache
def shape(name: str) -> tuple[Any, Activations]:
    from transformers import AutoConfig, AutoModelForCausalLM

    hidden, layers = {"13b": (5120, 40), "30b": (7168, 48), "175b": (12288, 96)}.get(name, (0, 0))
    opt = {
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": hidden // 128,
        "ffn_dim": 4 * hidden,
        "word_embed_proj_dim": hidden,
    }
    llama = {
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": 128256,
    }
    config = (
        AutoConfig.for_model("opt", **opt) if hidden else AutoConfig.for_model("llama", **llama)
    )
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    return model, Activations(0, 0, stages(model, 2048))


@pytest.mark.parametrize("write_back", ["auto", 1])
@pytest.mark.parametrize("gpu", ["A100", "H200"])  # PCIe 4 and 5
@pytest.mark.parametrize(("granularity", "most"), [("block", 1.03), ("module", 1.15)])
@pytest.mark.parametrize("name", ["13b", "30b", "175b", "llama-3-8b"])
def test_a_step_is_as_fast_as_the_link(
    name: str, granularity: str, most: float, gpu: str, write_back: int | str
) -> None:
    model, activations = shape(name)
    config = zo2ext.ZOConfig(granularity=granularity, write_back=write_back)
    rates = named_rates(gpu)
    plan = make_plan(model, config, tokens=2048, rates=rates, activations=activations)
    step = plan.step
    assert plan.config.write_back == (16 if write_back == "auto" else 1)
    assert step.uploaded == pytest.approx(plan.host)
    assert step.floor == step.transfers > step.compute
    assert 0.999 <= step.seconds / step.floor <= most


# -- the settings that follow


class Place(ClockDevice):
    """A device of which only its place is asked."""

    def __init__(self, name: str) -> None:
        super().__init__(RATES)
        self.torch_device = torch.device(name)


def test_auto_is_long_where_weights_stream_and_one_elsewhere(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model, _ = shape("13b")
    measured: list[tuple[object, ...]] = []

    def measure(*arguments: object) -> Rates:
        measured.append(arguments)
        return named_rates("H200")

    monkeypatch.setattr(period, "measure_rates", measure)
    config = zo2ext.ZOConfig()
    assert config.write_back == "auto"

    def chosen(place: str, **changes: Any) -> int | str:
        settings = config.replace(**changes)
        units, _ = zo2ext.model.units.find_units(model, settings.granularity)
        layouts = [zo2ext.model.layout.lay_out(unit, settings) for unit in units]
        return period.with_period(model, layouts, settings, Place(place)).write_back

    assert chosen("cpu") == chosen("cuda", resident="all") == 1
    assert not measured, "where nothing travels there is nothing to measure"
    assert chosen("cuda") == 16
    assert measured == [
        (torch.device("cuda"), (torch.bfloat16,), Distribution.GAUSSIAN, Rounding.STOCHASTIC)
    ]
    assert chosen("cuda", granularity="module", slots=2) == 16, "settings of memory change no bits"
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    try:
        assert chosen("cuda") == 1, "nothing is written back"
    finally:
        for parameter in model.parameters():
            parameter.requires_grad_(True)


def test_replays_that_are_not_free_shorten_the_period() -> None:
    model, activations = shape("llama-3-8b")
    fast, slow = named_rates("H200"), given_rates(named_rates("H200"), upload=1e6)
    fewer = [
        choose_period(model, zo2ext.ZOConfig(), rates, activations.stages) for rates in (fast, slow)
    ]
    assert fewer == [16, 1], "computation is what takes the time behind an instant link"


def recommended(name: str, rates: Rates) -> Plan | None:
    model, activations = shape(name)
    return recommend(
        model,
        zo2ext.ZOConfig(),
        Storage.BF16,
        tokens=2048,
        rates=rates,
        activations=lambda _: activations,
    )


def test_the_recommendation_fits_and_is_the_fastest() -> None:
    whole = recommended("llama-3-8b", named_rates("H200"))
    assert whole is not None
    assert (whole.config.resident, whole.config.write_back) == ("all", 1)
    assert whole.step.uploaded == whole.step.offloaded == 0
    blocks = recommended("13b", named_rates("RTX 4090"))
    assert blocks is not None
    assert (blocks.config.granularity, blocks.config.write_back) == (Granularity.BLOCK, 16)
    rates = given_rates(named_rates("RTX 4090"), memory=2.6)
    modules = recommended("13b", rates)
    assert modules is not None
    assert modules.config.granularity is Granularity.MODULE
    assert modules.fits(rates.memory)
    assert not blocks.fits(rates.memory)
    assert modules.step.seconds > blocks.step.seconds
    assert recommended("13b", given_rates(rates, memory=1)) is None


def test_named_hardware(model_folder: Any, capsys: pytest.CaptureFixture[str]) -> None:
    for name in GPUS:
        assert named_rates(name.lower().replace(" ", "-")) == named_rates(name)
    assert named_rates("A100") == named_rates("A100 80GB")
    with pytest.raises(zo2ext.UserError, match=r"got 'RTX 4900'; did you mean 'RTX 4090'\?"):
        named_rates("RTX 4900")
    command = ["plan", "--model", str(model_folder), "--seq-len", "64"]
    assert main([*command, "--gpu", "RTX 4090", "--ram", "1"]) == 0
    printed = capsys.readouterr().out
    assert "which are given, or of RTX 4090's data sheet." in printed
    assert "recommended: storage='bf16', resident='all', write_back=1" in printed
    own = "--upload 20 --download 10 --matmul 150 --gpu-memory 0.61 --ram 0.0001"
    assert main([*command, *own.split()]) == 0
    printed = capsys.readouterr().out
    assert "upload 20, offload 10 GB/s" in printed
    assert "bfloat16 150" in printed
    assert "not the host" in printed
    assert "add store='disk'" in printed
    assert main([*command, "--gpu", "T4", "--gpu-memory", "0.1"]) == 0
    printed = capsys.readouterr().out
    assert "not the GPU" in printed
    assert "nothing fits" in printed
    assert main([*command, "--upload", "20"]) == 1
    assert "upload is given without gpu or matmul" in capsys.readouterr().err
    assert main([*command, "--gpu", "T4", "--matmul", "-1"]) == 1
    assert "matmul must be above 0 and finite, got -1.0" in capsys.readouterr().err
