"""``zo2ext train``: fine-tune a causal language model on a text."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from zo2ext._version import __version__
from zo2ext.checkpoints.pretrained import load_config, load_tokenizer
from zo2ext.commands.engine_options import METHOD, MethodOptions, defining
from zo2ext.commands.options import option
from zo2ext.commands.session import memory_line, opened
from zo2ext.engine.engine import ZOEngine
from zo2ext.model.chunked_loss import chunk_loss
from zo2ext.model.compile import compile_blocks
from zo2ext.parallel.micro_batches import Batch, ranks_line, share, speaking
from zo2ext.parallel.parallel import Parallel, reporting_errors
from zo2ext.runs.run import Run, check_run_folder
from zo2ext.streaming.devices.select import make_device
from zo2ext.tasks.text import TextData, held_out_loss, load_text

SCORE = "held_out_loss"


@dataclass(frozen=True, kw_only=True)
class TrainArguments(MethodOptions):
    """Fine-tune a causal language model on a text, by forward passes alone. The same command gives
    the same bits; given again after it was stopped, it continues."""

    model: str = option("Model folder, or its name on the Hugging Face hub.", group="required")
    text: str = option("UTF-8 text file. Its last tenth is held out.", group="required")
    out: str = option(
        "Folder for the run, new or of this very run, which then continues. Gets final/ (weights "
        "and tokenizer), journal.zo2, results.json, loss.csv, loss.png and more.",
        group="required",
    )
    batch_size: int = option("Windows in a batch.", 8, group=METHOD)
    seq_len: int = option("Tokens in a window.", 128, group=METHOD)
    compile: bool = option(
        "Compile the blocks with torch.compile: faster where the host is what a step waits for, a "
        "minute slower to begin, and of other last bits.",
        False,
        group=METHOD,
    )
    eval_every: int = option("Steps between evaluations on the held-out text.", 100, group=METHOD)
    eval_windows: int = option(
        "Held-out windows to evaluate on, spread evenly; all, where there are fewer.",
        1000,
        group=METHOD,
    )

    def check(self) -> None:
        """Refuse wrong values before anything is loaded.

        Raises:
            ValueError: Naming the argument and what it got.
        """
        self.at_least(
            {"steps": 1, "batch_size": 1, "seq_len": 2, "eval_every": 1, "eval_windows": 1}
            | {"micro_batch": 1}
        )
        self.config(trainable=1)
        make_device(self.device)
        if not Path(self.text).is_file():
            raise ValueError(f"text is {self.text!r}, which is no file")
        check_run_folder(Path(self.out), "out")


def train(arguments: TrainArguments) -> None:
    """Run ``zo2ext train``; see `TrainArguments`.

    Raises:
        ValueError: An argument is wrong, or what it names cannot be used; or `out` holds another
            run. Nothing is written.
        OSError: `out` cannot be written. The same command continues.
        OutOfDeviceMemory: With what takes how much.
        RankFailure: Of several processes, one cannot go on.
    """
    parallel = arguments.parallel()
    with speaking(parallel), reporting_errors(parallel):
        arguments.check()
        _train(arguments, parallel)


def _train(arguments: TrainArguments, parallel: Parallel | None) -> None:
    model_config = load_config(arguments.model, max_length=arguments.seq_len)
    tokenizer = load_tokenizer(arguments.model)
    data = load_text(
        Path(arguments.text),
        lambda text: tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"],
        seq_len=arguments.seq_len,
    )
    made = opened(
        arguments.model,
        model_config,
        arguments.config,
        max_token=data.max_token,
        parallel=parallel,
    )
    with made as (model, zo):
        chunk_loss(model)
        if arguments.compile:
            compile_blocks(model)
        _describe(zo, data, arguments)
        with _run(zo, data, arguments) as run:
            if run.finished:
                return
            run.train(
                partial(_batch, zo, model, data, arguments),
                partial(_held_out, zo, model, data, arguments),
            )
            (_, first), *_, (steps, last) = run.curve.scores
            print(f"{run.curve.title} {first:.4f} -> {last:.4f} after {steps} steps")
            run.finish(tokenizer, {SCORE: {"before": first, "after": last}})


def _run(zo: ZOEngine, data: TextData, arguments: TrainArguments) -> Run:
    settings = asdict(arguments) | {
        "lr": zo.config.lr,
        "device": arguments.device or zo.device.type,
    }
    where = ("model", "out", "steps")  # the weights' fingerprint stands for the model
    return Run(
        zo,
        Path(arguments.out),
        settings={"zo2ext": __version__, **settings},
        identity={**defining(arguments, settings, where), "text": data.description},
        steps=arguments.steps,
        eval_every=arguments.eval_every,
        watched=(SCORE,),
    )


def _batch(zo: ZOEngine, model: Any, data: TextData, arguments: TrainArguments, step: int) -> Batch:
    ids = data.batch(step, batch_size=arguments.batch_size, seed=arguments.seed)
    mine = share(len(ids), arguments.micro_batch, zo.parallel)
    parts = [ids[part] for part in mine.parts]
    losses = [partial(_loss, model, part.to(zo.device)) for part in parts]
    return Batch(losses, [mine.counts * part.numel() for part in parts], ids.numel())


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
    if zo.steps == 0 and not math.isfinite(loss):
        raise ValueError(
            f"model {arguments.model!r} has a loss of {loss} on the held-out text before any "
            "training: its weights, or their dtype, are of no use here"
        )
    return {SCORE: loss}


def _describe(zo: ZOEngine, data: TextData, arguments: TrainArguments) -> None:
    a, windows = arguments, min(arguments.eval_windows, data.held_out_windows)
    print(
        f"model   {a.model}: {zo.trainable:,} weights to train, in {len(zo.layouts)} units\n"
        f"{memory_line(zo, a.device)}\n"
        f"text    {len(data.train):,} tokens to train on, {len(data.held_out):,} held out "
        f"({windows} windows to evaluate on)\n"
        f"run     {a.steps} steps of {a.batch_size} x {a.seq_len} tokens, lr {zo.config.lr:.3g}, "
        f"eps {a.eps:g}, seed {a.seed}{ranks_line(zo.parallel)}",
        flush=True,
    )
