"""``zo2ext eval --text``: the loss of a causal language model on a text."""

from __future__ import annotations

import math
from pathlib import Path

from zo2ext.checkpoints.pretrained import load_config, load_model, load_tokenizer
from zo2ext.commands.arguments import EvalTextArguments
from zo2ext.config import config_from
from zo2ext.engine.offload import offload
from zo2ext.model.chunked_loss import chunk_loss
from zo2ext.streaming.devices.select import make_device
from zo2ext.tasks.text import held_out_loss, load_text


def evaluate_text(arguments: EvalTextArguments) -> float:
    """Run ``zo2ext eval --text``; see `EvalTextArguments`.

    Returns:
        The printed loss: mean cross-entropy, in nats per token.
    """
    config = config_from(arguments)
    make_device(config.device)
    settings = load_config(arguments.model, max_length=arguments.seq_len)
    tokenizer = load_tokenizer(arguments.model)
    data = load_text(
        Path(arguments.text),
        lambda text: tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"],
        seq_len=arguments.seq_len,
    )
    model = load_model(arguments.model, settings, max_token=data.max_token)
    chunk_loss(model)
    with offload(model, config, train=False) as zo:
        loss = held_out_loss(
            model,
            data,
            batch_size=arguments.batch_size,
            windows=arguments.eval_windows,
            device=zo.device,
        )
    windows = min(arguments.eval_windows, data.held_out_windows)
    print(
        f"held-out loss {loss:.4f} nats per token, perplexity {math.exp(min(loss, 700)):.4g}; "
        f"{windows} windows of {arguments.seq_len} tokens, of {data.held_out_windows}"
    )
    return loss
