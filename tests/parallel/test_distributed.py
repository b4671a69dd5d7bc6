"""Many ranks make the steps that one makes, to the bit; what each axis costs; who does what."""

from __future__ import annotations

import math
import os
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import reference
import torch
from hypothesis import given
from hypothesis import strategies as st
from rank_processes import Job, agreed, digest, micro_batch, run, train
from tiny_models import batches, tiny

import zo2ext
from zo2ext import _random_state as random_state
from zo2ext._choices import Estimator
from zo2ext._random_state import RandomState
from zo2ext.config import ZOConfig
from zo2ext.errors import JournalError
from zo2ext.journal.journal import read_journal
from zo2ext.journal.records import (
    RECORD_NBYTES,
    Ledger,
    StepResult,
    decode,
    opening,
    parse,
)
from zo2ext.parallel.agreement import Team
from zo2ext.parallel.exchange import Exchange
from zo2ext.parallel.mesh import Mesh, RankLosses, combine, perturbations
from zo2ext.parallel.rank_report import Report
from zo2ext.streaming.devices.simulated import SimulatedDevice


@cache
def alone(**job: Any) -> Any:
    """The same run in this process, without any ranks."""
    settings = ("directions", "estimator", "rank")
    config = {name: job.pop(name) for name in settings if name in job}
    return train(Job(config=config, **job), 0)


def name(mesh: Mesh) -> str:
    return f"{mesh.data}x{mesh.direction}x{mesh.perturb}"


# -- the same bits


@pytest.mark.parametrize(
    ("mesh", "estimator", "directions", "rank"),
    [
        (Mesh(1, 1, 2), "two_sided", 1, None),
        (Mesh(1, 2, 2), "two_sided", 3, None),
        (Mesh(1, 2, 1), "centered", 3, None),
        (Mesh(1, 4, 1), "centered", 8, None),
        (Mesh(1, 1, 2), "two_sided", 1, 2),
        (Mesh(1, 4, 1), "centered", 8, 2),
    ],
    ids=str,
)
def test_split_forwards_equal_one_rank(
    mesh: Mesh, estimator: str, directions: int, rank: int | None
) -> None:
    config = {"directions": directions, "estimator": estimator, "rank": rank}
    ours = agreed(run(Job(mesh, config=config)))
    assert ours.digest == alone(**config).digest
    assert ours.losses == alone(**config).losses


@pytest.mark.parametrize("mesh", [Mesh(2), Mesh(4), Mesh(2, 1, 2)], ids=name)
def test_micro_batches_on_many_ranks_equal_one_rank(mesh: Mesh) -> None:
    ours = agreed(run(Job(mesh, micro_batches=4, weighted=True)))
    expected = alone(micro_batches=4, weighted=True)
    assert (ours.digest, ours.losses) == (expected.digest, expected.losses)


def test_uneven_micro_batches_and_none_at_all() -> None:
    ours = agreed(run(Job(Mesh(2), micro_batches=3, weighted=True)))
    assert ours.digest == alone(micro_batches=3, weighted=True).digest
    ours = agreed(run(Job(Mesh(2), micro_batches=1, weighted=True)))
    assert ours.digest == alone(micro_batches=1, weighted=True).digest


def is_unlabelled(step: int, number: int) -> bool:
    """Of 4 micro-batches: the first two in step 1, the last two in step 3, the first in step 4."""
    return (step, number) in {(1, 0), (1, 1), (3, 2), (3, 3), (4, 0)}


def unlabelled(step: int, number: int, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    if is_unlabelled(step, number):
        batch["labels"] = torch.full_like(batch["labels"], -100)
    return batch


def left_out(step: int, number: int, batch: dict[str, torch.Tensor]) -> Any:
    return None if is_unlabelled(step, number) else batch


LABELS = Job(micro_batches=4, weighted=True, of_batch=unlabelled)


def test_micro_batches_of_weight_0_are_as_if_they_were_not_there() -> None:
    """Their losses are NaN. With dropout, whose masks they do not shift."""
    job = replace(LABELS, train=True, model={"dropout": 0.3}, prepare=seeded)
    found, expected = train(job, 0), train(replace(job, of_batch=left_out), 0)
    assert not found.error
    assert (found.digest, found.losses) == (expected.digest, expected.losses)
    assert all(map(math.isfinite, found.losses))


def on_one_host(rank: int) -> None:
    os.environ["LOCAL_WORLD_SIZE"] = "2"


@pytest.mark.parametrize("how", ["strict", "tolerant", "shared"])
def test_a_rank_may_have_no_other_micro_batches(tmp_path: Path, how: str) -> None:
    job = replace(LABELS, mesh=Mesh(2), journal=tmp_path / "journal", tolerant=how == "tolerant")
    if how == "shared":
        job = replace(job, config={"store": "shared"}, prepare=on_one_host)
    ours = agreed(run(job))
    assert ours.digest == train(replace(LABELS, of_batch=left_out), 0).digest
    assert {step.data_rank_mask for step in read_journal(tmp_path / "journal").steps} == {0b11}


def test_a_rank_that_shares_the_weights_has_to_run_something() -> None:
    """What has nothing says so, and the other rank does not wait for it."""
    job = Job(Mesh(2), config={"store": "shared"}, prepare=on_one_host, deadline=6.0)
    ours = run(job).values()
    assert any("give one of weight 0" in outcome.error for outcome in ours)
    assert all(outcome.error or outcome.failure for outcome in ours)
    ends = [outcome.ended for outcome in ours]
    assert max(ends) - min(ends) < job.deadline


def test_without_weights_losses_are_averaged_over_data_ranks() -> None:
    one, two = alone(micro_batches=2, steps=1), agreed(run(Job(Mesh(2), steps=1, micro_batches=2)))
    assert math.isclose(two.losses[0], one.losses[0] / 2, rel_tol=1e-6)


def test_dropout_masks_agree_on_ranks_that_share_a_batch() -> None:
    job = Job(micro_batches=2, weighted=True, train=True, model={"dropout": 0.3})
    torch.manual_seed(7)
    one = train(job, 0)
    assert one.digest != alone(micro_batches=2, weighted=True).digest, "there are masks"
    assert agreed(run(replace(job, mesh=Mesh(1, 1, 2), prepare=seeded))).digest == one.digest


def seeded(rank: int) -> None:
    """Only rank 0 as it should be: the others take its state over."""
    torch.manual_seed(7 + 100 * rank)


class Philox:
    """What stands in for a GPU's generator: a seed, and how far it was drawn from."""

    def __init__(self) -> None:
        self.state = (0, 0)

    def manual_seed(self, seed: int) -> None:
        self.state = (seed, 0)

    def set_offset(self, offset: int) -> None:
        self.state = (self.state[0], offset)

    def initial_seed(self) -> int:
        return self.state[0]

    def get_offset(self) -> int:
        return self.state[1]

    def draw(self, count: int) -> list[str]:
        drawn = [f"{self.state[0]}, {self.state[1] + 4 * i}" for i in range(count)]
        self.set_offset(self.state[1] + 4 * count)
        return drawn


@pytest.fixture
def gpu_generator(monkeypatch: pytest.MonkeyPatch) -> Philox:
    generator = Philox()
    monkeypatch.setattr(random_state, "_gpu_generator", lambda device: generator)
    return generator


def test_a_gpus_random_state_is_shared_too(gpu_generator: Philox) -> None:
    store, device = torch.distributed.HashStore(), torch.device("cuda")
    drawn = []
    for rank in (0, 1):
        torch.manual_seed(7 + rank)
        gpu_generator.manual_seed(7 + rank)
        gpu_generator.draw(5 * rank)
        limits = {"deadline": 5.0, "startup": 5.0, "tolerant": False}
        Team(Exchange(store, rank, Mesh(1, 1, 2), run="x", **limits)).begin_step(0, device)
        drawn.append((torch.rand(3).tolist(), gpu_generator.draw(3)))
    assert drawn[0] == drawn[1]


def test_what_a_step_drew_from_is_compared(gpu_generator: Philox) -> None:
    """And nothing else: a generator that it left alone may differ."""

    def used(*, cpu: int = 1, gpu: int = 1, of_cpu: int, of_gpu: int) -> int:
        torch.manual_seed(cpu)
        gpu_generator.manual_seed(gpu)
        before = RandomState.current(torch.device("cuda"))
        torch.rand(of_cpu)
        gpu_generator.draw(of_gpu)
        return before.used_since()

    assert used(of_cpu=0, of_gpu=0) == 0
    assert used(of_cpu=0, of_gpu=1) == used(cpu=2, of_cpu=0, of_gpu=5) != 0
    assert used(of_cpu=0, of_gpu=1) != used(gpu=2, of_cpu=0, of_gpu=1)
    assert used(of_cpu=1, of_gpu=0) == used(gpu=2, of_cpu=5, of_gpu=0) != 0
    assert used(of_cpu=1, of_gpu=0) != used(cpu=2, of_cpu=1, of_gpu=0)
    assert used(of_cpu=1, of_gpu=1) != used(gpu=2, of_cpu=1, of_gpu=1)


def test_a_random_state_of_another_kind_of_device(gpu_generator: Philox) -> None:
    for there, here in (("cpu", "cuda"), ("cuda", "cpu")):
        torch.manual_seed(1)
        theirs = RandomState.current(torch.device(there)).encode()
        expected = torch.rand(3)
        RandomState.current(torch.device(here)).adopt(theirs).restore()
        assert torch.equal(torch.rand(3), expected)


def flush_at_three(rank: int, zo: zo2ext.ZOEngine) -> None:
    if zo.steps == 3:
        zo.flush()


@pytest.mark.parametrize("storage", ["bf16", "split"])
def test_a_run_continues_on_other_numbers_of_ranks(tmp_path: Path, storage: str) -> None:
    """With write-backs in and out of turn; the journal of all is that of one."""
    config = {"storage": storage, "write_back": 4}
    whole = Job(steps=12, config=config, fault=flush_at_three, journal=tmp_path / "one")
    expected = train(whole, 0)
    assert not expected.failure + expected.error
    many = replace(whole, mesh=Mesh(1, 1, 2), journal=tmp_path / "many")
    agreed(run(replace(many, steps=4)))
    assert not train(replace(many, mesh=None, steps=8), 0).error
    ours = agreed(run(replace(many, steps=12)))
    assert ours.digest == expected.digest
    assert (tmp_path / "many").read_bytes() == (tmp_path / "one").read_bytes()


def test_two_ranks_have_the_bits_of_the_plain_loop() -> None:
    settings = {"lr": 3e-3, "eps": 1e-3, "weight_decay": 0.1, "seed": 11}
    data = [micro_batch(step, 0) for step in range(8)]
    expected = reference.mezo(tiny("opt"), data, **settings)
    model = tiny("opt")
    for key, parameter in model.named_parameters():
        parameter.data = expected.weights[key]
    assert agreed(run(Job(Mesh(1, 1, 2)))).digest == digest(model)


# -- where it runs


@pytest.mark.parametrize("name", [None, "cuda"])
def test_each_rank_of_a_host_has_a_gpu_of_its_own(
    name: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    current: list[torch.device] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", current.append)
    monkeypatch.setenv("LOCAL_RANK", "3")
    parallel = zo2ext.Parallel(rank=3, ranks=4, store=None)
    assert parallel.device(name) == torch.device("cuda", 1)
    assert current == [torch.device("cuda", 1)], "which NCCL goes by"
    assert parallel.device("cpu") == "cpu"


@pytest.mark.parametrize("loaded", [False, True], ids=["offload", "load"])
def test_loaded_models_go_there_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, loaded: bool
) -> None:
    monkeypatch.setattr(zo2ext.Parallel, "device", lambda self, name: {"cuda": "simulated"}[name])
    parallel = zo2ext.Parallel(rank=0, ranks=1, store=torch.distributed.HashStore())
    config = zo2ext.ZOConfig(device="cuda")
    tiny("opt").save_pretrained(tmp_path)
    if loaded:
        _, zo = zo2ext.load(tmp_path, config, parallel=parallel)
    else:
        zo = zo2ext.offload(tiny("opt"), config, parallel=parallel)
    with zo:
        assert isinstance(zo._device, SimulatedDevice)


# -- what it costs


def test_bytes_and_memory_of_a_rank() -> None:
    steps = {n: run(Job(Mesh(2), steps=n, micro_batches=2, weighted=True)) for n in (2, 6)}
    sent = [(steps[6][rank].sent - steps[2][rank].sent) / 4 for rank in (0, 1)]
    # What it is, step, checksum, random state, lr, counts; a weight, and a loss for each forward
    # pass.
    assert sent == [1 + RECORD_NBYTES, 1 + 29 + 8 + 2 * 8]
    both, one = alone(), run(Job(Mesh(1, 1, 2)))[0]
    with zo2ext.offload(tiny("opt"), zo2ext.ZOConfig(device="cpu", one_copy=True)) as zo:
        assert one.device_nbytes == zo.device_nbytes < both.device_nbytes


@pytest.mark.gpu
def test_two_ranks_on_one_gpu() -> None:
    config = {"device": "cuda"}
    ours = agreed(run(Job(Mesh(1, 1, 2), config=config)))
    assert ours.digest == train(Job(config=config), 0).digest


@pytest.mark.gpu
def test_a_gpus_random_state_comes_back() -> None:
    device = torch.device("cuda")
    torch.cuda.manual_seed(5)
    torch.rand(7, device=device)
    before = RandomState.current(device)
    expected = torch.rand(9, device=device)
    assert before.used_since() != 0
    torch.cuda.manual_seed(6)
    RandomState.current(device).adopt(before.encode()).restore()
    assert before.used_since() == 0
    assert torch.equal(torch.rand(9, device=device), expected)


def seeded_apart(rank: int) -> None:
    """Only the GPU's generator, whose masks are the only ones, is not as it should be."""
    torch.manual_seed(7)
    torch.cuda.manual_seed(7 + 100 * rank)


@pytest.mark.gpu
def test_dropout_masks_on_a_gpu_agree_on_ranks_that_share_a_batch() -> None:
    config = {"device": "cuda"}
    job = Job(config=config, train=True, model={"dropout": 0.3}, prepare=seeded_apart)
    one = train(job, 0)
    assert one.digest != train(Job(config=config), 0).digest, "there are masks"
    assert agreed(run(replace(job, mesh=Mesh(1, 1, 2)))).digest == one.digest


# -- who does what

meshes = st.builds(Mesh, st.integers(1, 5), st.integers(1, 5), st.integers(1, 2))


@given(mesh=meshes, more=st.integers(0, 7), centered=st.booleans())
def test_every_forward_of_every_batch_is_dealt_once(mesh: Mesh, more: int, centered: bool) -> None:
    directions = mesh.direction + more
    if centered:
        mesh, directions = replace(mesh, perturb=1), max(directions, 2)
    sides = 1 if centered else 2
    estimator = Estimator.CENTERED if centered else Estimator.TWO_SIDED
    config = ZOConfig(directions=directions, estimator=estimator, eps=0.5)
    assert config.forwards == sides * directions
    mesh.check(config)
    for data_rank in range(mesh.data):
        ranks = mesh.sharing(data_rank)
        assert {mesh.data_rank(rank) for rank in ranks} == {data_rank}
        dealt = [mesh.forwards(rank, config) for rank in ranks]
        assert sorted(f for forwards in dealt for f in forwards) == list(range(sides * directions))
        sizes = [len(forwards) for forwards in dealt]
        assert 0 < max(sizes) <= min(sizes) + (1 if mesh.perturb == 2 else sides)
    keys = list(range(directions))
    first, second, *_ = (*perturbations(range(sides * directions), keys, config), None)
    assert (first, second) == ((0, 0.5, 0), (1, 0.5, 1) if centered else (0, -0.5, 0))


def test_meshes_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match="perturb must be 1 or 2"):
        Mesh(perturb=3).check(ZOConfig(directions=4))
    with pytest.raises(ValueError, match=r"direction ranks must be 1 to 2, .* got 3"):
        Mesh(direction=3).check(ZOConfig(directions=2))
    with pytest.raises(ValueError, match="data ranks must be 1 to 64, got 65"):
        Mesh(65).check(ZOConfig())
    with pytest.raises(ValueError, match="perturb must be 1 with estimator='centered'"):
        Mesh(perturb=2).check(ZOConfig(directions=2))
    for settings in ({"perturb": 2, "direction": 2}, {"direction": 4}):
        with pytest.raises(ValueError, match="must divide"):
            zo2ext.Parallel(rank=0, ranks=6, store=None, **settings)
    with pytest.raises(ValueError, match="rank must be 0 to 1, got 2"):
        zo2ext.Parallel(rank=2, ranks=2, store=None)
    with pytest.raises(ValueError, match="deadline must be above 0"):
        zo2ext.Parallel(rank=0, ranks=2, store=None, deadline=0)


def test_mixtures_are_refused() -> None:
    one = RankLosses(((1.0, 2.0),), (3.0,))
    with pytest.raises(ValueError, match="weights must be given by all data ranks or by none"):
        combine(Mesh(2), {0: one, 1: RankLosses(((1.0, 2.0),))}, ZOConfig(), [0, 1])
    with pytest.raises(ValueError, match="no rank had a batch"):
        combine(Mesh(2), {0: RankLosses(()), 1: RankLosses(())}, ZOConfig(), [0, 1])
    mine, theirs = RankLosses(((1.0,),)), RankLosses(((1.0,), (2.0,)))
    with pytest.raises(ValueError, match="rank 1 ran 2 micro-batches"):
        combine(Mesh(1, 1, 2), {0: mine, 1: theirs}, ZOConfig(), [0])


losses = st.floats(-1e3, 1e3, width=32)


@given(
    rows=st.lists(st.tuples(losses, losses), max_size=3),
    kind=st.sampled_from(["weighted", "total", "summed"]),
    step=st.integers(0, 2**64 - 1),
    checksum=st.integers(0, 2**32 - 1),
)
def test_reports_survive_the_wire(rows: Any, kind: str, step: int, checksum: int) -> None:
    weights = tuple(1.5 * i for i in range(len(rows))) if kind == "weighted" else None
    report = Report(step, checksum, 17, 1e-3, RankLosses(tuple(rows), weights, kind == "total"))
    assert Report.decode(report.encode()) == report


def test_records_of_a_step_follow_from_those_before() -> None:
    header = {"start": 4, "config": {"directions": 1}}
    ours, theirs = (Ledger(parse(opening(header), Path("x"))) for _ in range(2))
    for step in (4, 5):
        update = zo2ext.ops.Update(step, 0.5)
        made = StepResult(step, (step,), (1.0,), (2.0,), (update,), 1e-3, data_rank_mask=0b101)
        records = ours.append(made)
        for byte in range(0, len(records), 7):
            broken = bytearray(records)
            broken[byte] ^= 4
            with pytest.raises(JournalError):
                decode(bytes(broken), theirs.checksum, step)
        assert theirs.append_records(records) == made
        assert theirs.checksum == ours.checksum
    with pytest.raises(JournalError, match="step 6 is expected, got step 5"):
        ours.append(made)


def test_weights_are_checked() -> None:
    model, data = tiny("opt"), batches("opt", 1)[0]
    with zo2ext.offload(model, zo2ext.ZOConfig(device="cpu")) as zo:
        for weights in ([], [1.0, 2.0], [-1.0], [math.inf], [math.nan]):
            with pytest.raises(ValueError, match="weights must be"):
                zo.step(lambda: model(**data).loss, weights=weights)
        with pytest.raises(ValueError, match="empty sequence"):
            zo.step([])
        assert math.isfinite(zo.step(lambda: model(**data).loss, weights=[7.0]))
