"""Torch's random state, as far as a forward pass on a device may draw from it: dropout, say."""

from __future__ import annotations

import struct
import zlib
from dataclasses import dataclass

import torch
from torch import Tensor

_PHILOX = struct.Struct("<QQ")  # seed, offset


@dataclass(frozen=True)
class RandomState:
    """Of a device's generators. Reading and restoring them never waits for a GPU.

    Attributes:
        device: Whose.
        cpu: That of the generator for CPUs, which models may draw from on any device; bytes.
        gpu: Seed and offset of a GPU's generator, which are all there is to it; else None.
    """

    device: torch.device
    cpu: Tensor
    gpu: tuple[int, int] | None

    @classmethod
    def current(cls, device: torch.device) -> RandomState:
        """As it is now."""
        cpu = torch.get_rng_state()
        if device.type != "cuda":
            return cls(device, cpu, None)
        generator = _gpu_generator(device)
        return cls(device, cpu, (generator.initial_seed(), generator.get_offset()))

    def restore(self) -> None:
        """Make it the current one."""
        torch.set_rng_state(self.cpu)
        if self.gpu is None:
            return
        generator = _gpu_generator(self.device)
        if self.gpu != (generator.initial_seed(), generator.get_offset()):
            seed, offset = self.gpu
            generator.manual_seed(seed)
            generator.set_offset(offset)

    def encode(self) -> bytes:
        """For another process; see `taken_over`."""
        gpu = b"" if self.gpu is None else _PHILOX.pack(*self.gpu)
        return self.cpu.numpy().tobytes() + gpu

    def taken_over(self, data: bytes) -> RandomState:
        """This one with the states that another process's has encoded.

        Where the other one's device is of another kind, only the generator for CPUs is taken over:
        it comes first, and has the same size everywhere.
        """
        cpu, gpu = data[: self.cpu.numel()], data[self.cpu.numel() :]
        return RandomState(
            self.device,
            torch.frombuffer(bytearray(cpu), dtype=torch.uint8),
            _PHILOX.unpack(gpu) if self.gpu is not None and gpu else self.gpu,
        )

    def used_since(self) -> int:
        """CRC-32 of the states, of those generators that were drawn from since; 0 for none."""
        now = RandomState.current(self.device)
        used = b"" if torch.equal(self.cpu, now.cpu) else self.cpu.numpy().tobytes()
        if self.gpu is not None and self.gpu != now.gpu:
            used += _PHILOX.pack(*self.gpu)
        return zlib.crc32(used)


def _gpu_generator(device: torch.device) -> torch.Generator:
    torch.cuda.init()  # there are no generators before
    index = torch.cuda.current_device() if device.index is None else device.index
    generator: torch.Generator = torch.cuda.default_generators[index]
    return generator
