"""Small models with adapters on a frozen base in few bits: torchao's, bitsandbytes', and our own.

`Codes` and `Repacked` are the two kinds of quantized weight that libraries have (see
`zo2ext/inner.py`), as small as they get, so that both are tested where no library is installed.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tiny_models import tiny
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only
from transformers import AutoModelForCausalLM

NAME = "llama-tied"
SIZES = {"hidden_size": 64, "intermediate_size": 128, "head_dim": 16}  # bitsandbytes wants 64s
ADAPTED = ["q_proj", "down_proj"]
aten = torch.ops.aten


def codes_of(weight: Tensor) -> tuple[Tensor, Tensor]:
    """int8 codes of the shape of `weight`, and a scale for each row."""
    scales = weight.abs().amax(1, keepdim=True) / 127
    return (weight / scales).round().to(torch.int8), scales


class Codes(Tensor):
    """A wrapper: no memory of its own. The codes lie in memory column by column."""

    codes: Tensor
    scales: Tensor

    @staticmethod
    def __new__(cls, codes: Tensor, scales: Tensor) -> Codes:
        return Tensor._make_wrapper_subclass(
            cls, codes.shape, dtype=scales.dtype, device=codes.device
        )

    def __init__(self, codes: Tensor, scales: Tensor) -> None:
        self.codes, self.scales = codes, scales

    @classmethod
    def of(cls, weight: Tensor) -> Codes:
        codes, scales = codes_of(weight)
        return cls(codes.t().contiguous().t(), scales)

    def plain(self) -> Tensor:
        hidden = self.codes.stride() == (0, 0)
        assert hidden or self.codes.stride() == (1, self.shape[0]), "as a kernel may rely on"
        return self.codes * self.scales

    def __tensor_flatten__(self) -> tuple[list[str], None]:
        return ["codes", "scales"], None

    @classmethod
    def __tensor_unflatten__(cls, inner: dict[str, Tensor], context: None, *_: Any) -> Codes:
        return cls(inner["codes"], inner["scales"])

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is aten.copy_.default:
            args[0].codes.copy_(args[1].codes)
            args[0].scales.copy_(args[1].scales)
            return args[0]
        if func in (aten.detach.default, aten.clone.default):
            return cls(*(func(t, *args[1:], **kwargs) for t in (args[0].codes, args[0].scales)))
        return func(*tree_map_only(Codes, lambda t: t.plain(), args), **kwargs)


class Unflattenable(Codes):
    """A wrapper whose class promises to flatten, and then does not."""

    def __tensor_flatten__(self) -> Any:
        raise NotImplementedError("no layout is known")


class Silent(Tensor):
    """A wrapper that does not say that it is one."""

    of = classmethod(Codes.of.__func__)
    plain, __new__, __init__ = Codes.plain, Codes.__new__, Codes.__init__

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is aten.detach.default:
            return cls(args[0].codes, args[0].scales)
        return func(*tree_map_only(Silent, Silent.plain, args), **(kwargs or {}))


@dataclass(eq=False)
class State:
    """What hangs on a `Repacked`."""

    scales: Tensor
    packed: Tensor | None = None


class Repacked(nn.Parameter):
    """A parameter of codes whose scales hang on it."""

    state: State


class RepackingLinear(nn.Module):
    """Changes its codes, and says so, when it first computes in evaluation mode."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        codes, scales = codes_of(linear.weight.detach())
        self.weight = Repacked(codes, requires_grad=False)
        self.weight.state = State(scales)
        self.state = self.weight.state

    def forward(self, x: Tensor) -> Tensor:
        if self.state.packed is None:
            self.weight.data = self.state.packed = self.weight.data.flip(0).contiguous()
            self.state.flipped = True
        assert self.state.flipped
        return F.linear(x, self.weight.data.flip(0) * self.state.scales)


def wrap(model: nn.Module, weight_class: Any = Codes) -> nn.Module:
    """`model` with wrappers for the weights of its blocks."""
    for module in blocks_linears(model).values():
        weight = weight_class.of(module.weight.detach())
        module.weight = nn.Parameter(weight, requires_grad=False)
    return model


def repack(model: nn.Module) -> nn.Module:
    for name, module in blocks_linears(model).items():
        if "mlp" in name:  # PEFT adapts nn.Linear only, and no module of ours
            model.set_submodule(name, RepackingLinear(module))
    return model


def blocks_linears(model: nn.Module) -> dict[str, nn.Linear]:
    found = {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear)}
    return {name: module for name, module in found.items() if "layers" in name}


def with_library(name: str, settings: Callable[[Any], Any]) -> Callable[[Path], nn.Module]:
    """As ``from_pretrained`` gives it; skips where the library is not installed."""

    def make(folder: Path) -> nn.Module:
        package = name.partition(".")[0]
        reason = f"{package} is not installed: pip install {package}"
        library = pytest.importorskip(name, reason=reason)
        return AutoModelForCausalLM.from_pretrained(
            folder,
            quantization_config=settings(library),
            dtype=torch.float32,
            device_map="cpu",  # where there is a GPU, too
        )

    return make


def _bitsandbytes(**settings: Any) -> Callable[[Path], nn.Module]:
    from transformers import BitsAndBytesConfig

    return with_library("bitsandbytes", lambda library: BitsAndBytesConfig(**settings))


def _torchao(settings: Callable[[Any], Any]) -> Callable[[Path], nn.Module]:
    from transformers import TorchAoConfig

    return with_library("torchao.quantization", lambda library: TorchAoConfig(settings(library)))


BASES: dict[str, Callable[[Path], nn.Module]] = {
    "wrapper": lambda folder: wrap(AutoModelForCausalLM.from_pretrained(folder)),
    "repacking": lambda folder: repack(AutoModelForCausalLM.from_pretrained(folder)),
    "bnb-nf4": _bitsandbytes(load_in_4bit=True, bnb_4bit_quant_type="nf4"),
    "bnb-fp4-nested": _bitsandbytes(load_in_4bit=True, bnb_4bit_use_double_quant=True),
    "bnb-int8": _bitsandbytes(load_in_8bit=True),
    "torchao-int8": _torchao(lambda q: q.Int8WeightOnlyConfig()),
    "torchao-int4": _torchao(
        lambda q: q.IntxWeightOnlyConfig(
            weight_dtype=torch.int4, granularity=q.granularity.PerGroup(32)
        )
    ),
    "torchao-fp8": _torchao(lambda q: q.Float8WeightOnlyConfig()),
}


def save_base(folder: Path) -> Path:
    """The model that bases are made from."""
    tiny(NAME, **SIZES).save_pretrained(folder)
    return folder


def adapted(base: nn.Module, seed: int = 0) -> nn.Module:
    """`base`, frozen, with LoRA adapters none of whose weights is zero."""
    peft = pytest.importorskip("peft")
    targets = [
        name
        for name, module in base.named_modules()
        if name.endswith(tuple(ADAPTED)) and isinstance(module, nn.Linear)
    ]
    torch.manual_seed(seed)
    lora = peft.LoraConfig(r=4, target_modules=targets, task_type="CAUSAL_LM")
    model = peft.get_peft_model(base, lora)
    for parameter in model.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter, std=0.05)
    return model.eval()
