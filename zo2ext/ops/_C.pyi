"""Kernels of zo2ext; zo2ext.ops checks and documents what they take."""

from collections.abc import Sequence
from enum import Enum

from torch import Tensor

cuda_codes: str

def clear_cuda_error() -> None: ...

class Distribution(Enum):
    GAUSSIAN = ...
    RADEMACHER = ...

class Domain(Enum):
    DIRECTION = ...
    LEFT = ...
    RIGHT = ...

class Rounding(Enum):
    NEAREST = ...
    STOCHASTIC = ...

class ThreadLocalState:
    """State of the calling thread in torch, as it is when the object is made."""

    def __init__(self) -> None: ...
    def restore(self) -> None: ...

def direction_key(seed: int, step: int, direction: int) -> int: ...
def noise(
    out: Tensor,
    offset: int,
    key: int,
    tensor_id: int,
    distribution: Distribution,
    domain: Domain,
    stream: int,
) -> None: ...
def pack(
    weights: Tensor,
    packed: Tensor,
    scales: Tensor | None,
    low: Tensor | None,
    offset: int,
    rounding: Rounding,
    key: int,
    tensor_id: int,
    stream: int,
) -> None: ...
def unpack(
    packed: Tensor, scales: Tensor | None, low: Tensor | None, weights: Tensor, stream: int
) -> None: ...
def perturb(
    weights: Tensor,
    offset: int,
    key: int,
    tensor_id: int,
    eps: float,
    distribution: Distribution,
    stream: int,
) -> None: ...
def update(
    weights: Tensor,
    offset: int,
    key: int,
    tensor_id: int,
    coefficient: float,
    decay: float,
    distribution: Distribution,
    rounding: Rounding,
    rounding_key: int,
    stream: int,
) -> None: ...
def update_perturb(
    stored: Tensor,
    scales: Tensor | None,
    low: Tensor | None,
    segments: Tensor,
    updates: Tensor | None,
    plain: Tensor | None,
    directions: Sequence[tuple[int, float, Tensor | None, Tensor | None]],
    write_back: Rounding | None,
    rounding_key: int,
    distribution: Distribution,
    domain: Domain,
    stream: int,
) -> None: ...
def fold(
    stored: Tensor,
    scales: Tensor | None,
    low: Tensor | None,
    segments: Tensor,
    left: Tensor,
    right: Tensor,
    rank: int,
    decay: float,
    plain: Tensor | None,
    write_back: Rounding | None,
    rounding_key: int,
    stream: int,
) -> None: ...
def philox4x32_10(counter: Sequence[int], key: int) -> list[int]: ...
def squared_radius(words: Tensor) -> Tensor: ...
def scaled_cosine_sine(words: Tensor) -> tuple[Tensor, Tensor]: ...
def simd_variants() -> list[str]: ...
def simd() -> str: ...
def set_simd(name: str) -> None: ...
