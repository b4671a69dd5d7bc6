"""Perturb and update weights, or do both in one pass over a slab."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from zo2ext._choices import Distribution, Domain, Rounding
from zo2ext.ops._extension import _C
from zo2ext.ops.launch import (
    DISTRIBUTION_CODES,
    DOMAIN_CODES,
    FLOAT32_MAX,
    ROUNDING_CODES,
    check_finite,
    check_float32,
    check_integer,
    check_offset,
    code_of,
    launch,
)
from zo2ext.ops.packing import scale_bytes
from zo2ext.ops.tables import Direction, check_fits, checked_table


def perturb_(
    weights: Tensor,
    *,
    key: int,
    tensor_id: int,
    eps: float,
    offset: int = 0,
    distribution: Distribution = Distribution.GAUSSIAN,
) -> Tensor:
    """Add ``eps * z`` to `weights` in place, with z regenerated from its key.

    A second call with ``-eps`` undoes it, up to rounding in the dtype of the weights. The rounding
    errors accumulate; `update_perturb` avoids that by writing perturbed copies.

    Args:
        weights: Any shape, contiguous; float32, bfloat16 or float16; CPU or CUDA.
        key: Key of the direction, ``0 <= key < 2**64``.
        tensor_id: Id of the tensor, ``0 <= tensor_id < 2**32``.
        eps: Perturbation scale, in the units of the weights, of either sign; typically 1e-3.
        offset: Index of ``weights[0]`` within the tensor, in elements; a multiple of 4.
        distribution: Distribution of z.

    Returns:
        `weights`. On CUDA the work is queued on the current stream, not waited for.

    Raises:
        TypeError: There is no kernel for this dtype.
        ValueError: `weights` is not contiguous, or an argument is out of range.
        RuntimeError: `weights` is on a GPU and this build has no CUDA kernels.

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
    """Update `weights` in place by one direction, with z regenerated from its key.

    Computes ``w <- w * (1 - lr * weight_decay) - lr * projected_grad * z``.

    Args:
        weights: Any shape, contiguous; float32, bfloat16 or float16; CPU or CUDA.
        key: Key of the direction of `projected_grad`, ``0 <= key < 2**64``.
        tensor_id: Id of the tensor, ``0 <= tensor_id < 2**32``.
        lr: Learning rate, divided by the number of directions.
        projected_grad: ``(loss_plus - loss_minus) / (2 * eps)``.
        weight_decay: Weight decay of this call. docs/contracts.md decays tensors of two or more
            dimensions only, and once per step, with the first direction.
        offset: Index of ``weights[0]`` within the tensor, in elements; a multiple of 4.
        distribution: Distribution of z.
        rounding: Rounding to the dtype of the weights.
        rounding_key: Key of stochastic rounding, ``0 <= rounding_key < 2**64``.

    Returns:
        `weights`. On CUDA the work is queued on the current stream, not waited for.

    Raises:
        TypeError: There is no kernel for this dtype.
        ValueError: `weights` is not contiguous, or an argument is out of range or not finite.
        RuntimeError: `weights` is on a GPU and this build has no CUDA kernels.

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
    domain: Domain = Domain.DIRECTION,
) -> None:
    """Apply pending updates to a slab, write it back, and write perturbed copies, in one pass.

    For each element of each segment: unpack it to float32; apply `updates` in order, each after a
    rounding to storage (without storing) if its `round_first` is set; with `write_back`, round to
    the storage dtype, store, and continue from the rounded value; then write the weight to `plain`,
    and ``w + eps * z`` and ``w - eps * z`` to the outputs of each direction, rounded to nearest in
    the compute dtype. Elements outside the segments are neither read nor written.

    Up to eight directions share one pass. More need further passes, which start from the weights
    that the first one wrote, or replay the updates.

    Args:
        stored: Slab, shape ``(numel,)``, contiguous, in the storage dtype: float32, bfloat16,
            float16 or float8_e4m3fn. Written only with `write_back`.
        segments: Table from `segment_table`, on the slab's device. In float8 every
            `Segment.offset` is a multiple of 32.
        scales: Scales of a float8 slab, one per 32 elements: shape ``(ceil(numel / 32),)``,
            contiguous, float8_e8m0fnu. Written with `stored`.
        low: Low plane of a slab in the split format, whose top plane is `stored`: shape
            ``(numel,)``, contiguous, uint8. Written with `stored`. If it is left out, the top plane
            is read, and written back, as weights in e4m3, and the low plane becomes invalid.
        updates: Table from `update_table`, on the slab's device.
        plain: Output for the updated, unperturbed weights: shape ``(numel,)``, compute dtype.
        directions: Directions to perturb along; all outputs have one compute dtype. One output may
            be `stored` itself, if nothing is written back and there are at most 8 directions.
        write_back: Rounding to storage; None leaves `stored` unchanged.
        rounding_key: Key of stochastic rounding, ``0 <= rounding_key < 2**64``.
        distribution: Distribution of z.
        domain: Domain of the random words of z, in the updates and in the directions alike.

    On CUDA the work is queued on the current stream and not waited for. All tensors, tables
    included, must live until the stream is past; torch's allocator ensures that for tensors that
    were allocated on it.

    Raises:
        TypeError: There is no kernel for a dtype, or outputs have different dtypes.
        ValueError: Shapes, devices or tables do not match, memory overlaps, a key is out of range,
            or an eps is not positive and finite.
        RuntimeError: `stored` is on a GPU and this build has no CUDA kernels.

    Source:
        The delayed update of ZO2, arXiv:2503.12668, with MeZO's two perturbations in the same pass.

    Example:
        >>> table = segment_table([Segment(begin=0, numel=1024, tensor_id=0)])
        >>> slab, plus, minus = torch.randn(1024), torch.empty(1024), torch.empty(1024)
        >>> update_perturb(slab, segments=table, directions=[Direction(7, 1e-3, plus, minus)])
    """
    for i, direction in enumerate(directions):
        check_integer(f"directions[{i}].key", direction.key, 64)
        if not 0 < direction.eps <= FLOAT32_MAX:
            raise ValueError(
                f"directions[{i}].eps must be positive and finite, got {direction.eps}"
            )
    if segments.is_cuda:
        check_fits(*checked_table(segments), stored, scales)
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
            code_of("domain", domain, DOMAIN_CODES),
        ),
    )
