"""Plain text as training data: windows of tokens, the last tenth held out."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from zo2ext.checkpoints.fingerprint import digest
from zo2ext.errors import UserError

TABLES = (".csv", ".tsv", ".json", ".jsonl", ".parquet", ".arrow")
HELD_OUT = 0.1  # share of the text's characters, at its end


@dataclass(frozen=True)
class TextData:
    """Tokens of a text, split in two.

    Attributes:
        train: Token ids to train on, shape (tokens,), int64; at least one window.
        held_out: Token ids to evaluate on, shape (tokens,), int64; at least one window.
        seq_len: Tokens per window.
    """

    train: Tensor
    held_out: Tensor
    seq_len: int

    @property
    def max_token(self) -> int:
        """Largest token id."""
        return int(max(self.train.max(), self.held_out.max()))

    @property
    def description(self) -> str:
        """Identification of the text: its sizes and a hash of its tokens."""
        tokens = digest(part.numpy().tobytes() for part in (self.train, self.held_out))
        return f"{len(self.train)} + {len(self.held_out)} tokens, {tokens}"

    @property
    def held_out_windows(self) -> int:
        """Number of complete, non-overlapping windows of the held-out text."""
        return len(self.held_out) // self.seq_len

    def batch(self, step: int, *, batch_size: int, seed: int) -> Tensor:
        """Return the training windows of `step`, shape (batch, seq_len); a pure function."""
        generator = np.random.Generator(np.random.Philox(key=seed, counter=step << 192))
        starts = generator.integers(len(self.train) - self.seq_len + 1, size=batch_size)
        return torch.stack([self.train[s : s + self.seq_len] for s in starts.tolist()])

    def held_out_batches(self, *, batch_size: int, windows: int) -> Iterator[Tensor]:
        """Yield up to `windows` held-out windows, evenly spread; shapes (<= batch, seq_len)."""
        available = self.held_out_windows
        rows = self.held_out[: available * self.seq_len].view(available, self.seq_len)
        count = min(windows, available)
        chosen = torch.arange(count) * available // count
        yield from torch.split(rows[chosen], batch_size)


def load_text(
    path: Path,
    tokenize: Callable[[str], list[int]],
    *,
    seq_len: int,
    validation: Path | None = None,
) -> TextData:
    """Read and tokenize a UTF-8 text, holding out its last tenth, or a text of its own.

    Args:
        path: Text to train on.
        tokenize: Function from a text to token ids.
        seq_len: Tokens of one window.
        validation: Text to hold out. None: the last tenth of `path`.

    Raises:
        ValueError: A text is empty, a table, not UTF-8, or shorter than one window.
        OSError: A text cannot be read.
    """
    text = _read(path)
    if validation is None:
        cut = round(len(text) * (1 - HELD_OUT))
        parts = {"first nine tenths": text[:cut], "last tenth": text[cut:]}
    else:
        parts = {"training text": text, "validation text": _read(validation)}
    train, held_out = (torch.tensor(tokenize(p), dtype=torch.int64) for p in parts.values())
    for part, tokens in zip(parts, (train, held_out), strict=True):
        if len(tokens) < seq_len:
            raise UserError(
                f"text {str(path)!r} is too short: {len(tokens)} tokens in its {part}, but one "
                f"window (seq_len) has {seq_len}"
            )
    return TextData(train, held_out, seq_len)


def _read(path: Path) -> str:
    if path.suffix.lower() in TABLES:
        raise UserError(
            f"text {str(path)!r} is a table ({path.suffix}); expected prose: write its texts to a "
            ".txt file, or use its rows with --data in place of --text"
        )
    try:
        text = path.read_text(encoding="utf-8-sig")  # a byte order mark is no part of the text
    except UnicodeDecodeError as error:
        raise UserError(f"text {str(path)!r} is not UTF-8: {error}") from error
    if not text.strip():
        raise UserError(f"text {str(path)!r} is empty")
    return text


@torch.no_grad()
def held_out_loss(
    model: Any, data: TextData, *, batch_size: int, windows: int, device: torch.device
) -> float:
    """Return the mean cross-entropy of `model` on held-out windows, in nats per token."""
    total, count = 0.0, 0
    for ids in data.held_out_batches(batch_size=batch_size, windows=windows):
        on_device = ids.to(device)
        loss = model(input_ids=on_device, labels=on_device, use_cache=False).loss
        total += float(loss) * len(ids)
        count += len(ids)
    return total / count
