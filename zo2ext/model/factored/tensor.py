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
from collections import Counter
from collections.abc import Callable, Sequence
from types import MethodWrapperType
from typing import Any, ClassVar

import torch
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

    Its shape, dtype, device and other metadata are those of `base`. It passes for a parameter
    (`isinstance`). No result of an operation shares memory with the factors or with `base`, except
    for views, which are `Factored` themselves.

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
        # Without memory of its own, so that nothing can mistake the base for the sum.
        self: Factored = Tensor._make_wrapper_subclass(
            cls, base.shape, strides=base.stride(), dtype=base.dtype, device=base.device
        )
        self.base, self.terms = base, terms
        return self

    @classmethod
    def described(cls) -> list[str]:
        """Return the shapes in `made`, each with the operations that needed a dense tensor."""
        shapes = dict.fromkeys(shape for shape, _ in cls.made)
        return [
            f"{tuple(shape)} in {', '.join(sorted(name for s, name in cls.made if s == shape))}"
            for shape in shapes
        ]

    def dense(self) -> Tensor:
        """Return the sum as a new contiguous tensor."""
        dense = self.base.clone(memory_format=torch.contiguous_format)
        for u, v in self.terms:
            dense = add(dense, u, v)
        return dense

    def made_for(self, operation: str) -> Tensor:
        """Return the sum for an operation that needs it, and count that."""
        Factored.made[self.base.shape, operation] += 1
        return self.dense()

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        found = _HANDLERS.get(func)
        if found is None:
            if func in _METADATA:
                return func(*map(base_of, args), **kwargs)
            found = _HANDLERS.get(str(func))
        if found is not None:
            handler, keywords = found
            if not kwargs or keywords is None or kwargs.keys() <= keywords:
                result = handler(func, *args, **kwargs)
                if result is not NotImplemented:
                    return result
        return _densely(func, args, kwargs)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]  # torch does not declare a class method
        cls, func: Any, types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Handle what calls an operation past Python, such as a scripted function."""
        return _densely(func, args, kwargs or {})


def _densely(func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    """Call `func` with the dense sums, and count it.

    Raises:
        UnsupportedModel: It writes into a weight; the dense sum would not keep what it writes.
    """
    name = getattr(func, "__name__", str(func))
    method = name.partition(".")[0]
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

    args, kwargs = tree_map_only(Factored, lambda tensor: tensor.made_for(name), (args, kwargs))
    return func(*args, **kwargs)


def handles(*functions: Any) -> Callable[[_Handler], _Handler]:
    """Return a decorator that enters a handler of `functions` into the table."""

    def register(handler: _Handler) -> _Handler:
        parameters = inspect.signature(handler).parameters
        takes_all = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
        keywords = None if takes_all else frozenset(parameters) - {"func"}
        _HANDLERS.update(dict.fromkeys(functions, (handler, keywords)))
        return handler

    return register


def attributes(*names: str) -> list[Any]:
    """Return the functions that torch calls where attributes `names` of tensors are read."""
    return [getattr(Tensor, name).__get__ for name in " ".join(names).split()]


_METADATA = {
    *attributes(
        "shape dtype device layout requires_grad grad grad_fn is_leaf ndim itemsize nbytes",
        "is_cuda is_cpu is_meta is_mps is_xpu is_quantized is_sparse is_sparse_csr is_nested",
        "is_mkldnn _version output_nr _backward_hooks",
    ),
    *(Tensor.size, Tensor.dim, Tensor.ndimension, Tensor.numel, Tensor.nelement, Tensor.__len__),
    *(Tensor.stride, Tensor.storage_offset, Tensor.is_contiguous, Tensor.element_size),
    *(Tensor.untyped_storage, Tensor.get_device, Tensor.is_pinned),
    *(Tensor.is_floating_point, Tensor.is_complex, Tensor.is_inference, Tensor.is_signed),
    *(Tensor.is_conj, Tensor.is_neg, Tensor.is_shared, Tensor.dim_order, Tensor.__hash__),
    *(torch.is_floating_point, torch.is_complex, torch.is_inference, torch.numel),
    *(torch.is_conj, torch.is_neg, torch.result_type, torch.is_same_size),
    *(torch.zeros_like, torch.ones_like, torch.empty_like, torch.full_like),
    *(torch.rand_like, torch.randn_like, torch.randint_like),
    *(Tensor.new_zeros, Tensor.new_ones, Tensor.new_empty, Tensor.new_full, Tensor.new_tensor),
}


def is_a(x: Any) -> bool:
    """Return whether `x` is factored."""
    return type(x) is Factored


def base_of(x: Any) -> Any:
    """Return the base of a factored `x`, or `x` itself."""
    return x.base if type(x) is Factored else x


def add(y: Tensor, a: Tensor, b: Tensor, alpha: float = 1) -> Tensor:
    """Return ``y + alpha * a @ b.mT``, in place of `y` where possible. Nobody else may hold `y`.

    Autocast leaves products in place alone, and so has no say in their dtype, which is that of `y`.
    """
    if not a.dtype is b.dtype is y.dtype:
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
