"""``directions="auto"``: as many directions as cost little beside a load of the weights.

All forward passes of a step share one upload. Where the link limits the step, further directions
are free until their passes take as long as the upload.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import nn

from zo2ext.config import Granularity, ZOConfig
from zo2ext.journal.journal import read_journal
from zo2ext.model.layout import lay_out
from zo2ext.model.units import find_units
from zo2ext.planning.activations import Stage, estimate_stages
from zo2ext.planning.period import TOKENS, compute_dtype, travels
from zo2ext.planning.rates import Rates, measure_rates
from zo2ext.planning.step import Visits, time_step
from zo2ext.streaming.devices.device import Device

logger = logging.getLogger(__name__)

FEWEST, MOST = 8, 16
"""Range of ``"auto"``: 8 centered directions learn as much per forward pass as fewer, and more than
16 need too many for a short run; see docs/learning.md."""

_FREE = 1.1  # times the step of two directions: further ones that fit this are under its upload


def directions_under_an_upload(
    model: nn.Module,
    config: ZOConfig,
    rates: Rates,
    stages: Sequence[Stage] = (),
    *,
    most: int = 64,
) -> int | None:
    """Return how many directions take about as long as two; None if no trained weights travel.

    Args:
        model: Model to train; its parameters may be on the meta device.
        config: Settings of the run, but for `directions`.
        rates: Rates of the machine.
        stages: Stages of a forward pass; estimated for a batch of `TOKENS` if there are none.
        most: Largest number to consider.
    """
    # What saves memory at the cost of time does not decide how a run learns.
    config = config.replace(granularity=Granularity.BLOCK, slots=3, one_copy=False, directions=2)
    units, entries = find_units(model, config.granularity)
    layouts = [lay_out(unit, config) for unit in units]
    if not travels(layouts, config, rates.device):
        return None
    stages = stages or estimate_stages(model, entries, TOKENS)
    visits = Visits.of(entries, stages, rates, compute_dtype(layouts, config))

    def seconds(directions: int) -> float:
        # A pending step replays all its directions: the best period for one is too long for many.
        periods = (
            {max(16 // directions, 1), 2} if config.write_back == "auto" else {config.write_back}
        )
        chosen = (config.replace(directions=directions, write_back=p) for p in periods)
        return min(time_step(layouts, visits, c, rates).seconds for c in chosen)

    low, high, limit = 2, most + 1, _FREE * seconds(2)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if seconds(middle) <= limit else (low, middle)
    return low


def automatic(under_an_upload: int | None) -> int:
    """Return the number that ``"auto"`` stands for, given `directions_under_an_upload`."""
    return min(max(under_an_upload or FEWEST, FEWEST), MOST)


def with_directions(model: nn.Module, config: ZOConfig, device: Device | None) -> ZOConfig:
    """Return `config` with a number of directions if it has ``"auto"``.

    Args:
        model: Model to train.
        config: Settings of the run.
        device: Device of the run, whose rates are measured; None if no step will be made.
    """
    if config.directions != "auto":
        return config
    if device is None:
        return config.replace(directions=FEWEST)
    units, _ = find_units(model, config.granularity)
    layouts = [lay_out(unit, config) for unit in units]
    found = None
    if travels(layouts, config, device.torch_device):
        compute: tuple[torch.dtype, ...] = (compute_dtype(layouts, config),)
        rates = measure_rates(device.torch_device, compute, config.distribution, config.rounding)
        found = directions_under_an_upload(model, config, rates, most=MOST)
    chosen = automatic(found)
    logger.info("directions='auto' is %d here", chosen)
    return config.replace(directions=chosen)


def with_directions_of(config: ZOConfig, journal: Path) -> ZOConfig:
    """Return `config` with the directions of the run in `journal` if it has ``"auto"`` and there is
    such a run: it continues as it began, on whatever machine."""
    if config.directions != "auto" or not journal.is_file():
        return config
    return config.replace(directions=read_journal(journal).header["config"]["directions"])
