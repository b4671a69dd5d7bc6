"""Page-locked host memory, unlocked whatever becomes of its owner."""

from __future__ import annotations

import os
import weakref
from contextlib import ExitStack

from torch import Tensor

from zo2ext.streaming.devices.device import Device


class PageLocks:
    """Host memory that is page-locked for a device, where the system allows it.

    It is unlocked when `close` is called, when this object is garbage collected, or when the
    process exits. It stays mapped until then. A forked process leaves its parent's memory locked.

    Attributes:
        close: Unlocks all memory. Calling it again has no effect.
    """

    def __init__(self, device: Device) -> None:
        self._device, self._unlocks = device, ExitStack()
        self.close = weakref.finalize(self, _close, self._unlocks, os.getpid())

    def add(self, memory: Tensor) -> None:
        """Page-lock `memory`, whole pages."""
        self._unlocks.callback(self._device.register(memory))


def _close(unlocks: ExitStack, owner: int) -> None:
    if os.getpid() == owner:
        unlocks.close()  # calls all of them, even if one fails
