"""Rows of a table as training data: read, encoded, cut or packed, some held out."""

from __future__ import annotations

import csv
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from zo2ext.checkpoints.fingerprint import digest
from zo2ext.errors import UserError
from zo2ext.tasks.order import shuffled
from zo2ext.tasks.readers import import_datasets, load_errors
from zo2ext.tasks.row_encoder import EncodedRow, RowEncoder
from zo2ext.tasks.text import HELD_OUT

FORMATS = {".jsonl": "json", ".json": "json", ".csv": "csv", ".tsv": "csv", ".parquet": "parquet"}
IGNORED = -100  # label of a token that does not count


@dataclass(frozen=True)
class Rows:
    """Encoded rows.

    Attributes:
        rows: Rows with a token to learn from; at least one.
        truncated: Number of rows that lost their end.
        left_out: Number of rows without a token to learn from.
        merged: Number of rows in which a token spans the end of the prompt.
    """

    rows: Sequence[EncodedRow]
    truncated: int
    left_out: int
    merged: int

    @property
    def counted(self) -> int:
        """Number of tokens that count in the loss."""
        return counted(self.rows)

    @property
    def max_token(self) -> int:
        """Largest token id."""
        return max(int(row.ids.max()) for row in self.rows)

    @property
    def description(self) -> str:
        """Identification of the rows: their number and a digest of all tokens and labels."""
        parts = (
            part
            for row in self.rows
            for part in (
                len(row.ids).to_bytes(8, "little"),
                row.ids.tobytes(),
                row.counts.tobytes(),
            )
        )
        return f"{len(self.rows)} rows, {digest(parts)}"

    def batch(self, step: int, *, batch_size: int, seed: int) -> list[EncodedRow]:
        """Return the rows of `step`: each once per epoch; a pure function."""
        positions = range(step * batch_size, (step + 1) * batch_size)
        return [self.rows[i] for i in shuffled(positions, len(self.rows), seed)]

    def spread(self, count: int | None) -> list[EncodedRow]:
        """Return up to `count` rows, evenly spread; None: all."""
        there = len(self.rows)
        count = min(there, count or there)
        return [self.rows[i * there // count] for i in range(count)]


def read_rows(
    source: str, *, split: str, subset: str | None = None, argument: str = "data"
) -> tuple[Any, str]:
    """Read a table with ``datasets``; its own code is never run.

    Args:
        source: File, folder, or name of a data set on the Hugging Face hub.
        split: Split to read; a file has only "train". Slices such as "train[:1000]" are valid.
        subset: Configuration of a data set that has several.
        argument: Name of the option that `source` comes from, for messages.

    Returns:
        The rows, and their name for messages.

    Raises:
        UserError: ``datasets`` is not installed, or the data cannot be read or is empty.
    """
    path, title = Path(source), f"{argument} {source!r}, split {split!r}"
    options: dict[str, Any] = {"split": split}
    datasets = import_datasets(
        f"{argument} is read with the package datasets, which is missing: pip install 'zo2ext[hf]'"
    )
    form = None
    if path.is_file():
        form = FORMATS.get(path.suffix.lower())
        if not path.stat().st_size:
            raise UserError(f"{argument} {source!r} is empty")
        if form is None:
            raise UserError(
                f"{argument} is {source!r}; expected a file that ends in {', '.join(FORMATS)}"
            )
        options |= {"data_files": [str(path)]} | (_as_text(datasets, path) if form == "csv" else {})
    elif not path.is_dir() and (path.suffix in FORMATS or source.startswith((".", "/", "~"))):
        raise UserError(f"{argument} is {source!r}, which is neither a file nor a directory")
    with load_errors(
        title, "" if path.exists() else " (there is no such file or folder; the hub was asked)"
    ):
        rows: Any = datasets.load_dataset(*((form,) if form else (source, subset)), **options)
    if not len(rows):
        raise UserError(f"{title} has no rows")
    return rows, title


def split_rows(rows: Any, title: str) -> tuple[Any, Any]:
    """Return the rows to train on and those to hold out: the last tenth, at least one."""
    cut = min(round(len(rows) * (1 - HELD_OUT)), len(rows) - 1)
    if cut < 1:
        raise UserError(f"{title} has 1 row; at least 2 are needed: 1 to train on and 1 held out")
    return rows.select(range(cut)), rows.select(range(cut, len(rows)))


def encode_rows(
    rows: Iterable[Any], encoder: RowEncoder, title: str, *, seq_len: int, packing: bool = False
) -> Rows:
    """Encode `rows`; those longer than `seq_len` tokens lose their end.

    Args:
        rows: Rows of a table.
        encoder: Encoder of these rows.
        title: Name of the rows for messages.
        seq_len: Tokens per row at most.
        packing: Whether to join the rows into windows of `seq_len` tokens instead.

    Raises:
        UserError: No row has a token to learn from.
    """
    before = encoder.merged
    found = [encoder.encode(row, number) for number, row in enumerate(rows, start=1)]
    full = [row for row in found if row is not None and row.counts.any()]
    kept = _packed(full, seq_len) if packing else [row.cut(0, seq_len) for row in full]
    kept = [row for row in kept if row.counts.any()]
    if not kept:
        raise UserError(
            f"{title}: none of {len(found)} rows has a token to learn from in its first {seq_len} "
            "(seq_len): expected an answer, which is a completion or an assistant's message"
        )
    truncated = 0 if packing else sum(len(row.ids) > seq_len for row in full)
    left_out = len(found) - (len(full) if packing else len(kept))
    return Rows(kept, truncated, left_out, encoder.merged - before)


def collate(rows: Sequence[EncodedRow]) -> dict[str, Tensor]:
    """Return the input of a model for `rows`, padded on the right; shapes (rows, longest)."""
    longest = max(len(row.ids) for row in rows)
    ids = torch.zeros(len(rows), longest, dtype=torch.int64)
    mask, labels = torch.zeros_like(ids), torch.full_like(ids, IGNORED)
    for i, row in enumerate(rows):
        own = torch.from_numpy(row.ids.astype(np.int64))
        ids[i, : len(own)], mask[i, : len(own)] = own, 1
        labels[i, : len(own)] = own.where(torch.from_numpy(row.counts), IGNORED)
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def counted(rows: Iterable[EncodedRow]) -> int:
    """Return the number of tokens of `rows` that count in the loss."""
    return sum(int(row.counts.sum()) for row in rows)


@torch.no_grad()
def loss_of_rows(
    model: Any, rows: Sequence[EncodedRow], *, batch_size: int, device: torch.device
) -> float:
    """Return the mean cross-entropy of `model` on `rows`, in nats per token that counts."""
    total = 0.0
    for start in range(0, len(rows), batch_size):
        part = rows[start : start + batch_size]
        inputs = {name: value.to(device) for name, value in collate(part).items()}
        total += float(model(**inputs, use_cache=False).loss) * counted(part)
    return total / counted(rows)


def _packed(rows: Sequence[EncodedRow], seq_len: int) -> list[EncodedRow]:
    whole = EncodedRow(
        np.concatenate([row.ids for row in rows]), np.concatenate([row.counts for row in rows])
    )
    return [whole.cut(i, i + seq_len) for i in range(0, len(whole.ids), seq_len)]


def _as_text(datasets: Any, path: Path) -> dict[str, Any]:
    """Return options that read every cell as text: a completion may be 4, or NA."""
    sep = "\t" if path.suffix.lower() == ".tsv" else ","
    with path.open(newline="", encoding="utf-8-sig", errors="replace") as file:
        reader = csv.reader(file, delimiter=sep)
        names = next(reader, [])
        for cells in reader:  # with more of them, pandas would shift the columns
            if cells and len(cells) != len(names):
                raise UserError(
                    f"line {reader.line_num} of {str(path)!r} has {len(cells)} cells, but the "
                    f"first line has {len(names)}; expected quotes around text with {sep!r} in it"
                )
    features = datasets.Features({name: datasets.Value("string") for name in names})
    return {"sep": sep, "features": features, "keep_default_na": False}
