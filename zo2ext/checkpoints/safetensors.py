"""Writes safetensors files, one tensor at a time."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from safetensors.torch import save as serialize

from zo2ext.checkpoints.contents import State, as_bytes


@dataclass(frozen=True)
class Shard:
    """The layout of a file that is to be written.

    Attributes:
        name: Name of the file.
        header: Bytes before the tensors.
        offsets: Offset of each tensor in the file.
    """

    name: str
    header: bytes
    offsets: dict[str, int]


def write_tensors(state: State, shards: Mapping[str, Shard], files: Mapping[str, int]) -> None:
    for name, tensor in state.items():
        shard = shards[name]
        write_all(files[shard.name], as_bytes(tensor).numpy(), shard.offsets[name])


def write_all(handle: int, data: Any, offset: int) -> None:
    view = memoryview(data).cast("B")
    while view:
        written = os.pwrite(handle, view, offset)
        view, offset = view[written:], offset + written


def lay_out_shard(name: str, tensors: State) -> Shard:
    """Return the layout that safetensors uses: its order, by dtype and name, and its header."""
    empty = {n: torch.empty(0, dtype=t.dtype) for n, t in tensors.items()}
    serialized = serialize(empty, {"format": "pt"})
    length = int.from_bytes(serialized[:8], "little")
    header: dict[str, Any] = json.loads(serialized[8 : 8 + length])
    entries: dict[str, Any] = {"__metadata__": header.pop("__metadata__")}
    end, begins = 0, {}
    for key, entry in header.items():
        begins[key], begin = end, end
        end += tensors[key].numel() * tensors[key].element_size()
        entries[key] = {
            "dtype": entry["dtype"],
            "shape": list(tensors[key].shape),
            "data_offsets": [begin, end],
        }
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    start = len(text).to_bytes(8, "little") + text
    return Shard(name, start, {n: len(start) + b for n, b in begins.items()})
