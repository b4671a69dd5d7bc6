"""Examples as token ids: demonstrations in front, cut from the left to what a model reads."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from zo2ext.tasks.task import Example, Kind, Task

SEPARATOR = "\n\n"  # between demonstrations, and before the prompt


@dataclass(frozen=True)
class Text:
    """Token ids, of which the last `answer` are the candidate's; 0 for a prompt alone."""

    ids: tuple[int, ...]
    answer: int


@dataclass(frozen=True)
class Encoded:
    """An example as a model reads it.

    Attributes:
        example: It.
        candidates: Prompt and candidate, one each.
        prompt: The prompt alone, for a model to continue.
        truncated: Whether any of these lost its beginning.
    """

    example: Example
    candidates: tuple[Text, ...]
    prompt: Text
    truncated: bool


class Encoder:
    """Turns the examples of a task into token ids, as MeZO (arXiv:2305.17333) does.

    A candidate's tokens are as many as it adds to the prompt's. A text that is longer than the
    model reads loses tokens from its left, after the tokens that begin every text.

    Args:
        tokenizer: Of the model.
        task: Whose examples they are.
        max_length: Tokens that the model reads, new ones included.

    Raises:
        ValueError: `max_length` leaves no room for a prompt.
    """

    def __init__(self, tokenizer: Any, task: Task, max_length: int) -> None:
        self._tokenizer = tokenizer
        self._begin = _beginning(tokenizer)
        generates = task.kind is Kind.GENERATION
        self._max_prompt = max_length - (task.max_new_tokens if generates else 0)
        self._room = self._max_prompt - len(self._begin)  # for all but the beginning
        if self._room < 1:
            raise ValueError(
                f"max_length is {max_length} tokens, which leaves no room for a prompt of task "
                f"{task.name}" + (f" beside {task.max_new_tokens} new tokens" if generates else "")
            )

    def encode(self, example: Example, shots: Sequence[Example] = ()) -> Encoded:
        """`example` after the solved examples `shots`.

        Raises:
            ValueError: A candidate alone is longer than the model reads.
        """
        shown = "".join(shot.solved + SEPARATOR for shot in shots)
        prompt = (shown + example.prompt).lstrip()
        ids = self._ids(prompt)
        candidates, truncated = [], len(ids) > self._room
        for continuation in example.candidates:
            full = self._ids(prompt + continuation)
            answer = max(1, len(full) - len(ids))
            if answer >= self._room:
                raise ValueError(
                    f"the answer {continuation.strip()[:60]!r} has {answer} tokens, but a text "
                    f"may have {self._max_prompt}"
                )
            truncated |= len(full) > self._room
            candidates.append(Text(self._cut(full), answer))
        return Encoded(example, tuple(candidates), Text(self._cut(ids), 0), truncated)

    def _cut(self, ids: list[int]) -> tuple[int, ...]:
        return (*self._begin, *ids[-self._room :])

    def _ids(self, text: str) -> list[int]:
        ids: list[int] = self._tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        return ids


def _beginning(tokenizer: Any) -> tuple[int, ...]:
    """The tokens that the tokenizer puts before every text."""
    bare = tokenizer("a", add_special_tokens=False)["input_ids"]
    full = tokenizer("a")["input_ids"]
    for start in range(len(full) - len(bare) + 1):
        if full[start : start + len(bare)] == bare:
            return tuple(full[:start])
    return ()
