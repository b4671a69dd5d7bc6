"""Where a parameter's values come from when a store takes them over: a tensor, or a file."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

PIECE_NBYTES = 2**24  # what is converted at a time


@dataclass(frozen=True)
class Extent:
    """Bytes of a file."""

    path: str
    begin: int
    nbytes: int


class Source(Protocol):
    """Values of one parameter, in the dtype that the model has it in."""

    @property
    def shape(self) -> torch.Size: ...

    @property
    def dtype(self) -> torch.dtype: ...

    def read(self, begin: int, out: Tensor) -> None:
        """Write the elements from `begin` on to `out`, flat and contiguous, rounded to nearest."""

    def extent(self, dtype: torch.dtype) -> Extent | None:
        """Where the values lie in a file as `dtype`, whole and in order; None where they do not."""


class HeldTensor:
    """A tensor in memory; a parameter's own, for instance."""

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
    """The memory of a contiguous CPU tensor, to read and to write."""
    flat = tensor.detach().view(-1).view(torch.uint8)
    return flat.numpy().data
