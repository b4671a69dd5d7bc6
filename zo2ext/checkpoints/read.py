"""Builds a model whose weights stay in safetensors files until a store reads them.

transformers builds the model twice with ``from_pretrained``: first from meta tensors, which shows
what becomes of the checkpoint's names, shapes and dtypes; then from *stand-ins*, tensors of one
element expanded to any shape, which gives it real buffers, ties and settings. The store reads the
weights themselves, one tensor at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from copy import deepcopy
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from zo2ext.checkpoints.file_tensors import FileTensor, is_equal
from zo2ext.checkpoints.folders import ADAPTER_FILE, check_index, check_link, refuse_adapter
from zo2ext.checkpoints.pretrained import check_loading, raise_if_any
from zo2ext.errors import UserError
from zo2ext.streaming.stores.sources import Extent, Source


def weight_files(source: str) -> list[Path]:
    """Return the weight files of a folder or hub name, downloading the latter."""
    from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME
    from transformers.utils.hub import cached_file, get_checkpoint_shard_files

    missing = {
        "_raise_exceptions_for_missing_entries": False,
        "_raise_exceptions_for_connection_errors": False,
    }
    if cached_file(source, ADAPTER_FILE, **missing) is not None:
        refuse_adapter(source)
    single = cached_file(source, SAFE_WEIGHTS_NAME, **missing)
    if single is not None:
        check_link(Path(single))
        return [Path(single)]
    index = cached_file(source, SAFE_WEIGHTS_INDEX_NAME, **missing)
    if index is None:
        raise UserError(f"there is neither {SAFE_WEIGHTS_NAME} nor {SAFE_WEIGHTS_INDEX_NAME}")
    check_index(Path(index))
    files, _ = get_checkpoint_shard_files(source, index)
    for file in files:
        check_link(Path(file))
    return [Path(file) for file in files]


def concrete_class(model_class: Any, settings: Any) -> Any:
    """Return the model's own class, which an auto class determines from the settings."""
    if isinstance(model_class, type) and issubclass(model_class, nn.Module):
        return model_class
    with torch.device("meta"):
        return type(model_class.from_config(settings, trust_remote_code=False))


@dataclass(frozen=True)
class HollowModel:
    """A model without weights, and the sources of its weights in the files.

    Attributes:
        model: The model, on the meta device.
        info: Missing and mismatched weights, as transformers reports them.
        sources: Source of every parameter and persistent buffer, by name; tied ones have one name.
    """

    model: Any
    info: Mapping[str, Any]
    sources: Mapping[str, Source]

    def check(self, source: str) -> None:
        check_loading(source, self.info)

    def build(self, own_class: Any, settings: Any, source: str) -> Any:
        """Return the model with stand-ins for weights, and everything else real."""
        tied = list(self.model.all_tied_weights_keys)
        buffers = {name for name, _ in self.model.named_buffers()}
        state = {
            # Weights that could be tied, but are not, need stand-ins that differ.
            name: _tensor(values) if name in buffers else _stand_in(values, name in tied)
            for name, values in self.sources.items()
        }
        model, info = own_class.from_pretrained(
            None,
            config=deepcopy(settings),
            state_dict=state,
            dtype=self.model.dtype,
            output_loading_info=True,
        )
        raise_if_any(info["missing_keys"], f"model {source!r} lacks weights")
        model.config.name_or_path = source
        model._weight_conversions = self.model._weight_conversions  # to save it in the same form
        if model.can_generate():
            model.generation_config = _generation_config(source)
        return model


def read_hollow(own_class: Any, settings: Any, files: Mapping[str, FileTensor]) -> HollowModel:
    """Return the model of a checkpoint with these tensors, without reading them."""
    from transformers.conversion_mapping import get_model_conversion_mapping

    hollow, info = own_class.from_pretrained(
        None,
        config=deepcopy(settings),
        state_dict={n: _meta(tensor) for n, tensor in files.items() if not tensor.unknown},
        device_map={"": "meta"},
        dtype="auto",
        ignore_mismatched_sizes=True,  # `check` names them
        output_loading_info=True,
    )
    sources: dict[str, Source] = {}
    state = hollow.state_dict()
    transforms = get_model_conversion_mapping(hollow)
    for name, mapping in _mappings(hollow, transforms, files).items():
        if isinstance(mapping, FileTensor):
            sources[name] = mapping.as_dtype(state[name].dtype)
        else:
            sources |= mapping.targets(state)
    for name, other in hollow.all_tied_weights_keys.items():
        if name in sources and other in sources and is_equal(sources[name], sources[other]):
            del sources[name]  # tied, and in the checkpoint twice
    return HollowModel(hollow, info, sources)


def _generation_config(source: str) -> Any:
    from transformers import GenerationConfig

    try:
        return GenerationConfig.from_pretrained(source)
    except OSError:  # it has no file of its own
        return GenerationConfig.from_pretrained(source, "config.json", _from_model_config=True)


def _meta(tensor: FileTensor) -> Tensor:
    return torch.empty(tensor.shape, dtype=tensor.stored, device="meta")


def _stand_in(source: Source, value: bool) -> Tensor:
    return torch.tensor(value, dtype=source.dtype).expand(source.shape)


def _tensor(source: Source) -> Tensor:
    values = torch.empty(source.shape, dtype=source.dtype)
    source.read(0, values.view(-1))
    return values


def _mappings(
    hollow: Any, transforms: list[Any], files: Mapping[str, FileTensor]
) -> dict[str, FileTensor | Conversion]:
    """Return each weight's file tensor, or the conversion that makes it, by name in the model.

    The rules are those of transformers' ``convert_and_load_state_dict_in_model``.
    """
    from transformers.core_model_loading import (
        WeightConverter,
        WeightRenaming,
        dot_natural_key,
        rename_source_key,
    )

    renamings = [t for t in transforms if isinstance(t, WeightRenaming)]
    converters = [t for t in transforms if isinstance(t, WeightConverter)]
    of_pattern = {pattern: c for c in converters for pattern in c.source_patterns}
    state, prefix = hollow.state_dict(), hollow.base_model_prefix
    found: dict[str, FileTensor | Conversion] = {}
    for key in sorted(files, key=dot_natural_key):
        name, pattern = rename_source_key(key, renamings, converters, prefix, state)
        if name not in state and key in state:
            name, pattern = rename_source_key(key, [], [], prefix, state)
        if name not in state:
            continue
        if files[key].unknown:
            raise UserError(f"the dtype of {key}, {files[key].unknown}, cannot be read")
        if pattern is None:
            found.setdefault(name, files[key])
            continue
        conversion = found.setdefault(name, Conversion(hollow, name, of_pattern[pattern]))
        assert isinstance(conversion, Conversion), name
        conversion.parts.append((key, pattern, files[key]))
    return found


class Conversion:
    """File tensors that transformers converts to one or several weights, such as fused experts.

    The latest result is cached, since its weights are mostly in one unit.
    """

    _latest: ClassVar[tuple[Conversion, dict[str, Tensor]] | None] = None

    def __init__(self, hollow: Any, name: str, converter: Any) -> None:
        self.parts: list[tuple[str, str, FileTensor]] = []
        self._hollow, self._name, self._converter = hollow, name, converter

    def targets(self, state: Mapping[str, Tensor]) -> dict[str, Source]:
        self.parts = [(k, p, t.as_dtype(state[self._name].dtype)) for k, p, t in self.parts]
        return {
            name: _Converted(self, name, values.shape, state[name].dtype)
            for name, values in self._run(_meta).items()
        }

    def tensor(self, name: str) -> Tensor:
        if Conversion._latest is None or Conversion._latest[0] is not self:
            Conversion._latest = None  # free it first
            Conversion._latest = (self, self._run(FileTensor.tensor))
        return Conversion._latest[1][name]

    @staticmethod
    def forget() -> None:
        Conversion._latest = None

    def _run(self, read: Callable[[FileTensor], Tensor]) -> dict[str, Tensor]:
        converter = deepcopy(self._converter)
        for key, pattern, tensor in self.parts:
            converter.add_tensor(self._name, key, pattern, partial(read, tensor))
        made = converter.convert(self._name, model=self._hollow, config=self._hollow.config)
        return {n: v[0] if isinstance(v, list) else v for n, v in made.items()}


@dataclass(frozen=True)
class _Converted:
    """One weight that a conversion makes; a `Source`."""

    conversion: Conversion
    name: str
    shape: torch.Size
    dtype: torch.dtype

    def read(self, begin: int, out: Tensor) -> None:
        values = self.conversion.tensor(self.name).to(self.dtype).reshape(-1)
        out.copy_(values[begin : begin + out.numel()])

    def extent(self, dtype: torch.dtype) -> Extent | None:
        return None
