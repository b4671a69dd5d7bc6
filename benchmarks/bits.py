"""Do all kernels give the same bits here? Exits with 1 where they do not.

    python benchmarks/bits.py [--elements 2^28] [--device cuda]

On a GPU: noise, and the fused pass in every format, on the GPU against the CPU. On a CPU: each
instruction set against the plain one. Run under compute-sanitizer with few elements, too.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator

import timing
import torch
from kernels import DTYPES, EPS, LAST, NOW, SCALED, STORAGES, number
from torch import Tensor

from zo2ext import ops
from zo2ext.ops import _C, Direction, Distribution, Rounding, Segment, Update

CHUNK = 2**24  # elements at a time, so that host memory stays small
INTEGERS = {4: torch.int32, 2: torch.int16, 1: torch.uint8}


def outputs(begin: int, numel: int, device: torch.device) -> Iterator[tuple[str, Tensor]]:
    """Everything the kernels make of elements `begin` to `begin + numel` of a tensor."""
    for distribution in Distribution:
        make = ops.normal if distribution is Distribution.GAUSSIAN else ops.rademacher
        z = make(numel, key=NOW, tensor_id=3, offset=begin, device=device)
        yield f"noise, {distribution.value}", z
        for storage in STORAGES:
            for rounding in Rounding if storage != "float32" else [Rounding.NEAREST]:
                what = f"pass, {distribution.value}, {storage}, {rounding.value}"
                made = fused(begin, numel, storage, rounding, distribution, device)
                for name, plane in made.items():
                    yield f"{what}: {name}", plane


def fused(
    begin: int,
    numel: int,
    storage: str,
    rounding: Rounding,
    distribution: Distribution,
    device: torch.device,
) -> dict[str, Tensor]:
    """What packing and a pass over packed weights make: all planes and both copies."""
    weights = (0.02 * ops.normal(numel, key=5, tensor_id=0, offset=begin)).to(device)
    if storage in SCALED:
        options = {"split": storage == "split", "rounding": rounding, "key": 4, "offset": begin}
        planes = vars(ops.pack_scaled(weights, **options))
    else:
        planes = {"stored": ops.pack(weights, DTYPES[storage])}
    planes = {name: plane for name, plane in planes.items() if plane is not None}
    before = {f"packed {name}": plane.clone() for name, plane in planes.items()}
    compute = torch.bfloat16 if storage in SCALED else DTYPES[storage]
    plus, minus = (torch.full_like(weights, torch.nan, dtype=compute) for _ in range(2))
    ops.update_perturb(
        **planes,
        segments=ops.segment_table([Segment(0, numel, 3, offset=begin)], device),
        updates=ops.update_table([Update(LAST, 1e-4, 0.999), Update(NOW, -2e-4)], device),
        directions=[Direction(NOW, EPS, plus, minus)],
        write_back=rounding,
        rounding_key=9,
        distribution=distribution,
    )
    return before | planes | {"plus": plus, "minus": minus}


def compare(numel: int, device: torch.device) -> dict[str, int]:
    """Elements that differ, by output; NaN must meet NaN."""
    different: dict[str, int] = {}
    host = torch.device("cpu")
    fastest = _C.simd()
    rivals = [("", device)] if device.type == "cuda" else [(n, host) for n in _C.simd_variants()]
    for begin in range(0, numel, CHUNK):
        size = min(CHUNK, numel - begin)
        for variant, where in rivals:
            if where.type == "cpu":
                _C.set_simd("plain")
            expected = outputs(begin, size, host)
            for name, made in outputs_with(variant, begin, size, where):
                if where.type == "cpu":
                    _C.set_simd("plain")
                reference = next(expected)[1]
                integer = INTEGERS[made.element_size()]
                unequal = int((made.cpu().view(integer) != reference.view(integer)).sum())
                label = f"{name}{f' ({variant})' if variant else ''}"
                different[label] = different.get(label, 0) + unequal
        _C.set_simd(fastest)
    return different


def outputs_with(
    variant: str, begin: int, numel: int, device: torch.device
) -> Iterator[tuple[str, Tensor]]:
    """`outputs` with an instruction set chosen anew before each is made."""
    made = outputs(begin, numel, device)
    while True:
        if variant:
            _C.set_simd(variant)
        try:
            yield next(made)
        except StopIteration:
            return


def main() -> None:
    parser = timing.argument_parser(__doc__)
    parser.add_argument("--elements", type=number, help="default: 2^28 on a GPU, 2^22 on a CPU")
    arguments = parser.parse_args()
    device = timing.chosen_device(arguments)
    numel = arguments.elements or (2**28 if device.type == "cuda" else 2**22)
    place = timing.environment(device)
    print(timing.headline(place))
    different = compare(numel, device)
    rows = [{"name": name, "elements": numel, "different": n} for name, n in different.items()]
    bad = {name: count for name, count in different.items() if count}
    for name, count in bad.items():
        print(f"{name}: {count} of {numel} elements differ")
    print(f"{len(rows) - len(bad)} of {len(rows)} outputs agree in every bit, {numel:,} elements")
    if arguments.json:
        timing.write_json(arguments.json, {"benchmark": "bits", "environment": place, "rows": rows})
    sys.exit(bool(bad))


if __name__ == "__main__":
    main()
