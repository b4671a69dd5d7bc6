"""Page-locked memory: refused, given up at any point, dropped, forked."""

from __future__ import annotations

import gc
import multiprocessing
import os
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from fake_cuda import FakeCuda
from numeric import assert_same_bits
from tiny_models import batches, tiny
from torch import Tensor, nn

import zo2ext
from zo2ext.engine.engine import ZOEngine
from zo2ext.errors import UnsupportedModel, UserError
from zo2ext.streaming.devices.cpu import CpuDevice
from zo2ext.streaming.devices.cuda import CudaDevice
from zo2ext.streaming.devices.device import Dependency, Queue
from zo2ext.streaming.devices.simulated import SimulatedDevice
from zo2ext.streaming.stores.page_locks import PageLocks
from zo2ext.streaming.stores.store import map_arena

MODEL = "llama-tied"
STORES: dict[str, dict[str, Any]] = {
    "host": {},
    "disk": {"store": "disk", "host_memory": "4MiB"},
    "shared": {"store": "shared"},
}
stores = pytest.mark.parametrize("store", STORES)


class LockingDevice(SimulatedDevice):
    """Notes what is page-locked, and fails from one registration on."""

    def __init__(self, lockable: int = 10**9, error: type[BaseException] = RuntimeError) -> None:
        super().__init__()
        self.lockable, self.error = lockable, error
        self.count, self.locked = 0, dict[int, int]()

    def register(self, memory: Tensor) -> Callable[[], None]:
        if self.count >= self.lockable:
            raise self.error("no")
        self.count += 1
        self.locked[memory.data_ptr()] = memory.nbytes
        return partial(self.unlock, memory)

    def unlock(self, memory: Tensor) -> None:
        del self.locked[memory.data_ptr()]


def host_memory(nbytes: int) -> Tensor:
    return torch.frombuffer(map_arena(nbytes), dtype=torch.uint8, count=nbytes)


def config(**options: Any) -> zo2ext.ZOConfig:
    return zo2ext.ZOConfig(**{"lr": 1e-2, "slots": 2, "weight_decay": 0.1, **options})


def train(device: Any, **options: Any) -> tuple[list[float], dict[str, Tensor]]:
    model = tiny(MODEL)
    model.model.layers[1].requires_grad_(False)
    with ZOEngine(model, config(**options), device) as zo:
        losses = [zo.step(lambda b=batch: model(**b).loss) for batch in batches(MODEL, 4)]
    return losses, {name: p.data for name, p in model.named_parameters()}


def snapshot(model: nn.Module) -> dict[str, Tensor]:
    return {n: t.detach().clone() for n, t in (*model.named_parameters(), *model.named_buffers())}


def assert_whole(model: nn.Module, before: dict[str, Tensor]) -> None:
    """The model has its weights, and nothing of an engine is left on it."""
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        assert_same_bits(tensor.detach(), before[name], name)
    for module in model.modules():
        assert type(module._parameters) is dict
        for kind in ("forward_pre", "forward", "state_dict", "state_dict_pre"):
            assert not getattr(module, f"_{kind}_hooks"), kind
        assert not module._load_state_dict_pre_hooks
        assert not module._load_state_dict_post_hooks
    batch = batches(MODEL, 1)[0]
    assert torch.isfinite(model(**batch).loss)


# -- an offload that fails


@stores
@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_a_failure_at_any_registration_gives_the_model_back(
    store: str, error: type[BaseException], monkeypatch: pytest.MonkeyPatch
) -> None:
    with ZOEngine(tiny(MODEL), config(**STORES[store]), counting := LockingDevice()):
        count = counting.count
    assert count >= 3
    for k in range(count):
        model, device = tiny(MODEL), LockingDevice(k, error)
        before = snapshot(model)
        with pytest.raises(error):
            ZOEngine(model, config(**STORES[store]), device)
        assert device.locked == {}
        assert_whole(model, before)
        ZOEngine(model, config(**STORES[store]), LockingDevice()).close()
        assert_whole(model, before)


STAGES = {
    "stored": (zo2ext.engine.host_weights, "return_freed_memory"),
    "buffers": (zo2ext.engine.host_weights, "_move_buffers"),
    "pipeline": (zo2ext.streaming.pipeline.Pipeline, "_prefetch"),
    "loader": (zo2ext.streaming.unit_loader.Loader, "_new_buffer"),
    "forward hook": (nn.Module, "register_forward_hook"),
    "parameters": (zo2ext.engine.hooks.TriggeredParameters, "__init__"),
    "state hook": (nn.Module, "register_state_dict_post_hook"),
    "team": (zo2ext.parallel.parallel.SingleProcess, "team"),
}


@pytest.mark.parametrize("call", [0, 2])
@pytest.mark.parametrize("stage", STAGES)
@stores
def test_a_failure_at_any_stage_gives_the_model_back(
    store: str, stage: str, call: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    owner, name = STAGES[stage]
    original, calls = getattr(owner, name), 0

    def failing(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == call + 1:
            raise KeyboardInterrupt
        return original(*args, **kwargs)

    model, device = tiny(MODEL), LockingDevice()
    before = snapshot(model)
    monkeypatch.setattr(owner, name, failing)
    try:
        engine = ZOEngine(model, config(**STORES[store]), device)
    except KeyboardInterrupt:
        pass
    else:  # this stage has fewer calls
        assert call > 0
        monkeypatch.undo()
        engine.close()
    assert device.locked == {}
    assert_whole(model, before)


def test_rounded_weights_are_said_to_be_rounded() -> None:
    model, device = tiny(MODEL), LockingDevice(2, RuntimeError)
    with pytest.raises(RuntimeError) as caught:
        ZOEngine(model, config(storage="bf16"), device)
    assert "rounded (relative error" in caught.value.__notes__[0]
    assert all(p.isfinite().all() for p in model.parameters())


def test_a_scripted_module_is_refused_by_name() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Sequential(nn.Linear(4, 4)))
    with pytest.warns(DeprecationWarning, match="torch.jit.script"):
        model.add_module("tail", torch.jit.script(nn.Sequential(nn.Linear(4, 4), nn.Tanh())))
    before = snapshot(model)
    with pytest.raises(UnsupportedModel, match=r"module tail is a RecursiveScriptModule"):
        ZOEngine(model, config(), CpuDevice())
    for name, parameter in model.named_parameters():
        assert_same_bits(parameter.detach(), before[name], name)


@pytest.mark.parametrize("how", ["closed without weights", "engine dropped"])
def test_placeholders_are_refused_by_name(how: str) -> None:
    model = tiny(MODEL)
    engine = ZOEngine(model, config(), CpuDevice())
    if how == "engine dropped":  # and the hooks with it, as when a model is copied
        model = type(model)(model.config)
        for target, source in zip(model.parameters(), engine._model.parameters(), strict=True):
            target.data = source.data
    engine.close(keep_weights=False)
    with pytest.raises(
        UserError, match=r"parameter model\.embed_tokens\.weight is the placeholder"
    ):
        ZOEngine(model, config(), CpuDevice())


def test_expanded_weights_are_no_placeholders() -> None:
    model = nn.Sequential(nn.Linear(4, 4))
    model[0].weight.data = torch.ones(()).expand(4, 4)
    model[0].bias.data = torch.full((4,), torch.nan)
    ZOEngine(model, config(), CpuDevice()).close()


# -- an engine that is not closed


def test_an_engine_that_is_dropped_unlocks_its_memory() -> None:
    device = LockingDevice()
    model = tiny(MODEL)
    engine = ZOEngine(model, config(), device)
    engine.step(lambda model=model: model(**batches(MODEL, 1)[0]).loss)
    assert device.locked
    device.synchronize()  # a simulated device holds work back, and memory with it
    del model, engine
    gc.collect()
    assert device.locked == {}


def test_memory_is_unlocked_before_it_is_unmapped(monkeypatch: pytest.MonkeyPatch) -> None:
    world = FakeCuda().install(monkeypatch)
    for _ in range(2):  # addresses are used again
        locks = PageLocks(world.gpu())
        locks.add(host_memory(2**16))
        assert list(world.locked.values()) == [2**16]
        del locks
    assert world.locked == {}
    assert world.error == 0


def test_memory_is_unlocked_when_the_process_exits() -> None:
    locks = PageLocks(LockingDevice())
    assert locks.close.atexit


def test_a_forked_process_leaves_its_parents_locks_alone() -> None:
    locks = PageLocks(device := LockingDevice())
    locks.add(host_memory(4096))
    child = os.fork()
    if child == 0:
        locks.close()
        os._exit(len(device.locked))
    _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) == 1, "the child has unlocked its parent's memory"
    locks.close()
    assert device.locked == {}


def test_all_memory_is_unlocked_although_one_call_fails() -> None:
    class Failing(LockingDevice):
        def unlock(self, memory: Tensor) -> None:
            super().unlock(memory)
            if memory is memories[1]:
                raise RuntimeError("no")

    memories = [host_memory(4096) for _ in range(3)]
    locks = PageLocks(device := Failing())
    for memory in memories:
        locks.add(memory)
    with pytest.raises(RuntimeError, match="no"):
        locks.close()
    assert device.locked == {}


# -- where locking is refused


def test_a_refusal_is_said_once_and_leaves_no_error_behind(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    world = FakeCuda().install(monkeypatch)
    world.lockable = 0
    locks = PageLocks(world.gpu())
    for _ in range(2):
        locks.add(host_memory(2**20))
        assert world.error == 0
    (record,) = caplog.records
    for part in ("1.00 MiB", "CUDA error 2, out of memory", "staging buffers", "take longer"):
        assert part in record.getMessage()
    locks.close()
    assert world.error == 0


def test_a_failed_unlock_leaves_no_error_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    world = FakeCuda().install(monkeypatch)
    unlock = world.gpu().register(host_memory(4096))
    world.locked.clear()
    with pytest.raises(RuntimeError, match=r"unlock host memory \(CUDA error 713"):
        unlock()
    assert world.error == 0


def test_copies_of_unlocked_memory_begin_once_all_before_them_is_done(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """CUDA reads and writes such memory within the call that queues the copy."""
    world = FakeCuda().install(monkeypatch)
    world.lockable = 0
    device = world.gpu()
    device.register(host_memory(4096))
    for queue in (Queue.UPLOAD, Queue.OFFLOAD):
        before = device.submit(Queue.COMPUTE, lambda: None)
        seen = list[bool]()
        after = {Dependency.UPLOAD_AFTER_SLOT_WAS_READ: [before]}
        event = device.submit(queue, lambda: seen.append(before.finished), after=after)
        device.wait(event)
        assert seen == [True]


@stores
@pytest.mark.parametrize(
    ("lockable", "place"), [(0, {}), (2, {"storage": "split", "write_back": 2, "resident": 1})]
)
def test_weights_that_are_not_locked_have_the_same_bits(
    store: str, lockable: int, place: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    options = STORES[store] | place
    losses, weights = train(SimulatedDevice(), **options)
    world = FakeCuda().install(monkeypatch)
    world.lockable = lockable
    found, tensors = train(world.gpu(), **options)
    assert found == losses
    for name, tensor in tensors.items():
        assert_same_bits(tensor, weights[name], name)
    assert world.locked == {}


@pytest.mark.gpu
@stores
def test_weights_that_are_not_locked_have_the_same_bits_on_a_gpu(
    store: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = STORES[store]
    device = torch.device("cuda")
    losses, weights = train(CudaDevice(device), **options)
    refusing = CudaDevice(device)
    monkeypatch.setattr(refusing, "_staged", True)
    found, tensors = train(refusing, **options)
    assert found == losses
    for name, tensor in tensors.items():
        assert_same_bits(tensor, weights[name], name)


def _exits(queue: Any) -> None:
    queue.put("x")


def test_multiprocessing_children_exit_cleanly() -> None:
    """A child that exits in order runs no finalizer of its parent."""
    locks = PageLocks(device := LockingDevice())
    locks.add(host_memory(4096))
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    process = context.Process(target=_exits, args=(queue,))
    process.start()
    assert queue.get() == "x"
    process.join()
    assert process.exitcode == 0
    assert device.locked
    locks.close()
