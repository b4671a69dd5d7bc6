"""Everything worth measuring on one machine, within a given time, most telling rows first.

    python benchmarks/battery.py --minutes 15 --out DIR [--zo2 PATH]

Builds nothing and downloads nothing. Each row runs in a process of its own and is written to DIR as
soon as it is done; run again with the same DIR, and it goes on where it stopped (rows of another
commit or machine are measured anew, failed ones once more). It ends inside its time: a row that
cannot finish is not started, or is stopped and left for the next run. DIR/battery.json gathers all
rows with machine, versions and commit; DIR/logs has what each row printed.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import timing

HERE = Path(__file__).resolve().parent
MARGIN = 5.0  # seconds kept for the summary


@dataclass(frozen=True)
class Row:
    """One measurement: a script and its arguments."""

    name: str
    command: tuple[str, ...]
    seconds: float  # about what it takes; not started with less time left
    lacking: str = ""  # why it cannot run at all


def _script(name: str, *arguments: object) -> tuple[str, ...]:
    return (sys.executable, str(HERE / name), *map(str, arguments))


def _step(name: str, shape: str, batch: str, modes: str, seconds: float, *more: object) -> Row:
    size, length = batch.split("x")
    fixed = ("--shape", shape, "--batch", size, "--length", length, "--modes", modes, "--rounds", 1)
    return Row(name, _script("step.py", *fixed, *more), seconds)


def _least(shape: str, seconds: float) -> Row:
    """In the least memory. A model that the host cannot hold shares memory among its units."""
    least = ("--granularity", "module", "--slots", 2, "--one-copy", "--warmup", 1, "--steps", 2)
    return _step(f"step-{shape}-least-memory", shape, "1x2048", "streamed", seconds, *least)


def plan(cuda: bool, small: bool, out: Path, zo2: Path | None, peer_python: str) -> list[Row]:
    """The rows in the order of what they tell."""
    rows = [Row("rates", _script("timing.py", *(["--small"] if small else [])), 10)]
    if not cuda:
        return rows + _cpu_rows(small, out)
    both, streamed = "eager,resident,streamed", "streamed"
    factored = "forwards,resident,streamed"
    rows += [
        Row("bits", _script("bits.py", "--elements", "2^26"), 30),
        _step("step-opt-13b", "opt-13b", "1x2048", streamed, 60, "--steps", 16),
        _step("step-opt-13b-write-back-1", "opt-13b", "1x2048", streamed, 60, *_EACH_STEP),
        _step("step-opt-1.3b-compared-128", "opt-1.3b", "1x128", both, 40),
        _step("step-opt-1.3b-compared", "opt-1.3b", "1x2048", both, 40),
        _least("opt-13b", 60),
        _least("opt-175b", 150),
        *_peers(zo2, peer_python),
        _step("step-opt-1.3b-rank-4-128", "opt-1.3b", "1x128", factored, 40, *_RANK),
        _step("step-opt-13b-rank-4-128", "opt-13b", "1x128", factored, 60, *_RANK),
        Row("kernels-bfloat16", _script("kernels.py", "--storage", "bfloat16"), 30),
        _step("step-opt-1.3b-compiled-128", "opt-1.3b", "1x128", both, 80, "--compile"),
        _step("step-opt-30b", "opt-30b", "1x2048", streamed, 90),
        _step("step-opt-13b-compared", "opt-13b", "1x2048", both, 90),
        _step("step-opt-13b-compared-128", "opt-13b", "1x128", both, 90),
        _step("step-opt-175b", "opt-175b", "1x2048", streamed, 150, "--steps", 3),
        Row("bits-more", _script("bits.py"), 120),
        Row("overhead", _script("overhead.py"), 30),
        Row("timeline-opt-13b", _script("timeline.py", "--shape", "opt-13b", "--out", out), 50),
        _least("opt-30b", 90),
        _least("opt-66b", 110),
    ]
    rows += [
        _step("step-llama-3-8b-compared", "llama-3-8b", "1x2048", both, 80),
        _step("step-qwen3-32b", "qwen3-32b", "1x2048", streamed, 90),
        _step("step-llama-3-70b", "llama-3-70b", "1x2048", streamed, 120),
        _step("step-opt-13b-rademacher", "opt-13b", "1x2048", streamed, 60, *_RADEMACHER),
        _step("step-opt-13b-8x256", "opt-13b", "8x256", streamed, 60),
        _step("step-opt-13b-float16", "opt-13b", "1x2048", streamed, 60, "--dtype", "float16"),
        _step("step-opt-13b-split", "opt-13b", "1x2048", streamed, 90, *_SPLIT),
        _step("step-opt-30b-split", "opt-30b", "1x2048", streamed, 120, *_SPLIT),
        _step("step-opt-13b-e4m3", "opt-13b", "1x2048", streamed, 60, "--storage", "e4m3"),
        _step("step-opt-13b-rank-4-8", "opt-13b", "1x512", factored, 90, *_RANK, "--directions", 8),
        Row("kernels-8-bits", _script("kernels.py", "--storage", "e4m3", "split"), 60),
        Row("kernels-float32", _script("kernels.py", "--storage", "float32"), 40),
        Row("kernels-float16", _script("kernels.py", "--storage", "float16"), 30),
    ]
    rows.append(Row("rank-plans", _script("scaling.py", "--plan"), 30))
    rows += [_sanitizer(tool) for tool in ("memcheck", "racecheck")]
    for shape in ("opt-125m", "opt-2.7b", "opt-6.7b"):
        rows.append(_step(f"step-{shape}-compared", shape, "1x2048", both, 50))
    rows += [
        _step("step-opt-66b", "opt-66b", "1x2048", streamed, 110),
        _step("step-opt-30b-8x256", "opt-30b", "8x256", streamed, 90),
    ]
    return rows


_EACH_STEP = ("--write-back", 1)
_SELDOM = ("--write-back", 16, "--steps", 16)  # one write-back among them
_RADEMACHER = ("--distribution", "rademacher")
_RANK = ("--rank", 4)
_SPLIT = ("--storage", "split", *_SELDOM)


def _cpu_rows(small: bool, out: Path) -> list[Row]:
    shape, batch = ("tiny", "1x32") if small else ("opt-125m", "1x128")
    elements = ("--elements", "2^16", "--runs", 2) if small else ()
    bits = ("--elements", "2^16" if small else "2^22")
    deep = ("--layers", 2, "--runs", 3) if small else ()
    drawn = ("--shape", shape, "--length", batch.split("x")[1], "--out", out)
    return [
        Row("kernels-float32", _script("kernels.py", "--storage", "float32", *elements), 15),
        _step(f"step-{shape}-compared", shape, batch, "eager,tight,streamed", 15),
        Row("kernels-bfloat16", _script("kernels.py", "--storage", "bfloat16", *elements), 15),
        _step(f"step-{shape}-rademacher", shape, batch, "streamed", 15, *_RADEMACHER),
        Row("bits", _script("bits.py", *bits), 10),
        Row("overhead", _script("overhead.py", *deep), 10),
        Row(f"timeline-{shape}", _script("timeline.py", *drawn), 10),
    ]


def _peers(zo2: Path | None, python: str) -> list[Row]:
    rows = []
    for shape, seconds in (("opt-1.3b", 60), ("opt-13b", 240), ("opt-30b", 400)):
        arguments = ("--zo2", str(zo2), "--shape", shape)
        command = (python, str(HERE / "peers" / "zo2.py"), *arguments)
        lacking = "" if zo2 else "no checkout was given with --zo2"
        rows.append(Row(f"peer-zo2-{shape}", command, seconds, lacking=lacking))
    return rows


def _sanitizer(tool: str) -> Row:
    found = shutil.which("compute-sanitizer")
    checked = _script("bits.py", "--elements", 2**16)
    command = (found or "", "--tool", tool, "--error-exitcode", "1", *checked)
    lacking = "" if found else "compute-sanitizer is not on the PATH"
    return Row(f"sanitizer-{tool}", command, 120, lacking=lacking)


# -- running


class Battery:
    """Runs rows into a folder until time is up.

    Args:
        out: The folder.
        device: "cuda" or "cpu".
        seconds: From now.
    """

    def __init__(self, out: Path, device: str, seconds: float) -> None:
        self.out, self.device = out, device
        self._deadline = time.monotonic() + seconds - MARGIN
        self.status: dict[str, str] = {}
        for name in ("rows", "logs"):
            (out / name).mkdir(parents=True, exist_ok=True)

    @property
    def left(self) -> float:
        return self._deadline - time.monotonic()

    def run(self, rows: list[Row]) -> None:
        tried = [row for row in rows if (self.out / "rows" / f"{row.name}.failed").exists()]
        for row in [*(r for r in rows if r not in tried), *tried]:
            self.status[row.name] = self._run(row)
            print(f"{self.left:6.0f} s left  {row.name}: {self.status[row.name]}", flush=True)
            self.gather(rows)

    def _run(self, row: Row) -> str:
        path = self.out / "rows" / f"{row.name}.json"
        if row.lacking:
            return f"left out: {row.lacking}"
        if self._current(path):
            return "done before"
        if self.left < row.seconds:
            return f"not started: takes about {row.seconds:.0f} s"
        command = [*row.command, "--json", str(path)]
        if "peers" not in row.command[1]:
            command += ["--device", self.device]
        rates = self.out / "rows" / "rates.json"
        if Path(row.command[1]).name == "step.py" and rates.exists():
            command += ["--rates", str(rates)]
        failed = path.with_suffix(".failed")
        start = time.monotonic()
        code = self._spawn(command, self.out / "logs" / f"{row.name}.txt")
        taken = time.monotonic() - start
        if code is None:
            return f"stopped after {taken:.0f} s: out of time"
        if code != 0 or not path.exists():
            failed.write_text(f"exit code {code}\n")
            return f"failed with exit code {code}: see logs/{row.name}.txt"
        failed.unlink(missing_ok=True)
        return f"done in {taken:.0f} s"

    def _spawn(self, command: list[str], log: Path) -> int | None:
        """The exit code; None if time ran out."""
        environment = dict(os.environ)
        if any((timing.ROOT / "zo2ext" / "ops").glob("_C*.so")):  # built in place
            paths = [str(timing.ROOT), environment.get("PYTHONPATH", "")]
            environment["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
        with log.open("w") as output:
            child = subprocess.Popen(
                command, stdout=output, stderr=output, env=environment, start_new_session=True
            )
            try:
                return child.wait(timeout=max(self.left, 0.1))
            except subprocess.TimeoutExpired:
                return None
            finally:
                if child.poll() is None:
                    os.killpg(child.pid, signal.SIGKILL)
                    child.wait()

    def _current(self, path: Path) -> bool:
        """Whether the row was measured before, of this commit, on such a machine."""
        if not path.exists():
            return False
        place = json.loads(path.read_text())["environment"]
        gpu = timing.gpu_name() if self.device == "cuda" else None
        same_gpu = (place["gpu"] or {}).get("name") == gpu
        # A peer's row has no commit of ours: it depends on nothing here.
        return same_gpu and place.get("commit", self._commit()) == self._commit()

    def _commit(self) -> str | None:
        commit: str | None = timing.source()["commit"]
        return commit

    def gather(self, rows: list[Row]) -> timing.Json:
        """All rows so far in one file."""
        found: timing.Json = {"benchmark": "battery", "rows": {}, "status": self.status}
        for row in rows:
            path = self.out / "rows" / f"{row.name}.json"
            if path.exists() and self._current(path):
                found["rows"][row.name] = json.loads(path.read_text())
        if "rates" in found["rows"]:
            found["environment"] = found["rows"]["rates"]["environment"]
            found["rates"] = found["rows"]["rates"]["rates"]
        timing.write_json(self.out / "battery.json", found)
        return found


# -- the table


def lines(name: str, content: timing.Json) -> list[list[str]]:
    """What a row says in short: case, median, minimum, spread, and the number that matters."""
    shown = []
    for row in content.get("rows", []):
        if "seconds" not in row or not isinstance(row["seconds"], dict):
            continue
        if content["benchmark"] == "kernels" and not row["name"].startswith("update + 2 copies"):
            continue
        seconds = row["seconds"]
        says = []
        if "of_floor" in row:
            says.append(f"{row['of_floor']:.2f} x floor")
        if row.get("tokens_s"):
            says.append(f"{row['tokens_s']:.0f} tok/s")
        if row.get("device_process_bytes"):
            says.append(f"{row['device_process_bytes'] / 1e9:.2f} GB")
        if row.get("host_aliased"):
            says.append("host-aliased")
        if row.get("of_copy"):
            says.append(f"{row['of_copy']:.0%} of copy")
        if row.get("speedup"):
            says.append(f"{row['speedup']:.1f} x eager")
        case = f"{name}: {row.get('mode') or row.get('name')}"
        ms = timing.milliseconds
        cells = [case, ms(seconds["median"]), ms(seconds["minimum"]), f"{seconds['spread']:.0%}"]
        shown.append([*cells, ", ".join(says)])
    return shown


def report(found: timing.Json) -> str:
    shown = [line for name, content in found["rows"].items() for line in lines(name, content)]
    text = timing.table(["row", "median ms", "min ms", "spread", ""], shown) if shown else ""
    missing = [f"{n}: {s}" for n, s in found["status"].items() if not s.startswith("done")]
    return "\n".join([text, *missing])


def main() -> None:
    parser = timing.argument_parser(__doc__)
    parser.add_argument("--minutes", type=float, required=True, help="to be done in")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR")
    parser.add_argument("--zo2", type=Path, metavar="PATH", help="checkout of liangyuwang/zo2")
    parser.add_argument("--peer-python", default=sys.executable, help="Python for that checkout")
    parser.add_argument("--small", action="store_true", help="tiny sizes, on a CPU: a test")
    options = parser.parse_args()
    device = timing.chosen_device(options).type
    battery = Battery(options.out, device, 60 * options.minutes)
    cuda = device == "cuda"
    rows = plan(cuda, options.small, options.out, options.zo2, options.peer_python)
    try:
        battery.run(rows)
    except KeyboardInterrupt:
        print("interrupted: run again with the same --out to go on")
    found = battery.gather(rows)
    print()
    if "environment" in found:
        print(timing.headline(found["environment"]))
        print(timing.rate_table(found["rates"]))
    print(report(found))
    if options.json:
        timing.write_json(options.json, found)


if __name__ == "__main__":
    main()
