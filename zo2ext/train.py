"""``zo2ext train``: fine-tune a causal language model on a text."""

from __future__ import annotations

import csv
import io
import json
import logging
import math
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

import zo2ext
from zo2ext import plots
from zo2ext.devices import make_device
from zo2ext.engine import ZOEngine, offload
from zo2ext.engine_options import METHOD, MethodOptions
from zo2ext.files import check_new_folder, folder_atomically, write_atomically
from zo2ext.memory import gib
from zo2ext.meter import Meter
from zo2ext.options import option
from zo2ext.pretrained import load_config, load_model, load_tokenizer, save
from zo2ext.text import TextData, held_out_loss, load_text


@dataclass(frozen=True, kw_only=True)
class TrainArguments(MethodOptions):
    """Fine-tune a causal language model on a text, by forward passes alone. The same command gives
    the same bits."""

    model: str = option("Model folder, or its name on the Hugging Face hub.", group="required")
    text: str = option("UTF-8 text file. Its last tenth is held out.", group="required")
    out: str = option(
        "New folder for the run. Gets final/ (weights and tokenizer), loss.csv, loss.png and "
        "arguments.json.",
        group="required",
    )
    batch_size: int = option("Windows in a batch.", 8, group=METHOD)
    seq_len: int = option("Tokens in a window.", 128, group=METHOD)
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
        )
        self.config(trainable=1)
        make_device(self.device)
        if not Path(self.text).is_file():
            raise ValueError(f"text is {self.text!r}, which is no file")
        check_new_folder(Path(self.out), "out")


@dataclass
class Curve:
    """Losses over a run."""

    train: list[tuple[int, float]] = field(default_factory=list)  # (step, loss)
    held_out: list[tuple[int, float]] = field(default_factory=list)  # (steps done, loss)

    def csv(self) -> bytes:
        """A line a step: the losses met in it, and with the weights before it."""
        table = io.StringIO()
        writer = csv.writer(table, lineterminator="\n")
        writer.writerow(["step", "train_loss", "held_out_loss"])
        train, held_out = dict(self.train), dict(self.held_out)
        for step in sorted(train.keys() | held_out.keys()):
            writer.writerow([step, train.get(step, ""), held_out.get(step, "")])
        return table.getvalue().encode()


def train(arguments: TrainArguments) -> None:
    """Run ``zo2ext train``; see `TrainArguments`.

    Raises:
        ValueError: An argument is wrong, or what it names cannot be used. Nothing is written.
        OSError: `out` cannot be written. There is no ``final``, or a whole one.
        OutOfDeviceMemory: With what takes how much.
    """
    arguments.check()
    out = Path(arguments.out)
    model_config = load_config(arguments.model, max_length=arguments.seq_len)
    tokenizer = load_tokenizer(arguments.model)
    data = load_text(
        Path(arguments.text),
        lambda text: tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"],
        seq_len=arguments.seq_len,
    )
    model = load_model(arguments.model, model_config, max_token=data.max_token)
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    config = arguments.config(trainable)
    with offload(model, config) as zo:
        _describe(zo, trainable, data, arguments)
        curve = Curve()
        with _interruptible(curve, out):
            _loop(zo, model, data, arguments, curve)
            with folder_atomically(out / "final") as folder:
                save(model, tokenizer, folder)
        skipped = zo.skipped
    if plots.available():
        write_atomically(out / "loss.png", plots.loss_curve(curve.train, curve.held_out))
    _report(curve, out, skipped)


def _loop(
    zo: ZOEngine, model: Any, data: TextData, arguments: TrainArguments, curve: Curve
) -> None:
    meter, out = Meter(zo.device), Path(arguments.out)
    status: list[str] = []  # beside the progress bar

    def evaluate(steps: int) -> None:
        bar.set_postfix_str(", ".join((*status, "evaluating")))
        loss = held_out_loss(
            model,
            data,
            batch_size=arguments.batch_size,
            windows=arguments.eval_windows,
            device=zo.device,
        )
        if steps == 0 and not math.isfinite(loss):
            raise ValueError(
                f"model {arguments.model!r} has a loss of {loss} on the held-out text before any "
                "training: its weights, or their dtype, are of no use here"
            )
        curve.held_out.append((steps, loss))
        bar.set_postfix_str(", ".join(status))
        tqdm.write(f"step {steps:>6}: held-out loss {loss:.4f}")
        if steps > 0:
            write_atomically(out / "loss.csv", curve.csv())

    with (
        logging_redirect_tqdm([logging.getLogger("zo2ext")]),
        tqdm(total=arguments.steps, unit="step", dynamic_ncols=True) as bar,
    ):
        evaluate(0)
        for step in range(arguments.steps):
            ids = data.batch(step, batch_size=arguments.batch_size, seed=arguments.seed)
            ids = ids.to(zo.device)
            with meter.measure(ids.numel()):
                loss = zo.step(partial(_loss, model, ids))
            if step == 0:  # it fits, so there is a run
                out.mkdir(parents=True, exist_ok=True)
                write_atomically(out / "arguments.json", _settings(zo, arguments))
            curve.train.append((step, loss))
            status = [f"loss {loss:.3f}", str(meter)]
            bar.set_postfix_str(", ".join(status), refresh=False)
            bar.update()
            if (step + 1) % arguments.eval_every == 0 or step + 1 == arguments.steps:
                evaluate(step + 1)


def _loss(model: Any, ids: torch.Tensor) -> torch.Tensor:
    loss: torch.Tensor = model(input_ids=ids, labels=ids, use_cache=False).loss
    return loss


def _settings(zo: ZOEngine, arguments: TrainArguments) -> bytes:
    """What was asked for, and what the defaults came to, as JSON."""
    settings = asdict(arguments) | {
        "lr": zo.config.lr,
        "device": arguments.device or zo.device.type,
    }
    return json.dumps({"zo2ext": zo2ext.__version__, **settings}, indent=2).encode() + b"\n"


@contextmanager
def _interruptible(curve: Curve, out: Path) -> Iterator[None]:
    """Say what an interrupted run leaves."""
    try:
        yield
    except KeyboardInterrupt:
        left = f"losses until the last evaluation are in {out / 'loss.csv'}"
        raise KeyboardInterrupt(
            f"after {len(curve.train)} steps; weights are not saved"
            + (f"; {left}" if len(curve.held_out) > 1 else "")
        ) from None


def _describe(zo: ZOEngine, trainable: int, data: TextData, arguments: TrainArguments) -> None:
    a, windows = arguments, min(arguments.eval_windows, data.held_out_windows)
    print(
        f"model   {a.model}: {trainable:,} weights to train, in {len(zo.layouts)} units\n"
        f"memory  {gib(zo.host_nbytes)} of weights on the host, "
        f"{gib(zo.device_nbytes)} of buffers on {a.device or zo.device}\n"
        f"text    {len(data.train):,} tokens to train on, {len(data.held_out):,} held out "
        f"({windows} windows to evaluate on)\n"
        f"run     {a.steps} steps of {a.batch_size} x {a.seq_len} tokens, lr {zo.config.lr:.3g}, "
        f"eps {a.eps:g}, seed {a.seed}",
        flush=True,
    )


def _report(curve: Curve, out: Path, skipped: int) -> None:
    (_, first), (steps, last) = curve.held_out[0], curve.held_out[-1]
    print(f"held-out loss {first:.4f} -> {last:.4f} after {steps} steps")
    print(f"weights and tokenizer: {out / 'final'}\nloss curve: {out / 'loss.csv'}", end="")
    print(f", {out / 'loss.png'}" if plots.available() else f" ({plots.HOW_TO_GET})")
    if skipped:
        print(
            f"warning: {skipped} of {steps} steps were skipped, as their losses were not finite; "
            "a lower lr may help",
            file=sys.stderr,
        )
