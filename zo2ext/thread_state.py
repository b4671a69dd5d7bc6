"""Torch's state of a thread that coroutines on it must not share."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor


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
        """Put these in place; nothing has to be done where they are `known` to be."""
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
class RandomState:
    """Of the generators that a forward pass on `device` may draw from."""

    device: torch.device
    cpu: Tensor
    cuda: tuple[int, int] | None  # seed and offset: all there is to a Philox generator

    @classmethod
    def current(cls, device: torch.device) -> RandomState:
        """Never waits for a GPU: the state of its generator is the host's."""
        cpu = torch.get_rng_state()
        if device.type != "cuda":
            return cls(device, cpu, None)
        generator = _cuda_generator(device)
        return cls(device, cpu, (generator.initial_seed(), generator.get_offset()))

    def restore(self) -> None:
        """Let the generators go on from here."""
        torch.set_rng_state(self.cpu)
        if self.cuda is None:
            return
        generator = _cuda_generator(self.device)
        if self.cuda != (generator.initial_seed(), generator.get_offset()):
            seed, offset = self.cuda
            generator.manual_seed(seed)
            generator.set_offset(offset)


def _cuda_generator(device: torch.device) -> torch.Generator:
    torch.cuda.init()  # there are no generators before
    index = torch.cuda.current_device() if device.index is None else device.index
    generator: torch.Generator = torch.cuda.default_generators[index]
    return generator


@dataclass(frozen=True)
class ThreadState:
    """All of it."""

    modes: Modes
    random: RandomState

    @classmethod
    def current(cls, device: torch.device) -> ThreadState:
        return cls(Modes.current(device), RandomState.current(device))

    def restore(self, *, known: ThreadState) -> None:
        """Put this in place; the modes that are there are `known`."""
        self.modes.restore(known=known.modes)
        self.random.restore()
