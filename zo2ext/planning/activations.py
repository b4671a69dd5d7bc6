"""Memory that forward passes need on the device besides the weights, computed without running them.

A model of fake tensors, which have shapes but no memory, runs its own forward, and the bytes of all
live results are added up. The numbers are those of the model's own code, whatever that does.
"""

from __future__ import annotations

import logging
import sys
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cache, partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry, sdpa_flop_count
from torch.utils.weak import WeakIdKeyDictionary

from zo2ext.model.chunked_loss import CHUNK, chunk_loss
from zo2ext.model.units import Entry, decoder_blocks
from zo2ext.ops.tables import align

_BLOCK = 512  # bytes; torch's allocators round up to multiples of it


class UncountableError(RuntimeError):
    """A forward pass depends on values, so its shapes cannot be followed without them."""


@dataclass
class Stage:
    """Holds the work of a forward pass from one module that owns weights to the next such module.

    Attributes:
        module: Name of the module; "" before the first.
        flops: Operations of matrix products and of attention; a multiply-add is two.
        nbytes: Bytes that all other operations read and write.
        operations: Number of operations that the host dispatches.
    """

    module: str
    flops: float = 0.0
    nbytes: float = 0.0
    operations: int = 0


@dataclass(frozen=True)
class Activations:
    """Bytes that a forward pass without gradients needs.

    Attributes:
        peak: Largest number of bytes at any time, including the logits and the loss.
        waiting: Largest number of bytes while the pass waits for the weights of a block.
        stages: The pass, in order.
    """

    peak: int
    waiting: int
    stages: tuple[Stage, ...] = field(default=(), compare=False)

    def in_lockstep(self, forwards: int) -> int:
        """Return the bytes of `forwards` passes, of which one runs while the others wait."""
        return self.peak + (forwards - 1) * self.waiting


class LiveBytes(TorchDispatchMode):
    """Adds up the memory of all live results; tensors that existed before are not included.

    Attributes:
        now: Current number of bytes, each allocation rounded up as torch's allocators do.
        peak: Largest number so far.
        stages: The work so far. Append a stage to count what follows in it.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.now = self.peak = 0
        self.stages = [Stage("")]
        self._known: Any = WeakIdKeyDictionary()  # storages

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for storage in _storages((args, kwargs)):
            self._known.setdefault(storage, True)
        result = func(*args, **(kwargs or {}))
        made = _storages(result)
        self._work(func, args, kwargs or {}, result, made)
        for storage in made:
            if storage not in self._known:
                self._known[storage] = True
                nbytes = align(storage.nbytes(), _BLOCK)
                self.now += nbytes
                self.peak = max(self.peak, self.now)
                weakref.finalize(storage, self._free, nbytes)
        return result

    def _free(self, nbytes: int) -> None:
        self.now -= nbytes

    def _work(self, func: Any, args: Any, kwargs: Any, result: Any, made: list[Any]) -> None:
        """Add an operation to the current stage."""
        stage = self.stages[-1]
        stage.operations += 1
        count = flop_registry.get(func._overloadpacket)
        if count is not None:
            stage.flops += count(*args, **kwargs, out_val=result)
        elif func._schema.is_mutable or any(storage not in self._known for storage in made):
            stage.nbytes += sum(t.nbytes for t in _tensors((args, kwargs, result)))


class FusedAttention(TorchFunctionMode):
    """Replaces attention by its output alone, as the fused kernels allocate it.

    Without a GPU there is no way to ask which kernel it would choose. None of those for longer
    sequences keeps the scores.

    Args:
        live: Counts the operations of attention; None: they are not counted.
    """

    def __init__(self, live: LiveBytes | None = None) -> None:
        super().__init__()
        self._live = live

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.scaled_dot_product_attention:
            query, key, value = args[:3]
            if self._live is not None:
                heads = (*query.shape[:-2],)  # keys of grouped queries have fewer
                shapes = (query.shape, (*heads, *key.shape[-2:]), (*heads, *value.shape[-2:]))
                self._live.stages[-1].flops += sdpa_flop_count(*shapes)
            return query.new_empty((*query.shape[:-1], value.shape[-1]))
        return func(*args, **(kwargs or {}))


def count_activations(build: Callable[[], nn.Module], run: Callable[[Any], Any]) -> Activations:
    """Return the bytes of a model's forward pass.

    Args:
        build: Builds the model. Called with fake tensors, so it allocates no memory.
        run: Calls the model, as the closure of a step would.

    Raises:
        UncountableError: The pass, or building the model, depends on values, not only on shapes.
    """
    live, waiting = LiveBytes(), 0

    def wait(*_: Any) -> None:
        nonlocal waiting
        waiting = max(waiting, live.now)

    with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
        try:
            model = build()
            for block in decoder_blocks(model).values():
                block.register_forward_pre_hook(wait)
            for name, module in model.named_modules():

                def begin(*_: Any, name: str = name) -> None:
                    live.stages.append(Stage(name))

                if next(module.parameters(recurse=False), None) is not None:
                    module.register_forward_pre_hook(begin)
            with live, FusedAttention(live):
                run(model)
        except Exception as error:
            raise UncountableError(f"{type(error).__name__}: {error}") from error
    return Activations(live.peak, waiting, tuple(live.stages))


def activation_counter(
    config: Any, *, batch_size: int, seq_len: int
) -> Callable[[torch.dtype], Activations | None]:
    """Return a function from a compute dtype to the activations of the model with `config`.

    The model is called as the commands call it. The function returns None, and prints the reason on
    standard error, where the pass cannot be followed.
    """
    from transformers import AutoModelForCausalLM
    from transformers.initialization import no_init_weights

    def run(model: Any) -> None:
        ids = torch.zeros(batch_size, seq_len, dtype=torch.long)
        model(input_ids=ids, labels=ids, use_cache=False)

    def build(dtype: torch.dtype) -> nn.Module:
        make: Any = AutoModelForCausalLM.from_config
        with no_init_weights():  # some initial values are drawn until they are in range
            model: nn.Module = make(config, dtype=dtype, trust_remote_code=False).eval()
        chunk_loss(model)
        return model

    @cache
    def count(itemsize: int) -> Activations | None:
        dtype = {2: torch.bfloat16, 4: torch.float32}[itemsize]
        log = logging.getLogger("torch._subclasses.fake_tensor")
        log.disabled = True  # it prints a traceback of what is reported below
        try:
            return count_activations(partial(build, dtype), run)
        except UncountableError as error:
            print(f"activations are estimated, not counted: {error}", file=sys.stderr)
            return None
        finally:
            log.disabled = False

    return lambda dtype: count(dtype.itemsize)


def estimate_stages(model: nn.Module, entries: Sequence[Entry], tokens: int) -> list[Stage]:
    """Estimate the stages of a forward pass, one per entry, from the sizes of its weights.

    Tables that are only looked up do not count. Of experts, whose weights are one tensor with three
    dimensions, those that a token visits count.
    """
    visited = getattr(text_config(model), "num_experts_per_tok", None)
    stages = []
    for entry in entries:
        multiplied = 0.0
        for module in entry.module.modules() if entry.paused else [entry.module]:
            if isinstance(module, nn.Embedding):
                continue
            for weight in module.parameters(recurse=False):
                share = visited / len(weight) if visited and weight.dim() == 3 else 1
                multiplied += weight.numel() * min(share, 1)
        stages.append(Stage(entry.name, 2 * tokens * multiplied))
    return stages


def text_config(model: nn.Module) -> Any:
    """Return the config of the language part of `model`; None where it has no config."""
    settings: Any = getattr(model, "config", None)
    return settings.get_text_config() if hasattr(settings, "get_text_config") else None


def estimate_activations(text: Any, tokens: int, compute: torch.dtype) -> Activations:
    """Estimate from the sizes in a config: a block's activations, or the logits and the loss."""
    hidden, vocabulary = getattr(text, "hidden_size", 0), getattr(text, "vocab_size", 0)
    wide = max(getattr(text, "intermediate_size", 0) or 0, 4 * hidden)
    block = tokens * (2 * hidden + 2 * wide) * compute.itemsize
    logits = tokens * (vocabulary + hidden) * compute.itemsize
    loss = 2 * min(CHUNK, tokens * vocabulary) * torch.float32.itemsize
    return Activations(max(block, logits + loss), 2 * tokens * hidden * compute.itemsize)


def _tensors(values: Any) -> list[Tensor]:
    leaves = torch.utils._pytree.tree_leaves(values)
    return [t for t in leaves if isinstance(t, Tensor) and t.layout is torch.strided]


def _storages(values: Any) -> list[torch.UntypedStorage]:
    return [t.untyped_storage() for t in _tensors(values)]
