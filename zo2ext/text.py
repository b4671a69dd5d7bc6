"""Plain text as training material: windows of tokens, the last tenth held out."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

HELD_OUT = 0.1  # of the text, from its end


@dataclass(frozen=True)
class TextData:
    """Tokens of a text, split in two.

    Attributes:
        train, held_out: Token ids, shape (tokens,), int64.
        seq_len: Tokens of one window.
    """

    train: Tensor
    held_out: Tensor
    seq_len: int

    def batch(self, step: int, *, batch_size: int, seed: int) -> Tensor:
        """Training windows of `step`, a function of its arguments alone. Shape (batch, seq_len)."""
        generator = np.random.Generator(np.random.Philox(key=seed, counter=[0, 0, 0, step]))
        starts = generator.integers(len(self.train) - self.seq_len + 1, size=batch_size)
        return torch.stack([self.train[s : s + self.seq_len] for s in starts.tolist()])

    def held_out_batches(self, batch_size: int) -> Iterator[Tensor]:
        """All whole windows of the held-out text, side by side; (<= batch_size, seq_len) each."""
        whole = len(self.held_out) // self.seq_len * self.seq_len
        yield from torch.split(self.held_out[:whole].view(-1, self.seq_len), batch_size)

    @property
    def held_out_windows(self) -> int:
        return len(self.held_out) // self.seq_len


def load_text(path: Path, tokenize: Callable[[str], list[int]], *, seq_len: int) -> TextData:
    """Read and tokenize a UTF-8 text, holding out its last tenth.

    Raises:
        ValueError: The text is empty, not UTF-8, or either part is shorter than one window.
        OSError: `path` cannot be read.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"text {path} is not UTF-8: {error}") from error
    if not text.strip():
        raise ValueError(f"text {path} is empty")
    cut = round(len(text) * (1 - HELD_OUT))
    train, held_out = (torch.tensor(tokenize(part)) for part in (text[:cut], text[cut:]))
    for name, tokens in (("first nine tenths", train), ("last tenth, held out,", held_out)):
        if len(tokens) < seq_len:
            raise ValueError(
                f"text {path} is too short: its {name} have {len(tokens)} tokens, "
                f"one window of seq_len has {seq_len}"
            )
    return TextData(train, held_out, seq_len)


@torch.no_grad()
def held_out_loss(model: Any, data: TextData, *, batch_size: int, device: torch.device) -> float:
    """Mean cross-entropy, in nats a token, of `model` on the held-out windows."""
    total, count = 0.0, 0
    for ids in data.held_out_batches(batch_size):
        on_device = ids.to(device)
        loss = model(input_ids=on_device, labels=on_device, use_cache=False).loss
        total += float(loss) * len(ids)
        count += len(ids)
    return total / count
