"""MeZO for a model that fits in memory: the whole method is the function `mezo`.

    python examples/mezo_loop.py MODEL TEXT [STEPS]

MODEL is the folder or hub name of a causal language model, TEXT a file to fine-tune it on. Weights
are perturbed in copies, never in place, so nothing drifts; every z is regenerated from its key.
`zo2ext.offload` does the same, to the same bits, for models that do not fit.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from zo2ext import ops


@torch.no_grad()
def mezo(
    model: torch.nn.Module,
    batches: Iterable[dict[str, Tensor]],
    *,
    lr: float = 1e-4,
    eps: float = 1e-3,
    seed: int = 0,
) -> Iterator[float]:
    """Fine-tune `model` in place, one step for each batch; yields each step's mean loss."""
    parameters = list(model.parameters())  # tied weights once; the index is the tensor id
    for step, batch in enumerate(batches):
        key = ops.direction_key(seed, step, 0)
        weights = [p.data for p in parameters]
        losses = []
        for scale in (eps, -eps):
            for i, p in enumerate(parameters):
                p.data = ops.perturb_(weights[i].clone(), key=key, tensor_id=i, eps=scale)
            losses.append(float(model(**batch).loss))
        projected_grad = (losses[0] - losses[1]) / (2 * eps)
        for i, p in enumerate(parameters):
            p.data = weights[i]
            ops.update_(p, key=key, tensor_id=i, lr=lr, projected_grad=projected_grad)
        yield sum(losses) / 2


def windows(
    tokens: Tensor, steps: int, rows: int = 8, length: int = 128
) -> Iterator[dict[str, Tensor]]:
    """Random windows of the text, the same for every run."""
    generator = torch.Generator().manual_seed(0)
    for _ in range(steps):
        starts = torch.randint(len(tokens) - length, (rows,), generator=generator)
        ids = torch.stack([tokens[start : start + length] for start in starts])
        yield {"input_ids": ids, "labels": ids}


def main(name: str, text: str, steps: str = "100") -> None:
    tokenizer = AutoTokenizer.from_pretrained(name)
    model = AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32).eval()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    tokens = torch.tensor(
        tokenizer(Path(text).read_text(), verbose=False)["input_ids"], device=device
    )
    for step, loss in enumerate(mezo(model.to(device), windows(tokens, int(steps)))):
        if step % 10 == 0:
            print(f"step {step:5d}  loss {loss:.4f}", flush=True)


if __name__ == "__main__":
    if len(sys.argv) not in (3, 4):
        sys.exit(__doc__)
    main(*sys.argv[1:])
