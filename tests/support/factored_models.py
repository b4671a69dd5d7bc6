"""Every language model that transformers can build small, read through tensors of factors.

    python tests/support/factored_models.py                    the whole sweep (minutes)
    python tests/support/factored_models.py --kind causal opt  some model types
    python tests/support/factored_models.py --markdown docs/models.md

The logits of a tiny model whose matrices are `Factored` are compared, in float64, with those of the
same model whose matrices are the dense sums. Its real parameters are full of NaN meanwhile, so that
a model that reads one past its module is found. A type is

    factored    same logits within 1e-12 of the largest, and no operation got a dense tensor
    dense       same logits within 1e-12 of the largest, and some operation got a dense tensor
    differs     other logits
    fails       runs with dense matrices only
    not run     does not run with dense matrices either, or not twice with the same logits
    not built   could not be built from a generic tiny config
"""

from __future__ import annotations

import argparse
import gc
import math
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import sweep_report
import torch
from models import KINDS, TooSlow, batches, brief, make_model, time_limit
from sweep_report import Outcome
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from zo2ext.model.factored import Factored, is_factored

RANK = 2
SCALE = 1e-2  # of what is added to a weight
NEAR = {
    torch.float64: 1e-12,
    torch.float32: 1e-5,
}  # difference of equal logits, by the largest of them


class Reads(dict[str, Any]):
    """A module's parameters; reading one by name gives the tensor that stands for it."""

    def __init__(self, parameters: dict[str, Any], stands: dict[int, Tensor]) -> None:
        super().__init__(parameters)
        self._stands = stands

    def __getitem__(self, name: str) -> Any:
        parameter = super().__getitem__(name)
        return self._stands.get(id(parameter), parameter)


def stand_ins(model: nn.Module, terms: int = 1) -> dict[int, Factored]:
    """Random factors for every tensor that two factors fit into, by id of the parameter."""
    generator = torch.Generator().manual_seed(1)

    def factor(p: Tensor, size: int, scale: float) -> Tensor:
        noise = torch.randn((*p.shape[:-2], RANK, size), generator=generator, dtype=torch.float64)
        return (scale * noise).to(p.dtype).mT  # the same values in every dtype

    return {
        id(p): Factored(
            p.detach(),
            [(factor(p, p.shape[-2], SCALE), factor(p, p.shape[-1], 1)) for _ in range(terms)],
        )
        for p in model.parameters()
        if p.is_floating_point() and is_factored(p.shape, RANK, least=1)
    }


@contextmanager
def reading(model: nn.Module, stands: dict[int, Any]) -> Iterator[None]:
    """Let `model` read what stands for its parameters, which are full of NaN themselves."""
    owners = [m for m in model.modules() if m._parameters]
    kept = [(p, p.data) for p in model.parameters() if id(p) in stands]
    for module in owners:
        module._parameters = Reads(module._parameters, stands)
    for p, data in kept:
        p.data = torch.full((), float("nan"), dtype=data.dtype).expand(data.shape)
    try:
        yield
    finally:
        for module in owners:
            module._parameters = dict(module._parameters)
        for p, data in kept:
            p.data = data


class Float64(TorchFunctionMode):
    """Lets a model compute in float64 where it asks for float32 by name, as many norms do."""

    def __enter__(self) -> Float64:
        torch.set_default_dtype(torch.float64)
        entered: Float64 = super().__enter__()
        return entered

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        torch.set_default_dtype(torch.float32)

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        def double(x: Any) -> Any:
            return torch.float64 if x is torch.float32 else x

        func = Tensor.double if func is Tensor.float else func
        return func(*map(double, args), **{k: double(v) for k, v in (kwargs or {}).items()})


def difference(a: Tensor, b: Tensor) -> float:
    """The largest difference by the largest value; infinite elements have to be the same."""
    finite = b.isfinite()
    if not torch.equal(finite, a.isfinite()):
        return math.inf
    return ((a - b)[finite].abs().max() / b[finite].abs().max()).item()


def compare(
    kind_name: str, name: str, *, dtype: torch.dtype = torch.float64, experts: str = "eager"
) -> Outcome:
    """Compare the logits of a model type; see the module's docstring."""
    kind = KINDS[kind_name]
    try:
        model = make_model(kind, name).to(dtype).requires_grad_(False)
    except Exception as error:  # any library's any error: the table says which
        return Outcome(name, "not built", brief(error))
    for config in {
        id(m.config): m.config for m in model.modules() if hasattr(m, "config")
    }.values():
        config._experts_implementation = experts  # products of groups know no float64
    size = sum(p.numel() for p in model.parameters())

    def outcome(verdict: str, detail: str = "") -> Outcome:
        return Outcome(name, verdict, detail, size)

    def logits(now: dict[int, Any]) -> Tensor:
        torch.manual_seed(0)
        with reading(model, now), Float64() if dtype == torch.float64 else nullcontext():
            found: Tensor = model(**batch).logits
        return found

    try:
        (batch,) = batches(kind, model, 1)
        stands = stand_ins(model)
        plain = logits({})
        sums = {key: nn.Parameter(w.dense(), requires_grad=False) for key, w in stands.items()}
        dense = logits(sums)
        if difference(dense, logits(sums)) != 0:
            return outcome("not run", "two plain runs differ")
    except Exception as error:
        return outcome("not run", brief(error))
    Factored.made.clear()
    try:
        found = logits(stands)
    except Exception as error:
        return outcome("fails", brief(error))
    made = sorted({name for _, name in Factored.made})
    apart, effect = difference(found, dense), difference(plain, dense)
    if not apart <= NEAR[dtype] < effect / 100:
        return outcome("differs", f"by {apart:.1e}, of {effect:.1e} that factors add")
    return outcome("dense" if made else "factored", ", ".join(made))


def sweep(kind: str, names: list[str], seconds: int) -> Iterator[Outcome]:
    """The outcome of each of `names`, printed as it comes."""
    for name in names:
        try:
            with time_limit(seconds), torch.no_grad():
                result = compare(kind, name)
        except TooSlow as error:
            result = Outcome(name, "not run", str(error))
        print(f"{kind} {name:<26} {result.verdict:<10} {result.detail}", flush=True)
        yield result
        gc.collect()


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("models", nargs="*", help="model types; default: all")
    parser.add_argument("--kind", choices=[*KINDS, "all"], default="all")
    parser.add_argument("--seconds", type=int, default=60, help="limit per type (default 60)")
    parser.add_argument(
        "--markdown", type=Path, metavar="FILE", help="page to write the section of"
    )
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    found = {
        kind: list(sweep(kind, options.models or sorted(KINDS[kind].names), options.seconds))
        for kind in (KINDS if options.kind == "all" else [options.kind])
    }
    print("\n" + sweep_report.factored_table(found))
    if options.markdown is not None:
        sweep_report.write_factored(options.markdown, found)
    return int(any(o.verdict in ("differs", "fails") for f in found.values() for o in f))


if __name__ == "__main__":
    sys.exit(main())
