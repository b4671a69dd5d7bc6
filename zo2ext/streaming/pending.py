"""Updates that are known but have not yet reached every unit, and where weights are rounded."""

from __future__ import annotations

from bisect import bisect_left, bisect_right, insort
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from zo2ext import ops
from zo2ext.config import ZOConfig
from zo2ext.streaming.devices.device import Device


@dataclass(frozen=True)
class Lacking:
    """What stored weights lack.

    Attributes:
        updates: A table for `ops.update_perturb`, in order; None where nothing is lacking.
        rounding_key: Of the write-back that comes after them.
    """

    updates: Tensor | None
    rounding_key: int


@dataclass
class _Table:
    """What weights of some version lack of the steps up to `step`, and its last update's step."""

    lacking: Lacking
    last: int | None
    step: int


class PendingUpdates:
    """The updates of recent steps, and the tables of them that kernels read.

    A *write-back step* is one before which all weights are rounded to storage, wherever they are:
    every ``write_back``-th step, and those of `add_write_back`. Stored weights have the version
    of the write-back step they were stored at. A table for an older version rounds in between, so
    that it does not matter when a unit was written back.

    A step without an update (a skipped one) counts as a step with none.

    Attributes:
        period: Steps between write-back steps; None where there are no regular ones.
    """

    def __init__(self, device: Device, config: ZOConfig) -> None:
        self._device, self._config = device, config
        self.period = config.write_back_period
        self._first = 0  # step of self._steps[0]
        self._steps: list[tuple[ops.Update, ...]] = []
        self._extra: list[int] = []  # write-back steps out of turn, sorted
        self._tables: dict[tuple[int, torch.device], _Table] = {}

    @property
    def step(self) -> int:
        """Steps finished: the step that comes next."""
        return self._first + len(self._steps)

    def restart(self, step: int, pending: Sequence[tuple[ops.Update, ...]] = ()) -> None:
        """`pending` are the updates of `step` and the steps after it; nothing else is."""
        self._first = step
        self._steps = list(pending)
        self._extra.clear()
        self._tables.clear()

    def append(self, updates: Sequence[ops.Update]) -> None:
        """Add the updates of the step that just finished, in order of direction."""
        # Tables that this step did not need belong to versions that units had before.
        self._tables = {key: t for key, t in self._tables.items() if t.step == self.step}
        self._steps.append(tuple(updates))

    def since_write_back(self) -> list[tuple[ops.Update, ...]]:
        """The updates of each step since the last write-back step; empty if there are none."""
        steps = self._steps[max(self.last_write_back() - self._first, 0) :]
        return steps if any(steps) else []

    # -- write-back steps

    def add_write_back(self, step: int) -> None:
        """Make `step`, the next one or a later one, a write-back step."""
        if not self.is_write_back(step):
            insort(self._extra, step)
            self._tables.clear()  # they may have the key of a later one

    def is_write_back(self, step: int) -> bool:
        """Whether weights are rounded to storage before `step` perturbs them."""
        return (self.period is not None and step % self.period == 0) or step in self._extra

    def last_write_back(self) -> int:
        """The latest write-back step up to the next step; 0 where there was none."""
        period = self.period
        extra = bisect_right(self._extra, self.step)
        candidates = [self.step - self.step % period] if period is not None else []
        return max([*candidates, *self._extra[:extra], 0])

    def _next_write_back(self, after: int) -> int | None:
        """The first write-back step after step `after`."""
        period = self.period
        extra = bisect_right(self._extra, after)
        candidates = [after - after % period + period] if period is not None else []
        return min([*candidates, *self._extra[extra : extra + 1]], default=None)

    # -- tables

    def any_since(self, version: int, until: int | None = None) -> bool:
        """Whether weights of `version` lack any update of the steps before `until`, or of all."""
        end = None if until is None else until - self._first
        return any(self._steps[version - self._first : end])

    def lacking(self, version: int, *, until: int | None = None, host: bool = False) -> Lacking:
        """What weights of `version` lack, up to step `until` (all, when None).

        The table is on the device, or on the host.
        """
        where = torch.device("cpu") if host else self._device.torch_device
        until = self.step if until is None else until
        table = self._tables.get((version, where))
        if table is not None and table.step == until:
            return table.lacking
        if table is None or table.step > until:
            table = self._tables[version, where] = _Table(Lacking(None, 0), None, version)
        updates = self._extended(table, until, where)
        rounded = until if table.last is None else self._next_write_back(table.last)
        key = 0 if rounded is None else ops.direction_key(self._config.seed, rounded, 0)
        table.lacking = Lacking(updates, key)
        return table.lacking

    def _extended(self, table: _Table, until: int, where: torch.device) -> Tensor | None:
        """The updates of `table` and those after them; `table` is told how far they go."""
        rows: list[ops.Update] = []
        for step in range(table.step, until):
            updates = self._steps[step - self._first]
            if updates:
                rows += (self._rounded_first(updates[0], table.last, step), *updates[1:])
                table.last = step
        table.step, before = until, table.lacking.updates
        if not rows:
            return before
        added = ops.update_table(rows, where)
        return added if before is None else torch.cat([before, added])

    def _rounded_first(self, update: ops.Update, last: int | None, step: int) -> ops.Update:
        """`update`, of `step`, rounding first if a write-back lies between it and step `last`."""
        rounded = None if last is None else self._next_write_back(last)
        if rounded is None or rounded > step:
            return update
        key = ops.direction_key(self._config.seed, rounded, 0)
        return replace(update, round_first=self._config.rounding, rounding_key=key)

    def drop_before(self, version: int) -> None:
        """Forget the updates of steps before `version`: every unit has them."""
        if version > self._first:
            del self._steps[: version - self._first]
            self._first = version
            self._extra = self._extra[bisect_left(self._extra, version) :]
            self._tables = {key: t for key, t in self._tables.items() if key[0] >= version}
