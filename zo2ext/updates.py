"""Updates that are known but have not yet reached every unit."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from zo2ext import ops
from zo2ext.devices import Device


class PendingUpdates:
    """The updates of recent steps, and the tables of them that kernels read.

    A step without an update (a skipped one) counts as a step with none.
    """

    def __init__(self, device: Device) -> None:
        self._device = device
        self._first = 0  # step of self._steps[0]
        self._steps: list[tuple[ops.Update, ...]] = []
        self._tables: dict[tuple[int, torch.device], Tensor | None] = {}

    @property
    def step(self) -> int:
        """Steps finished: the step that comes next."""
        return self._first + len(self._steps)

    def restart(self, step: int) -> None:
        """Nothing is pending, and `step` comes next."""
        self._first = step
        self._steps.clear()
        self._tables.clear()

    def append(self, updates: Sequence[ops.Update]) -> None:
        """Add the updates of the step that just finished, in order of direction."""
        self._steps.append(tuple(updates))
        self._tables.clear()

    def any_since(self, version: int) -> bool:
        """Whether weights with all updates before step `version` lack any."""
        return any(self._steps[version - self._first :])

    def table(self, version: int, *, host: bool = False) -> Tensor | None:
        """The update table that weights of `version` lack, in order; None where there is none.

        On the device, or on the host. Shape (updates, 2), int64; see `ops.update_table`.
        """
        where = torch.device("cpu") if host else self._device.torch_device
        if (version, where) not in self._tables:
            lacking = [u for step in self._steps[version - self._first :] for u in step]
            table = ops.update_table(lacking, where) if lacking else None
            self._tables[version, where] = table
        return self._tables[version, where]

    def drop_before(self, version: int) -> None:
        """Forget the updates of steps before `version`: every unit has them."""
        if version > self._first:
            del self._steps[: version - self._first]
            self._first = version
            self._tables.clear()
