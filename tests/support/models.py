"""Every language model that transformers can build small, run unmodified.

    python tests/support/models.py                 the whole sweep, as a table (minutes)
    python tests/support/models.py llama gpt2 ...  some model types
    python tests/support/models.py ./my-model      a checkpoint, small enough for memory
    python tests/support/models.py --kind seq2seq --way eager train

For each model type a tiny random model is made from its own config class, with every size shrunk
(`zo2ext.model.tiny`); then two steps of the streamed engine are compared, bit for bit, with two
steps of plain forward passes (`zo2ext.engine.check`). A type is

    equal       same losses at +eps and at -eps, and the same weights
    differs     other bits
    fails       runs plainly, but not streamed
    not run     could be built, but not run plainly on random tokens alone
    not built   could not be built from a generic tiny config
    unsupported its class does not know the way that was asked for
"""

from __future__ import annotations

import argparse
import gc
import signal
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import sweep_report
import torch
import transformers
from small_configs import LENGTH, small_model
from sweep_report import Outcome, Sweep
from torch import Tensor, nn
from transformers.models.auto import modeling_auto

import zo2ext
from zo2ext.engine import check as comparison

SETTINGS: dict[str, Any] = {"lr": 1e-3, "eps": 1e-3, "seed": 3}


@dataclass(frozen=True)
class Kind:
    """What a model is for: which types there are, and how its loss is made."""

    names: Mapping[str, str]  # model type: the name of its class
    auto: Any  # loads a checkpoint
    config: dict[str, Any]  # what configs are told, whether they know it by default or not
    classes: int = 0  # labels are one of so many classes a row; 0: they are the tokens


KINDS = {
    "causal": Kind(
        modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
        transformers.AutoModelForCausalLM,
        {"is_decoder": True},
    ),
    "classification": Kind(
        modeling_auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
        transformers.AutoModelForSequenceClassification,
        {"decoder_start_token_id": 0},
        classes=2,
    ),
    "seq2seq": Kind(
        modeling_auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
        transformers.AutoModelForSeq2SeqLM,
        {"decoder_start_token_id": 0},
    ),
}


def make_model(kind: Kind, name: str) -> Any:
    """A tiny random model of a type of `kind`, or a checkpoint's; float32, eval mode."""
    if name in kind.names:
        return small_model(getattr(transformers, kind.names[name]), name, **kind.config)
    return kind.auto.from_pretrained(name, dtype=torch.float32).eval()


def batches(kind: Kind, model: Any, count: int = 2) -> list[dict[str, Tensor]]:
    """Random tokens with labels, shape (2, LENGTH)."""
    return comparison.random_batches(model, length=LENGTH, classes=kind.classes, count=count)


def plainly(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    loss: Tensor = model(**batch).loss
    return loss


def autocast(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    with torch.autocast("cpu", torch.bfloat16):
        return plainly(model, batch)


@dataclass(frozen=True)
class Way:
    """How forward passes are run. `prepare` raises ValueError where a model does not know how."""

    prepare: Callable[[Any], Any] = lambda model: None
    loss: Callable[[nn.Module, dict[str, Tensor]], Tensor] = plainly


def _checkpointing(model: Any) -> None:
    model.train()
    model.gradient_checkpointing_enable()


WAYS = {
    "own": Way(),  # float32, eval mode, the attention that the model chooses itself
    "eager": Way(lambda model: model.set_attn_implementation("eager")),
    "sdpa": Way(lambda model: model.set_attn_implementation("sdpa")),
    "autocast": Way(loss=autocast),  # float32 weights, cast to bfloat16 as they are used
    "train": Way(lambda model: model.train()),  # with dropout
    "checkpointing": Way(_checkpointing),  # of gradients that are never taken
}


def check(
    kind_name: str, name: str, *, way_name: str = "own", granularity: str = "block"
) -> Outcome:
    """Two streamed steps of a model (see `make_model`) against the plain loop."""
    way = WAYS[way_name]
    kind, start, size = KINDS[kind_name], time.perf_counter(), 0

    def outcome(verdict: str, detail: str = "") -> Outcome:
        return Outcome(name, verdict, detail, size, time.perf_counter() - start)

    try:
        model = make_model(kind, name)
    except Exception as error:  # any library's any error: the table says which
        return outcome("not built", brief(error))
    size = sum(p.numel() for p in model.parameters())
    try:
        way.prepare(model)
    except ValueError as error:
        return outcome("unsupported", brief(error))
    config = zo2ext.ZOConfig(device="simulated", granularity=granularity, **SETTINGS)

    def run(steps: Callable[..., comparison.Run], data: list[dict[str, Tensor]]) -> comparison.Run:
        torch.manual_seed(2)
        return steps(model, data, config, way.loss)

    try:
        data = batches(kind, model)
        expected = run(comparison.plain_run, data)
    except Exception as error:
        return outcome("not run", brief(error))
    if not expected.finite:
        return outcome("not run", "the plain loss is not finite")
    try:
        difference = run(comparison.engine_run, data).difference(expected)
    except Exception as error:
        return outcome("fails", brief(error))
    if difference is None:
        return outcome("equal")
    if run(comparison.plain_run, data).difference(expected) is not None:
        return outcome("not run", "two plain runs from one seed differ")
    return outcome("differs", difference)


def brief(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:160]


class TooSlow(BaseException):
    """Not an Exception: what a library's errors are caught for is not meant for it."""


@contextmanager
def time_limit(seconds: int) -> Iterator[None]:
    def expire(*_: Any) -> None:
        raise TooSlow(f"took more than {seconds} s")

    signal.signal(signal.SIGALRM, expire)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)


def sweep(kind: str, way: str, names: list[str], options: Any) -> Iterator[Outcome]:
    """The outcome of each of `names`, printed as it comes."""
    for name in names:
        try:
            with time_limit(options.seconds):
                result = check(kind, name, way_name=way, granularity=options.granularity)
        except TooSlow as error:
            result = Outcome(name, "not run", str(error))
        print(
            f"{result.model_type:<26} {result.verdict:<12}{result.parameters:>10,}"
            f"{result.seconds:>7.1f} s  {result.detail}",
            flush=True,
        )
        yield result
        gc.collect()


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("models", nargs="*", help="model types or folders; default: all types")
    parser.add_argument("--kind", choices=[*KINDS, "all"], default="all")
    parser.add_argument(
        "--way",
        nargs="+",
        choices=WAYS,
        default=["own"],
        help="of running the forward passes; one sweep with each (default own)",
    )
    parser.add_argument("--granularity", choices=["block", "module"], default="block")
    parser.add_argument("--seconds", type=int, default=60, help="limit a type (default 60)")
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="write what was found there")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    sweeps: list[Sweep] = []
    kinds = list(KINDS) if options.kind == "all" else [options.kind]
    for name in options.models:
        if not Path(name).is_dir() and not any(name in KINDS[kind].names for kind in kinds):
            parser.error(f"{name!r} is no folder and no model type of --kind {options.kind}")
    for kind in kinds:
        known = KINDS[kind].names
        names = [m for m in options.models if m in known or Path(m).is_dir()]
        if options.models and not names:
            continue
        for way in options.way:
            print(f"\n{kind}, {way}")
            found = list(sweep(kind, way, names or sorted(known), options))
            sweeps.append(Sweep(kind, way, found))
    print("\n" + sweep_report.summary(sweeps))
    if options.markdown is not None:
        sweep_report.write(options.markdown, sweeps)
    wrong = {"differs", "fails"}
    return int(any(outcome.verdict in wrong for sweep in sweeps for outcome in sweep.outcomes))


if __name__ == "__main__":
    sys.exit(main())
