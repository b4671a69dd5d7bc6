"""The fused pass: apply pending updates, perturb, and write weights back."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from zo2ext.ops._extension import _C
from zo2ext.ops.launch import (
    DISTRIBUTION_CODES,
    FLOAT32_MAX,
    ROUNDING_CODES,
    Distribution,
    Rounding,
    check_finite,
    check_float32,
    check_integer,
    check_offset,
    code_of,
    launch,
)
from zo2ext.ops.packing import GROUP, scale_bytes
from zo2ext.ops.tables import Direction, checked_table


def perturb_(
    weights: Tensor,
    *,
    key: int,
    tensor_id: int,
    eps: float,
    offset: int = 0,
    distribution: Distribution = Distribution.GAUSSIAN,
) -> Tensor:
    """Add ``eps * z`` to `weights` in place, z regenerated.

    Calling again with ``-eps`` undoes it, up to rounding in the dtype of the weights. That rounding
    adds up: `update_perturb` writes perturbed copies instead, and nothing drifts.

    Args:
        weights: Any shape, contiguous; float32, bfloat16 or float16; CPU or CUDA.
        key: Of the direction, ``0 <= key < 2**64``.
        tensor_id: Of the tensor, ``0 <= tensor_id < 2**32``.
        eps: Perturbation scale, in the weights' own units, of either sign; typically 1e-3.
        offset: Index of ``weights[0]`` within the tensor, in elements; a multiple of 4.
        distribution: Of z.

    Returns:
        `weights`. On CUDA the work is queued on the current stream, not waited for.

    Raises:
        TypeError: No kernel for this dtype.
        ValueError: `weights` is not contiguous, or an argument is out of range.
        RuntimeError: `weights` is on a GPU and this build has no CUDA.

    Source:
        Malladi et al. 2023, arXiv:2305.17333, Algorithm 1; Philox4x32-10, Salmon et al., SC'11.
    """
    key, tensor_id = check_integer("key", key, 64), check_integer("tensor_id", tensor_id, 32)
    launch(
        _C.perturb,
        weights,
        (
            weights,
            check_offset(offset),
            key,
            tensor_id,
            check_float32("eps", eps),
            code_of("distribution", distribution, DISTRIBUTION_CODES),
        ),
    )
    return weights


def update_(
    weights: Tensor,
    *,
    key: int,
    tensor_id: int,
    lr: float,
    projected_grad: float,
    weight_decay: float = 0.0,
    offset: int = 0,
    distribution: Distribution = Distribution.GAUSSIAN,
    rounding: Rounding = Rounding.NEAREST,
    rounding_key: int = 0,
) -> Tensor:
    """``w <- w * (1 - lr * weight_decay) - lr * projected_grad * z`` in place, z regenerated.

    Args:
        weights: Any shape, contiguous; float32, bfloat16 or float16; CPU or CUDA.
        key: Of the direction that `projected_grad` was measured along, ``0 <= key < 2**64``.
        tensor_id: Of the tensor, ``0 <= tensor_id < 2**32``.
        lr: Learning rate; for n directions, divided by n.
        projected_grad: ``(loss_plus - loss_minus) / (2 * eps)``.
        weight_decay: Applied to these weights as it is given. By docs/contracts.md a step decays
            tensors of two or more dimensions only, and once, with its first direction.
        offset: Index of ``weights[0]`` within the tensor, in elements; a multiple of 4.
        distribution: Of z.
        rounding: To the dtype of the weights.
        rounding_key: Of stochastic rounding, ``0 <= rounding_key < 2**64``.

    Returns:
        `weights`. On CUDA the work is queued on the current stream, not waited for.

    Raises:
        TypeError: No kernel for this dtype.
        ValueError: `weights` is not contiguous, or an argument is out of range or not finite.
        RuntimeError: `weights` is on a GPU and this build has no CUDA.

    Source:
        Malladi et al. 2023, arXiv:2305.17333, Algorithm 1.
    """
    check_finite("lr", lr)
    check_finite("projected_grad", projected_grad)
    check_finite("weight_decay", weight_decay)
    key, tensor_id = check_integer("key", key, 64), check_integer("tensor_id", tensor_id, 32)
    launch(
        _C.update,
        weights,
        (
            weights,
            check_offset(offset),
            key,
            tensor_id,
            check_float32("lr * projected_grad", lr * projected_grad),
            check_float32("1 - lr * weight_decay", 1 - lr * weight_decay),
            code_of("distribution", distribution, DISTRIBUTION_CODES),
            code_of("rounding", rounding, ROUNDING_CODES),
            check_integer("rounding_key", rounding_key, 64),
        ),
    )
    return weights


def update_perturb(
    stored: Tensor,
    *,
    segments: Tensor,
    scales: Tensor | None = None,
    low: Tensor | None = None,
    updates: Tensor | None = None,
    plain: Tensor | None = None,
    directions: Sequence[Direction] = (),
    write_back: Rounding | None = None,
    rounding_key: int = 0,
    distribution: Distribution = Distribution.GAUSSIAN,
) -> None:
    """One pass over a slab: apply pending updates, write weights back, write perturbed copies.

    For each element of each segment: unpack to float32; apply `updates` in order, rounding to
    storage before those that say so, without storing; if `write_back`,
    round to the storage dtype, store, and go on from the rounded value; then write the weights to
    `plain`, and ``w + eps * z`` and ``w - eps * z`` to each direction's slabs, rounded to nearest
    into the compute dtype. Elements outside the segments are neither read nor written.

    Eight directions share one pass. More take further passes, which start from the weights that
    the first one wrote, or replay the updates.

    Args:
        stored: The slab, shape ``(numel,)``, contiguous, in the storage dtype: float32, bfloat16,
            float16 or float8_e4m3fn. Written only with `write_back`.
        segments: From `segment_table`, on the slab's device. In float8 every `Segment.offset` is
            a multiple of 32.
        scales: Of float8, one for each 32 elements of the slab: shape ``(ceil(numel / 32),)``,
            contiguous, float8_e8m0fnu. Written with `stored`.
        low: The low plane of the split format, whose top plane `stored` is in float8_e4m3fn: shape
            ``(numel,)``, contiguous, uint8. Written with `stored`. Without it, a top plane and its
            scales are weights in e4m3, and so would be what is written back: the low plane would
            then belong to nothing.
        updates: From `update_table`, on the slab's device.
        plain: Receives the updated, unperturbed weights: shape ``(numel,)``, compute dtype.
        directions: What to perturb along; all outputs have one compute dtype. One output may be
            `stored` itself, if nothing is written back and there are at most 8 directions.
        write_back: How to round to storage; None leaves `stored` as it is.
        rounding_key: Of stochastic rounding, ``0 <= rounding_key < 2**64``.
        distribution: Of every z.

    On CUDA the work is queued on the current stream and not waited for; the tensors, tables
    included, must live until the stream is past, as torch's allocator sees to for tensors that
    were allocated on it.

    Raises:
        TypeError: No kernel for a dtype, or outputs of different dtypes.
        ValueError: Shapes, devices or tables do not fit, memory overlaps, a key is out of range,
            or an eps is not positive and finite.
        RuntimeError: `stored` is on a GPU and this build has no CUDA.

    Source:
        The delayed update of ZO2, arXiv:2503.12668, with MeZO's two perturbations in the same pass.
    """
    for i, direction in enumerate(directions):
        check_integer(f"directions[{i}].key", direction.key, 64)
        if not 0 < direction.eps <= FLOAT32_MAX:
            raise ValueError(
                f"directions[{i}].eps must be positive and finite, got {direction.eps}"
            )
    if segments.is_cuda:
        checked = checked_table(segments)
        if checked.end > stored.numel():
            raise ValueError(
                f"segments end at {checked.end}, beyond stored, which has {stored.numel()} elements"
            )
        if scales is not None and not checked.grouped:
            raise ValueError(f"with scales, offsets of segments must be multiples of {GROUP}")
    launch(
        _C.update_perturb,
        stored,
        (
            stored,
            scale_bytes(scales),
            low,
            segments,
            updates,
            plain,
            directions,
            None if write_back is None else code_of("write_back", write_back, ROUNDING_CODES),
            check_integer("rounding_key", rounding_key, 64),
            code_of("distribution", distribution, DISTRIBUTION_CODES),
        ),
    )
