"""The model card of tuned weights."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCardData

from zo2ext._version import __version__
from zo2ext.config import ZOConfig
from zo2ext.model.layout import UnitLayout


def model_card(
    model: Any, config: ZOConfig, layouts: Sequence[UnitLayout], *, steps: int, trainable: int
) -> str:
    """Return the README.md of a checkpoint, which describes how its weights were trained.

    Args:
        model: The transformers model.
        config: Settings of the run.
        layouts: Layouts of its units.
        steps: Number of steps.
        trainable: Number of trained weights.
    """
    source = getattr(getattr(model, "config", None), "name_or_path", "") or None
    data = ModelCardData(
        base_model=None if source is None or Path(source).exists() else source,
        library_name="transformers",
        tags=["zo2ext", "zeroth-order"],
    )
    parts = [part for layout in layouts for part in layout.parts]
    stored = ", ".join(sorted({part.storage.value for part in parts}))
    computed = ", ".join(sorted({str(part.compute).removeprefix("torch.") for part in parts}))
    directions = "direction" if config.count == 1 else "directions"
    return (
        f"---\n{data.to_yaml()}\n---\n\n"
        f"Tuned with zo2ext {__version__}: {steps} zeroth-order steps on {trainable:,} weights "
        f"(eps {config.eps:g}, {config.count} {config.distribution.value} {directions} per "
        f"step, seed {config.seed}). Weights were stored in {stored} (rounding "
        f"{config.rounding.value}, write-back {config.write_back}) and computed with in {computed}."
        "\n"
    )
