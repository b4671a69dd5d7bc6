"""Compare a checkpoint with a model, bit for bit."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from zo2ext.checkpoints.contents import (
    Groups,
    Values,
    as_bytes,
    names_by_group,
    read_values,
    revert_conversion,
    saved_state,
)
from zo2ext.checkpoints.safetensors import read_header


@dataclass(frozen=True)
class Difference:
    """How a tensor differs from a checkpoint's.

    Attributes:
        name: In the checkpoint.
        what: In words.
        count, largest: Elements that are not the same bits, and the largest distance of two; zero
            where one side lacks the tensor, or it has another shape or dtype.
    """

    name: str
    what: str
    count: int = 0
    largest: float = 0.0


def compare_checkpoint(
    model: Any, folder: str | Path, values: Values, groups: Groups
) -> list[Difference]:
    """How a checkpoint differs from the model, bit by bit, one group of weights in memory.

    Args:
        model, values, groups: As for `save_checkpoint`.
        folder: The checkpoint, as safetensors.

    Raises:
        ValueError: There are no weights as safetensors in `folder`.
    """
    files = {
        name: file
        for file in sorted(Path(folder).glob("*.safetensors"))
        for name in read_header(file)
        if name != "__metadata__"
    }
    if not files:
        raise ValueError(f"{folder} has no weights as safetensors")
    found, differences = set[str](), []
    source = saved_state(model)
    for part in names_by_group(source, groups):
        for name, tensor in revert_conversion(model, read_values(source, part, values)).items():
            found.add(name)
            if name not in files:
                differences.append(Difference(name, "is missing in the checkpoint"))
                continue
            with safe_open(files[name], framework="pt") as file:
                differences += _compared(name, file.get_tensor(name), tensor)
    extra = [Difference(n, "is in the checkpoint alone") for n in files if n not in found]
    return differences + extra


def _compared(name: str, there: Tensor, here: Tensor) -> list[Difference]:
    if (there.shape, there.dtype) != (here.shape, here.dtype):
        return [
            Difference(
                name,
                f"is {there.dtype} {tuple(there.shape)} in the checkpoint, "
                f"{here.dtype} {tuple(here.shape)} here",
            )
        ]
    if torch.equal(as_bytes(there), as_bytes(here)):
        return []
    size = there.element_size()
    count = int((as_bytes(there).view(-1, size) != as_bytes(here).view(-1, size)).any(1).sum())
    largest = float((there.double() - here.double()).abs().max())
    what = f"differs in {count} of {there.numel()} elements, by up to {largest:.3g}"
    return [Difference(name, what, count, largest)]
