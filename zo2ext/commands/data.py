"""``zo2ext train --data`` and ``zo2ext eval --data``: train or evaluate a model on rows."""

from __future__ import annotations

import json
import math
import textwrap
from functools import partial
from itertools import groupby
from typing import Any

from torch import Tensor

from zo2ext.checkpoints.pretrained import context_of, load_config, load_model, load_tokenizer
from zo2ext.commands.arguments import EvalRowsArguments, RowOptions, TrainRowsArguments
from zo2ext.commands.train import train_on
from zo2ext.config import config_from
from zo2ext.engine.engine import ZOEngine
from zo2ext.engine.offload import offload
from zo2ext.model.chunked_loss import chunk_loss
from zo2ext.parallel.micro_batches import Batch, slices_to_run
from zo2ext.streaming.devices.select import make_device
from zo2ext.tasks.row_encoder import Columns, EncodedRow, RowEncoder
from zo2ext.tasks.rows import (
    Rows,
    collate,
    counted,
    encode_rows,
    loss_of_rows,
    read_rows,
    split_rows,
)

LONGEST = 1024  # tokens per row, unless there is a --seq-len
SHOWN = 1500  # characters of the row that is shown


def train_rows(arguments: TrainRowsArguments) -> None:
    """Run ``zo2ext train --data``; see `TrainRowsArguments`."""
    train_on(arguments, RowCorpus)


def evaluate_rows(arguments: EvalRowsArguments) -> dict[str, float]:
    """Run ``zo2ext eval --data``; see `EvalRowsArguments`.

    Returns:
        The printed numbers by name; "loss" is in nats per token that counts.
    """
    config = config_from(arguments)
    make_device(config.device)
    reader = _Reader(arguments)
    rows, title = read_rows(arguments.data, split=arguments.split, subset=arguments.subset)
    data = reader.encode(rows, title)
    chosen = data.spread(arguments.eval_rows)
    model = load_model(arguments.model, reader.model_config, max_token=data.max_token)
    chunk_loss(model)
    with offload(model, config, train=False) as zo:
        loss = loss_of_rows(model, chosen, batch_size=arguments.batch_size, device=zo.device)
    found = {
        "loss": loss,
        "perplexity": math.exp(min(loss, 700)),
        "tokens": counted(chosen),
        "rows": len(chosen),
        "truncated": data.truncated,
        "left_out": data.left_out,
    }
    if arguments.json:
        print(json.dumps(found))
    else:
        print(
            f"{_counts(title, data, reader.seq_len)}\n"
            f"loss {loss:.4f} nats per token, perplexity {found['perplexity']:.4g}; "
            f"{found['tokens']:,} tokens that count, of {len(chosen):,} rows"
        )
    return found


class RowCorpus:
    """Rows to train on, and held-out ones; a `Corpus`."""

    kind = "rows"

    def __init__(self, arguments: TrainRowsArguments) -> None:
        a = self._arguments = arguments
        reader = _Reader(a)
        self.model_config, self.tokenizer = reader.model_config, reader.tokenizer
        rows, title = read_rows(a.data, split=a.split, subset=a.subset)
        if a.validation is None and a.validation_split is None:
            rows, held_out = split_rows(rows, title)
            held_title = f"the last {len(held_out)} rows of {title}"
        else:
            own = a.validation is None  # then it is another split of the same data
            held_out, held_title = read_rows(
                a.data if own else str(a.validation),
                split=a.validation_split or "train",
                subset=a.subset if own else None,
                argument="data" if own else "validation",
            )
        self._train = reader.encode(rows, title, packing=a.packing)
        self._held_out = reader.encode(held_out, held_title)
        self._evaluated = self._held_out.spread(a.eval_rows)
        self.max_token = max(self._train.max_token, self._held_out.max_token)
        self.description = f"{self._train.description}; {self._held_out.description} held out"
        self.settings: dict[str, Any] = {"seq_len": reader.seq_len}
        self.facts = (
            f"{_counts(title, self._train, reader.seq_len, packed=a.packing)}\n"
            f"{_counts(held_title, self._held_out, reader.seq_len)}; "
            f"{len(self._evaluated):,} to evaluate on\n"
            f"row     the first one, with >> and << around what counts in the loss:\n"
            f"{_shown(self.tokenizer, self._train.rows[0])}"
        )
        self.batch_text = (
            f"{a.batch_size} {'windows' if a.packing else 'rows'}, {reader.seq_len} tokens at most"
        )

    def batch(self, zo: ZOEngine, model: Any, step: int) -> Batch:
        """Return this process's share of the rows of `step`."""
        a = self._arguments
        rows = self._train.batch(step, batch_size=a.batch_size, seed=zo.config.seed)
        slices, factor = slices_to_run(len(rows), a.micro_batch, zo.parallel)
        parts = [rows[part] for part in slices]
        losses = [partial(_loss, model, zo, part) for part in parts]
        weights = [factor * counted(part) for part in parts]
        return Batch(losses, weights, sum(len(row.ids) for row in rows))

    def held_out_loss(self, zo: ZOEngine, model: Any) -> float:
        """Return the loss on the held-out rows, per token that counts."""
        size = self._arguments.batch_size
        return loss_of_rows(model, self._evaluated, batch_size=size, device=zo.device)


class _Reader:
    """Encodes tables for the model of the options."""

    def __init__(self, arguments: RowOptions) -> None:
        a = self._arguments = arguments
        self.model_config = load_config(a.model, max_length=a.seq_len or 1)
        self.seq_len = a.seq_len or min(LONGEST, context_of(self.model_config) or LONGEST)
        self.tokenizer = load_tokenizer(a.model)
        self._columns = Columns(
            text=a.text_column,
            prompt=a.prompt_column,
            completion=a.completion_column,
            messages=a.messages_column,
        )

    def encode(self, rows: Any, title: str, *, packing: bool = False) -> Rows:
        columns = self._columns.choose(rows.column_names, title)
        whole = self._arguments.train_on_prompt
        encoder = RowEncoder(self.tokenizer, columns, title, train_on_prompt=whole)
        rows = rows.select_columns(list(columns.values()))
        return encode_rows(rows, encoder, title, seq_len=self.seq_len, packing=packing)


def _loss(model: Any, zo: ZOEngine, rows: list[EncodedRow]) -> Tensor:
    inputs = {name: value.to(zo.device) for name, value in collate(rows).items()}
    loss: Tensor = model(**inputs, use_cache=False).loss
    return loss


def _counts(title: str, data: Rows, seq_len: int, *, packed: bool = False) -> str:
    """Return a line on the sizes of `data`, and on what was cut off or left out."""
    tokens = sum(len(row.ids) for row in data.rows)
    line = (
        f"rows    {title}: {len(data.rows):,} {'windows' if packed else 'rows'}, {tokens:,} "
        f"tokens, {data.counted:,} of them count"
    )
    for count, what in (
        (data.truncated, f"rows are longer than {seq_len} tokens and lose their end"),
        (data.left_out, "rows without a token to learn from are left out"),
        (data.merged, "rows have a token that spans the end of the prompt, which counts"),
    ):
        line += f"\n        note: {count:,} {what}" if count else ""
    return line


def _shown(tokenizer: Any, row: EncodedRow) -> str:
    """Return `row` as text, with what counts marked."""
    pieces = []
    for counts, group in groupby(zip(row.ids.tolist(), row.counts.tolist(), strict=True), _second):
        text = tokenizer.decode([token for token, _ in group])
        pieces.append(f">>{text}<<" if counts else text)
    whole = "".join(pieces)
    return textwrap.indent(whole[:SHOWN] + " ..." * (len(whole) > SHOWN), " " * 8)


def _second(pair: tuple[int, bool]) -> bool:
    return pair[1]
