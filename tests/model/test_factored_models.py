"""Whole models that read tensors of factors; a sample of the sweep in `factored_models.py`."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from factored_models import Float64, compare, reading, stand_ins
from models import KINDS, WAYS, batches, make_model
from sweep_report import Outcome, factored_table, write, write_factored
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm

from zo2ext.model.factored import Factored

SAMPLE = {
    "causal": """
        bloom deepseek_v3 falcon gemma3_text gpt2 gpt_neox gpt_oss llama mixtral mpt opt phi3
        qwen3_moe qwen3_next rwkv
    """.split(),
    "classification": "albert bert deberta-v2 distilbert modernbert".split(),
    "seq2seq": "bart m2m_100 prophetnet switch_transformers t5".split(),
}


@pytest.mark.parametrize(("kind", "name"), [(k, n) for k, names in SAMPLE.items() for n in names])
def test_models_never_make_a_matrix_dense(kind: str, name: str) -> None:
    found = compare(kind, name)
    assert (found.verdict, found.detail) == ("factored", ""), found


@pytest.mark.parametrize(
    ("kind", "name", "operation"), [("causal", "mamba", "exp"), ("classification", "xlnet", "add")]
)
def test_models_that_do_something_else(kind: str, name: str, operation: str) -> None:
    found = compare(kind, name)
    assert (found.verdict, found.detail) == ("dense", operation), found


@pytest.mark.parametrize("experts", ["batched_mm", "grouped_mm"])
@pytest.mark.parametrize("name", ["mixtral", "gpt_oss"])
def test_products_of_experts(name: str, experts: str) -> None:
    found = compare("causal", name, dtype=torch.float32, experts=experts)
    assert (found.verdict, found.detail) == ("factored", ""), found


@pytest.mark.parametrize("way", sorted(WAYS.keys() - {"own"}))
@pytest.mark.parametrize("name", ["gpt2", "gemma3_text"])
def test_every_way_of_running_a_forward(name: str, way: str) -> None:
    model = make_model(KINDS["causal"], name).requires_grad_(False)
    (batch,) = batches(KINDS["causal"], model, 1)
    WAYS[way].prepare(model)
    stands = stand_ins(model, terms=2)
    losses = []
    for now in (stands, {key: nn.Parameter(w.dense()) for key, w in stands.items()}, {}):
        torch.manual_seed(2)
        with reading(model, now):
            losses.append(WAYS[way].loss(model, batch).item())
    found, dense, plain = losses
    # In bfloat16, an output is rounded twice: a product, and the sum with that of the factors.
    near = (0.2 if way == "autocast" else 1e-3) * abs(dense - plain)
    assert found == pytest.approx(dense, rel=0, abs=near)


@pytest.mark.parametrize("name", ["gpt2", "gemma3_text"])
@torch.no_grad()
def test_several_passes_at_once(name: str) -> None:
    model = make_model(KINDS["causal"], name).double()
    model.set_attn_implementation("eager")  # torch has no rule for the other, and warns
    (batch,) = batches(KINDS["causal"], model, 1)
    stands = stand_ins(model)

    def loss(scale: Tensor) -> Tensor:
        scaled = {
            key: Factored(w.base, [(u * scale, v) for u, v in w.terms]) for key, w in stands.items()
        }
        with reading(model, scaled), Float64():
            value: Tensor = model(**batch).loss
        return value

    scales = torch.tensor([1.0, -1.0, 0.5], dtype=torch.float64)
    joined = torch.func.vmap(loss, randomness="same")(scales)
    torch.testing.assert_close(joined, torch.stack([*map(loss, scales)]), rtol=1e-12, atol=0)


class Model(nn.Module):
    """A module with matrices, and a number that depends on all elements of its first output."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def loss(self, *inputs: Tensor) -> float:
        output = self.module(*inputs)
        first: Tensor = output[0] if isinstance(output, tuple) else output
        return first.sin().mean().item()


def with_and_without_factors(model: Model, *inputs: Tensor) -> list[float]:
    """Losses of `model` with its weights as they are, with dense sums, and with factors."""
    stands = stand_ins(model)
    assert stands
    losses = []
    for now in ({}, {key: nn.Parameter(w.dense()) for key, w in stands.items()}, stands):
        with reading(model, now):
            losses.append(model.loss(*inputs))
    return losses


@pytest.mark.parametrize(
    ("module", "inputs"),
    [
        (nn.MultiheadAttention(8, 2), 3),
        (nn.TransformerEncoderLayer(8, 2, 16, batch_first=True).eval(), 1),
        (weight_norm(nn.Linear(8, 6)), 1),
        (nn.Conv1d(5, 7, 8), 1),
        (nn.Bilinear(8, 8, 6), 2),
        (nn.LSTM(8, 8), 1),
    ],
    ids=lambda x: type(x).__name__ if isinstance(x, nn.Module) else "",
)
@torch.no_grad()
def test_modules_of_torch(module: nn.Module, inputs: int) -> None:
    x = torch.arange(80, dtype=torch.float64).sin().view(2, 5, 8)
    plain, dense, found = with_and_without_factors(Model(module.double()), *[x] * inputs)
    assert found == pytest.approx(dense, rel=1e-12, abs=0)
    assert abs(dense - plain) > 1e-6


class Bypass(nn.Linear):
    """A module that reads its weight otherwise than by its name."""

    def forward(self, x: Tensor) -> Tensor:
        return x @ next(self.parameters())


@torch.no_grad()
def test_a_parameter_that_is_read_past_its_module_shows() -> None:
    x = torch.arange(80, dtype=torch.float64).sin().view(2, 5, 8)
    assert math.isnan(with_and_without_factors(Model(Bypass(8, 8).double()), x)[2])


def test_logits_that_differ_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    dense = Factored.dense
    monkeypatch.setattr(Factored, "dense", lambda self: 1.001 * dense(self))
    assert compare("causal", "gpt2").verdict == "differs"


def test_the_section_of_the_page(tmp_path: Any) -> None:
    page = tmp_path / "page.md"
    found = {"causal": [Outcome("opt", "factored"), Outcome("odd", "dense", "a | <b>")]}
    assert factored_table(found).splitlines()[2:] == ["| causal | 2 | 1 | 1 | 0 | 0 | 0 | 0 |"]
    write(page, [])
    without = page.read_text()
    for _ in range(2):
        write_factored(page, found)
        write(page, [])
        before, _, rest = page.read_text().partition("## Factored directions\n")
        section, _, after = rest.partition("## A model of your own\n")
        assert "| causal | dense | a \\| &lt;b> | odd |" in section
        assert f"{before}## A model of your own\n{after}" == without
