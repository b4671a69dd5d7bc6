"""The folder of a training run, and the loop that fills it and continues where it was left.

Every step is in the folder's journal before it reaches a weight. A run that is given again passes
over its steps from the first: one that is recorded computes nothing, an evaluation that is logged
is not repeated, and whatever is missing is made. So there is one way through a run, new or not.
"""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from zo2ext._files import check_new_folder, remove_halves, write_atomically
from zo2ext._version import __version__
from zo2ext.engine.engine import ZOEngine
from zo2ext.journal.journal import JOURNAL_FILE
from zo2ext.parallel.micro_batches import Batch
from zo2ext.parallel.parallel import rank_and_world_size
from zo2ext.runs import plots
from zo2ext.runs.curve import Curve
from zo2ext.runs.log import RunLog
from zo2ext.runs.meter import Meter
from zo2ext.runs.names import ARGUMENTS_FILE
from zo2ext.runs.timeline import TRACE_FILE, StepTimeline

RESULTS_FILE = "results.json"
CURVE_FILE, PICTURE_FILE, FINAL = "loss.csv", "loss.png", "final"
TIMELINE_STEP = 10  # in full swing by then


def check_run_folder(path: Path, argument: str) -> None:
    """See to it that `path` can become the folder of a run, or is one, leaving it as it was.

    Raises:
        ValueError: It is neither, or cannot be made or written to.
    """
    rank, _ = rank_and_world_size()
    if rank == 0 and not (path / JOURNAL_FILE).is_file():  # which makes it, before others look
        check_new_folder(path, argument)


class Run:
    """A run in its folder. A context manager: what ends it early is said with what it leaves.

    Of several ranks, rank 0 has the folder; all go the same way through the run.

    Args:
        engine: Of the run, before its first step.
        folder: New, empty, or of this very run.
        settings: For arguments.json, JSON values.
        identity: What makes the run what it is besides the engine's config, JSON values. A
            `folder` of a run with another is refused, with what differs.
        steps: To train.
        eval_every: Steps between evaluations.
        watched: What those measure, by its names in the log; the score of the curve first.
        ending: Other settings of how the run ends; a finished run may be given others.

    Attributes:
        curve: Up to the last step that was passed.
        finished: Whether all that is asked for was there already.

    Raises:
        ValueError: The folder has another run, has more steps than `steps`, or is in use.
        OSError: The folder cannot be written.
    """

    def __init__(
        self,
        engine: ZOEngine,
        folder: Path,
        *,
        settings: Mapping[str, Any],
        identity: Mapping[str, Any],
        steps: int,
        eval_every: int,
        watched: Sequence[str],
        ending: Mapping[str, Any] | None = None,
    ) -> None:
        self.engine, self.folder, self.curve = engine, folder, Curve(watched[0])
        self._settings, self._watched = dict(settings), watched
        self._steps, self._every = steps, eval_every
        self._ending = {"steps": steps, **(ending or {})}
        self._bar: Any = None
        config = engine.config.defining()
        own = {name: value for name, value in identity.items() if name not in config}
        self._recorded = engine.keep_journal(folder / JOURNAL_FILE, run=own, step_by_step=True)
        self._journal = engine.journal
        recorded = () if self._journal is None else self._journal.recorded.steps
        self._skipped = sum(step.skipped for step in recorded)
        if self._recorded > steps:
            raise ValueError(
                f"steps is {steps}, but the run in {str(folder)!r} has made {self._recorded}: ask "
                "for at least as many, or name a new folder"
            )
        self.finished: bool = engine.agree(engine.is_coordinator and self._is_finished())
        if self.finished:
            return
        self._meter = Meter(engine.device)
        self._log: RunLog | None = None
        if engine.is_coordinator:
            remove_halves(folder)
            start = self._recorded
            self._log = RunLog(folder, engine, self._meter, start=start, planned=self._planned)
        self._timeline = StepTimeline(engine, folder, step=self._timeline_step())

    def _is_finished(self) -> bool:
        ended, final = self._ended(), self.folder / FINAL
        return self._recorded == self._steps and ended == self._ending and final.is_dir()

    def __enter__(self) -> Self:
        if self.finished:
            print(f"finished already: {self._steps} steps; {self._where()}")
        elif self._recorded:
            print(f"journal {self._recorded} of {self._steps} steps are done already")
        sys.stdout.flush()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if error is None:
            return
        made = max(self.engine.steps, self._recorded)
        journal = self.folder / JOURNAL_FILE
        if (
            not made and self.engine.is_coordinator
        ):  # it may never fit, or begin with NaN: there is no run
            journal.unlink(missing_ok=True)
            with suppress(OSError):
                self.folder.rmdir()
        left = (
            f"all are in {journal}, and the same command continues" if made else "nothing is left"
        )
        if isinstance(error, KeyboardInterrupt):
            raise KeyboardInterrupt(f"after {made} steps; {left}") from None
        if isinstance(error, OSError) and made and error.filename != str(journal):
            raise OSError(f"{error}; after {made} steps: {left}") from error

    # -- the loop

    def train(
        self,
        batch: Callable[[int], Batch],
        evaluate: Callable[[], Mapping[str, float]],
    ) -> None:
        """Make all steps, and an evaluation before the first, every few, and after the last.

        Args:
            batch: Of a step.
            evaluate: What is watched, of the model as it is, by name.
        """
        with (
            logging_redirect_tqdm([logging.getLogger("zo2ext")]),
            tqdm(
                total=self._steps,
                initial=self._recorded,
                unit="step",
                dynamic_ncols=True,
                disable=not self.engine.is_coordinator,
            ) as self._bar,
        ):
            for step in range(self._steps):
                if step % self._every == 0:
                    self._evaluate(step, evaluate)
                if step < self._recorded:
                    self.curve.losses.append((step, self.engine.step(_never)))
                else:
                    self._make(step, batch)
            self._evaluate(self._steps, evaluate)

    def replay(self, steps: int) -> None:
        """Bring the model to where it was after `steps` steps of the journal."""
        for _ in range(steps):
            self.engine.step(_never)

    def measured(
        self, names: Sequence[str], measure: Callable[[], Mapping[str, float]]
    ) -> dict[str, float]:
        """`names` of the model as it is: what the log has, else what `measure` says, logged.

        All ranks measure, so that none waits long for another; what rank 0 finds counts.

        Raises:
            OSError: The log cannot be written.
        """
        steps, log = self.engine.steps, self._log
        logged = {name: log.evaluated(steps, name) for name in names} if log is not None else {}
        there = {name: value for name, value in logged.items() if value is not None}
        found: dict[str, float] = self.engine.agree(there)
        if len(found) < len(names):
            found = self.engine.agree(dict(measure()))
            if log is not None:
                log.evaluations(steps, {n: v for n, v in found.items() if logged[n] is None})
        return found

    def _evaluate(self, steps: int, evaluate: Callable[[], Mapping[str, float]]) -> None:
        def measure() -> Mapping[str, float]:
            status = getattr(self._bar, "postfix", None) or ""
            self._bar.set_postfix_str(", ".join(filter(None, (status, "evaluating"))))
            values = evaluate()
            self._bar.set_postfix_str(status)
            value = values[score]
            shown = f"{value:.4f}" if score.endswith("loss") else f"{value:.1%}"
            tqdm.write(f"step {steps:>6}: {self.curve.title} {shown}")
            return values

        score = self.curve.score
        self.curve.scores.append((steps, self.measured(self._watched, measure)[score]))
        if steps >= max(self._recorded, 1):
            self._write(CURVE_FILE, self.curve.csv())

    def _make(self, step: int, batch: Callable[[int], Batch]) -> None:
        mine = batch(step)
        with self._timeline.watch(), self._meter.measure(mine.tokens):
            value = self.engine.step(mine.losses, weights=mine.weights)
        if self._log is not None:
            self._log.step()
        if step == self._recorded:
            self._write(ARGUMENTS_FILE, as_json(self._settings))
        assert self.engine.last is not None
        self._skipped += self.engine.last.skipped
        self.curve.losses.append((step, value))
        self._bar.set_postfix_str(f"loss {value:.3f}, {self._meter}", refresh=False)
        self._bar.update()

    # -- the end

    def finish(self, tokenizer: Any, results: Mapping[str, Any]) -> None:
        """Write what a finished run leaves; results.json, which says that it is one, comes last.

        Args:
            tokenizer: Saved beside the model as it is.
            results: For results.json, JSON values.

        Raises:
            OSError: Something cannot be written. A ``final`` that was there is there, whole.
        """
        if not self.engine.is_coordinator:
            self.engine.save_pretrained(self.folder / FINAL)  # by rank 0, with all ranks' weights
            return
        self._write(ARGUMENTS_FILE, as_json(self._settings))
        self._write(CURVE_FILE, self.curve.csv())
        if plots.available():
            self._write(PICTURE_FILE, self.curve.png())
        self.engine.save_pretrained(self.folder / FINAL, tokenizer=tokenizer)
        facts = {**self._ending, "journal": self._checksum(), "skipped_steps": self._skipped}
        self._write(RESULTS_FILE, as_json({"zo2ext": __version__, **facts, **results}))
        print(self._where())
        if self._skipped:
            print(
                f"warning: {self._skipped} of {self._steps} steps were skipped, as their losses "
                "were not finite; a lower lr may help",
                file=sys.stderr,
            )

    def _ended(self) -> dict[str, Any] | None:
        """How the folder's run ended, as far as it did, and is the one that the journal tells."""
        try:
            results = json.loads((self.folder / RESULTS_FILE).read_bytes())
        except (OSError, ValueError):
            return None
        if not isinstance(results, dict) or results.get("journal") != self._checksum():
            return None
        return {name: results.get(name) for name in self._ending}

    def _checksum(self) -> str:
        assert self._journal is not None
        return f"{self._journal.checksum_after(self._steps):08x}"

    def _where(self) -> str:
        picture = f", {self.folder / PICTURE_FILE}" if plots.available() else ""
        missing = "" if picture else f" ({plots.HOW_TO_GET})"
        return (
            f"weights and tokenizer: {self.folder / FINAL}\n"
            f"results: {self.folder / RESULTS_FILE}\n"
            f"loss curve: {self.folder / CURVE_FILE}{picture}{missing}"
        )

    # --

    def _planned(self, steps: int, name: str) -> bool:
        """Whether a logged evaluation is one that this run would have made by now."""
        due = steps % self._every == 0 or steps == self._steps
        return steps == 0 or (due and name in self._watched)

    def _timeline_step(self) -> int:
        """The step to record, a later one than the first; -1 where one is recorded already."""
        if not self.engine.is_coordinator or (self.folder / TRACE_FILE).exists():
            return -1
        return min(max(TIMELINE_STEP, self._recorded + 1), self._steps - 1)

    def _write(self, name: str, content: bytes) -> None:
        """Make `content` that of file `name`, unless it is already."""
        if not self.engine.is_coordinator:
            return
        path = self.folder / name
        if not path.exists() or path.read_bytes() != content:
            write_atomically(path, content)


def as_json(value: Mapping[str, Any]) -> bytes:
    """`value` as the content of a file."""
    return json.dumps(value, indent=2).encode() + b"\n"


def _never() -> Any:
    raise AssertionError("a recorded step computed its loss")
