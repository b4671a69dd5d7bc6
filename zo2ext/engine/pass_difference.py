"""Find out why a forward pass gives another loss in lockstep with others than alone."""

from __future__ import annotations

import logging
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from zo2ext.engine.pass_state import PassState
from zo2ext.errors import UnsupportedModel

logger = logging.getLogger(__name__)

Values = list[list[Any]]
Run = Callable[[], Values]


def explain_difference(
    model: nn.Module,
    state: PassState,
    alone: Run,
    together: Run,
    differ: Callable[[Values, Values], bool],
) -> None:
    """Refuse a model whose passes see each other; warn about a loss that is never the same.

    Args:
        state: Identifies the running pass.
        alone: Runs the first pass alone.
        together: Runs all passes in lockstep.
        differ: Returns whether the first losses of two runs differ.

    Raises:
        UnsupportedModel: The first pass computes other values in lockstep than alone. The message
            names the first module that does.
    """
    with outputs_of_first_pass(lambda: state.running) as first:
        values = alone()
    with outputs_of_first_pass(lambda: state.running) as second:
        again = alone()
    with outputs_of_first_pass(lambda: state.running) as mixed:
        beside = together()
    if differ(values, again) or not differ(values, beside):
        logger.warning(
            "the loss differs from call to call with the same weights, first %s: losses at "
            "+eps and -eps are compared, so the function must use the same data and random "
            "numbers in all calls of a step (kernels that are not deterministic matter less)",
            _first_difference(model, first, second),
        )
        return
    raise UnsupportedModel(
        "the first forward pass of a step gives another loss beside the others than alone, first "
        f"{_first_difference(model, first, mixed)}: something that a forward leaves behind for "
        "later code, such as a list that a hook fills, is shared by the passes. Keep it on the "
        "module that makes it (self.name = value), where each pass has its own"
    )


@contextmanager
def outputs_of_first_pass(
    running: Callable[[], object] = lambda: None,
) -> Iterator[list[tuple[nn.Module, int]]]:
    """Collect modules and checksums of their outputs, in the first pass that runs.

    Args:
        running: Returns the pass that is running. By default all code counts as one pass.
    """
    found: list[tuple[nn.Module, int]] = []
    first: list[object] = []

    # A hook on all modules, not on each: what those hold would belong to the passes.
    def note(module: nn.Module, args: Any, output: Any) -> None:
        first[:] = first or [running()]
        if running() is first[0]:
            found.append((module, _checksum(output)))

    handle = nn.modules.module.register_module_forward_hook(note)
    try:
        yield found
    finally:
        handle.remove()


def _checksum(output: Any) -> int:
    value = 0
    for leaf in torch.utils._pytree.tree_leaves(output):
        if isinstance(leaf, Tensor) and leaf.layout is torch.strided:
            data = leaf.detach().cpu().contiguous().view(-1).view(torch.uint8)
            value = zlib.crc32(data.numpy().tobytes(), value)
    return value


def _first_difference(
    model: nn.Module, some: list[tuple[nn.Module, int]], others: list[tuple[nn.Module, int]]
) -> str:
    names = {module: name for name, module in model.named_modules()}
    for (module, value), (other, other_value) in zip(some, others, strict=False):
        if module is not other or value != other_value:
            return f"in module {names.get(module) or type(module).__name__!r}"
    return "in the loss function, after all modules computed the same"
