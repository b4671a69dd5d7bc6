"""State of a run in a checkpoint, besides the weights: the continued run has the same bits."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from zo2ext._files import write_atomically
from zo2ext._version import __version__
from zo2ext.config import ZOConfig
from zo2ext.engine.engine import ZOEngine
from zo2ext.errors import UserError
from zo2ext.journal.journal import JOURNAL_FILE
from zo2ext.ops import Update

EXACT_WEIGHTS_FILE = "zo_masters.safetensors"
STATE_FILE = "zo_state.json"
TRAINER_STATE_FILE = "trainer_state.json"  # written by transformers, last of all files
_FORMAT = 2


@dataclass(frozen=True)
class RunState:
    """State of a run after a step.

    Attributes:
        steps, skipped, clipped, equal: Number of steps done, and of those that were skipped, that
            were shortened, and whose losses were all equal.
        slope_sizes: Sizes of the slopes in the last steps, which `clip` judges by.
        config: Settings that define the run.
        pending: Updates of `ZOEngine.pending`: key, coefficient and decay of each, per step.
        journal: Checksum of the run's journal up to this step; None without a journal.
        journal_file: Name of the journal.
        trainable, frozen: Shape of each parameter, by name.
        random_data: Whether making batches was seen to draw random numbers.
    """

    steps: int
    skipped: int
    config: dict[str, Any]
    pending: list[list[tuple[int, float, float]]]
    journal: int | None
    journal_file: str
    trainable: dict[str, list[int]]
    frozen: dict[str, list[int]]
    random_data: bool = False
    clipped: int = 0
    equal: int = 0
    slope_sizes: Sequence[float] = ()

    @classmethod
    def of(cls, engine: ZOEngine, model: nn.Module, *, random_data: bool = False) -> RunState:
        """Return the state of `engine`, which runs `model`."""
        return cls(
            engine.steps,
            engine.skipped,
            engine.config.defining(),
            [[(u.key, u.coefficient, u.decay) for u in step] for step in engine.pending()],
            engine.journal_checksum(),
            engine.journal.path.name if engine.journal is not None else JOURNAL_FILE,
            shapes(model, trainable=True),
            shapes(model, trainable=False),
            random_data,
            engine.clipped,
            engine.equal,
            engine.slope_sizes(),
        )

    def save(self, folder: Path, exact_weights: dict[str, Tensor]) -> None:
        """Write the state to `folder`, together with `ZOEngine.exact_weights`."""
        content = {"format": _FORMAT, "zo2ext": __version__, **asdict(self)}
        if exact_weights:
            save_file(exact_weights, folder / EXACT_WEIGHTS_FILE)
        write_atomically(folder / STATE_FILE, json.dumps(content, indent=1).encode())

    @classmethod
    def load(cls, folder: Path) -> RunState:
        """Read the state from a checkpoint.

        Raises:
            ValueError: The folder has no state, or it cannot be read.
        """
        path = folder / STATE_FILE
        if not path.is_file():
            raise UserError(
                f"{folder} has no {STATE_FILE}: it is not a checkpoint of a zeroth-order run, or "
                "was saved with save_only_model=True, and cannot be resumed"
            )
        try:
            content: dict[str, Any] = json.loads(path.read_text())
            if content.pop("format") != _FORMAT:
                raise ValueError(f"its format is not {_FORMAT}")
            content.pop("zo2ext")
            return cls(**content)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(f"{path} cannot be read: {error}") from error

    def check_model(self, model: nn.Module, folder: Path) -> None:
        """Raise an error if `model` is not the model of this run.

        Raises:
            ValueError: Names or shapes of parameters differ, or which of them are trainable.
        """
        for kind, expected in (("trainable", self.trainable), ("frozen", self.frozen)):
            found = shapes(model, trainable=kind == "trainable")
            names = [n for n in {**expected, **found} if found.get(n) != expected.get(n)]
            if names:
                raise UserError(
                    f"{folder} is a checkpoint of another model: {names[0]} is "
                    f"{_described(expected.get(names[0]), kind)} there and "
                    f"{_described(found.get(names[0]), kind)} in this one "
                    f"({len(names)} such differences)"
                )

    def differences(self, config: ZOConfig) -> list[str]:
        """Describe each setting in `config` that defines another run than this one."""
        found = config.defining()
        return [
            f"{name} was {self.config.get(name)} and is {value}"
            for name, value in {**dict.fromkeys(self.config), **found}.items()
            if self.config.get(name) != value and value != "auto"
        ]

    def resume(self, engine: ZOEngine, folder: Path) -> None:
        """Continue from this state on an engine that has the checkpoint's weights already."""
        pending = [tuple(Update(*update) for update in step) for step in self.pending]
        path = folder / EXACT_WEIGHTS_FILE
        exact = load_file(path) if path.is_file() else {}
        engine.resume(
            steps=self.steps,
            skipped=self.skipped,
            clipped=self.clipped,
            equal=self.equal,
            slope_sizes=self.slope_sizes,
            exact_weights=exact,
            pending=pending,
            write_back=self.config["write_back"],
        )


def is_complete(checkpoint: Path) -> bool:
    """Return whether a Trainer's checkpoint is complete: its state is written last."""
    try:
        json.loads((checkpoint / TRAINER_STATE_FILE).read_text())
    except (OSError, ValueError):
        return False
    return True


def is_saved(checkpoint: Path, journal: int | None) -> bool:
    """Return whether `checkpoint` is complete and of the run and step with checksum `journal`."""
    try:
        return is_complete(checkpoint) and RunState.load(checkpoint).journal == journal
    except ValueError:
        return False  # it has no state that can be read


def last_complete(folder: Path) -> Path | None:
    """Return the newest complete checkpoint in a Trainer's folder; None if there is none."""
    found = {
        int(path.name.rpartition("-")[2]): path
        for path in folder.glob(f"{PREFIX_CHECKPOINT_DIR}-*")
        if path.name.rpartition("-")[2].isdecimal() and is_complete(path)
    }
    return found[max(found)] if found else None


def shapes(model: nn.Module, *, trainable: bool) -> dict[str, list[int]]:
    """Return the shape of each parameter that is trainable, or of each that is frozen."""
    return {n: list(p.shape) for n, p in model.named_parameters() if p.requires_grad == trainable}


def _described(shape: list[int] | None, kind: str) -> str:
    return f"not a {kind} parameter" if shape is None else f"{kind} with shape {tuple(shape)}"
