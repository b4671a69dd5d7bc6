"""``zo2ext train`` for processes that are to be killed. Importing this once makes a start quick."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path
from typing import Any

import matplotlib.figure  # noqa: F401
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

import zo2ext.commands.train as train_command
import zo2ext.runs.folder as folder
from zo2ext import _files as files
from zo2ext.commands import main as cli
from zo2ext.tasks.scoring import Answerer

torch.set_num_threads(1)
WARM = (AutoModelForCausalLM, AutoTokenizer)  # transformers loads them when they are named

MOMENTS: dict[str, tuple[Any, str, int]] = {  # before which call of what
    "a recorded step is logged": (folder.RunLog, "step", 3),
    "an evaluation": (train_command, "held_out_loss", 1),
    "an evaluation of a task": (Answerer, "evaluate", 3),
    "an evaluation is logged": (folder.RunLog, "evaluations", 1),
    "the weights are whole": (PreTrainedTokenizerBase, "save_pretrained", 0),
    "the new weights take their place": (files, "_exchange", 0),
    "the end is told": (folder, "as_json", 1),
}


def run(words: list[str], output: Path, moment: str | None = None) -> None:
    """Run the command, what it says added to `output`; be killed before `moment`, if there is."""
    if moment is not None:
        owner, name, count = MOMENTS[moment]
        work, calls = getattr(owner, name), iter(range(10**6))

        def armed(*args: Any, **options: Any) -> Any:
            if next(calls) == count:
                os.kill(os.getpid(), signal.SIGKILL)
            return work(*args, **options)

        setattr(owner, name, armed)
    with output.open("a", buffering=1) as file:
        sys.stdout = sys.stderr = file
        status = cli.main(words)
    os._exit(status)
