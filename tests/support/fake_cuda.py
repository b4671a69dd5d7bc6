"""A stand-in for torch.cuda: devices, streams and events without a GPU, as strict as torch's.

Work runs at once, on the CPU. Each stream has a clock of what precedes its next work, per stream,
so that a test can ask whether one piece of work was ordered after another.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch

from zo2ext.streaming.devices import cuda
from zo2ext.streaming.devices.cuda import CudaDevice

Clock = dict[int, int]  # pieces of work that are past, by number of the stream


class Stream:
    __module__ = "torch.cuda.streams"  # what torch's objects hold belongs to no forward pass

    def __init__(self, world: FakeCuda, device: int, number: int) -> None:
        self._world, self.device, self.number = world, torch.device("cuda", device), number
        self.clock: Clock = {number: 0}

    def work(self) -> tuple[int, int]:
        """Queue a piece of work, and return its place."""
        self._world.touch(self.device.index)
        self.clock[self.number] += 1
        return self.number, self.clock[self.number]

    def follows(self, place: tuple[int, int]) -> bool:
        """Whether work that is queued from now on is ordered after the work at `place`."""
        return self.clock.get(place[0], 0) >= place[1]

    def _join(self, clock: Clock) -> None:
        for number, count in clock.items():
            self.clock[number] = max(self.clock.get(number, 0), count)

    def wait_event(self, event: Event) -> None:
        if event.clock is not None:
            self._join(event.clock)

    def wait_stream(self, stream: Stream) -> None:
        self._join(stream.clock)

    def record_event(self, event: Event | None = None) -> Event:
        event = event or Event()
        event.record(self)
        return event


class Event:
    world: FakeCuda

    def __init__(self, enable_timing: bool = False) -> None:
        self.timing, self.device, self.clock = enable_timing, None, None
        self.finished = False

    def record(self, stream: Stream | None = None) -> None:
        stream = stream or self.world.current_stream()
        if self.device not in (None, stream.device):
            raise RuntimeError(
                f"Event device {self.device} does not match recording stream's {stream.device}"
            )
        self.world.touch(stream.device.index)
        self.device, self.clock, self.finished = stream.device, dict(stream.clock), False
        self.time = self.world.tick()

    def synchronize(self) -> None:
        self.world.touch(self.world.current_device())
        self.finished = True

    def elapsed_time(self, other: Event) -> float:
        if not (self.timing and other.timing and self.clock and other.clock):
            raise ValueError("both events must be recorded, with timing")
        if self.device != other.device:
            raise RuntimeError(f"events are on {self.device} and {other.device}")
        for event in (self, other):
            if not event.finished and event.time > self.world.synchronized.get(event.device, 0):
                raise RuntimeError("device not ready")
        return float(other.time - self.time)


class Runtime:
    """The calls of the CUDA runtime that torch passes on."""

    def __init__(self, world: FakeCuda) -> None:
        self._world = world

    def cudaHostRegister(self, address: int, nbytes: int, flags: int) -> int:  # noqa: N802
        world = self._world
        world.touch(world.current_device())
        world.registrations += 1
        if world.registrations > world.lockable:
            return world.fail(2)
        if any(a < address + nbytes and address < a + n for a, n in world.locked.items()):
            return world.fail(712)
        world.locked[address] = nbytes
        return 0

    def cudaHostUnregister(self, address: int) -> int:  # noqa: N802
        self._world.touch(self._world.current_device())
        return 0 if self._world.locked.pop(address, None) else self._world.fail(713)

    def cudaGetErrorString(self, code: int) -> str:  # noqa: N802
        return {2: "out of memory"}.get(code, f"error {code}")


class FakeCuda:
    """What torch.cuda does on a machine with `count` GPUs.

    Attributes:
        lockable: Number of calls of cudaHostRegister that succeed.
        locked: Bytes of page-locked memory, by address.
        error: The runtime's last error; 0 if there is none.
        contexts: Devices on which something was done.
    """

    def __init__(self, count: int = 2) -> None:
        self._local = threading.local()
        self._streams = 0
        self._defaults = [self._stream(k) for k in range(count)]
        self.count = count
        self.lockable, self.registrations, self.error = 10**9, 0, 0
        self.locked: dict[int, int] = {}
        self.contexts: set[int] = set()
        self.synchronized: dict[torch.device | None, int] = {}
        self._time = 0

    def _stream(self, device: int) -> Stream:
        self._streams += 1
        return Stream(self, device, self._streams)

    def fail(self, code: int) -> int:
        self.error = code
        return code

    def clear_error(self) -> None:
        self.error = 0

    def touch(self, device: int) -> None:
        self.contexts.add(device)

    def tick(self) -> int:
        self._time += 1
        return self._time

    # -- torch.cuda

    def index(self, device: Any = None) -> int:
        if isinstance(device, int):
            return device
        if device is not None and torch.device(device).index is not None:
            return torch.device(device).index
        return self.current_device()

    def current_device(self) -> int:
        return getattr(self._local, "device", 0)

    def set_device(self, device: Any) -> None:
        self._local.device = self.index(device)
        self.touch(self._local.device)

    def _current(self) -> dict[int, Stream]:
        if not hasattr(self._local, "streams"):
            self._local.streams = dict(enumerate(self._defaults))
        return self._local.streams

    def current_stream(self, device: Any = None) -> Stream:
        return self._current()[self.index(device)]

    def set_stream(self, stream: Stream) -> None:
        self.set_device(stream.device)
        self._current()[stream.device.index] = stream

    @contextmanager
    def device(self, device: Any) -> Iterator[None]:
        before = self.current_device()
        self._local.device = self.index(device)
        try:
            yield
        finally:
            self._local.device = before

    @contextmanager
    def stream(self, stream: Stream) -> Iterator[None]:
        with self.device(stream.device):
            current = self._current()
            before = current[stream.device.index]
            current[stream.device.index] = stream
            try:
                yield
            finally:
                current[stream.device.index] = before

    def synchronize(self, device: Any = None) -> None:
        self.touch(self.index(device))
        self.synchronized[torch.device("cuda", self.index(device))] = self._time

    def install(self, monkeypatch: pytest.MonkeyPatch) -> FakeCuda:
        """Put this in place of torch.cuda's functions and classes."""

        def new(cls: type, device: Any = None) -> Stream:
            return self._stream(self.index(device))

        runtime, event = Runtime(self), type("Event", (Event,), {"world": self})
        for name, value in {
            "Stream": type("Stream", (), {"__new__": new}),
            "Event": event,
            "device": self.device,
            "stream": self.stream,
            "current_device": self.current_device,
            "current_stream": self.current_stream,
            "set_device": self.set_device,
            "set_stream": self.set_stream,
            "synchronize": self.synchronize,
            "device_count": lambda: self.count,
            "cudart": lambda: runtime,
        }.items():
            monkeypatch.setattr(torch.cuda, name, value)
        monkeypatch.setattr(cuda, "clear_cuda_error", self.clear_error)
        monkeypatch.setitem(globals(), "Event", event)
        return self

    def gpu(self, index: int = 1) -> CudaDevice:
        """Return a device whose streams and events are those of GPU `index`; its memory is not."""
        device = CudaDevice(torch.device("cuda", index))
        device.torch_device = torch.device("cpu")
        return device
