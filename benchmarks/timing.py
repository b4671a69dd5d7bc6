"""This machine's rates, clocks, the record of where a number was measured, tables and JSON.

    python benchmarks/timing.py [--device cuda] [--json FILE]

prints the rates alone: memory copy, transfers, matrix products, disk. Every other script here
measures its work beside them, so that a number always comes with its limit.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

os.environ.setdefault("CUDA_DEVICE_ORDER", "PCI_BUS_ID")  # as nvidia-smi counts
ROOT = Path(__file__).resolve().parents[1]
Json = dict[str, Any]

# -- clocks


def summary(values: Sequence[float]) -> Json:
    """Median, minimum, and spread: (maximum - minimum) / median."""
    median = statistics.median(values)
    return {
        "median": median,
        "minimum": min(values),
        "spread": (max(values) - min(values)) / median if median else 0.0,
        "runs": len(values),
    }


def clocked(work: Callable[[], object]) -> tuple[float, float]:
    """Seconds that `work` takes by the wall clock, and of all cores together."""
    wall, cores = time.perf_counter(), time.process_time()
    work()
    return time.perf_counter() - wall, time.process_time() - cores


def measure(
    work: Callable[[], object], device: torch.device, *, runs: int = 11, warmup: int = 2
) -> list[float]:
    """Seconds of each of `runs` calls of `work`, after `warmup` more.

    On a CPU by the wall clock. On a GPU by events on the current stream, with its second-level
    cache overwritten before each call.
    """
    for _ in range(warmup):
        work()
    if device.type == "cpu":
        return [clocked(work)[0] for _ in range(runs)]
    cache = torch.cuda.get_device_properties(device).L2_cache_size
    scrub = torch.empty(2 * max(cache, 2**26), dtype=torch.uint8, device=device)
    events = []
    for _ in range(runs):
        scrub.zero_()
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        work()
        end.record()
        events.append((begin, end))
    torch.cuda.synchronize(device)
    return [begin.elapsed_time(end) / 1e3 for begin, end in events]


# -- rates


def rates(device: torch.device, *, small: bool = False, disk: Path | None = None) -> Json:
    """What this machine can do: bytes/s (`*_bytes_s`) and floating-point operations/s (`*_flop_s`).

    A copy counts the bytes that it reads and those that it writes; a transfer or a read from disk
    counts each byte once. Each is the fastest of several runs: a limit, not a typical value.

    Args:
        device: Whose rates; transfers are measured for a GPU only.
        small: Use small sizes, for a quick look; the numbers are then of no use.
        disk: Folder in which the disk is read; the system's temporary one when None.
    """
    found: Json = {"small": small}
    host = torch.device("cpu")
    nbytes = 2**22 if small else 2**28
    found["host_copy_bytes_s"] = copy_rate(host, nbytes)
    found["host_float32_flop_s"] = _matmul(host, torch.float32, 256 if small else 2048)
    found["disk_read_bytes_s"] = _disk(2**22 if small else 2**29, disk)
    if device.type == "cpu":
        found["copy_bytes_s"] = found["host_copy_bytes_s"]
        found["float32_flop_s"] = found["host_float32_flop_s"]
        return found
    found["copy_bytes_s"] = copy_rate(device, 2**24 if small else 2**31)
    size = 1024 if small else 8192
    found["float32_flop_s"] = _matmul(device, torch.float32, size)
    found["bfloat16_flop_s"] = _matmul(device, torch.bfloat16, size)
    found["float16_flop_s"] = _matmul(device, torch.float16, size)
    found |= _transfers(device, 2**22 if small else 2**30)
    return found


def copy_rate(device: torch.device, nbytes: int) -> float:
    """Bytes/s of the fastest copy of `nbytes`: those read and those written."""
    source = torch.ones(nbytes // 4, device=device)
    target = torch.empty_like(source)
    return 2 * nbytes / min(measure(lambda: target.copy_(source), device))


def _matmul(device: torch.device, dtype: torch.dtype, size: int) -> float:
    generator = torch.Generator(device).manual_seed(0)
    a, b = (
        torch.randn(size, size, generator=generator, device=device, dtype=dtype) for _ in range(2)
    )
    out = torch.empty_like(a)
    return 2 * size**3 / min(measure(lambda: torch.mm(a, b, out=out), device))


def _transfers(device: torch.device, nbytes: int) -> Json:
    """Page-locked upload and offload, alone and at once."""
    up, down = (torch.ones(nbytes // 4, pin_memory=True) for _ in range(2))
    a, b = (torch.ones(nbytes // 4, device=device) for _ in range(2))
    streams = [torch.cuda.Stream(device) for _ in range(2)]

    def upload() -> None:
        a.copy_(up, non_blocking=True)

    def offload() -> None:
        down.copy_(b, non_blocking=True)

    def both() -> None:
        current = torch.cuda.current_stream(device)
        for stream in streams:  # both of them first, so that neither waits for the other
            stream.wait_stream(current)
        for stream, work in zip(streams, (upload, offload), strict=True):
            with torch.cuda.stream(stream):
                work()
        for stream in streams:
            current.wait_stream(stream)

    return {
        "upload_bytes_s": nbytes / min(measure(upload, device)),
        "offload_bytes_s": nbytes / min(measure(offload, device)),
        "both_ways_bytes_s": 2 * nbytes / min(measure(both, device)),
    }


def _disk(nbytes: int, folder: Path | None) -> float:
    """Reads a file anew, after asking the system to drop its pages."""
    block = os.urandom(2**20)
    with tempfile.TemporaryFile(dir=folder) as file:
        for _ in range(nbytes // len(block)):
            file.write(block)
        file.flush()
        os.fsync(file.fileno())
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        file.seek(0)
        buffer = bytearray(2**24)
        start = time.perf_counter()
        while file.readinto(buffer):
            pass
        return nbytes / (time.perf_counter() - start)


def rate_table(found: Json) -> str:
    rows = []
    for name, value in found.items():
        if name.endswith("_bytes_s"):
            rows.append(
                [name.removesuffix("_bytes_s").replace("_", " "), f"{value / 1e9:.1f} GB/s"]
            )
        elif name.endswith("_flop_s"):
            what = name.removesuffix("_flop_s").replace("_", " ") + " matrix product"
            rows.append([what, f"{value / 1e9:.0f} GFLOP/s"])
    return table(["rate", "fastest"], rows)


# -- memory


def reset_host_peak() -> bool:
    """Start a new peak of `host_peak_nbytes`; False where the system does not allow it."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


def host_peak_nbytes() -> int:
    """Most resident memory of this process since the last reset; 0 where it is not known."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return 0
    return next((int(li.split()[1]) * 1024 for li in lines if li.startswith("VmHWM:")), 0)


def device_used_nbytes(device: torch.device) -> int:
    """Memory in use on the GPU, all processes and contexts together; 0 for a CPU.

    By nvidia-smi, because asking CUDA would itself open a context. Where nobody else uses the
    GPU, the difference from before this process touched it is the whole process's share.
    """
    if device.type == "cpu":
        return 0
    found = _output(
        *("nvidia-smi", f"--id={physical_gpu(device.index or 0)}"),
        *("--query-gpu=memory.used", "--format=csv,noheader,nounits"),
    )
    return int(found) * 2**20 if found.isdigit() else 0


# -- where it was measured


def environment(device: torch.device) -> Json:
    """Hardware, versions and source of a measurement. No names or paths of the machine."""
    import zo2ext
    from zo2ext.ops import _C

    gpu: Json | None = None
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        gpu = {
            "name": properties.name,
            "memory_bytes": properties.total_memory,
            "driver": _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"),
            "cuda": torch.version.cuda,
        }
    return {
        "device": device.type,
        "cpu": _cpu_name(),
        "cores": len(os.sched_getaffinity(0)),
        "threads": torch.get_num_threads(),
        "simd": _C.simd(),
        "omp_wait_policy": os.environ.get("OMP_WAIT_POLICY"),
        "load_at_start": round(os.getloadavg()[0], 2),
        "gpu": gpu,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": metadata.version("transformers"),
        "zo2ext": zo2ext.__version__,
        **source(),
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
    }


def gpu_name() -> str:
    """Of the first GPU, without opening it."""
    command = ("nvidia-smi", f"--id={physical_gpu(0)}", "--query-gpu=name")
    return _output(*command, "--format=csv,noheader")


def physical_gpu(index: int) -> str:
    """What nvidia-smi calls the GPU that torch calls by this index: a number or a UUID."""
    visible = [name.strip() for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")]
    return visible[index] if index < len(visible) and visible[index] else str(index)


def source() -> Json:
    """The commit, and whether tracked sources differ from it; ZO2EXT_COMMIT where git is not."""
    commit = _output("git", "-C", str(ROOT), "rev-parse", "HEAD")
    if not commit:
        return {"commit": os.environ.get("ZO2EXT_COMMIT"), "dirty": None}
    sources = ["zo2ext", "csrc", "benchmarks", "setup.py"]
    changed = _output(
        "git", "-C", str(ROOT), "status", "--porcelain", "--untracked-files=no", "--", *sources
    )
    return {"commit": commit, "dirty": bool(changed)}


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    facts = {
        line.split(":", 1)[0].strip(): line.split(":", 1)[1].strip()
        for line in reversed(lines)
        if ":" in line
    }
    name = facts.get("model name", platform.machine())
    return f"{name} (family {facts.get('cpu family', '?')}, model {facts.get('model', '?')})"


def _output(*command: str) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True)
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout.strip().splitlines()[0].strip() if done.stdout.strip() else ""


# -- tables, JSON, arguments


def table(headings: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Aligned text: the first column to the left, the others to the right."""
    lines = [list(headings), *(list(row) for row in rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(headings))]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if i == 0 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    )


def write_json(path: Path, content: Json) -> None:
    """All or nothing: a reader never sees half a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    part.write_text(json.dumps(content, indent=1) + "\n")
    os.replace(part, path)


def milliseconds(seconds: float) -> str:
    return f"{seconds * 1e3:.2f}" if seconds < 0.1 else f"{seconds * 1e3:.0f}"


def argument_parser(description: str | None) -> argparse.ArgumentParser:
    """With what every script here takes."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", help="cuda, cuda:1 or cpu; default: cuda where it works")
    parser.add_argument("--threads", type=int, help="CPU threads; default: torch's choice")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the results here")
    return parser


def chosen_device(arguments: argparse.Namespace) -> torch.device:
    """The device to measure; sets the number of threads, too."""
    from zo2ext.ops.build import why_not_on_gpu

    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    device = torch.device(arguments.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if device.type == "cuda":
        missing = "there is no CUDA GPU"
        if torch.cuda.is_available():
            missing = why_not_on_gpu(device)
        if missing:
            sys.exit(f"--device is {device}, but {missing}")
        torch.cuda.set_device(device)
    return device


def headline(place: Json) -> str:
    """One line of an `environment`, for the top of a report."""
    hardware = place["gpu"]["name"] if place["gpu"] else f"{place['cpu']}, {place['simd']}"
    commit = f"commit {place['commit'][:10]}" if place["commit"] else "commit unknown"
    return (
        f"{hardware}; {place['threads']} CPU threads; torch {place['torch']}, transformers "
        f"{place['transformers']}, zo2ext {place['zo2ext']}, {commit}"
        f"{' with changes' if place['dirty'] else ''}; load {place['load_at_start']}"
    )


def main() -> None:
    parser = argument_parser(__doc__)
    parser.add_argument("--small", action="store_true", help="tiny sizes: a test of the script")
    parser.add_argument("--disk", type=Path, metavar="DIR", help="where to read the disk")
    arguments = parser.parse_args()
    device = chosen_device(arguments)
    place = environment(device)
    print(headline(place))
    found = rates(device, small=arguments.small, disk=arguments.disk)
    print(rate_table(found))
    if arguments.json:
        write_json(arguments.json, {"benchmark": "rates", "environment": place, "rates": found})


if __name__ == "__main__":
    main()
