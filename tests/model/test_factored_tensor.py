"""Every operation that a tensor of factors handles, against the dense tensor in float64."""

from __future__ import annotations

import ctypes
import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers.integrations.moe  # noqa: F401  (registers an operation)
from torch import Tensor, nn

from zo2ext.errors import UnsupportedModel
from zo2ext.model.factored import Factored, is_factored, tensor

M, N, E, R = 8, 6, 4, 2  # rows, columns, matrices in a stack, rank
IDS = torch.tensor([[5, 0, 5], [2, 7, 1]])
OFFS = torch.tensor([1, 1, 4, 5], dtype=torch.int32)  # where the groups of rows end
GROUPS = [(0, 1), (1, 1), (1, 4), (4, 5)]


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def make(
    *lead: int, m: int = M, n: int = N, terms: int = 1, dtype: Any = torch.float64
) -> Factored:
    """Return a random `Factored` of shape ``(*lead, m, n)``, with factors like the engine's."""
    factors = [
        (random(*lead, R, m, seed=2 * i + 1).mT, random(*lead, R, n, seed=2 * i + 2).mT)
        for i in range(terms)
    ]
    return Factored(random(*lead, m, n).to(dtype), [(u.to(dtype), v.to(dtype)) for u, v in factors])


def plain(x: Any) -> Any:
    if isinstance(x, tuple):
        return tuple(map(plain, x))
    return x.dense() if type(x) is Factored else x


def x(*shape: int) -> Tensor:
    return torch.arange(math.prod(shape), dtype=torch.float64).sin().view(shape)


Operation = Callable[[Any], Any]

# Operations on a matrix [M, N] that never make it dense.
ON_MATRIX: dict[str, Operation] = {
    "linear": lambda w: F.linear(x(2, 3, N), w),
    "linear with bias": lambda w: F.linear(x(3, N), w, x(M)),
    "linear of one row": lambda w: F.linear(x(N), w),
    "linear of a transposed input": lambda w: F.linear(x(N, 3).T, w),
    "matmul": lambda w: torch.matmul(x(2, 3, M), w),
    "matmul, left": lambda w: torch.matmul(w, x(2, N, 3)),
    "matmul with a vector": lambda w: torch.matmul(x(M), w),
    "matmul with a vector, left": lambda w: torch.matmul(w, x(N)),
    "@": lambda w: x(3, M) @ w,
    "Tensor.matmul": lambda w: w.matmul(x(N, 3)),
    "Tensor.__matmul__": lambda w: Tensor.__matmul__(w, x(N, 3)),
    "rmatmul": lambda w: w.__rmatmul__(x(3, M)),
    "mm": lambda w: torch.mm(x(3, M), w),
    "Tensor.mm": lambda w: w.mm(x(N, 3)),
    "mv": lambda w: torch.mv(w, x(N)),
    "Tensor.mv": lambda w: w.mv(x(N)),
    "addmm": lambda w: torch.addmm(x(N), x(3, M), w, beta=0.5, alpha=2),
    "Tensor.addmm": lambda w: x(M, 3).addmm(w, x(N, 3), beta=0.5, alpha=2),
    "einsum": lambda w: torch.einsum("mn, bn -> bm", w, x(3, N)),
    "einsum, three operands": lambda w: torch.einsum("bn,mn,bm->b", x(3, N), w, x(3, M)),
    "embedding": lambda w: F.embedding(IDS, w, padding_idx=0),
    "index_select of rows": lambda w: torch.index_select(w, 0, IDS[0]),
    "Tensor.index_select of rows": lambda w: w.index_select(-2, IDS[0]),
    "index_select of columns": lambda w: w.index_select(1, IDS[1] % N),
    "rows by number": lambda w: w[IDS],
    "rows by number, some columns": lambda w: w[IDS, 1:4],
    "a row": lambda w: w[3],
    "a row by a tensor": lambda w: w[IDS[0, 0]],
    "slices": lambda w: w[1:7:2, 2:],
    "slices after an ellipsis": lambda w: w[..., :4],
    "one more dimension": lambda w: w[None, 1:] @ x(3, N, 2),
    "detach": lambda w: w.detach(),
    "torch.detach": lambda w: torch.detach(w),
    "data": lambda w: w.data,
    "requires_grad_": lambda w: w.requires_grad_(False),
    "clone": lambda w: w.clone(),
    "torch.clone": lambda w: torch.clone(w),
    "contiguous": lambda w: w.mT.contiguous(),
    "to": lambda w: w.to(dtype=torch.float64),
    "float": lambda w: w.float(),
    "double": lambda w: w.double(),
    "type": lambda w: w.type(torch.float64),
    "type_as": lambda w: x(3, N).type_as(w) @ w.type_as(x(3)).mT,
    "to another tensor's": lambda w: x(3).to(w),
    "cpu": lambda w: w.cpu(),
    "T": lambda w: w.T,
    "mT": lambda w: w.mT,
    "t": lambda w: w.t(),
    "torch.t": lambda w: torch.t(w),
    "transpose": lambda w: w.transpose(0, -1),
    "torch.transpose": lambda w: torch.transpose(w, 1, 0),
    "swapaxes": lambda w: w.swapaxes(0, 1),
    "torch.swapaxes": lambda w: torch.swapaxes(w, 0, 1),
    "permute": lambda w: w.permute(1, 0),
    "split": lambda w: torch.split(w, 3),
    "split of columns": lambda w: w.split([1, 5], dim=-1),
    "chunk": lambda w: w.chunk(3, dim=1),
    "torch.chunk": lambda w: torch.chunk(w, 3),
    "narrow": lambda w: w.narrow(0, 2, 3),
    "torch.narrow": lambda w: torch.narrow(w, 1, 2, 3),
    "rows in groups": lambda w: w.view(2, M // 2, N),
    "rows in groups, multiplied": lambda w: x(2, 3, N) @ w.view(2, -1, N).mT,
    "reshape": lambda w: torch.reshape(w, (M, N)),
    "Tensor.reshape": lambda w: w.reshape([2, 2, 2, N]),
}

# Operations on a stack [E, M, N] that never make it dense.
ON_STACK: dict[str, Operation] = {
    "matmul": lambda w: x(E, 3, M) @ w,
    "matmul, left": lambda w: w @ x(E, N, 3),
    "matmul, one input for all": lambda w: x(3, M) @ w,
    "matmul, left, one input for all": lambda w: w @ x(N, 3),
    "bmm": lambda w: torch.bmm(x(E, 3, M), w),
    "Tensor.bmm": lambda w: w.bmm(x(E, N, 3)),
    "baddbmm": lambda w: torch.baddbmm(x(E, 1, N), x(E, 3, M), w, alpha=3),
    "Tensor.baddbmm": lambda w: x(E, M, 3).baddbmm(w, x(E, N, 3), beta=2),
    "einsum": lambda w: torch.einsum("ben,emn->bem", x(3, E, N), w),
    "einsum without a common index": lambda w: torch.einsum("emn,k->kemn", w, x(2)),
    "grouped product": lambda w: torch.ops.transformers.grouped_mm_fallback(x(5, M), w, OFFS),
    "grouped product, transposed": lambda w: torch.ops.transformers.grouped_mm_fallback(
        x(5, N), w.transpose(-2, -1), offs=OFFS
    ),
    "a matrix": lambda w: w[2],
    "a matrix by a tensor": lambda w: F.linear(x(3, N), w[IDS[0, 2] % E]),
    "matrices by number": lambda w: w[IDS[0] % E],
    "rows of all matrices": lambda w: w[:, 2:5],
    "parts of some matrices": lambda w: w[1:3, ..., 2:5, ::2],
    "more dimensions": lambda w: w[:, None, None, ..., 2:] @ x(2, 3, N - 2, 5),
    "index_select": lambda w: torch.index_select(w, 0, IDS[0] % E),
    "index_select of rows": lambda w: w.index_select(1, IDS[0]),
    "unbind": lambda w: w.unbind(),
    "torch.unbind": lambda w: torch.unbind(w, 0),
    "iteration": lambda w: tuple(w),
    "select": lambda w: w.select(0, 1),
    "torch.select": lambda w: torch.select(w, -3, 1),
    "split of rows": lambda w: w.split(4, 1),
    "chunk of columns": lambda w: w.chunk(2, -1),
    "permute": lambda w: w.permute(0, 2, 1),
    "torch.permute": lambda w: torch.permute(w, (0, 2, 1)),
    "mT": lambda w: w.mT,
}

# Operations that get the dense tensor.
ON_DENSE: dict[str, Operation] = {
    "*": lambda w: 2 * w,
    "norm": lambda w: w.norm(),
    "cat": lambda w: torch.cat([w, x(1, N)]),
    "two factored operands": lambda w: w @ w.mT,
    "linear as input": lambda w: F.linear(w, x(3, N)),
    "addmm as input": lambda w: torch.addmm(w, x(M, 2), x(2, N)),
    "out": lambda w: torch.mm(x(3, M), w, out=torch.empty(3, N, dtype=torch.float64)),
    "einsum without an output": lambda w: torch.einsum("mn,bn", w, x(3, N)),
    "einsum with an ellipsis": lambda w: torch.einsum("...n,bn->...b", w, x(3, N)),
    "einsum of a diagonal": lambda w: torch.einsum("nn->n", w[:N]),
    "embedding with max_norm": lambda w: F.embedding(IDS, w, max_norm=1.0),
    "a column": lambda w: w[:, 2],
    "rows by a mask": lambda w: w[torch.arange(M) > 3],
    "a list of rows": lambda w: w[[1, 2]],
    "one more dimension of a matrix": lambda w: w[:, None],
    "integers": lambda w: w.to(torch.int32),
    "columns in groups": lambda w: w.view(M, 2, N // 2),
    "flatten": lambda w: w.reshape(-1),
    "bytes": lambda w: w.view(torch.uint8),
    "unbind of rows": lambda w: torch.stack(w.unbind()),
    "select of a row": lambda w: w.select(0, 1),
}


@pytest.fixture(autouse=True)
def made() -> Iterator[Any]:
    Factored.made.clear()
    yield Factored.made
    Factored.made.clear()


def assert_near(found: Any, expected: Any) -> None:
    """Within 1e-12 in float64, of the same shape and dtype; a sum of rounded terms is rounded."""
    for a, b in zip(*[p if isinstance(p, tuple) else (p,) for p in (found, expected)], strict=True):
        near = 1e-12 if b.dtype == torch.float64 else 1e-5
        torch.testing.assert_close(a, b, rtol=near, atol=near)


CASES = [pytest.param((), o, id=name) for name, o in ON_MATRIX.items()]
CASES += [pytest.param((E,), o, id=f"stack: {name}") for name, o in ON_STACK.items()]


@pytest.mark.parametrize("terms", [1, 2])
@pytest.mark.parametrize(("lead", "operation"), CASES)
def test_handled_operations(lead: Any, operation: Operation, terms: int, made: Any) -> None:
    w = make(*lead, terms=terms)
    dense = w.dense()
    parts = [t.clone() for t in (w.base, *sum(w.terms, ()))]
    found = operation(w)
    assert not made, "the dense tensor was made"
    assert_near(plain(found), operation(dense))
    # Nothing was written into, and what is no view does not change with the factors.
    assert all(map(torch.equal, parts, (w.base, *sum(w.terms, ()))))
    if isinstance(found, Tensor) and type(found) is not Factored:
        before = found.clone()
        for part in (w.base, *sum(w.terms, ())):
            part.fill_(7)
        assert torch.equal(found, before)


@pytest.mark.parametrize("operation", [pytest.param(o, id=n) for n, o in ON_DENSE.items()])
def test_everything_else_is_dense_and_counted(operation: Operation, made: Any) -> None:
    w = make()
    dense = w.dense()
    assert_near(operation(w), operation(dense))
    assert made


def test_every_handler_is_tested(monkeypatch: pytest.MonkeyPatch) -> None:
    called = set()

    def watch(key: Any, handler: Any) -> Any:
        def watched(*args: Any, **kwargs: Any) -> Any:
            called.add(key)
            return handler(*args, **kwargs)

        return watched

    for key, (handler, keywords) in tensor._HANDLERS.items():
        monkeypatch.setitem(tensor._HANDLERS, key, (watch(key, handler), keywords))
    for operations, w in ((ON_MATRIX, make()), (ON_STACK, make(E))):
        for operation in operations.values():
            operation(w)
    elsewhere = {
        torch._grouped_mm,  # has no kernel for float64
        Tensor.cuda,
        Tensor.data_ptr,
        Tensor.half,
        Tensor.bfloat16,
        Tensor.requires_grad.__set__,
    }
    assert tensor._HANDLERS.keys() - called == elsewhere


def test_dense_is_the_sum() -> None:
    w = make(E, terms=2)
    (u, v), (s, t) = w.terms
    assert_near(w.dense(), w.base + u @ v.mT + s @ t.mT)


@pytest.mark.parametrize("columns", [N, 8])
def test_grouped_products_in_kernels_that_want_aligned_rows(columns: int, made: Any) -> None:
    w = make(E, m=16, n=8, dtype=torch.float32)
    rows = x(5, 16).float()
    for product in (torch._grouped_mm, F.grouped_mm):
        torch.testing.assert_close(product(rows, w, offs=OFFS), product(rows, w.dense(), offs=OFFS))
        turned = product(rows[:, :8], w.mT, offs=OFFS)
        torch.testing.assert_close(turned, product(rows[:, :8], w.dense().mT, offs=OFFS))
    assert not made


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("rank", [1, 4])
def test_products_on_a_gpu(dtype: torch.dtype, rank: int, made: Any) -> None:
    """Products of groups too, whose kernels there are others than on the CPU."""
    u, v = random(E, rank, 32, seed=1).mT, random(E, rank, 16, seed=2).mT
    base, rows = random(E, 32, 16), x(5, 16)
    expected = base + u @ v.mT
    w = Factored(base.to("cuda", dtype), [(u.to("cuda", dtype), v.to("cuda", dtype))])
    on_gpu = rows.to("cuda", dtype)
    products = {
        "linear": (F.linear(on_gpu, w[0]), F.linear(rows, expected[0])),
        "stack": (on_gpu @ w.mT, rows @ expected.mT),
        "rows": (F.embedding(IDS.cuda(), w[1]), F.embedding(IDS, expected[1])),
    }
    if dtype == torch.bfloat16:
        by_group = [rows[a:b] @ expected[i].mT for i, (a, b) in enumerate(GROUPS)]
        products["groups"] = (F.grouped_mm(on_gpu, w.mT, offs=OFFS.cuda()), torch.cat(by_group))
    assert not made
    for name, (found, wanted) in products.items():
        near = 4 * torch.finfo(dtype).eps * wanted.abs().max().item()
        assert found.dtype == dtype, name
        torch.testing.assert_close(found.cpu().double(), wanted, rtol=0, atol=near, msg=name)


@pytest.mark.parametrize("name", ["half", "bfloat16"])
def test_conversions_to_half_precision(name: str, made: Any) -> None:
    w = make()
    found = getattr(w, name)()
    assert type(found) is Factored
    assert not made
    torch.testing.assert_close(found.dense(), getattr(w.dense(), name)(), rtol=2e-2, atol=2e-2)


def test_metadata_are_those_of_the_base(made: Any) -> None:
    w = make(E)
    assert (w.shape, w.dtype, w.device, w.ndim) == (w.base.shape, w.base.dtype, w.base.device, 3)
    assert (len(w), w.stride(), w.is_contiguous()) == (E, w.base.stride(), True)
    assert (w.is_cuda, w.requires_grad) == (False, False)
    assert w.untyped_storage().data_ptr() == w.base.untyped_storage().data_ptr()
    assert torch.zeros_like(w).shape == w.new_zeros(w.shape).shape == w.shape
    assert type(w.new_zeros(3)) is Tensor
    assert {w: 1}[w] == 1
    w.requires_grad = False
    assert isinstance(w, nn.Parameter)
    assert not made


@torch.jit.script
def scripted(x: Tensor, w: Tensor) -> Tensor:
    return x @ w


def test_what_passes_by_python_gets_the_dense_tensor_too(made: Any) -> None:
    w = make()
    assert_near(scripted(x(3, M), w), x(3, M) @ w.dense())
    with torch._C.DisableTorchFunctionSubclass():
        assert_near(F.linear(x(3, N), w), F.linear(x(3, N), w.dense()))
    assert [name for _, name in made] == ["mm.default", "t.default"]


def test_a_kernel_reads_the_dense_tensor_by_its_address(made: Any) -> None:
    w = make()
    array = (ctypes.c_double * (M * N)).from_address(w.data_ptr())
    assert list(array) == w.dense().flatten().tolist()
    assert made[w.shape, "data_ptr"] == 1
    with pytest.raises(UnsupportedModel, match=r"part of a weight, of shape \(6, 8\)"):
        w.mT.data_ptr()


@pytest.mark.parametrize(
    "write",
    [
        lambda w: w.add_(1),
        lambda w: w.data.copy_(x(M, N)),
        lambda w: w.__setitem__(0, 1.0),
        lambda w: setattr(w, "data", x(M, N)),
        lambda w: torch.add(x(M, N), 1, out=w),
        lambda w: torch.relu_(w),
    ],
)
def test_a_model_that_writes_into_its_weights_is_refused(write: Operation) -> None:
    with pytest.raises(UnsupportedModel, match=r"shape \(8, 6\).* set rank=None"):
        write(make())


def test_what_was_made_dense_is_told_by_shape_and_name(made: Any) -> None:
    w = make()
    torch.cat([w, w[:2]])
    w.mean()
    w.real  # noqa: B018
    found = {(tuple(shape), name): count for (shape, name), count in made.items()}
    assert found == {
        ((8, 6), "cat"): 1,
        ((2, 6), "cat"): 1,
        ((8, 6), "mean"): 1,
        ((8, 6), "real.__get__"): 1,
    }


@pytest.mark.parametrize(
    "operation",
    [
        lambda w: F.linear(x(3, N).float(), w),
        lambda w: x(3, M).float() @ w,
        lambda w: torch.addmm(x(N).float(), x(3, M).float(), w),
        lambda w: torch.einsum("bn,mn->bm", x(3, N).float(), w),
        lambda w: F.embedding(IDS, w),
        lambda w: w[IDS],
        lambda w: w.index_select(0, IDS[0]),
        lambda w: 2 * w,
    ],
)
def test_autocast_gives_the_dtypes_of_the_dense_model(operation: Operation) -> None:
    w = make(dtype=torch.float32)
    dense = w.dense()
    with torch.autocast("cpu", torch.bfloat16):
        found, expected = operation(w), operation(dense)
    assert found.dtype == expected.dtype
    near = 1e-5 if found.dtype == torch.float32 else 0.05
    torch.testing.assert_close(found, expected, rtol=near, atol=near * 5)


@pytest.mark.parametrize(("lead", "operation"), CASES)
def test_factors_of_several_passes_at_once(lead: Any, operation: Operation) -> None:
    """As under vmap, where factors have a dimension of passes that the base does not have."""
    w = make(*lead)
    ((u, v),) = w.terms
    scales = torch.tensor([1.0, -2.0], dtype=torch.float64)

    def one(scale: Tensor) -> Any:
        return plain(operation(Factored(w.base, [(u * scale, v)])))

    found = torch.func.vmap(one)(scales)
    for i, scale in enumerate(scales):
        each = tuple(p[i] for p in found) if isinstance(found, tuple) else found[i]
        assert_near(each, operation(Factored(w.base, [(u * scale, v)]).dense()))


@pytest.mark.parametrize("operation", [lambda w: F.embedding(IDS, w), lambda w: 2 * w])
def test_autocast_does_not_round_sums_of_several_passes(operation: Operation) -> None:
    w = make(dtype=torch.float32)
    ((u, v),) = w.terms
    with torch.autocast("cpu", torch.bfloat16):
        both = torch.func.vmap(lambda s: operation(Factored(w.base, [(u * s, v)])))(torch.ones(2))
        torch.testing.assert_close(both[1], operation(w.dense()), rtol=1e-5, atol=1e-5)


def test_which_shapes_are_factored() -> None:
    assert is_factored((768, 3072), 4)
    assert is_factored((8, 16, 16), 2)
    assert not is_factored((8, 16, 15), 2)
    assert is_factored((16, 15), 2, least=1)
    assert not is_factored((4096,), 1)
    assert not is_factored((), 1)
