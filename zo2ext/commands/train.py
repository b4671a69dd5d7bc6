"""``zo2ext train``: fine-tune a causal language model on a text."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

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
from zo2ext.tasks.text import TextData, held_out_loss, load_text

SCORE = "held_out_loss"


def train(arguments: TrainArguments) -> None:
    """Run ``zo2ext train``; see `TrainArguments`."""
    parallel = parallel_of(arguments)
    with printing_on_rank_0(parallel), reporting_errors(parallel):
        arguments.check()
        config = config_of_run(arguments)
        make_device(config.device)
        check_run_folder(Path(arguments.out), "out")
        _train(arguments, config, parallel)


def _train(arguments: TrainArguments, config: ZOConfig, parallel: Parallel | None) -> None:
    model_config = load_config(arguments.model, max_length=arguments.seq_len)
    tokenizer = load_tokenizer(arguments.model)
    data = load_text(
        Path(arguments.text),
        lambda text: tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"],
        seq_len=arguments.seq_len,
        validation=None if arguments.validation is None else Path(arguments.validation),
    )
    checkpoint = checkpoint_of(arguments)
    source = arguments.model if checkpoint is None else str(checkpoint)

    @contextmanager
    def opened(config: ZOConfig) -> Iterator[tuple[Any, ZOEngine]]:
        with open_model(
            source, model_config, config, max_token=data.max_token, parallel=parallel
        ) as (model, zo):
            chunk_loss(model)
            yield model, zo

    batch = partial(_batch, data, arguments)
    config, curve = with_rate(config, arguments, opened, batch, parallel)
    with opened(config) as (model, zo):
        if arguments.compile:
            compile_blocks(model)
        _describe(zo, data, arguments)
        with run_folder(
            zo,
            arguments,
            settings={},
            data={"text": data.description},
            curve=curve,
            watched=(SCORE,),
            ending={},
            checkpoint=checkpoint,
        ) as run:
            if run.finished:
                return
            evaluate = partial(_held_out, zo, model, data, arguments)
            scores = train_in(
                run, model, arguments, partial(batch, zo, model), evaluate, checkpoint
            )
            (_, first), (steps, last) = scores[0], scores[-1]
            print(f"{run.score} {first:.4f} -> {last:.4f} after {steps} steps")
            run.finish(tokenizer, {SCORE: {"before": first, "after": last}}, scores)
            push(run, arguments.push_to_hub)


def _batch(data: TextData, arguments: TrainArguments, zo: ZOEngine, model: Any, step: int) -> Batch:
    ids = data.batch(step, batch_size=arguments.batch_size, seed=zo.config.seed)
    slices, factor = slices_to_run(len(ids), arguments.micro_batch, zo.parallel)
    parts = [ids[rows] for rows in slices]
    losses = [partial(_loss, model, part.to(zo.device)) for part in parts]
    return Batch(losses, [factor * part.numel() for part in parts], ids.numel())


def _loss(model: Any, ids: torch.Tensor) -> torch.Tensor:
    loss: torch.Tensor = model(input_ids=ids, labels=ids, use_cache=False).loss
    return loss


def _held_out(
    zo: ZOEngine, model: Any, data: TextData, arguments: TrainArguments
) -> dict[str, float]:
    loss = held_out_loss(
        model,
        data,
        batch_size=arguments.batch_size,
        windows=arguments.eval_windows,
        device=zo.device,
    )
    if zo.steps == 0:
        check_first_loss(arguments.model, loss, " on the held-out text")
    return {SCORE: loss}


def _describe(zo: ZOEngine, data: TextData, arguments: TrainArguments) -> None:
    a, windows = arguments, min(arguments.eval_windows, data.held_out_windows)
    print(
        f"model   {a.model}: {zo.trainable:,} weights to train, in {len(zo.layouts)} units\n"
        f"{memory_line(zo)}\n"
        f"text    {len(data.train):,} tokens to train on, {len(data.held_out):,} held out "
        f"({windows} windows to evaluate on)\n"
        f"run     {a.steps} steps of {a.batch_size} x {a.seq_len} tokens, lr {zo.config.lr:.3g}, "
        f"eps {zo.config.eps:g}, seed {zo.config.seed}{describe_ranks(zo.parallel)}",
        flush=True,
    )
