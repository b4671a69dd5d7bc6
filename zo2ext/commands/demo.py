"""``zo2ext demo``: a tiny language model learns a task by forward passes alone, offline."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from zo2ext.commands.arguments import DemoArguments, Keep, TrainTaskArguments
from zo2ext.commands.task import Results, train_task
from zo2ext.demo import corpus
from zo2ext.demo.task import MODEL_DIR, REVIEWS
from zo2ext.runs.folder import FINAL


def demo(arguments: DemoArguments) -> Results | None:
    """Run ``zo2ext demo``; see `DemoArguments`.

    Returns:
        The metrics that are printed; None where the run was finished already.

    Raises:
        ValueError: `steps` is below 1, or `out` holds something else.
        OSError: `out` cannot be written.
    """
    print(f"The question: {corpus.QUESTION!r} A coin answers half of the reviews correctly.")
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
    prompt = f"the soup was delightful . {corpus.QUESTION}"
    final = Path(arguments.out) / FINAL
    print(
        "ask it yourself: zo2ext generate --max-new-tokens 1 --model "
        f'{final} --prompt "{prompt}"\n'
        f"see the run: zo2ext report {arguments.out}"
    )
    return results


@contextmanager
def _one_thread() -> Iterator[None]:
    """Run in one thread: products this small gain nothing from a second one, which may be late."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
