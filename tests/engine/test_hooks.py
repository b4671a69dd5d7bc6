"""Traps of running unmodified forwards in lockstep; each once gave wrong losses."""

from __future__ import annotations

import contextvars
import copy
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import reference
import torch
import torch.nn.functional as F
from numeric import assert_same_bits
from safetensors.torch import load_file
from tiny_models import VOCABULARY, batches, tiny
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter
from transformers import AutoModelForCausalLM

import zo2ext

SETTINGS = {"lr": 1e-2, "eps": 1e-3, "seed": 5}
Loss = Callable[[nn.Module, dict[str, Any]], Tensor]


def assert_equals_reference(
    model: nn.Module, data: list[dict[str, Any]], loss: Loss, *, plain: nn.Module | None = None
) -> zo2ext.ZOEngine:
    """Steps on the simulated device have the losses and weights of the plain loop."""
    expected = reference.mezo(plain or copy.deepcopy(model), data, loss=loss, **SETTINGS)
    with zo2ext.offload(model, zo2ext.ZOConfig(device="simulated", **SETTINGS)) as zo:
        for step, batch in enumerate(data):
            zo.step(lambda batch=batch: loss(model, batch))
            assert zo.last is not None
            assert (zo.last.losses_plus[0], zo.last.losses_minus[0]) == expected.losses[step][0]
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert_same_bits(parameter.data, expected.weights[name], name)
    return zo


def ordinary(model: nn.Module, batch: dict[str, Any]) -> Tensor:
    loss: Tensor = model(**batch).loss
    return loss


# 1. parameters read outside of their module's forward


def test_head_read_by_the_loss() -> None:
    def fused(model: Any, batch: dict[str, Any]) -> Tensor:
        hidden = model.model(batch["input_ids"]).last_hidden_state
        logits = F.linear(hidden, model.lm_head.weight)
        return F.cross_entropy(logits[:, :-1].flatten(0, 1), batch["input_ids"][:, 1:].flatten())

    assert_equals_reference(tiny("llama"), batches("llama", 4), fused)


def test_head_read_first_and_used_last() -> None:
    def early(model: Any, batch: dict[str, Any]) -> Tensor:
        head = model.lm_head.weight
        hidden = model.model(batch["input_ids"]).last_hidden_state
        return F.linear(hidden, head).square().mean()

    assert_equals_reference(tiny("llama"), batches("llama", 4), early)


def test_weight_of_a_block_read_from_outside() -> None:
    def penalised(model: Any, batch: dict[str, Any]) -> Tensor:
        penalty = model.model.layers[1].mlp.down_proj.weight.square().mean()
        return ordinary(model, batch) + penalty

    assert_equals_reference(tiny("llama"), batches("llama", 4), penalised)


def test_view_taken_first_and_used_last() -> None:
    def early(model: Any, batch: dict[str, Any]) -> Tensor:
        head = model.lm_head.weight.t()[:, 3:]
        hidden = model.model(batch["input_ids"]).last_hidden_state
        return (hidden @ head).square().mean()

    assert_equals_reference(tiny("llama"), batches("llama", 4), early)


class Latents(nn.Module):
    """Begins with a view of a module's weights, which later layers read."""

    class Start(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.values = nn.Parameter(torch.randn(8))

        def forward(self, rows: int) -> dict[str, Tensor]:
            return {"whole": self.values.expand(rows, -1), "part": self.values[2:]}

    def __init__(self) -> None:
        super().__init__()
        self.start = self.Start()
        self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(5))

    def forward(self, x: Tensor) -> Tensor:
        start = self.start(len(x))
        for layer in self.layers:
            x = torch.tanh(layer(x))
        return x * start["whole"] + start["part"].sum()


def test_forwards_that_return_views_of_their_weights() -> None:
    data = vectors(4)
    assert_equals_reference(Latents(), data, mean_square)
    model = Latents()
    expected = model(**data[0])
    with zo2ext.offload(model, zo2ext.ZOConfig(device="simulated"), train=False):
        assert_same_bits(model(**data[0]), expected)


def test_parameters_captured_before_offloading() -> None:
    model = tiny("llama")
    captured = {id(model): model.lm_head.weight}
    twin = copy.deepcopy(model)
    captured[id(twin)] = twin.lm_head.weight

    def loss(model: Any, batch: dict[str, Any]) -> Tensor:
        hidden = model.model(batch["input_ids"]).last_hidden_state
        return F.linear(hidden, captured[id(model)]).square().mean()

    assert_equals_reference(model, batches("llama", 4), loss, plain=twin)


class ClassToken(nn.Module):
    """Owns a parameter itself, beside children that own others; reads it amid their forwards."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.randn(8))
        self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(3))
        self.unused = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = torch.tanh(layer(x * self.scale)) + self.scale
        return x


def mean_square(model: nn.Module, batch: dict[str, Any]) -> Tensor:
    output: Tensor = model(**batch)
    return output.square().mean()


def vectors(count: int) -> list[dict[str, Any]]:
    return [{"x": torch.randn(4, 8)} for _ in range(count)]


def test_parameters_of_containers_and_unused_ones() -> None:
    assert_equals_reference(ClassToken(), vectors(4), mean_square)


# 2. autocast keeps low-precision copies by the identity of the parameter


@pytest.mark.parametrize("where", ["inside", "outside"])
def test_autocast(where: str) -> None:
    model, plain = tiny("llama"), tiny("llama")
    data = batches("llama", 4)

    def cast(model: nn.Module, batch: dict[str, Any]) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return ordinary(model, batch)

    if where == "inside":
        assert_equals_reference(model, data, cast, plain=plain)
    else:
        expected = reference.mezo(plain, data, loss=cast, **SETTINGS)
        with zo2ext.offload(model, zo2ext.ZOConfig(device="simulated", **SETTINGS)) as zo:
            for step, batch in enumerate(data):
                with torch.autocast("cpu", torch.bfloat16):
                    zo.step(lambda batch=batch: ordinary(model, batch))
                assert zo.last is not None
                losses = (zo.last.losses_plus[0], zo.last.losses_minus[0])
                assert losses == expected.losses[step][0]
    assert not torch.is_autocast_enabled("cpu")


# 3. torch's state of the thread, which coroutines share


def test_thread_state_is_each_coroutines_own() -> None:
    seen: list[tuple[bool, bool]] = []

    class Moody(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(3))

        def forward(self, x: Tensor) -> Tensor:
            with torch.enable_grad(), torch.autocast("cpu", torch.bfloat16):
                x = self.layers[1](self.layers[0](x))
                seen.append((torch.is_grad_enabled(), torch.is_autocast_enabled("cpu")))
            seen.append((torch.is_grad_enabled(), torch.is_autocast_enabled("cpu")))
            return self.layers[2](x.float() + torch.rand(()) * 0)

    assert_equals_reference(Moody(), vectors(3), mean_square)
    assert seen == [(True, True), (False, False)] * (len(seen) // 2)
    assert torch.is_grad_enabled()
    assert not torch.is_autocast_enabled("cpu")


def test_random_state_after_a_step_is_that_of_one_call() -> None:
    model = tiny("opt", dropout=0.3).train()
    (batch,) = batches("opt", 1)
    torch.manual_seed(1)
    model(**batch)
    expected = torch.rand(3)
    torch.manual_seed(1)
    with zo2ext.offload(model, zo2ext.ZOConfig(device="cpu", directions=2)) as zo:
        zo.step(lambda: model(**batch).loss)
        assert torch.equal(torch.rand(3), expected)


def test_thread_state_after_a_step_that_fails_is_that_before_it() -> None:
    class Failing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(3))

        def forward(self, x: Tensor) -> Tensor:
            with torch.enable_grad(), torch.autocast("cpu", torch.bfloat16):
                x = self.layers[1](self.layers[0](x) + torch.rand(8))
                raise RuntimeError("broken model")

    model = Failing()
    with zo2ext.offload(model, zo2ext.ZOConfig(device="cpu")) as zo:
        before = torch.get_rng_state()
        with pytest.raises(RuntimeError, match="broken model"):
            zo.step(lambda: model(torch.ones(2, 8)).sum())
        assert torch.equal(torch.get_rng_state(), before)
    assert torch.is_grad_enabled()
    assert not torch.is_autocast_enabled("cpu")


# 4. context variables (transformers collects router logits through one)


def test_context_variables_are_each_coroutines_own() -> None:
    collected: contextvars.ContextVar[list[float]] = contextvars.ContextVar("collected")

    class Collecting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(3))

        def forward(self, x: Tensor) -> Tensor:
            token = collected.set([])
            for layer in self.layers:
                x = layer(x)
                collected.get().append(float(x.sum()))
            total = torch.tanh(x * sum(collected.get()) * len(collected.get()))
            collected.reset(token)
            return total

    assert_equals_reference(Collecting(), vectors(3), mean_square)


# 5. blocks compiled one by one


def test_compiled_blocks_are_compiled_once() -> None:
    """And for what they compute, not for what the gate does meanwhile."""
    layers = torch._dynamo.config.recompile_limit + 2

    def compiled() -> tuple[nn.Module, CompileCounter]:
        torch._dynamo.reset()
        model, counter = tiny("llama", num_hidden_layers=layers, use_cache=False), CompileCounter()
        zo2ext.compile_blocks(model, backend=counter)
        return model, counter

    (plain, expected), data = compiled(), batches("llama", 3)
    with torch.no_grad():
        plain(**data[0])
    model, counter = compiled()
    assert_equals_reference(
        model, data, ordinary, plain=tiny("llama", num_hidden_layers=layers, use_cache=False)
    )
    # Once for the engine's aligned weights, say; not once a block.
    assert counter.frame_count == expected.frame_count == 1
    assert counter.op_count == expected.op_count
    torch._dynamo.reset()


def test_what_compiled_code_computes_counts_from_the_first_step_on() -> None:
    """The check of the first step runs it uncompiled; other last bits there would be the run's."""

    def twice(graph: torch.fx.GraphModule, inputs: Any) -> Any:
        return lambda *args: tuple(2 * out for out in graph(*args))

    def run(device: str) -> list[float]:
        torch._dynamo.reset()
        model = tiny("opt", dropout=0.2).train()
        zo2ext.compile_blocks(model, backend=twice)
        torch.manual_seed(3)
        with zo2ext.offload(model, zo2ext.ZOConfig(device=device, lr=0.0)) as zo:
            return [zo.step(lambda: model(**batches("opt", 1)[0]).loss) for _ in range(3)]

    losses = run("cpu")
    assert losses == run("simulated")
    torch._dynamo.reset()
    model = tiny("opt", dropout=0.2).train()
    with zo2ext.offload(model, zo2ext.ZOConfig(device="cpu", lr=0.0)) as zo:
        torch.manual_seed(3)
        assert zo.step(lambda: model(**batches("opt", 1)[0]).loss) != losses[0]
    with pytest.raises(ValueError, match="no repeated blocks that could be compiled, got Linear"):
        zo2ext.compile_blocks(nn.Linear(3, 3))


# 6. tied and looped weights


class Looped(nn.Module):
    """One block visited three times, its weight tied to the head's, the head with a bias."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(8, 8)
        self.block = nn.Sequential(nn.Linear(8, 8), nn.Tanh())
        self.head = nn.Linear(8, 8)
        self.head.weight = self.block[0].weight

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        for _ in range(3):
            x = self.block(x)
        return self.head(x)


@pytest.mark.parametrize("write_back", [1, 3])
def test_looped_and_tied_weights_are_updated_once(write_back: int) -> None:
    model, data = Looped(), vectors(7)
    expected = reference.mezo(
        copy.deepcopy(model), data, loss=mean_square, write_back=write_back, **SETTINGS
    )
    config = zo2ext.ZOConfig(device="simulated", write_back=write_back, **SETTINGS)
    with zo2ext.offload(model, config) as zo:
        for batch in data:
            zo.step(lambda batch=batch: mean_square(model, batch))
    for name, parameter in model.named_parameters():
        assert_same_bits(parameter.data, expected.weights[name], name)


def test_data_dependent_paths_are_served_apart() -> None:
    """Coroutines that part ways still each get their own weights."""

    class Forked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(6))

        def forward(self, x: Tensor) -> Tensor:
            for i in range(0, 6, 2):
                first = self.layers[i](x)
                x = self.layers[i + 1](first) if str(float(first.sum()))[-1] in "02468" else first
            return x

    assert_equals_reference(Forked(), vectors(12), mean_square)


# 7. what people do with a model between steps


@pytest.fixture(params=["cpu", "simulated"])
def trained(request: pytest.FixtureRequest) -> Any:
    """A model under training with an update pending, its engine, and its true weights."""
    model, data = tiny("llama-tied"), batches("llama-tied", 3)
    expected = reference.mezo(tiny("llama-tied"), data, **SETTINGS).weights
    with zo2ext.offload(model, zo2ext.ZOConfig(device=request.param, **SETTINGS)) as zo:
        for batch in data:
            zo.step(lambda batch=batch: model(**batch).loss)
        yield model, zo, expected


def test_state_dict_and_save_pretrained(trained: Any, tmp_path: Path) -> None:
    model, _, expected = trained
    state = model.state_dict()
    for name, weights in expected.items():
        assert_same_bits(state[name], weights, name)
    assert state["lm_head.weight"].data_ptr() == state["model.embed_tokens.weight"].data_ptr()
    model.save_pretrained(tmp_path)
    plain = tiny("llama-tied")
    plain.load_state_dict(expected, strict=False)
    plain.tie_weights()
    plain.save_pretrained(tmp_path / "plain")
    saved = (tmp_path / "model.safetensors").read_bytes()
    assert saved == (tmp_path / "plain" / "model.safetensors").read_bytes()
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    for name, weights in expected.items():
        assert_same_bits(again.state_dict()[name], weights, name)


@pytest.mark.parametrize("changes", [{"storage": torch.bfloat16}, {"write_back": 4}], ids=str)
def test_tied_weights_are_saved_once(changes: dict[str, Any], tmp_path: Path) -> None:
    """Also where state_dict() has to show copies, not the stored weights themselves."""
    model = tiny("llama-tied")
    with zo2ext.offload(model, zo2ext.ZOConfig(device="simulated", **SETTINGS, **changes)) as zo:
        for batch in batches("llama-tied", 2):
            zo.step(lambda batch=batch: model(**batch).loss)
        state = model.state_dict()
        model.save_pretrained(tmp_path)
    assert state["lm_head.weight"] is state["model.embed_tokens.weight"]
    assert "lm_head.weight" not in load_file(tmp_path / "model.safetensors")


def test_calling_and_generating_between_steps(trained: Any) -> None:
    model, _, expected = trained
    plain = tiny("llama-tied")
    plain.load_state_dict(expected, strict=False)
    (batch,) = batches("llama-tied", 1)
    with torch.no_grad():
        assert_same_bits(model(**batch).logits, plain(**batch).logits)
    prompt = torch.tensor([[5, 6, 7], [8, 9, 10]])
    wanted = plain.generate(prompt, max_new_tokens=6, do_sample=False)
    assert torch.equal(model.generate(prompt, max_new_tokens=6, do_sample=False), wanted)


def test_reading_a_weight_by_name(trained: Any) -> None:
    model, _, expected = trained
    assert_same_bits(
        model.model.layers[0].mlp.up_proj.weight, expected["model.layers.0.mlp.up_proj.weight"]
    )


def test_loading_weights_between_steps(trained: Any) -> None:
    model, zo, _ = trained
    fresh = tiny("llama-tied", seed=9)
    model.load_state_dict(fresh.state_dict())
    (batch,) = batches("llama-tied", 1)
    with torch.no_grad():
        assert_same_bits(model(**batch).logits, fresh(**batch).logits)
    expected = reference.mezo(fresh, [batch], **{**SETTINGS, "lr": 0.0})
    zo.config.replace(lr=0.0)
    zo.step(lambda: model(**batch).loss, lr=0.0)
    for name, weights in model.state_dict().items():
        if name in expected.weights:
            assert_same_bits(weights, expected.weights[name], name)


def test_reading_changes_nothing_of_what_follows() -> None:
    finals = []
    for nosy in (False, True):
        for write_back in (1, 3):
            model = tiny("llama-tied").to(torch.bfloat16)
            config = zo2ext.ZOConfig(device="simulated", write_back=write_back, **SETTINGS)
            with zo2ext.offload(model, config) as zo:
                for batch in batches("llama-tied", 8):
                    zo.step(lambda batch=batch: model(**batch).loss)
                    if nosy:
                        model(**batch)
                        model.state_dict()
            finals.append({n: p.data.clone() for n, p in model.named_parameters()})
    for quiet, watched in zip(finals[:2], finals[2:], strict=True):
        for name in quiet:
            assert_same_bits(watched[name], quiet[name], name)


def test_a_copy_of_an_offloaded_model_is_plain() -> None:
    model = tiny("llama")
    with zo2ext.offload(model, zo2ext.ZOConfig(device="cpu")):
        copied = pickle.loads(pickle.dumps(dict(model.lm_head._parameters)))
        assert type(copied) is dict
        assert type(copy.deepcopy(model.lm_head._parameters)) is dict


# 8. key-value caches and mutated inputs


def test_key_value_cache_in_a_step() -> None:
    def cached(model: nn.Module, batch: dict[str, Any]) -> Tensor:
        loss: Tensor = model(**batch, use_cache=True).loss
        return loss

    assert_equals_reference(tiny("llama"), batches("llama", 3), cached)


def test_closures_that_take_their_inputs_apart() -> None:
    def popping(model: nn.Module, batch: dict[str, Any]) -> Tensor:
        mine = dict(batch)
        labels = mine.pop("labels")
        logits = model(**mine).logits
        return F.cross_entropy(logits.view(-1, VOCABULARY), labels.view(-1))

    assert_equals_reference(tiny("gpt2"), batches("gpt2", 3), popping)


# 9. moving the model


def test_moving_the_model_to_where_it_is() -> None:
    model = tiny("llama")
    (batch,) = batches("llama", 1)
    with torch.no_grad():
        expected = model(**batch).logits
        with zo2ext.offload(model, zo2ext.ZOConfig(device="cpu")):
            model.to("cpu")
            assert_same_bits(model(**batch).logits, expected)


def test_errors_of_the_loss_come_out_and_leave_the_run_whole() -> None:
    model, data = tiny("llama"), batches("llama", 4)
    expected = reference.mezo(tiny("llama"), data, **SETTINGS)

    def failing() -> Tensor:
        model(**data[0])
        raise KeyError("from the loss")

    with zo2ext.offload(model, zo2ext.ZOConfig(device="simulated", **SETTINGS)) as zo:
        for batch in data:
            with pytest.raises(KeyError, match="from the loss"):
                zo.step(failing)
            zo.step(lambda batch=batch: model(**batch).loss)
    for name, parameter in model.named_parameters():
        assert_same_bits(parameter.data, expected.weights[name], name)


def test_one_copy_is_written_again_where_nested_units_are_read_again() -> None:
    """A unit that stays open while an inner one is loaded: each pass finds its own copy after."""

    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.randn(6))
            self.inner = nn.Linear(6, 6)

        def forward(self, x: Tensor) -> Tensor:
            return self.inner(x * self.scale) * self.scale

    model = nn.Sequential(Outer(), Outer(), nn.Linear(6, 2))
    data = [{"input": torch.randn(4, 6)} for _ in range(5)]
    expected = reference.mezo(copy.deepcopy(model), data, loss=mean_square, **SETTINGS)
    for device in ("cpu", "simulated"):
        trained = copy.deepcopy(model)
        settings = zo2ext.ZOConfig(
            device=device, one_copy=True, granularity="module", directions=1, **SETTINGS
        )
        with zo2ext.offload(trained, settings) as zo:
            for batch in data:
                zo.step(lambda batch=batch: mean_square(trained, batch))
        for name, weights in expected.weights.items():
            assert_same_bits(trained.get_parameter(name).data, weights, name)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, pickle.dumps])
def test_an_offloaded_model_is_not_copied(duplicate: Callable[[Any], Any]) -> None:
    """A copy would have placeholders for weights, and hooks that serve the original."""
    model, (batch,) = tiny("opt"), batches("opt", 1)
    with zo2ext.offload(model, zo2ext.ZOConfig(device="cpu")) as zo:
        with pytest.raises(ValueError, match="OPTForCausalLM is offloaded and cannot be copied"):
            duplicate(model)
        zo.step(lambda: model(**batch).loss)
    duplicate(model)
