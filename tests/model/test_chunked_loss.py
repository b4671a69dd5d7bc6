"""The chunked loss is the mean cross-entropy of the next tokens, whatever the chunks."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numeric import assert_same_bits
from tiny_models import batches, tiny
from torch import Tensor
from transformers.loss.loss_utils import ForCausalLMLoss

import zo2ext
from zo2ext.model import chunked_loss
from zo2ext.model.chunked_loss import causal_lm_loss, chunk_loss, needs_all_logits


def exact(logits: Tensor, targets: Tensor) -> Tensor:
    """In float64, from the definition."""
    wide = logits.double().reshape(-1, logits.shape[-1])
    likely = wide.gather(1, targets.reshape(-1, 1).clamp(min=0))[:, 0] - wide.logsumexp(-1)
    return -likely[targets.reshape(-1) >= 0].sum()


@settings(deadline=None)
@given(
    sizes=st.tuples(st.integers(1, 3), st.integers(2, 9), st.integers(1, 40)),
    chunk=st.integers(1, 400),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    ignored=st.floats(0, 0.9),
    seed=st.integers(0, 1000),
)
def test_it_is_the_loss(
    sizes: tuple[int, int, int], chunk: int, dtype: torch.dtype, ignored: float, seed: int
) -> None:
    batch, tokens, vocabulary = sizes
    torch.manual_seed(seed)
    logits = (3 * torch.randn(sizes)).to(dtype)
    labels = torch.randint(vocabulary, (batch, tokens))
    labels[torch.rand(batch, tokens) < ignored] = -100
    shifted = torch.nn.functional.pad(labels, (0, 1), value=-100)[:, 1:]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(chunked_loss, "CHUNK", chunk)
        found = causal_lm_loss(logits, labels, vocabulary)
        by_items = causal_lm_loss(logits, labels, vocabulary, num_items_in_batch=7)
        by_tensor = causal_lm_loss(
            logits, None, vocabulary, torch.tensor(7), shift_labels=shifted, unknown=1
        )
    total, count = exact(logits, shifted), (shifted >= 0).sum()
    # Each row's log-sum-exp of float32 logits errs by some units in the last place of its parts.
    torch.testing.assert_close(found.double(), total / count, rtol=1e-6, atol=3e-6, equal_nan=True)
    torch.testing.assert_close(by_items.double(), total / 7, rtol=1e-6, atol=3e-6)
    assert_same_bits(by_items, by_tensor)
    usual = ForCausalLMLoss(logits, labels, vocabulary)
    torch.testing.assert_close(found, usual, rtol=1e-5, atol=1e-5, equal_nan=True)


def test_wrong_labels_are_refused() -> None:
    with pytest.raises(ValueError, match="got neither labels nor shift_labels"):
        causal_lm_loss(torch.zeros(1, 4, 8), None, 8)
    with pytest.raises(ValueError, match="each of the 4 rows of logits, got 3"):
        causal_lm_loss(torch.zeros(1, 4, 8), torch.zeros(1, 3, dtype=torch.long), 8)


@pytest.mark.parametrize("name", ["opt", "llama-tied", "mixtral", "gpt2"])
def test_models_of_transformers_take_it(name: str) -> None:
    model = tiny(name)
    (batch,) = batches(name, 1)
    with torch.no_grad():
        usual = model(**batch).loss
        assert needs_all_logits(model)
        chunk_loss(model)
        assert not needs_all_logits(model)
        found = model(**batch).loss
    torch.testing.assert_close(found, usual, rtol=1e-5, atol=1e-6)


def test_a_loss_of_ones_own_is_left() -> None:
    model: Any = tiny("llama")
    model.loss_function = lambda **_: torch.zeros(())
    (batch,) = batches("llama", 1)
    chunk_loss(model)
    assert float(model(**batch).loss) == 0
    zo2ext.chunk_loss(torch.nn.Linear(3, 3))


def test_models_beneath_an_adapter_take_it() -> None:
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(tiny("llama"), peft.LoraConfig(target_modules=["q_proj"]))
    chunk_loss(model)
    assert model.get_base_model().loss_function is causal_lm_loss
