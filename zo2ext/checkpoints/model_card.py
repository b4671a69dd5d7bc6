"""The model card of tuned weights: how they came about, in a few lines."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from huggingface_hub import ModelCardData

from zo2ext._version import __version__
from zo2ext.engine.engine import ZOEngine


def model_card(model: Any, engine: ZOEngine) -> str:
    """README.md of a checkpoint.

    Args:
        model: The transformers model that `engine` trains.
    """
    source = getattr(getattr(model, "config", None), "name_or_path", "") or None
    data = ModelCardData(
        base_model=None if source is None or Path(source).exists() else source,
        library_name="transformers",
        tags=["zo2ext", "zeroth-order"],
    )
    return f"---\n{data.to_yaml()}\n---\n\n{provenance(engine)}\n"


def provenance(engine: ZOEngine) -> str:
    """What made the weights what they are, as a paragraph of Markdown."""
    config = engine.config
    formats = sorted({part.storage.value for x in engine.layouts for part in x.parts})
    computed = sorted(
        {str(part.compute).removeprefix("torch.") for x in engine.layouts for part in x.parts}
    )
    return (
        f"Tuned with zo2ext {__version__}: {engine.steps} steps of zeroth order on "
        f"{engine.trainable:,} weights (eps {config.eps:g}, {config.directions} "
        f"{config.distribution.value} {'directions' if config.directions > 1 else 'direction'} a "
        f"step, seed {config.seed}). Weights were stored in {', '.join(formats)} (rounding "
        f"{config.rounding.value}, write-back {config.write_back}) and computed with in "
        f"{', '.join(computed)}."
    )
