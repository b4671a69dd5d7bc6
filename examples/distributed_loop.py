"""Fine-tune in several processes that exchange nothing but losses.

    torchrun --nproc-per-node 2 examples/distributed_loop.py MODEL TEXT OUT [STEPS]

MODEL is the folder or hub name of a causal language model, TEXT a file to fine-tune it on, OUT a
folder for journal and result. Each process takes a GPU, where there are any, and has windows of its
own of each batch. The result does not depend on how many processes there are; a run that was
stopped continues, with as many or others.
"""

from __future__ import annotations

import os
import sys
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import zo2ext

BATCH = 8  # windows of a step, one a forward pass


def main(name: str, text: str, out: str, steps: str = "100") -> None:
    ranks = zo2ext.Parallel.from_environment(perturb=1)  # 2: pairs of processes share their windows
    with ranks.reporting_errors():  # the others, where something goes wrong here
        tokenizer = AutoTokenizer.from_pretrained(name)
        model = AutoModelForCausalLM.from_pretrained(name).eval()
        model.config.use_cache = False  # no step needs keys and values later
        zo2ext.chunk_loss(model)  # nor all logits at once
        tokens = tokenizer(Path(text).read_text(), return_tensors="pt", verbose=False).input_ids[0]
        windows = tokens[: len(tokens) // 64 * 64].view(-1, 64)

    def loss(window: torch.Tensor) -> Any:
        return model(input_ids=window, labels=window).loss

    config = zo2ext.ZOConfig(lr=1e-4, device=device())
    journal = Path(out) / "journal.zo2"
    with zo2ext.offload(model, config, journal=journal, parallel=ranks) as zo:
        for step in range(zo.steps, int(steps)):
            batch = torch.randint(
                len(windows), (BATCH,), generator=torch.Generator().manual_seed(step)
            )
            mine = batch[ranks.data_rank :: ranks.data_ranks]
            parts = [partial(loss, windows[i : i + 1].to(zo.device)) for i in mine.tolist()]
            value = zo.step(parts, weights=[1.0] * len(parts))
            if zo.is_coordinator:
                print(f"step {step:5d}  loss {value:.4f}", flush=True)
        if zo.is_coordinator:
            zo.save_pretrained(Path(out) / "final", tokenizer=tokenizer)


def device() -> str:
    """This process's."""
    gpus = torch.cuda.device_count()
    return f"cuda:{int(os.environ.get('LOCAL_RANK', 0)) % gpus}" if gpus else "cpu"


if __name__ == "__main__":
    if len(sys.argv) not in (4, 5):
        sys.exit(__doc__)
    main(*sys.argv[1:])
