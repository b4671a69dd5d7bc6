"""Test data that is made from the package: its model, its text, and tasks in their raw formats."""

from __future__ import annotations

import itertools
import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

from zo2ext.demo import corpus
from zo2ext.demo.task import MODEL_DIR

POSITIONS = 512  # prompts of tasks are longer than the 128 tokens of the packaged model


def write_model(folder: Path) -> Path:
    """Copy the packaged model, for longer prompts and with punctuation that follows words directly.

    Rotary embeddings allow for any number of positions.
    """
    shutil.copytree(MODEL_DIR, folder)
    for name, key in (
        ("config.json", "max_position_embeddings"),
        ("tokenizer_config.json", "model_max_length"),
    ):
        settings = json.loads((folder / name).read_text())
        (folder / name).write_text(json.dumps(settings | {key: POSITIONS}))
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    tokenizer["decoder"] = {"type": "WordPiece", "prefix": "##", "cleanup": True}
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    return folder


def write_text(path: Path, paragraphs: int = 100) -> Path:
    """Write text of which the packaged tokenizer knows every word, about 45 per paragraph."""
    path.write_text("\n".join(corpus.paragraphs(paragraphs, seed=3)) + "\n")
    return path


def write_reviews(path: Path, count: int = 300) -> Path:
    """Write reviews, each followed by a question and an answer, which the model has never seen."""
    rows = corpus.reviews(count, seed=5, part="all")
    lines = [f"{row.text} {corpus.QUESTION} {corpus.ANSWERS[row.mood]} ." for row in rows]
    _write_lines(path, lines)
    return path


def write_tasks(folder: Path) -> Path:
    """Write SST-2, TREC, RTE and CB, each in a folder of its own, as they are distributed."""
    for task in ("sst2", "trec", "rte", "cb"):
        (folder / task).mkdir(parents=True)
    for name, count in (("train", 200), ("dev", 60), ("test", 60)):
        rows = corpus.reviews(count, seed=count + len(name), part="all")
        lines = [f"{int(row.mood == 'good')} {row.text}" for row in rows]
        _write_lines(folder / "sst2" / f"{name}.txt", lines)
    kinds = ["DESC:manner", "ENTY:cremat", "ABBR:exp", "HUM:ind", "NUM:count", "LOC:other"]
    for name, count in (("train", 200), ("test", 60)):
        found = itertools.islice(_questions(seed=count), count)
        _write_lines(
            folder / "trec" / f"{name}.txt",
            [f"{kinds[i % len(kinds)]} {question}" for i, question in enumerate(found)],
        )
    for task, labels, counts in (
        ("rte", ["entailment", "not_entailment"], {"train": 200, "val": 60}),
        ("cb", ["entailment", "contradiction", "neutral"], {"train": 250, "val": 56}),
    ):
        for name, count in counts.items():
            pairs = zip(corpus.paragraphs(count, seed=count), _questions(seed=1), strict=False)
            lines = [
                json.dumps({"premise": text, "hypothesis": claim, "label": labels[i % len(labels)]})
                for i, (text, claim) in enumerate(pairs)
            ]
            _write_lines(folder / task / f"{name}.jsonl", lines)
    return folder


def _questions(seed: int) -> Iterator[str]:
    """Yield different questions from the corpus, each ending in " ?"."""
    seen: set[str] = set()
    for text in corpus.paragraphs(10**6, seed):
        for question in re.findall(r"(?:^|[.?] )([^.?]+ \?)", text):
            if question not in seen:
                seen.add(question)
                yield question


def _write_lines(path: Path, lines: list[str]) -> None:
    path.write_text("".join(f"{line}\n" for line in lines))
