"""Declaration of a task: how a row of data becomes a prompt and the texts that may continue it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from string import Formatter
from typing import Any

from zo2ext.errors import UserError

Row = Mapping[str, Any]


class Kind(StrEnum):
    """Form of the answers to a task.

    classification: with the word of a class; the words are the same for every example.
    choice: with one of the example's own candidates.
    generation: with free text up to the end of a line.
    """

    CLASSIFICATION = "classification"
    CHOICE = "choice"
    GENERATION = "generation"


@dataclass(frozen=True)
class Example:
    """A question as the model reads it.

    Attributes:
        prompt: Prompt, without a space at the end.
        candidates: Texts that may continue the prompt, with the space that they need in front. For
            generation, the first right answer.
        correct: Indices of the right candidates, at least one; the first is trained on.
        answers: For generation, all right texts.
    """

    prompt: str
    candidates: tuple[str, ...]
    correct: tuple[int, ...]
    answers: tuple[str, ...] = ()

    @property
    def solved(self) -> str:
        """Prompt and right answer, as a demonstration for another prompt."""
        return (self.prompt + self.candidates[self.correct[0]]).strip()


@dataclass(frozen=True)
class Hub:
    """A data set on the Hugging Face hub: arguments of ``datasets.load_dataset``."""

    path: str
    config: str | None = None
    train: str = "train"
    test: str = "validation"
    revision: str | None = None


@dataclass(frozen=True)
class Sizes:
    """Number of examples to train on, to evaluate on while training, and to test on."""

    train: int = 1000
    dev: int = 500
    test: int = 1000


@dataclass(frozen=True, kw_only=True)
class Task:
    """A task. The defaults are those of MeZO (arXiv:2305.17333, appendix E).

    Attributes:
        title: Name in tables. `name` is derived from it.
        prompt: Format string over the columns of a row after `prepare`, without a space at the end.
        hub: Data set on the hub; None if there is none.
        rows: Function that returns the rows of "train" and "test", for data that ships with code.
        kind: Form of the answers.
        label: Column of the right answer; ``a.b`` is key ``b`` of column ``a``. Classification: a
            class, by index or name. Choice: the index of the right candidate, or the text of one or
            several right candidates. Generation: the right texts.
        classes: Classification: pairs of (name in the data, word that stands for the class), in the
            order of the data's integer labels.
        candidates: Choice: function from a row to the texts that may continue the prompt.
        continuation: Choice: function from a row and a candidate to the text after the prompt.
        columns: Columns that `prepare`, `candidates` and `continuation` read, besides those in
            `prompt` and `label`. Rows without them are refused.
        prepare: Function that cleans the columns of a row before they enter the prompt.
        unlabeled: Values of the label that mean "no label", besides None, NaN and -1; such rows
            are left out.
        line: Function that reads a line of a raw text file, if the task has such files.
        sizes: Default number of examples.
        max_new_tokens: Generation: maximum number of tokens of an answer.
    """

    title: str
    prompt: str
    hub: Hub | None = None
    rows: Callable[[], Mapping[str, list[Row]]] | None = None
    kind: Kind = Kind.CLASSIFICATION
    label: str = "label"
    classes: tuple[tuple[str, str], ...] = ()
    candidates: Callable[[Row], list[str]] | None = None
    continuation: Callable[[Row, str], str] = lambda row, candidate: f" {candidate}"
    columns: tuple[str, ...] = ()
    prepare: Callable[[Row], Row] = lambda row: row
    unlabeled: tuple[Any, ...] = ()
    line: Callable[[str], Row] | None = None
    sizes: Sizes = field(default_factory=Sizes)
    max_new_tokens: int = 50

    @property
    def name(self) -> str:
        """Name on the command line: the letters and digits of the title, in lower case."""
        return plain(self.title)

    @property
    def metric(self) -> str:
        """Metric by which models are compared: "accuracy", or "f1" for generation."""
        return self.metrics[0]

    @property
    def metrics(self) -> tuple[str, ...]:
        """All metrics that are computed; for generation also exact match, "em"."""
        return ("f1", "em") if self.kind is Kind.GENERATION else ("accuracy",)

    @property
    def needs(self) -> tuple[str, ...]:
        """All columns that a row must have; the last is that of the label."""
        names = [*self.columns, *_names(self.prompt), self.label.partition(".")[0]]
        return tuple(dict.fromkeys(names))

    def examples(
        self, rows: Sequence[Row], source: str, order: Iterable[int] | None = None, most: int = -1
    ) -> tuple[list[Example], int]:
        """Convert rows to examples.

        Args:
            rows: Rows of the data.
            source: Name of the data, for messages.
            order: Indices of the rows to use, in this order. None: all rows.
            most: Number of examples after which to stop; -1: no limit.

        Returns:
            The examples, and the number of rows that were left out because they have no label.

        Raises:
            UserError: A row lacks a column, its values do not fit the task, or no row has a label.
        """
        examples: list[Example] = []
        left_out = 0
        for index in range(len(rows)) if order is None else order:
            if len(examples) == most:
                break
            row = rows[index]
            try:
                self._check(row)
                if self._is_unlabeled(_lookup(row, self.label)):
                    left_out += 1
                    continue
                examples.append(self.example(row))
            except ValueError as error:
                raise UserError(f"task {self.name}: row {index + 1} of {source} {error}") from None
        if not examples:
            found = f"{left_out} rows, none with a label" if left_out else "no row"
            raise UserError(f"task {self.name}: {source} has {found}")
        return examples, left_out

    def example(self, row: Row) -> Example:
        """Convert one row.

        Raises:
            ValueError: The row does not fit; the message continues a sentence about the row.
        """
        self._check(row)
        label, values = _lookup(row, self.label), self.prepare(row)
        prompt = self.prompt.format(**values).strip(" ")
        match self.kind:
            case Kind.CLASSIFICATION:
                space = "" if prompt.endswith("\n") else " "
                words = tuple(space + word for _, word in self.classes)
                return Example(prompt, words, (self._class(label),))
            case Kind.CHOICE:
                assert self.candidates is not None
                texts = self.candidates(row)
                continued = tuple(self.continuation(row, text) for text in texts)
                return Example(prompt, continued, _right(label, texts, self.label))
            case Kind.GENERATION:
                answers = _texts(label, self.label)
                return Example(prompt, (f" {answers[0]}\n",), (0,), answers)

    def _check(self, row: Row) -> None:
        if missing := [name for name in self.needs if name not in row]:
            found = ", ".join(map(str, row)) or "nothing"
            raise ValueError(f"lacks {', '.join(missing)}; it has {found}")
        for name in self.needs[:-1]:
            if name in _names(self.prompt) and not isinstance(row[name], str):
                raise ValueError(f"has {name} {row[name]!r}, which is not text")

    def _is_unlabeled(self, label: Any) -> bool:
        """Return whether a label means that there is none, as GLUE (-1) and pandas (null) write."""
        if label is None or (isinstance(label, float) and label != label):
            return True
        if isinstance(label, (list, tuple, Mapping)):
            return False
        return label in self.unlabeled or (self.kind is not Kind.GENERATION and _index(label) == -1)

    def _class(self, label: Any) -> int:
        names = [name for name, _ in self.classes]
        loosely = [name.casefold() for name in names]
        if isinstance(label, str) and label.strip().casefold() in loosely:
            return loosely.index(label.strip().casefold())
        index = _index(label)
        if index is not None and 0 <= index < len(names):
            return index
        known = ", ".join(f"{index} or {name!r}" for index, name in enumerate(names))
        raise ValueError(f"has {self.label} {label!r}; expected {known}")


def plain(name: str) -> str:
    """Return the letters and digits of `name` in lower case."""
    return "".join(letter for letter in name.lower() if letter.isalnum())


def _index(label: Any) -> int | None:
    """Return a label as an index, also one that was written as 1.0 or "1.0"; None if it is none."""
    try:
        value = float(label)
    except (TypeError, ValueError, OverflowError):
        return None
    return int(value) if value.is_integer() else None


def _names(prompt: str) -> list[str]:
    return [name for _, name, _, _ in Formatter().parse(prompt) if name]


def _lookup(row: Row, path: str) -> Any:
    column, dot, key = path.partition(".")
    value = row[column]
    if not dot:
        return value
    if not isinstance(value, Mapping) or key not in value:
        raise ValueError(f"has {column} {value!r}; expected a mapping with {key!r}")
    return value[key]


def _texts(value: Any, name: str) -> tuple[str, ...]:
    texts = [value] if isinstance(value, str) else value
    if not isinstance(texts, (list, tuple)) or not all(isinstance(text, str) for text in texts):
        raise ValueError(f"has {name} {value!r}; expected texts")
    kept = tuple(text for text in texts if text.strip())
    if not kept:
        raise ValueError(f"has {name} {value!r}; expected at least one answer")
    return kept


def _right(label: Any, candidates: list[str], name: str) -> tuple[int, ...]:
    if not candidates:
        raise ValueError("has no candidates")
    index = None if label in candidates else _index(label)
    if index is not None:
        if 0 <= index < len(candidates):
            return (index,)
        raise ValueError(f"has {name} {label!r}; expected 0 to {len(candidates) - 1}")
    texts = _texts(label, name)
    if unknown := [text for text in texts if text not in candidates]:
        shown = ", ".join(map(repr, candidates[:8]))
        raise ValueError(f"has {name} {unknown[0]!r}, which is none of its candidates: {shown}")
    return tuple(dict.fromkeys(candidates.index(text) for text in texts))
