"""The part of torch's per-thread state that coroutines on a thread must not share."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch

from zo2ext._random_state import RandomState


class Modes(NamedTuple):
    """Grad mode, autocast, and the current stream."""

    grad: bool
    autocast_cache: bool
    autocast: tuple[tuple[str, bool, torch.dtype], ...]
    stream: torch.cuda.Stream | None

    @classmethod
    def current(cls, device: torch.device) -> Modes:
        kinds = ("cpu",) if device.type == "cpu" else ("cpu", device.type)
        return cls(
            torch.is_grad_enabled(),
            torch.is_autocast_cache_enabled(),
            tuple([(k, torch.is_autocast_enabled(k), torch.get_autocast_dtype(k)) for k in kinds]),
            torch.cuda.current_stream(device) if device.type == "cuda" else None,
        )

    def restore(self, *, known: Modes | None = None) -> None:
        """Make these the current modes; does nothing if they are `known` to be."""
        if self == known:
            return
        torch.set_grad_enabled(self.grad)
        torch.set_autocast_cache_enabled(self.autocast_cache)
        for kind, enabled, dtype in self.autocast:
            torch.set_autocast_enabled(kind, enabled)
            torch.set_autocast_dtype(kind, dtype)
        if self.stream is not None:
            torch.cuda.set_stream(self.stream)


@dataclass(frozen=True)
class ThreadState:
    """Modes and random state."""

    modes: Modes
    random: RandomState

    @classmethod
    def current(cls, device: torch.device) -> ThreadState:
        return cls(Modes.current(device), RandomState.current(device))

    def restore(self, *, known: ThreadState) -> None:
        """Make this the current state; `known` has the modes that are current."""
        self.modes.restore(known=known.modes)
        self.random.restore()
