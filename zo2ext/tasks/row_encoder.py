"""Rows of a table as token ids, and which of them count in the loss.

Texts are tokenized as TRL's ``SFTTrainer`` does: with the tokens that the tokenizer puts around
every text, and with the end-of-text token after a text and after a completion. Chat templates add
all of theirs themselves.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import takewhile
from typing import Any

import numpy as np

from zo2ext._format import without_surrogates
from zo2ext.checkpoints.pretrained import as_user_errors
from zo2ext.errors import UserError

_MARKS = re.compile(r"\{%-?\s*generation\s*-?%\}")  # of answers, in chat templates that have them
KINDS = (("messages",), ("prompt", "completion"), ("text",))  # in order of preference


@dataclass(frozen=True)
class Columns:
    """Names that the user gave to columns, by what they hold; None: not given."""

    text: str | None = None
    prompt: str | None = None
    completion: str | None = None
    messages: str | None = None

    def choose(self, there: Sequence[str], source: str) -> dict[str, str]:
        """Return the columns to read, by what they hold.

        Args:
            there: Columns of the data.
            source: Name of the data for messages.

        Raises:
            UserError: A column is missing, or none is recognized by its name.
        """
        named = {part: name for part, name in asdict(self).items() if name is not None}
        for kind in KINDS:
            columns = {part: named.get(part, part) for part in kind}
            missing = [name for name in columns.values() if name not in there]
            if not missing and (not named or set(kind) & set(named)):
                return columns
            if set(kind) & set(named):
                raise UserError(
                    f"{source} has no column {' and no column '.join(map(repr, missing))}; its "
                    f"columns are {', '.join(there)}"
                )
        raise UserError(
            f"{source} has the columns {', '.join(there)}; expected messages, or prompt and "
            "completion, or text: name yours with --messages-column, --prompt-column and "
            "--completion-column, or --text-column"
        )


@dataclass(frozen=True, eq=False)
class EncodedRow:
    """A row as token ids.

    Attributes:
        ids: Token ids, shape (tokens,), int32.
        counts: Whether each token counts in the loss, shape (tokens,), bool. The first never does,
            as no token comes before it.
    """

    ids: Any
    counts: Any

    def cut(self, start: int, end: int) -> EncodedRow:
        """Return the tokens from `start` to before `end`, as a row of its own."""
        ids, counts = self.ids[start:end], self.counts[start:end].copy()
        counts[:1] = False
        return EncodedRow(ids, counts)


class RowEncoder:
    """Converts rows to token ids.

    Args:
        tokenizer: Tokenizer of the model.
        columns: Columns to read, from `Columns.choose`.
        source: Name of the data for messages.
        train_on_prompt: Whether all tokens count, not only those of answers.

    Attributes:
        merged: Number of rows so far in which a token spans the end of the prompt.

    Raises:
        UserError: There are messages, but the tokenizer has no chat template.
    """

    def __init__(
        self, tokenizer: Any, columns: Mapping[str, str], source: str, *, train_on_prompt: bool
    ) -> None:
        self._tokenizer, self._columns, self._source = tokenizer, columns, source
        self._all, self.merged = train_on_prompt, 0
        self._end: str = tokenizer.eos_token or ""
        if "messages" in columns:
            self._check_template()

    def encode(self, row: Mapping[str, Any], number: int) -> EncodedRow | None:
        """Return the tokens of `row`, the one at `number` counted from 1; None if it is empty.

        Raises:
            UserError: A value is of another kind than its column, or the chat template fails.
        """
        where = f"row {number} of {self._source}"
        values = {part: row[column] for part, column in self._columns.items()}
        answer = list(values.values())[-1]
        if None in values.values() or answer in ("", []):
            return None
        chat = "messages" in values or ("prompt" in values and isinstance(answer, list))
        for part, value in values.items():
            if not isinstance(value, list if chat else str):
                expected = "a list of messages" if chat else "text"
                raise _unexpected(where, self._columns[part], value, expected)
        if not chat:
            return self._text(values.get("prompt"), answer)
        *before, turns = (self._messages(where, part, values[part]) for part in values)
        if before:
            (prompt,) = before
            turns = prompt + turns
            return self._conversation(where, turns, [(len(prompt), len(turns))])
        if _MARKS.search(self._tokenizer.get_chat_template()) and not self._all:
            return self._marked(where, turns)
        answers = [(i, i + 1) for i, turn in enumerate(turns) if turn["role"] == "assistant"]
        return self._conversation(where, turns, answers)

    def _text(self, prompt: str | None, answer: str) -> EncodedRow:
        end = "" if answer.endswith(self._end) else self._end
        ids, start = self._ids((prompt or "") + answer + end), 0
        if prompt is not None:
            before = self._ids(prompt)
            start = _common(before, ids)
            self.merged += start < len(before)
        return self._row(ids, [(start, len(ids))])

    def _conversation(
        self, where: str, turns: Sequence[Any], answers: Sequence[tuple[int, int]]
    ) -> EncodedRow:
        """Return the tokens of `turns`; `answers` are ranges of turns that count."""
        self._check_template()
        with as_user_errors(f"cannot apply the chat template to {where}"):
            whole = self._render(turns)
            bounds = [
                (self._render(turns[:start], ask=True) if start else "", self._render(turns[:end]))
                for start, end in answers
                if not self._all
            ]
        if not all(whole.startswith(text) for pair in bounds for text in pair):
            raise UserError(
                f"{where}: the chat template changes earlier turns when later ones follow, so the "
                "tokens of the answers are not known; train on all tokens with --train-on-prompt, "
                "on one answer per row, as prompt and completion, or mark the answers in the "
                "template with {% generation %}"
            )
        ids = self._ids(whole, special=False)
        spans = [
            (_common(self._ids(before, special=False), ids), self._end_of(until, whole, ids))
            for before, until in bounds
        ]
        return self._row(ids, spans)

    def _marked(self, where: str, turns: Sequence[Any]) -> EncodedRow:
        """Return the tokens of `turns`, of which those that the template marks count."""
        with as_user_errors(f"cannot apply the chat template to {where}"):
            found = self._tokenizer.apply_chat_template(
                turns, tokenize=True, return_dict=True, return_assistant_tokens_mask=True
            )
        marks = found["assistant_masks"]
        return self._row(found["input_ids"], [(i, i + 1) for i, mark in enumerate(marks) if mark])

    def _end_of(self, until: str, whole: str, ids: Sequence[int]) -> int:
        return len(ids) if until == whole else _common(self._ids(until, special=False), ids)

    def _row(self, ids: Sequence[int], spans: Iterable[tuple[int, int]]) -> EncodedRow:
        counts = np.full(len(ids), self._all)
        for start, end in spans:
            counts[start:end] = True
        return EncodedRow(np.array(ids, np.int32), counts).cut(0, len(ids))

    def _messages(self, where: str, part: str, value: Any) -> list[dict[str, Any]]:
        turns = [turn for turn in value if isinstance(turn, Mapping) and turn.get("role")]
        if len(turns) < len(value):
            expected = "a list of messages, each with a role and its content"
            raise _unexpected(where, self._columns[part], value, expected)
        # A table has all keys in every message: None where a message lacks one.
        return [{k: v for k, v in turn.items() if v is not None} for turn in turns]

    def _check_template(self) -> None:
        if not self._tokenizer.chat_template:
            raise UserError(
                f"{self._source} has messages, but the model's tokenizer has no chat template: "
                "expected a model tuned for chat, or texts in the columns prompt and completion"
            )

    def _render(self, turns: Sequence[Any], *, ask: bool = False) -> str:
        text: str = self._tokenizer.apply_chat_template(
            turns, tokenize=False, add_generation_prompt=ask
        )
        return text

    def _ids(self, text: str, *, special: bool = True) -> list[int]:
        ids: list[int] = self._tokenizer(
            without_surrogates(text), add_special_tokens=special, verbose=False
        )["input_ids"]
        return ids


def _common(first: Sequence[int], second: Sequence[int]) -> int:
    """Return the number of tokens at the beginning that are the same."""
    return sum(1 for _ in takewhile(lambda p: p[0] == p[1], zip(first, second, strict=False)))


def _unexpected(where: str, column: str, value: Any, expected: str) -> UserError:
    found = f"{type(value).__name__} {str(value)[:60]!r}"
    return UserError(f"{where}: column {column!r} has {found}; expected {expected}")
