"""``zo2ext train``: fine-tune a causal language model on a text."""

from __future__ import annotations

import csv
import io
import json
import math
import sys
from dataclasses import asdict, dataclass, field
from enum import StrEnum
from functools import partial
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from zo2ext import plots
from zo2ext.config import Granularity, ZOConfig
from zo2ext.engine import ZOEngine, offload
from zo2ext.files import check_new_folder, folder_atomically, write_atomically
from zo2ext.memory import gib
from zo2ext.meter import Meter
from zo2ext.pretrained import load_model, load_tokenizer
from zo2ext.text import TextData, held_out_loss, load_text


class Storage(StrEnum):
    """Names of storage dtypes on the command line."""

    FP32 = "fp32"
    BF16 = "bf16"
    FP16 = "fp16"

    @property
    def dtype(self) -> torch.dtype:
        return {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[self.value]


def _option(default: Any, help: str) -> Any:
    return field(default=default, metadata={"help": help})


@dataclass
class TrainArguments:
    """Fine-tune a causal language model on a text, by forward passes alone."""

    model: str = field(metadata={"help": "Model folder, or its name on the Hugging Face hub."})
    text: str = field(metadata={"help": "UTF-8 text file. Its last tenth is held out."})
    out: str = field(metadata={"help": "New folder for the run: weights, loss curve, settings."})
    steps: int = _option(600, "Steps to train; each is two forward passes.")
    lr: float | None = _option(
        None, "Learning rate. Default: 0.05 / sqrt(trainable weights), 1e-4 for 260K, 4e-7 for 13B."
    )
    eps: float = _option(1e-3, "Perturbation scale.")
    weight_decay: float = _option(0.0, "Decoupled weight decay.")
    directions: int = _option(1, "Directions a step averages over; each is two forward passes.")
    batch_size: int = _option(8, "Windows in a batch.")
    seq_len: int = _option(128, "Tokens in a window.")
    seed: int = _option(0, "Seed of batches and directions.")
    device: str | None = _option(None, "cuda, cpu or simulated. Default: cuda where there is one.")
    storage: Storage | None = _option(None, "Weights at rest. Default: as the model is saved.")
    granularity: Granularity = _option(
        Granularity.BLOCK, "What is loaded at once: a block, or a single module (least memory)."
    )
    resident: str = _option("0", "Units kept on the device: a count, 'all', or a size like 8GiB.")
    slots: int = _option(3, "Device buffers that streamed units pass through.")
    write_back: int = _option(1, "Steps between write-backs of the weights.")
    eval_every: int = _option(100, "Steps between evaluations on the held-out text.")

    def config(self, trainable: int) -> ZOConfig:
        """The engine's settings, for a model with `trainable` weights."""
        return ZOConfig(
            eps=self.eps,
            lr=0.05 / math.sqrt(trainable) if self.lr is None else self.lr,
            weight_decay=self.weight_decay,
            directions=self.directions,
            seed=self.seed,
            storage=self.storage.dtype if self.storage else None,
            write_back=self.write_back,
            device=self.device,
            granularity=self.granularity,
            slots=self.slots,
            resident=int(self.resident) if self.resident.isdecimal() else self.resident,
        )

    def check(self) -> None:
        """Refuse wrong values before anything is loaded."""
        for name in ("steps", "batch_size", "eval_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.seq_len < 2:
            raise ValueError(f"seq_len must be at least 2, got {self.seq_len}")
        self.config(trainable=1)
        if not Path(self.text).is_file():
            raise ValueError(f"text is {self.text!r}, which is no file")


def train(arguments: TrainArguments) -> None:
    """Run ``zo2ext train``; see `TrainArguments`."""
    arguments.check()
    out = Path(arguments.out)
    tokenizer = load_tokenizer(arguments.model)
    data = load_text(
        Path(arguments.text),
        lambda text: tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"],
        seq_len=arguments.seq_len,
    )
    model = load_model(arguments.model, max_length=arguments.seq_len)
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    config = arguments.config(trainable)
    check_new_folder(out, "out")
    write_atomically(out / "arguments.json", json.dumps(asdict(arguments), indent=2).encode())
    with offload(model, config) as zo:
        print(
            f"{arguments.model}: {trainable:,} weights in {len(zo.layouts)} units, "
            f"{gib(zo.host_nbytes)} on the host, "
            f"{gib(zo.device_nbytes)} of buffers on {zo.device}; "
            f"{len(data.train):,} tokens to train on, {data.held_out_windows} windows held out; "
            f"lr {config.lr:.3g}, eps {config.eps:.3g}"
        )
        curve = _loop(zo, model, data, arguments)
        with folder_atomically(out / "final") as folder:
            model.save_pretrained(folder)
            tokenizer.save_pretrained(folder)
    _write_curve(out, curve)
    first, last = curve.held_out[0], curve.held_out[-1]
    print(f"held-out loss {first[1]:.4f} -> {last[1]:.4f} after {last[0]} steps")
    print(f"weights and tokenizer: {out / 'final'}\nloss curve: {out / 'loss.csv'}", end="")
    print(f", {out / 'loss.png'}" if plots.available() else f" ({plots.HOW_TO_GET})")
    if zo.skipped:
        print(f"{zo.skipped} steps were skipped: their losses were not finite", file=sys.stderr)


@dataclass
class Curve:
    """Losses over a run."""

    train: list[tuple[int, float]] = field(default_factory=list)  # (step, loss)
    held_out: list[tuple[int, float]] = field(default_factory=list)  # (steps done, loss)


def _loop(zo: ZOEngine, model: Any, data: TextData, arguments: TrainArguments) -> Curve:
    curve, meter = Curve(), Meter(zo.device)

    def evaluate(steps: int, bar: Any) -> None:
        loss = held_out_loss(model, data, batch_size=arguments.batch_size, device=zo.device)
        curve.held_out.append((steps, loss))
        bar.write(f"step {steps:>6}: held-out loss {loss:.4f}")

    model.eval()
    with tqdm(total=arguments.steps, unit="step", dynamic_ncols=True) as bar:
        evaluate(0, bar)
        for step in range(arguments.steps):
            ids = data.batch(step, batch_size=arguments.batch_size, seed=arguments.seed)
            ids = ids.to(zo.device)
            with meter.measure(ids.numel()):
                loss = zo.step(partial(_loss, model, ids))
            curve.train.append((step, loss))
            bar.set_postfix_str(f"loss {loss:.3f}, {meter}", refresh=False)
            bar.update()
            if (step + 1) % arguments.eval_every == 0 or step + 1 == arguments.steps:
                evaluate(step + 1, bar)
    return curve


def _loss(model: Any, ids: torch.Tensor) -> torch.Tensor:
    loss: torch.Tensor = model(input_ids=ids, labels=ids, use_cache=False).loss
    return loss


def _write_curve(out: Path, curve: Curve) -> None:
    table = io.StringIO()
    writer = csv.writer(table)
    writer.writerow(["step", "train_loss", "held_out_loss"])
    held_out = dict(curve.held_out)
    losses = dict(curve.train)
    for step in sorted(losses.keys() | held_out.keys()):
        writer.writerow([step, losses.get(step, ""), held_out.get(step, "")])
    write_atomically(out / "loss.csv", table.getvalue().encode())
    if plots.available():
        write_atomically(out / "loss.png", plots.loss_curve(curve.train, curve.held_out))
