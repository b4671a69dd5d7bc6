"""The options of every command. Nothing here imports torch, so wrong options fail at once."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from enum import StrEnum
from pathlib import Path
from typing import Any

from zo2ext.commands.options import REQUIRED, option
from zo2ext.config import METHOD, PLACE, PRESETS, STORAGE_FORMATS, RankSettings, inherit_settings
from zo2ext.demo.task import REVIEWS as REVIEWS  # the import adds it to TASKS
from zo2ext.errors import UserError
from zo2ext.tasks.table import TASKS

DATA, PROMPTS, SAMPLING, TRAINER = "data", "prompts", "sampling", "schedule and checkpoints"
ROWS = "rows"
HARDWARE = "hardware that is predicted for"

MODEL = "Model folder, or its name on the Hugging Face hub."
OUT = (
    "Folder of the run: new, or of the same run, which then continues. It gets final/ (weights and "
    "tokenizer), journal.zo2, results.json, steps.csv, loss.png and more."
)
COMPILE = (
    "Compile the blocks with torch.compile: faster where the host limits the speed, a minute "
    "slower to start, and losses differ in their last bits."
)
DTYPES = ("fp32", "bf16", "fp16")
SCHEDULES = ("constant", "linear", "cosine", "polynomial", "inverse_sqrt", "constant_with_warmup")
_STREAMING = ("device", "granularity", "slots", "resident", "store", "host_memory")


class Objective(StrEnum):
    """Quantity that training on a task minimizes.

    loss: cross-entropy of the right answer's tokens.
    choice: cross-entropy of the right candidate among all, by their scores.
    metric: minus accuracy, or minus F1, of the batch; it has no gradient.
    """

    LOSS = "loss"
    CHOICE = "choice"
    METRIC = "metric"


class Keep(StrEnum):
    """Weights of a run that are tested and saved."""

    BEST = "best"
    LAST = "last"


class Checked:
    """A dataclass of options with lower bounds.

    Attributes:
        least: Smallest valid value of an option, by name; None is always valid.
    """

    least: dict[str, int]

    def check(self) -> None:
        """Check the values before anything is loaded.

        Raises:
            ValueError: An option is invalid; the message names it and its value.
        """
        for entry in fields(self):  # type: ignore[arg-type]
            bound, value = self.least.get(entry.name), getattr(self, entry.name)
            if bound is not None and value is not None and value < bound:
                raise UserError(f"{entry.name} must be at least {bound}, got {value}")


def _check_file(name: str, value: str) -> None:
    if not Path(value).is_file():
        raise UserError(f"{name} is {value!r}, which is not a file")


@dataclass(kw_only=True)
class TrainOptions(RankSettings, Checked):
    """Options that training on a text and training on a task share."""

    steps: int = option("Steps to train.", 600, group=METHOD)
    preset: str | None = option(
        "Settings of a published method, which other options override: mezo, fzoo (8 directions, "
        "normalized, rademacher), es (30 directions, normalized), lozo (rank 2, factors folded in "
        "every 50 steps) or eggroll (rank 1, 32 directions, normalized). Default: none.",
        None,
        group=METHOD,
        choices=tuple(PRESETS),
    )
    micro_batch: int | None = option(
        "Windows or examples per forward pass. If set, results are the same for any number of "
        "processes. Default: the batch divided by the processes that share it.",
        None,
        group=METHOD,
    )
    lr_scheduler_type: str = option(
        "How the learning rate changes over the steps.",
        "constant",
        group=TRAINER,
        choices=SCHEDULES,
    )
    warmup_steps: float = option(
        "Steps in which the learning rate rises from 0; a fraction of all steps if below 1.",
        0.0,
        group=TRAINER,
    )
    bf16: bool = option("Run the forward passes under bfloat16 autocast.", False, group=METHOD)
    save_every: int | None = option(
        "Steps between checkpoints. Default: none; the journal alone rebuilds any step.",
        None,
        group=TRAINER,
    )
    save_total_limit: int | None = option(
        "Number of newest checkpoints to keep. Default: all.", None, group=TRAINER
    )
    overwrite: bool = option(
        "Begin a new run in --out, and keep the journal of the former one beside it, as "
        "journal.zo2.before-1. Default: continue the run that is there.",
        False,
        group=TRAINER,
    )
    early_stopping: int | None = option(
        "Stop after this many evaluations in a row without a better score. Default: never.",
        None,
        group=TRAINER,
    )
    report_to: list[str] | None = option(
        "Trackers that receive the run's metrics: tensorboard, wandb, mlflow, ... Default: none.",
        None,
        group=TRAINER,
    )
    push_to_hub: str | None = option(
        "Repository on the Hugging Face hub to upload the final weights to. Default: none.",
        None,
        group=TRAINER,
    )


@dataclass(kw_only=True)
@inherit_settings()
class TrainArguments(TrainOptions):
    """Fine-tune a causal language model on a text with forward passes only. The same command gives
    the same bits; run again after a stop, it continues. With --data FILE it trains on rows, such as
    JSONL of prompts and completions or of chats, and with --task NAME on a task; for their options:
    zo2ext train --data FILE --help, zo2ext train --task NAME --help."""

    model: str = option(MODEL, group=REQUIRED)
    text: str = option("UTF-8 text file. Its last tenth is held out.", group=REQUIRED)
    out: str = option(OUT, group=REQUIRED)
    validation: str | None = option(
        "UTF-8 text file to evaluate on. Default: the last tenth of --text.", None, group=METHOD
    )
    batch_size: int = option("Windows per batch.", 8, group=METHOD)
    seq_len: int = option("Tokens per window.", 128, group=METHOD)
    compile: bool = option(COMPILE, False, group=METHOD)
    eval_every: int = option("Steps between evaluations on the held-out text.", 100, group=METHOD)
    eval_windows: int = option(
        "Held-out windows to evaluate on, evenly spread; all if there are fewer.",
        1000,
        group=METHOD,
    )

    least = {  # noqa: RUF012
        **{"steps": 1, "batch_size": 1, "seq_len": 2, "eval_every": 1, "eval_windows": 1},
        **{"micro_batch": 1, "save_every": 1, "save_total_limit": 1, "early_stopping": 1},
        "warmup_steps": 0,
    }

    def check(self) -> None:
        super().check()
        _check_file("text", self.text)
        if self.validation is not None:
            _check_file("validation", self.validation)


@dataclass(kw_only=True)
@inherit_settings(*_STREAMING, "storage")
class EvalTextArguments(Checked):
    """Print the loss of a causal language model on the last tenth of a text, as zo2ext train
    reports it. With --data FILE it evaluates rows, with --task NAME a task; for their options:
    zo2ext eval --data FILE --help, zo2ext eval --task NAME --help."""

    model: str = option(MODEL, group=REQUIRED)
    text: str = option("UTF-8 text file. Its last tenth is read.", group=REQUIRED)
    seq_len: int = option("Tokens per window.", 128, group=METHOD)
    eval_windows: int = option(
        "Windows to evaluate on, evenly spread; all if there are fewer.", 1000, group=METHOD
    )
    batch_size: int = option(
        "Windows per batch, which share each load of the weights.", 8, group=PLACE
    )

    least = {"batch_size": 1, "seq_len": 2, "eval_windows": 1}  # noqa: RUF012

    def check(self) -> None:
        super().check()
        _check_file("text", self.text)


@dataclass(kw_only=True)
class RowOptions(Checked):
    """Options that training and evaluation on rows share."""

    model: str = option(MODEL, group=REQUIRED)
    data: str = option(
        "Rows: a .jsonl, .json, .csv, .tsv or .parquet file, a folder of them, or the name of a "
        "data set on the Hugging Face hub. Columns are recognized by their names: messages (the "
        "tokenizer's chat template), prompt and completion, or text.",
        group=REQUIRED,
    )
    split: str = option(
        'Split of --data; a file has only train. "train[:1000]" is its first 1000 rows.',
        "train",
        group=ROWS,
    )
    subset: str | None = option(
        "Configuration of a data set on the hub that has several. Default: its only one.",
        None,
        group=ROWS,
    )
    text_column: str | None = option(
        "Column of texts, all of whose tokens count in the loss. Default: text.", None, group=ROWS
    )
    prompt_column: str | None = option(
        "Column of prompts, as text or as messages. Default: prompt.", None, group=ROWS
    )
    completion_column: str | None = option(
        "Column of completions, as text or as messages; only their tokens count. Default: "
        "completion.",
        None,
        group=ROWS,
    )
    messages_column: str | None = option(
        "Column of chats, of which only the assistant's turns count. Default: messages.",
        None,
        group=ROWS,
    )
    train_on_prompt: bool = option(
        "Count all tokens in the loss, not only those of answers.", False, group=ROWS
    )
    seq_len: int | None = option(
        "Tokens per row; longer rows lose their end. Default: the model's maximum, at most 1024.",
        None,
        group=METHOD,
    )

    least = {"seq_len": 2, "batch_size": 1, "eval_rows": 1}  # noqa: RUF012

    def check(self) -> None:
        super().check()
        kinds = [
            self.text_column,
            self.prompt_column or self.completion_column,
            self.messages_column,
        ]
        if sum(kind is not None for kind in kinds) > 1:
            raise UserError(
                "expected columns of one kind, got several: name messages_column, or prompt_column "
                "and completion_column, or text_column"
            )


@dataclass(kw_only=True)
@inherit_settings(*_STREAMING, "storage")
class EvalRowsArguments(RowOptions):
    """Print the loss of a causal language model on rows, such as JSONL of prompts and completions
    or of chats, and its perplexity, per token of the answers."""

    eval_rows: int | None = option(
        "Rows to evaluate on, evenly spread. Default: all.", None, group=METHOD
    )
    json: bool = option("Print one JSON object.", False, group=ROWS)
    batch_size: int = option(
        "Rows per batch, which share each load of the weights.", 8, group=PLACE
    )


@dataclass(kw_only=True)
@inherit_settings()
class TrainRowsArguments(RowOptions, TrainOptions):
    """Fine-tune a causal language model on rows, such as JSONL of prompts and completions or of
    chats, with forward passes only. Answers count in the loss, prompts do not. The same command
    gives the same bits; run again after a stop, it continues."""

    out: str = option(OUT, group=REQUIRED)
    validation: str | None = option(
        "Rows to evaluate on: a file, a folder or a data set, as --data. Default: the last tenth "
        "of --data, unless there is a --validation-split.",
        None,
        group=ROWS,
    )
    validation_split: str | None = option(
        "Split of --validation, or of --data without it. Default: train of --validation.",
        None,
        group=ROWS,
    )
    packing: bool = option(
        "Join the rows to train on into windows of --seq-len tokens, in which a row sees the ones "
        "before it, and nothing is cut off.",
        False,
        group=ROWS,
    )
    batch_size: int = option("Rows, or windows with --packing, per batch.", 8, group=METHOD)
    compile: bool = option(COMPILE, False, group=METHOD)
    eval_every: int = option("Steps between evaluations on the held-out rows.", 100, group=METHOD)
    eval_rows: int = option(
        "Held-out rows to evaluate on, evenly spread; all if there are fewer.", 1000, group=METHOD
    )

    least = {**TrainArguments.least, **RowOptions.least}  # noqa: RUF012


@dataclass(kw_only=True)
class TaskOptions(Checked):
    """Options that training and evaluation on a task share."""

    model: str = option(MODEL, group=REQUIRED)
    task: str = option(f"One of {', '.join(TASKS)}.", group=REQUIRED)
    data: str | None = option(
        "Folder of local files: train.jsonl and validation.jsonl, or .txt in the raw form of SST-2 "
        "and TREC. Default: the task's data on the Hugging Face hub.",
        None,
        group=DATA,
    )
    train_size: int | None = option(
        "Examples to train on and to select demonstrations from. Default: 1000.", None, group=DATA
    )
    dev_size: int | None = option(
        "Examples, from the same split, to evaluate on while training. Default: 500; 100 for small "
        "tasks.",
        None,
        group=DATA,
    )
    test_size: int | None = option("Examples to test on. Default: 1000.", None, group=DATA)
    shots: int = option(
        "Demonstrations in the prompt, for a second evaluation before training.", 0, group=DATA
    )
    max_length: int | None = option(
        "Tokens per text; longer texts lose their beginning. Default: the model's maximum, at "
        "most 2048.",
        None,
        group=METHOD,
    )
    eval_batch_size: int = option(
        "Texts per batch of an evaluation; a question has one per candidate.", 32, group=PLACE
    )

    least = {  # noqa: RUF012
        **{"train_size": 1, "dev_size": 1, "test_size": 1, "shots": 0, "max_length": 2},
        "eval_batch_size": 1,
    }

    def check(self) -> None:
        super().check()
        if self.data is not None and not Path(self.data).is_dir():
            raise UserError(f"data is {self.data!r}, which is not a directory")


@dataclass(kw_only=True)
@inherit_settings(*_STREAMING, "storage", "compute_dtype", "seed")
class EvalTaskArguments(TaskOptions):
    """Print the metrics of a causal language model on a task, zero-shot and with demonstrations."""


@dataclass(kw_only=True)
@inherit_settings()
class TrainTaskArguments(TaskOptions, TrainOptions):
    """Fine-tune a causal language model on a task with forward passes only, and evaluate it before
    and after. The same command gives the same bits; run again after a stop, it continues."""

    out: str = option(OUT, group=REQUIRED)
    objective: Objective | None = option(
        "Quantity to minimize: loss, cross-entropy of the right answer's tokens; choice, of the "
        "right candidate among all; metric, minus accuracy or F1. Default, as in MeZO: choice if "
        "the candidates are classes, otherwise loss.",
        None,
        group=METHOD,
    )
    batch_size: int = option("Examples per batch.", 16, group=METHOD)
    eval_every: int = option("Steps between evaluations on dev.", 100, group=METHOD)
    keep: Keep = option(
        "Weights to test and save: best, the best on dev as in MeZO (the first of equals); or "
        "last.",
        Keep.BEST,
        group=METHOD,
    )

    least = {**TaskOptions.least, **TrainArguments.least}  # noqa: RUF012


@dataclass(kw_only=True)
@inherit_settings(*_STREAMING, "storage")
class GenerateArguments(Checked):
    """Complete prompts with a causal language model that need not fit the device: its weights are
    streamed, and all prompts of a batch share each load."""

    model: str = option(MODEL, group=REQUIRED)
    prompt: list[str] | None = option(
        "Texts to complete. Default: those of --prompts.", None, group=PROMPTS
    )
    prompts: str | None = option(
        "UTF-8 text file of prompts, one per line; blank lines are skipped; - reads standard "
        "input. Default: those of --prompt.",
        None,
        group=PROMPTS,
    )
    chat: bool = option(
        "Use each prompt as a user's message in the tokenizer's chat template.",
        False,
        group=PROMPTS,
    )
    max_new_tokens: int = option("Maximum number of new tokens per prompt.", 64, group=PROMPTS)
    temperature: float | None = option(
        "Sample at this temperature. Default: 1 with --top-p or --top-k; without any of the three, "
        "greedy decoding.",
        None,
        group=SAMPLING,
    )
    top_p: float | None = option(
        "Sample from the most likely tokens with this total probability. Default: from all.",
        None,
        group=SAMPLING,
    )
    top_k: int | None = option(
        "Sample from this many of the most likely tokens. Default: from all.", None, group=SAMPLING
    )
    seed: int = option("Seed of the sampling.", 0, group=SAMPLING)
    batch_size: int = option(
        "Prompts per batch; they share each load of the weights and the memory for caches.",
        8,
        group=PLACE,
    )

    least = {"max_new_tokens": 1, "batch_size": 1, "top_k": 1, "seed": 0}  # noqa: RUF012

    def check(self) -> None:
        super().check()
        if self.temperature is not None and not 0 < self.temperature < float("inf"):
            raise UserError(f"temperature must be above 0 and finite, got {self.temperature}")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise UserError(f"top_p must be above 0 and at most 1, got {self.top_p}")
        if (self.prompt is None) == (self.prompts is None):
            found = "neither" if self.prompt is None else "both"
            raise UserError(f"expected either prompt or prompts, got {found}")

    def sampling(self) -> dict[str, Any]:
        """Return all sampling arguments of transformers' ``generate``."""
        if self.temperature is self.top_p is self.top_k is None:
            return {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
        return {
            "do_sample": True,
            "temperature": 1.0 if self.temperature is None else self.temperature,
            "top_p": 1.0 if self.top_p is None else self.top_p,
            "top_k": self.top_k or 0,
        }


@dataclass(kw_only=True)
@inherit_settings("seed", "device")
class DemoArguments(Checked):
    """Fine-tune the packaged language model on the task reviews, with forward passes only: does the
    writer of a review recommend the product? No download; a minute on two cores."""

    out: str = option("Folder of the run: new, or of the same run.", "demo-run")
    steps: int = option("Steps to train; each is two forward passes.", 400)

    least = {"steps": 1}  # noqa: RUF012


@dataclass
class ReportArguments:
    """Write a page of pictures and numbers of a run, for any browser, and the pictures as PNG."""

    run: str = option(
        "Folder of a run: --out of zo2ext train, or the output folder of a ZOTrainer.",
        group=REQUIRED,
        first=True,
    )
    out: str | None = option("Folder of the report. Default: report in the run's folder.", None)


@dataclass(kw_only=True)
@inherit_settings("device")
class RebuildArguments:
    """Options of commands that rebuild weights from base weights and a journal."""

    run: str = option("Folder of the run, or its journal.", group=REQUIRED, first=True)
    step: int | None = option(
        "Number of steps after which to rebuild the weights. Default: all.", None
    )
    model: str | None = option(
        "Folder or hub name of the base weights. Default: as recorded in the run.", None
    )


@dataclass(kw_only=True)
class ExportArguments(RebuildArguments):
    """Rebuild the weights after any step of a run as an ordinary checkpoint, from base weights and
    journal, unit by unit."""

    out: str = option("New folder of the checkpoint.", group=REQUIRED)
    dtype: str | None = option(
        "Dtype of the exported weights, rounded to nearest. Default: the model's compute dtype.",
        None,
        choices=DTYPES,
    )


@dataclass(kw_only=True)
class VerifyArguments(RebuildArguments):
    """Check a run's journal, and optionally a checkpoint, bit for bit, against base weights and
    journal."""

    checkpoint: str | None = option(
        "Folder to compare with the run's weights. Default: only the journal is checked.", None
    )
    repair: bool = option(
        "Cut a damaged journal after its last intact step. The original is kept with .damaged "
        "appended to its name.",
        False,
    )


@dataclass(kw_only=True)
@inherit_settings("device", "rank")
class CheckArguments(Checked):
    """Compare two training steps of a model on the engine with plain forward passes in memory, bit
    for bit, in float32: streamed and resident, by block and by module. With a rank, compare them
    with each other, and list what is made dense."""

    model: str = option(MODEL, group=REQUIRED, first=True)
    tiny: bool = option(
        "Check a tiny random model of the same architecture; only the config is read.", False
    )
    kind: str = option(
        "Purpose of the model.", "causal", choices=("causal", "classification", "seq2seq")
    )
    attention: str | None = option(
        "Implementation of attention. Default: the model's own.", None, choices=("eager", "sdpa")
    )
    seq_len: int = option("Tokens per row; each batch has two rows.", 12)

    least = {"seq_len": 2}  # noqa: RUF012


@dataclass(kw_only=True)
@inherit_settings("directions", "estimator", "rank", "write_back", "slots", "resident", "device")
class PlanArguments(Checked):
    """Predict memory and speed of a model before its weights are downloaded or loaded, on this
    machine or on hardware that is not here."""

    model: str = option(MODEL, group=REQUIRED)
    batch_size: int = option("Windows per batch.", 1)
    seq_len: int = option("Tokens per window, at most what the model reads.", 2048)
    storage: str = option(
        "Storage format that the recommendation and --ranks assume.",
        "bf16",
        choices=STORAGE_FORMATS,
    )
    gpu: str | None = option(
        'GPU to predict for without having it, such as "RTX 4090" or H200. Default: this machine, '
        "which is measured.",
        None,
        group=HARDWARE,
    )
    upload: float | None = option(
        "GB/s from page-locked host memory to the GPU. Default: as of --gpu, or measured.",
        None,
        group=HARDWARE,
    )
    download: float | None = option(
        "GB/s from the GPU to the host. Default: as --upload.", None, group=HARDWARE
    )
    matmul: float | None = option(
        "TFLOP/s of matrix products in 16 bits. Without --gpu, what is not given is that of the "
        "known GPU nearest in this. Default: as of --gpu, or measured.",
        None,
        group=HARDWARE,
    )
    gpu_memory: float | None = option(
        "GiB of GPU memory. Default: as of --gpu, or of this machine.", None, group=HARDWARE
    )
    ram: float | None = option(
        "GiB of host memory. Default: this machine's, unless other hardware is named.",
        None,
        group=HARDWARE,
    )
    ranks: int = option("Predict runs on 1, 2, 4, ... up to this many GPUs of one host.", 1)
    link: float | None = option(
        "GB/s from one GPU to the others, for --ranks: 450 is NVLink of the H100. Default: none; "
        "every rank uploads all weights.",
        None,
    )

    least = {"batch_size": 1, "seq_len": 1, "ranks": 1}  # noqa: RUF012

    def check(self) -> None:
        super().check()
        for name in ("link", "upload", "download", "matmul", "gpu_memory", "ram"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise UserError(f"{name} must be above 0 and finite, got {value}")
        if self.gpu is None and self.matmul is None and self.upload is not None:
            raise UserError(
                "upload is given without gpu or matmul: name the GPU, or give upload, matmul and "
                "gpu_memory"
            )


@dataclass
class InfoArguments:
    """Print versions, how zo2ext was built, and the devices of this machine with their rates."""
