"""Checkpoints as others publish them: loaded as transformers does, or refused by name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from engine_runs import saved
from numeric import assert_same_bits
from safetensors.torch import load_file, save_file

import zo2ext
from zo2ext.errors import UserError

CONFIG = zo2ext.ZOConfig(device="cpu")
INDEX = "model.safetensors.index.json"


def load(folder: Path) -> dict[str, torch.Tensor]:
    model, zo = zo2ext.load(folder, CONFIG)
    with zo:
        return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def edit_header(file: Path, **entries: Any) -> None:
    """Add entries to the header of a safetensors file, each of 8 bytes at the file's end."""
    data = file.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header, tensors = json.loads(data[8 : 8 + length]), data[8 + length :]
    for name, dtype in entries.items():
        offsets = [len(tensors), len(tensors) + 8]
        header[name] = {
            "dtype": dtype,
            "shape": [8 // SIZES.get(dtype, 1)],
            "data_offsets": offsets,
        }
        tensors += bytes(8)
    text = json.dumps(header).encode()
    file.write_bytes(len(text).to_bytes(8, "little") + text + tensors)


SIZES = {"U64": 8, "U32": 4, "U16": 2, "C64": 8}


@pytest.mark.parametrize(
    "name", ["../out.safetensors", "/out.safetensors", "a/b.safetensors", ".."]
)
def test_an_index_that_leaves_its_folder_is_refused(tmp_path: Path, name: str) -> None:
    folder = saved(tmp_path / "model", "llama")
    index = json.loads((folder / INDEX).read_text())
    index["weight_map"]["model.norm.weight"] = name
    (folder / INDEX).write_text(json.dumps(index))
    with pytest.raises(UserError, match=f"{INDEX} names '{name}': expected files of its own"):
        zo2ext.load(folder, CONFIG)


def test_links_out_of_the_folder_are_refused_but_those_of_the_hubs_cache(tmp_path: Path) -> None:
    folder = saved(tmp_path / "models--a--b" / "snapshots" / "1", "llama", shard="1GB")
    expected, file = load(folder), folder / "model.safetensors"
    blobs = folder.parent.parent / "blobs"
    blobs.mkdir()
    file.rename(blobs / "0123")
    file.symlink_to("../../blobs/0123")
    for name, tensor in load(folder).items():
        assert_same_bits(tensor, expected[name], name)
    (tmp_path / "link").symlink_to(folder)
    assert load(tmp_path / "link").keys() == expected.keys()
    (blobs / "0123").rename(tmp_path / "secret")
    file.unlink()
    file.symlink_to(tmp_path / "secret")
    with pytest.raises(UserError, match=r"model\.safetensors is a link to '.*secret', outside"):
        zo2ext.load(folder, CONFIG)


@pytest.mark.parametrize("dtype", ["U32", "U16", "U64", "C64", "F8_E8M0", "F4", "F6_E2M3", "NEW"])
def test_tensors_that_the_model_does_not_use_may_have_any_dtype(tmp_path: Path, dtype: str) -> None:
    folder = saved(tmp_path / "model", "llama", shard="1GB")
    expected = load(folder)
    edit_header(folder / "model.safetensors", codes=dtype)
    for name, tensor in load(folder).items():
        assert_same_bits(tensor, expected[name], name)


def test_an_unknown_dtype_of_a_weight_is_named(tmp_path: Path) -> None:
    folder = saved(tmp_path / "model", "llama", shard="1GB")
    edit_header(folder / "model.safetensors", **{"model.norm.weight": "F6_E2M3"})
    with pytest.raises(UserError, match=r"dtype of model\.norm\.weight, F6_E2M3, cannot be read"):
        zo2ext.load(folder, CONFIG)


def test_a_tensor_may_be_in_several_shards_if_it_is_the_same(tmp_path: Path) -> None:
    folder = saved(tmp_path / "model", "llama")
    expected, files = load(folder), sorted(folder.glob("*.safetensors"))
    one, other = load_file(files[0]), load_file(files[1])
    name = next(iter(one))
    save_file(other | {name: one[name]}, files[1], {"format": "pt"})
    assert_same_bits(load(folder)[name], expected[name], name)
    save_file(other | {name: one[name] + 1}, files[1], {"format": "pt"})
    with pytest.raises(UserError, match=f"{name} in .* differs from that in"):
        zo2ext.load(folder, CONFIG)


def test_an_adapter_is_not_passed_over(tmp_path: Path) -> None:
    folder = saved(tmp_path / "model", "llama")
    (folder / "adapter_config.json").write_text("{}")
    with pytest.raises(UserError, match=r"has an adapter .* beside its weights; expected a model"):
        zo2ext.load(folder, CONFIG)
    (folder / "config.json").unlink()
    with pytest.raises(UserError, match=r"without a config\.json: it has an adapter; load it with"):
        zo2ext.load(folder, CONFIG)
