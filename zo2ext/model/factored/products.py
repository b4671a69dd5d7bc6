"""Products with a factored weight, and gathers of its rows: never the dense sum."""

from __future__ import annotations

import string
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from zo2ext.model.factored.tensor import add, base_of, handles, is_a


@handles(F.linear)
def _linear(func: Any, input: Any, weight: Any, bias: Any = None) -> Any:
    if not is_a(weight) or is_a(input) or is_a(bias):
        return NotImplemented
    y = func(input, weight.base, bias)
    for u, v in weight.terms:
        y = add(y, input @ v, u)
    return y


@handles(torch.matmul, torch.mm, torch.bmm, torch.mv)
@handles(Tensor.matmul, Tensor.mm, Tensor.bmm, Tensor.mv)
def _matmul(func: Any, input: Any, other: Any) -> Any:
    if not _is_product(input, other):
        return NotImplemented
    return _add_terms(func(base_of(input), base_of(other)), input, other)


@handles(Tensor.__rmatmul__)
def _rmatmul(func: Any, other: Any, input: Any) -> Any:
    return _matmul(torch.matmul, input, other)


@handles(torch.addmm, torch.baddbmm, Tensor.addmm, Tensor.baddbmm)
def _addmm(
    func: Any, input: Any, mat1: Any, mat2: Any, *, beta: float = 1, alpha: float = 1
) -> Any:
    if is_a(input) or not _is_product(mat1, mat2):
        return NotImplemented
    y = func(input, base_of(mat1), base_of(mat2), beta=beta, alpha=alpha)
    return _add_terms(y, mat1, mat2, alpha)


def _is_product(a: Any, b: Any) -> bool:
    """Return whether one of both is factored, and `_add_terms` knows its product with the other."""
    dims = sorted((base_of(a).dim(), base_of(b).dim()))
    return is_a(a) != is_a(b) and (dims[0] > 1 or dims[1] == 2)


def _add_terms(y: Tensor, a: Any, b: Any, alpha: float = 1) -> Tensor:
    """Add what is missing in `y`, the product of `a` and `b` with the base of one of them."""
    if is_a(b):
        for u, v in b.terms:
            y = add(y, a @ u, v, alpha)
    else:
        for u, v in a.terms:
            s = v.mT @ b
            y = add(y, s, u, alpha) if s.dim() == 1 else add(y, u, s.mT, alpha)
    return y


@handles(torch.einsum)
def _einsum(func: Any, equation: Any, *operands: Any) -> Any:
    places = [i for i, operand in enumerate(operands) if is_a(operand)]
    if not isinstance(equation, str) or "->" not in equation or len(places) != 1:
        return NotImplemented
    inputs, output = equation.replace(" ", "").split("->")
    others, tensors = inputs.split(","), list(operands)
    letters, w = others.pop(places[0]), tensors.pop(places[0])
    if "." in letters or len(set(letters)) < len(letters):
        return NotImplemented
    r = next(letter for letter in string.ascii_letters if letter not in equation)
    y = func(equation, *map(base_of, operands))
    for u, v in w.terms:
        factors = [(letters[:-1] + r, u), (letters[:-2] + letters[-1] + r, v)]
        # Operands are multiplied from left to right: first the factor whose rows are summed over.
        factors.sort(key=lambda factor: factor[0][-2] in output)
        both = ",".join([*others, *(indices for indices, _ in factors)])
        y = y + func(f"{both}->{output}", *tensors, *(factor for _, factor in factors))
    return y


@handles(torch._grouped_mm, "transformers.grouped_mm_fallback")
def _grouped_mm(
    func: Any, input: Any, weight: Any, offs: Any = None, bias: Any = None, out_dtype: Any = None
) -> Any:
    if not is_a(weight) or is_a(input) or bias is not None or input.dim() != 2 or weight.dim() != 3:
        return NotImplemented
    options = {} if out_dtype is None else {"out_dtype": out_dtype}
    y = func(input, weight.base, offs=offs, **options)
    for u, v in weight.terms:
        u, v = _aligned(u), _aligned(v)
        y = y + func(func(input, u, offs=offs), v.mT, offs=offs, **options)
    return y


def _aligned(factor: Tensor) -> Tensor:
    """Return a copy whose rows are multiples of 16 bytes long, as kernels of groups ask for."""
    more = -factor.shape[-1] % max(1, 16 // factor.element_size())
    return torch.cat([factor, factor.new_zeros(*factor.shape[:-1], more)], -1)


@handles(F.embedding)
def _embedding(func: Any, input: Any, weight: Any, max_norm: Any = None, **options: Any) -> Any:
    if not is_a(weight) or max_norm is not None:
        return NotImplemented
    y = func(input, weight.base)
    for u, v in weight.terms:
        y = add(y, func(input, u), v)
    return y
