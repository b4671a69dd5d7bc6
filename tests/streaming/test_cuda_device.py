"""`CudaDevice` with a stand-in for torch.cuda: devices, threads, streams and timelines."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from types import SimpleNamespace
from typing import Any

import greenlet
import pytest
import torch
from fake_cuda import FakeCuda, Stream
from numeric import assert_same_bits
from tiny_models import batches, tiny
from torch import Tensor, nn

import zo2ext
from zo2ext.engine.engine import ZOEngine
from zo2ext.engine.thread_state import Modes
from zo2ext.runs.timeline import Kind, Recorder
from zo2ext.streaming.devices.cpu import CpuDevice
from zo2ext.streaming.devices.device import Device, Queue
from zo2ext.streaming.stores.disk import DiskStore

MODEL = "llama-tied"
STORES: dict[str, dict[str, Any]] = {
    "host": {},
    "resident": {"resident": 1},
    "disk": {"store": "disk", "host_memory": "4MiB"},
    "shared": {"store": "shared"},
}


@pytest.fixture
def world(monkeypatch: pytest.MonkeyPatch) -> FakeCuda:
    return FakeCuda().install(monkeypatch)


def train(device: Device, *, record: bool = False, **options: Any) -> dict[str, Tensor]:
    model = tiny(MODEL)
    with ZOEngine(model, zo2ext.ZOConfig(lr=1e-2, slots=2, **options), device) as zo:
        recorder = Recorder(zo)
        for batch in batches(MODEL, 4):
            with recorder.recording() if record else nullcontext():
                zo.step(lambda b=batch: model(**b).loss)
            if record:
                assert {span.kind for span in recorder.spans()} >= {Kind.KERNEL, Kind.FORWARD}
    return {name: p.data for name, p in model.named_parameters()}


@pytest.mark.parametrize("lockable", [0, 10**9])
@pytest.mark.parametrize("store", STORES)
def test_a_run_on_gpu_1_leaves_gpu_0_alone(store: str, lockable: int, world: FakeCuda) -> None:
    world.lockable = lockable
    found = train(world.gpu(1), record=True, **STORES[store])
    assert world.contexts == {1}
    for queue, thread in world.gpu(1).threads.items():
        assert thread.submit(torch.cuda.current_device).result() == 1, queue
    assert world.current_device() == 0, "the caller's device has changed"
    for name, tensor in train(CpuDevice()).items():
        assert_same_bits(found[name], tensor, name)


def test_a_pass_that_changes_modes_leaves_the_device_current(world: FakeCuda) -> None:
    stream = world.gpu(1)._computing
    other = torch.cuda.Stream(1)
    Modes.current(torch.device("cpu"))._replace(stream=other).restore()
    assert torch.cuda.current_stream(1) is other is not stream
    assert world.current_device() == 0


# -- closures on streams of their own


class Watching:
    """Notes which stream each kernel and each layer used, and that each saw what it depends on."""

    # What a hook keeps in attributes would belong to its pass alone.
    __slots__ = ("device", "kernel", "reads", "streams")

    def __init__(self, world: FakeCuda, model: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
        self.device = world.gpu(0)
        self.reads: list[tuple[int, int]] = []
        self.kernel: tuple[int, int] | None = None
        self.streams: set[int] = set()
        enqueue, modes = self.device.enqueue, Modes.current

        def current(device: torch.device) -> Modes:  # as on a GPU
            return modes(device)._replace(stream=torch.cuda.current_stream(0))

        monkeypatch.setattr(Modes, "current", current)

        def watched(queue: Queue, work: Any, *rest: Any) -> Any:
            event = enqueue(queue, work, *rest)
            if queue is Queue.COMPUTE:
                stream: Any = torch.cuda.current_stream(0)
                assert all(stream.follows(place) for place in self.reads), "weights are still read"
                self.kernel = stream.work()
                self.reads.clear()
            return event

        monkeypatch.setattr(self.device, "enqueue", watched)
        for module in model.modules():
            if isinstance(module, nn.Linear):
                module.register_forward_hook(self._layer)

    def _layer(self, *_: Any) -> None:
        stream: Any = torch.cuda.current_stream(0)
        assert self.kernel is not None
        assert stream.follows(self.kernel), "weights are not there yet"
        self.reads.append(stream.work())
        self.streams.add(stream.number)


@contextmanager
def branches(model: Any, side: Stream) -> Iterator[None]:
    """Let every second block run on another stream than the caller's."""
    entered, handles = dict[Any, AbstractContextManager[Any]](), []  # by pass

    def enter(*_: Any) -> None:
        context: Any = torch.cuda.stream(side)  # type: ignore[arg-type]
        entered[greenlet.getcurrent()] = context
        context.__enter__()

    def leave(*_: Any) -> None:
        entered.pop(greenlet.getcurrent()).__exit__(None, None, None)

    for block in model.model.layers[::2]:
        handles.append(block.register_forward_pre_hook(enter, prepend=True))
        handles.append(block.register_forward_hook(leave))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@pytest.mark.parametrize("where", ["whole pass", "a stream per pass", "branches", "between steps"])
@pytest.mark.parametrize("options", [{}, {"resident": "all"}, {"one_copy": True}])
def test_a_pass_on_a_stream_of_its_own_is_ordered(
    where: str, options: dict[str, Any], world: FakeCuda, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny(MODEL)
    watching = Watching(world, model, monkeypatch)
    own: Any = torch.cuda.Stream(0)
    data = batches(MODEL, 1)[0]

    def loss() -> Any:
        stream: Any = torch.cuda.Stream(0) if where == "a stream per pass" else own
        whole = where in ("whole pass", "a stream per pass")
        with torch.cuda.stream(stream) if whole else nullcontext():
            return model(**data).loss

    with ZOEngine(model, zo2ext.ZOConfig(lr=1e-2, slots=2, **options), watching.device) as zo:
        with branches(model, own) if where == "branches" else nullcontext():
            for _ in range(3):
                zo.step(loss)
        if where == "between steps":
            with torch.cuda.stream(own), torch.no_grad():
                model(**data)
            zo.step(loss)
    assert len(watching.streams) > 1 or where == "whole pass"


# -- several processes


@pytest.mark.parametrize("gpus", [["a", "b"], ["a", "a"]])
def test_ranks_with_one_visible_gpu_each_use_nccl(
    gpus: list[str], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    store = torch.distributed.HashStore()
    mine = threading.local()
    monkeypatch.setattr(
        torch.cuda, "get_device_properties", lambda device: SimpleNamespace(uuid=mine.uuid)
    )
    found: dict[int, bool] = {}

    def run(rank: int) -> None:
        mine.uuid = gpus[rank]
        parallel = zo2ext.Parallel(rank=rank, ranks=2, store=store)
        found[rank] = parallel._have_own_gpus(torch.device("cuda", 0))

    threads = [threading.Thread(target=run, args=(rank,)) for rank in (0, 1)]
    with caplog.at_level(logging.WARNING):
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    own = gpus[0] != gpus[1]
    assert found == {0: own, 1: own}
    assert ("ranks 0, 1 share a GPU" in caplog.text) != own


# -- timelines


def test_a_timeline_has_the_uploads_that_were_late(
    world: FakeCuda, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those of units read ahead for the next step end after this one's recording."""
    read = DiskStore._read_unit

    def slow(*args: Any) -> None:
        time.sleep(0.02)
        read(*args)

    monkeypatch.setattr(DiskStore, "_read_unit", slow)
    model = tiny(MODEL)
    config = zo2ext.ZOConfig(lr=1e-2, **STORES["disk"])
    submitted: list[int] = []
    with ZOEngine(model, config, device := world.gpu()) as zo:
        recorder = Recorder(zo)
        queued = recorder.queued

        def counted(queue: Queue, unit: int, work: Any) -> Any:
            submitted.extend([unit] if queue is Queue.UPLOAD else [])
            return queued(queue, unit, work)

        monkeypatch.setattr(recorder, "queued", counted)
        zo.step(lambda: model(**batches(MODEL, 1)[0]).loss)
        with recorder.recording():
            zo.step(lambda: model(**batches(MODEL, 1)[0]).loss)
        spans = recorder.spans()
        assert device.recorder is None
    assert submitted
    assert sum(span.kind is Kind.UPLOAD for span in spans) == len(submitted)
