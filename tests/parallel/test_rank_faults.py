"""What goes wrong on one rank is known to all in time; nothing hangs, diverges or is lost."""

from __future__ import annotations

import math
import os
import random
import signal
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from rank_processes import Job, Outcome, Ranks, agreed, free_port, run, train
from slow_network import Proxy

import zo2ext
from zo2ext.journal.journal import read_journal
from zo2ext.parallel.mailbox import Mailbox
from zo2ext.parallel.mesh import Mesh

SLACK = 15.0  # seconds that a busy machine may add
ENDLESS = 10**9
TWO = Job(Mesh(2), micro_batches=2, weighted=True)


def failures(outcomes: dict[int, Outcome]) -> set[str]:
    """What the ranks that are left have raised."""
    for rank, outcome in outcomes.items():
        assert not outcome.error, f"rank {rank}: {outcome.error}"
    return {outcome.failure for outcome in outcomes.values()}


def under_way(started: Ranks, steps: int = 3) -> None:
    """Wait until all ranks have made a few steps."""
    end = time.monotonic() + 120
    while min(reached.value for reached in started.reached) < steps:
        assert time.monotonic() < end, "nothing happens"
        for rank, process in started.processes.items():
            assert process.is_alive(), f"rank {rank} ended by itself: {started.outcome(rank)}"
        time.sleep(0.005)


# -- ranks that do not belong together


def other_build(rank: int) -> None:
    if rank == 1:
        from zo2ext.engine import history

        history.build = lambda: f"{zo2ext.__version__} abc"


@pytest.mark.parametrize(
    ("job", "cause"),
    [
        ({"overrides": {1: {"seed": 12}}}, "config.seed was 11 and is 12"),
        ({"overrides": {1: {"eps": 1e-2}}}, "config.eps was 0.001 and is 0.01"),
        ({"models": {1: {"seed": 1}}}, "fingerprint was "),
        ({"models": {1: {"ffn_dim": 96}}}, "fingerprint was "),
        ({"prepare": other_build}, "build was "),
    ],
    ids=["seed", "eps", "weights", "shapes", "build"],
)
def test_ranks_that_differ_say_so_on_all(job: dict[str, Any], cause: str) -> None:
    (failure,) = failures(run(replace(TWO, **job)))
    assert failure.startswith(f"rank 1 differs from rank 0: {cause}")


def test_meshes_that_differ() -> None:
    with Ranks(TWO, start=False) as started:
        started.start(0)
        started.start(1, replace(started.job, mesh=Mesh(1, 1, 2)))
        (failure,) = failures(started.outcomes())
    assert failure.startswith("rank 1 differs from rank 0: mesh was {'data': 2")


def test_a_rank_that_never_comes() -> None:
    job = replace(TWO, startup=1.0)
    with Ranks(job, start=False) as started:
        started.start(0)
        (failure,) = failures(started.outcomes())
    assert failure == "rank 1 did not come within 1 s"


def lr_of_its_own(rank: int, step: int) -> float:
    return 3e-3 if (rank, step) != (1, 2) else 1e-3


def lr_rounded_otherwise(rank: int, step: int) -> float:
    return 3e-3 * (1 + 1e-15 * rank)


def test_another_lr_ends_a_strict_run() -> None:
    (failure,) = failures(run(replace(TWO, lr=lr_of_its_own)))
    assert failure.startswith("rank 1 has lr 0.001 in step 2, rank 0 0.003")
    assert agreed(run(replace(TWO, lr=lr_rounded_otherwise))).digest == agreed(run(TWO)).digest


def test_a_tolerant_run_has_the_lr_of_rank_0(tmp_path: Path) -> None:
    job = replace(TWO, tolerant=True, lr=lr_of_its_own, journal=tmp_path / "journal")
    assert agreed(run(job)).digest == train(replace(job, mesh=None, journal=None), 0).digest
    assert {step.data_rank_mask for step in read_journal(tmp_path / "journal").steps} == {0b11}


# -- ranks that fail


def raising(rank: int, step: int, loss: torch.Tensor) -> torch.Tensor:
    if (rank, step) == (1, 3):
        raise RuntimeError("the batch is broken")
    return loss


def stopping(rank: int, zo: zo2ext.ZOEngine) -> None:
    if (rank, zo.steps) == (1, 3):
        raise ValueError("no more data")


@pytest.mark.parametrize(
    ("job", "failure"),
    [
        ({"of_loss": raising}, "rank 1 failed: RuntimeError: the batch is broken"),
        ({"mesh": Mesh(1, 1, 2), "of_loss": raising}, "rank 1 failed: RuntimeError: the batch"),
    ],
    ids=["data", "perturb"],
)
def test_an_exception_is_told_at_once(job: dict[str, Any], failure: str) -> None:
    began = time.monotonic()
    outcomes = run(replace(TWO, deadline=30.0, **job))
    assert outcomes[0].failure.startswith(failure)
    assert outcomes[1].error == "RuntimeError: the batch is broken"
    assert max(o.ended for o in outcomes.values()) - began < 10 + SLACK


def test_a_rank_that_leaves_is_named() -> None:
    outcomes = run(replace(TWO, deadline=30.0, fault=stopping))
    assert outcomes[0].failure == "rank 1 failed: ValueError: no more data"
    assert outcomes[1].error == "ValueError: no more data"


def broken(rank: int, model: torch.nn.Module) -> None:
    raise OSError("the checkpoint is damaged")


def frozen(rank: int, model: torch.nn.Module) -> None:
    model.requires_grad_(False)


def endless(rank: int, model: torch.nn.Module) -> None:
    time.sleep(300.0)


@pytest.mark.parametrize("late", [False, True], ids=["others-wait", "one-loads"])
@pytest.mark.parametrize("hurt", [2, 0], ids=["member", "coordinator"])
@pytest.mark.parametrize(
    ("fault", "cause"),
    [
        (broken, "OSError: the checkpoint is damaged"),
        (frozen, "UserError: model has no trainable parameter"),
    ],
    ids=["loading", "offload"],
)
def test_an_error_before_ranks_meet_is_told_at_once(
    fault: Any, cause: str, hurt: int, late: bool
) -> None:
    """Also to those that wait for a rank that is loading still."""
    job = replace(TWO, mesh=Mesh(4), startup=200.0)
    waiting = {0, 1, 2, 3} - {hurt} - ({1} if late else set())
    with Ranks(job, start=False) as started:
        for rank in waiting:
            started.start(rank)
        if late:
            started.start(1, replace(started.job, loaded=endless))
        time.sleep(0.5)
        started.start(hurt, replace(started.job, loaded=fault))
        error = started.outcome(hurt)
        assert error.error.startswith(cause)
        for rank in waiting:
            other = started.outcome(rank)
            assert other.failure.startswith(f"rank {hurt} failed: {cause}"), other
            assert other.ended - error.ended < SLACK


def on_one_host(rank: int) -> None:
    os.environ["LOCAL_WORLD_SIZE"] = "2"


def test_ranks_that_share_host_memory_are_told_too() -> None:
    job = replace(TWO, config={"store": "shared"}, prepare=on_one_host, startup=200.0)
    with Ranks(job, start=False) as started:
        started.start(0)
        started.start(1, replace(started.job, loaded=broken))
        error, told = started.outcome(1), started.outcome(0)
    assert told.failure == "rank 1 failed: OSError: the checkpoint is damaged"
    assert abs(told.ended - error.ended) < SLACK


def test_tolerant_ranks_begin_without_one_that_fails_to_load(tmp_path: Path) -> None:
    job = replace(TWO, mesh=Mesh(3), tolerant=True, startup=200.0, journal=tmp_path / "journal")
    with Ranks(job, start=False) as started:
        for rank in (0, 1, 2):
            started.start(rank, replace(started.job, loaded=broken) if rank == 2 else None)
        outcomes = started.outcomes()
    assert outcomes.pop(2).error == "OSError: the checkpoint is damaged"
    agreed(outcomes)
    assert {step.data_rank_mask for step in read_journal(tmp_path / "journal").steps} == {0b011}


@pytest.mark.parametrize("hurt", [1, 0], ids=["member", "coordinator"])
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP], ids=["killed", "frozen"])
def test_silence_is_an_error_within_the_deadline(hurt: int, how: signal.Signals) -> None:
    deadline = 5.0  # far longer than a busy machine keeps a rank that is well waiting
    with Ranks(replace(TWO, mesh=Mesh(3), steps=ENDLESS, deadline=deadline)) as started:
        under_way(started)
        began = time.monotonic()
        os.kill(started.processes[hurt].pid, how)
        if how is signal.SIGSTOP:
            others = {r: started.outcome(r) for r in range(3) if r != hurt}
            os.kill(started.processes[hurt].pid, signal.SIGCONT)
            assert failures({hurt: started.outcome(hurt)}) != {""}
        else:
            others = started.outcomes()
            assert hurt not in others
        assert max(o.ended for o in others.values()) - began < 2 * deadline + SLACK
        for failure in failures(others):
            assert f"rank {hurt} did not report" in failure or "rank 0" in failure
            assert f"rank {hurt}" in failure


# -- killed again and again


def test_strict_runs_survive_kills(tmp_path: Path) -> None:
    """Any rank, at any moment; all are started again, on whichever mesh, from the journal."""
    rng, journal, lasting = random.Random(0), tmp_path / "journal", 0
    job = replace(TWO, journal=journal, steps=ENDLESS, deadline=4.0)
    for kill in range(26):
        mesh = rng.choice([Mesh(2), Mesh(1, 1, 2)])
        hurt = kill % 2
        with Ranks(replace(job, mesh=mesh)) as started:
            if kill % 5:  # else it may be killed while it starts
                under_way(started, lasting + 1)
            time.sleep(rng.uniform(0.0, 0.1))
            made = max(reached.value for reached in started.reached)
            started.kill(hurt)
            if kill % 5:
                left = started.outcomes()
                assert all(f"rank {hurt}" in failure for failure in failures(left))
        if journal.exists():
            lasting = read_journal(journal).next_step
            assert lasting >= made
    steps = lasting + 3
    ours = run(replace(job, mesh=Mesh(2), steps=steps, deadline=20.0))
    assert not any(failures(ours))
    assert (
        ours[0].digest
        == ours[1].digest
        == train(Job(steps=steps, micro_batches=2, weighted=True), 0).digest
    )


def test_tolerant_runs_survive_kills(tmp_path: Path) -> None:
    """Any rank but 0, at any moment; it is started again by itself, and catches up."""
    rng, journal = random.Random(1), tmp_path / "journal"
    job = replace(TWO, mesh=Mesh(3), micro_batches=3, tolerant=True, steps=ENDLESS, deadline=1.0)
    with Ranks(replace(job, journal=journal)) as started:
        under_way(started)
        for kill in range(30):
            hurt = 1 + kill % 2
            before = started.reached[0].value
            started.kill(hurt)
            started.reached[hurt].value = 0
            if kill % 5 == 0:
                time.sleep(2 * job.deadline)  # else it may be back before it is missed
            started.start(hurt)
            if kill % 3:  # else it may be killed again while it starts
                under_way(started, before)
            time.sleep(rng.uniform(0.0, 0.1))
        under_way(started, started.reached[0].value)
        started.until.value = started.reached[0].value + 30
        outcomes = started.outcomes()
    assert not any(failures(outcomes)), failures(outcomes)
    assert len({o.digest for o in outcomes.values()}) == 1
    content = read_journal(journal)
    counted = [step.data_rank_mask for step in content.steps]
    assert set(counted) > {0b111}
    assert counted[-1] == 0b111
    again = train(replace(TWO, mesh=None, journal=journal, steps=content.next_step), 0)
    assert again.digest == outcomes[0].digest


# -- tolerated


def nan_on_one(rank: int, step: int, loss: torch.Tensor) -> Any:
    return math.nan if (rank, step % 4) == (1, 2) else loss


def nan_on_all(rank: int, step: int, loss: torch.Tensor) -> Any:
    return math.nan if step == 2 else loss


def late(rank: int, step: int, loss: torch.Tensor) -> torch.Tensor:
    if (rank, step) == (3, 2):
        time.sleep(1.0)
    elif rank == 0 and step > 5:
        time.sleep(0.02)  # so that there is a run to come back to
    return loss


def counts(job: Job, path: Path) -> list[tuple[int, bool]]:
    """Who counted in each step, and whether it was skipped; all ranks agreeing in the end."""
    outcomes = run(replace(job, journal=path))
    assert not any(failures(outcomes)), failures(outcomes)
    assert len({o.digest for o in outcomes.values()}) == 1
    return [(step.data_rank_mask, step.skipped) for step in read_journal(path).steps]


def test_who_has_no_finite_loss_does_not_count(tmp_path: Path) -> None:
    tolerant = replace(TWO, tolerant=True, steps=6)
    some = counts(replace(tolerant, of_loss=nan_on_one), tmp_path / "some")
    assert some == [(0b01 if step % 4 == 2 else 0b11, False) for step in range(6)]
    none = counts(replace(tolerant, of_loss=nan_on_all), tmp_path / "none")
    assert none == [(0b11, step == 2) for step in range(6)]  # as one process skips it
    strict = counts(replace(TWO, of_loss=nan_on_one, steps=6), tmp_path / "strict")
    assert strict == [(0b11, step % 4 == 2) for step in range(6)]


def no_labels(step: int, number: int, batch: dict[str, torch.Tensor]) -> Any:
    if step == 2:
        batch["labels"] = torch.full_like(batch["labels"], -100)
    return batch


@pytest.mark.parametrize("tolerant", [False, True], ids=["strict", "tolerant"])
def test_a_step_without_weight_is_skipped(tmp_path: Path, tolerant: bool) -> None:
    job = replace(TWO, tolerant=tolerant, of_batch=no_labels, steps=4)
    assert counts(job, tmp_path / "two") == [(0b11, step == 2) for step in range(4)]
    one = train(replace(job, mesh=None, journal=tmp_path / "one"), 0)
    assert not one.error
    assert [math.isnan(loss) for loss in one.losses] == [step == 2 for step in range(4)]
    steps = [read_journal(tmp_path / name).steps for name in ("one", "two")]
    assert [s.updates for s in steps[0]] == [s.updates for s in steps[1]]


def test_who_is_late_does_not_count_and_comes_back(tmp_path: Path) -> None:
    job = replace(TWO, mesh=Mesh(2, 1, 2), tolerant=True, steps=90, deadline=0.4, of_loss=late)
    counted = [who for who, _ in counts(job, tmp_path / "j")]
    assert counted[2] == 0b01
    assert counted[-1] == 0b11


# -- bad networks


def talking(rank: int, zo: zo2ext.ZOEngine) -> None:
    """All that ranks say to each other besides steps."""
    assert zo.gather(float(rank + zo.steps)) == [zo.steps, zo.steps + 1.0]
    assert zo.agree([rank, zo.steps]) == [0, zo.steps]


def test_a_slow_network_that_breaks_changes_no_bit() -> None:
    job = replace(TWO, host_port=free_port(), steps=40, fault=talking)
    assert job.host_port is not None
    with Proxy(job.host_port, delay=0.002, breaks=0.15) as proxy:
        ours = agreed(run(replace(job, port=proxy.port)))
        assert proxy.cut > 3
    assert ours.digest == train(Job(steps=40, micro_batches=2, weighted=True), 0).digest


@pytest.mark.parametrize("lost", ["message", "answer"])
def test_a_message_is_there_whatever_its_connection_loses(lost: str) -> None:
    place = {"host_name": "127.0.0.1", "wait_for_workers": False}
    here = dist.TCPStore(**place, port=0, is_master=True)
    with Proxy(here.port) as proxy:

        def connect() -> dist.TCPStore:
            return dist.TCPStore(**place, port=proxy.port, is_master=False)

        mail = Mailbox(connect(), "run", patience=10.0, connect=connect)
        for number in range(5):
            proxy.lose(answers=lost == "answer")
            mail.put(f"key {number}", b"message")
            assert dist.PrefixStore("run", here).check([f"key {number}"])
            assert proxy.cut == number + 1
            mail.drop(f"key {number}")


@pytest.mark.parametrize("tolerant", [False, True], ids=["strict", "tolerant"])
def test_a_network_that_swallows_everything(tolerant: bool) -> None:
    job = replace(TWO, host_port=free_port(), steps=ENDLESS, deadline=1.0, tolerant=tolerant)
    assert job.host_port is not None
    with Proxy(job.host_port) as proxy, Ranks(replace(job, port=proxy.port)) as started:
        under_way(started)
        began = time.monotonic()
        proxy.swallowing = True
        cut_off = started.outcome(1)
        assert "rank 0" in cut_off.failure
        assert cut_off.ended - began < 2 + SLACK
        started.until.value = started.reached[0].value + 2
        rank_0 = started.outcome(0)
        assert rank_0.failure.startswith("" if tolerant else "rank 1 did not report step")
        assert bool(rank_0.failure) != tolerant
