"""Every setting of a run, with its unit, its default, and the reason for the default."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, replace
from enum import Enum, StrEnum
from typing import Any

import torch

from zo2ext.ops import Distribution, Rounding
from zo2ext.ops.formats import TRAINABLE_DTYPES, Storage

_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*(KiB|MiB|GiB|TiB|KB|MB|GB|TB|B)")
_UNITS = {
    "B": 1,
    **{f"{p}iB": 1024 ** (i + 1) for i, p in enumerate("KMGT")},
    **{f"{p}B": 1000 ** (i + 1) for i, p in enumerate("KMGT")},
}


_DEFINING = (
    *("eps", "directions", "seed", "distribution"),
    *("storage", "compute_dtype", "rounding", "write_back"),
)


class Granularity(StrEnum):
    """What travels together: a decoder block, or every module that owns parameters."""

    BLOCK = "block"
    MODULE = "module"


class Store(StrEnum):
    """Where weights rest: in host memory, in files, or in memory that the ranks of a host share."""

    HOST = "host"
    DISK = "disk"
    SHARED = "shared"


def parse_size(text: str) -> int:
    """Bytes in a size such as ``"8GiB"``, ``"500 MB"`` or ``"1.5GiB"``.

    Raises:
        ValueError: `text` is not a number followed by a unit.
    """
    match = _SIZE.fullmatch(text.strip())
    if match is None:
        raise ValueError(f"a size is a number and a unit, such as '8GiB', got {text!r}")
    return int(float(match[1]) * _UNITS[match[2]])


@dataclass(frozen=True, kw_only=True)
class ZOConfig:
    """Settings of one zeroth-order run. Immutable; `replace` makes a changed copy.

    The first group defines the run: with the same values the same bits come out on any machine.
    The second group says where and how it is computed, and never changes a result.

    Attributes:
        eps: Perturbation scale, in the weights' own units. 1e-3, as in MeZO: large enough that
            the two losses differ in float32, small enough for the difference to be a slope.
        lr: Learning rate of `step` when it is given none; absolute, not relative. 1e-6, MeZO's
            choice for full fine-tuning of billions of weights. Small models take more: 1e-4.
        weight_decay: Fraction of a weight removed per unit of learning rate, decoupled. Applies
            to tensors of two or more dimensions. 0, as in MeZO.
        directions: Directions a step averages over; each costs two forward passes, all share
            one load of every unit. 1: more steps beat more directions at equal cost.
        seed: Seed of all directions, ``0 <= seed < 2**64``.
        distribution: Of the directions: Gaussian (MeZO), or Rademacher (+1/-1; cheaper).
        storage: Format of the weights at rest, on the host and on the wire: fp32, bf16, fp16, e4m3
            or split, or a torch dtype. None keeps each tensor's own. docs/precision.md says what
            each costs a run.
        compute_dtype: Dtype of the weights in the forward pass. None keeps each tensor's own.
        rounding: How weights are rounded to `storage` when they are written back. Stochastic:
            at small learning rates most updates are less than half an ulp of a bfloat16 weight,
            and rounding to nearest loses them all. No effect in float32.
        write_back: Period of write-backs, in steps. 1 writes every step; K > 1 replays up to K
            pending updates at each load instead, and saves downloads. "never" leaves the weights
            at rest as they are and replays everything since, until `ZOEngine.flush`. "auto"
            measures what replays and transfers cost here, and decides.
        journal_sync: Steps between waits for the disk, where a journal is kept. With 1 no finished
            step is lost even if the machine loses power; a process may be killed at any moment in
            any case.
        device: Where the forward runs: "cuda", "cuda:1", "cpu", or "simulated" (real work on the
            CPU, in random orders that the pipeline's dependencies allow: for tests). None takes
            CUDA where there is one.
        granularity: "block": a decoder block travels as one. "module": every module that owns
            parameters travels alone, which cuts device memory to a few matrices.
        one_copy: Perturb a unit's weights for one forward pass after the other, each over the one
            before, instead of for all at once. A half of the memory for weight copies or less; the
            noise is made once for each pass.
        slots: Device buffers that units pass through, at least 2. 3: one computes, one uploads,
            one offloads.
        resident: Units that stay on the device: a count, "all", or a budget such as "8GiB". The
            rest streams. 0 uses the least memory.
        store: Where weights rest: "host" memory, "shared" memory of all ranks of a host, each of
            which moves its slice, or "disk", for models larger than that. Files
            that `load` was given are read where they are and never written; all else goes to a
            scratch file in the system's temporary folder (TMPDIR). See docs/storage.md.
        host_memory: With ``store="disk"``, what the store may take of host memory, such as
            "4GiB": enough for a unit or a few.
    """

    eps: float = 1e-3
    lr: float = 1e-6
    weight_decay: float = 0.0
    directions: int = 1
    seed: int = 0
    distribution: Distribution = Distribution.GAUSSIAN
    storage: Storage | torch.dtype | str | None = None
    compute_dtype: torch.dtype | None = None
    rounding: Rounding = Rounding.STOCHASTIC
    write_back: int | str = 1

    journal_sync: int = 1
    device: str | torch.device | None = None
    granularity: Granularity = Granularity.BLOCK
    one_copy: bool = False
    slots: int = 3
    resident: int | str = 0
    store: Store = Store.HOST
    host_memory: str = "4GiB"

    def __post_init__(self) -> None:
        for name, enum in (
            ("distribution", Distribution),
            ("rounding", Rounding),
            ("granularity", Granularity),
            ("store", Store),
        ):
            try:
                object.__setattr__(self, name, enum(getattr(self, name)))
            except ValueError:
                choices = ", ".join(repr(member.value) for member in enum)
                raise self._refusal(name, f"one of {choices}") from None
        self._check_number("eps", lambda v: v > 0, "a positive number")
        self._check_number("lr", lambda v: v >= 0, "a number >= 0")
        self._check_number("weight_decay", lambda v: v >= 0, "a number >= 0")
        self._check_integer("directions", 1, 2**16)
        self._check_integer("seed", 0, 2**64)
        if isinstance(self.write_back, str):
            if self.write_back not in ("never", "auto"):
                raise self._refusal("write_back", "an integer from 1, 'never' or 'auto'")
        else:
            self._check_integer("write_back", 1, 2**31)
        self._check_integer("slots", 2, 1024)
        self._check_integer("journal_sync", 1, 2**31)
        if not isinstance(self.one_copy, bool):
            raise self._refusal("one_copy", "True or False")
        if self.storage is not None:
            try:
                object.__setattr__(self, "storage", Storage.of(self.storage))
            except ValueError:
                formats = ", ".join(Storage)
                raise self._refusal("storage", f"one of {formats}, a torch dtype or None") from None
        if self.compute_dtype not in (None, *TRAINABLE_DTYPES):
            raise self._refusal(
                "compute_dtype", "torch.float32, torch.bfloat16, torch.float16 or None"
            )
        if self.device is not None and not isinstance(self.device, (str, torch.device)):
            raise self._refusal("device", "a device name such as 'cuda' or 'cpu', or None")
        if isinstance(self.resident, str) and self.resident != "all":
            try:
                parse_size(self.resident)
            except ValueError:
                raise self._refusal(
                    "resident", "a count, 'all', or a size such as '8GiB'"
                ) from None
        elif not isinstance(self.resident, str):
            self._check_integer("resident", 0, 2**31)
        try:
            parse_size(self.host_memory)
        except (AttributeError, ValueError):
            raise self._refusal("host_memory", "a size such as '4GiB'") from None

    def defining(self) -> dict[str, Any]:
        """The settings that decide a run's bits, besides the learning rates, as JSON values."""
        return {name: _plain(getattr(self, name)) for name in _DEFINING}

    @property
    def copies(self) -> int:
        """Perturbed copies of a unit that are on the device at once."""
        return 1 if self.one_copy else 2 * self.directions

    @property
    def write_back_period(self) -> int | None:
        """Steps between write-backs that fall due by themselves; None where none do."""
        if isinstance(self.write_back, int):
            return self.write_back
        if self.write_back == "never":
            return None
        raise ValueError("write_back is 'auto', which is not decided yet")

    def replace(self, **changes: Any) -> ZOConfig:
        """A copy with `changes`, checked like a new one."""
        return replace(self, **changes)

    def _refusal(self, name: str, expected: str) -> ValueError:
        return ValueError(f"{name} must be {expected}, got {getattr(self, name)!r}")

    def _check_number(self, name: str, holds: Any, expected: str) -> None:
        value = getattr(self, name)
        number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if not (number and math.isfinite(value) and holds(value)):
            raise self._refusal(name, f"{expected}, finite")

    def _check_integer(self, name: str, low: int, high: int) -> None:
        value = getattr(self, name)
        if not isinstance(value, int) or isinstance(value, bool) or not low <= value < high:
            raise self._refusal(name, f"an integer from {low} to {high - 1}")


def _plain(value: Any) -> Any:
    if isinstance(value, Enum):
        return value.value
    return str(value) if isinstance(value, torch.dtype) else value


WRITE_BACK = (
    "Steps between write-backs of the weights, which round them to storage: a count; never, which "
    "replays all updates at each load; or auto, which measures what replays and transfers cost."
)


def as_count(word: str) -> int | str:
    """A number where `word` is one, otherwise the word."""
    return int(word) if word.isdecimal() else word
