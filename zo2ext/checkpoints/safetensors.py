"""Write safetensors files, a tensor at a time."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save as serialize

from zo2ext.checkpoints.contents import State, as_bytes


@dataclass(frozen=True)
class Shard:
    """A file to be: its name, what comes before the tensors, and where each tensor begins."""

    name: str
    opening: bytes
    offsets: dict[str, int]  # into the file


def read_header(file: Path) -> dict[str, Any]:
    with file.open("rb") as stream:
        size = stream.read(8)
        return _header(size + stream.read(int.from_bytes(size, "little")))


def write_tensors(state: State, shards: Mapping[str, Shard], files: Mapping[str, int]) -> None:
    for name, tensor in state.items():
        shard = shards[name]
        write_all(files[shard.name], as_bytes(tensor).numpy(), shard.offsets[name])


def write_all(handle: int, data: Any, offset: int) -> None:
    view = memoryview(data).cast("B")
    while view:
        written = os.pwrite(handle, view, offset)
        view, offset = view[written:], offset + written


def plan_shard(name: str, tensors: State) -> Shard:
    """safetensors' own layout: its order, which dtype and name decide, and its header."""
    empty = {n: torch.empty(0, dtype=t.dtype) for n, t in tensors.items()}
    header = _header(serialize(empty, {"format": "pt"}))
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
    opening = len(text).to_bytes(8, "little") + text
    return Shard(name, opening, {n: len(opening) + b for n, b in begins.items()})


def _header(serialized: bytes) -> dict[str, Any]:
    size = int.from_bytes(serialized[:8], "little")
    header: dict[str, Any] = json.loads(serialized[8 : 8 + size])
    return header
