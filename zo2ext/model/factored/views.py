"""Views, parts and conversions of a factored weight, most of them factored themselves."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import EllipsisType, NoneType
from typing import Any

import torch
from torch import Tensor

from zo2ext.errors import UnsupportedModel
from zo2ext.model.factored.tensor import Factored, add, attributes, base_of, handles, is_a


@handles(torch.index_select, Tensor.index_select)
def _index_select(func: Any, w: Any, dim: int, index: Any) -> Any:
    if not is_a(w):
        return NotImplemented
    if dim % w.base.dim() == w.base.dim() - 2:
        y = func(w.base, dim, index)
        for u, v in w.terms:
            y = add(y, func(u, dim, index), v)
        return y
    return _along(w, dim, lambda tensor, at: func(tensor, at, index))


@handles(Tensor.__getitem__)
def _getitem(func: Any, w: Any, index: Any) -> Any:
    items = list(index) if isinstance(index, tuple) else [index]
    if not is_a(w) or not all(map(_is_index, items)):
        return NotImplemented
    dims, stack = w.base.dim(), w.base.dim() - 2
    whole = slice(None)
    ellipsis = next((i for i, item in enumerate(items) if item is Ellipsis), None)
    if ellipsis is not None:
        given = sum(item is not None for item in items) - 1
        items[ellipsis : ellipsis + 1] = [whole] * (dims - given)
    places = [i for i, item in enumerate(items) if item is not None]
    at = places[stack] if len(places) > stack else len(items)  # where the index of rows is
    lead = items[:at]
    rows, columns = (*items[at:], whole, whole)[:2]
    if len(items) - at > 2 or rows is None or not isinstance(columns, slice):
        return NotImplemented
    base = func(w.base, tuple(items))
    if isinstance(rows, slice):
        return Factored(
            base,
            [(u[(*lead, ..., rows, whole)], v[(*lead, ..., columns, whole)]) for u, v in w.terms],
        )
    if stack:
        return NotImplemented
    y = base.clone()  # some are views
    for u, v in w.terms:
        y = add(y, u[rows], v[columns])
    return y


def _is_index(item: Any) -> bool:
    """Return whether `item` indexes one dimension, or is None or an ellipsis."""
    if isinstance(item, Tensor):
        return item.dtype in (torch.int64, torch.int32) and not is_a(item)
    return isinstance(item, (int, slice, EllipsisType, NoneType)) and not isinstance(item, bool)


@handles(Tensor.detach, torch.detach, *attributes("data"))
@handles(Tensor.requires_grad_, Tensor.requires_grad.__set__)  # type: ignore[attr-defined]
def _same(func: Any, w: Any, requires_grad: Any = None) -> Any:
    return w


_FLOATS = {torch.float16, torch.bfloat16, torch.float32, torch.float64}


@handles(*(getattr(Tensor, name) for name in "to type type_as cpu cuda contiguous".split()))
@handles(*(getattr(Tensor, name) for name in "float half double bfloat16 clone".split()))
@handles(torch.clone)
def _convert(func: Any, w: Any, *args: Any, **named: Any) -> Any:
    now = func(base_of(w), *map(base_of, args), **{name: base_of(x) for name, x in named.items()})
    if not is_a(w) or not isinstance(now, Tensor):
        return now
    if now is w.base:
        return w
    if now.dtype not in _FLOATS:
        return NotImplemented  # a sum of rounded terms is not the rounded sum
    return Factored(now, [(u.to(now, copy=True), v.to(now, copy=True)) for u, v in w.terms])


@handles(*attributes("mT"))
def _turned(func: Any, w: Any) -> Any:
    return Factored(w.base.mT, [(v, u) for u, v in w.terms])


@handles(Tensor.t, torch.t, *attributes("T"))
def _turned_matrix(func: Any, w: Any) -> Any:
    return _turned(func, w) if w.base.dim() == 2 else NotImplemented


@handles(Tensor.transpose, torch.transpose, Tensor.swapaxes, torch.swapaxes)
def _transpose(func: Any, w: Any, dim0: int, dim1: int) -> Any:
    order = list(range(w.base.dim()))
    order[dim0], order[dim1] = order[dim1], order[dim0]
    return _permute(func, w, order)


@handles(Tensor.permute, torch.permute)
def _permute(func: Any, w: Any, *dims: Any) -> Any:
    order = dims[0] if isinstance(dims[0], Sequence) else dims
    *lead, row, column = [d % w.base.dim() for d in order]
    last = w.base.dim() - 1
    if {row, column} != {last - 1, last}:
        return NotImplemented
    in_order = w.base.permute(*lead, -2, -1)
    now = Factored(
        in_order, [(u.permute(*lead, -2, -1), v.permute(*lead, -2, -1)) for u, v in w.terms]
    )
    return now if column == last else _turned(func, now)


def _along(w: Factored, dim: int, cut: Callable[[Tensor, int], Any]) -> Any:
    """Return what `cut` makes of `w`: one part or several, along the dimension `dim`."""
    last = w.base.dim() - 1
    dim %= last + 1
    base = cut(w.base, dim)
    factors = [
        (u if dim == last else cut(u, dim), v if dim == last - 1 else cut(v, min(dim, last - 1)))
        for u, v in w.terms
    ]
    if isinstance(base, Tensor):
        return Factored(base, factors)

    def at(x: Any, i: int) -> Tensor:
        return x if isinstance(x, Tensor) else x[i]

    return tuple(
        Factored(piece, [(at(u, i), at(v, i)) for u, v in factors]) for i, piece in enumerate(base)
    )


@handles(torch.split, Tensor.split, torch.chunk, Tensor.chunk)
def _pieces(func: Any, w: Any, size: Any, dim: int = 0) -> Any:
    return _along(w, dim, lambda tensor, at: func(tensor, size, at))


@handles(torch.narrow, Tensor.narrow)
def _narrow(func: Any, w: Any, dim: int, start: Any, length: int) -> Any:
    return _along(w, dim, lambda tensor, at: func(tensor, at, start, length))


@handles(torch.unbind, Tensor.unbind)
def _unbind(func: Any, w: Any, dim: int = 0) -> Any:
    if dim % w.base.dim() >= w.base.dim() - 2:
        return NotImplemented
    return _along(w, dim, func)


@handles(torch.select, Tensor.select)
def _select(func: Any, w: Any, dim: int, index: Any) -> Any:
    if dim % w.base.dim() >= w.base.dim() - 2:
        return NotImplemented
    return _along(w, dim, lambda tensor, at: func(tensor, at, index))


@handles(Tensor.view, Tensor.reshape, torch.reshape)
def _view(func: Any, w: Any, *shape: Any) -> Any:
    """Groups of rows of a matrix, or the shape that there is."""
    sizes = shape[0] if isinstance(shape[0], Sequence) else shape
    if not all(isinstance(size, int) for size in sizes):  # a dtype
        return NotImplemented
    base = func(w.base, sizes)
    if base.shape == w.base.shape:
        return w
    if w.base.dim() != 2 or base.dim() < 3 or base.shape[-1] != w.base.shape[-1]:
        return NotImplemented
    lead = base.shape[:-2]
    return Factored(
        base, [(u.unflatten(0, base.shape[:-1]), v.expand(*lead, *v.shape)) for u, v in w.terms]
    )


@handles(Tensor.data_ptr)
def _data_ptr(func: Any, w: Any) -> Any:
    """Give a kernel that reads memory by its address the dense sum, which lives as long as `w`."""
    if not w.base.is_contiguous():
        raise UnsupportedModel(
            f"a kernel reads the memory of a part of a weight, of shape {tuple(w.base.shape)}, "
            "which directions of low rank do not allow; set rank=None"
        )
    w.memory = w.made_for("data_ptr")
    return func(w.memory)
