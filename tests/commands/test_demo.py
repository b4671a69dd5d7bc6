"""The demo: what ships is small and untaught, and it learns."""

from __future__ import annotations

import json
import re
import runpy
import sys
from collections import Counter
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from zo2ext.commands.main import main
from zo2ext.demo import corpus
from zo2ext.demo.task import MODEL_DIR, REVIEWS, rows
from zo2ext.runs import plots

MEGABYTE = 10**6
SCRIPTS = Path(__file__).parents[2] / "scripts"


def test_what_ships_is_small() -> None:
    files = list(MODEL_DIR.iterdir())
    assert sum(file.stat().st_size for file in files) < 2 * MEGABYTE
    assert not [file for file in files if file.suffix in (".bin", ".pt", ".pkl")]


def test_the_model_has_never_seen_the_question() -> None:
    text = list(corpus.paragraphs(2000, corpus.SEED))
    assert not [paragraph for paragraph in text if corpus.QUESTION in paragraph]


def test_in_what_it_read_yes_and_no_have_no_mood() -> None:
    said: Counter[tuple[str, str]] = Counter()
    for paragraph in corpus.paragraphs(5000, corpus.SEED):
        words = paragraph.split()
        for how, answer in pairwise(words):
            for mood in corpus.MOODS:
                if answer in ("yes", "no") and how in corpus.MOOD_WORDS[mood]["luckily"]:
                    said[mood, answer] += 1
    for mood in corpus.MOODS:
        yes, no = said[mood, "yes"], said[mood, "no"]
        assert yes + no > 500
        assert 0.6 < yes / (yes + no) < 0.73


def test_every_word_is_a_token() -> None:
    tokenizer = AutoTokenizer.from_pretrained(MODEL_DIR, local_files_only=True)
    unknown = tokenizer.unk_token_id
    texts = [REVIEWS.example(row).prompt for split in rows().values() for row in split]
    texts += corpus.paragraphs(500, 1)
    assert not [text for text in texts if unknown in tokenizer(text)["input_ids"]]
    assert set(corpus.vocabulary()) <= set(tokenizer.get_vocab())


def test_the_corpus_is_the_same_every_time() -> None:
    assert list(corpus.paragraphs(50, 3)) == list(corpus.paragraphs(50, 3))
    assert rows() == rows()


def test_splits_share_no_review_and_test_has_words_of_its_own() -> None:
    texts = {split: {row["text"] for row in found} for split, found in rows().items()}
    assert len(texts["train"]) == 1280
    assert len(texts["test"]) == 512
    assert not texts["train"] & texts["test"]
    assert Counter(row["mood"] for row in rows()["test"]) == {"good": 256, "bad": 256}
    moody = {
        split: {word for text in found for word in text.split()}
        & {
            word
            for mood in corpus.MOODS
            for slot in corpus.mood_words(mood).values()
            for word in slot
        }
        for split, found in texts.items()
    }
    assert moody["test"]
    assert not moody["test"] & moody["train"]


def test_accuracy_rises_from_chance_to_nine_in_ten(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    threads, out = torch.get_num_threads(), tmp_path / "run"
    words = ["demo", f"--out={out}", "--steps=160", "--seed=1", "--device=cpu"]
    assert main(words) == 0
    assert torch.get_num_threads() == threads
    results = dict(json.loads((out / "results.json").read_text())["results"])
    before, after = (row["test"]["accuracy"] for row in results.values())
    assert 0.4 <= before <= 0.6
    assert after > 0.9
    assert (out / "loss.png").read_bytes().startswith(b"\x89PNG")
    said = capsys.readouterr().out
    assert f"{after:.1%}" in said
    assert len(re.findall(r"would you recommend it \? (yes|no) \(\d+% sure\)", said)) == 4
    assert main(words) == 0
    assert "finished already: 160 steps" in capsys.readouterr().out


def test_without_matplotlib_the_numbers_are_left(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plots, "available", lambda: False)
    assert main(["demo", f"--out={tmp_path / 'run'}", "--steps=2", "--device=cpu"]) == 0
    names = {path.name for path in (tmp_path / "run").iterdir()}
    assert names >= {"loss.csv", "steps.csv", "evaluations.csv"}
    assert "loss.png" not in names
    assert plots.HOW_TO_GET in capsys.readouterr().out


def run_script(monkeypatch: pytest.MonkeyPatch, name: str, *words: str) -> None:
    monkeypatch.setattr(sys, "argv", [name, *words])
    runpy.run_path(str(SCRIPTS / name), run_name="__main__")


def test_the_model_can_be_made_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    size = "--paragraphs 200 --steps 2 --batch-size 4 --threads".split()
    threads = str(torch.get_num_threads())
    run_script(monkeypatch, "pretrain_demo_model.py", "--out", str(tmp_path), *size, threads)
    made = AutoModelForCausalLM.from_pretrained(tmp_path)
    shipped = AutoModelForCausalLM.from_pretrained(MODEL_DIR)
    assert {n: p.shape for n, p in made.named_parameters()} == {
        n: p.shape for n, p in shipped.named_parameters()
    }
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(
        path.name for path in MODEL_DIR.iterdir()
    )
    for folder in (tmp_path, MODEL_DIR):
        tokens = json.loads((folder / "tokenizer.json").read_text())["model"]["vocab"]
        assert list(tokens) == [*("<pad>", "<s>", "<unk>"), *corpus.vocabulary()]


def test_the_text_can_be_made_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "text"
    run_script(monkeypatch, "make_demo_corpus.py", str(out), "--paragraphs", "9")
    assert out.read_text().splitlines() == list(corpus.paragraphs(9, corpus.SEED))


def test_the_command_refuses_what_it_cannot_do(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["demo", "--steps", "0", "--out", str(tmp_path / "new")]) == 1
    assert "steps must be at least 1, got 0" in capsys.readouterr().err
    assert not (tmp_path / "new").exists()
    (tmp_path / "kept").write_text("something")
    assert main(["demo", "--out", str(tmp_path)]) == 1
    assert "not empty" in capsys.readouterr().err
