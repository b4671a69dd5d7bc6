"""Calling an offloaded model as usual, before any training step or without training at all."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from numeric import assert_same_bits
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn.attention.flex_attention import flex_attention
from transformers import LlamaConfig, LlamaForCausalLM, MambaConfig, MambaForCausalLM

import zo2ext

peft = pytest.importorskip("peft")

X = torch.linspace(-1, 1, 32).view(2, 4, 4)
DEVICES = ["cpu", "simulated"]


class Attends(nn.Module):
    """A parent that uses its child's weights without calling the child."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.attention(x, x, x, need_weights=False)[0]
        return out


class Late(nn.Module):
    """Weights that are looked up before another module runs, and used after it."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)


class LateWeight(Late):
    def forward(self, x: Tensor) -> Tensor:
        weight = self.first.weight
        return self.second(x) @ weight


class LateView(Late):
    def forward(self, x: Tensor) -> Tensor:
        view = self.first.weight.t()
        return self.second(x) @ view


class LateData(Late):
    def forward(self, x: Tensor) -> Tensor:
        weights = {name: p.data for name, p in self.named_parameters()}
        return self.second(x) @ self.first.weight + weights["first.bias"]


class Keeper(nn.Linear):
    """Leaves a view of its weights behind, which later code uses."""

    def forward(self, x: Tensor) -> Tensor:
        self.view = self.weight.t()
        return super().forward(x)


class LateLeftView(Late):
    def __init__(self) -> None:
        super().__init__()
        self.first = Keeper(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x)) @ self.first.view


class TwoLate(Late):
    """Which one function uses together."""

    def forward(self, x: Tensor) -> Tensor:
        a, b = self.first.weight, self.second.weight
        return torch.einsum("bti,ij,jk->btk", x, a, b)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("train", [False, True])
@pytest.mark.parametrize("make", [Attends, LateWeight, LateView, LateData, TwoLate])
def test_a_weight_that_is_used_late(make: type[nn.Module], train: bool, device: str) -> None:
    torch.manual_seed(0)
    model = make().eval()
    plain = copy.deepcopy(model)
    config = zo2ext.ZOConfig(lr=1e-2, granularity="module", device=device)
    with zo2ext.offload(model, config, train=train) as zo, torch.no_grad():
        for _ in range(2):
            assert_same_bits(model(X), plain(X))
        if train:
            zo.step(lambda: model(X).square().mean())
    with torch.no_grad():
        after = model(X)
    with zo2ext.offload(model, config, train=False), torch.no_grad():
        assert_same_bits(model(X), after)


@pytest.mark.parametrize("device", DEVICES)
def test_what_cannot_be_opened_any_more_is_an_error_once(device: str) -> None:
    torch.manual_seed(0)
    model = LateLeftView()
    plain = copy.deepcopy(model)
    with zo2ext.offload(model, zo2ext.ZOConfig(device=device), train=False), torch.no_grad():
        with pytest.raises(zo2ext.LateRead, match=r"first.*call the model again"):
            model(X)
        assert_same_bits(model(X), plain(X))


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("train", [False, True])
def test_torchs_encoder_computes_what_its_fast_path_does(train: bool) -> None:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(4, 2, 8, batch_first=True)
    model = nn.TransformerEncoder(layer, 2).eval()
    padding = torch.tensor([[False, False, False, True]]).expand(2, 4)
    plain = copy.deepcopy(model)
    with zo2ext.offload(model, zo2ext.ZOConfig(lr=0.0, device="cpu"), train=train) as zo:
        with torch.no_grad():
            expected = plain(X, src_key_padding_mask=padding)
            assert_same_bits(model(X, src_key_padding_mask=padding), expected)
        if train:
            seen: list[Tensor] = []
            for _ in range(2):
                zo.step(lambda: seen.append(model(X, src_key_padding_mask=padding)) or 0.0)
            assert {tuple(out.shape) for out in seen} == {tuple(expected.shape)}
            assert all(bool((out[:, 3:] == 0).all()) for out in seen)  # padding, in all passes


class Flexible(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.key, self.query = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        heads = [layer(x)[:, None] for layer in (self.query, self.key)]
        out: Tensor = flex_attention(*heads, x[:, None])
        return out


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_flex_attention() -> None:
    torch.manual_seed(0)
    model = Flexible()
    with torch.no_grad():
        expected = model(X)
        with zo2ext.offload(model, zo2ext.ZOConfig(lr=0.0, device="cpu")) as zo:
            assert_same_bits(model(X), expected)
            for _ in range(2):
                zo.step(lambda: model(X).square().mean())


class Interrupted(Late):
    interrupted = False

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        if self.interrupted:
            raise KeyboardInterrupt
        return self.second(x)


@pytest.mark.parametrize("inside", [False, True], ids=["between", "inside"])
@pytest.mark.parametrize("device", DEVICES)
def test_an_interrupted_forward_leaves_nothing_open(device: str, inside: bool) -> None:
    """torch calls no hook for it."""
    torch.manual_seed(0)
    model = Interrupted()
    plain = copy.deepcopy(model)

    def interrupt(*args: Any) -> None:
        raise KeyboardInterrupt

    with zo2ext.offload(model, zo2ext.ZOConfig(lr=0.0, device=device)) as zo, torch.no_grad():
        model.interrupted = not inside
        handle = model.second.register_forward_pre_hook(interrupt) if inside else None
        with pytest.raises(KeyboardInterrupt):
            model(X)
        model.interrupted = False
        if handle is not None:
            handle.remove()
        assert_same_bits(model.state_dict()["first.weight"], plain.first.weight)
        zo.step(lambda: model(X).mean())
        assert_same_bits(model(X), plain(X))
        assert not torch.utils._python_dispatch._get_current_dispatch_mode_stack()


@pytest.mark.parametrize("granularity", ["block", "module"])
def test_generation_before_any_step(granularity: str) -> None:
    """Decoding a token reads other weights late than the prompt does."""
    torch.manual_seed(0)
    size = {"vocab_size": 64, "hidden_size": 16, "num_hidden_layers": 2, "state_size": 4}
    model = MambaForCausalLM(MambaConfig(**size, pad_token_id=0)).eval()
    ids = torch.tensor([[5, 6, 7, 8]])
    options = {"max_new_tokens": 5, "do_sample": False}
    expected = model.generate(ids, **options)
    config = zo2ext.ZOConfig(device="cpu", granularity=granularity)
    with zo2ext.offload(model, config, train=False):
        assert torch.equal(model.generate(ids, **options), expected)


def llama() -> Any:
    torch.manual_seed(0)
    size = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2}
    return LlamaForCausalLM(LlamaConfig(**size, vocab_size=64, num_attention_heads=4)).eval()


def test_adapters_that_use_weights_late() -> None:
    config = peft.AdaLoraConfig(
        target_modules=["q_proj"], init_r=4, target_r=2, total_step=20, task_type="CAUSAL_LM"
    )
    model = peft.get_peft_model(llama(), config).eval()
    ids = torch.arange(20).view(2, 10)
    with torch.no_grad():
        expected = model(input_ids=ids, labels=ids).loss
        with zo2ext.offload(model, zo2ext.ZOConfig(lr=1e-2, device="cpu")):
            assert_same_bits(model(input_ids=ids, labels=ids).loss, expected)


@pytest.mark.parametrize("device", DEVICES)
def test_an_adapter_that_is_saved_while_it_is_offloaded(tmp_path: Path, device: str) -> None:
    """PEFT collects the parameters of this one by attribute, and saves them later."""
    config = peft.MultitaskPromptTuningConfig(
        num_virtual_tokens=3, num_tasks=2, task_type="CAUSAL_LM"
    )
    model = peft.get_peft_model(llama(), config)
    model.save_pretrained(tmp_path / "plain")
    with zo2ext.offload(model, zo2ext.ZOConfig(lr=1e-2, device=device)):
        model.save_pretrained(tmp_path / "offloaded")
    expected = load_file(tmp_path / "plain/adapter_model.safetensors")
    found = load_file(tmp_path / "offloaded/adapter_model.safetensors")
    assert found.keys() == expected.keys()
    for name, values in expected.items():
        assert_same_bits(found[name], values, name)
