"""``write_back="auto"``: the number of steps between write-backs that takes the least time.

With factored directions it is chosen for what is learned instead: see `FACTORED`.

Where units stream, the link limits the step. A write-back slows the uploads down that share the
link with it, and replays of updates are free as long as they are shorter than the uploads. Where
nothing travels there is nothing to save.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence

import torch
from torch import nn

from zo2ext.config import Granularity, ZOConfig
from zo2ext.model.layout import UnitLayout, lay_out
from zo2ext.model.units import find_units
from zo2ext.planning.activations import Stage, estimate_stages
from zo2ext.planning.rates import Rates, measure_rates
from zo2ext.planning.step import Visits, time_step
from zo2ext.streaming.devices.device import Device
from zo2ext.streaming.pipeline import resident_units

logger = logging.getLogger(__name__)

CANDIDATES = (1, 2, 4, 8, 16)
FACTORED = 50
"""Period of runs with one factored direction, as in LOZO (arXiv:2410.07698): one pass over the
weights in 50 steps. Of several directions each has factors of its own, which forward passes would
all have to apply; their steps are larger, too, so that a pass over the weights costs less."""
TOKENS = 2048  # per batch; what a run reads is not known before its first step
_EQUAL = 1.005  # times that differ by less are equal; the shorter period then costs less memory


def choose_period(
    model: nn.Module, config: ZOConfig, rates: Rates, stages: Sequence[Stage] = ()
) -> int:
    """Return the period of the shortest predicted step; 1 if no trained weights travel.

    It is that of units that are blocks, in three slots: settings of memory do not change the bits.

    Args:
        model: Model to train; its parameters may be on the meta device.
        config: Settings of the run.
        rates: Rates of the machine.
        stages: Stages of a forward pass; estimated for a batch of `TOKENS` if there are none.
    """
    if config.rank is not None:
        return _factored_period(config)
    config = config.replace(granularity=Granularity.BLOCK, slots=3, one_copy=False)
    units, entries = find_units(model, config.granularity)
    layouts = [lay_out(unit, config) for unit in units]
    if not travels(layouts, config, rates.device):
        return 1
    compute = compute_dtype(layouts, config)
    stages = stages or estimate_stages(model, entries, TOKENS)
    visits = Visits.of(entries, stages, rates, compute)
    times = {
        period: time_step(layouts, visits, config.replace(write_back=period), rates).seconds
        for period in CANDIDATES
    }
    best = min(times.values())
    return next(period for period, seconds in times.items() if seconds <= _EQUAL * best)


def with_period(
    model: nn.Module, layouts: Sequence[UnitLayout], config: ZOConfig, device: Device
) -> ZOConfig:
    """Return `config` with the period for `model` on `device`, whose rates are measured."""
    if config.rank is not None:
        return config.replace(write_back=_factored_period(config))
    if not travels(layouts, config, device.torch_device):
        return config.replace(write_back=1)
    compute = compute_dtype(layouts, config)
    rates = measure_rates(device.torch_device, (compute,), config.distribution, config.rounding)
    period = choose_period(model, config, rates)
    logger.info("write_back='auto' is %d here, by the rates of this machine: %s", period, rates)
    return config.replace(write_back=period)


def _factored_period(config: ZOConfig) -> int:
    return FACTORED if config.count == 1 else 1


def compute_dtype(layouts: Sequence[UnitLayout], config: ZOConfig) -> torch.dtype:
    """Return the dtype that the forward pass computes in."""
    parts = (part.compute for layout in layouts for part in layout.parts)
    return config.compute_dtype or next(parts, torch.float32)


def travels(layouts: Sequence[UnitLayout], config: ZOConfig, device: torch.device) -> bool:
    """Return whether trained weights pass over a link in each step."""
    resident = resident_units(layouts, config.resident)
    streamed = [layout for layout in layouts if layout.unit.index not in resident]
    return device.type == "cuda" and any(layout.parts for layout in streamed)
