"""Fine-tune a model that need not fit the GPU, in a plain PyTorch loop.

    python examples/bare_loop.py MODEL TEXT OUT [STEPS]

MODEL is the folder or hub name of a causal language model, TEXT a file to fine-tune it on, OUT a
folder for the result.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import zo2ext


def main(name: str, text: str, out: str, steps: str = "100") -> None:
    tokenizer = AutoTokenizer.from_pretrained(name)
    model = AutoModelForCausalLM.from_pretrained(name).eval()
    model.config.use_cache = False  # no step needs keys and values later
    zo2ext.chunk_loss(model)  # nor all logits at once
    tokens = tokenizer(Path(text).read_text(), return_tensors="pt", verbose=False).input_ids[0]
    windows = tokens[: len(tokens) // 64 * 64].view(-1, 64)

    with zo2ext.offload(model, zo2ext.ZOConfig(lr=1e-4)) as zo:
        for step in range(int(steps)):
            batch = windows[torch.randint(len(windows), (8,))].to(zo.device)
            loss = zo.step(lambda: model(input_ids=batch, labels=batch).loss)
            print(f"step {step:5d}  loss {loss:.4f}", flush=True)
        model.save_pretrained(out)
    tokenizer.save_pretrained(out)


if __name__ == "__main__":
    if len(sys.argv) not in (4, 5):
        sys.exit(__doc__)
    main(*sys.argv[1:])
