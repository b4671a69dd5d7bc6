"""The part of torch's random state that a forward pass may draw from, for example for dropout."""

from __future__ import annotations

import struct
import zlib
from dataclasses import dataclass

import torch
from torch import Tensor

_PHILOX = struct.Struct("<QQ")  # seed, offset


@dataclass(frozen=True)
class RandomState:
    """State of a device's generators. Reading and restoring it never waits for a GPU.

    Attributes:
        device: The device.
        cpu: State of the CPU generator, which models may use on any device; bytes.
        gpu: Seed and offset of a GPU's generator, which define its state; None on a CPU.
    """

    device: torch.device
    cpu: Tensor
    gpu: tuple[int, int] | None

    @classmethod
    def current(cls, device: torch.device) -> RandomState:
        cpu = torch.get_rng_state()
        if device.type != "cuda":
            return cls(device, cpu, None)
        generator = _gpu_generator(device)
        return cls(device, cpu, (generator.initial_seed(), generator.get_offset()))

    def restore(self) -> None:
        torch.set_rng_state(self.cpu)
        if self.gpu is None:
            return
        generator = _gpu_generator(self.device)
        if self.gpu != (generator.initial_seed(), generator.get_offset()):
            seed, offset = self.gpu
            generator.manual_seed(seed)
            generator.set_offset(offset)

    def encode(self) -> bytes:
        """Return the state as bytes for another process; see `adopt`."""
        gpu = b"" if self.gpu is None else _PHILOX.pack(*self.gpu)
        return self.cpu.numpy().tobytes() + gpu

    def adopt(self, data: bytes) -> RandomState:
        """Return this state with the values that another process has encoded.

        If the other device is of another kind, only the state of the CPU generator is adopted: it
        comes first, and has the same size everywhere.
        """
        cpu, gpu = data[: self.cpu.numel()], data[self.cpu.numel() :]
        return RandomState(
            self.device,
            torch.frombuffer(bytearray(cpu), dtype=torch.uint8),
            _PHILOX.unpack(gpu) if self.gpu is not None and gpu else self.gpu,
        )

    def used_since(self) -> int:
        """Return a CRC-32 of the states of generators that were used since; 0 if none was."""
        now = RandomState.current(self.device)
        used = b"" if torch.equal(self.cpu, now.cpu) else self.cpu.numpy().tobytes()
        if self.gpu is not None and self.gpu != now.gpu:
            used += _PHILOX.pack(*self.gpu)
        return zlib.crc32(used)


def _gpu_generator(device: torch.device) -> torch.Generator:
    torch.cuda.init()  # which creates the generators
    index = torch.cuda.current_device() if device.index is None else device.index
    generator: torch.Generator = torch.cuda.default_generators[index]
    return generator
