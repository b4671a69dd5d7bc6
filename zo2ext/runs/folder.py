"""Folder of a run of ``zo2ext train``: its identity, its progress and its results.

Every step is in the folder's journal before it changes a weight. The same command continues a
stopped run: it starts from the first step, replays recorded steps without computing a loss, reads
logged evaluations from the log, and computes the rest. New and continued runs share this code.
"""

from __future__ import annotations

import csv
import io
import json
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import fields
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from zo2ext._files import check_new_folder, remove_halves, write_atomically
from zo2ext._version import __version__
from zo2ext.config import PLACE, group_of
from zo2ext.engine.engine import ZOEngine
from zo2ext.errors import FileError, UserError
from zo2ext.journal.journal import JOURNAL_FILE
from zo2ext.parallel.parallel import rank_and_world_size
from zo2ext.runs import plots
from zo2ext.runs.checkpoint_state import RunState
from zo2ext.runs.find_lr import RATE_PICTURE, recorded_curve
from zo2ext.runs.log import ARGUMENTS_FILE, RunLog, read_steps
from zo2ext.runs.meter import Meter

RESULTS_FILE = "results.json"
CURVE_FILE, PICTURE_FILE, FINAL = "loss.csv", "loss.png", "final"


def check_run_folder(path: Path, argument: str) -> None:
    """Check that `path` is the folder of a run or can become one, without creating it.

    Raises:
        ValueError: It has other content, or cannot be created or written to.
    """
    rank, _ = rank_and_world_size()
    if rank == 0 and not (path / JOURNAL_FILE).is_file():  # rank 0 may have created it by now
        check_new_folder(path, argument)


def identifying(
    arguments: Any, settings: Mapping[str, Any], leave_out: Iterable[str]
) -> dict[str, Any]:
    """Return the `settings` that identify a run.

    Args:
        arguments: Dataclass of options. Its options for memory and speed are left out, as they
            change no result.
        settings: Values of its options, by name.
        leave_out: Names of other options that change no result.
    """
    groups = {f.name: f.metadata.get("group") or group_of(f.name) for f in fields(arguments)}
    out = {name for name, group in groups.items() if group == PLACE} | {*leave_out}
    if settings.get("micro_batch") is None:  # then it depends on the number of ranks
        out.add("micro_batch")
    return {name: value for name, value in settings.items() if name not in out}


class RunFolder:
    """A run in its folder. A context manager: an error that ends the run states what was kept.

    Only rank 0 writes to the folder; all ranks make the same calls.

    Args:
        engine: Engine of the run, before its first step.
        folder: Folder that is new, empty, or has this run.
        settings: Settings for arguments.json, JSON values.
        identity: Settings that identify the run besides the engine's config, JSON values. If the
            folder has a run with another identity, the error names the differences.
        ending: Settings that decide when the run ends, among them "steps"; they may change later.
        every: Steps between evaluations.
        watched: Names of the evaluated values, the main score first.
        checkpoint: Checkpoint of this run whose weights the engine has.

    Attributes:
        recorded: Number of steps in the journal.
        finished: Whether the folder has the results of all steps.
        curve: Result of the search for the learning rate; None without one.
        log: Log of the run; None on ranks other than rank 0 and for finished runs.

    Raises:
        JournalError: The folder belongs to another run, or is in use.
        ValueError: The run has more than ``ending["steps"]`` steps.
        OSError: The folder cannot be written.
    """

    def __init__(
        self,
        engine: ZOEngine,
        folder: Path,
        *,
        settings: Mapping[str, Any],
        identity: Mapping[str, Any],
        ending: Mapping[str, Any],
        every: int,
        watched: Sequence[str],
        checkpoint: Path | None = None,
    ) -> None:
        self.engine, self.folder, self.meter = engine, folder, Meter(engine)
        self.steps, self.every, self.watched = int(ending["steps"]), every, watched
        self._settings, self._ending = dict(settings), dict(ending)
        config = engine.config.defining()
        own = {name: value for name, value in identity.items() if name not in config}
        checksum = None
        if checkpoint is not None:
            state = RunState.load(checkpoint)
            state.resume(engine, checkpoint)
            checksum = state.journal
        path = folder / JOURNAL_FILE
        ahead = engine.keep_journal(path, run=own, checksum=checksum, step_by_step=True)
        self.recorded = engine.steps + ahead
        if self.recorded > self.steps:
            raise UserError(
                f"steps is {self.steps}, but the run in {str(folder)!r} has made {self.recorded}: "
                "ask for at least as many, or name a new folder"
            )
        self.finished: bool = engine.agree(engine.is_coordinator and self._is_finished())
        self.log: RunLog | None = None
        journal = engine.journal
        self.curve = None if journal is None else recorded_curve(journal.recorded.header)
        if engine.is_coordinator and not self.finished:
            remove_halves(folder)
            self.log = RunLog(
                folder, engine, self.meter, start=self.recorded, planned=self._is_planned
            )

    def __enter__(self) -> Self:
        if self.finished:
            print(f"finished already: {self.recorded} steps; {self._left_behind()}")
        elif self.recorded:
            print(f"journal {self.recorded} of {self.steps} steps are already done")
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
        made = max(self.engine.steps, self.recorded)
        journal = self.folder / JOURNAL_FILE
        if not made and self.engine.is_coordinator:  # it may never fit, or begin with NaN
            journal.unlink(missing_ok=True)
            with suppress(OSError):
                self.folder.rmdir()
        kept = f"all are in {journal}, and the same command continues"
        left = kept if made else "nothing is left"
        if isinstance(error, KeyboardInterrupt):
            raise KeyboardInterrupt(f"after {made} steps; {left}") from None
        if isinstance(error, OSError) and made and error.filename != str(journal):
            raise FileError(f"{error}; after {made} steps: {left}") from error

    @property
    def score(self) -> str:
        """Title of the main score, such as "held-out loss"."""
        return self.watched[0].replace("held_out", "held-out").replace("_", " ")

    def measure(
        self, names: Sequence[str], measure: Callable[[], Mapping[str, float]]
    ) -> dict[str, float]:
        """Return the values of `names` for the current weights from the log, or measure and log.

        All ranks measure, so that none waits long for another; the values of rank 0 are returned.

        Raises:
            OSError: The log cannot be written.
        """
        steps, log = self.engine.steps, self.log
        logged = {} if log is None else log.evaluated(steps)
        there = {name: logged[name] for name in names if name in logged}
        found: dict[str, float] = self.engine.agree(there)
        if len(found) < len(names):
            found = self.engine.agree(dict(measure()))
            if log is not None:
                log.evaluations(steps, {n: v for n, v in found.items() if n not in logged})
        return found

    def replay(self, steps: int) -> None:
        """Replay the journal until the model has done `steps` steps."""
        while self.engine.steps < steps:
            self.engine.step(never)

    def write_settings(self) -> None:
        """Write arguments.json, a ``--config`` file that repeats the run, and lr.png."""
        self._write(ARGUMENTS_FILE, as_json(self._settings))
        if self.curve is not None and plots.available():
            self._write(RATE_PICTURE, self.curve.png())

    def finish(self, tokenizer: Any, results: Mapping[str, Any], scores: Sequence[Any]) -> None:
        """Write the files of a finished run; results.json, which marks it as finished, comes last.

        Args:
            tokenizer: Tokenizer to save with the current model.
            results: Further content of results.json, JSON values.
            scores: Main scores over the run, as (steps done, value).

        Raises:
            OSError: A file cannot be written. An earlier ``final`` is then unchanged.
        """
        if self.log is None:
            # Rank 0 writes; all ranks send weights.
            self.engine.save_pretrained(self.folder / FINAL)
            return
        self.write_settings()
        losses = [(int(row[0]), float(row[1])) for row in read_steps(self.folder).rows]
        self._write(CURVE_FILE, _curve(losses, scores, self.watched[0]))
        if plots.available():
            self._write(PICTURE_FILE, plots.score_curve(losses, scores, self.score))
        self.engine.save_pretrained(self.folder / FINAL, tokenizer=tokenizer)
        journal = self.engine.journal
        assert journal is not None
        skipped = max(self.engine.skipped, sum(s.skipped for s in journal.recorded.steps))
        rate = {"lr": self.engine.config.lr, "lr_found": self.curve is not None}
        facts = {**self._ending, **rate, "journal": self._checksum(), "skipped_steps": skipped}
        self._write(RESULTS_FILE, as_json({"zo2ext": __version__, **facts, **results}))
        print(self._left_behind())
        if skipped:
            print(
                f"warning: {skipped} of {len(losses)} steps were skipped, as their losses were not "
                "finite or all equal; a lower lr may help",
                file=sys.stderr,
            )

    def _is_finished(self) -> bool:
        """Return whether the folder has the results of this journal and this ending."""
        try:
            results = json.loads((self.folder / RESULTS_FILE).read_bytes())
        except (OSError, ValueError):
            return False
        return (
            isinstance(results, dict)
            and results.get("journal") == self._checksum()
            and {name: results.get(name) for name in self._ending} == self._ending
            and (self.folder / FINAL).is_dir()
        )

    def _checksum(self) -> str:
        journal = self.engine.journal
        assert journal is not None
        return f"{journal.checksum_after(journal.next_step):08x}"

    def _left_behind(self) -> str:
        has_plots, picture = plots.available(), f", {self.folder / PICTURE_FILE}"
        return (
            f"weights and tokenizer: {self.folder / FINAL}\n"
            f"results: {self.folder / RESULTS_FILE}\n"
            f"loss curve: {self.folder / CURVE_FILE}"
            + (picture if has_plots else f" ({plots.HOW_TO_GET})")
        )

    def _is_planned(self, steps: int, name: str) -> bool:
        """Return whether this run evaluates `name` after `steps` steps."""
        due = steps % self.every == 0 or steps == self.steps
        return steps == 0 or (due and name in self.watched)

    def _write(self, name: str, content: bytes) -> None:
        """Write `content` to file `name`, unless the file has it already."""
        path = self.folder / name
        if self.log is not None and not (path.exists() and path.read_bytes() == content):
            write_atomically(path, content)


def _curve(
    losses: Sequence[tuple[int, float]], scores: Sequence[tuple[int, float]], name: str
) -> bytes:
    """Return a CSV table with one line per step: its loss, and the score before it."""
    table = io.StringIO()
    writer = csv.writer(table, lineterminator="\n")
    writer.writerow(["step", "train_loss", name])
    by_step, scored = dict(losses), dict(scores)
    for step in sorted(by_step.keys() | scored.keys()):
        writer.writerow([step, by_step.get(step, ""), scored.get(step, "")])
    return table.getvalue().encode()


def as_json(value: Mapping[str, Any]) -> bytes:
    """Return `value` as the content of a JSON file."""
    return json.dumps(value, indent=2).encode() + b"\n"


def never() -> Any:
    """Stand for the loss of a recorded step, which is not computed."""
    raise AssertionError("a recorded step computed its loss")
