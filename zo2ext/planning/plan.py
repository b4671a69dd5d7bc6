"""``zo2ext plan``: what a model will need, from its config, before any weights are loaded."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from zo2ext.checkpoints.pretrained import failing_as
from zo2ext.config import Granularity, ZOConfig
from zo2ext.model.layout import lay_out
from zo2ext.model.units import find_units
from zo2ext.ops.formats import Storage
from zo2ext.planning.activations import Activations, estimated
from zo2ext.planning.quantized_sizes import put_stored_weights, stored_tensors
from zo2ext.planning.rates import Rates
from zo2ext.streaming.pipeline import slot_sizes


@dataclass(frozen=True)
class Plan:
    """Needs of one model under one config. Bytes, seconds, tokens."""

    config: ZOConfig
    tokens: int
    parameters: int
    units: int
    host: int  # weights at rest
    slots: int
    copies: int
    activations: int
    uploaded: int  # a step
    offloaded: int  # a step, averaged over write-backs
    slab_nbytes: int  # that the fused passes of a step read and write of packed weights
    copies_nbytes: int  # and of perturbed copies
    transfer_seconds: float
    token_seconds: float  # of all forward passes, for one token of the batch
    compute_seconds: float
    hiding_tokens: float  # a step; from there on, compute hides the transfers

    @property
    def device(self) -> int:
        """Device bytes in all, the driver's own few hundred MB not counted."""
        return self.slots + self.copies + self.activations

    @property
    def floor_seconds(self) -> float:
        """No step can be faster."""
        return max(self.transfer_seconds, self.compute_seconds)


def make_plan(
    model: nn.Module,
    config: ZOConfig,
    *,
    tokens: int,
    rates: Rates,
    activations: Activations | None = None,
) -> Plan:
    """Plan training `model`, whose parameters may be on the meta device.

    Args:
        model: A causal language model.
        config: Of the run; residents are not planned for.
        tokens: In a batch: its size times its sequence length.
        rates: Of the machine, with the compute dtype among its products.
        activations: Of a forward pass over as many tokens, in the compute dtype; estimated where
            None.
    """
    units, _ = find_units(model, config.granularity)
    layouts = [lay_out(unit, config) for unit in units]
    text = text_config(model)
    compute = config.compute_dtype or next(
        (part.compute for layout in layouts for part in layout.parts), torch.float32
    )
    activations = activations or estimated(text, tokens, compute)
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
        activations=activations.of(forwards),
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
    settings: Any = getattr(model, "config", None)
    return settings.get_text_config() if settings is not None else None


def _multiplied(model: nn.Module, text: Any) -> float:
    """Weights that a token is multiplied with: no tables that are only looked up in, and of experts
    (whose weights lie side by side, in three dimensions) those that it visits."""
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
    """The model that a folder's or hub name's config describes, without memory for weights.

    Of a quantised checkpoint the headers of the weight files are read, too: its weights are frozen,
    and of the sizes that they have there.

    Raises:
        ValueError: There is no config, it describes no causal language model, or that is quantised
            and its files do not say its sizes.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    with failing_as(f"model {source!r} has no usable config"):
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
    """Plans of `model` for each storage and granularity, computing in the storage dtype, or in
    bfloat16 where that has scales.

    Args:
        activations: By compute dtype; otherwise as for `make_plan`.
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
            taken = activations(compute)
            yield make_plan(model, config, tokens=tokens, rates=rates, activations=taken)
