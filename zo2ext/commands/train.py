"""``zo2ext train``: fine-tune a causal language model on a text."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch

from zo2ext.checkpoints.pretrained import load_config, load_tokenizer
from zo2ext.commands.arguments import TrainArguments
from zo2ext.commands.learning_rate import with_rate
from zo2ext.commands.run import check_first_loss, checkpoint_of, push, run_folder, train_in
from zo2ext.commands.session import config_of_run, memory_line, open_model, parallel_of
from zo2ext.config import ZOConfig
from zo2ext.engine.engine import ZOEngine
from zo2ext.model.chunked_loss import chunk_loss
from zo2ext.model.compile import compile_blocks
from zo2ext.parallel.micro_batches import (
    Batch,
    describe_ranks,
    printing_on_rank_0,
    slices_to_run,
)
from zo2ext.parallel.parallel import Parallel, reporting_errors
from zo2ext.runs.folder import check_run_folder
from zo2ext.streaming.devices.select import make_device
from zo2ext.tasks.text import held_out_loss, load_text

SCORE = "held_out_loss"


class Corpus(Protocol):
    """Data that ``zo2ext train`` trains a causal language model on.

    Attributes:
        kind: "text" or "rows".
        model_config: Config of the model.
        tokenizer: Tokenizer of the model.
        max_token: Largest token id in the data.
        description: Identification of the data, for the journal.
        settings: Values of options whose default depends on the model.
        facts: Lines on the data, for the user.
        batch_text: Size of a batch, for the user.
    """

    kind: str
    model_config: Any
    tokenizer: Any
    max_token: int
    description: str
    settings: dict[str, Any]
    facts: str
    batch_text: str

    def batch(self, zo: ZOEngine, model: Any, step: int) -> Batch:
        """Return this process's share of the batch of `step`."""

    def held_out_loss(self, zo: ZOEngine, model: Any) -> float:
        """Return the loss on what is held out."""


def train(arguments: TrainArguments) -> None:
    """Run ``zo2ext train``; see `TrainArguments`."""
    train_on(arguments, TextCorpus)


def train_on(arguments: Any, read: Callable[[Any], Corpus]) -> None:
    """Train on the data that `read` returns for the options."""
    parallel = parallel_of(arguments)
    with printing_on_rank_0(parallel), reporting_errors(parallel):
        arguments.check()
        config = config_of_run(arguments)
        make_device(config.device)
        check_run_folder(Path(arguments.out), "out")
        _train(arguments, config, parallel, read(arguments))


def _train(arguments: Any, config: ZOConfig, parallel: Parallel | None, corpus: Corpus) -> None:
    checkpoint = checkpoint_of(arguments)
    source = arguments.model if checkpoint is None else str(checkpoint)

    @contextmanager
    def opened(config: ZOConfig) -> Iterator[tuple[Any, ZOEngine]]:
        with open_model(
            source, corpus.model_config, config, max_token=corpus.max_token, parallel=parallel
        ) as (model, zo):
            chunk_loss(model)
            yield model, zo

    config, curve = with_rate(config, arguments, opened, corpus.batch, parallel)
    with opened(config) as (model, zo):
        if arguments.compile:
            compile_blocks(model)
        _describe(zo, corpus, arguments)
        with run_folder(
            zo,
            arguments,
            settings=corpus.settings,
            data={corpus.kind: corpus.description},
            curve=curve,
            watched=(SCORE,),
            ending={},
            checkpoint=checkpoint,
        ) as run:
            if run.finished:
                return
            evaluate = partial(_held_out, zo, model, corpus, arguments)
            scores = train_in(
                run, model, arguments, partial(corpus.batch, zo, model), evaluate, checkpoint
            )
            (_, first), (steps, last) = scores[0], scores[-1]
            print(f"{run.score} {first:.4f} -> {last:.4f} after {steps} steps")
            run.finish(corpus.tokenizer, {SCORE: {"before": first, "after": last}}, scores)
            push(run, arguments.push_to_hub)


def _held_out(zo: ZOEngine, model: Any, corpus: Corpus, arguments: Any) -> dict[str, float]:
    loss = corpus.held_out_loss(zo, model)
    if zo.steps == 0:
        check_first_loss(arguments.model, loss, f" on the held-out {corpus.kind}")
    return {SCORE: loss}


def _describe(zo: ZOEngine, corpus: Corpus, arguments: Any) -> None:
    print(
        f"model   {arguments.model}: {zo.trainable:,} weights to train, in "
        f"{len(zo.layouts)} units\n"
        f"{memory_line(zo)}\n"
        f"{corpus.facts}\n"
        f"run     {arguments.steps} steps of {corpus.batch_text}, lr {zo.config.lr:.3g}, "
        f"eps {zo.config.eps:g}, seed {zo.config.seed}{describe_ranks(zo.parallel)}",
        flush=True,
    )


class TextCorpus:
    """Windows of a text; a `Corpus`."""

    kind = "text"

    def __init__(self, arguments: TrainArguments) -> None:
        a = self._arguments = arguments
        self.settings: dict[str, Any] = {}
        self.model_config = load_config(a.model, max_length=a.seq_len)
        tokenizer = self.tokenizer = load_tokenizer(a.model)
        data = self._data = load_text(
            Path(a.text),
            lambda text: tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"],
            seq_len=a.seq_len,
            validation=None if a.validation is None else Path(a.validation),
        )
        self.max_token, self.description = data.max_token, data.description
        windows = min(a.eval_windows, data.held_out_windows)
        self.facts = (
            f"text    {len(data.train):,} tokens to train on, {len(data.held_out):,} held out "
            f"({windows} windows to evaluate on)"
        )
        self.batch_text = f"{a.batch_size} x {a.seq_len} tokens"

    def batch(self, zo: ZOEngine, model: Any, step: int) -> Batch:
        """Return this process's share of the windows of `step`."""
        a = self._arguments
        ids = self._data.batch(step, batch_size=a.batch_size, seed=zo.config.seed)
        slices, factor = slices_to_run(len(ids), a.micro_batch, zo.parallel)
        parts = [ids[rows] for rows in slices]
        losses = [partial(_loss, model, part.to(zo.device)) for part in parts]
        return Batch(losses, [factor * part.numel() for part in parts], ids.numel())

    def held_out_loss(self, zo: ZOEngine, model: Any) -> float:
        """Return the loss on the held-out windows."""
        a = self._arguments
        return held_out_loss(
            model,
            self._data,
            batch_size=a.batch_size,
            windows=a.eval_windows,
            device=zo.device,
        )


def _loss(model: Any, ids: torch.Tensor) -> torch.Tensor:
    loss: torch.Tensor = model(input_ids=ids, labels=ids, use_cache=False).loss
    return loss
