"""A sample of the sweep in `models.py`, and what of a model's ways it relies on."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import reference
import torch
import torch.nn.functional as F
import transformers
from models import KINDS, SETTINGS, WAYS, batches, check, make_model
from numeric import assert_same_bits
from small_configs import LENGTH, small_model
from sweep_report import Outcome, Sweep, summary, write

import zo2ext
from zo2ext.engine import check as comparison

SAMPLE = {
    "causal": """
        bloom cohere2 deepseek_v2 deepseek_v3 falcon gemma2 gemma3_text gemma3n_text gpt2 gpt_neox
        gpt_oss gptj hrm_text lfm2 llama mamba mamba2 minimax mistral mixtral mpt olmo2 olmoe opt
        phi3 qwen2_moe qwen3 qwen3_moe qwen3_next recurrent_gemma rwkv stablelm
    """.split(),
    "classification": """
        albert bart bert deberta-v2 distilbert electra funnel llama modernbert perceiver xlnet
    """.split(),
    "seq2seq": """
        bart encoder-decoder led m2m_100 marian mbart pegasus prophetnet switch_transformers t5
    """.split(),
}
IN_EVERY_WAY = [
    ("causal", "gemma3_text"),
    ("causal", "mixtral"),
    ("classification", "bert"),
    ("seq2seq", "bart"),
]


@pytest.mark.filterwarnings("ignore:Version v4.12.0 introduces:FutureWarning")  # encoder-decoder
@pytest.mark.parametrize(("kind", "name"), [(k, n) for k, names in SAMPLE.items() for n in names])
def test_streamed_equals_plain(kind: str, name: str) -> None:
    found = check(kind, name)
    assert found.verdict == "equal", found


@pytest.mark.parametrize("way", sorted(WAYS.keys() - {"own"}))
@pytest.mark.parametrize(("kind", "name"), IN_EVERY_WAY)
def test_every_way_of_running_a_forward(kind: str, name: str, way: str) -> None:
    found = check(kind, name, way_name=way)
    assert found.verdict == "equal", found


@pytest.mark.parametrize("name", ["mixtral", "qwen2_moe", "qwen3_moe", "olmoe"])
def test_router_losses_are_part_of_the_loss(name: str) -> None:
    """Of the loss that `test_streamed_equals_plain` compares."""
    model = make_model(KINDS["causal"], name)
    (batch,) = batches(KINDS["causal"], model, 1)
    output = model(**batch)
    alone = F.cross_entropy(output.logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten())
    assert output.aux_loss > 0
    torch.testing.assert_close(output.loss, alone + model.router_aux_loss_coef * output.aux_loss)
    assert output.loss > alone


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Compute in one thread: several share out the products of experts by their rows."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("name", ["mistral", "gemma2", "gemma3_text", "gpt_oss"])
@pytest.mark.usefixtures("one_thread")
def test_sequences_are_longer_than_the_window(name: str) -> None:
    kind = KINDS["causal"]
    logits = {}
    for window in (4, LENGTH):
        model = small_model(getattr(transformers, kind.names[name]), name, sliding_window=window)
        (batch,) = batches(kind, model, 1)
        logits[window] = model(**batch).logits
    assert_same_bits(logits[4][:, :4], logits[LENGTH][:, :4])
    assert not torch.equal(logits[4][:, 4:], logits[LENGTH][:, 4:])


def test_layers_that_share_all_weights_are_visited_several_times() -> None:
    model = make_model(KINDS["classification"], "albert")
    visits = []
    (group,) = model.albert.encoder.albert_layer_groups
    group.register_forward_hook(lambda *_: visits.append(1))
    (batch,) = batches(KINDS["classification"], model, 1)
    model(**batch)
    assert len(visits) == model.config.num_hidden_layers == 3


@pytest.mark.parametrize(("kind", "name"), [("causal", "gpt2"), ("seq2seq", "t5")])
def test_train_mode_drops(kind: str, name: str) -> None:
    """So that equality in train mode means that both forwards of a step drop the same."""
    model = make_model(KINDS[kind], name)
    (batch,) = batches(KINDS[kind], model, 1)
    assert model(**batch).loss == model(**batch).loss
    model.train()
    assert model(**batch).loss != model(**batch).loss


@pytest.mark.parametrize(("kind", "name"), [("causal", "llama"), ("seq2seq", "t5")])
def test_gradient_checkpointing_has_no_effect(kind: str, name: str) -> None:
    losses = []
    for way in ("train", "checkpointing"):
        model = make_model(KINDS[kind], name)
        WAYS[way].prepare(model)
        torch.manual_seed(2)
        with zo2ext.offload(model, zo2ext.ZOConfig(device="simulated", **SETTINGS)) as zo:
            for batch in batches(KINDS[kind], model):
                losses.append(zo.step(lambda batch=batch: model(**batch).loss))
    assert losses[:2] == losses[2:]


@pytest.mark.parametrize(
    ("kind", "name"),
    [("causal", "gemma3_text"), ("causal", "gpt2"), ("causal", "mamba"), ("seq2seq", "bart")],
)
def test_caches_and_generation_between_steps(kind: str, name: str) -> None:
    """Steps with and without a cache have one reference; what is generated is of their weights."""
    model, plain = make_model(KINDS[kind], name), make_model(KINDS[kind], name)
    data = batches(KINDS[kind], plain)

    def loss(model: Any, batch: dict[str, Any], *, use_cache: bool = False) -> torch.Tensor:
        value: torch.Tensor = model(**batch, use_cache=use_cache).loss
        return value

    first = reference.mezo(plain, data[:1], loss=loss, **SETTINGS)
    both = reference.mezo(plain, data, loss=loss, **SETTINGS)
    plain.load_state_dict(first.weights, strict=False)
    plain.tie_weights()
    wanted = {"max_new_tokens": 5, "do_sample": False, "use_cache": True}
    prompt = data[0]["input_ids"][:, :4]
    with zo2ext.offload(model, zo2ext.ZOConfig(device="simulated", **SETTINGS)) as zo:
        for step, batch in enumerate(data):
            zo.step(lambda batch=batch, on=step == 1: loss(model, batch, use_cache=on))
            assert zo.last is not None
            losses = (zo.last.losses_plus[0], zo.last.losses_minus[0])
            assert losses == both.losses[step][0], f"step {step}"
            if step == 0:
                expected = plain.generate(prompt, **wanted)
                assert torch.equal(model.generate(prompt, **wanted), expected)


# the sweep itself


def test_a_checkpoint_of_ones_own(tmp_path: Any) -> None:
    make_model(KINDS["causal"], "llama").save_pretrained(tmp_path)
    found = check("causal", str(tmp_path))
    assert found.verdict == "equal", found


def test_what_cannot_be_compared_is_told_apart() -> None:
    assert check("causal", "musicgen").verdict == "not run"
    assert check("causal", "reformer", way_name="train").detail.startswith("two plain runs")
    assert check("seq2seq", "switch_transformers", way_name="sdpa").verdict == "unsupported"


def test_other_bits_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = comparison.plain_run

    def other(model: Any, data: Any, config: zo2ext.ZOConfig, loss: Any) -> comparison.Run:
        return plain(model, data, config.replace(seed=4), loss)

    monkeypatch.setattr(comparison, "plain_run", other)
    assert check("causal", "gpt2").verdict == "differs"


@pytest.mark.parametrize(("kind", "name"), [("causal", "mixtral"), ("classification", "bert")])
def test_plain_runs_are_those_of_the_reference(kind: str, name: str) -> None:
    """The loop in zo2ext uses the kernels of zo2ext; the reference shares nothing with them."""
    model = make_model(KINDS[kind], name)
    data = batches(KINDS[kind], model)
    found = comparison.plain_run(model, data, zo2ext.ZOConfig(device="cpu", **SETTINGS))
    expected = reference.mezo(model, data, **SETTINGS)
    assert [[pair] for pair in found.losses] == expected.losses
    for parameter, weights in expected.weights.items():
        assert_same_bits(found.weights[parameter], weights, parameter)


def test_the_page(tmp_path: Any) -> None:
    odd = Outcome("odd", "not built", "E: a | <b>")
    sweeps = [
        Sweep("causal", "own", [Outcome("opt", "equal"), odd]),
        Sweep("causal", "sdpa", [Outcome("opt", "fails", "why"), odd]),
    ]
    assert summary(sweeps).splitlines()[2:] == [
        "| causal | own | 2 | 1 | 0 | 0 | 0 | 1 | 0 |",
        "| causal | sdpa | 2 | 0 | 0 | 1 | 0 | 1 | 0 |",
    ]
    write(tmp_path / "page.md", sweeps)
    page = (tmp_path / "page.md").read_text()
    assert "| causal | odd | own, sdpa | not built: E: a \\| &lt;b> |" in page
    assert "| causal | opt | sdpa | fails: why |" in page
    assert "**causal**: ." in page  # a type that fails in one way is not called equal
