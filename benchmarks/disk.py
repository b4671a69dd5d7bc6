"""How fast the disk store reads a model, beside `dd` on the same files.

    python benchmarks/disk.py [--gigabytes 3] [--disk DIR] [--rounds 5] [--json FILE]

Writes safetensors shards of random bytes, shaped like decoder blocks in bfloat16; then reads all of
them with `dd`, with and without the page cache, and unit by unit with the store, in turns. The
pages of the files are dropped before each.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import tempfile
import time
from concurrent.futures import Future
from pathlib import Path

import timing
import torch
from torch import nn

from zo2ext.checkpoints.file_tensors import tensors_in_files
from zo2ext.config import Granularity, ZOConfig
from zo2ext.model.layout import lay_out
from zo2ext.model.units import find_units
from zo2ext.streaming.devices.cpu import CpuDevice
from zo2ext.streaming.stores.disk import DiskStore

WIDTH = 2048  # of a block: 12 WIDTH^2 weights, 100 MB
BLOCK_NBYTES = 12 * WIDTH**2 * 2
SLOTS = 3


class Block(nn.Module):
    """The weights of a decoder block, and their gains."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.ParameterList([_weight(WIDTH, WIDTH) for _ in range(4)])
        self.mlp = nn.ParameterList([_weight(WIDTH, 4 * WIDTH) for _ in range(2)])
        self.gains = nn.ParameterList([_weight(WIDTH) for _ in range(2)])

    def forward(self) -> None:
        raise AssertionError("only its weights are of use")


def _weight(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.empty(shape, dtype=torch.bfloat16, device="meta"))


def write_shards(folder: Path, blocks: int, per_shard: int = 10) -> list[Path]:
    """Files of random bytes with the tensors of `blocks` blocks, as Hugging Face has them."""
    files = []
    for first in range(0, blocks, per_shard):
        header: dict[str, object] = {}
        end = 0
        for index in range(first, min(first + per_shard, blocks)):
            for name, parameter in Block().named_parameters():
                nbytes = parameter.numel() * parameter.element_size()
                header[f"{index}.{name}"] = {
                    "dtype": "BF16",
                    "shape": list(parameter.shape),
                    "data_offsets": [end, end + nbytes],
                }
                end += nbytes
        text = json.dumps(header).encode()
        files.append(folder / f"model-{first:05}.safetensors")
        with files[-1].open("wb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            while end > 0:
                end -= file.write(os.urandom(min(end, 2**24)))
            file.flush()
            os.fsync(file.fileno())
    return files


def drop(files: list[Path]) -> None:
    for path in files:
        with path.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def dd(files: list[Path], *flags: str) -> float:
    """Seconds that `dd` takes for all files."""
    start = time.perf_counter()
    for path in files:
        command = ["dd", f"if={path}", "of=/dev/null", "bs=16M", *flags]
        subprocess.run(command, check=True, capture_output=True)
    return time.perf_counter() - start


def make_store(files: list[Path], blocks: int) -> DiskStore:
    model = nn.ModuleList([Block() for _ in range(blocks)])
    config = ZOConfig(store="disk", device="cpu", write_back="never")
    units, _ = find_units(model, Granularity.BLOCK)
    layouts = [lay_out(unit, config) for unit in units]
    store, tensors = DiskStore(layouts, CpuDevice(), config), tensors_in_files(files)
    for layout in layouts:
        for placed in layout.tensors:
            store.load_tensor(layout, placed, tensors[placed.spec.name])
    return store


def sweep(store: DiskStore, slots: list[torch.Tensor]) -> float:
    """Seconds to read each unit once, in order, into `slots` that are used in turn."""
    start = time.perf_counter()
    events = [
        store.bring(unit, slots[unit % len(slots)], ("slot", unit), {}, range(layout.nbytes))
        for unit, layout in enumerate(store.layouts)
    ]
    for event in events:
        assert isinstance(event, Future)
        event.result()
    return time.perf_counter() - start


def main() -> None:
    parser = timing.argument_parser(__doc__)
    parser.add_argument("--gigabytes", type=float, default=3.0, help="size of the model")
    parser.add_argument("--rounds", type=int, default=5, help="of each reader, in turns")
    parser.add_argument("--disk", type=Path, metavar="DIR", help="where to read")
    arguments = parser.parse_args()
    place = timing.environment(torch.device("cpu"))
    print(timing.headline(place))
    blocks = max(1, round(arguments.gigabytes * 1e9 / BLOCK_NBYTES))
    seconds: dict[str, list[float]] = {"dd, direct": [], "dd, page cache": [], "store": []}
    with tempfile.TemporaryDirectory(dir=arguments.disk) as folder:
        files = write_shards(Path(folder), blocks)
        store = make_store(files, blocks)
        size = max(layout.nbytes for layout in store.layouts)
        slots = [torch.zeros(size, dtype=torch.uint8) for _ in range(SLOTS)]
        readers = {
            "dd, direct": lambda: dd(files, "iflag=direct"),
            "store": lambda: sweep(store, slots),
            "dd, page cache": lambda: dd(files),
        }
        for _ in range(arguments.rounds):
            for name, read in readers.items():
                drop(files)
                seconds[name].append(read())
        nbytes = sum(path.stat().st_size for path in files)
        store.close()
    rates = {name: [nbytes / s for s in values] for name, values in seconds.items()}
    best = max(statistics.median(rates["dd, direct"]), statistics.median(rates["dd, page cache"]))
    rows = [
        {
            "name": name,
            "seconds": timing.summary(seconds[name]),
            "bytes_s": statistics.median(values),
            "of_dd": statistics.median(values) / best,
        }
        for name, values in rates.items()
    ]
    print(
        timing.table(
            ["reader", "median GB/s", "slowest", "fastest", "of the better dd"],
            [
                [
                    row["name"],
                    f"{row['bytes_s'] / 1e9:.2f}",
                    f"{min(rates[row['name']]) / 1e9:.2f}",
                    f"{max(rates[row['name']]) / 1e9:.2f}",
                    f"{row['of_dd']:.0%}",
                ]
                for row in rows
            ],
        )
    )
    if arguments.json:
        content = {"benchmark": "disk", "environment": place, "bytes": nbytes, "rows": rows}
        timing.write_json(arguments.json, content)


if __name__ == "__main__":
    main()
