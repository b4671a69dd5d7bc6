"""Models whose blocks are compiled, one by one, with ``torch.compile``."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import nn

from zo2ext.model.units import decoder_blocks


def compile_blocks(model: nn.Module, **options: Any) -> None:
    """Compile the forward of each decoder block of `model`; before or after `offload`.

    A forward pass pauses between blocks, so a model cannot be compiled whole. Blocks that are alike
    share their code, which is compiled as the first of them runs. It may come to other last bits
    than uncompiled code, on both sides of a comparison alike.

    Args:
        options: Of ``torch.compile``.

    Raises:
        ValueError: No blocks are found.
    """
    blocks = decoder_blocks(model).values()
    if not blocks:
        raise ValueError(
            f"model has no repeated blocks that could be compiled, got {type(model).__name__}"
        )
    for block in blocks:
        block.forward = torch.compile(block.forward, **options)


def is_compiled(model: nn.Module) -> bool:
    """Whether ``torch.compile`` was applied to a module of `model`, or to its forward."""
    return any(
        hasattr(module.forward, "_torchdynamo_orig_callable")
        or getattr(module, "_compiled_call_impl", None) is not None
        for module in model.modules()
    )


def uncompiled() -> AbstractContextManager[object]:
    """Within, compiled code runs as it was written."""
    stance: AbstractContextManager[object] = torch.compiler.set_stance("force_eager")
    return stance
