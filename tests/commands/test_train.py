"""``zo2ext train`` from a user's side: the run, its files, and every way it can be refused."""

from __future__ import annotations

import csv
import json
import os
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import packaged
import pytest
import torch
from safetensors.torch import load_file, save_file

import zo2ext
import zo2ext.commands.train as train_command
from zo2ext.checkpoints import write as checkpoint
from zo2ext.commands import main as cli
from zo2ext.engine.engine import ZOEngine
from zo2ext.runs import plots
from zo2ext.runs.log import read_steps
from zo2ext.runs.plots import running_mean

Capture = pytest.CaptureFixture[str]
FILES = {  # that a run leaves beside its weights
    *("arguments.json", "journal.zo2", "steps.csv", "evaluations.csv"),
    *("loss.csv", "loss.png", "timeline.json", "timeline.png"),
}
SMALL = ["--steps", "3", "--batch-size", "4", "--seq-len", "32"]


@pytest.fixture(scope="module")
def model(model_folder: Path) -> Path:
    return model_folder


@pytest.fixture(scope="module")
def text(text_file: Path) -> Path:
    return text_file


@pytest.fixture
def train(model: Path, text: Path, tmp_path: Path) -> Callable[..., int]:
    """Runs the command with few small steps into tmp_path / "run", unless told otherwise."""

    def run(*words: str, **paths: str | Path) -> int:
        named = {"model": model, "text": text, "out": tmp_path / "run", **paths}
        options = [f"--{name}={value}" for name, value in named.items()]
        return cli.main(["train", *options, *SMALL, *words])

    return run


@pytest.fixture(scope="module")
def usual(model: Path, text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on the CPU with the defaults; others are compared with it."""
    out = tmp_path_factory.mktemp("usual") / "run"
    assert cli.main(["train", f"--model={model}", f"--text={text}", f"--out={out}", *SMALL]) == 0
    return out


def weights(run: Path) -> bytes:
    return (run / "final" / "model.safetensors").read_bytes()


def tensors(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / "final" / "model.safetensors")


def losses(run: Path) -> list[dict[str, str]]:
    with (run / "loss.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


# -- what a run leaves


def test_a_run_leaves_weights_losses_a_picture_and_its_settings(usual: Path, model: Path) -> None:
    assert names(usual) == FILES | {"final", "results.json"}
    rows = losses(usual)
    assert [row["step"] for row in rows] == ["0", "1", "2", "3"]
    assert all(1 < float(row["train_loss"]) < 4 for row in rows[:3]), "a guess has ln 512 = 6.2"
    assert rows[3]["train_loss"] == ""
    assert [row["held_out_loss"] != "" for row in rows] == [True, False, False, True]
    picture = (usual / "loss.png").read_bytes()
    assert picture.startswith(b"\x89PNG\r\n\x1a\n")
    assert picture.endswith(b"IEND\xaeB`\x82")
    settings = json.loads((usual / "arguments.json").read_text())
    assert settings["model"] == str(model)
    assert (settings["steps"], settings["seq_len"], settings["storage"]) == (3, 32, None)
    assert settings["lr"] == pytest.approx(0.05 / 174_528**0.5), "the rate that was chosen"
    assert settings["zo2ext"] == zo2ext.__version__


def test_compiled_blocks(
    train: Callable[..., int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, usual: Path
) -> None:
    """By a backend that changes no bit, so that the run is the usual one."""
    compiled = []

    def eager(forward: Any) -> Any:
        compiled.append(forward.__self__)
        return torch._dynamo.optimize("eager")(forward)

    monkeypatch.setattr(torch, "compile", eager)
    assert train("--compile") == 0
    torch._dynamo.reset()
    assert len(compiled) == 3
    assert weights(tmp_path / "run") == weights(usual)


def test_the_result_is_an_ordinary_checkpoint(usual: Path, model: Path, text: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tuned = AutoModelForCausalLM.from_pretrained(usual / "final").eval()
    tokenizer = AutoTokenizer.from_pretrained(usual / "final")
    words = text.read_text()
    tokens = tokenizer(words, add_special_tokens=False, verbose=False)["input_ids"]
    original = AutoTokenizer.from_pretrained(model)
    assert tokens == original(words, add_special_tokens=False, verbose=False)["input_ids"]

    # The loss in the table is the loss of the weights in the folder.
    held_out = words[round(len(words) * 0.9) :]
    ids = tokenizer(held_out, add_special_tokens=False, return_tensors="pt")["input_ids"][0]
    windows = ids[: len(ids) // 32 * 32].view(-1, 32)
    with torch.no_grad():
        loss = tuned(input_ids=windows, labels=windows).loss.item()
    assert loss == pytest.approx(float(losses(usual)[-1]["held_out_loss"]), rel=1e-5)

    before, after = load_file(model / "model.safetensors"), tensors(usual)
    assert before.keys() == after.keys(), "tied weights are saved once, as they came"
    assert all(before[name].dtype == after[name].dtype for name in before)
    assert not any(torch.equal(before[name], after[name]) for name in before), "all are trained"


def test_the_same_command_gives_the_same_bytes(
    train: Callable[..., int], usual: Path, tmp_path: Path
) -> None:
    assert train() == 0
    for name in ("loss.csv", "loss.png", "final/model.safetensors", "final/tokenizer.json"):
        assert (tmp_path / "run" / name).read_bytes() == (usual / name).read_bytes(), name


@pytest.fixture
def no_picture(monkeypatch: pytest.MonkeyPatch) -> None:
    """Drawing takes a third of a small run."""
    monkeypatch.setattr(plots, "available", lambda: False)


@pytest.mark.usefixtures("no_picture")
@pytest.mark.parametrize(
    "words",
    [
        "--device simulated",
        "--device simulated --granularity module --slots 2",
        "--device cpu --granularity module --resident 2",
        "--resident all",
        "--resident 0.5MiB",
    ],
)
def test_how_it_is_computed_changes_no_byte(
    words: str, train: Callable[..., int], usual: Path, tmp_path: Path
) -> None:
    assert train(*words.split()) == 0
    assert weights(tmp_path / "run") == weights(usual)
    assert losses(tmp_path / "run") == losses(usual)


def test_float32_is_not_rounded_however_seldom_it_is_written_back(
    train: Callable[..., int], usual: Path, tmp_path: Path
) -> None:
    assert train("--write-back", "4") == 0
    assert losses(tmp_path / "run") == losses(usual)
    saved = tensors(tmp_path / "run")
    assert all(torch.equal(saved[name], tensor) for name, tensor in tensors(usual).items())


@pytest.mark.usefixtures("no_picture")
@pytest.mark.parametrize(
    "words",
    [
        "--seed 1",
        "--lr 1e-3",
        "--eps 1e-2",
        "--directions 2",
        "--directions 2 --estimator two_sided",
        "--preset fzoo",
        "--normalize",
        "--directions 2 --normalize no",
        "--weight_decay 0.1",
        "--batch-size 3",
        "--write-back 2 --storage bf16",
        "--write-back never --storage bf16",
        "--storage bf16",
        "--storage fp16",
    ],
)
def test_what_defines_a_run_changes_it(
    words: str, train: Callable[..., int], usual: Path, tmp_path: Path
) -> None:
    assert train(*words.split()) == 0
    assert weights(tmp_path / "run") != weights(usual)


def test_weights_stored_in_bf16_are_bf16_numbers(train: Callable[..., int], tmp_path: Path) -> None:
    assert train("--storage", "bf16") == 0
    saved = tensors(tmp_path / "run")
    assert all(torch.equal(w.bfloat16().to(w.dtype), w) for w in saved.values())


def test_a_model_saved_in_bf16_stays_in_bf16(
    train: Callable[..., int], model: Path, tmp_path: Path
) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    half = AutoModelForCausalLM.from_pretrained(model, dtype=torch.bfloat16)
    half.save_pretrained(tmp_path / "half")
    AutoTokenizer.from_pretrained(model).save_pretrained(tmp_path / "half")
    assert train(model=tmp_path / "half") == 0
    saved = tensors(tmp_path / "run")
    assert {w.dtype for w in saved.values()} == {torch.bfloat16}
    assert all(1 < float(row["train_loss"]) < 4 for row in losses(tmp_path / "run")[:3])


def test_training_lowers_the_held_out_loss(train: Callable[..., int], tmp_path: Path) -> None:
    words = "--steps 60 --batch-size 8 --seq-len 64 --eval-every 30 --lr 1e-3"
    assert train(*words.split(), text=packaged.write_reviews(tmp_path / "reviews.txt")) == 0
    before, between, after = (
        float(row["held_out_loss"]) for row in losses(tmp_path / "run") if row["held_out_loss"]
    )
    assert before > between > after
    # 60 steps of tests/support/reference.py on other batches: from 3.030 to 2.834.
    assert before == pytest.approx(3.030, abs=5e-4)
    assert before - after > 0.15


def test_evaluation_can_be_cut_short(
    train: Callable[..., int], usual: Path, tmp_path: Path
) -> None:
    assert train("--eval-windows", "2", "--eval-every", "1") == 0
    assert weights(tmp_path / "run") == weights(usual), "evaluating changes nothing"
    assert all(row["held_out_loss"] for row in losses(tmp_path / "run"))
    assert losses(tmp_path / "run")[0]["held_out_loss"] != losses(usual)[0]["held_out_loss"]


# -- what it says


def test_a_run_says_what_it_does(train: Callable[..., int], capsys: Capture) -> None:
    assert train() == 0
    said = capsys.readouterr()
    for part in (
        "174,528 weights to train, in 5 units",
        "on the host",
        "buffers on cpu",
        "tokens to train on",
        "3 steps of 4 x 32 tokens, lr 0.00012, eps 0.001, seed 0",
        "step      0: held-out loss ",
        "step      3: held-out loss ",
        "after 3 steps",
        "run/final",
        "run/loss.csv, ",
        "run/loss.png",
    ):
        assert part in said.out
    assert said.err == "", "no bar is drawn where there is no terminal"


def test_no_library_adds_noise(model: Path, text: Path, tmp_path: Path) -> None:
    """A long text, and nobody's warnings: the error stream has progress bars alone."""
    (tmp_path / "long.txt").write_text(text.read_text() * 4)
    options = [f"--model={model}", f"--text={tmp_path / 'long.txt'}", f"--out={tmp_path / 'run'}"]
    done = subprocess.run(
        [sys.executable, "-m", "zo2ext", "train", *options, *SMALL],
        capture_output=True,
        text=True,
        timeout=180,
        check=False,
        env={k: v for k, v in os.environ.items() if k != "TRANSFORMERS_VERBOSITY"},
    )
    assert done.returncode == 0, done.stderr
    lines = [line.strip() for line in done.stderr.replace("\r", "\n").splitlines()]
    assert [line for line in lines if line and "it/s" not in line and "%|" not in line] == []


def test_without_matplotlib_it_says_how_to_get_the_picture(
    train: Callable[..., int], tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plots, "available", lambda: False)
    assert train() == 0
    assert names(tmp_path / "run") == {"final", "results.json", *FILES} - {
        "loss.png",
        "timeline.png",
    }
    assert "run/loss.csv (for plots: pip install 'zo2ext[plot]')" in capsys.readouterr().out


def test_skipped_steps_are_told(
    train: Callable[..., int], tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    loss, calls = train_command._loss, iter(range(7))  # one more in the first step
    monkeypatch.setattr(
        train_command,
        "_loss",
        lambda model, ids: loss(model, ids) * (float("nan") if next(calls) == 3 else 1),
    )
    assert train() == 0
    assert "1 of 3 steps were skipped" in capsys.readouterr().err
    assert [row["train_loss"] == "nan" for row in losses(tmp_path / "run")[:3]] == [
        False,
        True,
        False,
    ]
    assert (tmp_path / "run" / "loss.png").stat().st_size > 1000


def test_running_means() -> None:
    assert running_mean([], 3) == []
    assert running_mean([1, 2, 3, 4, 5], 1) == [1, 2, 3, 4, 5]
    assert running_mean([1, 2, 3, 4, 5], 3) == [1, 1.5, 2, 3, 4]


# -- what it refuses


def refused(capsys: Capture, tmp_path: Path) -> str:
    """The one message of a failed run that left nothing."""
    assert not (tmp_path / "run").exists()
    said = capsys.readouterr().err
    assert "Traceback" not in said
    start = "zo2ext train: error: "
    assert said.count(start) == 1
    message = said[said.index(start) + len(start) :]
    assert message.count("\n") == 1, message
    return message.strip()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--steps=0", "steps must be at least 1, got 0"),
        ("--batch-size=0", "batch_size must be at least 1, got 0"),
        ("--seq-len=1", "seq_len must be at least 2, got 1"),
        ("--eval-every=0", "eval_every must be at least 1, got 0"),
        ("--eval-windows=-1", "eval_windows must be at least 1, got -1"),
        ("--eps=0", "eps must be a positive number, finite, got 0.0"),
        ("--lr=-1", "lr must be a number >= 0, finite, got -1.0"),
        ("--lr=nan", "lr must be a number >= 0, finite, got nan"),
        ("--seed=-1", "seed must be an integer from 0 to 18446744073709551615, got -1"),
        ("--write-back=0", "write_back must be an integer from 1 to 2147483647, got 0"),
        (
            "--write-back=some",
            "write_back must be an integer from 1, 'never' or 'auto', got 'some'",
        ),
        ("--slots=1", "slots must be an integer from 2 to 1023, got 1"),
        ("--resident=some", "resident must be a count, 'all', or a size such as '8GiB', got"),
        ("--resident=-1", "resident must be a count, 'all', or a size such as '8GiB', got '-1'"),
        ("--device=gpu", "device must be 'cuda', 'cpu' or 'simulated', got 'gpu'"),
        ("--seq-len=513", "reads at most 512 tokens"),
    ],
)
def test_wrong_values_are_refused_by_name(
    words: str, message: str, train: Callable[..., int], capsys: Capture, tmp_path: Path
) -> None:
    assert train(words) == 1
    said = refused(capsys, tmp_path)
    assert message in said
    assert said.startswith(words[2:].split("=")[0].replace("-", "_")), "names the argument first"


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("device", ["cuda", "cuda:1"])
def test_a_gpu_that_is_not_there_is_refused(
    device: str, train: Callable[..., int], capsys: Capture, tmp_path: Path
) -> None:
    assert train("--device", device) == 1
    said = refused(capsys, tmp_path)
    assert said.startswith(f"device is '{device}', but torch finds no CUDA GPU")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty"),
        (b"To be \xe9", "is not UTF-8"),
        (b"To be, or not to be.", "tokens in its first nine tenths, but one window"),
        (b"To be, or not to be. " * 20, "tokens in its last tenth, but one window"),
        (None, "which is not a file"),
    ],
    ids=["empty", "latin", "short", "short-held-out", "none"],
)
def test_texts_of_no_use_are_refused(
    content: bytes | None,
    message: str,
    train: Callable[..., int],
    capsys: Capture,
    tmp_path: Path,
) -> None:
    if content is not None:
        (tmp_path / "text").write_bytes(content)
    assert train(text=tmp_path / "text") == 1
    said = refused(capsys, tmp_path)
    assert said.startswith("text ")
    assert str(tmp_path / "text") in said
    assert message in said


def edit_config(folder: Path, **changes: Any) -> None:
    settings = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(settings | changes))


def edit_weights(folder: Path, edit: Callable[[dict[str, torch.Tensor]], None]) -> None:
    parts = load_file(folder / "model.safetensors")
    edit(parts)
    save_file(parts, folder / "model.safetensors", metadata={"format": "pt"})


def no_config(folder: Path) -> None:
    (folder / "config.json").unlink()


def broken_config(folder: Path) -> None:
    (folder / "config.json").write_text("{")


def foreign_config(folder: Path) -> None:
    edit_config(folder, model_type="of-mine", auto_map={"AutoConfig": "code.Config"})
    (folder / "code.py").write_text("raise SystemExit('code of the model ran')")


def masked(folder: Path) -> None:
    edit_config(folder, model_type="roberta")


def beside_an_adapter(folder: Path) -> None:
    (folder / "adapter_config.json").write_text("{}")


def of_a_run(folder: Path) -> None:
    (folder / "final").mkdir()
    (folder / "config.json").rename(folder / "final" / "config.json")
    (folder / "journal.zo2").touch()


def truncated(folder: Path) -> None:
    with (folder / "model.safetensors").open("r+b") as file:
        file.truncate(500_000)


def no_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()


def pickled(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(b"cbuiltins\nexit\n(I3\ntR.")  # would exit(3)


def missing_tensor(folder: Path) -> None:
    def remove(parts: dict[str, torch.Tensor]) -> None:
        del parts["model.norm.weight"]

    edit_weights(folder, remove)


def tensor_of_another_shape(folder: Path) -> None:
    edit_weights(folder, lambda parts: parts.update({"model.norm.weight": torch.ones(3)}))


def missing_shard(folder: Path) -> None:
    parts = load_file(folder / "model.safetensors")
    shards = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
    save_file(dict(list(parts.items())[:9]), folder / shards[0], metadata={"format": "pt"})
    index = {name: shards[i >= 9] for i, name in enumerate(parts)}
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {}, "weight_map": index})
    )
    (folder / "model.safetensors").unlink()


def no_tokenizer(folder: Path) -> None:
    for path in folder.glob("tokenizer*"):
        path.unlink()


def tokenizer_of_another_model(folder: Path) -> None:
    edit_config(folder, vocab_size=300)

    def shrink(parts: dict[str, torch.Tensor]) -> None:
        for name, tensor in parts.items():
            if tensor.shape[0] == 512:
                parts[name] = tensor[:300].clone()

    edit_weights(folder, shrink)


def not_finite(folder: Path) -> None:
    def spoil(parts: dict[str, torch.Tensor]) -> None:
        parts["model.norm.weight"][7] = torch.nan

    edit_weights(folder, spoil)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (no_config, "a folder without a config.json"),
        (broken_config, "not a valid JSON file"),
        (foreign_config, "contains custom code"),
        (masked, "is a masked language model (roberta), which sees the token that it has to"),
        (beside_an_adapter, "which has an adapter (adapter_config.json) beside its weights"),
        (of_a_run, "it is the folder of a run, with weights in final"),
        (truncated, "model.safetensors has a damaged header: bytes"),
        (no_weights, "a folder without weights as safetensors"),
        (pickled, "a folder without weights as safetensors (pickles are not read)"),
        (missing_tensor, "lacks weights: model.norm.weight"),
        (tensor_of_another_shape, "of other shapes than its config.json says: model.norm.weight"),
        (missing_shard, "model-00002-of-00002.safetensors"),
        (no_tokenizer, "cannot load a tokenizer"),
        (tokenizer_of_another_model, "has 300 tokens, but its tokenizer makes token 500 "),
        (not_finite, "has a loss of nan on the held-out text before any training"),
    ],
    ids=lambda part: getattr(part, "__name__", ""),
)
def test_damaged_models_are_refused(
    damage: Callable[[Path], None],
    message: str,
    model: Path,
    train: Callable[..., int],
    capsys: Capture,
    tmp_path: Path,
) -> None:
    shutil.copytree(model, tmp_path / "model", copy_function=shutil.copyfile)
    damage(tmp_path / "model")
    assert train(model=tmp_path / "model") == 1
    said = refused(capsys, tmp_path)
    assert message in said
    assert f"model '{tmp_path / 'model'}'" in said.replace("model is", "model")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("./nowhere", "model is './nowhere', which is not a directory"),
        ("/nowhere/at/all", "model is '/nowhere/at/all', which is not a directory"),
        (__file__, "which is not a directory"),
        ("nobody/nothing", "cannot load model 'nobody/nothing' (there is no such folder"),
    ],
)
def test_models_that_are_not_there_are_refused(
    name: str, message: str, train: Callable[..., int], capsys: Capture, tmp_path: Path
) -> None:
    assert train(model=name) == 1
    assert message in refused(capsys, tmp_path)


def test_a_folder_in_use_is_not_written_to(
    train: Callable[..., int], capsys: Capture, tmp_path: Path
) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "notes").write_text("mine")
    assert train() == 1
    assert "run', which is not empty; name a new folder" in capsys.readouterr().err
    assert names(tmp_path / "run") == {"notes"}


@pytest.mark.parametrize("out", ["file", "file/run", "/proc/run"])
def test_a_folder_that_cannot_be_made_is_refused_before_any_work(
    out: str, train: Callable[..., int], capsys: Capture, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("mine")
    assert train(out=tmp_path / out) == 1
    message = f"out is '{tmp_path / out}', which cannot be written to: "
    assert refused(capsys, tmp_path).startswith(message)
    assert (tmp_path / "file").read_text() == "mine"


# -- what stops it half-way


@pytest.fixture
def stop_at_step(monkeypatch: pytest.MonkeyPatch) -> Callable[[int, type[BaseException]], None]:
    """Makes the loss of a step raise an error, inside the forward passes."""

    def arm(step: int, error: type[BaseException]) -> None:
        loss, calls = train_command._loss, iter(range(10**6))

        def failing(model: Any, ids: torch.Tensor) -> torch.Tensor:
            value = loss(model, ids)
            if next(calls) == 2 * step + 1:  # the first step calls it once more
                raise error("stopped by the test")
            return value

        monkeypatch.setattr(train_command, "_loss", failing)

    return arm


@pytest.mark.parametrize("device", ["cpu", "simulated"])
def test_an_interrupted_run_says_what_it_leaves(
    device: str,
    train: Callable[..., int],
    stop_at_step: Callable[[int, type[BaseException]], None],
    capsys: Capture,
    tmp_path: Path,
) -> None:
    stop_at_step(2, KeyboardInterrupt)
    assert train("--eval-every", "1", "--device", device) == 130
    said = capsys.readouterr().err
    assert "Traceback" not in said
    assert said.splitlines()[-1] == (
        f"zo2ext train: interrupted after 2 steps; all are in {tmp_path / 'run' / 'journal.zo2'}, "
        "and the same command continues"
    )
    left = {"loss.csv", "loss.png", "timeline.json", "timeline.png"}
    assert names(tmp_path / "run") == FILES - left
    assert len(read_steps(tmp_path / "run").rows) == 2


def test_an_early_interruption_leaves_nothing(
    train: Callable[..., int],
    stop_at_step: Callable[[int, type[BaseException]], None],
    capsys: Capture,
    tmp_path: Path,
) -> None:
    stop_at_step(0, KeyboardInterrupt)
    assert train() == 130
    assert capsys.readouterr().err.endswith("interrupted after 0 steps; nothing is left\n")
    assert not (tmp_path / "run").exists()


def test_running_out_of_memory_at_once_leaves_nothing(
    train: Callable[..., int],
    stop_at_step: Callable[[int, type[BaseException]], None],
    capsys: Capture,
    tmp_path: Path,
) -> None:
    stop_at_step(0, torch.OutOfMemoryError)
    assert train() == 1
    said = capsys.readouterr().err
    assert "Traceback" not in said
    assert "zo2ext train: error: the device's memory is too small." in said
    assert "granularity='module'" in said
    assert not (tmp_path / "run").exists()


@pytest.fixture
def small_files_only() -> Iterator[None]:
    """Files of more than 200 kB cannot be written, as on a disk that is full."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, limits[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)


@pytest.mark.usefixtures("small_files_only")
def test_a_full_disk_leaves_no_half_of_a_checkpoint(
    train: Callable[..., int], capsys: Capture, tmp_path: Path
) -> None:
    assert train() == 1
    said = capsys.readouterr().err
    assert "Traceback" not in said
    assert "zo2ext train: error: cannot write weights to" in said
    assert names(tmp_path / "run") == FILES


@pytest.mark.parametrize("error", [OSError(28, "no space", "a file"), KeyboardInterrupt()])
def test_a_save_that_breaks_off_leaves_no_checkpoint(
    error: BaseException,
    train: Callable[..., int],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    write = checkpoint._save_by_groups

    def break_off(model: Any, folder: Path, *rest: Any) -> None:
        write(model, folder, *rest)
        assert names(folder) >= {"model.safetensors", "config.json"}
        raise error

    monkeypatch.setattr(checkpoint, "_save_by_groups", break_off)
    assert train() in (1, 130)
    assert names(tmp_path / "run") == FILES


def test_the_engine_is_closed_when_a_run_fails(
    train: Callable[..., int],
    stop_at_step: Callable[[int, type[BaseException]], None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    closed: list[ZOEngine] = []
    close = ZOEngine.close

    def note(zo: ZOEngine, **how: bool) -> None:
        close(zo, **how)
        closed.append(zo)

    monkeypatch.setattr(ZOEngine, "close", note)
    stop_at_step(1, ValueError)
    with pytest.raises(ValueError, match="stopped by the test"):
        train()
    assert len(closed) == 1


@pytest.mark.parametrize("write_back", ["1", "never"])
def test_weights_on_a_disk_come_to_the_same_bits(
    write_back: str, train: Callable[..., int], tmp_path: Path
) -> None:
    for store in ("host", "disk"):
        out = tmp_path / store
        assert train(store=store, host_memory="1GiB", write_back=write_back, out=out) == 0
    assert weights(tmp_path / "host") == weights(tmp_path / "disk")
