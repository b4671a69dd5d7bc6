"""Where the host waits for the GPU."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import torch


def waits(work: Callable[[], object]) -> list[str]:
    """Where `work` makes the host wait for the GPU."""
    torch.cuda.synchronize()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            work()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    # Torch also says, once per process, that this does not detect all synchronizing operations.
    messages = [str(warning.message) for warning in caught]
    return [message for message in messages if message.startswith("called a synchronizing")]
