"""A digest of a model's weights, to recognize the ones that a run started from."""

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
    """Describe the starting weights for a journal's header, as JSON values.

    ``tensors`` has each parameter's id, shape, dtype and whether it is trained, by name.

    Args:
        sources: Returns the sources of a parameter's values; several if it is quantized.
    """
    tensors = {
        name: [i, list(p.shape), str(p.dtype), p.requires_grad]
        for i, (name, p) in enumerate(model.named_parameters())
    }
    return {"fingerprint": fingerprint(model, sources), "tensors": tensors}


def fingerprint(model: nn.Module, sources: Sources) -> str:
    """Return 32 hexadecimal digits for the parameters' names, shapes, dtypes and some bytes.

    Only 16 evenly spread pieces of 4 KiB are read per parameter, so that it takes seconds for any
    model. Another training run changes nearly every weight, and so these as well.
    Source: BLAKE2b, RFC 7693.
    """
    digest = hashlib.blake2b(digest_size=16)
    for name, parameter in model.named_parameters():
        digest.update(f"{name} {tuple(parameter.shape)} {parameter.dtype}\n".encode())
        for piece in (p for source in sources(parameter) for p in _pieces(source)):
            digest.update(piece.numpy().tobytes())
    return digest.hexdigest()


def digest(parts: Iterable[bytes]) -> str:
    """Return 16 hexadecimal digits for the concatenated `parts`. Source: BLAKE2b, RFC 7693."""
    blake = hashlib.blake2b(digest_size=8)
    for part in parts:
        blake.update(part)
    return blake.hexdigest()


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
