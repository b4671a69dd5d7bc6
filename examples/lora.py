"""Train a LoRA adapter by forward passes alone: the base is streamed and never changed.

    python examples/lora.py MODEL TEXT OUT [STEPS [BITS]]

MODEL is the folder or hub name of a causal language model, TEXT a file to fine-tune it on, OUT a
folder for the adapter, as PEFT saves it. BITS is 4 or 8 for a base that bitsandbytes quantizes as
it is loaded: a fraction of the bytes then goes up. Needs ``pip install peft``, and
``bitsandbytes`` for BITS.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

import zo2ext


def main(name: str, text: str, out: str, steps: str = "100", bits: str = "") -> None:
    tokenizer = AutoTokenizer.from_pretrained(name)
    few = {"load_in_4bit": bits == "4", "load_in_8bit": bits == "8", "bnb_4bit_quant_type": "nf4"}
    base = AutoModelForCausalLM.from_pretrained(
        name, quantization_config=BitsAndBytesConfig(**few) if bits else None
    )
    lora = LoraConfig(r=8, target_modules="all-linear", task_type="CAUSAL_LM")
    model = get_peft_model(base, lora).eval()
    tokens = tokenizer(Path(text).read_text(), return_tensors="pt", verbose=False).input_ids[0]
    windows = tokens[: len(tokens) // 64 * 64].view(-1, 64)

    with zo2ext.offload(model, zo2ext.ZOConfig(lr=1e-3)) as zo:
        for step in range(int(steps)):
            batch = windows[torch.randint(len(windows), (8,))].to(zo.device)
            loss = zo.step(lambda: model(input_ids=batch, labels=batch).loss)
            print(f"step {step:5d}  loss {loss:.4f}", flush=True)
        model.save_pretrained(out)


if __name__ == "__main__":
    if len(sys.argv) not in (4, 5, 6):
        sys.exit(__doc__)
    main(*sys.argv[1:])
