"""Compare the engine with plain forward passes over the same model in memory, bit for bit."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from zo2ext import ops
from zo2ext._random_state import RandomState
from zo2ext.config import ZOConfig
from zo2ext.engine.offload import offload
from zo2ext.engine.pass_difference import outputs_of_first_pass

Batch = Mapping[str, Tensor]
Loss = Callable[[nn.Module, Batch], Tensor]

FIRST_TOKEN, END = 3, 2  # smaller ids are often special; some classifiers need an end token


@dataclass(frozen=True)
class Run:
    """The results of a few steps.

    Attributes:
        losses: Losses at +eps and at -eps, one pair per step.
        weights: Trainable weights after the last step, by name.
    """

    losses: list[tuple[float, float]]
    weights: dict[str, Tensor]

    @property
    def finite(self) -> bool:
        return all(math.isfinite(loss) for pair in self.losses for loss in pair)

    def difference(self, other: Run) -> str | None:
        """Describe the first difference from `other`, or return None if all bits are equal."""
        for step, (ours, theirs) in enumerate(zip(self.losses, other.losses, strict=True)):
            if ours != theirs:
                return f"step {step}: {ours}, plain {theirs}"
        for name, weights in other.weights.items():
            if not torch.equal(self.weights[name], weights):
                return f"weights of {name}"
        return None


def model_loss(model: nn.Module, batch: Batch) -> Tensor:
    loss: Tensor = model(**batch).loss
    return loss


def random_batches(
    model: Any, *, length: int, classes: int = 0, count: int = 2
) -> list[dict[str, Tensor]]:
    """Make batches of two rows of random tokens with labels.

    Args:
        model: Model of transformers.
        length: Tokens per row.
        classes: Number of classes of a classifier; with 0, the labels are the tokens.
        count: Number of batches.
    """
    generator = torch.Generator().manual_seed(1)
    tokens = "input_ids" if "input_ids" in inspect.signature(model.forward).parameters else "inputs"
    vocabulary = min(getattr(model.config.get_text_config(), "vocab_size", 199), 199)
    batches = []
    for _ in range(count):
        ids = torch.randint(FIRST_TOKEN, vocabulary, (2, length), generator=generator)
        ids[:, -1] = END
        labels = torch.randint(0, classes, (2,), generator=generator) if classes else ids
        batches.append({tokens: ids, "labels": labels.clone()})
    return batches


def plain_run(
    model: nn.Module, batches: Sequence[Batch], config: ZOConfig, loss: Loss = model_loss
) -> Run:
    """Run MeZO steps over a float32 model in memory, with plain forward passes.

    Args:
        model: Model on the device of the batches. Its weights are unchanged at the end.
        batches: One batch per step.
        config: `lr`, `eps` and `seed` are used.
        loss: Loss of a model on a batch.

    Source:
        Malladi et al. 2023, arXiv:2305.17333, Algorithm 1.
    """
    trainable = _trainable(model)
    original = [p.data for _, _, p in trainable]
    weights = {name: p.data.clone() for _, name, p in trainable}
    losses = []
    lr = config.lr
    assert isinstance(lr, float)
    try:
        for step, batch in enumerate(batches):
            key = ops.direction_key(config.seed, step, 0)
            generators = RandomState.current(next(iter(batch.values())).device)
            pair = []
            for eps in (config.eps, -config.eps):
                generators.restore()
                for i, name, parameter in trainable:
                    copied = weights[name].clone()
                    parameter.data = ops.perturb_(copied, key=key, tensor_id=i, eps=eps)
                with torch.no_grad():
                    pair.append(float(loss(model, batch).float()))
            plus, minus = pair
            losses.append((plus, minus))
            if not (math.isfinite(plus) and math.isfinite(minus)):
                continue
            grad = (plus - minus) / (2 * config.eps)
            for i, name, _ in trainable:
                ops.update_(weights[name], key=key, tensor_id=i, lr=lr, projected_grad=grad)
    finally:
        for (_, _, parameter), data in zip(trainable, original, strict=True):
            parameter.data = data
    return Run(losses, weights)


def engine_run(
    model: nn.Module, batches: Sequence[Batch], config: ZOConfig, loss: Loss = model_loss
) -> Run:
    """Run the steps of `plain_run` on the engine. The model's weights are unchanged at the end.

    Args:
        model: Model on the CPU.
        batches: One batch per step, on the CPU.
        config: Settings of the engine.
        loss: Loss of a model on a batch.
    """
    trainable = _trainable(model)
    original = [p.data.clone() for _, _, p in trainable]
    losses = []
    try:
        with offload(model, config) as zo:
            for batch in batches:
                there = {name: tensor.to(zo.device) for name, tensor in batch.items()}
                zo.step(partial(loss, model, there))
                assert zo.last is not None
                losses.append((zo.last.losses_plus[0], zo.last.losses_minus[0]))
        return Run(losses, {name: p.data.clone() for _, name, p in trainable})
    finally:
        for (_, _, parameter), data in zip(trainable, original, strict=True):
            parameter.data.copy_(data)


def first_different_module(
    model: nn.Module, plain: Callable[[], object], engine: Callable[[], object]
) -> str | None:
    """Name the first module without children whose outputs differ between two runs.

    The engine interleaves the passes at +eps and at -eps and repeats one in the first step, so a
    module's outputs are compared without regard to their order and number.
    """
    names = {m: n for n, m in model.named_modules() if next(m.children(), None) is None}
    found: list[dict[str, set[int]]] = []
    for run in (plain, engine):
        with outputs_of_first_pass() as outputs:
            run()
        found.append({})
        for module, checksum in outputs:
            if module in names:
                found[-1].setdefault(names[module], set()).add(checksum)
    return next((name for name in found[0] if found[0][name] != found[1].get(name)), None)


def _trainable(model: nn.Module) -> list[tuple[int, str, nn.Parameter]]:
    """Return the tensor id, the name and the parameter of each trainable parameter."""
    named = enumerate(model.named_parameters())
    return [(i, name, p) for i, (name, p) in named if p.requires_grad]
