"""Predictions for one GPU from a model's config, before any weights are loaded."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from zo2ext.checkpoints.pretrained import as_user_errors
from zo2ext.config import Granularity, ZOConfig
from zo2ext.model.layout import lay_out
from zo2ext.model.units import find_units
from zo2ext.ops.formats import Storage
from zo2ext.planning.activations import Activations, estimate_activations
from zo2ext.planning.quantized_sizes import put_stored_weights, stored_tensors
from zo2ext.planning.rates import Rates
from zo2ext.streaming.pipeline import slot_sizes


@dataclass(frozen=True)
class Plan:
    """Predicted memory and time of a step, in bytes and seconds."""

    config: ZOConfig
    tokens: int  # per batch
    parameters: int
    units: int
    host: int  # stored weights
    slots: int
    copies: int
    activations: int  # of all forward passes
    uploaded: int  # per step
    offloaded: int  # per step, averaged over write-backs
    slab_nbytes: int  # stored weights that the fused passes of a step read and write
    copies_nbytes: int  # perturbed copies that the fused passes of a step write
    transfer_seconds: float
    token_seconds: float  # all forward passes, per token of the batch
    compute_seconds: float
    hiding_tokens: float  # tokens per step from which on computation hides the transfers

    @property
    def device(self) -> int:
        """Bytes on the device, without the few hundred MB of the driver."""
        return self.slots + self.copies + self.activations

    @property
    def floor_seconds(self) -> float:
        """Lower bound of the time of a step."""
        return max(self.transfer_seconds, self.compute_seconds)


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
        config: Settings of the run; resident units are ignored.
        tokens: Batch size times sequence length.
        rates: Rates of the machine, including matrix products in the compute dtype.
        activations: Activations of a forward pass over `tokens` in the compute dtype. None: they
            are estimated from the config.
    """
    units, _ = find_units(model, config.granularity)
    layouts = [lay_out(unit, config) for unit in units]
    text = text_config(model)
    compute = config.compute_dtype or next(
        (part.compute for layout in layouts for part in layout.parts), torch.float32
    )
    activations = activations or estimate_activations(text, tokens, compute)
    parameters = sum(p.numel() for p in model.parameters())
    forwards = 2 * config.directions
    host = sum(layout.nbytes for layout in layouts)
    share = 1 / config.write_back_period if config.write_back_period else 0
    uploaded = host - round(sum(layout.low_nbytes for layout in layouts) * (1 - share))
    offloaded = round(sum(layout.trainable_nbytes for layout in layouts) * share)
    slab_nbytes = 2 * sum(layout.trainable_nbytes for layout in layouts)
    copies_nbytes = forwards * sum(layout.compute_nbytes for layout in layouts)
    per_token = 2 * _multiplied(model, text) * forwards / rates.multiply[compute]
    transfer = max(uploaded / rates.upload, offloaded / rates.offload)
    kernel_seconds = (slab_nbytes + copies_nbytes) / rates.copy
    return Plan(
        config=config,
        tokens=tokens,
        parameters=parameters,
        units=len(units),
        host=host,
        slots=sum(slot_sizes((layout.nbytes for layout in layouts), config.slots)),
        copies=config.copies * max(layout.compute_nbytes for layout in layouts),
        activations=activations.in_lockstep(forwards),
        uploaded=uploaded,
        offloaded=offloaded,
        slab_nbytes=slab_nbytes,
        copies_nbytes=copies_nbytes,
        transfer_seconds=transfer,
        token_seconds=per_token,
        compute_seconds=tokens * per_token + kernel_seconds,
        hiding_tokens=max(0.0, (transfer - kernel_seconds) / per_token),
    )


def text_config(model: nn.Module) -> Any:
    """Return the config of the language part of `model`; None where it has no config."""
    settings: Any = getattr(model, "config", None)
    return settings.get_text_config() if settings is not None else None


def _multiplied(model: nn.Module, text: Any) -> float:
    """Return the number of weights that a token is multiplied with.

    Tables that are only looked up do not count. Of experts, whose weights are one tensor with three
    dimensions, those that a token visits count.
    """
    looked_up: set[int] = set()
    other: set[int] = set()
    for module in model.modules():
        owned = looked_up if isinstance(module, nn.Embedding) else other
        owned.update(id(p) for p in module.parameters(recurse=False))
    visited = getattr(text, "num_experts_per_tok", None)
    total = 0.0
    for parameter in model.parameters():
        if id(parameter) in other:
            share = visited / len(parameter) if visited and parameter.dim() == 3 else 1
            total += parameter.numel() * min(share, 1)
    return total


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
    model: nn.Module,
    *,
    tokens: int,
    directions: int,
    write_back: int | str,
    rates: Rates,
    activations: Callable[[torch.dtype], Activations | None],
) -> Iterator[Plan]:
    """Yield a plan for each storage format and granularity.

    The compute dtype is that of the storage format, or bfloat16 for formats with scales.

    Args:
        activations: Activations as a function of the compute dtype; the rest is as for `make_plan`.
    """
    for storage in Storage:
        for granularity in Granularity:
            compute = torch.bfloat16 if storage.scaled else storage.dtype
            config = ZOConfig(
                storage=storage,
                compute_dtype=compute,
                granularity=granularity,
                directions=directions,
                write_back=write_back,
            )
            needed = activations(compute)
            yield make_plan(model, config, tokens=tokens, rates=rates, activations=needed)
