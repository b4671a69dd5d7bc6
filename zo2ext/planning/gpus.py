"""Rates of known GPUs, for predictions without having one.

Memory, memory bandwidth, dense matrix products, multiprocessors and boost clocks are those of
NVIDIA's data sheets and architecture white papers (Turing, GA102, A100, Ada, Hopper, Blackwell
RTX). Matrix products are with sums in float32, which torch uses; GeForce cards run these at half
the rate that is often quoted. Links are PCIe with 16 lanes; 3.0, 4.0 and 5.0 move 12, 25 and 55
GB/s of the 15.8, 31.5 and 63 that they carry.
"""

from __future__ import annotations

import difflib
from dataclasses import dataclass, replace

import torch

from zo2ext.errors import UserError
from zo2ext.planning.rates import KernelCosts, Rates

MEMORY_SHARE = 0.9  # of the bandwidth, which a copy reaches
MULTIPLY_SHARE = 0.8  # of the peak, which large matrix products reach
CLOCK_SHARE = 0.9  # of the boost clock, under load
BOTH_WAYS = 0.85  # of each direction's rate, while both are busy

_PCIE = {3: 12e9, 4: 25e9, 5: 55e9}  # bytes per second of page-locked copies
_LANES = 128  # instructions of a thread that a multiprocessor issues per clock, since Volta


@dataclass(frozen=True)
class Gpu:
    """Data of a GPU as its data sheet has them."""

    memory: float  # GiB
    bandwidth: float  # GB/s of the memory
    pcie: int  # generation
    half: float  # TFLOP/s, 16 bits
    single: float  # TFLOP/s, float32
    processors: int  # multiprocessors
    clock: float  # GHz, boost
    bfloat16: bool = True  # whether its matrix units have bfloat16


GPUS = {
    "T4": Gpu(15, 320, 3, 65, 8.1, 40, 1.59, bfloat16=False),
    "RTX 3090": Gpu(24, 936, 4, 71, 35.6, 82, 1.695),
    "RTX 4090": Gpu(24, 1008, 4, 165, 82.6, 128, 2.52),
    "RTX 5090": Gpu(32, 1792, 5, 210, 104.8, 170, 2.407),
    "A10": Gpu(22, 600, 4, 125, 31.2, 72, 1.695),
    "L4": Gpu(22, 300, 4, 121, 30.3, 58, 2.04),
    "L40S": Gpu(45, 864, 4, 362, 91.6, 142, 2.52),
    "A100 40GB": Gpu(40, 1555, 4, 312, 19.5, 108, 1.41),
    "A100 80GB": Gpu(80, 1935, 4, 312, 19.5, 108, 1.41),
    "H100": Gpu(80, 3350, 5, 989, 67, 132, 1.98),
    "H200": Gpu(140, 4800, 5, 989, 67, 132, 1.98),
}
_OTHER_NAMES = {"A100": "A100 80GB"}


def named_rates(name: str) -> Rates:
    """Return the predicted rates of a GPU in `GPUS`; case, spaces and hyphens do not matter.

    Raises:
        UserError: There is none of this name; the message names those like it.
    """
    known = {_plain(key): key for key in GPUS} | {_plain(k): v for k, v in _OTHER_NAMES.items()}
    key = known.get(_plain(name))
    if key is None:
        near = difflib.get_close_matches(_plain(name), known, n=1, cutoff=0.5)
        hint = f"; did you mean {known[near[0]]!r}?" if near else ""
        raise UserError(f"gpu must be one of {', '.join(GPUS)}, got {name!r}{hint}")
    gpu = GPUS[key]
    half, single = gpu.half * 1e12 * MULTIPLY_SHARE, gpu.single * 1e12 * MULTIPLY_SHARE
    instructions = gpu.processors * _LANES * gpu.clock * 1e9 * CLOCK_SHARE
    return Rates(
        device=torch.device("cuda"),
        copy=gpu.bandwidth * 1e9 * MEMORY_SHARE,
        upload=_PCIE[gpu.pcie],
        offload=_PCIE[gpu.pcie],
        multiply={
            torch.float32: single,
            torch.bfloat16: half if gpu.bfloat16 else single,
            torch.float16: half,
        },
        share=BOTH_WAYS,
        kernel=KernelCosts.from_instructions(instructions),
        memory=round(gpu.memory * 2**30),
        name=key,
    )


def nearest_gpu(multiply: float) -> str:
    """Return the name of the GPU whose 16-bit matrix products are nearest to `multiply` per second,
    the one with less memory of equals."""
    return min(GPUS, key=lambda name: abs(GPUS[name].half * 1e12 * MULTIPLY_SHARE - multiply))


def given_rates(
    rates: Rates,
    *,
    upload: float | None = None,
    download: float | None = None,
    matmul: float | None = None,
    memory: float | None = None,
) -> Rates:
    """Return `rates` with those that are given instead.

    Args:
        upload: GB/s to the device.
        download: GB/s from the device; None: as `upload`, if that is given.
        matmul: TFLOP/s of 16-bit matrix products; those in float32 change in proportion.
        memory: GiB of device memory.
    """
    if upload is not None:
        rates = replace(rates, upload=upload * 1e9, offload=upload * 1e9, share=BOTH_WAYS)
    if download is not None:
        rates = replace(rates, offload=download * 1e9)
    if matmul is not None:
        scale = matmul * 1e12 / rates.multiply[torch.float16]
        scaled = {dtype: rate * scale for dtype, rate in rates.multiply.items()}
        rates = replace(rates, multiply=scaled)
    if memory is not None:
        rates = replace(rates, memory=round(memory * 2**30))
    return rates


def _plain(name: str) -> str:
    return "".join(character for character in name.lower() if character.isalnum())
