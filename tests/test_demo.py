"""The demo: what ships is small and untaught, and it learns."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest
import torch

from zo2ext.cli import main
from zo2ext.demo import corpus, run, task

MEGABYTE = 10**6


def test_what_ships_is_small() -> None:
    files = list(task.MODEL_DIR.iterdir())
    assert sum(file.stat().st_size for file in files) < 2 * MEGABYTE
    assert not [file for file in files if file.suffix in (".bin", ".pt", ".pkl")]


def test_the_model_has_never_seen_the_question() -> None:
    text = list(corpus.paragraphs(2000, corpus.SEED))
    assert not [paragraph for paragraph in text if corpus.QUESTION in paragraph]


def test_the_corpus_is_the_same_every_time() -> None:
    assert list(corpus.paragraphs(50, 3)) == list(corpus.paragraphs(50, 3))
    assert task.reviews("dev") == task.reviews("dev")


def test_splits_share_no_review_and_test_has_words_of_its_own() -> None:
    texts = {split: {review.text for review in task.reviews(split)} for split in task.SIZES}
    assert not texts["train"] & texts["dev"]
    assert not (texts["train"] | texts["dev"]) & texts["test"]
    for split, count in task.SIZES.items():
        moods = [review.mood for review in task.reviews(split)]
        assert len(moods) == count
        assert 0.4 < moods.count("good") / count < 0.6


def test_labels_stand_at_the_answer_alone() -> None:
    _, tokenizer = task.load_model_and_tokenizer()
    examples = task.examples("dev", tokenizer)[:7]
    batch = task.collate(examples)
    labelled = batch["labels"] != -100
    assert labelled.sum(1).tolist() == [1] * 7
    answers = task.answer_ids(tokenizer)
    expected = [answers[example.review.mood] for example in examples]
    assert batch["labels"][labelled].tolist() == expected


def test_accuracy_rises_from_chance_to_nine_in_ten(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    threads = torch.get_num_threads()
    outcome = run(tmp_path / "run", steps=160, seed=1, device="cpu")
    assert torch.get_num_threads() == threads
    assert 0.45 <= outcome.before <= 0.6
    assert outcome.after > 0.9
    assert (tmp_path / "run" / "accuracy.png").read_bytes().startswith(b"\x89PNG")
    with (tmp_path / "run" / "accuracy.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [float(row["loss"]) for row in rows[:-1]] == outcome.losses
    printed = capsys.readouterr().out
    assert f"{outcome.after:.1%}" in printed


def test_the_command_refuses_what_it_cannot_do(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["demo", "--steps", "0", "--out", str(tmp_path / "new")]) == 1
    assert "steps must be at least 1, got 0" in capsys.readouterr().err
    assert not (tmp_path / "new").exists()
    (tmp_path / "kept").write_text("something")
    assert main(["demo", "--out", str(tmp_path)]) == 1
    assert "not empty" in capsys.readouterr().err
