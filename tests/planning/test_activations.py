"""Activations counted from shapes are those of real forward passes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny_models import CASES, batches, tiny
from torch import Tensor, nn
from transformers import AutoConfig

import zo2ext
from zo2ext.planning.activations import (
    Activations,
    FusedAttention,
    LiveBytes,
    UncountableError,
    activation_counter,
    count_activations,
    estimate_activations,
)

MODELS = ["opt", "llama-tied", "gpt2", "qwen3", "mamba"]


def test_what_is_alive_is_counted() -> None:
    before = torch.randn(8, 256)  # 8 KiB
    with LiveBytes() as live:
        wide = torch.cat([before] * 4)  # 32
        assert live.now == 32 * 1024
        view = wide.view(-1)[:10]
        view.add_(1)
        assert live.now == 32 * 1024, "views and changes in place take nothing"
        small = before[:, :1].clone()  # 32 bytes, in a block of 512
        assert live.now == 32 * 1024 + 512
        del wide
        assert live.now == 32 * 1024 + 512, "the view keeps it"
        del view
        assert live.now == 512
    assert live.peak == 32 * 1024 + 512
    assert small.shape == (8, 1)


def made(name: str, dtype: torch.dtype = torch.float32, **config: Any) -> Any:
    auto, model_type, case = CASES[name]
    model = auto.from_config(AutoConfig.for_model(model_type, **(case | config)), dtype=dtype)
    return model.eval()


class Blocks(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(256, 256) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = torch.relu(layer(x))
        return x.sum()


def test_a_pass_by_hand() -> None:
    def run(model: nn.Module) -> Tensor:
        out: Tensor = model(torch.ones(8, 256))
        return out

    # Each is 8 KiB. At a block: the batch, and the block's input; within, also what the layer makes
    # and then what the activation function makes of that.
    assert count_activations(Blocks, run) == Activations(peak=4 * 8192, waiting=2 * 8192)
    assert Activations(5, 3).in_lockstep(4) == 14


@pytest.mark.parametrize("name", MODELS)
def test_real_passes_take_what_was_counted(name: str) -> None:
    model = made(name, use_cache=False)
    batch = batches(name, 1)[0]

    def run(model: Any) -> Any:
        return model(**batch).loss

    found = count_activations(lambda: made(name, use_cache=False), run)
    with torch.no_grad(), LiveBytes() as live, FusedAttention():
        run(model)
    # Without values nobody sees that a mask masks nothing; it is made, then.
    assert live.peak <= found.peak <= 1.02 * live.peak
    assert 0 < found.waiting < found.peak


def test_keys_values_and_whole_logits_count() -> None:
    def peak(use_cache: bool, chunked: bool) -> int:
        def build() -> nn.Module:
            model: nn.Module = made("llama", torch.bfloat16, vocab_size=20_000, use_cache=use_cache)
            if chunked:
                zo2ext.chunk_loss(model)
            return model

        ids = torch.zeros(4, 1000, dtype=torch.long)
        return count_activations(build, lambda model: model(input_ids=ids, labels=ids).loss).peak

    numel = 4 * 1000 * 20_000
    whole = peak(use_cache=False, chunked=False)
    assert whole > (2 + 4 + 4) * numel  # logits, and twice as many float32 for the loss
    assert peak(use_cache=True, chunked=False) > whole
    assert peak(use_cache=False, chunked=True) < 3.3 * numel


def test_what_depends_on_values_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    class Choosy(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x if float(x.sum()) > 0 else -x

    with pytest.raises(UncountableError, match="DataDependent"):
        count_activations(Choosy, lambda model: model(torch.ones(3)))


def test_an_estimate_is_of_the_right_size() -> None:
    config: Any = tiny("llama", vocab_size=5000).config
    exact = activation_counter(config, batch_size=2, seq_len=64)(torch.bfloat16)
    assert exact is not None
    rough = estimate_activations(config, 2 * 64, torch.bfloat16)
    assert exact.peak / 2 < rough.peak < 2 * exact.peak


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["opt", "llama-tied"])
def test_a_gpu_takes_what_was_counted(name: str) -> None:
    sizes = {"hidden_size": 512, "num_hidden_layers": 4, "vocab_size": 20_000}
    sizes["max_position_embeddings"] = 1024
    model = made(name, torch.bfloat16, **sizes, use_cache=False).to("cuda")
    ids = torch.zeros(4, 1000, dtype=torch.long, device="cuda")

    def run() -> Any:
        return model(input_ids=ids, labels=ids).loss

    with torch.no_grad():
        run()  # workspaces of libraries stay
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        taken = torch.cuda.max_memory_allocated() - before
    ids = ids.cpu()
    found = count_activations(
        lambda: made(name, torch.bfloat16, **sizes, use_cache=False),
        lambda model: model(input_ids=ids, labels=ids).loss,
    )
    assert taken == pytest.approx(found.peak, rel=0.1)
