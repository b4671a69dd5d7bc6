"""`load` gives what `from_pretrained` and `offload` give, in little memory."""

from __future__ import annotations

import json
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from engine_runs import assert_same_run, saved, trained, usual
from numeric import assert_same_bits
from safetensors.torch import load_file, save_file
from tiny_models import CASES, batches, tiny

import zo2ext

FAMILIES = ["opt", "llama-tied", "qwen3_moe", "mixtral", "deepseek_v3", "llama-seqcls", "gpt_neox"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("name", FAMILIES)
def test_load_equals_from_pretrained(tmp_path: Path, name: str, dtype: torch.dtype) -> None:
    folder = saved(tmp_path / "model", name, dtype)
    assert len(list(folder.glob("*.safetensors"))) > 1
    settings = {"lr": 1e-2, "device": "simulated"}
    auto = CASES[name][0]
    model, zo = zo2ext.load(folder, zo2ext.ZOConfig(**settings), model_class=auto)
    plain = auto.from_pretrained(folder)
    assert type(model) is type(plain)
    assert not model.training
    assert model.config.to_dict() == plain.config.to_dict()
    assert [(n, p.shape, p.dtype) for n, p in model.named_parameters()] == [
        (n, p.shape, p.dtype) for n, p in plain.named_parameters()
    ]
    buffers = dict(plain.named_buffers())
    assert buffers.keys() == dict(model.named_buffers()).keys()
    for key, buffer in model.named_buffers():
        assert_same_bits(buffer, buffers[key], key)
    assert_same_run(trained(model, zo, name), usual(folder, name, **settings))


def test_storage_is_rounded_from_the_models_dtype(tmp_path: Path) -> None:
    folder = saved(tmp_path / "model", "llama", torch.float32)
    settings = json.loads((folder / "config.json").read_text()) | {"dtype": "bfloat16"}
    (folder / "config.json").write_text(json.dumps(settings))
    config = {"lr": 1e-2, "device": "cpu", "storage": torch.float16}
    model, zo = zo2ext.load(folder, zo2ext.ZOConfig(**config))
    assert model.dtype is torch.bfloat16
    assert_same_run(trained(model, zo, "llama"), usual(folder, "llama", **config))


@pytest.mark.parametrize("equal", [True, False])
def test_tied_weights_that_are_there_twice(tmp_path: Path, equal: bool) -> None:
    folder = saved(tmp_path / "model", "llama-tied", shard="1GB")
    weights = load_file(folder / "model.safetensors")
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"] * (1 if equal else 2)
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    config = {"lr": 1e-2, "device": "cpu"}
    model, zo = zo2ext.load(folder, zo2ext.ZOConfig(**config))
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == equal
    assert_same_run(trained(model, zo, "llama-tied"), usual(folder, "llama-tied", **config))


def test_journals_of_both_are_of_one_run(tmp_path: Path) -> None:
    folder = saved(tmp_path / "model", "mixtral")
    config = zo2ext.ZOConfig(lr=1e-2, device="cpu")
    plain = CASES["mixtral"][0].from_pretrained(folder)
    with zo2ext.offload(plain, config, journal=tmp_path / "journal") as zo:
        for batch in batches("mixtral", 3):
            zo.step(lambda batch=batch: plain(**batch).loss)
    model, zo = zo2ext.load(folder, config)
    with zo:
        assert zo.keep_journal(tmp_path / "journal") == 3
        state = model.state_dict()
        for name, values in plain.state_dict().items():
            assert_same_bits(state[name], values, name)


def test_saved_again_as_it_came(tmp_path: Path) -> None:
    folder = saved(tmp_path / "model", "mixtral", shard="1GB")
    _, zo = zo2ext.load(folder, zo2ext.ZOConfig(device="cpu"))
    with zo:
        zo.save_pretrained(tmp_path / "again")
    one, other = (load_file(f / "model.safetensors") for f in (folder, tmp_path / "again"))
    assert one.keys() == other.keys()
    for name, values in one.items():
        assert_same_bits(other[name], values, name)


def test_missing_and_mismatched_weights_are_named(tmp_path: Path) -> None:
    folder = saved(tmp_path / "model", "llama", shard="1GB")
    file = folder / "model.safetensors"
    weights = load_file(file)
    save_file({k: v for k, v in weights.items() if "1.mlp.up" not in k}, file, {"format": "pt"})
    with pytest.raises(ValueError, match=r"lacks weights: model\.layers\.1\.mlp\.up_proj\.weight"):
        zo2ext.load(folder)
    save_file(weights | {"model.norm.weight": torch.ones(5)}, file, {"format": "pt"})
    with pytest.raises(ValueError, match=r"other shapes .* model\.norm\.weight \(5,\)"):
        zo2ext.load(folder)


def test_damaged_files_are_named(tmp_path: Path) -> None:
    folder = saved(tmp_path / "model", "llama", shard="1GB")
    file = folder / "model.safetensors"
    content = file.read_bytes()
    for damaged, why in [
        (content[:-100], "not within the file"),
        (content[:20], "cut off"),
        (content[:9] + b"x" + content[10:], "damaged header"),
    ]:
        file.write_bytes(damaged)
        with pytest.raises(ValueError, match=rf"model\.safetensors .*{why}"):
            zo2ext.load(folder)
    file.unlink()
    with pytest.raises(ValueError, match="neither"):
        zo2ext.load(folder)


# -- memory

_MEASURED = """
    import sys, threading, time
    import torch, transformers, zo2ext
    from transformers import AutoModelForCausalLM

    def anonymous():
        lines = [x.split() for x in open("/proc/self/status")]
        return sum(int(x[1]) * 1024 for x in lines if x[0] in ("RssAnon:", "RssShmem:"))

    folder, way = sys.argv[1:]
    config = zo2ext.ZOConfig(device="cpu")
    def get(folder):
        if way == "load":
            return zo2ext.load(folder, config)
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)  # no mapped file
        return model, zo2ext.offload(model, config)

    warm, zo = get(folder + "-small")  # what is imported and started on the way is no weight
    zo.close()
    start, peak, done = anonymous(), 0, False
    def watch():
        global peak
        while not done:
            peak = max(peak, anonymous())
            time.sleep(0.001)
    watcher = threading.Thread(target=watch)
    watcher.start()
    model, zo = get(folder)
    done = True
    watcher.join()
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    print(weights, peak - start, zo._weights.store.host_nbytes)
"""


@pytest.mark.parametrize(
    ("way", "name"), [("load", "llama"), ("load", "qwen3_moe"), ("offload", "llama")]
)
def test_peak_memory_is_the_weights_once(tmp_path: Path, way: str, name: str) -> None:
    sizes = {"hidden_size": 512, "vocab_size": 4000, "head_dim": 128, "num_hidden_layers": 24}
    sizes |= {
        "llama": {"intermediate_size": 1536},
        "qwen3_moe": {"moe_intermediate_size": 128, "num_experts": 8},
    }[name]
    tiny(name, **sizes).save_pretrained(tmp_path / "model")
    saved(tmp_path / "model-small", name)
    out = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(_MEASURED), str(tmp_path / "model"), way],
        capture_output=True,
        text=True,
        timeout=300,
        check=True,
    ).stdout
    weights, peak, stored = map(int, out.split()[-3:])
    assert weights > 100e6
    assert stored <= peak <= 1.1 * weights, f"{peak / weights:.3f} times the weights"
