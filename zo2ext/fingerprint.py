"""A short name for a model's weights, to tell whether a run began with these."""

from __future__ import annotations

import hashlib
from typing import Any

import torch
from torch import Tensor, nn

_PIECES, _PIECE_NBYTES = 16, 4096


def describe(model: nn.Module) -> dict[str, Any]:
    """What a journal's header says of the starting weights, as JSON values.

    ``fingerprint``, and ``tensors``: by name, the id, shape, dtype and whether it is trained.
    """
    tensors = {
        name: [i, list(p.shape), str(p.dtype), p.requires_grad]
        for i, (name, p) in enumerate(model.named_parameters())
    }
    return {"fingerprint": fingerprint(model), "tensors": tensors}


def fingerprint(model: nn.Module) -> str:
    """32 hexadecimal digits of the parameters' names, shapes, dtypes and a sample of their bytes.

    Of each parameter 16 pieces of 4 KiB are read, evenly spread, so that a model of any size takes
    seconds. Another training run differs in nearly every weight, and so in the sample.

    Args:
        model: Its parameters on the CPU, tied ones counted once.

    Source:
        BLAKE2b, RFC 7693.
    """
    digest = hashlib.blake2b(digest_size=16)
    for name, parameter in model.named_parameters():
        digest.update(f"{name} {tuple(parameter.shape)} {parameter.dtype}\n".encode())
        for piece in _pieces(parameter.data):
            digest.update(piece.numpy().tobytes())
    return digest.hexdigest()


def _pieces(values: Tensor) -> list[Tensor]:
    flat = values.detach().reshape(-1)
    count = _PIECE_NBYTES // max(flat.element_size(), 1)
    if flat.numel() <= _PIECES * count:
        starts = range(0, flat.numel(), count)
    else:
        starts = range(0, flat.numel() - count + 1, (flat.numel() - count) // (_PIECES - 1))
    return [flat[i : i + count].contiguous().view(torch.uint8) for i in starts]
