"""Supervised fine-tuning of a model that need not fit the GPU, with TRL's SFTTrainer.

    python examples/sft.py MODEL JSONL OUT [STEPS]

MODEL is the folder or hub name of a causal language model, OUT a folder for the result. Each line
of JSONL is one example: {"text": ...}, or {"prompt": ..., "completion": ...}.
Needs ``pip install zo2ext[trl]``.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer

from zo2ext.integrations.sft import ZOSFTConfig, ZOSFTTrainer


def main(name: str, jsonl: str, out: str, steps: str = "100") -> None:
    rows = [json.loads(line) for line in Path(jsonl).read_text().splitlines()]
    trainer = ZOSFTTrainer(
        model=AutoModelForCausalLM.from_pretrained(name),
        args=ZOSFTConfig(
            output_dir=out,
            max_steps=int(steps),
            learning_rate=1e-4,
            lr_scheduler_type="constant",
            per_device_train_batch_size=8,
            bf16=False,
            save_strategy="no",
            report_to="none",
        ),
        train_dataset=Dataset.from_list(rows),
        processing_class=AutoTokenizer.from_pretrained(name),
    )
    trainer.train()
    trainer.save_model(out)


if __name__ == "__main__":
    if len(sys.argv) not in (4, 5):
        sys.exit(__doc__)
    main(*sys.argv[1:])
