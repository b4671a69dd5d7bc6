"""The same loop with Hugging Face accelerate: device, mixed precision and loader are its own.

    python examples/accelerate_loop.py MODEL TEXT OUT [EPOCHS]

MODEL is the folder or hub name of a causal language model, TEXT a file to fine-tune it on, OUT a
folder for the result.
"""

from __future__ import annotations

import sys
from pathlib import Path

from accelerate import Accelerator
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, AutoTokenizer

import zo2ext


def main(name: str, text: str, out: str, epochs: str = "1") -> None:
    tokenizer = AutoTokenizer.from_pretrained(name)
    model = AutoModelForCausalLM.from_pretrained(name).eval()
    tokens = tokenizer(Path(text).read_text(), return_tensors="pt", verbose=False).input_ids[0]
    windows = tokens[: len(tokens) // 64 * 64].view(-1, 64)

    accelerator = Accelerator()
    config = zo2ext.ZOConfig(lr=1e-4, device=accelerator.device)
    with zo2ext.offload(model, config) as zo:  # first: then prepare() moves no weight
        prepared, loader = accelerator.prepare(model, DataLoader(windows, 8, shuffle=True))
        for _ in range(int(epochs)):
            for batch in loader:
                loss = zo.step(lambda: prepared(input_ids=batch, labels=batch).loss)
                accelerator.print(f"step {zo.steps:5d}  loss {loss:.4f}", flush=True)
        accelerator.unwrap_model(prepared).save_pretrained(out)
    tokenizer.save_pretrained(out)


if __name__ == "__main__":
    if len(sys.argv) not in (4, 5):
        sys.exit(__doc__)
    main(*sys.argv[1:])
