"""``zo2ext eval --text``: the loss of a causal language model on a text."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

from zo2ext.checkpoints.pretrained import load_config, load_model, load_tokenizer
from zo2ext.commands.engine_options import METHOD, PLACE, PlaceOptions
from zo2ext.commands.options import option
from zo2ext.engine.offload import offload
from zo2ext.model.chunked_loss import chunk_loss
from zo2ext.ops.formats import Storage
from zo2ext.streaming.devices.select import make_device
from zo2ext.tasks.text import held_out_loss, load_text


@dataclass(frozen=True, kw_only=True)
class EvalTextArguments(PlaceOptions):
    """Say the loss of a causal language model on the last tenth of a text, as zo2ext train reports
    it. With --task, judge it on a task: zo2ext eval --task NAME --help."""

    model: str = option("Model folder, or its name on the Hugging Face hub.", group="required")
    text: str = option("UTF-8 text file. Its last tenth is read.", group="required")
    seq_len: int = option("Tokens in a window.", 128, group=METHOD)
    eval_windows: int = option(
        "Windows to evaluate on, spread evenly; all, where there are fewer.", 1000, group=METHOD
    )
    storage: Storage | None = option(
        "Weights at rest. Default: as the model is saved.", None, group=METHOD
    )
    batch_size: int = option("Windows that share each load of the weights.", 8, group=PLACE)

    def check(self) -> None:
        """Refuse wrong values before anything is loaded.

        Raises:
            ValueError: Naming the argument and what it got.
        """
        self.at_least({"batch_size": 1, "seq_len": 2, "eval_windows": 1})
        make_device(self.place().device)
        if not Path(self.text).is_file():
            raise ValueError(f"text is {self.text!r}, which is no file")


def evaluate_text(arguments: EvalTextArguments) -> float:
    """Run ``zo2ext eval --text``; see `EvalTextArguments`.

    Returns:
        The loss that is printed: mean cross-entropy, in nats a token.

    Raises:
        ValueError: An argument is wrong, or what it names cannot be used.
        OutOfDeviceMemory: With what takes how much.
    """
    arguments.check()
    settings = load_config(arguments.model, max_length=arguments.seq_len)
    tokenizer = load_tokenizer(arguments.model)
    data = load_text(
        Path(arguments.text),
        lambda text: tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"],
        seq_len=arguments.seq_len,
    )
    model = load_model(arguments.model, settings, max_token=data.max_token)
    config = arguments.place().replace(storage=arguments.storage)
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
        f"held-out loss {loss:.4f} nats a token, perplexity {math.exp(min(loss, 700)):.4g}; "
        f"{windows} windows of {arguments.seq_len} tokens, of {data.held_out_windows}"
    )
    return loss
