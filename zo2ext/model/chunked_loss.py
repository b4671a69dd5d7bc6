"""Compute the loss of a causal language model from a few rows of its logits at a time.

The loss of transformers makes two float32 arrays of the size of the logits. With 2048 tokens and a
vocabulary of 128 thousand these are more than two GB, several times the memory of a streamed
model's blocks. This loss makes pieces of some ten MB instead.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

CHUNK = 2**23  # logits per piece, held in float32 and as log-probabilities


def chunk_loss(model: nn.Module) -> None:
    """Make `model` compute its loss from a few rows of its logits at a time.

    The loss is the same mean over tokens, summed in float64. It is at least as accurate, but its
    last bits differ.

    Args:
        model: Model to change in place. If its ``loss_function`` is transformers' own for causal
            language models, it is replaced, also in models inside it (below an adapter, for
            example). Other losses are left alone.

    Example:
        >>> zo2ext.chunk_loss(model)
        >>> loss = model(input_ids=tokens, labels=tokens).loss
    """
    for module in _with_full_loss(model):
        module.loss_function = causal_lm_loss


def needs_all_logits(model: nn.Module) -> bool:
    """Return whether `chunk_loss` would change anything."""
    return next(_with_full_loss(model), None) is not None


def _with_full_loss(model: nn.Module) -> Iterator[Any]:
    """Yield `model` and models inside it whose loss is transformers' own for causal LMs."""
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
    """Return the mean cross-entropy of the next tokens, as transformers' ``ForCausalLMLoss`` does.

    Args:
        logits: Logits, shape ``(..., tokens, vocab_size)``.
        labels: Tokens, shape ``(..., tokens)``; `ignore_index` for those to leave out.
        vocab_size: Size of the vocabulary.
        num_items_in_batch: Divisor of the sum; None: the number of tokens that are not left out.
        ignore_index: Label of tokens to leave out.
        shift_labels: The token that follows each token, instead of `labels`.

    Returns:
        A float32 scalar on the device of `logits`, queued and not waited for. It is NaN if all
        tokens are left out and `num_items_in_batch` is None.

    Raises:
        ValueError: Labels are missing, or their number differs from that of the rows of logits.
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
