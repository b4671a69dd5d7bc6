"""The store that a config asks for."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from zo2ext.config import Store, ZOConfig
from zo2ext.model.layout import UnitLayout
from zo2ext.streaming.devices.device import Device
from zo2ext.streaming.stores.disk import DiskStore
from zo2ext.streaming.stores.host import HostStore
from zo2ext.streaming.stores.host_group import HostRanks
from zo2ext.streaming.stores.shared import SlicedStore
from zo2ext.streaming.stores.store import WeightStore


def make_store(
    layouts: Sequence[UnitLayout],
    device: Device,
    config: ZOConfig,
    host_ranks: Callable[[], HostRanks],
) -> WeightStore:
    """Return an empty store for units with these layouts.

    Args:
        host_ranks: Returns the ranks of this host; called only if they share the store.
    """
    if config.store is Store.DISK:
        return DiskStore(layouts, device, config)
    if config.store is Store.SHARED:
        return SlicedStore(layouts, device, host_ranks())
    return HostStore(layouts, device)
