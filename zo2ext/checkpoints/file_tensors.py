"""Tensors in safetensors files, read with plain reads instead of memory mapping.

A mapped file counts against limits on address space, and its pages against a container's memory.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from zo2ext.errors import FileError, UserError
from zo2ext.streaming.stores.sources import PIECE_NBYTES, Extent, Source, bytes_of

_HEADER_LIMIT = 100 * 2**20  # bytes, as the format defines
_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
    "C64": torch.complex64,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


@dataclass(frozen=True)
class FileTensor:
    """A tensor in a file; a `Source`.

    Attributes:
        path: The file.
        begin: Offset of the tensor's first byte.
        stored: Dtype in the file.
        dtype: Dtype that it is read as.
        unknown: Name of its dtype if torch has no such dtype; then it is read as uint8.
    """

    path: str
    begin: int
    shape: torch.Size
    stored: torch.dtype
    dtype: torch.dtype
    unknown: str = ""

    def as_dtype(self, dtype: torch.dtype) -> FileTensor:
        return replace(self, dtype=dtype)

    def read(self, begin: int, out: Tensor) -> None:
        if not out.numel():
            return
        with Path(self.path).open("rb", buffering=0) as file:
            if out.dtype == self.stored == self.dtype:
                self._read(file.fileno(), begin, out)
                return
            step = PIECE_NBYTES // self.stored.itemsize
            buffer = torch.empty(min(step, out.numel()), dtype=self.stored)
            for piece in range(0, out.numel(), step):
                target = out[piece : piece + step]
                values = buffer[: target.numel()]
                self._read(file.fileno(), begin + piece, values)
                target.copy_(values.to(self.dtype))

    def tensor(self) -> Tensor:
        """Read all of it into a new tensor."""
        values = torch.empty(self.shape, dtype=self.dtype)
        self.read(0, values.view(-1))
        return values

    def extent(self, dtype: torch.dtype) -> Extent | None:
        if not dtype == self.stored == self.dtype:
            return None
        return Extent(self.path, self.begin, self.shape.numel() * dtype.itemsize)

    def _read(self, handle: int, begin: int, out: Tensor) -> None:
        read_exactly(handle, self.begin + begin * self.stored.itemsize, bytes_of(out), self.path)


def read_exactly(handle: int, begin: int, out: memoryview, path: str) -> None:
    """Fill `out` from offset `begin` of the file, or raise an OSError."""
    done = 0
    while done < len(out):
        count = os.preadv(handle, [out[done:]], begin + done)
        if count == 0:
            raise FileError(f"{path} ends at byte {begin + done}, within a tensor")
        done += count


def tensors_in_files(paths: Iterable[Path]) -> dict[str, FileTensor]:
    """Return all tensors of safetensors files, by name.

    Raises:
        UserError: A file is damaged, or two files have different tensors of the same name.
    """
    tensors: dict[str, FileTensor] = {}
    for path in paths:
        for name, tensor in _tensors(path).items():
            if name in tensors and not is_equal(tensors[name], tensor):
                raise UserError(f"{name} in {tensors[name].path} differs from that in {path}")
            tensors[name] = tensor
    return tensors


def is_equal(one: Source, other: Source) -> bool:
    """Return whether two sources have the same shape, dtype and values."""
    if (one.shape, one.dtype) != (other.shape, other.dtype):
        return False
    step = PIECE_NBYTES // one.dtype.itemsize
    for begin in range(0, one.shape.numel(), step):
        count = min(step, one.shape.numel() - begin)
        a, b = torch.empty(count, dtype=one.dtype), torch.empty(count, dtype=one.dtype)
        one.read(begin, a)
        other.read(begin, b)
        if not torch.equal(a, b):
            return False
    return True


def _tensors(path: Path) -> dict[str, FileTensor]:
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > min(_HEADER_LIMIT, size - 8):
            raise UserError(f"{path} is not a safetensors file, or is cut off")
        try:
            header = json.loads(file.read(length))
            header.pop("__metadata__", None)
            return {name: _tensor(path, 8 + length, size, entry) for name, entry in header.items()}
        except (KeyError, TypeError, ValueError, AttributeError, RecursionError) as error:
            raise UserError(f"{path} has a damaged header: {error}") from error


def _tensor(path: Path, start: int, size: int, entry: dict[str, Any]) -> FileTensor:
    dtype, shape = _DTYPES.get(entry["dtype"]), entry["shape"]
    begin, end = entry["data_offsets"]
    if not all(isinstance(n, int) and abs(n) < 2**63 for n in (begin, end, *shape)):
        raise ValueError(f"shape {shape} and data_offsets {begin}, {end} are not sizes")
    if not (0 <= begin <= end <= size - start):
        raise ValueError(f"bytes {begin} to {end} are not within the file")
    if dtype is None:  # models often do not use such a tensor
        raw, unknown = torch.Size([end - begin]), str(entry["dtype"])
        return FileTensor(str(path), start + begin, raw, torch.uint8, torch.uint8, unknown)
    if any(n < 0 for n in shape) or math.prod(shape) * dtype.itemsize != end - begin:
        raise ValueError(f"{end - begin} bytes cannot be {dtype} of shape {shape}")
    return FileTensor(str(path), start + begin, torch.Size(shape), dtype, dtype)
