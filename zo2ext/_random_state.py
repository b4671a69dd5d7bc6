"""The random state that a forward pass may draw from, for example for dropout."""

from __future__ import annotations

import json
import random
import struct
import zlib
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

_PHILOX = struct.Struct("<QQ")  # seed, offset
_LENGTH = struct.Struct("<I")


@dataclass(frozen=True)
class HostGenerators:
    """State of the global generators of Python and NumPy; reading it takes longer than torch's.

    Attributes:
        python: What ``random.getstate`` returns.
        numpy: What ``numpy.random.get_state`` returns, with the keys as bytes.
    """

    python: tuple[Any, ...]
    numpy: tuple[Any, ...]

    @classmethod
    def current(cls) -> HostGenerators:
        kind, keys, *rest = np.random.get_state(legacy=True)
        return cls(random.getstate(), (kind, np.asarray(keys).tobytes(), *rest))

    def restore(self) -> None:
        random.setstate(self.python)
        kind, keys, *rest = self.numpy
        np.random.set_state((kind, np.frombuffer(keys, dtype=np.uint32), *rest))

    def encode(self) -> bytes:
        kind, keys, *rest = self.numpy
        return json.dumps([self.python, [kind, keys.hex(), *rest]]).encode()

    @classmethod
    def decode(cls, data: bytes) -> HostGenerators:
        (version, state, gauss), (kind, keys, *rest) = json.loads(data)
        return cls((version, tuple(state), gauss), (kind, bytes.fromhex(keys), *rest))


@dataclass(frozen=True)
class RandomState:
    """State of torch's generators. Reading and restoring it never waits for a GPU.

    Attributes:
        device: The device.
        cpu: State of the CPU generator, which models may use on any device; bytes.
        gpu: Seed and offset of a GPU's generator, which define its state; None on a CPU.
        host: State of Python's and NumPy's generators, if it was read as well.
    """

    device: torch.device
    cpu: Tensor
    gpu: tuple[int, int] | None
    host: HostGenerators | None = None

    @classmethod
    def current(cls, device: torch.device, *, host: bool = False) -> RandomState:
        """Return the current state, with Python's and NumPy's generators if `host`."""
        cpu, others = torch.get_rng_state(), HostGenerators.current() if host else None
        if device.type != "cuda":
            return cls(device, cpu, None, others)
        generator = _gpu_generator(device)
        return cls(device, cpu, (generator.initial_seed(), generator.get_offset()), others)

    def restore(self) -> None:
        torch.set_rng_state(self.cpu)
        if self.host is not None:
            self.host.restore()
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
        host = b"" if self.host is None else self.host.encode()
        return self.cpu.numpy().tobytes() + _LENGTH.pack(len(host)) + host + gpu

    def adopt(self, data: bytes) -> RandomState:
        """Return this state with the values that another process has encoded.

        If the other device is of another kind, its GPU's generator is not adopted.
        """
        size = self.cpu.numel()  # the same everywhere
        (length,) = _LENGTH.unpack_from(data, size)
        host = data[size + _LENGTH.size :][:length]
        gpu = data[size + _LENGTH.size + length :]
        return RandomState(
            self.device,
            torch.frombuffer(bytearray(data[:size]), dtype=torch.uint8),
            _PHILOX.unpack(gpu) if self.gpu is not None and gpu else self.gpu,
            HostGenerators.decode(host) if host else self.host,
        )

    def used_since(self) -> int:
        """Return a CRC-32 of the states of generators that were used since; 0 if none was."""
        now = RandomState.current(self.device, host=self.host is not None)
        used = b"" if torch.equal(self.cpu, now.cpu) else self.cpu.numpy().tobytes()
        if self.gpu is not None and self.gpu != now.gpu:
            used += _PHILOX.pack(*self.gpu)
        if self.host is not None and self.host != now.host:
            used += self.host.encode()
        return zlib.crc32(used)


def _gpu_generator(device: torch.device) -> torch.Generator:
    torch.cuda.init()  # which creates the generators
    index = torch.cuda.current_device() if device.index is None else device.index
    generator: torch.Generator = torch.cuda.default_generators[index]
    return generator
