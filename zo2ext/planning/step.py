"""The time of a step by the clock: the run's own loader and pipeline on a virtual device."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch

from zo2ext import ops
from zo2ext.config import ZOConfig
from zo2ext.model.layout import UnitLayout
from zo2ext.model.units import Entry, Unit
from zo2ext.planning.activations import Stage
from zo2ext.planning.clock import ClockDevice, ShapeStore
from zo2ext.planning.rates import Rates
from zo2ext.streaming.devices.device import Queue
from zo2ext.streaming.pipeline import Pipeline, resident_units
from zo2ext.streaming.unit_loader import Loader, Perturbation

LONGEST = 64  # steps; a longer period between write-backs is predicted as if there were none
_MEASURED = 3  # steps at least
_EPS = 1e-3  # of no importance here

OPERATION = 4e-6  # seconds of the host to dispatch one operation of a forward pass
VISIT = 50e-6  # seconds of the host to load a unit, besides what it queues
STEP = 1.5e-3  # seconds of the host between the losses and the first unit of the next step


@dataclass(frozen=True)
class StepTime:
    """The predicted step, averaged over a period between write-backs; bytes and seconds.

    Attributes:
        seconds: Time of a step.
        uploaded: Bytes to the device.
        offloaded: Bytes back.
        upload, offload: Time of these transfers, each alone.
        weights: Time of the fused passes over the weights.
        forward: Time of all forward passes.
        share: Share of its rate that each direction keeps while both are busy.
        slots_nbytes: Device memory of slots and resident units.
        copies_nbytes: Device memory of perturbed copies.
    """

    seconds: float
    uploaded: float
    offloaded: float
    upload: float
    offload: float
    weights: float
    forward: float
    share: float
    slots_nbytes: int
    copies_nbytes: int

    @property
    def transfers(self) -> float:
        """Time of all transfers, both directions at once: no link is faster."""
        shorter, longer = sorted((self.upload, self.offload))
        return longer + shorter * (1 - self.share) / self.share

    @property
    def compute(self) -> float:
        return self.weights + self.forward

    @property
    def floor(self) -> float:
        """Lower bound of the time of a step: nothing waits for anything."""
        return max(self.transfers, self.compute)


@dataclass(frozen=True)
class Visits:
    """The order in which a forward pass needs units, and how long it computes with each."""

    units: tuple[Unit, ...]
    seconds: float
    operations: int

    @staticmethod
    def of(
        entries: Sequence[Entry], stages: Sequence[Stage], rates: Rates, compute: torch.dtype
    ) -> list[Visits]:
        """Return the visits of a pass through `stages`, whose modules are `entries` or in them."""
        owners = {entry.name: entry for entry in entries}

        def owner(name: str) -> Entry | None:
            while name and name not in owners:
                name = name.rpartition(".")[0]
            return owners.get(name)

        visits: list[tuple[Entry | None, float, int]] = []
        for stage in stages:
            entry = owner(stage.module)
            seconds = stage.flops / rates.multiply[compute] + stage.nbytes / rates.copy
            operations = stage.operations
            if visits and (entry is None or visits[-1][0] in (entry, None)):
                before = visits.pop()
                entry = entry or before[0]
                seconds, operations = seconds + before[1], operations + before[2]
            visits.append((entry, seconds, operations))
        return [Visits(e.units if e else (), seconds, count) for e, seconds, count in visits]


def time_step(
    layouts: Sequence[UnitLayout], visits: Sequence[Visits], config: ZOConfig, rates: Rates
) -> StepTime:
    """Run some steps on the clock, and return the time of one in the long run.

    Args:
        layouts: Layouts of the units; their parameters may be on the meta device.
        visits: Visits of a forward pass.
        config: Settings of the run, with a decided `write_back`.
        rates: Rates of the machine.
    """
    device, config = ClockDevice(rates), config.replace(joined=False)
    store = ShapeStore(layouts, device, rates)
    resident = resident_units(layouts, config.resident)
    pipeline = Pipeline(store, device, slots=config.slots, resident=resident)
    forwards = config.forwards
    loader = Loader(store, device, pipeline, config, forwards, kernels=device)
    period = min(config.write_back_period or LONGEST, LONGEST)
    if config.write_back_period is None or config.write_back_period > LONGEST:
        loader.pending.period = None
    measured = -(-_MEASURED // period) * period
    marks = []
    for step in range(measured + 2):
        forward = _run_step(step, device, pipeline, loader, visits, config)
        traffic = pipeline.traffic
        marks.append((device.host, traffic.uploaded, traffic.offloaded, *device.busy.values()))
    # The first step learns the order; the last write-back's transfers end in the step after it.
    begin, end = marks[1], marks[-1]
    seconds, up, down, upload, compute, offload = (
        (b - a) / measured for a, b in zip(begin, end, strict=True)
    )
    return StepTime(
        seconds=seconds,
        uploaded=up,
        offloaded=down,
        upload=upload,
        offload=offload,
        weights=compute - forward,
        forward=forward,
        share=rates.share,
        slots_nbytes=pipeline.device_nbytes,
        copies_nbytes=loader.compute_nbytes,
    )


def _run_step(
    step: int,
    device: ClockDevice,
    pipeline: Pipeline,
    loader: Loader,
    visits: Sequence[Visits],
    config: ZOConfig,
) -> float:
    """Run one step as `Lockstep` does, and return the seconds of its forward passes."""
    keys = [step * config.count + d for d in range(config.count)]
    sides = (_EPS, -_EPS)[: config.slopes.sides]
    perturbations = tuple(Perturbation(key, eps, d) for d, key in enumerate(keys) for eps in sides)
    device.host += STEP
    pipeline.begin_step()
    event = None
    for visit in visits:
        loaded = [loader.load(unit, perturbations) for unit in visit.units]
        device.host += VISIT * len(loaded)
        for copy in range(len(perturbations)):
            for unit in loaded:
                loader.copy(unit, copy)
            device.host += OPERATION * visit.operations
            event = device.submit(Queue.COMPUTE, partial(device.spend, visit.seconds))
        for unit in loaded:
            loader.unload(unit)
    loader.finish_step()
    pipeline.end_step()
    device.wait(event)  # the losses
    loader.pending.append([ops.Update(key, 1e-9) for key in keys])
    return len(perturbations) * sum(visit.seconds for visit in visits)
