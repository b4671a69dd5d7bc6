"""The kernels beside a copy of the same memory and beside eager PyTorch that does the same work.

    python benchmarks/kernels.py [--elements 2^25] [--storage bfloat16 e4m3] [--json FILE]

One slab of weights, one tensor. "update + 2 copies" is the fused pass of a step: it applies the
last step's update, writes the weights back, and writes them perturbed by +eps z and by -eps z. Its
eager equivalent is three perturbations in place and one update, each with a torch.normal of its
own: once as published codes have it ("eager": z is allocated, and scaled into further temporaries),
once with those temporaries spared ("tight"). GB/s counts each byte that has to be read or written
once, elements/s of a replay each update; "of copy" relates that to a plain copy of 256 MiB or more,
measured in the same run. Results are checked before anything is timed.

Storage of 8 bits counts its scales, one byte for 32 elements; its perturbed copies are in bfloat16.
"split" is e4m3 with a low plane beside it: "top plane only" is a step that reads one plane.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import timing
import torch
from eager import EagerMeZO
from torch import Tensor

from zo2ext import ops
from zo2ext.ops import _C, Direction, Distribution, FoldSegment, Rounding, Segment, Update
from zo2ext.ops.launch import DISTRIBUTION_CODES, ROUNDING_CODES, launch

REPLAYED = 16  # updates in one pass
COLUMNS, RANK = 4096, 4  # of the matrix and the direction that a fold adds to it
LAST, NOW, TENSOR = ops.direction_key(1, 0, 0), ops.direction_key(1, 1, 0), 7
EPS, COEFFICIENT = 1e-3, 1e-4
DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}
SCALED = ["e4m3", "split"]
STORAGES = [*DTYPES, *SCALED]


@dataclass
class Case:
    """One thing to time. `rival` names the eager case that does the same work."""

    name: str
    nbytes: float  # read and written, an element
    work: Callable[[], object]
    rival: str | None = None
    elements: int = 1  # that the work comes to, for each of the slab: of n updates, n


class Slabs:
    """Weights, room for their two perturbed copies, and what the fused pass is told."""

    def __init__(self, numel: int, storage: str, device: torch.device) -> None:
        generator = torch.Generator(device).manual_seed(0)
        self.weights = torch.empty(numel, device=device)
        self.weights.normal_(0, 0.02, generator=generator)
        self.scaled = storage in SCALED
        self.scales: Tensor | None = None
        self.low: Tensor | None = None
        if self.scaled:
            packed = ops.pack_scaled(self.weights, split=storage == "split")
            self.stored, self.scales, self.low = packed.stored, packed.scales, packed.low
        else:
            self.stored = self.weights.to(DTYPES[storage])
        compute = torch.bfloat16 if self.scaled else self.stored.dtype
        self.plus = torch.empty(numel, dtype=compute, device=device)
        self.minus = torch.empty_like(self.plus)
        self.segments = ops.segment_table([Segment(0, numel, TENSOR)], device)
        rows = -(-numel // COLUMNS)
        matrix = FoldSegment(
            0, numel, TENSOR, rows=rows, columns=COLUMNS, left_begin=0, right_begin=0
        )
        self.matrix = ops.fold_table([matrix], device)
        self.left = torch.full((1, RANK * rows), COEFFICIENT, device=device)
        self.right = torch.full((1, RANK * COLUMNS), COEFFICIENT, device=device)
        self.updates = ops.update_table([Update(LAST, COEFFICIENT)], device)
        self.replayed = {
            rounding: ops.update_table(
                [Update(k, COEFFICIENT, 1.0, rounding, k) for k in range(REPLAYED)], device
            )
            for rounding in (None, *Rounding)
        }

    @property
    def size(self) -> float:
        """Bytes an element, stored."""
        planes = 1 if self.low is None else 2
        return planes * self.stored.itemsize + (1 / ops.GROUP if self.scaled else 0)

    def unpacked(self) -> Tensor:
        """The stored weights in float32."""
        if self.scales is None:
            return ops.unpack(self.stored)
        return ops.unpack_scaled(ops.Packed(self.stored, self.scales, self.low))

    def spacing(self) -> tuple[float, float]:
        """Of stored weights: relative, and at least, between the smallest."""
        eps = 2.0**-11 if self.low is not None else torch.finfo(self.stored.dtype).eps
        tiny = torch.finfo(self.stored.dtype).smallest_normal * eps
        return eps, tiny * (float(self.scales.float().max()) if self.scales is not None else 1)

    def fused(
        self,
        distribution: Distribution,
        rounding: Rounding | None,
        *,
        perturb: bool = True,
        top_only: bool = False,
    ) -> None:
        ops.update_perturb(
            self.stored,
            segments=self.segments,
            scales=self.scales,
            low=None if top_only else self.low,
            updates=self.updates,
            directions=[Direction(NOW, EPS, self.plus, self.minus)] if perturb else [],
            write_back=rounding,
            rounding_key=3,
            distribution=distribution,
        )

    def fold(self, rounding: Rounding) -> None:
        """One direction in factors, added to the slab as a matrix."""
        ops.fold(
            self.stored,
            segments=self.matrix,
            left=self.left,
            right=self.right,
            rank=RANK,
            scales=self.scales,
            low=self.low,
            write_back=rounding,
            rounding_key=3,
        )

    def replay(self, distribution: Distribution, rounding: Rounding | None) -> None:
        """Many updates in one pass, rounded before each where `rounding` is given."""
        ops.update_perturb(
            self.stored,
            segments=self.segments,
            scales=self.scales,
            low=self.low,
            updates=self.replayed[rounding],
            write_back=Rounding.NEAREST,
            distribution=distribution,
        )


def check(numel: int, storage: str, device: torch.device) -> None:
    """The fused pass against float64, at both ends of the slab and over every element written."""
    for distribution in Distribution:
        for rounding in Rounding:
            slabs = Slabs(numel, storage, device)
            before = slabs.unpacked()
            slabs.plus.fill_(torch.nan)
            slabs.minus.fill_(torch.nan)
            slabs.fused(distribution, rounding)
            for out in (slabs.plus, slabs.minus):
                _require(bool(torch.isfinite(out).all()), "an element was not written")
            size = min(numel, 2**18)
            for begin in {0, (numel - size) // 4 * 4}:
                part = slice(begin, begin + size)
                _check_part(slabs, before, part, distribution, rounding)


def _check_part(
    slabs: Slabs, before: Tensor, part: slice, distribution: Distribution, rounding: Rounding
) -> None:
    size = part.stop - part.start
    make = ops.normal if distribution is Distribution.GAUSSIAN else ops.rademacher
    last, now = (
        make(size, key=key, tensor_id=TENSOR, offset=part.start, device=before.device).double()
        for key in (LAST, NOW)
    )
    if size >= 2**16:
        _require(abs(float(now.mean())) < 0.03, "the mean of z is not 0")
        _require(abs(float(now.var()) - 1) < 0.03, "the variance of z is not 1")
    w, stored = before[part].double(), slabs.unpacked()[part].double()
    ulp, tiny = slabs.spacing()
    steps = 1.0 if rounding is Rounding.STOCHASTIC else 0.5
    expected = w - COEFFICIENT * last
    bound = (steps * ulp + 2**-22) * (w.abs() + COEFFICIENT * last.abs()) + tiny
    _require(bool(((stored - expected).abs() <= bound).all()), "the update is wrong")
    ulp = torch.finfo(slabs.plus.dtype).eps
    tiny = torch.finfo(slabs.plus.dtype).smallest_normal * ulp
    for out, sign in ((slabs.plus, 1), (slabs.minus, -1)):
        expected = stored + sign * EPS * now
        bound = (0.5 * ulp + 2**-22) * (stored.abs() + EPS * now.abs()) + tiny
        _require(bool(((out[part].double() - expected).abs() <= bound).all()), "a copy is wrong")


def _require(holds: bool, message: str) -> None:
    if not holds:
        raise RuntimeError(f"not timed: {message}")


def cases(numel: int, storage: str, device: torch.device) -> Iterator[Case]:
    """Everything timed for one storage format."""
    slabs = Slabs(numel, storage, device)
    size, copies = slabs.size, 2 * slabs.plus.itemsize
    roundings = list(Rounding) if storage != "float32" else [Rounding.NEAREST]

    eager_weights = slabs.plus if slabs.scaled else slabs.stored
    for tight, label in ((False, "eager"), (True, "eager, tight")):
        eager = EagerMeZO([eager_weights], lr=COEFFICIENT, eps=EPS, tight=tight)
        yield Case(f"{label}: 3 perturbations + update", 0, lambda: eager.sequence(1, 1.0))
        yield Case(f"{label}: perturbation", 0, lambda: eager.perturb(1, 1))

    sequence = "eager: 3 perturbations + update"
    for kind in Distribution:
        of = f", {kind.value}"
        for rounding in roundings:
            yield Case(
                f"update + 2 copies{of}, {rounding.value}",
                2 * size + copies,
                lambda: slabs.fused(kind, rounding),
                sequence,
            )
        yield Case(
            f"update + 2 copies{of}, not written back",
            size + copies,
            lambda: slabs.fused(kind, None),
            sequence,
        )
        if slabs.low is not None:
            yield Case(
                f"update + 2 copies{of}, top plane only",
                size - 1 + copies,
                lambda: slabs.fused(kind, None, top_only=True),
                sequence,
            )
        yield Case(
            f"update in the pass{of}",
            2 * size,
            lambda: slabs.fused(kind, Rounding.NEAREST, perturb=False),
        )
        for before in (None, *roundings) if storage != "float32" else (None,):
            yield Case(
                f"replay {REPLAYED} updates{of}, {_rounded(before)}",
                2 * size,
                lambda: slabs.replay(kind, before),
                elements=REPLAYED,
            )
    if not slabs.scaled:
        yield from tensor_cases(slabs, roundings)
    planes = (None if slabs.scales is None else slabs.scales.view(torch.uint8), slabs.low)
    for rounding in roundings:
        yield Case(
            f"pack float32 to {storage}, {rounding.value}",
            4 + size,
            lambda: _in_place(
                _C.pack,
                slabs.weights,
                slabs.stored,
                *planes,
                0,
                ROUNDING_CODES[rounding],
                3,
                TENSOR,
            ),
        )
    for rounding in roundings:
        yield Case(f"fold of rank {RANK}, {rounding.value}", 2 * size, lambda: slabs.fold(rounding))
    yield Case(
        f"unpack {storage}",
        4 + size,
        lambda: _in_place(_C.unpack, slabs.stored, *planes, slabs.weights),
    )


def tensor_cases(slabs: Slabs, roundings: list[Rounding]) -> Iterator[Case]:
    """The operations on single tensors, which know no scales."""
    stored, size = slabs.stored, slabs.size
    torchs, perturbation = "eager: torch.normal into place", "eager: perturbation"
    yield Case(torchs, size, lambda: slabs.plus.normal_())
    for kind in Distribution:
        of = f", {kind.value}"
        yield Case(
            f"noise{of}",
            size,
            lambda: _in_place(
                _C.noise,
                slabs.plus,
                0,
                NOW,
                TENSOR,
                DISTRIBUTION_CODES[kind],
                _C.Domain.DIRECTION,
            ),
            torchs,
        )
        yield Case(
            f"perturb_{of}",
            2 * size,
            lambda: ops.perturb_(stored, key=NOW, tensor_id=TENSOR, eps=EPS, distribution=kind),
            perturbation,
        )
        for rounding in roundings:
            yield Case(
                f"update_{of}, {rounding.value}",
                2 * size,
                lambda: ops.update_(
                    stored,
                    key=NOW,
                    tensor_id=TENSOR,
                    lr=COEFFICIENT,
                    projected_grad=1.0,
                    distribution=kind,
                    rounding=rounding,
                ),
                perturbation,
            )


def _rounded(before: Rounding | None) -> str:
    return "unrounded between" if before is None else f"{before.value} between"


def _in_place(kernel: Callable[..., None], first: Tensor, *others: Any) -> None:
    """Run a kernel on memory that is there: fresh pages cost more than the work itself."""
    launch(kernel, first, (first, *others))


def run(
    numel: int, storages: list[str], device: torch.device, runs: int, copy: float
) -> list[timing.Json]:
    """Check, then time, every case of every storage; prints a table a storage."""
    rows: list[timing.Json] = []
    for storage in storages:
        check(min(numel, 2**22), storage, device)
        found: dict[str, timing.Json] = {}
        for case in cases(numel, storage, device):
            seconds = timing.summary(timing.measure(case.work, device, runs=runs, warmup=1))
            median = seconds["median"]
            rival = found.get(case.rival or "")
            tight = found.get((case.rival or "").replace("eager:", "eager, tight:"))
            found[case.name] = {
                "name": case.name,
                "storage": storage,
                "elements": numel,
                "bytes_per_element": case.nbytes,
                "seconds": seconds,
                "elements_s": case.elements * numel / median,
                "bytes_s": case.nbytes * numel / median,
                "of_copy": case.nbytes * numel / median / copy,
                "rival": case.rival,
                "speedup": rival["seconds"]["median"] / median if rival else None,
                "tight_speedup": tight["seconds"]["median"] / median if tight else None,
            }
        rows += found.values()
        print(f"\n{storage}, {numel:,} elements")
        print(report(list(found.values())))
    return rows


def report(rows: list[timing.Json]) -> str:
    return timing.table(
        [
            "case",
            "B/elem",
            "median ms",
            "min ms",
            "spread",
            "G elem/s",
            "GB/s",
            "of copy",
            "x eager",
            "x tight",
        ],
        [
            [
                row["name"],
                f"{row['bytes_per_element']:.4g}" if row["bytes_s"] else "",
                timing.milliseconds(row["seconds"]["median"]),
                timing.milliseconds(row["seconds"]["minimum"]),
                f"{row['seconds']['spread']:.0%}",
                f"{row['elements_s'] / 1e9:.2f}",
                f"{row['bytes_s'] / 1e9:.1f}" if row["bytes_s"] else "",
                f"{row['of_copy']:.0%}" if row["bytes_s"] else "",
                f"{row['speedup']:.1f}" if row["speedup"] else "",
                f"{row['tight_speedup']:.1f}" if row["tight_speedup"] else "",
            ]
            for row in rows
        ],
    )


def number(text: str) -> int:
    """An integer, or a power such as 2^25."""
    base, _, power = text.partition("^")
    return int(base) ** int(power) if power else int(base)


def main() -> None:
    parser = timing.argument_parser(__doc__)
    parser.add_argument("--elements", type=number, help="default: 2^25 on a CPU, 2^28 on a GPU")
    parser.add_argument("--storage", nargs="+", choices=STORAGES, default=STORAGES)
    parser.add_argument("--runs", type=int, help="of each case; default: 7 on a CPU, 31 on a GPU")
    arguments = parser.parse_args()
    device = timing.chosen_device(arguments)
    numel = arguments.elements or (2**28 if device.type == "cuda" else 2**25)
    runs = arguments.runs or (31 if device.type == "cuda" else 7)
    place = timing.environment(device)
    print(timing.headline(place))
    copy = timing.copy_rate(device, max(4 * numel, 2**28))
    print(f"copy {copy / 1e9:.1f} GB/s (fastest of 11, bytes read and written)")
    rows = run(numel, arguments.storage, device, runs, copy)
    if arguments.json:
        timing.write_json(
            arguments.json,
            {
                "benchmark": "kernels",
                "environment": place,
                "rates": {"copy_bytes_s": copy},
                "rows": rows,
            },
        )


if __name__ == "__main__":
    main()
