"""A model of the command line, open for training: loaded into the store, and left there."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from zo2ext._format import gib
from zo2ext.checkpoints.pretrained import check_vocabulary
from zo2ext.config import ZOConfig
from zo2ext.engine.engine import ZOEngine
from zo2ext.engine.load import load
from zo2ext.parallel.parallel import Parallel


@contextmanager
def opened(
    source: str,
    settings: Any,
    config: Callable[[int], ZOConfig],
    *,
    max_token: int,
    parallel: Parallel | None = None,
) -> Iterator[tuple[Any, ZOEngine]]:
    """The causal language model of a folder or hub name, and its engine, until the block ends.

    The weights never lie in the model's own memory, neither before nor after.

    Args:
        source: Folder or hub name.
        settings: Of the model, from `pretrained.load_config`.
        config: Makes the engine's, for a model with so many weights to train.
        max_token: The largest token id that it is to be run on.
        parallel: This process's place among several that train the model together.

    Raises:
        ValueError: There is none, its files are damaged or incomplete, or its vocabulary lacks
            `max_token`.
    """
    check_vocabulary(source, settings, max_token=max_token)
    model, engine = load(source, config(count_weights(settings)), parallel=parallel)
    try:
        yield model, engine
    except BaseException as error:
        engine.fail(error)
        raise
    finally:
        engine.close(keep_weights=False)


def memory_line(engine: ZOEngine, device: str | None) -> str:
    """What a run takes of memory, and what storing the weights did to them, for its greeting."""
    error = engine.rounding_error
    stored = f" (stored with a {error})" if error.squares else ""
    return (
        f"memory  {gib(engine.host_nbytes)} of weights on the host{stored}, "
        f"{gib(engine.device_nbytes)} of buffers on {device or engine.device}"
    )


def count_weights(settings: Any) -> int:
    """Parameters of a causal language model with these settings, tied ones once."""
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(settings, trust_remote_code=False)
    return sum(parameter.numel() for parameter in model.parameters())
