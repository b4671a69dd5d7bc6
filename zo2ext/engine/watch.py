"""Watches a run for what would otherwise go wrong in silence."""

from __future__ import annotations

import logging
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from zo2ext.engine.update_rule import StepRecord
from zo2ext.errors import UserError

logger = logging.getLogger(__name__)

_MOST_EQUAL = 10  # steps in a row with equal losses after which a run is warned of


class RunWatch:
    """Warns of runs that learn nothing or lose buffers, and refuses parameters frozen on the way.

    Args:
        model: Model of the run, before its first step.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model, self._equal = model, 0
        self._parameters = list(model.named_parameters())
        self._trained = [p.requires_grad for _, p in self._parameters]
        self._first: dict[str, Tensor] | None = None  # buffers before the first computed step

    def before_step(self) -> None:
        """Check that the trained parameters are those of the run; keep the buffers once.

        Raises:
            UserError: A parameter was frozen or unfrozen.
        """
        for (name, parameter), trained in zip(self._parameters, self._trained, strict=True):
            if parameter.requires_grad != trained:
                raise UserError(
                    f"{name}.requires_grad is {not trained}, but was {trained} when the run began: "
                    "end it, and train the changed model in a new run"
                )
        if self._first is None:
            self._first = {name: buffer.clone() for name, buffer in self._buffers()}

    def after_step(self, record: StepRecord, *, journal: bool) -> None:
        """Warn if the last steps learned nothing or, once, if a journal lacks changed buffers."""
        self._equal = self._equal + 1 if record.equal else 0
        if self._equal == _MOST_EQUAL:
            logger.warning(
                "all losses were equal in each of the last %d steps: nothing is being "
                "learned. The loss may be constant in the weights or in its value, as that of "
                "GRPO; eps may be too small for the dtype of the weights or of the loss",
                _MOST_EQUAL,
            )
        if self._first:
            now = dict(self._buffers())
            changed = [n for n, b in self._first.items() if n in now and not torch.equal(now[n], b)]
            if changed and journal:
                logger.warning(
                    "forward passes change buffers (%s): checkpoints have them, but the journal "
                    "does not. A run that continues from its journal, and an export from it, has "
                    "those of the starting model; model.eval() keeps them as they are",
                    ", ".join(changed[:3]) + (", ..." if len(changed) > 3 else ""),
                )
            self._first = {}

    def _buffers(self) -> Iterator[tuple[str, Tensor]]:
        """Yield the buffers that checkpoints contain, by name."""
        for prefix, module in self._model.named_modules():
            for name, buffer in module._buffers.items():
                if buffer is not None and name not in module._non_persistent_buffers_set:
                    yield f"{prefix}.{name}" if prefix else name, buffer
