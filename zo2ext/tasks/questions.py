"""Examples of a task as token ids, for ``zo2ext train --task`` and ``zo2ext eval``."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict
from typing import Any

from zo2ext.checkpoints.fingerprint import digest
from zo2ext.checkpoints.pretrained import context_of, load_config, load_tokenizer
from zo2ext.errors import UserError
from zo2ext.tasks import Example, Sizes, get_task, readers
from zo2ext.tasks.encoding import Encoded, Encoder
from zo2ext.tasks.order import shuffled

LONGEST = 2048  # tokens, the context of MeZO's models


class TaskQuestions:
    """Examples of a task, encoded by a model's tokenizer, and their order in training.

    Args:
        arguments: Arguments of ``zo2ext train --task`` or ``zo2ext eval``.
        seed: Seed of the order, and of the choice of examples.

    Attributes:
        train: Encoded training examples.
        asked: Encoded examples of "dev" and "test".
        counts: Number of examples in train, dev and test.
        notes: Remarks on the data, for the user.

    Raises:
        ValueError: The data or the tokenizer cannot be used, for the reason in the message.
    """

    def __init__(self, arguments: Any, seed: int) -> None:
        self.arguments, self.seed, self.task = arguments, seed, get_task(arguments.task)
        self.model_config = load_config(arguments.model, max_length=1)
        self.tokenizer = load_tokenizer(arguments.model)
        asked = {name: getattr(arguments, f"{name}_size") for name in ("train", "dev", "test")}
        given = {name: size for name, size in asked.items() if size is not None}
        self.sizes = Sizes(**{**asdict(self.task.sizes), **given})
        data = readers.load(self.task, arguments.data, self.sizes, seed)
        if arguments.shots > len(data.train):
            raise UserError(
                f"shots is {arguments.shots}, but there are {len(data.train)} training examples"
            )
        self.notes, self.counts = data.notes, (len(data.train), len(data.dev), len(data.test))
        self.max_length = self._max_length()
        self._encoder = Encoder(self.tokenizer, self.task, self.max_length)
        self._plain = {"dev": data.dev, "test": data.test}
        self._shots = data.train[: arguments.shots]
        self.train = self.encoded(data.train)
        self.asked = {name: self.encoded(examples) for name, examples in self._plain.items()}

    def encoded(self, examples: Iterable[Example], shots: Sequence[Example] = ()) -> list[Encoded]:
        return [self._encoder.encode(example, shots) for example in examples]

    def with_shots(self, split: str) -> list[Encoded]:
        """Encode "dev" or "test" with demonstrations before each prompt."""
        return self.encoded(self._plain[split], self._shots)

    @property
    def description(self) -> str:
        """Number and digest of the examples, which identify them."""
        groups = (self.train, *self.asked.values())
        lines = (
            repr((e.candidates, e.example.correct, e.example.answers)).encode() + b"\n"
            for group in groups
            for e in group
        )
        return f"{' + '.join(str(len(g)) for g in groups)} examples, {digest(lines)}"

    @property
    def max_token(self) -> int:
        """Largest token id of the data."""
        encoded = [*self.train, *(e for split in self.asked.values() for e in split)]
        return max(max(text.ids) for e in encoded for text in e.candidates)

    def batch(self, step: int, size: int) -> list[Encoded]:
        """Return the training examples of `step`: each once per epoch, in an order of its own."""
        positions = range(step * size, (step + 1) * size)
        return [self.train[i] for i in shuffled(positions, len(self.train), self.seed)]

    def _max_length(self) -> int:
        asked, most = self.arguments.max_length, context_of(self.model_config)
        if asked is not None and most is not None and asked > most:
            raise UserError(
                f"max_length is {asked}, but model {self.arguments.model!r} reads at most {most}"
            )
        return asked or min(LONGEST, most or LONGEST)
