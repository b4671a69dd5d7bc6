"""Compile the blocks of a model one by one with ``torch.compile``."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import nn

from zo2ext.errors import UserError
from zo2ext.model.units import decoder_blocks


def compile_blocks(model: nn.Module, **options: Any) -> None:
    """Compile the forward of each decoder block of `model`, before or after `offload`.

    A forward pass pauses between blocks, so a model cannot be compiled as one. Equal blocks share
    their code, which is compiled when the first of them runs. Compiled code may differ from
    uncompiled code in the last bits.

    Args:
        model: Model to change in place.
        options: Options of ``torch.compile``.

    Raises:
        ValueError: The model has no repeated blocks, or the options ask for CUDA graphs, which keep
            the addresses of weights: a block's weights are at another address in each pass.

    Example:
        >>> zo2ext.compile_blocks(model)
        >>> zo = zo2ext.offload(model, zo2ext.ZOConfig(lr=1e-6))
    """
    graphs = options.get("mode") in ("reduce-overhead", "max-autotune")
    if graphs or (options.get("options") or {}).get("triton.cudagraphs"):
        raise UserError(
            "compiled blocks cannot use CUDA graphs, which keep the addresses of weights, got "
            f"{options}; use mode='max-autotune-no-cudagraphs' or the default mode"
        )
    blocks = decoder_blocks(model).values()
    if not blocks:
        raise UserError(
            f"model has no repeated blocks that could be compiled, got {type(model).__name__}"
        )
    for block in blocks:
        block.forward = torch.compile(block.forward, **options)


def is_compiled(model: nn.Module) -> bool:
    """Return whether ``torch.compile`` was applied to a module of `model` or to its forward."""
    return any(
        hasattr(module.forward, "_torchdynamo_orig_callable")
        or getattr(module, "_compiled_call_impl", None) is not None
        for module in model.modules()
    )


def uncompiled() -> AbstractContextManager[object]:
    """Return a context in which compiled code runs uncompiled."""
    stance: AbstractContextManager[object] = torch.compiler.set_stance("force_eager")
    return stance
