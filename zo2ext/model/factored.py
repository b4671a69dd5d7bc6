"""A tensor that stands for a weight plus products of thin factors, where a model reads the weight.

A forward pass that is perturbed along directions of low rank reads ``W + u @ v.mT`` for a weight
``W``. That sum need not be computed: ``x @ (W + u @ v.mT).mT`` is ``x @ W.mT + (x @ v) @ u.mT``,
which costs hardly more than the product with ``W`` alone. `Factored` makes a model compute it so.
It intercepts what the model does with the weight: products, gathers of rows and views have a
handler in one table, and every other operation gets the dense sum, so that a model that does
something unforeseen is slower, but right.
"""

from __future__ import annotations

import inspect
import math
import string
from collections import Counter
from collections.abc import Callable, Sequence
from types import MethodWrapperType
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._pytree import tree_map_only

from zo2ext.errors import UnsupportedModel

Term = tuple[Tensor, Tensor]  # u [..., m, r] and v [..., n, r]
_Handler = Callable[..., Any]

# What a function does with a `Factored`, and the names of the keyword arguments that its handler
# knows (None: all). A handler gets the function and its arguments, and returns NotImplemented for a
# case that it does not know. A function of a library that may be missing has its name as its key.
_HANDLERS: dict[Any, tuple[_Handler, frozenset[str] | None]] = {}


def is_factored(shape: Sequence[int], rank: int, *, least: int = 4) -> bool:
    """Return whether a weight of `shape` is perturbed along factors rather than densely.

    Args:
        shape: Shape of the weight. Its last two dimensions are a matrix, earlier ones a stack.
        rank: Number of columns of each factor.
        least: Number of times that the two factors have to fit into the matrix.
    """
    return len(shape) > 1 and least * rank * sum(shape[-2:]) <= math.prod(shape[-2:])


class Factored(Tensor):
    """A tensor that stands for ``base + sum(u @ v.mT for u, v in terms)``.

    Its shape, dtype, device and other metadata are those of `base`, whose memory it shares. It
    passes for a parameter (`isinstance`). No result of an operation shares memory with the factors
    or with `base`, except for views, which are `Factored` themselves.

    Args:
        base: Weight, shape ``(..., m, n)``.
        terms: Pairs of ``u``, shape ``(..., m, r)``, and ``v``, shape ``(..., n, r)``, of the dtype
            and the leading dimensions of `base`. They are fastest as transposed views of memory
            of shapes ``(..., r, m)`` and ``(..., r, n)``.

    Attributes:
        made: Number of times that an operation got a dense tensor, by shape and name of operation,
            over all instances.
    """

    made: ClassVar[Counter[tuple[torch.Size, str]]] = Counter()

    base: Tensor
    terms: Sequence[Term]
    _is_param = True  # which isinstance(x, nn.Parameter) asks for

    @staticmethod
    def __new__(cls: type[Factored], base: Tensor, terms: Sequence[Term]) -> Factored:
        self = base.as_subclass(cls)
        self.base, self.terms = base, terms
        return self

    def dense(self) -> Tensor:
        """Return the sum as a new contiguous tensor."""
        dense = self.base.clone(memory_format=torch.contiguous_format)
        for u, v in self.terms:
            dense = _add(dense, u, v)
        return dense

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        found = _HANDLERS.get(func)
        if found is None:
            if func in _METADATA:
                with torch._C.DisableTorchFunctionSubclass():
                    return func(*args, **kwargs)
            found = _HANDLERS.get(str(func))
        if found is not None:
            handler, keywords = found
            if keywords is None or kwargs.keys() <= keywords:
                result = handler(func, *args, **kwargs)
                if result is not NotImplemented:
                    return result
        return _densely(func, args, kwargs)


def _densely(func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    """Call `func` with the dense sums, and count it.

    Raises:
        UnsupportedModel: It writes into a weight; the dense sum would not keep what it writes.
    """
    name = method = func.__name__
    if isinstance(func, MethodWrapperType):  # of an attribute
        name = f"{getattr(func.__self__, '__name__', '')}.{method}"
    written = [kwargs.get("out")]
    if method in ("__set__", "__setitem__") or (method[-1] == "_" and method[-2:] != "__"):
        written.append(args[0])
    for tensor in written:
        if type(tensor) is Factored:
            raise UnsupportedModel(
                f"the model changes a weight of shape {tuple(tensor.shape)} in a forward pass, by "
                f"{name}, which directions of low rank do not allow; set rank=None"
            )

    def dense(tensor: Factored) -> Tensor:
        Factored.made[tensor.base.shape, name] += 1
        return tensor.dense()

    args, kwargs = tree_map_only(Factored, dense, (args, kwargs))
    return func(*args, **kwargs)


def _handles(*functions: Any) -> Callable[[_Handler], _Handler]:
    def register(handler: _Handler) -> _Handler:
        parameters = inspect.signature(handler).parameters
        takes_all = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
        keywords = None if takes_all else frozenset(parameters) - {"func"}
        _HANDLERS.update(dict.fromkeys(functions, (handler, keywords)))
        return handler

    return register


def _of(*names: str) -> list[Any]:
    """Return the functions that torch calls where attributes `names` of tensors are read."""
    return [getattr(Tensor, name).__get__ for name in " ".join(names).split()]


_METADATA = {
    *_of(
        "shape dtype device layout requires_grad grad grad_fn is_leaf ndim itemsize nbytes",
        "is_cuda is_cpu is_meta is_mps is_xpu is_quantized is_sparse is_sparse_csr is_nested",
        "is_mkldnn _version output_nr _backward_hooks",
    ),
    *(Tensor.size, Tensor.dim, Tensor.ndimension, Tensor.numel, Tensor.nelement, Tensor.__len__),
    *(Tensor.stride, Tensor.storage_offset, Tensor.is_contiguous, Tensor.element_size),
    *(Tensor.data_ptr, Tensor.untyped_storage, Tensor.get_device, Tensor.is_pinned),
    *(Tensor.is_floating_point, Tensor.is_complex, Tensor.is_inference, Tensor.is_signed),
    *(Tensor.is_conj, Tensor.is_neg, Tensor.is_shared, Tensor.dim_order, Tensor.__hash__),
    *(torch.is_floating_point, torch.is_complex, torch.is_inference, torch.numel),
    *(torch.is_conj, torch.is_neg, torch.result_type, torch.is_same_size),
    *(torch.zeros_like, torch.ones_like, torch.empty_like, torch.full_like),
    *(torch.rand_like, torch.randn_like, torch.randint_like),
    *(Tensor.new_zeros, Tensor.new_ones, Tensor.new_empty, Tensor.new_full, Tensor.new_tensor),
}


def _is(x: Any) -> bool:
    return type(x) is Factored


def _base(x: Any) -> Any:
    return x.base if _is(x) else x


# products


def _add(y: Tensor, a: Tensor, b: Tensor, alpha: float = 1) -> Tensor:
    """Return ``y + alpha * a @ b.mT``, in place of `y` where possible. Nobody else may hold `y`.

    Autocast leaves products in place alone, and so has no say in their dtype, which is that of `y`.
    """
    a, b = a.to(y.dtype), b.to(y.dtype)
    if y.is_contiguous() and torch._C._functorch.maybe_current_level() is None:
        if b.dim() == 2:
            y.view(-1, y.shape[-1]).addmm_(a.reshape(-1, a.shape[-1]), b.mT, alpha=alpha)
            return y
        if y.shape[:-2] == a.shape[:-2] == b.shape[:-2]:
            a, b = a.flatten(0, -3), b.flatten(0, -3)
            y.flatten(0, -3).baddbmm_(a, b.mT, alpha=alpha)
            return y
    with torch.autocast(y.device.type, enabled=False):
        return torch.add(y, a @ b.mT, alpha=alpha)


@_handles(F.linear)
def _linear(func: Any, input: Any, weight: Any, bias: Any = None) -> Any:
    if not _is(weight) or _is(input) or _is(bias):
        return NotImplemented
    y = func(input, weight.base, bias)
    for u, v in weight.terms:
        y = _add(y, input @ v, u)
    return y


@_handles(torch.matmul, torch.mm, torch.bmm, torch.mv)
@_handles(Tensor.matmul, Tensor.mm, Tensor.bmm, Tensor.mv)
def _matmul(func: Any, input: Any, other: Any) -> Any:
    if not _is_product(input, other):
        return NotImplemented
    return _add_terms(func(_base(input), _base(other)), input, other)


@_handles(Tensor.__rmatmul__)
def _rmatmul(func: Any, other: Any, input: Any) -> Any:
    return _matmul(torch.matmul, input, other)


@_handles(torch.addmm, torch.baddbmm, Tensor.addmm, Tensor.baddbmm)
def _addmm(
    func: Any, input: Any, mat1: Any, mat2: Any, *, beta: float = 1, alpha: float = 1
) -> Any:
    if _is(input) or not _is_product(mat1, mat2):
        return NotImplemented
    y = func(input, _base(mat1), _base(mat2), beta=beta, alpha=alpha)
    return _add_terms(y, mat1, mat2, alpha)


def _is_product(a: Any, b: Any) -> bool:
    """Return whether one of both is factored, and `_add_terms` knows its product with the other."""
    dims = sorted((_base(a).dim(), _base(b).dim()))
    return _is(a) != _is(b) and (dims[0] > 1 or dims[1] == 2)


def _add_terms(y: Tensor, a: Any, b: Any, alpha: float = 1) -> Tensor:
    """Add what is missing in `y`, the product of `a` and `b` with the base of one of them."""
    if _is(b):
        for u, v in b.terms:
            y = _add(y, a @ u, v, alpha)
    else:
        for u, v in a.terms:
            s = v.mT @ b
            y = _add(y, s, u, alpha) if s.dim() == 1 else _add(y, u, s.mT, alpha)
    return y


@_handles(torch.einsum)
def _einsum(func: Any, equation: Any, *operands: Any) -> Any:
    places = [i for i, operand in enumerate(operands) if _is(operand)]
    if not isinstance(equation, str) or "->" not in equation or len(places) != 1:
        return NotImplemented
    inputs, output = equation.replace(" ", "").split("->")
    others, tensors = inputs.split(","), list(operands)
    letters, w = others.pop(places[0]), tensors.pop(places[0])
    if "." in letters or len(set(letters)) < len(letters):
        return NotImplemented
    r = next(letter for letter in string.ascii_letters if letter not in equation)
    y = func(equation, *map(_base, operands))
    for u, v in w.terms:
        factors = [(letters[:-1] + r, u), (letters[:-2] + letters[-1] + r, v)]
        # Operands are multiplied from left to right: first the factor whose rows are summed over.
        factors.sort(key=lambda factor: factor[0][-2] in output)
        both = ",".join([*others, *(indices for indices, _ in factors)])
        y = y + func(f"{both}->{output}", *tensors, *(factor for _, factor in factors))
    return y


@_handles(torch._grouped_mm, "transformers.grouped_mm_fallback")
def _grouped_mm(
    func: Any, input: Any, weight: Any, offs: Any = None, bias: Any = None, out_dtype: Any = None
) -> Any:
    if not _is(weight) or _is(input) or bias is not None or input.dim() != 2 or weight.dim() != 3:
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


# gathers of rows


@_handles(F.embedding)
def _embedding(func: Any, input: Any, weight: Any, max_norm: Any = None, **options: Any) -> Any:
    if not _is(weight) or max_norm is not None:
        return NotImplemented
    y = func(input, weight.base)
    for u, v in weight.terms:
        y = _add(y, func(input, u), v)
    return y


@_handles(torch.index_select, Tensor.index_select)
def _index_select(func: Any, w: Any, dim: int, index: Any) -> Any:
    if not _is(w):
        return NotImplemented
    if dim % w.base.dim() == w.base.dim() - 2:
        y = func(w.base, dim, index)
        for u, v in w.terms:
            y = _add(y, func(u, dim, index), v)
        return y
    return _along(w, dim, lambda tensor, at: func(tensor, at, index))


@_handles(Tensor.__getitem__)
def _getitem(func: Any, w: Any, index: Any) -> Any:
    items = index if isinstance(index, tuple) else (index,)
    if not _is(w):
        return NotImplemented
    stack = w.base.dim() - 2
    if Ellipsis in [item for item in items if not isinstance(item, Tensor)]:
        at = next(i for i, item in enumerate(items) if item is Ellipsis)
        items = (*items[:at], *[slice(None)] * (stack + 3 - len(items)), *items[at + 1 :])
    if not all(map(_is_index, items)) or len(items) > stack + 2:
        return NotImplemented
    lead, (rows, columns) = items[:stack], (*items[stack:], slice(None), slice(None))[:2]
    if not isinstance(columns, slice):
        return NotImplemented
    base = func(w.base, items)
    if isinstance(rows, slice):
        return Factored(
            base,
            [
                (u[(*lead, ..., rows, slice(None))], v[(*lead, ..., columns, slice(None))])
                for u, v in w.terms
            ],
        )
    if stack:
        return NotImplemented
    y = base.clone()  # some are views
    for u, v in w.terms:
        y = _add(y, u[rows], v[columns])
    return y


def _is_index(item: Any) -> bool:
    """Return whether `item` indexes one dimension."""
    if isinstance(item, Tensor):
        return item.dtype in (torch.int64, torch.int32) and not _is(item)
    return isinstance(item, (int, slice)) and not isinstance(item, bool)


# views


@_handles(Tensor.detach, torch.detach, *_of("data"))
@_handles(Tensor.requires_grad_, Tensor.requires_grad.__set__)  # type: ignore[attr-defined]
def _same(func: Any, w: Any, requires_grad: Any = None) -> Any:
    return w


_FLOATS = {torch.float16, torch.bfloat16, torch.float32, torch.float64}


@_handles(*(getattr(Tensor, name) for name in "to type type_as cpu cuda contiguous".split()))
@_handles(*(getattr(Tensor, name) for name in "float half double bfloat16 clone".split()))
@_handles(torch.clone)
def _convert(func: Any, w: Any, *args: Any, **named: Any) -> Any:
    now = func(_base(w), *map(_base, args), **{name: _base(x) for name, x in named.items()})
    if not _is(w) or not isinstance(now, Tensor):
        return now
    if now is w.base:
        return w
    if now.dtype not in _FLOATS:
        return NotImplemented  # a sum of rounded terms is not the rounded sum
    return Factored(now, [(u.to(now, copy=True), v.to(now, copy=True)) for u, v in w.terms])


@_handles(Tensor.permute, torch.permute)
def _permute(func: Any, w: Any, *dims: Any) -> Any:
    order = [d % w.base.dim() for d in (dims[0] if isinstance(dims[0], Sequence) else dims)]
    *lead, row, column = order
    last = w.base.dim() - 1
    if {row, column} != {last - 1, last}:
        return NotImplemented
    factors = [(u.permute(*lead, -2, -1), v.permute(*lead, -2, -1)) for u, v in w.terms]
    if row == last:
        factors = [(v, u) for u, v in factors]
    return Factored(w.base.permute(order), factors)


@_handles(Tensor.transpose, torch.transpose, Tensor.swapaxes, torch.swapaxes)
def _transpose(func: Any, w: Any, dim0: int, dim1: int) -> Any:
    order = list(range(w.base.dim()))
    order[dim0], order[dim1] = order[dim1], order[dim0]
    return _permute(Tensor.permute, w, order)


@_handles(Tensor.t, torch.t, *_of("T mT"))
def _turn(func: Any, w: Any) -> Any:
    return _transpose(func, w, -1, -2) if w.base.dim() == 2 or func in _of("mT") else NotImplemented


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


@_handles(torch.split, Tensor.split, torch.chunk, Tensor.chunk)
def _pieces(func: Any, w: Any, size: Any, dim: int = 0) -> Any:
    return _along(w, dim, lambda tensor, at: func(tensor, size, at))


@_handles(torch.narrow, Tensor.narrow)
def _narrow(func: Any, w: Any, dim: int, start: Any, length: int) -> Any:
    return _along(w, dim, lambda tensor, at: func(tensor, at, start, length))


@_handles(torch.unbind, Tensor.unbind)
def _unbind(func: Any, w: Any, dim: int = 0) -> Any:
    if dim % w.base.dim() >= w.base.dim() - 2:
        return NotImplemented
    return _along(w, dim, func)


@_handles(torch.select, Tensor.select)
def _select(func: Any, w: Any, dim: int, index: Any) -> Any:
    if dim % w.base.dim() >= w.base.dim() - 2:
        return NotImplemented
    return _along(w, dim, lambda tensor, at: func(tensor, at, index))


@_handles(Tensor.view, Tensor.reshape, torch.reshape)
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
