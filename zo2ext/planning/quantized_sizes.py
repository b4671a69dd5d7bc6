"""Sizes of a quantized checkpoint's weights, read from the headers of its files.

No quantization library is needed: a weight that the files do not contain as it is in the model
consists of whatever else they contain for its module.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from zo2ext.checkpoints.pretrained import as_user_errors, raise_if_any

_PLAIN = ("F64", "F32", "F16", "BF16")  # dtypes, in headers, of weights that are not quantized


class StoredWeight(Tensor):
    """A quantized weight on the meta device: shape and dtype of the weight, and its stored bytes.

    It flattens like torchao's weights (see `zo2ext.model.quantized`), into one tensor of bytes per
    tensor in the files.
    """

    @staticmethod
    def __new__(cls, like: Tensor, sizes: Iterable[int]) -> StoredWeight:
        made: StoredWeight = Tensor._make_wrapper_subclass(
            cls, like.shape, dtype=like.dtype, device=torch.device("meta")
        )
        return made

    def __init__(self, like: Tensor, sizes: Iterable[int]) -> None:
        self.sizes = tuple(sizes)
        for index, nbytes in enumerate(self.sizes):
            setattr(self, f"bytes{index}", torch.empty(nbytes, dtype=torch.uint8, device="meta"))

    def __tensor_flatten__(self) -> tuple[list[str], torch.dtype]:
        return [f"bytes{index}" for index in range(len(self.sizes))], self.dtype

    @classmethod
    def __tensor_unflatten__(
        cls, inner: dict[str, Tensor], context: torch.dtype, shape: torch.Size, stride: object
    ) -> StoredWeight:
        like = torch.empty(shape, dtype=context, device="meta")
        return cls(like, [tensor.nbytes for tensor in inner.values()])

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]  # torch does not declare a class method
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func is not torch.ops.aten.detach.default:
            raise NotImplementedError(f"{func} of a weight without values")
        return cls(args[0], args[0].sizes)


class StoredTensor(NamedTuple):
    """A tensor in a file: its elements, its bytes, and whether it has a dtype of plain weights."""

    numel: int
    nbytes: int
    plain: bool


def stored_tensors(source: str) -> dict[str, StoredTensor]:
    """Return the tensors in the weight files of a folder or hub name, by name; reads headers only.

    Raises:
        ValueError: There are no safetensors files, or they cannot be read.
    """
    from huggingface_hub import get_local_safetensors_metadata, get_safetensors_metadata

    read = get_local_safetensors_metadata if Path(source).is_dir() else get_safetensors_metadata
    with as_user_errors(
        f"model {source!r} is quantized, and only the headers of its weight files have its sizes"
    ):
        files = read(source).files_metadata.values()
    return {
        name: StoredTensor(
            t.parameter_count, t.data_offsets[1] - t.data_offsets[0], t.dtype in _PLAIN
        )
        for file in files
        for name, t in file.tensors.items()
    }


def put_stored_weights(model: Any, stored: Mapping[str, StoredTensor]) -> None:
    """Replace the quantized weights of `model` (on the meta device) by frozen `StoredWeight`s.

    Raises:
        ValueError: `stored` has nothing for some weights; the message names them.
    """
    stored = _by_own_name(model, stored)
    plain = {
        name: id(parameter)
        for name, parameter in model.named_parameters(remove_duplicate=False)
        if name in stored and stored[name].plain and stored[name].numel == parameter.numel()
    }
    kept = set(plain.values())
    missing: dict[str, list[nn.Parameter]] = {}  # by the name of their module
    for name, parameter in model.named_parameters():
        if id(parameter) not in kept:
            missing.setdefault(name.rpartition(".")[0], []).append(parameter)
    instead: dict[str, list[StoredTensor]] = {name: [] for name in missing}
    for name, tensor in stored.items():
        owner = next((prefix for prefix in _prefixes(name) if prefix in missing), None)
        if owner is not None and name not in plain:
            instead[owner].append(tensor)
    raise_if_any(
        [name for name, tensors in instead.items() if not tensors],
        "the model is quantized and its files have no tensors for the weights of",
    )
    made: dict[int, nn.Parameter] = {}
    for name, parameters in missing.items():
        tensors = instead[name]
        numel = sum(parameter.numel() for parameter in parameters)
        if all(t.plain for t in tensors) and sum(t.numel for t in tensors) == numel:
            continue  # not quantized, only divided differently, such as experts
        sizes = [t.nbytes for t in tensors]
        for parameter in parameters:  # the first of a module's weights stands for all its bytes
            made[id(parameter)] = nn.Parameter(StoredWeight(parameter, sizes), requires_grad=False)
            sizes = [0]
    for module in model.modules():
        for name, parameter in module._parameters.items():
            module._parameters[name] = made.get(id(parameter), parameter)


def _by_own_name(model: Any, stored: Mapping[str, StoredTensor]) -> dict[str, StoredTensor]:
    """Return `stored` by the names that the tensors have, or would have, in `model`."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightRenaming, rename_source_key

    renamings = [t for t in get_model_conversion_mapping(model) if isinstance(t, WeightRenaming)]
    modules = {name for name, _ in model.named_modules() if name}
    base = model.base_model_prefix
    found = {}
    for key, tensor in stored.items():
        name, _ = rename_source_key(key, renamings, [])
        # The names of a base model lack the prefix that it has inside a larger one, or vice versa.
        spellings = (name, f"{base}.{name}", name.removeprefix(f"{base}."))
        own = max(
            spellings, key=lambda n: max((len(p) for p in _prefixes(n) if p in modules), default=0)
        )
        found[own] = tensor
    return found


def _prefixes(name: str) -> Iterator[str]:
    """Yield the names of the modules around `name`, the innermost first."""
    while name:
        name = name.rpartition(".")[0]
        yield name
