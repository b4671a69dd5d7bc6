"""The part of torch's state that forward passes on one thread must not share."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from zo2ext._random_state import RandomState
from zo2ext.ops._extension import _C


def _matmul_precision() -> str | None:
    """Return torch's older setting; None if a newer one is in use, which it cannot express."""
    try:
        return torch.get_float32_matmul_precision()
    except RuntimeError:
        return None


def _set_matmul_precision(precision: str | None) -> None:
    if precision is not None:
        torch.set_float32_matmul_precision(precision)


# Settings that are global, but that contexts such as `sdpa_kernel` change around a forward.
_FLAGS: tuple[tuple[Callable[[], Any], Callable[[Any], Any]], ...] = (
    (torch.get_default_dtype, torch.set_default_dtype),
    (_matmul_precision, _set_matmul_precision),
    (torch.are_deterministic_algorithms_enabled, torch.use_deterministic_algorithms),
    (torch.is_autocast_cache_enabled, torch.set_autocast_cache_enabled),
    (torch.backends.mha.get_fastpath_enabled, torch.backends.mha.set_fastpath_enabled),
    (torch.backends.cuda.flash_sdp_enabled, torch.backends.cuda.enable_flash_sdp),
    (torch.backends.cuda.mem_efficient_sdp_enabled, torch.backends.cuda.enable_mem_efficient_sdp),
    (torch.backends.cuda.math_sdp_enabled, torch.backends.cuda.enable_math_sdp),
    (torch.backends.cuda.cudnn_sdp_enabled, torch.backends.cuda.enable_cudnn_sdp),
    (torch._C._get_sdp_priority_order, torch._C._set_sdp_priority_order),
    (torch._C._get_cudnn_enabled, torch._C._set_cudnn_enabled),
    (torch._C._get_cudnn_benchmark, torch._C._set_cudnn_benchmark),
    (torch._C._get_cudnn_deterministic, torch._C._set_cudnn_deterministic),
)


class Modes(NamedTuple):
    """Holds what `ThreadLocalState` lacks: global flags, autocast's dtypes, the current stream."""

    flags: tuple[Any, ...]
    autocast: tuple[tuple[str, torch.dtype], ...]
    stream: torch.cuda.Stream | None

    @classmethod
    def current(cls, device: torch.device) -> Modes:
        kinds = ("cpu",) if device.type == "cpu" else ("cpu", device.type)
        return cls(
            tuple([read() for read, _ in _FLAGS]),
            tuple([(kind, torch.get_autocast_dtype(kind)) for kind in kinds]),
            torch.cuda.current_stream(device) if device.type == "cuda" else None,
        )

    def restore(self, *, known: Modes | None = None) -> None:
        """Make these the current modes; does nothing if they are `known` to be."""
        if self == known:
            return
        for (read, write), value in zip(_FLAGS, self.flags, strict=True):
            if read() != value:
                write(value)
        for kind, dtype in self.autocast:
            torch.set_autocast_dtype(kind, dtype)
        if self.stream is not None:
            with torch.cuda.device(self.stream.device):  # which set_stream would leave current
                torch.cuda.set_stream(self.stream)


@dataclass(frozen=True)
class ThreadState:
    """Everything that contexts around a forward may have changed, and the random state.

    Attributes:
        local: torch's thread-local state: grad mode, inference mode, autocast, torch's modes.
    """

    local: _C.ThreadLocalState
    modes: Modes
    random: RandomState

    @classmethod
    def current(cls, device: torch.device) -> ThreadState:
        return cls(_C.ThreadLocalState(), Modes.current(device), RandomState.current(device))

    def restore(self, *, known: ThreadState) -> None:
        """Make this the current state; `known` has the modes that are current."""
        self.restore_modes(known=known.modes)
        self.random.restore()

    def restore_modes(self, *, known: Modes | None = None) -> None:
        """Make this the current state, except for the random state."""
        self.local.restore()
        self.modes.restore(known=known)
