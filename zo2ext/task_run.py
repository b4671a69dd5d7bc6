"""``zo2ext train --task`` and ``zo2ext eval --task``: a model on one of MeZO's tasks."""

from __future__ import annotations

import csv
import io
import json
import logging
import math
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

import zo2ext
from zo2ext import plots
from zo2ext.devices import make_device
from zo2ext.engine import ZOEngine, offload
from zo2ext.engine_options import METHOD, PLACE, EngineOptions, MethodOptions
from zo2ext.files import check_new_folder, folder_atomically, write_atomically
from zo2ext.memory import gib
from zo2ext.meter import Meter
from zo2ext.options import option
from zo2ext.pretrained import load_config, load_model, load_tokenizer, save
from zo2ext.tasks import TASKS, Example, Kind, Sizes, Task, get_task, readers
from zo2ext.tasks.encoding import Encoded, Encoder
from zo2ext.tasks.scoring import Answerer

LONGEST = 2048  # tokens that MeZO's models read
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
    after. The same command gives the same bits."""

    out: str = option(
        "New folder for the run. Gets final/ (weights and tokenizer), results.json, loss.csv, "
        "loss.png and arguments.json.",
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
        self.at_least({"steps": 1, "batch_size": 1, "eval_every": 1})
        self.objective_for(get_task(self.task))
        check_new_folder(Path(self.out), "out")


@dataclass
class Results:
    """Metrics of a model, a row for each way of asking it."""

    metric: str
    rows: list[tuple[str, dict[str, dict[str, float]]]] = field(default_factory=list)
    truncated: dict[str, int] = field(default_factory=dict)

    def table(self) -> str:
        """As text: a line a row, in percent."""
        names = list(self.rows[0][1]["test"])
        heads = [f"{split} {name}" for split in self.rows[0][1] for name in names]
        width = max(len(title) for title, _ in self.rows)
        lines = [" " * width + "".join(f"{head:>16}" for head in heads)]
        for title, splits in self.rows:
            values = [values[name] for values in splits.values() for name in names]
            lines.append(f"{title:<{width}}" + "".join(f"{v:>16.1%}" for v in values))
        return "\n".join(lines)


@dataclass
class Curve:
    """Losses of batches and metrics of dev over a run."""

    metric: str
    train: list[tuple[int, float]] = field(default_factory=list)  # (step, loss)
    dev: list[tuple[int, float]] = field(default_factory=list)  # (steps done, metric)

    def csv(self) -> bytes:
        """A line a step: the loss met in it, and the metric with the weights before it."""
        table = io.StringIO()
        writer = csv.writer(table, lineterminator="\n")
        writer.writerow(["step", "train_loss", f"dev_{self.metric}"])
        train, dev = dict(self.train), dict(self.dev)
        for step in sorted(train.keys() | dev.keys()):
            writer.writerow([step, train.get(step, ""), dev.get(step, "")])
        return table.getvalue().encode()

    def png(self) -> bytes:
        """Loss, and the metric on an axis of its own."""
        canvas, axes = plots.figure()
        losses = [(step, loss) for step, loss in self.train if math.isfinite(loss)]
        window = max(1, len(losses) // 50)
        means = plots.running_mean([loss for _, loss in losses], window)
        label = "training loss" + (f", mean of {window} steps" if window > 1 else "")
        lines = axes.plot([step for step, _ in losses], means, color="C0", lw=1.5, label=label)
        axes.set(xlabel="step", ylabel="loss")
        right = axes.twinx()
        lines += right.plot(*zip(*self.dev, strict=True), "o-", color="C1", lw=2)
        lines[-1].set_label(f"dev {self.metric}")
        right.set(ylabel=self.metric)
        right.yaxis.set_major_formatter("{x:.1%}")
        right.spines[["top"]].set_visible(False)
        canvas.legend(handles=lines, loc="outside upper center", ncols=2, frameon=False)
        return plots.png(canvas)


class TaskRun:
    """A task's data and a model's tokenizer, ready for the model.

    Raises:
        ValueError: The data or the tokenizer cannot be used, as the message says.
    """

    def __init__(self, arguments: EvalTaskArguments) -> None:
        arguments.check()
        self.arguments, self.task = arguments, get_task(arguments.task)
        self.model_config = load_config(arguments.model, max_length=1)
        self.tokenizer = load_tokenizer(arguments.model)
        sizes = arguments.sizes(self.task)
        data = readers.load(self.task, arguments.data, sizes, arguments.seed)
        if arguments.shots > len(data.train):
            raise ValueError(
                f"shots is {arguments.shots}, but there are {len(data.train)} training examples"
            )
        self.notes, self.counts = data.notes, (len(data.train), len(data.dev), len(data.test))
        self.max_length = self._max_length()
        self._encoder = Encoder(self.tokenizer, self.task, self.max_length)
        self._plain = {"dev": data.dev, "test": data.test}
        self._shots = data.train[: arguments.shots]
        self.train = self.encoded(data.train)
        self.asked = {name: self.encoded(examples) for name, examples in self._plain.items()}

    def encoded(self, examples: Iterable[Example], shots: Sequence[Example] = ()) -> list[Encoded]:
        return [self._encoder.encode(example, shots) for example in examples]

    def with_shots(self) -> dict[str, list[Encoded]]:
        """Dev and test with demonstrations in front of each prompt."""
        return {name: self.encoded(plain, self._shots) for name, plain in self._plain.items()}

    @property
    def max_token(self) -> int:
        """The largest token id of the data."""
        encoded = [*self.train, *(e for split in self.asked.values() for e in split)]
        return max(max(text.ids) for e in encoded for text in e.candidates)

    def batch(self, step: int, size: int) -> list[Encoded]:
        """Training examples of `step`: each once in a pass, in a new order in every pass."""
        count = len(self.train)
        chosen = []
        for position in range(step * size, (step + 1) * size):
            epoch, place = divmod(position, count)
            chosen.append(self.train[self._order(epoch)[place]])
        return chosen

    def _order(self, epoch: int) -> np.ndarray[Any, Any]:
        key = [self.arguments.seed, epoch + 1]
        return np.random.Generator(np.random.Philox(key=key)).permutation(len(self.train))

    def _max_length(self) -> int:
        context = getattr(self.model_config.get_text_config(), "max_position_embeddings", None)
        most = context if isinstance(context, int) else None
        asked = self.arguments.max_length
        if asked is not None and most is not None and asked > most:
            raise ValueError(
                f"max_length is {asked}, but model {self.arguments.model!r} reads at most {most}"
            )
        return asked or min(LONGEST, most or LONGEST)


def evaluate_task(arguments: EvalTaskArguments) -> Results:
    """Run ``zo2ext eval --task``; see `EvalTaskArguments`.

    Returns:
        The metrics that are printed.

    Raises:
        ValueError: An argument is wrong, or what it names cannot be used.
        OutOfDeviceMemory: With what takes how much.
    """
    run = TaskRun(arguments)
    model, trainable = _model(run)
    with offload(model, arguments.config(trainable)) as zo:
        _describe(zo, run, trainable)
        results = Results(run.task.metric)
        _before_training(_Judge(zo, model, run), run, results)
    print(results.table())
    return results


def train_task(arguments: TrainTaskArguments) -> Results:
    """Run ``zo2ext train --task``; see `TrainTaskArguments`.

    Returns:
        The metrics that are printed.

    Raises:
        ValueError: An argument is wrong, or what it names cannot be used. Nothing is written.
        OSError: `out` cannot be written. There is no ``final``, or a whole one.
        OutOfDeviceMemory: With what takes how much.
    """
    run, out = TaskRun(arguments), Path(arguments.out)
    model, trainable = _model(run)
    results, curve = Results(run.task.metric), Curve(run.task.metric)
    with offload(model, arguments.config(trainable)) as zo:
        _describe(zo, run, trainable)
        _note_truncated(results, "training", run.train)
        judge = _Judge(zo, model, run)
        _before_training(judge, run, results)
        try:
            _loop(zo, judge, run, arguments, curve, results)
        except KeyboardInterrupt:
            done = f"after {len(curve.train)} steps; weights are not saved"
            raise KeyboardInterrupt(done) from None
        scores = {name: judge(split, f"fine-tuned, {name}") for name, split in run.asked.items()}
        results.rows.append((f"fine-tuned, {arguments.steps} steps", scores))
        curve.dev.append((arguments.steps, scores["dev"][run.task.metric]))
        with folder_atomically(out / "final") as folder:
            save(model, run.tokenizer, folder)
        skipped = zo.skipped
    write_atomically(out / "loss.csv", curve.csv())
    if plots.available():
        write_atomically(out / "loss.png", curve.png())
    write_atomically(out / "results.json", _as_json(run, results, skipped))
    _report(results, out, skipped, arguments.steps)
    return results


class _Judge:
    """Evaluates the model as it is now."""

    def __init__(self, zo: ZOEngine, model: Any, run: TaskRun) -> None:
        self.answerer = Answerer(model, run.tokenizer, run.task, zo.device)
        self._batch_size = run.arguments.eval_batch_size

    def __call__(self, examples: list[Encoded], title: str) -> dict[str, float]:
        def progress(batches: Iterable[Any]) -> Iterable[Any]:
            bar: Iterable[Any] = tqdm(
                batches, desc=title, unit="batch", leave=False, dynamic_ncols=True
            )
            return bar

        return self.answerer.evaluate(examples, batch_size=self._batch_size, progress=progress)


@torch.no_grad()
def _before_training(judge: _Judge, run: TaskRun, results: Results) -> None:
    """Zero-shot, and with demonstrations where there are any."""
    loss = float(judge.answerer.likelihood_loss(run.asked["dev"][:1]))
    if not math.isfinite(loss):
        raise ValueError(
            f"model {run.arguments.model!r} has a loss of {loss} before any training: its weights, "
            "or their dtype, are of no use here"
        )
    shots = run.arguments.shots
    settings = [("zero-shot", run.asked)]
    if shots:
        settings.append((f"{shots} in context", run.with_shots()))
    for title, splits in settings:
        for name, split in splits.items():
            _note_truncated(results, f"{title}, {name}", split)
        scores = {name: judge(split, f"{title}, {name}") for name, split in splits.items()}
        results.rows.append((title, scores))


def _note_truncated(results: Results, title: str, examples: list[Encoded]) -> None:
    count = sum(e.truncated for e in examples)
    results.truncated[title] = count
    if count:
        print(
            f"note    {title}: {count} of {len(examples)} prompts are longer than the model reads "
            "and lose their beginning"
        )


def _loop(
    zo: ZOEngine,
    judge: _Judge,
    run: TaskRun,
    arguments: TrainTaskArguments,
    curve: Curve,
    results: Results,
) -> None:
    meter, out, metric = Meter(zo.device), Path(arguments.out), run.task.metric
    minimised = _minimised(judge.answerer, arguments.objective_for(run.task))
    curve.dev.append((0, results.rows[0][1]["dev"][metric]))
    with (
        logging_redirect_tqdm([logging.getLogger("zo2ext")]),
        tqdm(total=arguments.steps, unit="step", dynamic_ncols=True) as bar,
    ):
        for step in range(arguments.steps):
            batch = run.batch(step, arguments.batch_size)
            tokens = sum(len(text.ids) for e in batch for text in e.candidates)
            with meter.measure(tokens):
                loss = zo.step(lambda: minimised(batch))
            if step == 0:  # it fits, so there is a run
                out.mkdir(parents=True, exist_ok=True)
                write_atomically(out / "arguments.json", _settings(zo, run, arguments))
            curve.train.append((step, loss))
            bar.set_postfix_str(f"loss {loss:.3f}, {meter}", refresh=False)
            bar.update()
            if (step + 1) % arguments.eval_every == 0 and step + 1 < arguments.steps:
                score = judge(run.asked["dev"], "dev")[metric]
                curve.dev.append((step + 1, score))
                tqdm.write(f"step {step + 1:>6}: dev {metric} {score:.1%}")
                write_atomically(out / "loss.csv", curve.csv())


def _minimised(answerer: Answerer, objective: Objective) -> Callable[[Sequence[Encoded]], Any]:
    match objective:
        case Objective.LOSS:
            return answerer.likelihood_loss
        case Objective.CHOICE:
            return answerer.choice_loss
        case Objective.METRIC:
            return answerer.metric_loss


def _model(run: TaskRun) -> tuple[Any, int]:
    model = load_model(run.arguments.model, run.model_config, max_token=run.max_token)
    return model, sum(p.numel() for p in model.parameters() if p.requires_grad)


def _describe(zo: ZOEngine, run: TaskRun, trainable: int) -> None:
    arguments, (train, dev, test) = run.arguments, run.counts
    print(
        f"model   {arguments.model}: {trainable:,} weights, in {len(zo.layouts)} units\n"
        f"memory  {gib(zo.host_nbytes)} of weights on the host, "
        f"{gib(zo.device_nbytes)} of buffers on {arguments.device or zo.device}\n"
        f"task    {run.task.title}: {train} examples to train on, {dev} dev, {test} test, "
        f"texts of {run.max_length} tokens at most"
    )
    if isinstance(arguments, TrainTaskArguments):
        print(
            f"run     {arguments.steps} steps of {arguments.batch_size} examples, minimising "
            f"{arguments.objective_for(run.task)}; lr {zo.config.lr:.3g}, eps {arguments.eps:g}, "
            f"seed {arguments.seed}"
        )
    for note in run.notes:
        print(f"note    {note}")
    sys.stdout.flush()


def _settings(zo: ZOEngine, run: TaskRun, arguments: TrainTaskArguments) -> bytes:
    """What was asked for, and what the defaults came to, as JSON."""
    settings = asdict(arguments) | {
        "task": run.task.name,
        "lr": zo.config.lr,
        "objective": arguments.objective_for(run.task),
        "max_length": run.max_length,
        "device": arguments.device or zo.device.type,
    }
    return _json({"zo2ext": zo2ext.__version__, **settings})


def _as_json(run: TaskRun, results: Results, skipped: int) -> bytes:
    return _json(
        {
            "zo2ext": zo2ext.__version__,
            "model": run.arguments.model,
            "task": run.task.name,
            "metric": results.metric,
            "examples": dict(zip(("train", "dev", "test"), run.counts, strict=True)),
            "results": dict(results.rows),
            "truncated": results.truncated,
            "notes": list(run.notes),
            "skipped_steps": skipped,
        }
    )


def _json(value: dict[str, Any]) -> bytes:
    return json.dumps(value, indent=2).encode() + b"\n"


def _report(results: Results, out: Path, skipped: int, steps: int) -> None:
    print(results.table())
    print(f"weights and tokenizer: {out / 'final'}\nresults: {out / 'results.json'}")
    print(f"loss curve: {out / 'loss.csv'}", end="")
    print(f", {out / 'loss.png'}" if plots.available() else f" ({plots.HOW_TO_GET})")
    if skipped:
        print(
            f"warning: {skipped} of {steps} steps were skipped, as their losses were not finite; "
            "a lower lr may help",
            file=sys.stderr,
        )
