"""Sources of a parameter's values for a store: a tensor or a file."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

PIECE_NBYTES = 2**24  # bytes that are converted at a time


@dataclass(frozen=True)
class Extent:
    """A range of bytes in a file."""

    path: str
    begin: int
    nbytes: int


class Source(Protocol):
    """Values of one parameter, in the dtype of the model."""

    @property
    def shape(self) -> torch.Size: ...

    @property
    def dtype(self) -> torch.dtype: ...

    def read(self, begin: int, out: Tensor) -> None:
        """Copy the elements from `begin` on to `out`, flat and contiguous, rounded to nearest."""

    def extent(self, dtype: torch.dtype) -> Extent | None:
        """Return the range of a file that has the values in order as `dtype`; None without one."""


class HeldTensor:
    """A tensor in memory, such as a parameter's own."""

    def __init__(self, values: Tensor) -> None:
        self._values = values

    @property
    def shape(self) -> torch.Size:
        return self._values.shape

    @property
    def dtype(self) -> torch.dtype:
        return self._values.dtype

    def read(self, begin: int, out: Tensor) -> None:
        flat = self._values.detach().reshape(-1)
        out.copy_(flat[begin : begin + out.numel()])

    def extent(self, dtype: torch.dtype) -> None:
        return None


def bytes_of(tensor: Tensor) -> memoryview:
    """Return the memory of a contiguous CPU tensor, writable."""
    flat = tensor.detach().view(-1).view(torch.uint8)
    return flat.numpy().data
