"""``zo2ext plan``: what a model will need, from its config alone, before any weights are loaded."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from zo2ext.config import STORAGE_DTYPES, Granularity, ZOConfig
from zo2ext.devices import make_device
from zo2ext.layout import UnitLayout, lay_out
from zo2ext.memory import gib
from zo2ext.options import option
from zo2ext.pretrained import failing_as
from zo2ext.rates import Rates, measure_rates
from zo2ext.units import find_units


@dataclass(frozen=True)
class Plan:
    """Needs of one model under one config. Bytes, seconds, tokens.

    The activations are an estimate: what one block's forward pass without gradients keeps alive
    (its input, its output and the widest layer's, in the compute dtype), and the logits with their
    float32 copy, which the loss takes.
    """

    config: ZOConfig
    tokens: int
    parameters: int
    units: int
    host: int
    slots: int
    copies: int
    activations: int
    logits: int
    uploaded: int  # a step
    offloaded: int  # a step, averaged over write-backs
    transfer_seconds: float
    compute_seconds: float
    hiding_tokens: float  # a step; from there on, compute hides the transfers

    @property
    def device(self) -> int:
        """Device bytes in all, the driver's own few hundred MB not counted."""
        return self.slots + self.copies + self.activations + self.logits

    @property
    def floor_seconds(self) -> float:
        """No step can be faster."""
        return max(self.transfer_seconds, self.compute_seconds)


def make_plan(model: nn.Module, config: ZOConfig, *, tokens: int, rates: Rates) -> Plan:
    """Plan training `model`, whose parameters may be on the meta device.

    Args:
        model: A causal language model.
        config: Of the run; residents are not planned for.
        tokens: In a batch: its size times its sequence length.
        rates: Of the machine, with the compute dtype among its products.
    """
    units, _ = find_units(model, config.granularity)
    layouts = [lay_out(unit, config) for unit in units]
    settings: Any = getattr(model, "config", None)
    text = settings.get_text_config() if settings is not None else None
    hidden, vocabulary = getattr(text, "hidden_size", 0), getattr(text, "vocab_size", 0)
    wide = max(getattr(text, "intermediate_size", 0) or 0, 4 * hidden)
    compute = config.compute_dtype or next(
        (part.compute for layout in layouts for part in layout.parts), torch.float32
    )
    parameters = sum(p.numel() for p in model.parameters())
    forwards = 2 * config.directions
    slab = max(layout.nbytes for layout in layouts)
    uploaded = sum(layout.nbytes for layout in layouts)
    offloaded = sum(layout.trainable_nbytes for layout in layouts) // config.write_back
    kernel = sum(_pass_nbytes(layout, forwards) for layout in layouts)
    per_token = 2 * parameters * forwards / rates.multiply[compute]
    transfer = max(uploaded / rates.upload, offloaded / rates.offload)
    kernel_seconds = kernel / rates.copy
    return Plan(
        config=config,
        tokens=tokens,
        parameters=parameters,
        units=len(units),
        host=uploaded,
        slots=min(config.slots, len(units)) * slab,
        copies=forwards * max(layout.compute_nbytes for layout in layouts),
        activations=tokens * (2 * hidden + 2 * wide) * compute.itemsize,
        logits=tokens * vocabulary * (compute.itemsize + 4),
        uploaded=uploaded,
        offloaded=offloaded,
        transfer_seconds=transfer,
        compute_seconds=tokens * per_token + kernel_seconds,
        hiding_tokens=max(0.0, (transfer - kernel_seconds) / per_token),
    )


def _pass_nbytes(layout: UnitLayout, copies: int) -> int:
    """Bytes that the fused pass reads and writes: the slab twice, each perturbed copy once."""
    return 2 * layout.trainable_nbytes + copies * layout.compute_nbytes


def hollow_model(source: str) -> nn.Module:
    """The model that a folder's or hub name's config describes, without memory for weights.

    Raises:
        ValueError: There is no config, or it describes no causal language model.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    with failing_as(f"model {source!r} has no usable config"):
        config = AutoConfig.from_pretrained(source, trust_remote_code=False)
        with torch.device("meta"):
            model: nn.Module = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    return model


def every_plan(
    model: nn.Module, *, tokens: int, directions: int, write_back: int, rates: Rates
) -> Iterator[Plan]:
    """Plans of `model` for each storage and granularity, computing in the storage dtype."""
    for storage in STORAGE_DTYPES:
        for granularity in Granularity:
            config = ZOConfig(
                storage=storage,
                compute_dtype=storage,
                granularity=granularity,
                directions=directions,
                write_back=write_back,
            )
            yield make_plan(model, config, tokens=tokens, rates=rates)


_HEADINGS = (
    "storage", "travels", "host", "GPU", "= slots", "+ copies", "+ activ.", "+ logits",
    "up/step", "down/step", "floor", "hidden from",
)  # fmt: skip


def plan_table(plans: list[Plan]) -> str:
    """The plans as text, one a line."""
    rows = [_HEADINGS, *(_row(plan) for plan in plans)]
    widths = [max(len(row[i]) for row in rows) for i in range(len(_HEADINGS))]
    return "\n".join(
        "  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True))
        for row in rows
    )


def _row(plan: Plan) -> tuple[str, ...]:
    return (
        str(plan.config.storage).removeprefix("torch."),
        plan.config.granularity.value,
        gib(plan.host),
        gib(plan.device),
        gib(plan.slots),
        gib(plan.copies),
        gib(plan.activations),
        gib(plan.logits),
        gib(plan.uploaded),
        gib(plan.offloaded),
        f"{plan.floor_seconds:.3g} s",
        f"{plan.hiding_tokens:,.0f} tok" if plan.hiding_tokens else "always",
    )


@dataclass(frozen=True)
class PlanArguments:
    """Say what a model needs, before its weights are downloaded or loaded."""

    model: str = option("Model folder, or its name on the Hugging Face hub.", group="required")
    batch_size: int = option("Windows in a batch.", 1)
    seq_len: int = option("Tokens in a window.", 2048)
    directions: int = option("Directions a step averages over.", 1)
    write_back: int = option("Steps between write-backs of the weights.", 1)
    device: str | None = option("cuda or cpu. Default: cuda where there is one.", None)


def plan(arguments: PlanArguments) -> None:
    """Run ``zo2ext plan``; see `PlanArguments`."""
    for name in ("batch_size", "seq_len"):
        if getattr(arguments, name) < 1:
            raise ValueError(f"{name} must be at least 1, got {getattr(arguments, name)}")
    ZOConfig(directions=arguments.directions, write_back=arguments.write_back)
    device = make_device(arguments.device).torch_device
    model = hollow_model(arguments.model)
    print("measuring this machine's rates ...", flush=True)
    rates = measure_rates(device, STORAGE_DTYPES)
    tokens = arguments.batch_size * arguments.seq_len
    plans = list(
        every_plan(
            model,
            tokens=tokens,
            directions=arguments.directions,
            write_back=arguments.write_back,
            rates=rates,
        )
    )
    print(
        f"{arguments.model}: {plans[0].parameters:,} parameters; {tokens:,} tokens a step, "
        f"{2 * arguments.directions} forward passes\n{rates}\n\n{plan_table(plans)}\n\n"
        "GPU: memory of slots, perturbed copies, activations and logits (the last two estimated; "
        "the driver takes\nsome hundred MB more). floor: no step on this machine is faster. hidden "
        "from: tokens a step from which\non compute hides the transfers. resident= trades GPU "
        "memory for fewer transfers."
    )
