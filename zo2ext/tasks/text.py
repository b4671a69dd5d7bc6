"""Plain text as training material: windows of tokens, the last tenth held out."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from zo2ext.checkpoints.fingerprint import digest

HELD_OUT = 0.1  # of the text's characters, from its end


@dataclass(frozen=True)
class TextData:
    """Tokens of a text, split in two.

    Attributes:
        train, held_out: Token ids, shape (tokens,), int64; at least one window each.
        seq_len: Tokens of one window.
    """

    train: Tensor
    held_out: Tensor
    seq_len: int

    @property
    def max_token(self) -> int:
        """The largest token id."""
        return int(max(self.train.max(), self.held_out.max()))

    @property
    def description(self) -> str:
        """What the text is, in a word that no other text has."""
        tokens = digest(part.numpy().tobytes() for part in (self.train, self.held_out))
        return f"{len(self.train)} + {len(self.held_out)} tokens, {tokens}"

    @property
    def held_out_windows(self) -> int:
        """Whole windows of the held-out text, side by side."""
        return len(self.held_out) // self.seq_len

    def batch(self, step: int, *, batch_size: int, seed: int) -> Tensor:
        """Training windows of `step`, a function of its arguments alone. Shape (batch, seq_len)."""
        generator = np.random.Generator(np.random.Philox(key=seed, counter=step << 192))
        starts = generator.integers(len(self.train) - self.seq_len + 1, size=batch_size)
        return torch.stack([self.train[s : s + self.seq_len] for s in starts.tolist()])

    def held_out_batches(self, *, batch_size: int, windows: int) -> Iterator[Tensor]:
        """At most `windows` held-out windows, spread evenly. Shapes (<= batch_size, seq_len)."""
        there = self.held_out_windows
        rows = self.held_out[: there * self.seq_len].view(there, self.seq_len)
        taken = min(windows, there)
        chosen = torch.arange(taken) * there // taken
        yield from torch.split(rows[chosen], batch_size)


def load_text(path: Path, tokenize: Callable[[str], list[int]], *, seq_len: int) -> TextData:
    """Read and tokenize a UTF-8 text, holding out its last tenth.

    Raises:
        ValueError: The text is empty, not UTF-8, or either part is shorter than one window.
        OSError: `path` cannot be read.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")  # a byte order mark is no part of the text
    except UnicodeDecodeError as error:
        raise ValueError(
            f"text {str(path)!r} is not UTF-8: {error.reason} at byte {error.start}"
        ) from error
    if not text.strip():
        raise ValueError(f"text {str(path)!r} is empty")
    cut = round(len(text) * (1 - HELD_OUT))
    train, held_out = (
        torch.tensor(tokenize(part), dtype=torch.int64) for part in (text[:cut], text[cut:])
    )
    for part, tokens in (("first nine tenths", train), ("last tenth, held out", held_out)):
        if len(tokens) < seq_len:
            raise ValueError(
                f"text {str(path)!r} is too short: tokens in its {part}: {len(tokens)}; "
                f"in one window (seq_len): {seq_len}"
            )
    return TextData(train, held_out, seq_len)


@torch.no_grad()
def held_out_loss(
    model: Any, data: TextData, *, batch_size: int, windows: int, device: torch.device
) -> float:
    """Mean cross-entropy, in nats a token, of `model` on held-out windows."""
    total, count = 0.0, 0
    for ids in data.held_out_batches(batch_size=batch_size, windows=windows):
        on_device = ids.to(device)
        loss = model(input_ids=on_device, labels=on_device, use_cache=False).loss
        total += float(loss) * len(ids)
        count += len(ids)
    return total / count
