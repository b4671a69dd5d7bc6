"""``zo2ext demo``: fine-tune the packaged model on the task reviews, offline."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from zo2ext.commands.arguments import DemoArguments, Keep, TrainTaskArguments
from zo2ext.commands.task import Results, train_task
from zo2ext.demo import corpus
from zo2ext.demo.task import MODEL_DIR, REVIEWS, rows
from zo2ext.runs.folder import FINAL
from zo2ext.tasks.encoding import Encoder
from zo2ext.tasks.questions import LONGEST
from zo2ext.tasks.scoring import Answerer

SHOWN = 4  # reviews whose answers are printed


def demo(arguments: DemoArguments) -> Results | None:
    """Run ``zo2ext demo``; see `DemoArguments`.

    Returns:
        The printed metrics; None if the run was finished already.
    """
    print(f"The question: {corpus.QUESTION!r} Random answers are correct for half of the reviews.")
    with _one_thread():
        results = train_task(
            TrainTaskArguments(
                **{
                    **vars(arguments),
                    "model": str(MODEL_DIR),
                    "task": REVIEWS.name,
                    "lr": 5e-4,
                    "lr_scheduler_type": "linear",
                    "batch_size": 32,
                    "eval_every": max(1, arguments.steps // 20),
                    "eval_batch_size": 512,
                    "keep": Keep.LAST,
                }
            )
        )
    _show_answers(Path(arguments.out) / FINAL)
    print(f"\nsee the run: zo2ext report {arguments.out}")
    return results


@torch.no_grad()
def _show_answers(folder: Path) -> None:
    """Print the fine-tuned model's answers to the first test reviews, with their probabilities."""
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    encoder = Encoder(tokenizer, REVIEWS, LONGEST)
    answerer = Answerer(model, tokenizer, REVIEWS, model.device)
    print()
    for row in rows()["test"][:SHOWN]:
        example = REVIEWS.example(row)
        scores = torch.cat(answerer.log_likelihoods(encoder.encode(example).candidates))
        best = int(scores.argmax())
        sure = scores.softmax(0)[best].item()
        print(f"  {example.prompt}{example.candidates[best]} ({sure:.0%} sure)")


@contextmanager
def _one_thread() -> Iterator[None]:
    """Use one thread: matrices this small do not gain from a second one."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
