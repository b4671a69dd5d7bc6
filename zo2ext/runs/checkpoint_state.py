"""What a checkpoint holds beside the weights, so that a run continues to the same bits."""

from __future__ import annotations

import json
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

MASTERS_FILE = "zo_masters.safetensors"
STATE_FILE = "zo_state.json"
TRAINER_STATE_FILE = "trainer_state.json"  # the one of transformers
_FORMAT = 2


@dataclass(frozen=True)
class RunState:
    """Where a run stands.

    Attributes:
        steps, skipped: Of the engine.
        config: The settings that define the run.
        pending: Of `ZOEngine.pending`: key, coefficient and decay of each update of each step.
        journal: Checksum of the run's journal up to there; None where there is none.
        journal_file: The journal's name.
        trainable, frozen: Shape of every parameter, by name.
    """

    steps: int
    skipped: int
    config: dict[str, Any]
    pending: list[list[tuple[int, float, float]]]
    journal: int | None
    journal_file: str
    trainable: dict[str, list[int]]
    frozen: dict[str, list[int]]

    @classmethod
    def of(cls, engine: ZOEngine, model: nn.Module) -> RunState:
        """Of an engine that runs `model`."""
        return cls(
            engine.steps,
            engine.skipped,
            engine.config.defining(),
            [[(u.key, u.coefficient, u.decay) for u in step] for step in engine.pending()],
            engine.journal_checksum(),
            engine.journal.path.name if engine.journal is not None else JOURNAL_FILE,
            shapes(model, trainable=True),
            shapes(model, trainable=False),
        )

    def save(self, folder: Path, masters: dict[str, Tensor]) -> None:
        """Write it to `folder`, with the weights that `ZOEngine.exact_weights` gives."""
        content = {"format": _FORMAT, "zo2ext": __version__, **asdict(self)}
        if masters:
            save_file(masters, folder / MASTERS_FILE)
        write_atomically(folder / STATE_FILE, json.dumps(content, indent=1).encode())

    @classmethod
    def load(cls, folder: Path) -> RunState:
        """Read it from a checkpoint.

        Raises:
            ValueError: The folder has none, or it cannot be understood.
        """
        path = folder / STATE_FILE
        if not path.is_file():
            raise UserError(
                f"{folder} has no {STATE_FILE}: it is no checkpoint of a zeroth-order run, or was "
                "saved with save_only_model=True, and cannot be resumed"
            )
        try:
            content: dict[str, Any] = json.loads(path.read_text())
            if content.pop("format") != _FORMAT:
                raise ValueError(f"its format is not {_FORMAT}")
            content.pop("zo2ext")
            return cls(**content)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(f"{path} cannot be read: {error}") from error

    def load_masters(self, folder: Path) -> dict[str, Tensor]:
        """What `save` was given; empty where it was."""
        path = folder / MASTERS_FILE
        return load_file(path) if path.is_file() else {}

    def check_model(self, model: nn.Module, folder: Path) -> None:
        """Refuse to continue this run with another model.

        Raises:
            ValueError: Parameters have other names or shapes, or others of them are trainable.
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
        """Settings that make what follows another run than the one that was stopped."""
        return [
            f"{name} was {self.config.get(name)} and is {value}"
            for name, value in config.defining().items()
            if self.config.get(name) != value
        ]

    def resume(self, engine: ZOEngine, folder: Path) -> None:
        """Continue from here, with the weights of the checkpoint in `folder` loaded already."""
        pending = [tuple(Update(*update) for update in step) for step in self.pending]
        masters = self.load_masters(folder)
        engine.resume(
            steps=self.steps, skipped=self.skipped, exact_weights=masters, pending=pending
        )


def is_whole(checkpoint: Path) -> bool:
    """Whether a Trainer's checkpoint was saved to its end: its state is what is written last."""
    try:
        json.loads((checkpoint / TRAINER_STATE_FILE).read_text())
    except (OSError, ValueError):
        return False
    return True


def is_saved(checkpoint: Path, journal: int | None) -> bool:
    """Whether `checkpoint` is whole, and of the run and step whose checksum is `journal`."""
    try:
        return is_whole(checkpoint) and RunState.load(checkpoint).journal == journal
    except ValueError:
        return False  # another run's, or without what it takes to resume


def last_whole(folder: Path) -> Path | None:
    """The newest whole checkpoint in a Trainer's folder; None where there is none."""
    found = {
        int(path.name.rpartition("-")[2]): path
        for path in folder.glob(f"{PREFIX_CHECKPOINT_DIR}-*")
        if path.name.rpartition("-")[2].isdecimal() and is_whole(path)
    }
    return found[max(found)] if found else None


def shapes(model: nn.Module, *, trainable: bool) -> dict[str, list[int]]:
    """Shape of each parameter that is `trainable`, or of each that is not."""
    return {n: list(p.shape) for n, p in model.named_parameters() if p.requires_grad == trainable}


def _described(shape: list[int] | None, kind: str) -> str:
    return f"not a {kind} parameter" if shape is None else f"{kind} with shape {tuple(shape)}"
