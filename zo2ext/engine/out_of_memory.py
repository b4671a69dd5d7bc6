"""Explains what a run needs on the device when it does not fit."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import nn

from zo2ext._format import gib
from zo2ext.config import Granularity, ZOConfig
from zo2ext.errors import OutOfDeviceMemory
from zo2ext.model.chunked_loss import needs_all_logits
from zo2ext.model.layout import UnitLayout
from zo2ext.streaming.pipeline import ring_nbytes


@contextmanager
def explain_out_of_memory(
    model: nn.Module, layouts: Sequence[UnitLayout], config: ZOConfig
) -> Iterator[None]:
    """Turn torch's out-of-memory error into one that lists needs and settings."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise OutOfDeviceMemory(_explanation(model, layouts, config, error)) from error


def _explanation(
    model: nn.Module, layouts: Sequence[UnitLayout], config: ZOConfig, error: BaseException
) -> str:
    largest = max(layouts, key=lambda layout: layout.nbytes)
    copy = max(layout.compute_nbytes for layout in layouts)
    copies = config.copies
    slots = ring_nbytes((layout.nbytes for layout in layouts), config.slots)
    advice = []
    if config.resident != 0:
        advice.append(f"a lower resident (now {config.resident!r})")
    if config.granularity is Granularity.BLOCK:
        advice.append("granularity='module'")
    if config.slots > 2:
        advice.append(f"slots=2 (now {config.slots})")
    if not config.one_copy:
        advice.append("one_copy=True")
    if config.count > 1:
        advice.append(f"fewer directions (now {config.count})")
    if needs_all_logits(model):
        advice.append("zo2ext.chunk_loss(model), for losses from a few rows of logits at a time")
    if getattr(getattr(model, "config", None), "use_cache", False):
        advice.append("model.config.use_cache = False, as a step needs no keys and values later")
    advice.append("a smaller batch or shorter sequences (activations)")
    return (
        "the device's memory is too small.\n"
        f"  largest unit   {gib(largest.nbytes)}  ({largest.unit.name})\n"
        f"  slots          {gib(slots)}  (of the {config.slots} largest units)\n"
        f"  weight copies  {gib(copies * copy)}  ({copies} perturbed copies of the largest unit)\n"
        f"  resident       {config.resident!r} of {len(layouts)} units, "
        f"{gib(sum(layout.nbytes for layout in layouts))} in all\n"
        "  activations    the rest: they grow with batch size x sequence length x vocabulary\n"
        f"Try {', '.join(advice)}.\n({error})"
    )
