"""What several ranks cost and share: work and bytes of each, on processes of one machine.

    python benchmarks/scaling.py [--shape opt-125m] [--batch 4] [--length 128] [--json FILE]
    python benchmarks/scaling.py --plan [--link GB/s] [--json FILE]

Each row is a way to use ranks: the same batch a step for all of them, in micro-batches of one,
dealt over data ranks. Ranks beyond the machine's cores (or GPUs) share them, so wall time tells
little there: what counts is each rank's own work (processor seconds a step) and what crosses each
link.
Bytes are checked against their formulas; losses have to be the same bits in every row.

With --plan nothing is run: what 1 to 8 GPUs should make of large shapes by this machine's measured
rates, with and without a link between them, and what that assumes; `zo2ext plan --ranks` for them.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from functools import partial
from statistics import median
from typing import Any

import timing
import torch
from shapes import SHAPES, make_config
from tables import scaling_rows
from transformers import AutoModelForCausalLM

import zo2ext
from zo2ext.planning.plan import make_plan
from zo2ext.planning.rates import measure_rates
from zo2ext.planning.several_gpus import assumptions, rank_plans, rank_table

REPORT, RECORD = 1 + 29, 64  # bytes; docs/contracts.md, "Ranks"


@dataclass(frozen=True)
class Way:
    """How ranks are used."""

    data: int = 1
    perturb: int = 1
    store: str = "host"

    @property
    def ranks(self) -> int:
        return self.data * self.perturb

    def __str__(self) -> str:
        return f"{self.data} data x {self.perturb} perturb, {self.store}"


WAYS = [
    Way(),
    Way(perturb=2),
    Way(data=2),
    Way(data=2, perturb=2),
    Way(data=4),
    Way(data=2, store="shared"),
    Way(data=2, perturb=2, store="shared"),
]


def work(way: Way, options: Any) -> timing.Json:
    """One rank's part: its numbers of a step."""
    torch.manual_seed(0)
    device = timing.chosen_device(options)
    model = AutoModelForCausalLM.from_config(make_config(options.shape)).eval()
    parallel = zo2ext.Parallel.from_environment(perturb=way.perturb) if way.ranks > 1 else None
    config = zo2ext.ZOConfig(device=device, store=way.store, lr=1e-6)
    windows = torch.randint(5, model.config.vocab_size, (options.batch, options.length))
    share = list(range(options.batch))
    if parallel is not None:
        each = options.batch // way.data
        share = share[parallel.data_rank * each : (parallel.data_rank + 1) * each]
    rows = [windows[i : i + 1].to(device) for i in share]
    losses = [partial(_loss, model, row) for row in rows]
    with zo2ext.offload(model, config, parallel=parallel) as zo:
        zo.step(losses, weights=[options.length] * len(rows))
        before = _counted(zo)
        walls, cores = [], []
        for _ in range(options.steps):
            wall, core = time.perf_counter(), time.process_time()
            zo.step(losses, weights=[options.length] * len(rows))
            walls.append(time.perf_counter() - wall)
            cores.append(time.process_time() - core)
        assert zo.last is not None
        moved = {k: (v - before[k]) / options.steps for k, v in _counted(zo).items()}
        return {
            **moved,
            "wall": median(walls),
            "core": median(cores),
            "loss": zo.last.loss.hex(),
            "weights": sum(layout.nbytes for layout in zo.layouts),
            # What is in the slots where the counting begins, and where it ends, may differ.
            "ahead": config.slots * max(x.nbytes for x in zo.layouts) / options.steps,
            "host": zo.host_nbytes,
            "micro_batches": len(rows),
            "device_bytes": zo.device_nbytes,
        }


def _loss(model: Any, ids: torch.Tensor) -> torch.Tensor:
    loss: torch.Tensor = model(input_ids=ids, labels=ids, use_cache=False).loss
    return loss


def _counted(zo: zo2ext.ZOEngine) -> dict[str, float]:
    return {**asdict(zo.traffic), "sent": zo.sent_nbytes}


def expected(way: Way, rank: int, row: timing.Json) -> dict[str, float]:
    """Bytes of a step by formula: what a rank sends, and what moves to and from its device."""
    forwards = 2 // way.perturb
    sent = REPORT + 8 * row["micro_batches"] * (forwards + 1)
    if rank == 0:
        sent = 1 + RECORD if way.ranks > 1 else 0
    shares = way.ranks if way.store == "shared" else 1
    moves = way.store == "shared"  # else the CPU computes on weights where they rest
    return {
        "sent": sent,
        "uploaded": row["weights"] / shares if moves else 0,
        "gathered": row["weights"] * (shares - 1) / shares,
    }


def run(way: Way, options: Any) -> list[timing.Json]:
    """All ranks of a way, each in a process of its own."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    children = []
    for rank in range(way.ranks):
        place = {"RANK": rank, "WORLD_SIZE": way.ranks, "LOCAL_WORLD_SIZE": way.ranks}
        place |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "LOCAL_RANK": rank}
        command = [sys.executable, __file__, "--way", json.dumps(asdict(way))]
        for name in ("shape", "batch", "length", "steps", "device"):
            if getattr(options, name) is not None:
                command += [f"--{name}", str(getattr(options, name))]
        children.append(
            subprocess.Popen(
                [*command, "--threads", "1"],
                stdout=subprocess.PIPE,
                text=True,
                env=os.environ | {k: str(v) for k, v in place.items()},
            )
        )
    answers = [child.communicate()[0] for child in children]
    if any(child.returncode for child in children):
        raise RuntimeError(f"a rank of {way} failed")
    return [json.loads(answer.splitlines()[-1]) for answer in answers]


def check(way: Way, rows: list[timing.Json], options: Any) -> None:
    """Bytes against formulas: to the byte, but for the padding of slices and what is ahead."""
    if options.device not in (None, "cpu"):
        return
    for rank, row in enumerate(rows):
        for name, value in expected(way, rank, row).items():
            slack = 0 if name == "sent" else 0.01 * row["weights"] + row["ahead"]
            if abs(row[name] - value) > slack:
                raise AssertionError(f"{way}, rank {rank}: {name} is {row[name]}, not {value}")


def main() -> None:
    parser = timing.argument_parser(__doc__)
    parser.add_argument("--shape", choices=SHAPES, default="opt-125m")
    parser.add_argument("--batch", type=int, default=4, help="windows a step, a multiple of 4")
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--plan", action="store_true", help="predict large shapes on up to 8 GPUs")
    parser.add_argument("--link", type=float, default=450.0, help="GB/s between GPUs, each way")
    parser.add_argument("--way", help="for the script itself")
    options = parser.parse_args()
    if options.way:
        print(json.dumps(work(Way(**json.loads(options.way)), options)))
        return
    place = timing.environment(timing.chosen_device(options))
    print(timing.headline(place))
    if options.plan:
        content = {"benchmark": "rank-plans", "environment": place, "rows": planned(options)}
        if options.json:
            timing.write_json(options.json, content | {"link_bytes_s": options.link * 1e9})
        return
    found = []
    for way in WAYS:
        rows = run(way, options)
        check(way, rows, options)
        found.append({"way": str(way), "ranks": way.ranks, "rows": rows})
        if rows[0]["loss"] != found[0]["rows"][0]["loss"]:
            raise AssertionError(f"{way} has another loss than one rank")
        print(f"{way}: done", file=sys.stderr)
    print(timing.table(*scaling_rows(found)))
    if options.json:
        content = {"benchmark": "scaling", "environment": place, "rows": found}
        timing.write_json(options.json, content | {"shape": options.shape, "batch": options.batch})


def planned(options: Any) -> list[timing.Json]:
    """Plans of a step of 1 x 2048 tokens a data rank, bfloat16, printed as tables."""
    rates = measure_rates(timing.chosen_device(options), (torch.bfloat16,))
    config = zo2ext.ZOConfig(storage="bf16", compute_dtype=torch.bfloat16)
    found, link = [], options.link * 1e9
    for shape in ("opt-13b", "opt-30b", "opt-66b", "opt-175b"):
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(make_config(shape))
        plan = make_plan(model, config, tokens=2048, rates=rates)
        plans = list(rank_plans(plan, most=8, link=link))
        print(f"\n{shape}\n{rank_table(plans)}")
        found += [{"shape": shape, **asdict(p), "ranks": p.ranks} for p in plans]
    print(f"\nrates   {rates}\nassuming that\n{assumptions(link)}")
    return found


if __name__ == "__main__":
    main()
