"""Evaluate a model that need not fit the GPU with lm-evaluation-harness.

    python examples/lm_harness.py MODEL TASKS [FOLDER]

MODEL is the folder or hub name of a causal language model, TASKS names of tasks, comma-separated,
FOLDER a folder of task files of your own. Needs ``pip install lm_eval``.
"""

from __future__ import annotations

import sys

from lm_eval import simple_evaluate
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from lm_eval.utils import make_table
from transformers import AutoModelForCausalLM, AutoTokenizer

import zo2ext


def main(name: str, tasks: str, folder: str | None = None) -> None:
    tokenizer = AutoTokenizer.from_pretrained(name)
    model = AutoModelForCausalLM.from_pretrained(name)
    with zo2ext.offload(model, train=False):
        results = simple_evaluate(
            HFLM(pretrained=model, tokenizer=tokenizer, batch_size=8),
            tasks=tasks.split(","),
            task_manager=TaskManager(include_path=folder),
            bootstrap_iters=0,
        )
    print(make_table(results))


if __name__ == "__main__":
    if len(sys.argv) not in (3, 4):
        sys.exit(__doc__)
    main(*sys.argv[1:])
