"""What a plan promises is what a run takes."""

from __future__ import annotations

import json
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from plan_rates import RATES
from safetensors.torch import load_file, save_file
from small_configs import small_config
from tiny_models import batches, tiny

import zo2ext
from zo2ext.commands.main import main
from zo2ext.commands.plan import plan_table
from zo2ext.config import Granularity
from zo2ext.ops.formats import Storage
from zo2ext.planning import rates
from zo2ext.planning.activations import activation_counter
from zo2ext.planning.plan import every_plan, hollow_model, make_plan
from zo2ext.planning.quantized_sizes import stored_tensors
from zo2ext.planning.rates import measure_rates
from zo2ext.planning.several_gpus import plan_rank, rank_plans


@pytest.mark.parametrize("name", ["opt", "llama-tied", "mixtral"])
@pytest.mark.parametrize("granularity", list(Granularity))
@pytest.mark.parametrize("storage", [torch.float32, torch.bfloat16, "e4m3", "split"])
def test_a_run_takes_what_was_planned(
    name: str, granularity: Granularity, storage: torch.dtype
) -> None:
    config = zo2ext.ZOConfig(
        device="simulated", storage=storage, granularity=granularity, write_back=1
    )
    with torch.device("meta"):
        hollow = tiny(name)
    plan = make_plan(hollow, config, tokens=33, rates=RATES)
    model = tiny(name)
    with zo2ext.offload(model, config) as zo:
        assert plan.units == len(zo.layouts)
        assert plan.host == zo.host_nbytes
        assert plan.slots + plan.copies == zo.device_nbytes
        moved = []
        for batch in batches(name, 5):
            before = zo.traffic.uploaded, zo.traffic.offloaded
            zo.step(lambda batch=batch: model(**batch).loss)
            moved.append((zo.traffic.uploaded - before[0], zo.traffic.offloaded - before[1]))
    up, down = (sum(moves) / 3 for moves in zip(*moved[2:], strict=True))
    assert down == plan.step.offloaded
    # Three steps together may differ by what lies in the ring before and after them.
    assert abs(up - plan.step.uploaded) <= plan.slots / 3


def test_the_floor_is_the_slowest_of_transfers_and_compute() -> None:
    model = tiny("llama")
    config = zo2ext.ZOConfig(write_back=1)
    few = make_plan(model, config, tokens=1, rates=RATES).step
    assert few.floor == few.transfers == few.offload > few.compute
    assert few.offload == pytest.approx(few.offloaded / 5e5, rel=1e-3)
    half = make_plan(model, config, tokens=1, rates=replace(RATES, share=0.5)).step
    assert half.floor == pytest.approx(few.offload + few.upload)
    tokens = 10 * int(few.transfers / few.forward)
    many = make_plan(model, config, tokens=tokens, rates=RATES).step
    assert many.floor == many.compute > many.transfers
    assert many.seconds >= many.floor


def test_write_backs_seldom_halve_the_traffic() -> None:
    plan = make_plan(tiny("llama"), zo2ext.ZOConfig(write_back=16), tokens=8, rates=RATES)
    assert plan.step.offloaded == plan.step.uploaded / 16


def test_plans_from_a_config_alone(model_folder: Path) -> None:
    model = hollow_model(str(model_folder))
    count = activation_counter(model.config, batch_size=2, seq_len=512)
    config = zo2ext.ZOConfig(write_back=1)
    rates = replace(RATES, copy=1e15)
    plans = list(every_plan(model, config, tokens=1024, rates=rates, activations=count))
    assert len(plans) == 2 * len(Storage)
    assert {plan.parameters for plan in plans} == {174_528}
    table = plan_table(plans)
    memory, step = table.split("\n\n")
    for part in (memory, step):
        rows = [line.split()[:2] for line in part.splitlines()[2:]]
        assert rows == [[s, g] for s in Storage for g in ("block", "module")]
    bf16 = memory.splitlines()[4].split()
    whole, parts = float(bf16[4]), [float(word) for word in bf16[6:-1:2]]
    assert bf16[2:4] == ["0.33", "MiB"], "the weights, once"
    assert whole == pytest.approx(sum(parts), abs=0.02)
    assert len(parts) == 3
    assert bf16[-1] == "unknown", "nobody said what there is to fit"
    times = step.splitlines()[4].split()
    # 0.35 MB at 0.5 MB/s down take 0.7 s.
    assert times[2:9] == ["1", "0.33", "MiB", "0.33", "MiB", "0.7", "s"]
    # Two passes of 2 * 1,024 * 174,080 operations (all weights but those of norms), and of
    # attention 4 * 512 * 512 per window, layer and channel, at 1 GFLOP/s.
    shape = model.config
    attention = 4 * 512 * 512 * 2 * shape.num_hidden_layers * shape.hidden_size
    needed = 2 * (2 * 1024 * 174_080 + attention) / 1e9
    assert plans[2].step.forward == pytest.approx(needed, rel=1e-3)
    assert float(times[9]) == pytest.approx(plans[2].step.compute, rel=0.01)
    assert plans[2].step.floor == plans[2].step.compute <= plans[2].step.seconds


@pytest.mark.parametrize(
    ("name", "counted"),
    [
        ("gemma3", True),
        ("phi4_multimodal", True),
        ("modernbert-decoder", True),
        ("blt", False),
        ("deepseek_v4", False),
    ],
)
def test_any_config_has_a_plan(
    name: str, counted: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    small_config(name).save_pretrained(tmp_path)
    assert main(["plan", "--model", str(tmp_path), "--seq-len", "12", "--gpu", "H200"]) == 0
    printed, err = capsys.readouterr()
    assert ("estimated from the config's sizes, not counted" in printed) is not counted
    assert ("activations are estimated, not counted: " in err) is not counted
    assert "Traceback" not in err


def test_experts_that_a_token_does_not_visit_take_no_time() -> None:
    def seconds(name: str, **config: Any) -> float:
        model = tiny(name, **config)
        return make_plan(model, zo2ext.ZOConfig(write_back=1), tokens=5, rates=RATES).step.forward

    visits_two, visits_all = (seconds("mixtral", num_experts_per_tok=n) for n in (2, 4))
    experts = 3 * 4 * 3 * 32 * 64  # layers, experts, matrices
    assert visits_all - visits_two == pytest.approx(2 * 5 * 2 * experts / 2 / 1e9, rel=1e-3)
    model = tiny("llama")
    tables = model.get_input_embeddings().weight.numel()
    rest = sum(p.numel() for p in model.parameters()) - tables
    assert seconds("llama") == pytest.approx(2 * 5 * 2 * rest / 1e9, rel=1e-3)
    assert seconds("llama-tied") == pytest.approx(seconds("llama"), rel=1e-3)


def test_what_has_no_config_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no usable config"):
        hollow_model(str(tmp_path))


def quantize(folder: Path, *, unless: str = "lm_head", prefix: str = "model.") -> int:
    """Save a tiny model as GPTQ does; the bytes that its blocks' matrices take."""
    tiny("llama").save_pretrained(folder)
    stored: dict[str, torch.Tensor] = {}
    nbytes = 0
    for name, tensor in load_file(folder / "model.safetensors").items():
        name = name.removeprefix("model.") if prefix == "" else name
        if tensor.dim() < 2 or "layers" not in name or unless in name:
            stored[name] = tensor
            continue
        rows, columns = tensor.shape
        module = name.removesuffix("weight")
        parts = {
            "qweight": torch.zeros(columns // 8, rows, dtype=torch.int32),
            "scales": torch.zeros(columns // 16, rows, dtype=torch.float16),
            "g_idx": torch.zeros(columns, dtype=torch.int32),
        }
        nbytes += sum(-(-part.nbytes // 256) * 256 for part in parts.values())
        stored |= {module + key: part for key, part in parts.items()}
    save_file(stored, folder / "model.safetensors", {"format": "pt"})
    settings = json.loads((folder / "config.json").read_text())
    settings["quantization_config"] = {"quant_method": "gptq", "bits": 4}
    (folder / "config.json").write_text(json.dumps(settings))
    return nbytes


@pytest.mark.parametrize("prefix", ["model.", ""])
@pytest.mark.parametrize("unless", ["lm_head", "mlp"])
def test_quantized_weights_have_the_size_in_the_files(
    tmp_path: Path, unless: str, prefix: str
) -> None:
    quantized = quantize(tmp_path, unless=unless, prefix=prefix)
    hollow = hollow_model(str(tmp_path))
    config = zo2ext.ZOConfig(storage=torch.float32, write_back=1)
    plan = make_plan(hollow, config, tokens=5, rates=RATES)
    plain = tiny("llama")
    whole = make_plan(plain, config, tokens=5, rates=RATES)
    for name, parameter in plain.named_parameters():
        parameter.requires_grad_("layers" not in name or parameter.dim() < 2 or unless in name)
    frozen = sum(p.nbytes for p in plain.parameters() if not p.requires_grad)
    rest = make_plan(plain, config, tokens=5, rates=RATES)
    assert plan.host == rest.host - frozen + quantized < whole.host
    assert plan.step.offloaded == rest.step.offloaded < whole.step.offloaded
    assert (plan.parameters, plan.step.forward) == (whole.parameters, whole.step.forward)


def test_plan_prints_what_is_quantized_or_refuses(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    quantize(tmp_path)
    command = ["plan", "--gpu", "T4", "--seq-len", "64", "--model"]
    assert main([*command, str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    matrices = 3 * (2 * 32 * 32 + 2 * 32 * 16 + 3 * 32 * 64)  # of q, o; k, v; the MLP
    assert f"{matrices:,} of them are quantized: frozen, and" in printed

    stored = load_file(tmp_path / "model.safetensors")
    fewer = {name: t for name, t in stored.items() if "layers.1.mlp.up_proj" not in name}
    save_file(fewer, tmp_path / "model.safetensors")
    assert main([*command, str(tmp_path)]) == 1
    assert "its files have no tensors for the weights of: model.layers.1.mlp.up_proj" in (
        capsys.readouterr().err
    )
    (tmp_path / "model.safetensors").unlink()
    assert main([*command, str(tmp_path)]) == 1
    assert "is quantized, and only the headers of its weight files have" in capsys.readouterr().err


def test_of_a_hub_name_only_headers_are_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    quantize(tmp_path)
    headers = huggingface_hub.get_local_safetensors_metadata(tmp_path)
    asked = []
    monkeypatch.setattr(
        huggingface_hub, "get_safetensors_metadata", lambda name: asked.append(name) or headers
    )
    assert stored_tensors("some/name") == stored_tensors(str(tmp_path))
    assert asked == ["some/name"]


def test_rates_of_this_machine_are_plausible() -> None:
    measured = measure_rates(torch.device("cpu"), (torch.float32,))
    assert 1e8 < measured.copy < 1e13
    assert 1e8 < measured.multiply[torch.float32] < 1e15


def test_what_takes_long_is_measured_once(monkeypatch: pytest.MonkeyPatch) -> None:
    now, calls = [0.0], []

    def work(seconds: float) -> None:
        calls.append(seconds)
        now[0] += seconds

    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    cpu = torch.device("cpu")
    assert rates._seconds(lambda: work(3.0), cpu) == 3.0
    assert len(calls) == 1
    assert rates._seconds(lambda: work(0.5), cpu) == 0.5
    assert len(calls) > 3


def test_the_commands_print_and_refuse(
    model_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = str(model_folder)
    assert (
        main(["plan", "--model", model, "--device", "cpu", *"--batch-size 8 --seq-len 512".split()])
        == 0
    )
    printed, err = capsys.readouterr()
    assert "174,528 parameters" in printed
    assert "4,096 tokens per step" in printed
    assert "memory, and copies and activations are in host memory." in printed
    assert err == "measuring this machine's rates ...\n"
    assert main(["info"]) == 0
    printed = capsys.readouterr().out
    assert torch.__version__ in printed
    assert "TFLOP/s" in printed
    assert main(["plan", "--model", str(tmp_path), "--device", "cpu"]) == 1
    assert "no usable config" in capsys.readouterr().err
    assert main(["plan", "--model", model, "--seq-len", "513", "--gpu", "h-200"]) == 0
    printed = capsys.readouterr().out
    assert "seq_len is 513, of which the model reads 512: predicted for these" in printed
    assert "512 tokens per step" in printed
    assert main(["plan", "--model", model, "--directions", "0"]) == 1
    assert "directions must be an integer from 1" in capsys.readouterr().err
    assert main(["plan", "--model", model, "--device", "tpu"]) == 1
    assert "got 'tpu'" in capsys.readouterr().err
    assert main(["plan", "--model", model, "--seq-len", "0"]) == 1
    assert "seq_len must be at least 1, got 0" in capsys.readouterr().err


LINK = 1e8


def test_ranks_divide_what_they_share() -> None:
    config = zo2ext.ZOConfig(write_back=1)
    plan = make_plan(tiny("llama"), config, tokens=64, rates=RATES)
    step = plan.step
    alone = plan_rank(plan, perturb=1, data=1, link=None)
    assert (alone.uploaded, alone.floor_seconds) == (step.uploaded, step.floor)
    for ranks in (2, 4, 8):
        whole = plan_rank(plan, perturb=1, data=ranks, link=None)
        assert (whole.uploaded, whole.gathered, whole.host) == (step.uploaded, 0, ranks * plan.host)
        assert whole.tokens_per_second == pytest.approx(ranks * alone.tokens_per_second)
        sliced = plan_rank(plan, perturb=1, data=ranks, link=LINK)
        assert sliced.uploaded == step.uploaded / ranks
        assert sliced.offloaded == step.offloaded / ranks
        assert sliced.gathered == pytest.approx(step.uploaded * (ranks - 1) / ranks)
        assert sliced.host == plan.host
    two = plan_rank(plan, perturb=2, data=1, link=None)
    assert two.tokens == plan.tokens
    fast = replace(RATES, copy=1e18, upload=1e18, offload=1e18)
    bound = make_plan(tiny("llama"), config, tokens=10**6, rates=fast)
    dealt = plan_rank(bound, perturb=2, data=1, link=None)
    assert dealt.floor_seconds == pytest.approx(bound.step.floor / 2, rel=1e-6)


def test_every_way_to_use_ranks_is_shown() -> None:
    config = zo2ext.ZOConfig(directions=2, estimator="two_sided", write_back=1)
    plan = make_plan(tiny("llama"), config, tokens=64, rates=RATES)
    found = [(p.perturb, p.data, p.sliced) for p in rank_plans(plan, most=4, link=LINK)]
    assert found[0] == (1, 1, False)
    assert set(found[1:]) == {
        (perturb, ranks // perturb, sliced)
        for ranks, perturbs in ((2, (1, 2)), (4, (1, 2, 4)))
        for perturb in perturbs
        for sliced in (False, True)
    }


def test_plan_prints_ranks_and_what_it_assumes(
    model_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["plan", "--model", str(model_folder), "--gpu", "H200"]
    assert main([*command, *"--seq-len 512 --ranks 4 --link 450".split()]) == 0
    printed = capsys.readouterr().out
    table = printed[printed.index("several GPUs, bf16, 512 tokens") :]
    assert "450 GB/s each way for each; it was not measured" in table
    assert len([line for line in table.splitlines() if "tok/s" in line]) == 9
    assert main([*command, "--seq-len", "512", "--ranks", "0"]) == 1
    assert "ranks must be at least 1, got 0" in capsys.readouterr().err
    assert main([*command, "--seq-len", "512", "--link", "0"]) == 1
    assert "link must be above 0 and finite, got 0.0" in capsys.readouterr().err
