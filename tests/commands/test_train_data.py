"""``zo2ext train --data`` and ``zo2ext eval --data`` from a user's side."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from zo2ext.commands import main as cli
from zo2ext.demo import corpus
from zo2ext.runs.log import read_evaluations

Capture = pytest.CaptureFixture[str]
Train = Callable[..., Path]
CHAT = (
    "{% for m in messages %}<s>{{ m.role }} {{ m.content }} .{% endfor %}"
    "{% if add_generation_prompt %}<s>assistant{% endif %}"
)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep the copies that ``datasets`` makes in a folder that is deleted."""
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Reviews, each with a question and its answer."""
    rows = [
        {
            "prompt": f"{row.text} {corpus.QUESTION}",
            "completion": f" {corpus.ANSWERS[row.mood]} .",
            "mood": row.mood,
        }
        for row in corpus.reviews(60, seed=5, part="all")
    ]
    return write(tmp_path / "reviews.jsonl", rows)


@pytest.fixture
def train(model_folder: Path, data: Path, tmp_path: Path) -> Train:
    """Return a function that trains with small steps and returns the run's folder."""

    def run(*words: str, name: str = "run") -> Path:
        out = tmp_path / name
        paths = [f"--model={model_folder}", f"--data={data}", f"--out={out}"]
        small = ["--batch-size=4", "--lr=3e-4", "--device=cpu"]
        assert cli.main(["train", *paths, *small, *words]) == 0
        return out

    return run


def write(path: Path, rows: list[dict[str, object]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def scores(run: Path) -> list[tuple[int, float]]:
    return [(int(step), float(value)) for step, _, value in read_evaluations(run).rows]


def weights(run: Path) -> bytes:
    return (run / "final" / "model.safetensors").read_bytes()


def evaluate(capsys: Capture, *words: str) -> dict[str, float]:
    capsys.readouterr()
    assert cli.main(["eval", *words, "--device=cpu", "--json"]) == 0
    found: dict[str, float] = json.loads(capsys.readouterr().out)
    return found


def test_a_run_lowers_the_loss_of_its_answers(train: Train, data: Path, capsys: Capture) -> None:
    run = train("--steps=40", "--eval-every=20")
    said = capsys.readouterr().out
    assert "reviews.jsonl', split 'train': 54 rows, " in said
    assert ", 162 of them count\n" in said, "three tokens per answer"
    assert "the last 6 rows of data " in said
    assert "would you recommend it?>>" in said
    (_, first), (_, middle), (steps, last) = scores(run)
    assert steps == 40
    assert last < middle < first
    assert last < 0.97 * first
    there = evaluate(capsys, f"--model={run / 'final'}", f"--data={data}", "--split=train[90%:]")
    assert there["loss"] == pytest.approx(last, rel=1e-6)
    assert there["perplexity"] == pytest.approx(math.exp(last), rel=1e-6)
    assert (there["rows"], there["tokens"]) == (6, 18)


def test_a_run_that_continues_is_the_same_run(train: Train) -> None:
    options = ["--eval-every=4", "--micro-batch=2", "--directions=2"]
    whole = train("--steps=8", *options, name="whole")
    train("--steps=4", *options, name="part")
    part = train("--steps=8", *options, name="part")
    assert (part / "journal.zo2").read_bytes() == (whole / "journal.zo2").read_bytes()
    assert weights(part) == weights(whole)
    assert scores(part) == scores(whole)
    settings = json.loads((whole / "arguments.json").read_text())
    assert settings["seq_len"] == 512, "the model's maximum"
    again = whole.with_name("again")
    assert cli.main(["train", f"--config={whole / 'arguments.json'}", f"--out={again}"]) == 0
    assert weights(again) == weights(whole)


def test_other_rows_are_another_run(train: Train, data: Path, capsys: Capture) -> None:
    train("--steps=1")
    lines = data.read_text().splitlines(keepends=True)
    lines[3] = lines[3].replace(" .", " , .")
    data.write_text("".join(lines))
    capsys.readouterr()
    with pytest.raises(AssertionError):
        train("--steps=2")
    assert "run.rows was '54 rows, " in capsys.readouterr().err


def test_micro_batches_are_weighted_by_the_tokens_that_count(
    train: Train, data: Path, tmp_path: Path
) -> None:
    rows = [json.loads(line) for line in data.read_text().splitlines()]
    for i, row in enumerate(rows):
        row["completion"] *= 1 + i % 3
    write(data, rows)

    def first_loss(*words: str, name: str) -> float:
        run = train("--steps=1", "--storage=bf16", *words, name=name)
        return float((run / "steps.csv").read_text().splitlines()[1].split(",")[1])

    whole = first_loss(name="whole")
    assert first_loss("--micro-batch=1", name="single") == pytest.approx(whole, rel=1e-5)


def test_windows_splits_and_another_file(
    train: Train, data: Path, tmp_path: Path, capsys: Capture
) -> None:
    other = write(tmp_path / "other.jsonl", [{"prompt": "it", "completion": " yes ."}] * 3)
    train("--steps=1", "--packing", "--seq-len=64", f"--validation={other}", "--split=train[:30]")
    said = capsys.readouterr().out
    assert "split 'train[:30]': " in said
    assert " windows, " in said
    assert "other.jsonl', split 'train': 3 rows, 15 tokens, 9 of them count; 3 to ev" in said
    train("--steps=1", "--split=train[:9]", "--validation-split=train[9:11]", name="b")
    assert "split 'train[9:11]': 2 rows" in capsys.readouterr().out


def test_a_missing_validation_is_named_as_such(
    train: Train, tmp_path: Path, capsys: Capture
) -> None:
    with pytest.raises(AssertionError):
        train("--validation=missing.jsonl")
    assert "validation is 'missing.jsonl', which is neither" in capsys.readouterr().err


def test_chats_are_trained_on_with_the_template_of_the_model(
    model_folder: Path, tmp_path: Path, capsys: Capture
) -> None:
    model = tmp_path / "chat"
    shutil.copytree(model_folder, model)
    turns = [
        {"role": "user", "content": "would you"},
        {"role": "assistant", "content": "yes"},
    ]
    data = write(tmp_path / "chats.jsonl", [{"talk": turns * n} for n in (1, 2, 1)])
    words = [f"--data={data}", "--messages-column=talk", "--device=cpu"]
    out = f"--out={tmp_path / 'run'}"
    assert cli.main(["train", *words, f"--model={model}", out, "--steps=1"]) == 1
    assert "the model's tokenizer has no chat template" in capsys.readouterr().err
    (model / "chat_template.jinja").write_text(CHAT)
    assert cli.main(["train", *words, f"--model={model}", out, "--steps=1"]) == 0
    said = capsys.readouterr().out
    assert "2 rows, 27 tokens, 6 of them count" in said
    assert ">>yes.<<" in said.replace(" ", "")
    found = evaluate(capsys, *words, f"--model={model}", "--train-on-prompt", "--eval-rows=1")
    assert (found["rows"], found["tokens"]) == (1, 8)


def test_the_loss_of_rows_that_are_cut_and_left_out(
    model_folder: Path, data: Path, capsys: Capture
) -> None:
    words = [f"--model={model_folder}", f"--data={data}"]
    everything = evaluate(capsys, *words)
    assert (everything["rows"], everything["truncated"], everything["left_out"]) == (60, 0, 0)
    streamed = evaluate(capsys, *words, "--batch-size=7", "--device=simulated")
    assert streamed["loss"] == pytest.approx(everything["loss"], rel=1e-5)
    short = evaluate(capsys, *words, "--seq-len=20")
    assert short["rows"] + short["left_out"] == 60
    assert short["left_out"] > 0
    assert cli.main(["eval", *words, "--seq-len=20", "--device=cpu"]) == 0
    said = capsys.readouterr().out
    assert f"note: {short['left_out']} rows without a token to learn from are left out" in said
    assert f"note: {short['truncated']} rows are longer than 20 tokens and lose their end" in said
    assert f"loss {short['loss']:.4f} nats per token, perplexity " in said


@pytest.mark.parametrize(
    ("words", "status", "message"),
    [
        (["--text=t"], 2, "--text and --data exclude each other"),
        (["--seq-len=1"], 1, "seq_len must be at least 2, got 1"),
        (["--seq-len=513"], 1, "seq_len is 513, but model "),
        (["--text-column=a", "--prompt-column=b"], 1, "expected columns of one kind"),
        (["--text-column=a"], 1, "has no column 'a'; its columns are prompt, completion, mood"),
        (["--split=test"], 1, "cannot load data "),
        (["--task=sst2", "--text=t"], 2, "--text and --task exclude each other"),
    ],
)
@pytest.mark.parametrize("command", ["train", "eval"])
def test_wrong_options_are_named(
    command: str,
    words: list[str],
    status: int,
    message: str,
    model_folder: Path,
    data: Path,
    tmp_path: Path,
    capsys: Capture,
) -> None:
    out = [f"--out={tmp_path / 'run'}"] * (command == "train")
    paths = [f"--model={model_folder}", f"--data={data}"]
    assert cli.main([command, *paths, *out, "--device=cpu", *words]) == status
    assert message in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_a_table_given_as_text_is_pointed_to_data(
    model_folder: Path, data: Path, tmp_path: Path, capsys: Capture
) -> None:
    out = f"--out={tmp_path / 'run'}"
    assert cli.main(["train", f"--model={model_folder}", f"--text={data}", out]) == 1
    assert "or use its rows with --data in place of --text" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["train", "eval"])
def test_rows_have_options_of_their_own(command: str, capsys: Capture) -> None:
    assert cli.main([command, "--data=a.jsonl", "--help"]) == 0
    said = capsys.readouterr().out
    assert "  --messages-column " in said
    assert "  --text " not in said
    assert said.index("\nrequired:") < said.index("\nrows:") < said.index("\nmemory and speed:")
