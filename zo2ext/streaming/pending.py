"""Updates that have not reached every unit yet, and the steps at which weights are rounded."""

from __future__ import annotations

from bisect import bisect_left, bisect_right, insort
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from zo2ext import ops
from zo2ext.config import ZOConfig
from zo2ext.streaming.devices.device import Device


@dataclass(frozen=True)
class MissingUpdates:
    """Updates that stored weights do not contain yet.

    Attributes:
        updates: Table for `ops.update_perturb`, in order; None if no update is missing.
        rounding_key: Key of the write-back that follows them.
    """

    updates: Tensor | None
    rounding_key: int


@dataclass
class _Table:
    """Updates of the steps before `step` that weights of some version miss."""

    missing: MissingUpdates
    last: int | None  # step of the last update
    step: int


NOTHING_MISSING = MissingUpdates(None, 0)


class PendingUpdates:
    """The updates of recent steps, and the tables of them that kernels read.

    Before a *write-back step* every unit's weights are rounded to their storage format: before
    every ``write_back``-th step, and before those of `add_write_back`. A unit that is not loaded at
    such a step is rounded the next time it is loaded, with that step's key, so the result does not
    depend on when it is loaded. The *version* of stored weights is the write-back step at which
    they were stored; a table for an older version includes the roundings in between.

    Attributes:
        period: Steps between regular write-back steps; None if there are none.
    """

    def __init__(self, device: Device, config: ZOConfig) -> None:
        self._device, self._config = device, config
        self.period = config.write_back_period
        self._first = 0  # step of self._steps[0]
        self._steps: list[tuple[ops.Update, ...]] = []
        self._extra: list[int] = []  # write-back steps out of turn, sorted
        self._tables: dict[tuple[int, torch.device], _Table] = {}
        self._of_directions: dict[tuple[int, int, int, torch.device], Tensor | None] = {}

    @property
    def step(self) -> int:
        """Number of finished steps, which is also the index of the next step."""
        return self._first + len(self._steps)

    def restart(self, step: int, pending: Sequence[tuple[ops.Update, ...]] = ()) -> None:
        """Replace everything by `pending`: the updates of `step` and of the steps after it."""
        self._first = step
        self._steps = list(pending)
        self._extra.clear()
        self.drop_tables()

    def append(self, updates: Sequence[ops.Update]) -> None:
        """Add the updates of the step that just finished, in order of direction.

        A skipped step has none.
        """
        # Tables that this step did not use belong to versions that no unit has any more.
        self._tables = {key: t for key, t in self._tables.items() if t.step == self.step}
        self._of_directions.clear()
        self._steps.append(tuple(updates))

    def since_write_back(self) -> list[tuple[ops.Update, ...]]:
        """Return the updates of each step since the last write-back step; [] if there are none."""
        steps = self._steps[max(self.last_write_back() - self._first, 0) :]
        return steps if any(steps) else []

    def drop_tables(self) -> None:
        """Let go of the memory of all tables."""
        self._tables.clear()
        self._of_directions.clear()

    # -- write-back steps

    def add_write_back(self, step: int) -> None:
        """Make `step`, the next one or a later one, a write-back step."""
        if not self.is_write_back(step):
            insort(self._extra, step)
            self.drop_tables()  # they may contain the key of a later one

    def is_write_back(self, step: int) -> bool:
        """Return whether weights are rounded to storage before `step` perturbs them."""
        return (self.period is not None and step % self.period == 0) or step in self._extra

    def last_write_back(self) -> int:
        """Return the latest write-back step up to the next step; 0 if there was none."""
        period = self.period
        extra = bisect_right(self._extra, self.step)
        candidates = [self.step - self.step % period] if period is not None else []
        return max([*candidates, *self._extra[:extra], 0])

    def _next_write_back(self, after: int) -> int | None:
        """Return the first write-back step after step `after`."""
        period = self.period
        extra = bisect_right(self._extra, after)
        candidates = [after - after % period + period] if period is not None else []
        return min([*candidates, *self._extra[extra : extra + 1]], default=None)

    # -- tables

    def any_since(self, version: int, until: int | None = None) -> bool:
        """Return whether weights of `version` miss an update of the steps before `until`.

        None stands for all steps.
        """
        end = None if until is None else until - self._first
        return any(self._steps[version - self._first : end])

    def missing(
        self, version: int, *, until: int | None = None, host: bool = False
    ) -> MissingUpdates:
        """Return the updates that weights of `version` miss.

        Args:
            version: Write-back step at which the weights were stored.
            until: Include only steps before this one; None: all steps.
            host: Make the table in host memory instead of on the device.
        """
        where = torch.device("cpu") if host else self._device.torch_device
        until = self.step if until is None else until
        table = self._tables.get((version, where))
        if table is not None and table.step == until:
            return table.missing
        if table is None or table.step > until:
            table = self._tables[version, where] = _Table(NOTHING_MISSING, None, version)
        updates = self._extended(table, until, where)
        rounded = until if table.last is None else self._next_write_back(table.last)
        key = 0 if rounded is None else ops.direction_key(self._config.seed, rounded, 0)
        table.missing = MissingUpdates(updates, key)
        return table.missing

    def _extended(self, table: _Table, until: int, where: torch.device) -> Tensor | None:
        """Return the updates of `table` followed by those up to `until`; advance its steps."""
        rows: list[ops.Update] = []
        for step in range(table.step, until):
            updates = self._steps[step - self._first]
            if updates:
                rows += (self._rounded_first(updates[0], table.last, step), *updates[1:])
                table.last = step
        table.step, before = until, table.missing.updates
        if not rows:
            return before
        added = ops.update_table(rows, where)
        return added if before is None else torch.cat([before, added])

    def _rounded_first(self, update: ops.Update, last: int | None, step: int) -> ops.Update:
        """Return `update`, of `step`, to be rounded before if a write-back step followed `last`."""
        rounded = None if last is None else self._next_write_back(last)
        if rounded is None or rounded > step:
            return update
        key = ops.direction_key(self._config.seed, rounded, 0)
        return replace(update, round_first=self._config.rounding, rounding_key=key)

    # -- factored directions

    def stretches(self, version: int, until: int) -> list[tuple[int, int]]:
        """Return the steps with updates between `version` and `until`, two write-back steps.

        Each stretch (first, end) ends at a write-back step, before which its updates are rounded.
        """
        found, first = list[tuple[int, int]](), version
        while first < until:
            end = self._next_write_back(first)
            assert end is not None, "a stretch ends at a write-back step"
            if self.any_since(first, end):
                found.append((first, end))
            first = end
        return found

    def of_direction(
        self, direction: int, first: int, end: int, where: torch.device
    ) -> Tensor | None:
        """Return the updates along one direction in steps `first` to `end`, a table on `where`.

        None if there are none.
        """
        key = (direction, first, end, where)
        if key not in self._of_directions:
            steps = self._steps[first - self._first : end - self._first]
            rows = [updates[direction] for updates in steps if updates]
            self._of_directions[key] = ops.update_table(rows, where) if rows else None
        return self._of_directions[key]

    def decay(self, first: int, end: int) -> float:
        """Return the product of the decays of steps `first` to `end`, in order, in float32."""
        product = np.float32(1)
        for updates in self._steps[first - self._first : end - self._first]:
            if updates:
                product *= np.float32(updates[0].decay)
        return float(product)

    def right_key(self, step: int, direction: int) -> int:
        """Return the key of a direction's right factors, the same in the whole regular period."""
        first = 0 if self.period is None else step - step % self.period
        return ops.direction_key(self._config.seed, first, direction)

    # -- the end

    def drop_before(self, version: int) -> None:
        """Forget the updates of steps before `version`, which every unit has."""
        if version > self._first:
            del self._steps[: version - self._first]
            self._first = version
            self._extra = self._extra[bisect_left(self._extra, version) :]
            self._tables = {key: t for key, t in self._tables.items() if key[0] >= version}
