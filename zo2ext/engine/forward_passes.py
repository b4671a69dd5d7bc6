"""The forward passes of one step: running the loss closures and collecting their values."""

from __future__ import annotations

import logging
import math
import struct
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from zo2ext._random_state import RandomState
from zo2ext.engine.hooks import ModelHooks, ReadCheck
from zo2ext.engine.lockstep import Lockstep
from zo2ext.engine.pass_difference import explain_difference
from zo2ext.engine.pass_state import PassState, SharedState
from zo2ext.errors import (
    LateRead,
    ReadAroundStandIn,
    UnsupportedModel,
    UserError,
    ZO2Error,
)
from zo2ext.model.compile import is_compiled, uncompiled
from zo2ext.model.factored import Factored
from zo2ext.model.factors import JoinedPasses
from zo2ext.streaming.pipeline import Pipeline
from zo2ext.streaming.unit_loader import Loader, Perturbation

logger = logging.getLogger(__name__)

Closure = Callable[[], Any]
Losses = tuple[tuple[float, ...], ...]


class ForwardPasses:
    """Runs loss closures of one model, all in lockstep.

    Args:
        collective: Whether all ranks of the host must visit every unit in every step.

    Attributes:
        running: Whether a step's closures are running.
    """

    def __init__(
        self,
        model: nn.Module,
        hooks: ModelHooks,
        loader: Loader,
        pipeline: Pipeline,
        device: torch.device,
        *,
        collective: bool,
    ) -> None:
        self._model, self._hooks, self._loader = model, hooks, loader
        self._pipeline, self._device, self._collective = pipeline, device, collective
        self._state = PassState(model, hooks.restored_namespaces)
        self.running = False

    def run(
        self,
        closures: Sequence[Closure],
        weights: tuple[float, ...] | None,
        perturbations: list[Perturbation],
    ) -> Losses:
        """Run each closure under each perturbation, and return the losses as float32 values.

        Args:
            weights: Weights of the closures; one of weight 0 is not run, its losses are zeros.
        """
        if weights is None:
            return self._run(closures, perturbations)
        needed = [closure for closure, weight in zip(closures, weights, strict=True) if weight]
        if not needed and self._collective:
            self._run(closures[:1], perturbations)  # the host's other ranks gather units with us
        losses = iter(self._run(needed, perturbations))
        zeros = (0.0,) * len(perturbations)
        return tuple(next(losses) if weight else zeros for weight in weights)

    def _run(self, closures: Sequence[Closure], perturbations: list[Perturbation]) -> Losses:
        if not closures:
            return ()
        if self._loader.factored and is_compiled(self._model):
            raise UnsupportedModel(
                "the model is compiled, and compiled code cannot have factored directions; set "
                "rank=None, or do not compile the model"
            )
        self._hooks.close_reads()
        self.running = True
        before = RandomState.current(self._device)
        try:
            while (values := self._run_once(closures, perturbations)) is None:
                before.restore()
            return _float32_rows(values)
        finally:
            self.running = False

    @torch.no_grad()
    def _run_once(
        self, closures: Sequence[Closure], perturbations: list[Perturbation]
    ) -> list[list[Any]] | None:
        """Return what the closures return; None if they have to run again."""
        try:
            if self._state.learning:
                return self._watched(closures, perturbations)
            return self._in_lockstep(closures, perturbations)
        except ReadAroundStandIn as error:
            raise UnsupportedModel(str(error)) from error
        except LateRead as late:
            logger.info("unit %s is read late; it is kept loaded", late.unit.name)
        except SharedState:
            logger.info("passes shared what a forward leaves behind; each has its own from now on")
        return None

    def _in_lockstep(
        self,
        closures: Sequence[Closure],
        perturbations: list[Perturbation],
        *,
        trial: bool = False,
    ) -> list[list[Any]]:
        self._pipeline.begin_step()
        hooks = self._hooks
        lockstep = Lockstep(self._loader, perturbations, hooks.activate, hooks.restore, self._state)
        joined = self._loader.joined
        if joined is None:
            return lockstep.run(closures, hooks.kept, self._device, trial=trial)
        numbers, rows = torch.arange(len(perturbations), device=self._device), list[list[Any]]()
        # One after the other, as levels of vmap must not alternate; the first comes last, because
        # what it leaves behind stays.
        for i, closure in reversed([*enumerate(closures)]):
            together = partial(_together, closure, joined, numbers)
            run = partial(lockstep.run, [together], hooks.kept, self._device, together=True)
            ((values,),) = run(trial=trial or i > 0)
            rows.insert(0, list(values.unbind()))
        return rows

    def _watched(
        self, closures: Sequence[Closure], perturbations: list[Perturbation]
    ) -> list[list[Any]] | None:
        """Run the closures, watching what they read and what they leave behind."""
        # Compiled code must not be traced with the check in it: it would stay as slow. Run
        # uncompiled, it may compute other last bits than the run's, so its values are not used.
        compiled = is_compiled(self._model)
        Factored.made.clear()
        with ReadCheck(self._hooks, self._state.used), uncompiled():
            # Ranks that gather units together all make the same number of passes over them.
            several = self._collective or len(closures) * len(perturbations) > 1
            several = several and self._loader.joined is None  # vmap keeps those apart
            one = partial(self._in_lockstep, closures[:1], perturbations[:1], trial=True)
            alone = one() if several else None
            values = self._in_lockstep(closures, perturbations)
            if alone is not None and _differ(alone, values):
                every = partial(self._in_lockstep, closures, perturbations, trial=True)
                explain_difference(self._model, self._state, one, every, _differ)
        self._state.finish_learning()
        for dense in Factored.described():
            logger.warning("in each forward pass the model needs a dense weight: %s", dense)
        return None if compiled else values


def _together(closure: Closure, joined: JoinedPasses, numbers: Tensor) -> Tensor:
    """Run a closure for all joined passes at once; return a value per pass.

    Raises:
        UnsupportedModel: vmap cannot run it so.
    """

    def one(number: Tensor) -> Any:
        joined.number = number
        return closure()

    # torch's fused attention for CPUs would run pass by pass.
    on_cpu = numbers.device.type == "cpu"
    try:
        with sdpa_kernel(SDPBackend.MATH) if on_cpu else nullcontext():
            values: Tensor = torch.func.vmap(one, randomness="same")(numbers)
            return values
    except ZO2Error:
        raise
    except Exception as error:
        raise UnsupportedModel(
            f"the forward passes cannot run as one batch ({error}); set joined=False"
        ) from error
    finally:
        joined.number = None


def _differ(some: list[list[Any]], others: list[list[Any]]) -> bool:
    """Return whether the bits of the first losses differ."""
    a, b = _scalars([some[0][0]]), _scalars([others[0][0]])
    return struct.pack("f", *a) != struct.pack("f", *b)


def _float32_rows(rows: list[list[Any]]) -> Losses:
    """Round the values of each closure, one per perturbation, to float32."""
    values = iter(_scalars([value for row in rows for value in row]))
    return tuple(tuple(next(values) for _ in row) for row in rows)


def _scalars(values: list[Any]) -> list[float]:
    """Return the closures' values as floats; on a GPU, with one transfer for all."""
    # Metrics often return NumPy's scalars or arrays of one element.
    values = [
        v.item() if isinstance(v, (np.generic, np.ndarray)) and v.size == 1 else v for v in values
    ]
    for value in values:
        if isinstance(value, Tensor) and value.numel() != 1:
            raise UserError(f"loss must be a scalar, got a tensor of shape {tuple(value.shape)}")
        if not isinstance(value, (Tensor, int, float)):
            raise UserError(f"loss must be a tensor or a number, got {type(value).__name__}")
    if values and all(isinstance(value, Tensor) for value in values):
        stacked = torch.stack([value.detach().reshape(()).float() for value in values])
        return [float(v) for v in stacked.tolist()]
    return [float(torch.tensor(float(value), dtype=torch.float32)) for value in values]


def check_weights(weights: Sequence[float] | None, count: int) -> tuple[float, ...] | None:
    """Return the weights of `count` micro-batches as floats.

    Raises:
        UserError: Their number differs, or one is negative or not finite.
    """
    if weights is None:
        return None
    if len(weights) != count:
        raise UserError(f"weights must be {count}, one per micro-batch, got {len(weights)}")
    if not all(0 <= weight < math.inf for weight in weights):
        raise UserError(f"weights must be finite and at least 0, got {list(weights)}")
    return tuple(float(weight) for weight in weights)
