"""Counts the tokens of TRL's trainers once per micro-batch, however often its loss is computed."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

_MICRO_BATCH: ContextVar[object] = ContextVar("_MICRO_BATCH")  # whose loss this greenlet computes


class TokenCount:
    """A number to which computing the loss of a micro-batch adds, the same at each call.

    As an attribute of a class it replaces a plain one: ``self.count += tokens``. What calls for one
    micro-batch add counts once. An assignment outside of a loss ends the step.
    """

    def __set_name__(self, owner: type, name: str) -> None:
        self._before, self._added = f"_before{name}", f"_added{name}"

    def __get__(self, trainer: Any, owner: type | None = None) -> Any:
        added: dict[object, Any] = vars(trainer).get(self._added, {})
        return vars(trainer).get(self._before, 0) + sum(added.values())

    def __set__(self, trainer: Any, value: Any) -> None:
        micro_batch = _MICRO_BATCH.get(None)
        if micro_batch is None:
            vars(trainer).update({self._before: value, self._added: {}})
        else:
            vars(trainer)[self._added][micro_batch] = value - self.__get__(trainer)


@contextmanager
def computing_loss(micro_batch: object) -> Iterator[None]:
    """Let `TokenCount` know whose loss this block computes."""
    token = _MICRO_BATCH.set(micro_batch)
    try:
        yield
    finally:
        _MICRO_BATCH.reset(token)
