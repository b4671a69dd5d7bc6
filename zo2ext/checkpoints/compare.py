"""Compare a checkpoint with a model, bit for bit."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
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
from zo2ext.checkpoints.file_tensors import tensors_in_files
from zo2ext.errors import UserError


@dataclass(frozen=True)
class Difference:
    """How a tensor differs from a checkpoint's.

    Attributes:
        name: Name in the checkpoint.
        what: Description of the difference.
        count: Number of elements with other bits; 0 if the tensor is missing on one side, or has
            another shape or dtype.
        largest: Largest difference of two elements.
    """

    name: str
    what: str
    count: int = 0
    largest: float = 0.0


def compare_checkpoint(
    model: Any, folder: str | Path, values: Values, groups: Groups
) -> list[Difference]:
    """Return the tensors in which a checkpoint differs from the model, in bits.

    Reads one of `groups` at a time; `values` and `groups` are as for `save_checkpoint`.

    Raises:
        UserError: `folder` has no weights as safetensors.
    """
    files = tensors_in_files(sorted(Path(folder).glob("*.safetensors")))
    if not files:
        raise UserError(f"{folder} has no weights as safetensors")
    found, differences = set[str](), []
    source = saved_state(model)
    for names in names_by_group(source, groups):
        for name, tensor in revert_conversion(model, read_values(source, names, values)).items():
            found.add(name)
            if name not in files:
                differences.append(Difference(name, "is missing from the checkpoint"))
                continue
            differences += _differences(name, files[name].tensor(), tensor)
    extra = [Difference(n, "is only in the checkpoint") for n in files if n not in found]
    return differences + extra


def _differences(name: str, there: Tensor, here: Tensor) -> list[Difference]:
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
