"""The journal: what it holds, what it survives, and that a run continues from it to the bit."""

from __future__ import annotations

import errno
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import threading
import time
import zlib
from pathlib import Path
from typing import Any

import killed_run
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from journaled_runs import DATA, SETTINGS, train
from numeric import assert_same_bits
from tiny_models import batches, tiny
from torch import nn

import zo2ext
from zo2ext.errors import JournalError
from zo2ext.journal import records as journal_records
from zo2ext.journal.journal import Journal, read_journal, repair_journal
from zo2ext.journal.records import RECORD_NBYTES, StepResult
from zo2ext.ops import Update
from zo2ext.streaming.devices.device import Queue
from zo2ext.streaming.devices.simulated import SimulatedDevice


def assert_same_weights(a: nn.Module, b: nn.Module) -> None:
    for name, tensor in a.state_dict().items():
        assert_same_bits(b.state_dict()[name], tensor, name)


def recorded(step: int, *, directions: int = 1) -> StepResult:
    keys = tuple(range(10 * step, 10 * step + directions))
    losses = tuple(1.0 + step + k for k in range(directions))
    return StepResult(step, keys, losses, losses, tuple(Update(k, 0.5, 0.75) for k in keys), 1e-3)


def write(path: Path, steps: int, *, directions: int = 1) -> dict[str, Any]:
    header = {"start": 0, "fingerprint": "ab", "config": {"directions": directions}}
    journal = Journal(path, header)
    for step in range(steps):
        journal.append(recorded(step, directions=directions))
    journal.close()
    return header


# -- a run that continues


@pytest.mark.parametrize(
    "config",
    [
        {},
        {"directions": 3, "weight_decay": 0.5},
        {"storage": torch.bfloat16},
        {"storage": torch.bfloat16, "rounding": "nearest", "distribution": "rademacher"},
        {"storage": torch.float16, "write_back": 3},
        {"storage": torch.bfloat16, "write_back": "never"},
        {"compute_dtype": torch.bfloat16, "device": "simulated", "granularity": "module"},
    ],
    ids=lambda c: ",".join(f"{k}={v}" for k, v in c.items()) or "fp32",
)
def test_a_run_continues_from_its_journal_to_the_same_bits(
    tmp_path: Path, config: dict[str, Any]
) -> None:
    whole = tiny("opt")
    train(whole, None, 13, **config)
    path = tmp_path / "run" / "journal.zo2"
    for stop in (1, 5, 8, 13):
        model = tiny("opt")
        zo = train(model, path, stop, **config)
        zo.journal.close()  # as a killed process would: nothing is flushed, nothing given back
    assert_same_weights(whole, model)
    content = read_journal(path)
    assert (content.next_step, content.damage) == (13, None)
    assert [s.step for s in content.steps] == list(range(13))


def test_the_sync_goes_on_beside_the_next_step_up_to_its_first_write_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    order: list[str] = []
    computing = threading.Event()
    sync, submit = os.fdatasync, SimulatedDevice.submit

    def slow_sync(file: int) -> None:
        computing.clear()
        computing.wait(5)  # for the next step's first pass
        sync(file)
        order.append("synced")

    def noted(device: SimulatedDevice, queue: Queue, work: Any, **options: Any) -> object | None:
        if queue in (Queue.COMPUTE, Queue.OFFLOAD) and options.get("unit") is not None:
            order.append(queue.name)
            computing.set()
        return submit(device, queue, work, **options)

    model = tiny("opt")
    with zo2ext.offload(
        model,
        zo2ext.ZOConfig(**{**SETTINGS, "device": "simulated"}, write_back=1),
        journal=tmp_path / "j",
    ) as zo:
        zo.step(lambda: model(**DATA[0]).loss)
        monkeypatch.setattr(os, "fdatasync", slow_sync)
        monkeypatch.setattr(SimulatedDevice, "submit", noted)
        zo.step(lambda: model(**DATA[1]).loss)
        assert "synced" not in order, "the step does not wait for the disk"
        assert read_journal(tmp_path / "j").next_step == 2, "and is recorded all the same"
        order.clear()
        zo.step(lambda: model(**DATA[2]).loss)
        assert order[:3] == ["COMPUTE", "synced", "OFFLOAD"]
        order.clear()
        threading.Timer(0.2, computing.set).start()
        assert zo.journal_checksum() == read_journal(tmp_path / "j").checksum
        assert order == ["synced"], "a checkpoint is not ahead of the journal on the disk"
        monkeypatch.undo()


@pytest.mark.parametrize("device", ["cpu", "simulated"])
def test_a_disk_that_takes_no_more_ends_the_run(
    device: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, model = tiny("opt"), tiny("opt")
    train(whole, None, 6, device=device)
    zo = train(model, tmp_path / "j", 3, device=device)

    def fail(_: int) -> None:
        raise OSError(errno.EIO, "the disk is gone")

    with monkeypatch.context() as patched:
        patched.setattr(os, "fdatasync", fail)
        zo.step(lambda: model(**DATA[3]).loss)
        for _ in range(2):
            with pytest.raises(OSError, match="the disk is gone"):
                zo.step(lambda: model(**DATA[4]).loss)
        assert zo.steps == 4, "no more steps are made"
    with pytest.raises(OSError, match="the disk is gone"):
        zo.close()
    resumed = tiny("opt")
    train(resumed, tmp_path / "j", 6, device=device).journal.close()
    assert_same_weights(whole, resumed)


def test_write_backs_out_of_turn_are_recorded(tmp_path: Path) -> None:
    config = {"storage": torch.bfloat16, "write_back": 4}

    def flush_early(zo: zo2ext.ZOEngine) -> None:
        if zo.steps in (3, 4, 6):
            zo.flush()
            zo.flush()

    whole, other = tiny("opt"), tiny("opt")
    train(whole, tmp_path / "whole", 9, after=flush_early, **config)
    assert read_journal(tmp_path / "whole").write_backs == [3, 6]
    train(other, None, 9, **config)
    changed = [
        name
        for name, w in whole.state_dict().items()
        if not torch.equal(w, other.state_dict()[name])
    ]
    assert changed, "an early write-back rounds earlier"
    for stop in (4, 6, 9):
        resumed = tiny("opt")
        zo = train(resumed, tmp_path / "parts", stop, after=flush_early, **config)
        zo.journal.close()
    assert_same_weights(whole, resumed)


@pytest.mark.parametrize("write_back", [3, "never"])
def test_reading_between_write_backs_changes_nothing(write_back: int | str) -> None:
    def read(zo: zo2ext.ZOEngine) -> None:
        model.state_dict()
        model(**DATA[0])
        zo.exact_weights()

    config = {"storage": torch.bfloat16, "write_back": write_back, "device": "simulated"}
    plain, model = tiny("opt"), tiny("opt")
    train(plain, None, 7, **config)
    train(model, None, 7, after=read, **config)
    assert_same_weights(plain, model)


def test_closing_gives_what_state_dict_shows(tmp_path: Path) -> None:
    for write_back in (1, 3, "never"):
        for compute in (None, torch.float32):
            model = tiny("opt").to(torch.bfloat16)
            config = {"write_back": write_back, "compute_dtype": compute}
            zo = train(model, tmp_path / f"{write_back}{compute}", 4, **config)
            shown = {name: tensor.clone() for name, tensor in model.state_dict().items()}
            zo.close()
            for name, tensor in shown.items():
                assert_same_bits(model.get_parameter(name).data, tensor, name)


def test_steps_can_be_taken_up_one_by_one(tmp_path: Path) -> None:
    whole, again = tiny("opt"), tiny("opt")
    zo = train(whole, tmp_path / "j", 6)
    lasts = []
    zo.close()
    zo = zo2ext.offload(again, zo2ext.ZOConfig(**SETTINGS))
    assert zo.keep_journal(tmp_path / "j", step_by_step=True) == 6
    for step in range(6):
        assert zo.steps == step
        zo.step(lambda: pytest.fail("a recorded step computed its loss"))
        lasts.append(zo.last)
    assert [last.step for last in lasts] == list(range(6))
    assert lasts[-1].loss == zo.journal.recorded.steps[-1].losses_plus[0] / 2 + (
        zo.journal.recorded.steps[-1].losses_minus[0] / 2
    )
    zo.close()
    assert_same_weights(whole, again)


def test_a_skipped_step_is_recorded_as_one(tmp_path: Path) -> None:
    model = tiny("opt")
    losses = [1.0, float("nan"), 2.0]
    with zo2ext.offload(model, zo2ext.ZOConfig(**SETTINGS), journal=tmp_path / "j") as zo:
        for _ in range(3):
            zo.step(lambda: (model(**DATA[0]), losses[zo.steps])[1])
    content = read_journal(tmp_path / "j")
    assert [s.skipped for s in content.steps] == [False, True, False]
    again = tiny("opt")
    with zo2ext.offload(again, zo2ext.ZOConfig(**SETTINGS), journal=tmp_path / "j") as zo:
        assert (zo.steps, zo.skipped) == (3, 1)
    assert_same_weights(model, again)


def test_replaced_weights_end_the_journal(tmp_path: Path) -> None:
    model = tiny("opt")
    zo = train(model, tmp_path / "j", 3)
    model.load_state_dict(tiny("opt", seed=3).state_dict())
    with pytest.raises(RuntimeError, match="replaced by load_state_dict, which the journal cannot"):
        zo.step(lambda: 0.0)
    zo.close()
    assert read_journal(tmp_path / "j").next_step == 3


# -- another run


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"seed": 6}, "config.seed was 5 and is 6"),
        ({"storage": torch.bfloat16}, "config.storage was None and is 'bf16'"),
        ({"write_back": 2}, "config.write_back was 1 and is 2"),
        ({"directions": 2}, "config.directions was 1 and is 2"),
    ],
    ids=str,
)
def test_another_run_is_refused(tmp_path: Path, change: dict[str, Any], complaint: str) -> None:
    train(tiny("opt"), tmp_path / "j", 2).close()
    before = (tmp_path / "j").read_bytes()
    with pytest.raises(JournalError, match=f"journal of another run: {complaint}"):
        train(tiny("opt"), tmp_path / "j", 3, **change)
    assert (tmp_path / "j").read_bytes() == before


def test_other_weights_data_or_model_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "j"
    with zo2ext.offload(tiny("opt"), zo2ext.ZOConfig(**SETTINGS)) as zo:
        zo.keep_journal(path, run={"data": "a.txt"})
        with pytest.raises(RuntimeError, match="keeps a journal already"):
            zo.keep_journal(path)
    for model, run, complaint in (
        (tiny("opt", seed=1), {"data": "a.txt"}, "fingerprint was '[0-9a-f]{32}' and is"),
        (tiny("opt"), {"data": "b.txt"}, r"run.data was 'a.txt' and is 'b.txt'"),
        (tiny("gpt2"), {"data": "a.txt"}, r"of another run: .*differences"),
    ):
        zo = zo2ext.offload(model, zo2ext.ZOConfig(**SETTINGS))
        with zo, pytest.raises(JournalError, match=complaint):
            zo.keep_journal(path, run=run)


def test_a_second_process_is_refused(tmp_path: Path) -> None:
    zo = train(tiny("opt"), tmp_path / "j", 2)
    with pytest.raises(JournalError, match="in use: another process is on this run"):
        train(tiny("opt"), tmp_path / "j", 3)
    with pytest.raises(JournalError, match="in use"):
        repair_journal(tmp_path / "j")
    zo.close()
    train(tiny("opt"), tmp_path / "j", 3).close()


# -- damage


def test_a_long_run_is_short_to_share(tmp_path: Path) -> None:
    model = tiny("llama")
    with zo2ext.offload(model, zo2ext.ZOConfig(**SETTINGS, journal_sync=10**6)) as zo:
        zo.keep_journal(tmp_path / "j")
        for step in range(20_000):
            zo.journal.append(recorded(step))
    assert (tmp_path / "j").stat().st_size <= 1.3e6
    assert RECORD_NBYTES == 64
    assert read_journal(tmp_path / "j").next_step == 20_000


@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(directions=st.integers(1, 3), steps=st.integers(0, 4), data=st.data())
def test_a_torn_end_is_dropped(
    tmp_path: Path, directions: int, steps: int, data: st.DataObject
) -> None:
    path = tmp_path / "torn"
    path.unlink(missing_ok=True)
    header = write(path, steps, directions=directions)
    whole = path.read_bytes()
    opening = len(whole) - steps * directions * RECORD_NBYTES
    size = data.draw(st.integers(opening, len(whole)))
    path.write_bytes(whole[:size])
    left = max(size - opening, 0) // (directions * RECORD_NBYTES)
    journal = Journal(path, header)
    assert journal.recorded.next_step == left
    assert path.read_bytes() == whole[: opening + left * directions * RECORD_NBYTES]
    for step in range(left, steps):
        journal.append(recorded(step, directions=directions))
    journal.close()
    assert path.read_bytes() == whole


@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data(), directions=st.integers(1, 2))
def test_any_flipped_bit_is_found(tmp_path: Path, data: st.DataObject, directions: int) -> None:
    path = tmp_path / "flipped"
    path.unlink(missing_ok=True)
    header = write(path, 6, directions=directions)
    whole = bytearray(path.read_bytes())
    at = data.draw(st.integers(0, len(whole) - 1))
    whole[at] ^= 1 << data.draw(st.integers(0, 7))
    path.write_bytes(whole)
    group = directions * RECORD_NBYTES
    opening = len(whole) - 6 * group
    if at < opening:
        with pytest.raises(JournalError, match=r"not a journal|newer|header .* is damaged"):
            Journal(path, header)
        assert path.read_bytes() == whole
        return
    good = (at - opening) // group
    content = read_journal(path)
    assert (content.next_step, content.damage is None) == (good, False)
    if good == 5:  # no more than a crash can leave
        assert content.torn
        return
    with pytest.raises(JournalError, match=f"Its first {good} steps are undamaged. Nothing was"):
        Journal(path, header)
    assert path.read_bytes() == whole, "nothing is changed unasked"
    assert repair_journal(path).next_step == good
    assert (tmp_path / "flipped.damaged").read_bytes() == whole
    journal = Journal(path, header)
    for step in range(good, 6):
        journal.append(recorded(step, directions=directions))
    journal.close()
    assert read_journal(path).next_step == 6


def test_moved_lost_and_foreign_records_are_found(tmp_path: Path) -> None:
    write(tmp_path / "j", 6)
    whole = (tmp_path / "j").read_bytes()
    opening = len(whole) - 6 * RECORD_NBYTES
    records = [whole[opening + i * 64 : opening + (i + 1) * 64] for i in range(6)]
    write(tmp_path / "other", 6, directions=2)
    foreign = (tmp_path / "other").read_bytes()[-64:]
    for order, good in (
        ([0, 2, 1, 3, 4, 5], 1),
        ([0, 1, 3, 4, 5], 2),
        ([0, 1, 2, 2, 3, 4, 5], 3),
        ([5, 4, 3, 2, 1, 0], 0),
    ):
        (tmp_path / "x").write_bytes(whole[:opening] + b"".join(records[i] for i in order))
        content = read_journal(tmp_path / "x")
        assert (content.next_step, bool(content.damage), content.torn) == (good, True, False), order
    (tmp_path / "x").write_bytes(whole + foreign + foreign)
    assert read_journal(tmp_path / "x").next_step == 6
    (tmp_path / "x").write_bytes(b"zo2ext-j" + (99).to_bytes(4, "little") + whole[12:])
    with pytest.raises(
        JournalError, match="has format 99, this zo2ext reads formats 1 to 2: a newer"
    ):
        read_journal(tmp_path / "x")
    (tmp_path / "x").write_bytes(b"PK\x03\x04 some archive, long enough to hold a preamble")
    with pytest.raises(JournalError, match="is not a journal of zo2ext"):
        Journal(tmp_path / "x", {"config": {"directions": 1}})
    for size in (0, 5, 19, opening - 1):  # journals appear whole, so this is none of a crash's
        (tmp_path / "x").write_bytes(whole[:size])
        with pytest.raises(JournalError, match=r"is not a journal|header .* is damaged"):
            Journal(tmp_path / "x", {"config": {"directions": 1}})


_FULL_DISK = """
import resource, sys
sys.path[:0] = sys.argv[2:]
from pathlib import Path
from journaled_runs import train
from tiny_models import tiny
path = Path(sys.argv[1])
size = path.stat().st_size
resource.setrlimit(resource.RLIMIT_FSIZE, (size + 2 * 64 + 40, resource.RLIM_INFINITY))
try:
    train(tiny("opt"), path, 9)
except OSError as error:
    print("stopped:", error)
"""


def test_a_full_disk_stops_the_run_clearly_and_it_can_go_on(tmp_path: Path) -> None:
    path = tmp_path / "j"
    train(tiny("opt"), path, 3).close()
    script = [sys.executable, "-c", _FULL_DISK, str(path), *sys.path]
    done = subprocess.run(script, capture_output=True, text=True, timeout=120, check=True)
    assert "cannot write step 5 to the journal" in done.stdout
    assert "all steps before it are safe" in done.stdout
    content = read_journal(path)
    assert (content.next_step, content.damage) == (5, None)
    whole, model = tiny("opt"), tiny("opt")
    train(whole, None, 9)
    train(model, path, 9)
    assert_same_weights(whole, model)


# -- kills

KILLS = 30


def test_kills_lose_no_finished_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(sys.path))  # where it looks for the module
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["killed_run"])
    # Without a lock, which a process that is killed may hold for good.
    reached, path = context.Value("q", 0, lock=False), tmp_path / "j"
    rng = random.Random(0)
    for kill in range(KILLS):
        before = reached.value
        process = context.Process(target=killed_run.run, args=(path, 10**9, reached))
        process.start()
        if kill % 5:  # else it may be killed while it starts
            while reached.value == before:
                assert process.is_alive(), process.exitcode
                time.sleep(0.001)
        time.sleep(rng.uniform(0.0, 0.03))
        process.kill()
        process.join()
        assert process.exitcode == -signal.SIGKILL
        if path.exists() and path.stat().st_size:
            content = read_journal(path)
            assert content.torn or content.damage is None, content.damage
            assert content.next_step >= reached.value, "a finished step was lost"
    done = read_journal(path).next_step
    assert_same_weights(killed_run.run(None, done + 3), killed_run.run(path, done + 3))


# -- write_back="auto"


def test_auto_decides_once_and_the_journal_keeps_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    periods = iter([3, 50])
    monkeypatch.setattr(
        "zo2ext.engine.stored_model.with_period",
        lambda _model, _layouts, config, _device: config.replace(write_back=next(periods)),
    )
    config = {"storage": torch.bfloat16}
    whole, model = tiny("opt"), tiny("opt")
    train(whole, None, 8, write_back=3, **config)
    zo = train(model, tmp_path / "j", 4, write_back="auto", **config)
    assert zo.config.write_back == 3
    zo.journal.close()
    model = tiny("opt")
    zo = train(model, tmp_path / "j", 8, write_back="auto", **config)
    assert zo.config.write_back == 3, "as it was decided, not as it would be now"
    assert_same_weights(whole, model)


@pytest.mark.parametrize(
    "device", ["cpu", "simulated", pytest.param("cuda", marks=pytest.mark.gpu)]
)
def test_auto_is_the_default_and_decided_here(device: str) -> None:
    with zo2ext.offload(tiny("opt"), zo2ext.ZOConfig(device=device, storage=torch.bfloat16)) as zo:
        found = zo.config.write_back
    assert found in ((1, 2, 4, 8, 16) if device == "cuda" else (1,))


def test_a_checkpoint_keeps_what_auto_chose(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a journal, the period comes from the checkpoint, and is not chosen anew."""
    periods = iter([3, 50])
    monkeypatch.setattr(
        "zo2ext.engine.stored_model.with_period",
        lambda _model, _layouts, config, _device: config.replace(write_back=next(periods)),
    )
    config = zo2ext.ZOConfig(device="cpu", storage=torch.bfloat16, lr=1e-2)
    data = batches("opt", 8)

    def steps(zo: zo2ext.ZOEngine, model: Any, several: Any) -> None:
        for batch in several:
            zo.step(lambda batch=batch: model(**batch).loss)

    whole, model = tiny("opt"), tiny("opt")
    with zo2ext.offload(whole, config.replace(write_back=3)) as zo:
        steps(zo, whole, data)
    with zo2ext.offload(model, config) as zo:
        steps(zo, model, data[:5])
        exact = {name: values.clone() for name, values in zo.exact_weights().items()}
        state = {"steps": zo.steps, "pending": zo.pending(), "write_back": zo.config.write_back}
    again = tiny("opt")
    with zo2ext.offload(again, config) as zo:
        assert zo.config.write_back == 50
        zo.resume(exact_weights=exact, **state)
        assert zo.config.write_back == 3
        steps(zo, again, data[5:])
    assert_same_weights(whole, again)


@pytest.mark.parametrize(
    ("packed", "cause"),
    [
        (zlib.compress(b"0" * (65 << 20), 9), "not that of a run"),
        (zlib.compress(b"no JSON"), "Expecting value"),
        (zlib.compress(b"\xff"), "codec can't decode"),
        (zlib.compress(b"[" * 100_000), "damaged"),
        (zlib.compress(b"[]"), "not that of a run"),
        (zlib.compress(b"{}"), "not that of a run"),
        (b"not compressed", "incorrect header check"),
    ],
    ids=["bomb", "text", "bytes", "nested", "list", "empty", "uncompressed"],
)
def test_a_header_of_somebody_elses_making(packed: bytes, cause: str, tmp_path: Path) -> None:
    preamble = journal_records._PREAMBLE.pack(
        b"zo2ext-j", journal_records.FORMAT, len(packed), zlib.crc32(packed)
    )
    with pytest.raises(JournalError, match=cause):
        journal_records.parse(preamble + packed, tmp_path / "journal.zo2")
