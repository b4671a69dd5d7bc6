"""Find a learning rate: train while the rate rises until the loss blows up, and undo everything.

The largest rate at which a run learns is a fixed fraction of the rate at which a rising one ends
it, as far as was measured (docs/learning_rate.md).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from math import inf, isfinite, isnan, nan
from pathlib import Path
from statistics import median
from typing import Any, Self

from torch import nn

from zo2ext._files import write_atomically
from zo2ext._random_state import RandomState
from zo2ext.config import ZOConfig
from zo2ext.engine.engine import ZOEngine
from zo2ext.engine.offload import offload
from zo2ext.errors import UserError
from zo2ext.model.quantized import rebuild
from zo2ext.model.units import find_units
from zo2ext.parallel.parallel import Parallel
from zo2ext.runs import plots

RATE_PICTURE = "lr.png"  # in a run's folder
_SEARCH = "lr_search"  # in a run's description

_FORWARDS, _FEWEST = 240, 40  # forward passes in which the rate rises by _RANGE; its fewest steps
_RANGE = 1e4  # its middle is the default rate
_EARLY = 4  # a ramp that ends in the first quarter began too high
_LONGEST = 2  # a ramp goes on to twice its steps
_ATTEMPTS = 3
_ONE, _SEVERAL = 16.0, 32.0  # by what to divide the rate at which the run diverges, by directions
_FEW = 9  # steps whose median loss is compared

Step = Callable[[int, float], Any]
"""Makes step i of an engine with a learning rate."""
Opened = Callable[[ZOConfig], AbstractContextManager[tuple[ZOEngine, Step]]]
"""Opens an engine of the run's starting weights, and closes it without changing them."""


@dataclass(frozen=True)
class RateCurve:
    """Result of a search for the learning rate.

    Attributes:
        lr: Learning rate to train with.
        rates: Learning rate of each step of the search, rising.
        losses: Loss of each step; the last one ended the search.
        directions: Directions per step, which the rate is for.

    Example:
        >>> found = zo2ext.find_lr(model, config, loss)
        >>> found.save("lr.png")
        >>> config = config.replace(lr=found.lr, directions=found.directions)
    """

    lr: float
    rates: tuple[float, ...]
    losses: tuple[float, ...]
    directions: int

    def png(self) -> bytes:
        """Return a picture of the losses over the rates, as PNG. It needs matplotlib."""
        return plots.rate_curve(self.rates, self.losses, self.lr)

    def save(self, path: str | Path) -> None:
        """Write the picture to a file.

        Raises:
            OSError: It cannot be written.
        """
        write_atomically(Path(path), self.png())

    def as_json(self) -> dict[str, Any]:
        """Return the curve as JSON values, for a journal's header. NaN, unequal to itself, is None.

        Infinities are None as well, as JSON has none.
        """
        losses = [loss if isfinite(loss) else None for loss in self.losses]
        rates, directions = list(self.rates), self.directions
        return {"lr": self.lr, "rates": rates, "losses": losses, "directions": directions}

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> Self:
        """Return the curve that `as_json` described."""
        losses = tuple(nan if loss is None else float(loss) for loss in content["losses"])
        return cls(content["lr"], tuple(content["rates"]), losses, content["directions"])


def described(curve: RateCurve | None) -> dict[str, Any]:
    """Return `curve` as a part of a run's description in its journal; nothing if it is None."""
    return {} if curve is None else {_SEARCH: curve.as_json()}


def recorded_curve(header: Mapping[str, Any]) -> RateCurve | None:
    """Return the curve in the header of a journal; None if its run had no search."""
    found = header["run"].get(_SEARCH)
    return None if found is None else RateCurve.from_json(found)


def find_lr(
    model: nn.Module,
    config: ZOConfig | None,
    loss: Callable[[], Any],
    *,
    parallel: Parallel | None = None,
) -> RateCurve:
    """Find a learning rate for `model` by steps of training that are undone.

    The rate rises geometrically from far below the default to far above it, until a loss exceeds
    ``2 * first + 1`` or is not finite. The learning rate is a fixed fraction of the rate at that
    step: a sixteenth with one direction, a thirty-second with several. The steps are those of the
    run, with its estimator, directions, `eps` and seed; with several directions there are 40.

    Afterwards all is as before, to the bit: parameters, buffers, devices and modes of the model,
    and the states of the random generators of Python, NumPy and torch.

    Args:
        model: An ordinary model, which is not offloaded.
        config: Settings of the run; the defaults if None. Its `lr` has no effect.
        loss: Computes the loss of one batch, as for `ZOEngine.step`, and may use another batch in
            each step. All calls of a step begin with the same state of the random generators of
            Python, NumPy and torch, so a batch that is drawn with them is the same for all. One
            that is taken from an iterator is not: take it before, once per step, in a loop of your
            own. A warning is logged if two calls with the same weights differ.
        parallel: This process among several that train the model together, with the same call.
            They find the same rate.

    Returns:
        The rate, and the loss at each rate.

    Raises:
        UserError: The loss is not finite at the start, or no rate makes it worse, or all do.
        TypeError, ValueError, OutOfDeviceMemory, RankFailure: As `zo2ext.offload` raises them.

    Example:
        >>> def loss():
        ...     rows = torch.randint(len(data), (8,))
        ...     return model(input_ids=data[rows], labels=data[rows]).loss
        >>> lr = zo2ext.find_lr(model, config, loss).lr
    """

    @contextmanager
    def opened(config: ZOConfig) -> Iterator[tuple[ZOEngine, Step]]:
        with offloaded_for_search(model, config, parallel) as engine:

            def step(index: int, lr: float) -> None:
                engine.step(loss, lr=lr)

            yield engine, step

    return search(config or ZOConfig(), opened)


def search(config: ZOConfig, opened: Opened) -> RateCurve:
    """Find the learning rate of a run; see `find_lr`.

    Args:
        config: Settings of the run.
        opened: Opens an engine with settings that `search` passes. It may be called several times.
            All ranks make the same steps.
    """
    # A guard would put the divergence off.
    config = config.replace(lr=None, clip=None, write_back="never", storage=None)
    low = _RANGE**-0.5  # of the default rate
    for _ in range(_ATTEMPTS):
        with opened(config) as (engine, step):
            decided = engine.config
            steps = max(_FEWEST, _FORWARDS // decided.forwards)
            rates, losses = _ramp(engine, step, low, steps)
        end = _divergence(rates, losses)
        if end >= steps // _EARLY:
            lr = rates[end] / (_ONE if decided.count == 1 else _SEVERAL)
            return RateCurve(lr, tuple(rates), tuple(losses), decided.count)
        low /= _RANGE
    raise UserError(
        f"no learning rate can be found: the loss went from {losses[0]:.4g} to {losses[-1]:.4g} "
        f"even with a rate of {rates[-1]:.2g}. Its values may differ too much from batch to batch; "
        "use larger batches, or set the rate as a number"
    )


def _ramp(engine: ZOEngine, step: Step, low: float, steps: int) -> tuple[list[float], list[float]]:
    """Make steps at a rising rate until the loss diverges; return their rates and losses."""
    default, growth = engine.config.lr, _RANGE ** (1 / steps)
    assert isinstance(default, float)
    rates: list[float] = []
    losses: list[float] = []
    for index in range(_LONGEST * steps):
        step(index, default * low * growth**index)
        last = engine.last
        assert last is not None
        rates.append(last.lr)
        losses.append(last.loss)
        if losses[-1] > _limit(losses) or _ends_in_nan(losses):
            break
    return rates, losses


def _limit(losses: Sequence[float]) -> float:
    """Return the loss beyond which a run has diverged: twice the first one plus 1, if positive."""
    first = next((loss for loss in losses if isfinite(loss)), inf)
    return first + abs(first) + 1


def _ends_in_nan(losses: Sequence[float]) -> bool:
    """Return whether the last two losses are NaN; a single one may be that of an empty batch."""
    return len(losses) > 1 and all(map(isnan, losses[-2:]))


def _divergence(rates: Sequence[float], losses: Sequence[float]) -> int:
    """Return the step of a ramp at which the run diverged.

    That is the last one if its loss is beyond the limit. A loss with bounds, such as minus an
    accuracy, never is: where it stays worse than it was, it is the step half-way to there.
    """
    if losses[-1] > _limit(losses):
        return len(losses) - 1
    finite = [(i, loss) for i, loss in enumerate(losses) if isfinite(loss)]
    if not finite:
        raise UserError(
            f"the loss is {losses[0]} before any training, so no learning rate can be found: the "
            "weights are damaged, or the loss overflows in their dtype"
        )
    values = [loss for _, loss in finite]
    first, last = values[:_FEW], values[-_FEW:]
    if median(last) > max(first):
        half = (median(first) + median(last)) / 2
        return next(i for n, (i, _) in enumerate(finite) if median(values[n : n + _FEW]) > half)
    if _ends_in_nan(losses):
        return len(losses) - 2
    raise UserError(
        f"no learning rate can be found: the loss, {median(first):.4g} at first, is "
        f"{median(last):.4g} at a rate of {rates[-1]:.2g}, and was never above "
        f"{_limit(losses):.4g}. It may not depend on the trained weights, or be as bad as it can "
        "be from the start; set the rate as a number"
    )


@contextmanager
def offloaded_for_search(
    model: nn.Module, config: ZOConfig, parallel: Parallel | None
) -> Iterator[ZOEngine]:
    """Offload `model` for steps that the end of the block undoes; see `find_lr`.

    Args:
        config: Settings with ``write_back="never"`` and ``storage=None``, so that the stored
            weights stay as they are.
    """
    engine: ZOEngine | None = None
    before = _Before(model, config)
    try:
        engine = offload(model, config, parallel=parallel)
        before.random = RandomState.current(engine.device, host=True)
        yield engine
    except BaseException as error:
        if engine is not None:
            engine.fail(error)
        raise
    finally:
        if engine is not None:
            engine.resume(steps=0)  # forgets the updates, which no stored weight has
            engine.close()
            before.restore()


class _Before:
    """A model's state before a search that is not in the engine's store.

    Attributes:
        random: State of the random generators.
    """

    def __init__(self, model: nn.Module, config: ZOConfig) -> None:
        self.random: RandomState | None = None
        self._modes = [(module, module.training) for module in model.modules()]
        self._buffers = [
            (module, name, buffer, buffer.clone())
            for module in model.modules()
            for name, buffer in module._buffers.items()
            if buffer is not None
        ]
        self._specs = [s for unit in find_units(model, config.granularity)[0] for s in unit.tensors]
        # An engine gives weights back on the CPU and in the dtype that the model computes in.
        self._devices = [(t, t.data.device) for spec in self._specs for t in spec.targets]
        self._exact = [
            (spec.parameter, spec.parameter.data)
            for spec in self._specs
            if not spec.components and config.compute_dtype not in (None, spec.parameter.dtype)
        ]

    def restore(self) -> None:
        for parameter, data in self._exact:
            parameter.data = data
        for target, device in self._devices:
            if target.data.device != device:
                target.data = target.data.to(device)
        for spec in self._specs:
            if spec.components:
                rebuild(spec.parameter)
        for module, name, buffer, values in self._buffers:
            module._buffers[name] = buffer.copy_(values)
        for module, training in self._modes:
            module.training = training
        if self.random is not None:
            self.random.restore()
