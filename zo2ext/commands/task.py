"""``zo2ext train --task`` and ``zo2ext eval --task``: train or evaluate a model on a task."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from zo2ext.commands.arguments import EvalTaskArguments, Keep, Objective, TrainTaskArguments
from zo2ext.commands.learning_rate import with_rate
from zo2ext.commands.run import check_first_loss, checkpoint_of, push, run_folder, train_in
from zo2ext.commands.session import config_of_run, memory_line, open_model, parallel_of
from zo2ext.config import ZOConfig, config_from
from zo2ext.engine.engine import ZOEngine
from zo2ext.errors import UserError
from zo2ext.parallel.micro_batches import (
    Batch,
    describe_ranks,
    printing_on_rank_0,
    slices_to_run,
)
from zo2ext.parallel.parallel import Parallel, reporting_errors
from zo2ext.runs.find_lr import RateCurve
from zo2ext.runs.folder import RunFolder, check_run_folder
from zo2ext.streaming.devices.select import make_device
from zo2ext.tasks import Kind, Task, get_task
from zo2ext.tasks.encoding import Encoded
from zo2ext.tasks.questions import TaskQuestions
from zo2ext.tasks.scoring import Answerer


@dataclass
class Results:
    """Metrics of a model, one row per evaluation."""

    metric: str
    rows: list[tuple[str, dict[str, dict[str, float]]]] = field(default_factory=list)
    truncated: dict[str, int] = field(default_factory=dict)

    def add(self, title: str, splits: dict[str, dict[str, float]]) -> None:
        """Add a row: metrics by name for each split."""
        self.rows.append((title, splits))

    def table(self) -> str:
        """Return the metrics in percent as text, one line per row."""
        names = list(self.rows[0][1]["test"])
        heads = [f"{split} {name}" for split in self.rows[0][1] for name in names]
        width = max(len(title) for title, _ in self.rows)
        lines = [" " * width + "".join(f"{head:>16}" for head in heads)]
        for title, splits in self.rows:
            values = [values[name] for values in splits.values() for name in names]
            lines.append(f"{title:<{width}}" + "".join(f"{v:>16.1%}" for v in values))
        return "\n".join(lines)


def evaluate_task(arguments: EvalTaskArguments) -> Results:
    """Run ``zo2ext eval --task``; see `EvalTaskArguments`.

    Returns:
        The printed metrics.
    """
    config = config_from(arguments)
    make_device(config.device)
    questions = TaskQuestions(arguments, config.seed)
    with _open(questions, config) as (model, zo):
        _describe(zo, questions)
        results = Results(questions.task.metric)
        _before_training(
            _Evaluator(zo, model, questions), results, lambda names, measure: measure()
        )
    print(results.table())
    return results


def train_task(arguments: TrainTaskArguments) -> Results | None:
    """Run ``zo2ext train --task``; see `TrainTaskArguments`.

    Returns:
        The printed metrics; None if the run was finished already.
    """
    parallel = parallel_of(arguments)
    with printing_on_rank_0(parallel), reporting_errors(parallel):
        arguments.check()
        config = config_of_run(arguments)
        make_device(config.device)
        objective_for(arguments.objective, get_task(arguments.task))
        check_run_folder(Path(arguments.out), "out")
        return _train(arguments, config, parallel)


def _train(
    arguments: TrainTaskArguments, config: ZOConfig, parallel: Parallel | None
) -> Results | None:
    questions = TaskQuestions(arguments, config.seed)
    results = Results(questions.task.metric)
    checkpoint = checkpoint_of(arguments)

    def batch_of(zo: ZOEngine, model: Any, step: int) -> Batch:
        return _batch(_Evaluator(zo, model, questions), arguments, step)

    def opened(config: ZOConfig) -> AbstractContextManager[tuple[Any, ZOEngine]]:
        return _open(questions, config, parallel, checkpoint)

    config, curve = with_rate(config, arguments, opened, batch_of, parallel)
    with opened(config) as (model, zo):
        _describe(zo, questions)
        with _run(zo, questions, arguments, checkpoint, curve) as run:
            if run.finished:
                return None
            evaluator = _Evaluator(zo, model, questions)
            _note_truncated(results, "training", questions.train)
            if zo.steps == 0:
                _before_training(evaluator, results, run.measure)
            batch, evaluate = (
                partial(_batch, evaluator, arguments),
                partial(evaluator.scores, "dev"),
            )
            scores = train_in(run, model, arguments, batch, evaluate, checkpoint)
            kept = _kept(scores) if arguments.keep == Keep.BEST else zo.steps
            if kept == zo.steps:
                _end(run, evaluator, results, scores)
                return results
    # The weights after an earlier step follow from the starting weights and the journal.
    print(f"step {kept} is the best on dev: its weights are rebuilt")
    del model, zo, evaluator, run
    with _open(questions, config, parallel) as (model, zo), _run(zo, questions, arguments) as run:
        run.replay(kept)
        _end(run, _Evaluator(zo, model, questions), results, scores)
    return results


class _Evaluator:
    """Evaluates the current weights."""

    def __init__(self, zo: ZOEngine, model: Any, questions: TaskQuestions) -> None:
        self.model, self.questions, self.parallel = model, questions, zo.parallel
        self.reports = zo.is_coordinator
        self.answerer = Answerer(model, questions.tokenizer, questions.task, zo.device)

    def scores(self, split: str, shots: int = 0) -> dict[str, float]:
        """Return the metrics of a split by their names in the log."""
        questions = self.questions
        examples = questions.with_shots(split) if shots else questions.asked[split]

        def progress(batches: Iterable[Any]) -> Iterable[Any]:
            bar: Iterable[Any] = tqdm(
                batches,
                desc=split,
                unit="batch",
                leave=False,
                dynamic_ncols=True,
                disable=None if self.reports else True,  # None: if not a terminal
            )
            return bar

        size = questions.arguments.eval_batch_size
        found = self.answerer.evaluate(examples, batch_size=size, progress=progress)
        names = _names(questions, split, shots)
        return dict(zip(names, found.values(), strict=True))


def _names(questions: TaskQuestions, split: str, shots: int = 0) -> tuple[str, ...]:
    """Return the names of a split's metrics in the log, such as "dev_accuracy"."""
    end = f"_{shots}_shots" if shots else ""
    return tuple(f"{split}_{metric}{end}" for metric in questions.task.metrics)


Measure = Callable[[Sequence[str], Callable[[], Mapping[str, float]]], Mapping[str, float]]


@torch.no_grad()
def _before_training(evaluator: _Evaluator, results: Results, measure: Measure) -> None:
    """Add the metrics without demonstrations and, if there are any, with them."""
    questions = evaluator.questions
    loss = float(evaluator.answerer.likelihood_loss(questions.asked["dev"][:1]))
    check_first_loss(questions.arguments.model, loss, "")
    for shots in dict.fromkeys((0, questions.arguments.shots)):
        title = f"{shots} in context" if shots else "zero-shot"
        for split in questions.asked:
            examples = questions.with_shots(split) if shots else questions.asked[split]
            _note_truncated(results, f"{title}, {split}", examples)
        results.add(
            title, {split: _metrics(evaluator, split, measure, shots) for split in questions.asked}
        )


def _metrics(
    evaluator: _Evaluator, split: str, measure: Measure, shots: int = 0
) -> dict[str, float]:
    """Return the metrics of a split by their own names, from the log if they are there."""
    names = _names(evaluator.questions, split, shots)
    found = measure(names, partial(evaluator.scores, split, shots))
    return dict(zip(evaluator.questions.task.metrics, (found[name] for name in names), strict=True))


def _note_truncated(results: Results, title: str, examples: list[Encoded]) -> None:
    count = sum(e.truncated for e in examples)
    results.truncated[title] = count
    if count:
        print(
            f"note    {title}: {count} of {len(examples)} prompts are too long and lose their "
            "beginning"
        )


def _batch(evaluator: _Evaluator, arguments: TrainTaskArguments, step: int) -> Batch:
    questions, answerer = evaluator.questions, evaluator.answerer
    batch = questions.batch(step, arguments.batch_size)
    tokens = sum(len(text.ids) for e in batch for text in e.candidates)
    objective = objective_for(arguments.objective, questions.task)
    loss: Callable[[Sequence[Encoded]], Any] = {
        Objective.LOSS: answerer.likelihood_loss,
        Objective.CHOICE: answerer.choice_loss,
        Objective.METRIC: answerer.metric_loss,
    }[objective]
    slices, factor = slices_to_run(len(batch), arguments.micro_batch, evaluator.parallel)
    parts = [batch[rows] for rows in slices]
    # A loss is a mean over answer tokens, or over examples.
    sizes = [_answer_tokens(p) if objective is Objective.LOSS else len(p) for p in parts]
    weights = [factor * size for size in sizes]
    return Batch([partial(loss, part) for part in parts], weights, tokens)


def _answer_tokens(examples: Sequence[Encoded]) -> int:
    return sum(e.candidates[e.example.correct[0]].answer for e in examples)


def _kept(scores: Sequence[tuple[int, float]]) -> int:
    """Return the number of steps with the best score on dev, the first of equals."""
    return max(((score, -step) for step, score in scores if step > 0))[1] * -1


def _end(
    run: RunFolder, evaluator: _Evaluator, results: Results, curve: Sequence[tuple[int, float]]
) -> None:
    """Test the current weights, and write the files of a finished run."""
    questions, kept = evaluator.questions, run.engine.steps
    found = {split: _metrics(evaluator, split, run.measure) for split in questions.asked}
    results.add(f"fine-tuned, {kept} steps", found)
    print(results.table())
    run.finish(
        questions.tokenizer,
        {
            "kept_step": kept,
            "model": questions.arguments.model,
            "task": questions.task.name,
            "metric": results.metric,
            "examples": dict(zip(("train", "dev", "test"), questions.counts, strict=True)),
            "results": dict(results.rows),
            "truncated": results.truncated,
            "notes": list(questions.notes),
        },
        curve,
    )
    push(run, questions.arguments.push_to_hub)


def _open(
    questions: TaskQuestions,
    config: ZOConfig,
    parallel: Parallel | None = None,
    checkpoint: Path | None = None,
) -> AbstractContextManager[tuple[Any, ZOEngine]]:
    source = questions.arguments.model if checkpoint is None else str(checkpoint)
    return open_model(
        source, questions.model_config, config, max_token=questions.max_token, parallel=parallel
    )


def _run(
    zo: ZOEngine,
    questions: TaskQuestions,
    arguments: TrainTaskArguments,
    checkpoint: Path | None = None,
    curve: RateCurve | None = None,
) -> RunFolder:
    return run_folder(
        zo,
        arguments,
        settings={
            "task": questions.task.name,
            "objective": objective_for(arguments.objective, questions.task),
            "max_length": questions.max_length,
            **{f"{name}_size": size for name, size in asdict(questions.sizes).items()},
        },
        data={"examples": questions.description},
        curve=curve,
        watched=_names(questions, "dev"),
        ending={"keep": arguments.keep},
        checkpoint=checkpoint,
    )


def _describe(zo: ZOEngine, questions: TaskQuestions) -> None:
    arguments, (train, dev, test) = questions.arguments, questions.counts
    print(
        f"model   {arguments.model}: {zo.trainable:,} weights, in {len(zo.layouts)} units\n"
        f"{memory_line(zo)}\n"
        f"task    {questions.task.title}: {train} examples to train on, {dev} dev, {test} test, "
        f"texts of {questions.max_length} tokens at most"
    )
    if isinstance(arguments, TrainTaskArguments):
        print(
            f"run     {arguments.steps} steps of {arguments.batch_size} examples, minimizing "
            f"{objective_for(arguments.objective, questions.task)}; lr {zo.config.lr:.3g}, "
            f"eps {zo.config.eps:g}, seed {zo.config.seed}{describe_ranks(zo.parallel)}"
        )
    for note in questions.notes:
        print(f"note    {note}")
    sys.stdout.flush()


def objective_for(asked: Objective | None, task: Task) -> Objective:
    """Return `asked`, or if it is None the objective that MeZO uses for `task`."""
    objective = asked or (Objective.CHOICE if task.kind is Kind.CLASSIFICATION else Objective.LOSS)
    if objective is Objective.CHOICE and task.kind is Kind.GENERATION:
        raise UserError(
            f"objective is 'choice', but answers of task {task.name} are free text; expected "
            "'loss' or 'metric'"
        )
    return objective
