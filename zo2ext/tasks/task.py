"""What a task is: how a row of data becomes a prompt and the texts that may continue it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from string import Formatter
from typing import Any

Row = Mapping[str, Any]


class Kind(StrEnum):
    """How a task is answered.

    classification: by the word of a class, the same words for every example.
    choice: by one of the candidates that come with the example.
    generation: in free text, until a line ends.
    """

    CLASSIFICATION = "classification"
    CHOICE = "choice"
    GENERATION = "generation"


@dataclass(frozen=True)
class Example:
    """One question as a model reads it.

    Attributes:
        prompt: Without a space at its end.
        candidates: Texts that continue the prompt, each beginning with the space it needs. The
            first answer alone, where the task is generation.
        correct: Indices of those that are right, at least one. The first is trained on.
        answers: Of generation: all texts that count as right.
    """

    prompt: str
    candidates: tuple[str, ...]
    correct: tuple[int, ...]
    answers: tuple[str, ...] = ()

    @property
    def solved(self) -> str:
        """Prompt and right answer, as a demonstration in front of another prompt."""
        return (self.prompt + self.candidates[self.correct[0]]).strip()


@dataclass(frozen=True)
class Hub:
    """Where a task's data is on the Hugging Face hub, as ``datasets.load_dataset`` takes it."""

    path: str
    config: str | None = None
    train: str = "train"
    test: str = "validation"
    revision: str | None = None


@dataclass(frozen=True)
class Sizes:
    """Examples to train on, to watch while training, and to test on."""

    train: int = 1000
    dev: int = 500
    test: int = 1000


@dataclass(frozen=True, kw_only=True)
class Task:
    """A task, declared. The defaults are MeZO's (arXiv:2305.17333, appendix E).

    Attributes:
        name: On the command line.
        title: In tables.
        kind: How it is answered.
        prompt: A format string over the columns of a row, as `prepare` leaves them.
        hub: Where its data is.
        label: Column of the right answer. Classification: a class, by index or by name. Choice:
            the index of the right candidate, or the texts of those that are right. Generation:
            the texts that are right. ``a.b`` is key ``b`` of column ``a``.
        classes: Classification: (name of the class in data, word that stands for it), by index.
        candidates: Choice: the texts that may continue the prompt, as `label` refers to them.
        continuation: Choice: how a candidate continues the prompt.
        columns: Columns that `prepare`, `candidates` and `continuation` read, beyond those that
            `prompt` and `label` name.
        prepare: Tidies the columns of a row before they go into the prompt.
        unlabelled: Labels that mean that there is none; such rows are left out.
        line: Reads one line of the task's raw text files, where there are such files.
        sizes: By default.
        max_new_tokens: Generation: tokens of an answer, at most.
    """

    name: str
    title: str
    kind: Kind
    prompt: str
    hub: Hub
    label: str = "label"
    classes: tuple[tuple[str, str], ...] = ()
    candidates: Callable[[Row], list[str]] | None = None
    continuation: Callable[[Row, str], str] = lambda row, candidate: f" {candidate}"
    columns: tuple[str, ...] = ()
    prepare: Callable[[Row], Row] = lambda row: row
    unlabelled: tuple[Any, ...] = ()
    line: Callable[[str], Row] | None = None
    sizes: Sizes = field(default_factory=Sizes)
    max_new_tokens: int = 50

    @property
    def metric(self) -> str:
        """What it is judged by: "accuracy", or "f1" where the answer is free text."""
        return self.metrics[0]

    @property
    def metrics(self) -> tuple[str, ...]:
        """All that is measured: with F1, exact match."""
        return ("f1", "em") if self.kind is Kind.GENERATION else ("accuracy",)

    @property
    def needs(self) -> tuple[str, ...]:
        """All columns that a row must have, the label's last."""
        named = [name for _, name, _, _ in Formatter().parse(self.prompt) if name]
        return tuple(dict.fromkeys([*self.columns, *named, self.label.partition(".")[0]]))

    def examples(
        self, rows: Sequence[Row], source: str, order: Iterable[int] | None = None, most: int = -1
    ) -> tuple[list[Example], int]:
        """Rows as examples, and how many were left out because they have no label.

        Args:
            rows: Of the data.
            source: What they are, for messages.
            order: Indices of rows, to be taken in this order; all in their own when None.
            most: Examples to stop at; no other row is looked at. -1: never.

        Raises:
            ValueError: A row lacks a column, or its values do not fit the task; or no row is left.
        """
        examples: list[Example] = []
        left_out = 0
        for index in range(len(rows)) if order is None else order:
            if len(examples) == most:
                break
            row = rows[index]
            try:
                self._check(row)
                label = _lookup(row, self.label)
                if not isinstance(label, (list, tuple)) and label in self.unlabelled:
                    left_out += 1
                    continue
                examples.append(self.example(row))
            except ValueError as error:
                raise ValueError(f"task {self.name}: row {index + 1} of {source} {error}") from None
        if not examples:
            found = f"{left_out} rows, none with a label" if left_out else "no row"
            raise ValueError(f"task {self.name}: {source} has {found}")
        return examples, left_out

    def example(self, row: Row) -> Example:
        """One row as an example.

        Raises:
            ValueError: What is wrong with the row, as the end of a sentence about it.
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
        missing = [name for name in self.needs if name not in row]
        if missing:
            raise ValueError(
                f"lacks {', '.join(missing)}; it has {', '.join(map(str, row)) or 'nothing'}"
            )
        for name in self.needs[:-1]:
            if name in _names(self.prompt) and not isinstance(row[name], str):
                raise ValueError(f"has {name} {row[name]!r}, which is no text")

    def _class(self, label: Any) -> int:
        names = [name for name, _ in self.classes]
        if isinstance(label, str) and label in names:
            return names.index(label)
        if isinstance(label, str) and label.isdecimal():
            label = int(label)
        if isinstance(label, int) and 0 <= label < len(names):
            return int(label)
        known = ", ".join(f"{index} or {name!r}" for index, name in enumerate(names))
        raise ValueError(f"has {self.label} {label!r}; expected {known}")


def _names(prompt: str) -> set[str]:
    return {name for _, name, _, _ in Formatter().parse(prompt) if name}


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
    if isinstance(label, int):
        if 0 <= label < len(candidates):
            return (int(label),)
        raise ValueError(f"has {name} {label!r}; expected 0 to {len(candidates) - 1}")
    texts = _texts(label, name)
    strangers = [text for text in texts if text not in candidates]
    if strangers:
        raise ValueError(
            f"has {name} {strangers[0]!r}, which is none of its candidates: "
            f"{', '.join(map(repr, candidates[:8]))}"
        )
    return tuple(dict.fromkeys(candidates.index(text) for text in texts))
