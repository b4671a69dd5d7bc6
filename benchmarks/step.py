"""Whole training steps of a known model shape with random weights, and how far from the floor.

    python benchmarks/step.py [--shape opt-125m] [--batch 1 --length 128] [--json FILE]

Modes:
    forwards  the forward passes of a step alone, in plain PyTorch: what no step can beat
    eager     MeZO in plain PyTorch, weights perturbed in place, all on the device
    tight     the same loop with fewer temporaries: draws into one buffer, scales within additions
    resident  zo2ext, all weights on the device
    streamed  zo2ext, weights on the host, streamed unit by unit (on a CPU nothing moves: weights
              are computed on where they rest, and "resident" would be the same thing)

Modes take turns, --rounds times, in one process. Core time is that of all cores together: where
other work shares the machine, it says more than the wall clock, and it flatters code that leaves
cores idle, as torch.normal does. The floor is the largest of: bytes up / upload
rate; bytes down / offload rate; 2 x multiplied weights x tokens x forwards / matrix rate + bytes
of the fused pass / copy rate; each rate the fastest of its kind in this same run. A link may be
slower both ways at once: "both ways" is what all bytes take at the rate measured so. The parts come
from extra steps, so that taking them apart does not count.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import random_models
import timing
import torch
from eager import EagerMeZO
from shapes import SHAPES, make_config
from torch import Tensor, nn

import zo2ext
from zo2ext.ops.formats import Storage
from zo2ext.runs.timeline import Kind, Recorder

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
MODES = ("forwards", "eager", "tight", "resident", "streamed")
LR, EPS = 1e-7, 1e-3


@dataclass
class Task:
    """A model, a batch, and where to run them."""

    model: nn.Module
    tokens: Tensor  # [batch, length]
    device: torch.device
    options: argparse.Namespace

    def loss(self) -> Tensor:
        loss: Tensor = self.model(input_ids=self.tokens, labels=self.tokens).loss
        return loss


@dataclass
class Round:
    """What one turn of one mode measured. Times in seconds, memory in bytes."""

    steps: list[tuple[float, float]]  # by the wall clock, and of all cores together
    parts: dict[str, float]
    core_parts: dict[str, float]  # on a CPU: core seconds
    facts: timing.Json

    @property
    def fastest(self) -> float:
        return min(wall for wall, _ in self.steps)

    @property
    def fewest(self) -> float:
        """Core seconds of the step that took the fewest."""
        return min(cores for _, cores in self.steps)


def time_steps(
    step: Callable[[], object], options: argparse.Namespace
) -> list[tuple[float, float]]:
    """Each step's wall time and core time.

    A step ends when its losses are known. Copies may still be under way then, and count into the
    step that waits for them, as they do in training.
    """
    for _ in range(options.warmup):
        step()
    return [timing.clocked(step) for _ in range(options.steps)]


def run_eager(task: Task, *, tight: bool) -> Round:
    random_models.materialise(task.model, task.device)
    weights = [p.data for p in task.model.parameters()]
    eager = EagerMeZO(weights, lr=LR, eps=EPS, tight=tight)
    steps = time_steps(lambda: eager.step(1, task.loss), task.options)
    parts, core_parts = {}, {}
    with torch.no_grad():
        loss = float(task.loss())
        for name, work in (
            ("weights", lambda: eager.sequence(1, 1e-3)),
            ("forward", lambda: (task.loss(), task.loss())),
        ):
            if task.device.type == "cuda":
                parts[name] = min(timing.measure(work, task.device, runs=2, warmup=0))
            else:
                walls, cores = zip(*(timing.clocked(work) for _ in range(2)), strict=True)
                parts[name], core_parts[name] = min(walls), min(cores)
    return Round(steps, parts, core_parts, {"loss": loss})


def run_forwards(task: Task) -> Round:
    random_models.materialise(task.model, task.device)
    passes = make_config_of(task.options).forwards

    def forwards() -> list[float]:
        with torch.no_grad():
            return torch.stack(
                [task.loss() for _ in range(passes)]
            ).tolist()  # as a step reads them

    steps = time_steps(forwards, task.options)
    seconds = min(wall for wall, _ in steps)
    parts = {"weights": 0.0, "forward": seconds}
    return Round(steps, parts, {}, {"loss": forwards()[0]})


def make_config_of(options: argparse.Namespace) -> zo2ext.ZOConfig:
    return zo2ext.ZOConfig(rank=options.rank, directions=options.directions, joined=options.joined)


def run_zo2ext(task: Task, *, resident: bool) -> Round:
    options = task.options
    config = make_config_of(options).replace(
        lr=LR,
        eps=EPS,
        storage=options.storage,
        distribution=zo2ext.Distribution(options.distribution),
        granularity=zo2ext.Granularity(options.granularity),
        slots=options.slots,
        one_copy=options.one_copy,
        write_back=options.write_back or zo2ext.ZOConfig().write_back,
        resident="all" if resident else options.resident,
        device=task.device,
    )
    with random_models.random_store(options.host_budget):
        engine = zo2ext.offload(task.model, config)
    usual = task.model.loss_function
    zo2ext.chunk_loss(task.model)  # as commands and trainers do
    try:
        steps = time_steps(lambda: engine.step(task.loss), options)
        before = (engine.traffic.uploaded, engine.traffic.offloaded)
        recorder = Recorder(engine)
        with recorder.recording():
            for _ in range(options.steps):
                engine.step(task.loss)
        moved = (engine.traffic.uploaded - before[0], engine.traffic.offloaded - before[1])
        parts, core_parts = per_step(recorder, options.steps), {}
        if task.device.type == "cpu":
            by_cores = Recorder(engine, time.process_time)
            with by_cores.recording():
                for _ in range(options.steps):
                    engine.step(task.loss)
            core_parts = per_step(by_cores, options.steps)
        if options.profile:
            print(profile(lambda: engine.step(task.loss), recorder))
        store: Any = engine._weights.store
        facts = {
            "loss": engine.last.loss if engine.last else None,
            "skipped_steps": engine.skipped,
            "uploaded_bytes": moved[0] // options.steps,
            "offloaded_bytes": moved[1] // options.steps,
            "forwards": engine.config.forwards,
            "pass_bytes": pass_nbytes(engine),
            "write_back": engine.config.write_back,
            "host_weight_bytes": store.distinct_nbytes,
            "host_aliased": store.distinct_nbytes < engine.host_nbytes,
            "engine_device_bytes": engine.device_nbytes,
        }
    finally:
        engine.close()
        task.model.loss_function = usual
    return Round(steps, parts, core_parts, facts)


def per_step(recorder: Recorder, steps: int) -> dict[str, float]:
    taken = {part: seconds / steps for part, seconds in recorder.totals().items()}
    return {"weights": taken.pop(Kind.KERNEL)} | taken


def pass_nbytes(engine: zo2ext.ZOEngine) -> int:
    """Bytes that the fused pass has to read and write in a step: weights in and, where written
    back, out; a perturbed copy per forward pass."""
    parts = [part for layout in engine.layouts for part in layout.parts]
    stored = sum(part.storage.nbytes(part.numel) for part in parts)
    low = sum(part.numel for part in parts if part.storage.has_low)
    dense = [part for part in parts if part.factors is None]
    passes = engine.config.forwards
    copies = sum(passes * part.numel * part.compute.itemsize for part in dense)
    period = engine.config.write_back_period
    written = 0 if period is None else (stored + low) / period
    if engine.config.rank is None:
        return int(stored - low + written + copies)
    # What has factors is read and written when they are folded in, and not otherwise.
    read = sum(part.storage.nbytes(part.numel) for part in dense)
    return int(read + 2 * written + copies)


def profile(step: Callable[[], object], recorder: Recorder, steps: int = 3) -> str:
    """Where the time of a step goes, operator by operator."""
    with torch.profiler.profile() as found, recorder.recording():
        for _ in range(steps):
            step()
    averages = found.key_averages()
    key = "self_cuda_time_total" if torch.cuda.is_initialized() else "self_cpu_time_total"
    return f"{steps} steps:\n" + str(averages.table(sort_by=key, row_limit=25))


def floor(
    rates: timing.Json, facts: timing.Json, multiplied: int, tokens: int, dtype: str
) -> timing.Json:
    """Seconds that no step can beat, by what sets the limit."""
    flops = 2 * multiplied * tokens * facts["forwards"]
    compute = flops / rates.get(f"{dtype}_flop_s", float("inf"))  # not measured on CPUs
    return {
        "upload": facts["uploaded_bytes"] / rates.get("upload_bytes_s", float("inf")),
        "offload": facts["offloaded_bytes"] / rates.get("offload_bytes_s", float("inf")),
        "compute": compute + facts["pass_bytes"] / rates["copy_bytes_s"],
    }


def run_mode(mode: str, task: Task, before: int) -> Round:
    """One turn of one mode, with its peak memory; the model is hollow before and after."""
    gc.collect()
    known = timing.reset_host_peak()
    if task.device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(task.device)
    try:
        if mode == "forwards":
            found = run_forwards(task)
        elif mode in ("eager", "tight"):
            found = run_eager(task, tight=mode == "tight")
        else:
            found = run_zo2ext(task, resident=mode == "resident")
        if task.device.type == "cuda":
            found.facts["device_peak_bytes"] = torch.cuda.max_memory_allocated(task.device)
            used = timing.device_used_nbytes(task.device)
            found.facts["device_process_bytes"] = used - before if used else None
    finally:
        random_models.empty(task.model)
    found.facts["host_peak_bytes"] = timing.host_peak_nbytes() if known else None
    return found


def summarize(mode: str, rounds: list[Round], task: Task, rates: timing.Json) -> timing.Json:
    steps = timing.summary([wall for found in rounds for wall, _ in found.steps])
    fastest = min(rounds, key=lambda found: found.fastest)
    parts = {name: min(r.parts[name] for r in rounds) for name in fastest.parts}
    parts["rest"] = max(0.0, steps["minimum"] - parts["weights"] - parts["forward"])
    tokens = task.tokens.numel()
    row = {
        "mode": mode,
        "seconds": steps,
        "parts_seconds": parts,
        "core_seconds": timing.summary([cores for r in rounds for _, cores in r.steps]),
        "core_parts_seconds": {
            name: min(r.core_parts[name] for r in rounds) for name in fastest.core_parts
        },
        "tokens_s": tokens / steps["median"],
        **fastest.facts,
    }
    if mode in ("resident", "streamed"):
        multiplied = random_models.multiplied_count(task.model)
        limits = floor(rates, fastest.facts, multiplied, tokens, task.options.dtype)
        row["floor_seconds"] = limits
        moved = fastest.facts["uploaded_bytes"] + fastest.facts["offloaded_bytes"]
        if "both_ways_bytes_s" in rates:  # what a link that is slower both ways at once costs
            row["together_seconds"] = moved / rates["both_ways_bytes_s"]
        row["of_floor"] = steps["median"] / max(limits.values())
        row["minimum_of_floor"] = steps["minimum"] / max(limits.values())
    return row


def compare(rows: list[timing.Json], rounds: dict[str, list[Round]]) -> None:
    """Add to each row how many times faster than the eager loops it is.

    Of whole steps: the median over rounds of fastest step against fastest step, so that what
    slows the machine for a while slows both. Of the work on weights: fastest against fastest.
    Of core time, which waiting for other processes does not count into: fewest against fewest. And
    what share of the core time the forward passes alone take.
    """
    by_mode = {row["mode"]: row for row in rows}
    if "forwards" in by_mode:
        fewest = min(found.fewest for found in rounds["forwards"])
        for mode, row in by_mode.items():
            row["of_forwards"] = fewest / min(found.fewest for found in rounds[mode])
    for rival, prefix in (("eager", ""), ("tight", "tight_")):
        if rival not in by_mode:
            continue
        weights = by_mode[rival]["parts_seconds"]["weights"]
        for mode, row in by_mode.items():
            ratios = [
                a.fastest / b.fastest for a, b in zip(rounds[rival], rounds[mode], strict=True)
            ]
            row[f"{prefix}speedup"] = statistics.median(ratios)
            row[f"{prefix}round_speedups"] = ratios
            row[f"{prefix}weights_speedup"] = weights / row["parts_seconds"]["weights"]
            fewest = min(found.fewest for found in rounds[rival])
            row[f"{prefix}core_speedup"] = fewest / min(found.fewest for found in rounds[mode])


def report(rows: list[timing.Json]) -> str:
    cells = []
    for row in rows:
        parts, ms = row["parts_seconds"], timing.milliseconds
        memory = row.get("device_peak_bytes") or row["host_peak_bytes"]
        cells.append(
            [
                row["mode"] + (", host-aliased" if row.get("host_aliased") else ""),
                ms(row["seconds"]["median"]),
                ms(row["seconds"]["minimum"]),
                f"{row['seconds']['spread']:.0%}",
                ms(parts["weights"]),
                ms(parts["forward"]),
                ms(parts["rest"]),
                ms(max(row["floor_seconds"].values())) if "floor_seconds" in row else "",
                ms(row["together_seconds"]) if "together_seconds" in row else "",
                f"{row['of_floor']:.2f}" if "of_floor" in row else "",
                f"{row['tokens_s']:.0f}",
                f"{memory / 1e9:.2f}" if memory else "?",
                f"{row['speedup']:.2f}" if "speedup" in row else "",
                f"{row['weights_speedup']:.1f}" if "weights_speedup" in row else "",
                f"{row['tight_speedup']:.2f}" if "tight_speedup" in row else "",
                f"{row['tight_weights_speedup']:.1f}" if "tight_weights_speedup" in row else "",
                ms(row["core_seconds"]["minimum"]),
                f"{row['core_speedup']:.2f}" if "core_speedup" in row else "",
                f"{row['tight_core_speedup']:.2f}" if "tight_core_speedup" in row else "",
                f"{row['of_forwards']:.1%}" if "of_forwards" in row else "",
            ]
        )
    headings = "mode|median ms|min ms|spread|weights ms|forward ms|rest ms|floor ms|both ways ms"
    headings += "|of floor|tok/s"
    headings += "|peak GB|x eager|weights x eager|x tight|weights x tight"
    headings += "|core ms|x eager|x tight|of forwards"
    return timing.table(headings.split("|"), cells)


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = timing.argument_parser(__doc__)
    parser.add_argument("--shape", choices=SHAPES, default="opt-125m")
    parser.add_argument("--layers", type=int, help="decoder blocks, if not the shape's own")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--length", type=int, help="tokens; default: 128 on a CPU, 2048 on a GPU")
    parser.add_argument("--dtype", choices=DTYPES, help="default: float32 on a CPU, else bfloat16")
    parser.add_argument(
        "--storage", choices=list(Storage), help="of weights at rest; default: --dtype"
    )
    parser.add_argument("--modes", help=f"of {','.join(MODES)}; default: all that differ here")
    parser.add_argument("--distribution", choices=("gaussian", "rademacher"), default="gaussian")
    parser.add_argument("--granularity", choices=("block", "module"), default="block")
    parser.add_argument("--slots", type=int, default=3)
    parser.add_argument("--one-copy", action="store_true", help="W- is written over W+")
    parser.add_argument("--resident", type=_count_or_word, default=0, help="of the streamed mode")
    parser.add_argument("--rank", type=int, help="of factored directions; default: dense ones")
    parser.add_argument("--joined", action="store_true", help="all passes of a step as one batch")
    parser.add_argument("--directions", type=int, default=1, help="not of eager and tight")
    parser.add_argument("--compile", action="store_true", help="blocks, in all modes")
    parser.add_argument(
        "--write-back", type=_count_or_word, metavar="K", help="period; default: that of zo2ext"
    )
    parser.add_argument("--steps", type=int, help="timed, a round; default: 3 on a CPU, else 5")
    parser.add_argument("--warmup", type=int, default=2, help="steps before the clock starts")
    parser.add_argument("--rounds", type=int, default=3, help="turns that each mode takes")
    parser.add_argument(
        "--host-budget",
        type=zo2ext.config.parse_size,
        help="host memory for weights, such as 60GiB; a model that is larger shares it among its "
        "units, and its row is marked host-aliased; default: 70%% of what is free",
    )
    parser.add_argument("--rates", type=Path, metavar="FILE", help="from timing.py --json")
    parser.add_argument("--small", action="store_true", help="tiny rates: a test of the script")
    parser.add_argument("--profile", action="store_true", help="print operators by time, too")
    return parser.parse_args(arguments)


def _count_or_word(text: str) -> int | str:
    return int(text) if text.isdigit() else text


def free_host_nbytes() -> int:
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return 2**33


def main() -> None:
    options = parse()
    before = timing.device_used_nbytes(torch.device(options.device or "cuda"))
    device = timing.chosen_device(options)
    cuda = device.type == "cuda"
    options.length = options.length or (2048 if cuda else 128)
    options.dtype = options.dtype or ("bfloat16" if cuda else "float32")
    options.steps = options.steps or (5 if cuda else 3)
    options.host_budget = options.host_budget or int(0.7 * free_host_nbytes())
    modes = options.modes or ("eager,tight,resident,streamed" if cuda else "eager,tight,streamed")
    modes = [mode for mode in modes.split(",") if mode]
    if unknown := set(modes) - set(MODES):
        raise SystemExit(f"--modes are of {', '.join(MODES)}, got {', '.join(unknown)}")
    place = timing.environment(device)
    print(timing.headline(place))

    if options.rates:
        rates = json.loads(options.rates.read_text())["rates"]
    else:
        rates = timing.rates(device, small=options.small)
        print(timing.rate_table(rates))
    model = random_models.hollow_model(
        options.shape, DTYPES[options.dtype], layers=options.layers, length=options.length
    )
    if options.compile:
        zo2ext.compile_blocks(model)
    generator = torch.Generator().manual_seed(0)
    size = (options.batch, options.length)
    vocabulary = make_config(options.shape).vocab_size
    tokens = torch.randint(3, vocabulary, size, generator=generator).to(device)
    task = Task(model, tokens, device, options)

    rounds: dict[str, list[Round]] = {mode: [] for mode in modes}
    for _ in range(options.rounds):
        for mode in modes:
            rounds[mode].append(run_mode(mode, task, before))
    rows = [summarize(mode, rounds[mode], task, rates) for mode in modes]
    compare(rows, rounds)
    count = random_models.parameter_count(model)
    print(
        f"\n{options.shape}, {count:,} parameters, batch {options.batch} x {options.length}, "
        f"{options.dtype}, stored as {options.storage or options.dtype}"
    )
    print(report(rows))
    if options.json:
        hidden = ("json", "rates", "device", "threads", "profile")
        settings = {k: v for k, v in vars(options).items() if k not in hidden}
        timing.write_json(
            options.json,
            {
                "benchmark": "step",
                "environment": place,
                "rates": rates,
                "settings": settings,
                "parameters": count,
                "rows": rows,
            },
        )


if __name__ == "__main__":
    main()
