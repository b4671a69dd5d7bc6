"""The loss of a causal language model, a few rows of its logits at a time.

The loss that transformers comes with makes two float32 arrays of the size of the logits: at 2048
tokens and 128 thousand words more than two GB, several times what the blocks of a streamed model
take. This one makes pieces of some ten MB instead.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

CHUNK = 2**23  # logits at a time; in float32, and once more as log-probabilities


def chunk_loss(model: nn.Module) -> None:
    """Let `model` compute its loss from a few rows of its logits at a time.

    The loss is the same mean over tokens, summed in float64: as good or better to the last digits
    of float32, but other bits.

    Args:
        model: Its ``loss_function`` is replaced, also that of models within it (beneath an adapter,
            say), where that is transformers' own for causal language models. Any other is left.
    """
    for module in _with_whole_loss(model):
        module.loss_function = causal_lm_loss


def takes_whole_logits(model: nn.Module) -> bool:
    """Whether `chunk_loss` would change anything."""
    return next(_with_whole_loss(model), None) is not None


def _with_whole_loss(model: nn.Module) -> Iterator[Any]:
    """The models at or within `model` whose loss is transformers' own for causal LMs."""
    from transformers import PreTrainedModel
    from transformers.loss.loss_utils import ForCausalLMLoss

    for module in model.modules():
        if not isinstance(module, PreTrainedModel) or module.get_output_embeddings() is None:
            continue
        if module.loss_function is ForCausalLMLoss:
            yield module


def causal_lm_loss(
    logits: Tensor,
    labels: Tensor | None,
    vocab_size: int,
    num_items_in_batch: Tensor | int | None = None,
    ignore_index: int = -100,
    shift_labels: Tensor | None = None,
    **_: Any,
) -> Tensor:
    """Mean cross-entropy of the next tokens; in place of transformers' ``ForCausalLMLoss``.

    Args:
        logits: Shape ``(..., tokens, vocab_size)``.
        labels: Shape ``(..., tokens)``: each token itself, or `ignore_index` where it does not
            count.
        num_items_in_batch: What the sum is divided by; None: the tokens that count.
        shift_labels: Instead of `labels`, the token that comes after each.

    Returns:
        A float32 scalar on the device of `logits`, queued and not waited for; NaN where no token
        counts and `num_items_in_batch` is None.

    Raises:
        ValueError: There are no labels, or not one for each row of logits.
    """
    if shift_labels is None:
        if labels is None:
            raise ValueError("labels are needed for a loss, got neither labels nor shift_labels")
        shift_labels = F.pad(labels, (0, 1), value=ignore_index)[..., 1:]
    rows = logits.reshape(-1, vocab_size)
    targets = shift_labels.reshape(-1).to(rows.device)
    if len(rows) != len(targets):
        raise ValueError(
            f"labels must be one for each of the {len(rows)} rows of logits, got {len(targets)}"
        )
    each = max(CHUNK // vocab_size, 1)
    losses = [
        F.cross_entropy(piece.float(), target, ignore_index=ignore_index, reduction="none")
        for piece, target in zip(rows.split(each), targets.split(each), strict=True)
    ]
    total = torch.cat(losses).sum(dtype=torch.float64)
    count: Any = num_items_in_batch
    if count is None:
        count = (targets != ignore_index).sum()
    elif isinstance(count, Tensor):
        count = count.to(rows.device)
    mean: Tensor = total / count
    return mean.float()
