"""A short name for a model's weights, to tell whether a run began with these."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from zo2ext.streaming.stores.sources import Source

Sources = Callable[[nn.Parameter], Iterable[Source]]
_PIECES, _PIECE_NBYTES = 16, 4096


def describe(model: nn.Module, sources: Sources) -> dict[str, Any]:
    """What a journal's header says of the starting weights, as JSON values.

    ``fingerprint``, and ``tensors``: by name, the id, shape, dtype and whether it is trained.

    Args:
        sources: Where a parameter's values are; several places where it is quantised.
    """
    tensors = {
        name: [i, list(p.shape), str(p.dtype), p.requires_grad]
        for i, (name, p) in enumerate(model.named_parameters())
    }
    return {"fingerprint": fingerprint(model, sources), "tensors": tensors}


def fingerprint(model: nn.Module, sources: Sources) -> str:
    """32 hexadecimal digits of the parameters' names, shapes, dtypes and a sample of their bytes.

    Of each parameter 16 pieces of 4 KiB are read, evenly spread, so that a model of any size takes
    seconds. Another training run differs in nearly every weight, and so in the sample.

    Args:
        model: Tied parameters count once.
        sources: As for `describe`.

    Source:
        BLAKE2b, RFC 7693.
    """
    digest = hashlib.blake2b(digest_size=16)
    for name, parameter in model.named_parameters():
        digest.update(f"{name} {tuple(parameter.shape)} {parameter.dtype}\n".encode())
        for piece in (p for source in sources(parameter) for p in _pieces(source)):
            digest.update(piece.numpy().tobytes())
    return digest.hexdigest()


def digest(parts: Iterable[bytes]) -> str:
    """16 hexadecimal digits of `parts`, one after the other. Source: BLAKE2b, RFC 7693."""
    whole = hashlib.blake2b(digest_size=8)
    for part in parts:
        whole.update(part)
    return whole.hexdigest()


def _pieces(source: Source) -> Iterator[Tensor]:
    numel, itemsize = source.shape.numel(), source.dtype.itemsize
    count = _PIECE_NBYTES // itemsize
    if numel <= _PIECES * count:
        starts = range(0, numel, count)
    else:
        starts = range(0, numel - count + 1, (numel - count) // (_PIECES - 1))
    for start in starts:
        piece = torch.empty(min(count, numel - start), dtype=source.dtype)
        source.read(start, piece)
        yield piece.view(torch.uint8)
