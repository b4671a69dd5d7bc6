"""Several processes on one run, from a user's side: the command line and the Trainer."""

from __future__ import annotations

import json
import math
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from launched import Launch
from safetensors.torch import load_file

from zo2ext.commands import main as cli
from zo2ext.config import ZOConfig
from zo2ext.integrations.data_ranks import RankBatches, weighted_batches
from zo2ext.journal.journal import read_journal
from zo2ext.parallel.mesh import Mesh, RankLosses, combine
from zo2ext.parallel.micro_batches import own_slices, slices_to_run
from zo2ext.parallel.parallel import Parallel

KILLED = -signal.SIGKILL


@pytest.fixture(scope="module")
def launch(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Launch]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join(sys.path))  # where it looks for the modules
        yield Launch(tmp_path_factory.mktemp("said"))


# -- who gets what


def place(rank: int, ranks: int, **axes: int) -> Parallel:
    return Parallel(rank=rank, ranks=ranks, store=None, **axes)


@pytest.mark.parametrize(("count", "size"), [(8, 2), (5, 2), (1, 4), (7, 3), (16, 1)])
def test_a_batch_is_dealt_whole_however_many_ranks_there_are(count: int, size: int) -> None:
    alone = own_slices(count, size, None)
    for ranks in range(1, 7):
        assert [s for r in range(ranks) for s in own_slices(count, size, place(r, ranks))] == alone
    shared = [own_slices(count, size, place(rank, 4, perturb=2)) for rank in range(4)]
    assert shared[0] == shared[1]
    assert shared[0] + shared[2] == alone
    assert own_slices(8, None, place(1, 2)) == [slice(4, 8)]


def test_a_rank_without_a_micro_batch_has_one_that_does_not_count() -> None:
    found = [slices_to_run(4, 4, place(rank, 2)) for rank in (0, 1)]
    assert {len(slices) for slices, _ in found} == {1}
    assert sorted(factor for _, factor in found) == [0, 1]
    assert slices_to_run(4, None, None) == ([slice(0, 4)], 1)


def test_sums_do_not_depend_on_the_dealing() -> None:
    """With losses of sizes that float64 cannot add up exactly."""
    generator = torch.Generator().manual_seed(0)
    sizes = 10.0 ** torch.randint(-20, 20, (12, 2), generator=generator).double()
    losses = (torch.randn(12, 2, generator=generator) * sizes).float().tolist()
    rows, weights = [tuple(row) for row in losses], tuple(float(i + 1) for i in range(12))
    for total in (False, True):
        found = set()
        for data in (1, 2, 3, 4, 6):
            measured = {
                r: RankLosses(
                    tuple(rows[r::data]), None if total else tuple(weights[r::data]), total
                )
                for r in range(data)
            }
            found.add(tuple(combine(Mesh(data), measured, ZOConfig(), list(range(data)))))
        assert len(found) == 1
        factors = [1.0] * 12 if total else list(weights)
        exact = math.fsum(f * row[0] for f, row in zip(factors, rows, strict=True))
        assert found.pop()[0] == float(torch.tensor(exact / (1 if total else sum(weights))).float())
    infinite = RankLosses(((math.inf, 1.0), (-math.inf, 2.0)))
    assert math.isnan(combine(Mesh(), {0: infinite}, ZOConfig(), [0])[0])


def test_a_trainers_batches_are_those_of_one_process() -> None:
    for batches, ranks, accumulation in ((13, 2, 2), (13, 4, 1), (5, 3, 2), (12, 3, 2), (2, 4, 3)):
        rows = torch.utils.data.BatchSampler(range(batches * 2), 2, drop_last=False)
        parts = [list(RankBatches(rows, rank=r, ranks=ranks)) for r in range(ranks)]
        assert len({len(part) for part in parts}) == 1
        step, together = 0, []
        while step * accumulation < len(parts[0]):
            taken = []
            for r in range(ranks):
                given = parts[r][step * accumulation :][:accumulation]
                at = place(r, ranks)
                taken += given[: weighted_batches(step, batches, len(given), accumulation, at)]
            together.append(sorted(taken))
            step += 1
        whole = list(rows)
        each = accumulation * ranks
        assert together == [whole[i : i + each] for i in range(0, batches, each)]


# -- the command line


@pytest.fixture(scope="module")
def words(model_folder: Path, text_file: Path) -> list[str]:
    """A run on a text, without --out."""
    size = ["--steps=8", "--batch-size=5", "--micro-batch=2", "--seq-len=16", "--eval-windows=4"]
    more = ["--eval-every=3", "--directions=2", "--estimator=two_sided"]
    more += ["--device=cpu", "--deadline=20"]
    return ["train", f"--model={model_folder}", f"--text={text_file}", *size, *more]


@pytest.fixture(scope="module")
def alone(words: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("alone") / "run"
    assert cli.main([*words, f"--out={out}"]) == 0
    return out


def assert_same_run(out: Path, expected: Path) -> None:
    names = ("final/model.safetensors", "loss.csv", "evaluations.csv")
    for name in names:
        assert (out / name).read_bytes() == (expected / name).read_bytes(), name
    assert {p.name for p in out.iterdir()} == {p.name for p in expected.iterdir()}


@pytest.mark.parametrize(
    ("ranks", "axes"),
    [
        (4, ["--perturb-parallel=2"]),
        (3, []),
        (4, ["--perturb-parallel=2", "--direction-parallel=2"]),
    ],
    ids=["data x perturb", "data", "direction x perturb"],
)
def test_the_bits_do_not_depend_on_the_ranks(
    launch: Launch, words: list[str], alone: Path, tmp_path: Path, ranks: int, axes: list[str]
) -> None:
    out = tmp_path / "run"
    assert launch(ranks, {"words": [*words, f"--out={out}", *axes]}) == [0] * ranks, launch.said
    assert_same_run(out, alone)
    assert f"ranks   {ranks}: " in launch.said[0]
    assert "step      8: held-out loss " in launch.said[0]
    assert not any(launch.said[1:]), "rank 0 speaks for all"


def test_a_run_continues_with_other_ranks(
    launch: Launch, words: list[str], alone: Path, tmp_path: Path
) -> None:
    """Two processes, one of which dies; one alone; four, of which the first dies; and three."""
    out = tmp_path / "run"
    job = {"words": [*words, f"--out={out}", "--deadline=3"]}
    assert launch(2, job, {1: {"kill": 2}}) == [1, KILLED]
    message = "rank 0: error: rank 1 did not report step 2 within 3 s"
    assert message in launch.said[0]
    assert launch(1, job, {0: {"kill": 4}}) == [KILLED]
    four = {"words": [*job["words"], "--perturb-parallel=2"]}
    assert launch(4, four, {0: {"kill": 6}}) == [KILLED, 1, 1, 1]
    for rank, said in enumerate(launch.said[1:], start=1):
        assert f"rank {rank}: error: " in said
        assert len(said.strip().splitlines()) == 1, said
    assert len(read_journal(out / "journal.zo2").steps) == 6
    assert launch(3, job) == [0, 0, 0], launch.said
    assert_same_run(out, alone)
    assert launch(2, job) == [0, 0], launch.said
    assert "finished already: 8 steps" in launch.said[0]


def test_every_rank_says_what_ended_the_run(
    launch: Launch, words: list[str], tmp_path: Path
) -> None:
    out = tmp_path / "run"
    job = {"words": [*words, f"--out={out}"]}
    for failing, others in ((1, [0, 2]), (0, [1, 2])):
        assert launch(3, job, {failing: {"fail": 2}}) == [1, 1, 1]
        assert f"rank {failing}: error: no space is left" in launch.said[failing]
        cause = f"error: rank {failing} failed: FileError: no space is left"
        assert all(cause in launch.said[rank] for rank in others), launch.said
    # One that was started otherwise.
    other = {"words": [*job["words"], "--eps=0.01"]}
    assert launch(2, job, {1: other}) == [1, 1]
    cause = "rank 1 differs from rank 0: config.eps was 0.001 and is 0.01"
    assert all(cause in said for said in launch.said)
    # What rank 0 refuses, the others learn from it.
    assert launch(2, {"words": [*job["words"], "--eps=0.01"]}) == [1, 1]
    assert "is the journal of another run: config.eps was" in launch.said[0]
    assert "rank 0 failed: JournalError: " in launch.said[1]


@pytest.mark.parametrize(
    ("hurt", "wrong", "cause"),
    [
        (1, "--text=/nowhere", "UserError: text is '/nowhere', which is not a file"),
        (2, "--model=/nowhere", "UserError: "),
        (0, "--seq-len=4000", "UserError: "),
    ],
    ids=["argument", "model", "data"],
)
def test_an_error_before_ranks_meet_is_told(
    launch: Launch, words: list[str], tmp_path: Path, hurt: int, wrong: str, cause: str
) -> None:
    """Long before the 900 s that ranks wait for each other to begin."""
    job = {"words": [*words, f"--out={tmp_path / 'run'}"]}
    assert launch(3, job, {hurt: {"words": [*job["words"], wrong]}}) == [1, 1, 1]
    for rank, said in enumerate(launch.said):
        told = f"rank {hurt}: error: " if rank == hurt else f"error: rank {hurt} failed: {cause}"
        assert told in said, said


def test_processes_that_cannot_be_laid_out_are_refused(
    words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for axes, message in (
        (["--perturb-parallel=2"], "start with torchrun --nproc-per-node 2 -m zo2ext train"),
        (["--perturb-parallel=3"], "perturb must be 1 or 2, +eps and -eps, got 3"),
        (["--direction-parallel=3"], "direction ranks must be 1 to 2, the directions of a step"),
        (["--deadline=0"], "deadline must be above 0 seconds, got 0"),
        (["--micro-batch=0"], "micro_batch must be at least 1, got 0"),
    ):
        assert cli.main([*words, f"--out={tmp_path / 'run'}", *axes]) == 1
        assert message in capsys.readouterr().err


@pytest.mark.parametrize("objective", ["loss", "choice", "metric"])
def test_a_task_is_dealt_too(
    launch: Launch, model_folder: Path, task_data: Path, tmp_path: Path, objective: str
) -> None:
    """Where weights of an earlier step are kept, all ranks go back to them."""
    size = ["--train-size=16", "--dev-size=12", "--test-size=6", "--batch-size=5", "--steps=8"]
    model, data = f"--model={model_folder}", f"--data={task_data / 'sst2'}"
    more = ["--task=sst2", "--eval-every=2", "--lr=1e-3", "--micro-batch=2", "--device=cpu"]
    words = ["train", model, data, *size, *more, f"--objective={objective}"]
    one, two = tmp_path / "one", tmp_path / "two"
    assert cli.main([*words, f"--out={one}"]) == 0
    assert launch(2, {"words": [*words, f"--out={two}"]}) == [0, 0], launch.said
    assert_same_run(two, one)
    assert json.loads((two / "results.json").read_text())["kept_step"] < 8
    assert not launch.said[1]


def test_rows_are_dealt_too(launch: Launch, model_folder: Path, tmp_path: Path) -> None:
    """Two each, with answers of one to five tokens: a rank's share weighs as many as it has."""
    pytest.importorskip("datasets")
    data, one, two = tmp_path / "a.jsonl", tmp_path / "one", tmp_path / "two"
    rows = [{"prompt": "would you", "completion": " yes" * (1 + i % 5)} for i in range(20)]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = ["train", f"--data={data}", f"--model={model_folder}", "--device=cpu"]
    words += ["--steps=2", "--batch-size=4", "--micro-batch=2"]
    assert cli.main([*words, f"--out={one}"]) == 0
    assert launch(2, {"words": [*words, f"--out={two}"]}) == [0, 0], launch.said
    assert_same_run(two, one)
    assert not launch.said[1], "rank 0 speaks for all"


def test_torchrun(words: list[str], alone: Path, tmp_path: Path) -> None:
    """With one host copy of the weights, which both ranks read as rank 0 saves."""
    out = tmp_path / "run"
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command = [*torchrun, "--nproc-per-node=2", "-m", "zo2ext", *words, f"--out={out}"]
    done = subprocess.run(
        [*command, "--perturb-parallel=2", "--store=shared"],
        capture_output=True,
        text=True,
        timeout=180,
        check=False,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    assert done.returncode == 0, done.stderr
    assert_same_run(out, alone)
    assert done.stdout.count("after 8 steps") == 1
    assert not re.search("Traceback", done.stderr)


def test_the_rate_that_is_found_does_not_depend_on_the_ranks(
    launch: Launch, words: list[str], tmp_path: Path
) -> None:
    """Nor does a run that one of them continues, with the recorded rate."""
    one, two = tmp_path / "one", tmp_path / "two"
    words = [*words, "--lr=auto"]
    assert cli.main([*words, f"--out={one}"]) == 0
    job = {"words": [*words, f"--out={two}", "--direction-parallel=2"]}
    assert launch(4, job) == [0] * 4, launch.said
    assert_same_run(two, one)
    assert read_journal(two / "journal.zo2").header["run"]["lr_search"]
    more = {"words": [*words, f"--out={two}", "--steps=10"]}
    assert launch(2, more) == [0, 0], launch.said
    assert "as recorded in the run" in launch.said[0]
    assert cli.main([*words, f"--out={one}", "--steps=10"]) == 0
    assert_same_run(two, one)


# -- the Trainer


def trained(launch: Launch, out: Path, ranks: int, **options: Any) -> dict[str, torch.Tensor]:
    """The weights after a Trainer's run of 12 micro-batches a step."""
    at = options.pop("at", None)
    each = ranks // options.get("perturb_parallel", 1)
    given = {"gradient_accumulation_steps": 12 // each, "save_strategy": "no", **options}
    ended = launch(ranks, {"trainer": (str(out), json.dumps(given))}, at)
    assert ended == [0] * ranks, launch.said
    rows = [json.loads(Path(f"{out}.{r}.json").read_text()) for r in range(ranks)]
    assert all(row == rows[0] for row in rows)
    return load_file(f"{out}.safetensors")


def assert_same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.mark.parametrize("loss", ["model", "custom"])
def test_a_trainers_bits_do_not_depend_on_the_ranks(
    launch: Launch, tmp_path: Path, loss: str
) -> None:
    """Passes over the data end within a step: 13 micro-batches."""
    options = {"loss": True} if loss == "custom" else {}
    expected = trained(launch, tmp_path / "one", 1, **options)
    assert_same(trained(launch, tmp_path / "three", 3, **options), expected)
    assert_same(trained(launch, tmp_path / "four", 4, perturb_parallel=2, **options), expected)


def test_a_trainers_rate_does_not_depend_on_the_ranks(launch: Launch, tmp_path: Path) -> None:
    options = {"learning_rate": "auto", "max_steps": 3}
    expected = trained(launch, tmp_path / "one", 1, **options)
    assert_same(trained(launch, tmp_path / "three", 3, **options), expected)


def test_a_trainers_error_before_ranks_meet_is_told(launch: Launch, tmp_path: Path) -> None:
    given = {"resume": str(tmp_path / "nowhere")}
    at = {1: {"trainer": (str(tmp_path / "run"), json.dumps(given))}}
    assert launch(2, {"trainer": (str(tmp_path / "run"), "{}")}, at) == [1, 1]
    assert "RankFailure: rank 1 failed: " in launch.said[0]


def test_a_trainer_has_the_loss_of_the_joined_batch(launch: Launch, tmp_path: Path) -> None:
    alone = {"gradient_accumulation_steps": 1, "max_steps": 3}
    whole = trained(launch, tmp_path / "one", 1, per_device_train_batch_size=4, **alone)
    parts = trained(launch, tmp_path / "two", 2, **alone)
    for name, expected in whole.items():
        torch.testing.assert_close(parts[name], expected, rtol=1e-4, atol=1e-4)
    rows = [json.loads((tmp_path / f"{n}.0.json").read_text()) for n in ("one", "two")]
    torch.testing.assert_close(torch.tensor(rows[0]), torch.tensor(rows[1]), rtol=1e-6, atol=0)


def test_a_trainer_goes_on_with_other_ranks(launch: Launch, tmp_path: Path) -> None:
    """From the journal after a kill, and from checkpoints; evaluations in between."""
    more = {"save_strategy": "steps", "save_steps": 2, "eval_strategy": "steps", "eval_steps": 3}
    more |= {"storage": "bf16", "write_back": 3, "deadline": 5}
    expected = trained(launch, tmp_path / "whole", 1, **more)
    out = tmp_path / "run"
    given = {"gradient_accumulation_steps": 6, **more}
    ended = launch(2, {"trainer": (str(out), json.dumps(given))}, {1: {"kill": 3}})
    assert ended[1] == KILLED
    assert ended[0] != 0
    assert "rank 1 did not" in launch.said[0] or "Connection closed" in launch.said[0]
    folder = out / "checkpoint-2"
    assert (folder / "zo_state.json").is_file()
    assert_same(trained(launch, out, 3, **more), expected)  # from the journal alone
    made = read_journal(out / "journal.zo2").steps
    assert [step.data_rank_mask for step in made] == [3] * 3 + [7] * 3, "whose losses are in a step"
    one = read_journal(tmp_path / "whole" / "journal.zo2").steps
    assert [replace(step, data_rank_mask=1) for step in made] == one
    for ranks, axes in ((1, {}), (4, {"perturb_parallel": 2})):
        resumed = {**more, "resume": str(folder), **axes}
        assert_same(trained(launch, tmp_path / f"from{ranks}", ranks, **resumed), expected)
