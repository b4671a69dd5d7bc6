"""Examples as token ids, after demonstrations, truncated on the left to the model's context."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from zo2ext._format import without_surrogates
from zo2ext.errors import UserError
from zo2ext.tasks.task import Example, Kind, Task

SEPARATOR = "\n\n"  # between demonstrations, and before the prompt


@dataclass(frozen=True)
class Text:
    """Token ids; the last `answer` of them are the candidate's (0 for a prompt alone)."""

    ids: tuple[int, ...]
    answer: int


@dataclass(frozen=True)
class Encoded:
    """An example as token ids.

    Attributes:
        example: The example.
        candidates: Prompt and candidate, for each candidate.
        prompt: The prompt alone.
        truncated: Whether any of these texts lost its beginning.
    """

    example: Example
    candidates: tuple[Text, ...]
    prompt: Text
    truncated: bool


class Encoder:
    """Converts the examples of a task to token ids, as MeZO (arXiv:2305.17333) does.

    The tokens of a candidate are those that it adds to the prompt. A text longer than the context
    loses tokens on the left, but keeps the tokens that begin every text.

    Args:
        tokenizer: Tokenizer of the model.
        task: Task of the examples.
        max_length: Number of tokens in the model's context, including new ones.

    Raises:
        UserError: `max_length` leaves no room for a prompt.
    """

    def __init__(self, tokenizer: Any, task: Task, max_length: int) -> None:
        self._tokenizer = tokenizer
        self._begin = _beginning(tokenizer)
        generates = task.kind is Kind.GENERATION
        self._max_prompt = max_length - (task.max_new_tokens if generates else 0)
        self._room = self._max_prompt - len(self._begin)
        if self._room < 1:
            raise UserError(
                f"max_length is {max_length} tokens, which leaves no room for a prompt of task "
                f"{task.name}" + (f" beside {task.max_new_tokens} new tokens" if generates else "")
            )

    def encode(self, example: Example, shots: Sequence[Example] = ()) -> Encoded:
        """Return `example` after the solved examples `shots`.

        Raises:
            UserError: A candidate alone is longer than the context.
        """
        shown = "".join(shot.solved + SEPARATOR for shot in shots)
        prompt = (shown + example.prompt).lstrip()
        ids = self._ids(prompt)
        candidates, truncated = [], len(ids) > self._room
        for continuation in example.candidates:
            full = self._ids(prompt + continuation)
            answer = max(1, len(full) - len(ids))
            if answer >= self._room:
                raise UserError(
                    f"the answer {continuation.strip()[:60]!r} has {answer} tokens, but a text "
                    f"may have {self._max_prompt}"
                )
            truncated |= len(full) > self._room
            candidates.append(Text(self._cut(full), answer))
        return Encoded(example, tuple(candidates), Text(self._cut(ids), 0), truncated)

    def _cut(self, ids: list[int]) -> tuple[int, ...]:
        return (*self._begin, *ids[-self._room :])

    def _ids(self, text: str) -> list[int]:
        ids: list[int] = self._tokenizer(
            without_surrogates(text), add_special_tokens=False, verbose=False
        )["input_ids"]
        return ids


def _beginning(tokenizer: Any) -> tuple[int, ...]:
    """Return the tokens that the tokenizer puts before every text."""
    bare = tokenizer("a", add_special_tokens=False)["input_ids"]
    full = tokenizer("a")["input_ids"]
    for start in range(len(full) - len(bare) + 1):
        if full[start : start + len(bare)] == bare:
            return tuple(full[:start])
    return ()
