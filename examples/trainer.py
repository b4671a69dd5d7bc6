"""Fine-tune a model that need not fit the GPU, with transformers' Trainer.

    python examples/trainer.py MODEL TEXT OUT [STEPS]

MODEL is the folder or hub name of a causal language model, TEXT a file to fine-tune it on, OUT a
folder for checkpoints and the result. Runs again with the same OUT continue from the last
checkpoint, to the same bits.
"""

from __future__ import annotations

import sys
from pathlib import Path

from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.trainer_utils import get_last_checkpoint

from zo2ext.integrations.trainer import ZOTrainer, ZOTrainingArguments


def main(name: str, text: str, out: str, steps: str = "100") -> None:
    tokenizer = AutoTokenizer.from_pretrained(name)
    tokens = tokenizer(Path(text).read_text(), return_tensors="pt", verbose=False).input_ids[0]
    rows = [{"input_ids": row, "labels": row} for row in tokens.split(64) if len(row) == 64]

    trainer = ZOTrainer(
        model=AutoModelForCausalLM.from_pretrained(name),
        args=ZOTrainingArguments(
            output_dir=out,
            max_steps=int(steps),
            learning_rate=1e-4,
            lr_scheduler_type="constant",
            per_device_train_batch_size=8,
            logging_steps=10,
            eval_strategy="steps",
            eval_steps=50,
            save_steps=50,
            report_to="none",
        ),
        train_dataset=rows[len(rows) // 10 :],
        eval_dataset=rows[: len(rows) // 10 + 1],
        processing_class=tokenizer,
    )
    last = get_last_checkpoint(out) if Path(out).is_dir() else None
    trainer.train(resume_from_checkpoint=last)
    trainer.save_model(out)


if __name__ == "__main__":
    if len(sys.argv) not in (4, 5):
        sys.exit(__doc__)
    main(*sys.argv[1:])
