"""What forward passes take on the device beside the weights, counted without making them.

A model of fake tensors (of shapes, without memory) runs its own forward, and every result that is
alive is counted. So the numbers are those of the model's code, whatever that is.
"""

from __future__ import annotations

import sys
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.weak import WeakIdKeyDictionary

from zo2ext.model.chunked_loss import CHUNK, chunk_loss
from zo2ext.model.layout import align
from zo2ext.model.units import decoder_blocks

_BLOCK = 512  # bytes that torch's allocators round up to


class UncountableError(RuntimeError):
    """A forward pass cannot be followed by shapes alone; the message says where."""


@dataclass(frozen=True)
class Activations:
    """Bytes that forward passes without gradients take.

    Attributes:
        peak: One, where it takes most; its logits and its loss included.
        waiting: One that waits for the weights of a block, at most.
    """

    peak: int
    waiting: int

    def of(self, forwards: int) -> int:
        """So many in lockstep: one runs while the others wait."""
        return self.peak + (forwards - 1) * self.waiting


class LiveBytes(TorchDispatchMode):
    """Counts the memory of all results that are alive; what was there before is not counted.

    Attributes:
        now: Bytes, each allocation rounded up as torch's allocators do.
        peak: The most there were.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.now = self.peak = 0
        self._known: Any = WeakIdKeyDictionary()  # storages

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for storage in _storages((args, kwargs)):
            self._known.setdefault(storage, True)
        result = func(*args, **(kwargs or {}))
        for storage in _storages(result):
            if storage not in self._known:
                self._known[storage] = True
                nbytes = align(storage.nbytes(), _BLOCK)
                self.now += nbytes
                self.peak = max(self.peak, self.now)
                weakref.finalize(storage, self._freed, nbytes)
        return result

    def _freed(self, nbytes: int) -> None:
        self.now -= nbytes


class FusedAttention(TorchFunctionMode):
    """Attention as its fused kernels have it: its output is all it takes.

    Which kernel a GPU would choose cannot be asked without one; all that it chooses from for
    sequences of some length do not keep the scores.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.scaled_dot_product_attention:
            query, value = args[0], args[2]
            return query.new_empty((*query.shape[:-1], value.shape[-1]))
        return func(*args, **(kwargs or {}))


def count_activations(build: Callable[[], nn.Module], run: Callable[[Any], Any]) -> Activations:
    """Count a forward pass of a model.

    Args:
        build: Makes the model; called where all tensors are fake, so that it takes no memory.
        run: Calls it, as a closure of a step would.

    Raises:
        UncountableError: The pass depends on values, not on shapes alone.
    """
    live, waiting = LiveBytes(), 0

    def wait(*_: Any) -> None:
        nonlocal waiting
        waiting = max(waiting, live.now)

    with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
        model = build()
        for block in decoder_blocks(model).values():
            block.register_forward_pre_hook(wait)
        try:
            with live, FusedAttention():
                run(model)
        except Exception as error:
            raise UncountableError(f"{type(error).__name__}: {error}") from error
    return Activations(live.peak, waiting)


def counted(
    config: Any, *, batch_size: int, seq_len: int
) -> Callable[[torch.dtype], Activations | None]:
    """For a compute dtype, what forward passes of the model that `config` describes take, as the
    commands call it; None where that cannot be counted, which is said on stderr."""
    from transformers import AutoModelForCausalLM

    def run(model: Any) -> None:
        ids = torch.zeros(batch_size, seq_len, dtype=torch.long)
        model(input_ids=ids, labels=ids, use_cache=False)

    def build(dtype: torch.dtype) -> nn.Module:
        make: Any = AutoModelForCausalLM.from_config
        model: nn.Module = make(config, dtype=dtype, trust_remote_code=False).eval()
        chunk_loss(model)
        return model

    @cache
    def count(itemsize: int) -> Activations | None:
        dtype = {2: torch.bfloat16, 4: torch.float32}[itemsize]
        try:
            return count_activations(partial(build, dtype), run)
        except UncountableError as error:
            print(f"activations are estimated, not counted: {error}", file=sys.stderr)
            return None

    return lambda dtype: count(dtype.itemsize)


def estimated(text: Any, tokens: int, compute: torch.dtype) -> Activations:
    """What a block's input, its output and the widest layer's take, or the logits and the loss."""
    hidden, vocabulary = getattr(text, "hidden_size", 0), getattr(text, "vocab_size", 0)
    wide = max(getattr(text, "intermediate_size", 0) or 0, 4 * hidden)
    block = tokens * (2 * hidden + 2 * wide) * compute.itemsize
    logits = tokens * (vocabulary + hidden) * compute.itemsize
    loss = 2 * min(CHUNK, tokens * vocabulary) * torch.float32.itemsize
    return Activations(max(block, logits + loss), 2 * tokens * hidden * compute.itemsize)


def _storages(values: Any) -> list[torch.UntypedStorage]:
    leaves = torch.utils._pytree.tree_leaves(values)
    dense = [t for t in leaves if isinstance(t, Tensor) and t.layout is torch.strided]
    return [t.untyped_storage() for t in dense]
