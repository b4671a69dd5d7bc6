"""``zo2ext demo``: a tiny language model learns a task by forward passes alone, offline.

The model ships in the package. It was pretrained on text from `corpus` by
``scripts/pretrain_demo_model.py`` and has never seen the question that it learns to answer here.
"""

from __future__ import annotations

import csv
import io
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from tqdm import tqdm

from zo2ext._files import check_new_folder, write_atomically
from zo2ext.config import ZOConfig
from zo2ext.demo import corpus, task
from zo2ext.engine.offload import offload
from zo2ext.runs import plots

LR, EPS, BATCH_SIZE = 5e-4, 1e-3, 32
SHOWN = 4  # reviews whose answers are printed


@dataclass(frozen=True)
class Outcome:
    """Accuracies, from 0 to 1. `before` and `after` on the test reviews, `curve` on dev."""

    before: float
    after: float
    curve: list[tuple[int, float]]  # (steps done, accuracy)
    losses: list[float]  # of each step


def run(out: Path, *, steps: int = 400, seed: int = 0, device: str | None = None) -> Outcome:
    """Fine-tune the package's model on the recommendation task and write what happened to `out`.

    Args:
        out: New or empty folder.
        steps: To train; the learning rate falls linearly to zero over them.
        seed: Of batches and directions.
        device: Where the model runs; None takes CUDA where there is one.

    Raises:
        ValueError: `steps` is below 1, or `out` is not empty.
        OSError: `out` cannot be written.
    """
    if steps < 1:
        raise ValueError(f"steps must be at least 1, got {steps}")
    config = ZOConfig(lr=LR, eps=EPS, seed=seed, device=device)
    check_new_folder(out, "out")
    start = time.perf_counter()
    model, tokenizer = task.load_model_and_tokenizer()
    train, dev, test = (task.examples(split, tokenizer) for split in ("train", "dev", "test"))
    batches = task.batches(train, BATCH_SIZE, seed)
    every = max(1, steps // 30)
    curve, losses = [], []
    with _one_thread(), offload(model, config) as zo:
        model_accuracy = task.Judge(model, tokenizer, zo.device)
        before, first = model_accuracy(test), model_accuracy.margins(test[:SHOWN])
        print(
            f"{sum(p.numel() for p in model.parameters()):,} weights in {len(zo.layouts)} units on "
            f"{zo.device}; {len(train)} reviews to learn from. The question: {corpus.QUESTION!r}\n"
            f"Before: {before:.1%} of {len(test)} test reviews are judged right; a coin gets 50%."
        )
        with tqdm(total=steps, unit="step", dynamic_ncols=True) as bar:
            for step in range(steps):
                if step % every == 0:
                    curve.append((step, model_accuracy(dev)))
                batch = {name: value.to(zo.device) for name, value in next(batches).items()}
                loss = task.loss_closure(model, batch)
                losses.append(zo.step(loss, lr=LR * (1 - step / steps)))
                bar.set_postfix_str(f"loss {losses[-1]:.3f}, dev accuracy {curve[-1][1]:.1%}")
                bar.update()
        curve.append((steps, model_accuracy(dev)))
        after, last = model_accuracy(test), model_accuracy.margins(test[:SHOWN])
    outcome = Outcome(before, after, curve, losses)
    _write(out, outcome)
    print(
        f"After {steps} steps, {time.perf_counter() - start:.0f} s: {after:.1%} are judged right.\n"
    )
    for example, old, new in zip(test, first.tolist(), last.tolist(), strict=False):
        print(f"  {example.review.text}\n    {_answer(old)} -> {_answer(new)}")
    print(f"\ncurve: {out / 'accuracy.csv'}", end="")
    print(f", {out / 'accuracy.png'}" if plots.available() else f" ({plots.HOW_TO_GET})")
    return outcome


@contextmanager
def _one_thread() -> Iterator[None]:
    """Products this small gain nothing from a second thread, and wait for one that is late."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _answer(margin: float) -> str:
    """What the model answers, and how sure it is."""
    sure = torch.tensor(abs(margin)).sigmoid().item()
    return f"{corpus.ANSWERS['good' if margin > 0 else 'bad']} ({sure:.0%} sure)"


def _write(out: Path, outcome: Outcome) -> None:
    out.mkdir(parents=True, exist_ok=True)
    table = io.StringIO()
    writer = csv.writer(table)
    writer.writerow(["step", "loss", "dev_accuracy"])
    accuracies = dict(outcome.curve)
    for step in range(len(outcome.losses) + 1):
        loss = outcome.losses[step] if step < len(outcome.losses) else ""
        writer.writerow([step, loss, accuracies.get(step, "")])
    write_atomically(out / "accuracy.csv", table.getvalue().encode())
    if plots.available():
        write_atomically(out / "accuracy.png", _picture(outcome))


def _picture(outcome: Outcome) -> bytes:
    canvas, axes = plots.figure()
    steps, accuracies = zip(*outcome.curve, strict=True)
    axes.plot(steps, accuracies, "o-", color="C1", lw=2, label="dev reviews")
    axes.axhline(0.5, color="0.5", lw=1, ls="--", label="a coin")
    axes.plot(steps[-1], outcome.after, "*", color="C2", ms=14, label="test reviews, unseen words")
    axes.set(xlabel="step", ylabel="accuracy", ylim=(0.4, 1.02))
    axes.set_title("A tiny language model learns a task by forward passes alone")
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
    axes.legend(frameon=False, loc="lower right")
    return plots.png(canvas)
