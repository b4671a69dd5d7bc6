"""Predictions for one GPU from a model's config, before any weights are loaded."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import nn

from zo2ext.checkpoints.pretrained import as_user_errors
from zo2ext.config import Granularity, ZOConfig
from zo2ext.model.layout import lay_out
from zo2ext.model.units import find_units
from zo2ext.ops.formats import Storage
from zo2ext.planning.activations import (
    Activations,
    estimate_activations,
    estimate_stages,
    text_config,
)
from zo2ext.planning.period import choose_period, compute_dtype
from zo2ext.planning.quantized_sizes import put_stored_weights, stored_tensors
from zo2ext.planning.rates import Rates
from zo2ext.planning.step import StepTime, Visits, time_step

DRIVER = 600 * 2**20  # bytes of device memory that the driver and libraries take, about
SLOTS = (2, 3, 4, 6)  # numbers of slots to choose from
_EQUAL = 1.02  # times that differ by less are equal; less memory is better then

Counter = Callable[[torch.dtype], Activations | None]


@dataclass(frozen=True)
class Plan:
    """Predicted memory, in bytes, and time of a step.

    Attributes:
        config: Settings of the run, with a decided `write_back`.
        tokens: Tokens per batch.
        parameters: Weights of the model.
        units: Number of units.
        host: Bytes of stored weights.
        slots: Bytes of slots and resident units.
        copies: Bytes of perturbed copies.
        activations: Bytes of all forward passes.
        counted: Whether these were counted; otherwise they are estimated.
        step: The step's time and transfers.
    """

    config: ZOConfig
    tokens: int
    parameters: int
    units: int
    host: int
    slots: int
    copies: int
    activations: int
    counted: bool
    step: StepTime

    @property
    def device(self) -> int:
        """Bytes on the device, without the few hundred MB of the driver."""
        return self.slots + self.copies + self.activations

    def fits(self, memory: int | None) -> bool:
        """Return whether the device has enough `memory`, in bytes; None: it does."""
        return memory is None or self.device + DRIVER <= memory

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / self.step.seconds


def make_plan(
    model: nn.Module,
    config: ZOConfig,
    *,
    tokens: int,
    rates: Rates,
    activations: Activations | None = None,
) -> Plan:
    """Predict training `model`, whose parameters may be on the meta device.

    Args:
        model: A causal language model.
        config: Settings of the run.
        tokens: Batch size times sequence length.
        rates: Rates of the machine, including matrix products in the compute dtype.
        activations: Activations of a forward pass over `tokens` in the compute dtype. None: they
            are estimated from the config.
    """
    units, entries = find_units(model, config.granularity)
    layouts = [lay_out(unit, config) for unit in units]
    compute = compute_dtype(layouts, config)
    counted = activations is not None
    activations = activations or estimate_activations(text_config(model), tokens, compute)
    stages = activations.stages or estimate_stages(model, entries, tokens)
    visits = Visits.of(entries, stages, rates, compute)
    if config.write_back == "auto":
        config = config.replace(write_back=choose_period(model, config, rates, activations.stages))
    step = time_step(layouts, visits, config, rates)
    return Plan(
        config=config,
        tokens=tokens,
        parameters=sum(p.numel() for p in model.parameters()),
        units=len(units),
        host=sum(layout.nbytes for layout in layouts),
        slots=step.slots_nbytes,
        copies=step.copies_nbytes,
        activations=activations.in_lockstep(config.forwards),
        counted=counted,
        step=step,
    )


def hollow_model(source: str) -> nn.Module:
    """Build the model of a folder or hub name from its config, without memory for weights.

    For a quantized checkpoint the headers of the weight files are read as well. Its quantized
    weights are frozen and have the sizes from there.

    Raises:
        ValueError: There is no config, it is not that of a causal language model, or the model is
            quantized and its files do not contain the sizes.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    with as_user_errors(f"model {source!r} has no usable config"):
        config = AutoConfig.from_pretrained(source, trust_remote_code=False)
        with torch.device("meta"):
            model: nn.Module = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    if getattr(config, "quantization_config", None) is not None:
        put_stored_weights(model, stored_tensors(source))
    return model


def every_plan(
    model: nn.Module, config: ZOConfig, *, tokens: int, rates: Rates, activations: Counter
) -> Iterator[Plan]:
    """Yield a plan for each storage format and granularity; the rest is as in `config`.

    Args:
        activations: Activations as a function of the compute dtype; the rest is as for `make_plan`.
    """
    for storage in Storage:
        chosen, needed = stored(config, storage), activations(_compute(storage))
        for granularity in Granularity:
            chosen = chosen.replace(granularity=granularity)
            plan = make_plan(model, chosen, tokens=tokens, rates=rates, activations=needed)
            chosen = plan.config  # the same period for both
            yield plan


def recommend(
    model: nn.Module,
    config: ZOConfig,
    storage: Storage,
    *,
    tokens: int,
    rates: Rates,
    activations: Counter,
) -> Plan | None:
    """Return the plan with the shortest step that fits the device; None if none does.

    Everything resident, or else each granularity with a few numbers of slots; arguments are as for
    `every_plan`.
    """
    config, needed = stored(config, storage), activations(_compute(storage))

    def made(**changes: object) -> Plan:
        settings = config.replace(**changes)
        return make_plan(model, settings, tokens=tokens, rates=rates, activations=needed)

    whole = made(resident="all" if rates.device.type == "cuda" else 0)
    if whole.fits(rates.memory):
        return whole
    for granularity in Granularity:  # blocks first: modules are smaller, and never faster
        ways = []
        for slots in SLOTS:
            ways.append(made(granularity=granularity, slots=slots))
            config = config.replace(write_back=ways[0].config.write_back)
        fitting = [plan for plan in ways if plan.fits(rates.memory)]
        if fitting:
            best = min(plan.step.seconds for plan in fitting)
            near = [plan for plan in fitting if plan.step.seconds <= _EQUAL * best]
            return min(near, key=lambda plan: plan.device)
    return None


def _compute(storage: Storage) -> torch.dtype:
    """Return the compute dtype of plans: bfloat16 for formats with scales, else the format's."""
    return torch.bfloat16 if storage.scaled else storage.dtype


def stored(config: ZOConfig, storage: Storage) -> ZOConfig:
    """Return `config` with a storage format, and the compute dtype that plans have with it."""
    return config.replace(storage=storage, compute_dtype=_compute(storage))
