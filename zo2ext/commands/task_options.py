"""Options of ``zo2ext train --task`` and ``zo2ext eval --task``."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from enum import StrEnum
from pathlib import Path

from zo2ext.commands.engine_options import METHOD, PLACE, EngineOptions, MethodOptions
from zo2ext.commands.options import option
from zo2ext.runs.run import check_run_folder
from zo2ext.streaming.devices.select import make_device
from zo2ext.tasks import TASKS, Kind, Sizes, Task, get_task

DATA = "data"  # heading of options


class Objective(StrEnum):
    """What training minimises.

    loss: cross-entropy of the right answer's tokens.
    choice: cross-entropy of the right candidate among all, by their scores.
    metric: minus accuracy, or minus F1, of the batch; it has no gradient.
    """

    LOSS = "loss"
    CHOICE = "choice"
    METRIC = "metric"


class Keep(StrEnum):
    """Which weights of a run are kept."""

    BEST = "best"
    LAST = "last"


@dataclass(frozen=True, kw_only=True)
class EvalTaskArguments(EngineOptions):
    """Judge a causal language model on a task, as it is and with solved examples in its prompt."""

    model: str = option("Model folder, or its name on the Hugging Face hub.", group="required")
    task: str = option(f"One of {', '.join(TASKS)}.", group="required")
    data: str | None = option(
        "Folder of local files: train.jsonl and validation.jsonl, or .txt in the raw form of SST-2 "
        "and TREC. Default: the task's data on the Hugging Face hub.",
        None,
        group=DATA,
    )
    train_size: int | None = option(
        "Examples to train on, and to draw demonstrations from. Default: 1000.", None, group=DATA
    )
    dev_size: int | None = option(
        "Examples, from the same split, to watch. Default: 500; 100 for small tasks.",
        None,
        group=DATA,
    )
    test_size: int | None = option("Examples to test on. Default: 1000.", None, group=DATA)
    shots: int = option(
        "Solved examples in the prompt, for a second evaluation before training.", 0, group=DATA
    )
    max_length: int | None = option(
        "Tokens of a text; longer ones lose their beginning. Default: what the model reads, 2048 "
        "at most.",
        None,
        group=METHOD,
    )
    eval_batch_size: int = option(
        "Texts in a batch of an evaluation; a question has one a candidate.", 32, group=PLACE
    )

    def sizes(self, task: Task) -> Sizes:
        """Examples of each kind: what was asked for, the task's own elsewhere."""
        asked = {"train": self.train_size, "dev": self.dev_size, "test": self.test_size}
        given = {name: size for name, size in asked.items() if size is not None}
        return Sizes(**{**asdict(task.sizes), **given})

    def check(self) -> None:
        """Refuse wrong values before anything is loaded.

        Raises:
            ValueError: Naming the argument and what it got.
        """
        get_task(self.task)
        least = {"train_size": 1, "dev_size": 1, "test_size": 1, "shots": 0, "max_length": 2}
        self.at_least({**least, "eval_batch_size": 1})
        self.config(trainable=1)
        make_device(self.device)
        if self.data is not None and not Path(self.data).is_dir():
            raise ValueError(f"data is {self.data!r}, which is no folder")


@dataclass(frozen=True, kw_only=True)
class TrainTaskArguments(EvalTaskArguments, MethodOptions):
    """Fine-tune a causal language model on a task, by forward passes alone, and judge it before and
    after. The same command gives the same bits; given again after it was stopped, it continues."""

    out: str = option(
        "Folder for the run, new or of this very run, which then continues. Gets final/ (weights "
        "and tokenizer), journal.zo2, results.json, loss.csv, loss.png and more.",
        group="required",
    )
    objective: Objective | None = option(
        "What is minimised: loss, cross-entropy of the right answer's tokens; choice, of the right "
        "candidate among all; metric, minus accuracy or F1. Default, as MeZO: choice where the "
        "candidates are classes, otherwise loss.",
        None,
        group=METHOD,
    )
    batch_size: int = option("Examples in a batch.", 16, group=METHOD)
    eval_every: int = option("Steps between evaluations on dev.", 100, group=METHOD)
    keep: Keep = option(
        "Which weights are tested and saved: best, those that did best on dev, as MeZO does (the "
        "first of equals); or last.",
        Keep.BEST,
        group=METHOD,
    )

    def objective_for(self, task: Task) -> Objective:
        """What is minimised; where nothing was asked for, what MeZO minimises for `task`."""
        objective = self.objective or (
            Objective.CHOICE if task.kind is Kind.CLASSIFICATION else Objective.LOSS
        )
        if objective is Objective.CHOICE and task.kind is Kind.GENERATION:
            raise ValueError(
                f"objective is 'choice', but task {task.name} is answered in free text; "
                "expected 'loss' or 'metric'"
            )
        return objective

    def check(self) -> None:
        super().check()
        self.at_least({"steps": 1, "batch_size": 1, "eval_every": 1, "micro_batch": 1})
        self.objective_for(get_task(self.task))
        check_run_folder(Path(self.out), "out")
