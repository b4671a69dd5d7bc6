"""Weights on a disk: the bits of weights in memory, in bounded memory, with nothing written."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest
import reference
import torch
from engine_runs import assert_run_equals, assert_same_run, saved, trained, usual
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numeric import assert_same_bits
from tiny_models import CASES, batches, tiny

import zo2ext
from zo2ext.engine.engine import ZOEngine
from zo2ext.streaming.devices.simulated import SimulatedDevice
from zo2ext.streaming.stores.disk import READERS, DiskStore

DISK: dict[str, Any] = {"store": "disk", "host_memory": "16MiB"}


def disk_of(zo: ZOEngine) -> DiskStore:
    assert isinstance(zo._weights.store, DiskStore)
    return zo._weights.store


@settings(max_examples=20, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(
    name=st.sampled_from(["opt", "llama-tied", "gpt2", "mixtral"]),
    device=st.sampled_from(["cpu", "simulated"]),
    write_back=st.sampled_from([1, 3, "never"]),
    slots=st.integers(2, 6),
    resident=st.integers(0, 6),
    staged=st.integers(1, 5),
    granularity=st.sampled_from(["block", "module"]),
    storage=st.sampled_from([torch.float32, torch.bfloat16, "e4m3", "split"]),
    directions=st.integers(1, 2),
)
def test_any_disk_run_equals_in_memory(
    name: str, device: str, write_back: int | str, staged: int, **config: Any
) -> None:
    """`staged`: units that the budget allows in staging memory, or in slots on the CPU."""
    units = zo2ext.ZOConfig(device="cpu", granularity=config["granularity"])
    unit = max(layout.nbytes for layout in zo2ext.offload(tiny(name), units).layouts)
    count = max(staged, 2) if device == "cpu" else staged
    data = batches(name, 5)
    settings = {"lr": 1e-2, "eps": 1e-3, "seed": 5}
    expected = reference.mezo(
        tiny(name),
        data,
        write_back=None if write_back == "never" else write_back,
        storage=config["storage"],
        directions=config["directions"],
        **settings,
    )
    assert_run_equals(
        tiny(name),
        data,
        expected,
        device=device,
        write_back=write_back,
        store="disk",
        host_memory=f"{count * unit + READERS * (unit + 8192)}B",
        **config,
        **settings,
    )


@pytest.mark.parametrize("device", ["cpu", "simulated"])
@pytest.mark.parametrize("write_back", [1, 3, "never"])
@pytest.mark.parametrize("name", ["llama-tied", "mixtral", "bert-seqcls"])
def test_loaded_from_the_files_themselves(
    tmp_path: Path, name: str, write_back: int | str, device: str
) -> None:
    folder = saved(tmp_path / "model", name)
    before = fingerprint_of(folder)
    config = {"lr": 1e-2, "device": device, "write_back": write_back}
    model, zo = zo2ext.load(folder, zo2ext.ZOConfig(**config, **DISK), model_class=CASES[name][0])
    assert_same_run(trained(model, zo, name), usual(folder, name, **config))
    assert fingerprint_of(folder) == before


def fingerprint_of(folder: Path) -> dict[str, tuple[bytes, int]]:
    return {f.name: (f.read_bytes(), f.stat().st_mtime_ns) for f in sorted(folder.iterdir())}


def test_never_writes_nothing_until_a_consolidation(tmp_path: Path) -> None:
    folder = saved(tmp_path / "model", "llama")
    config = zo2ext.ZOConfig(lr=1e-2, device="simulated", write_back="never", **DISK)
    model, zo = zo2ext.load(folder, config)
    data = batches("llama", 3)
    for batch in data:
        zo.step(lambda batch=batch: model(**batch).loss)
    seen = {name: values.clone() for name, values in model.state_dict().items()}
    model(**data[0])
    disk = disk_of(zo)
    assert disk.traffic.written == 0
    assert disk._files._scratch is None
    assert zo.traffic.offloaded == 0
    zo.flush()
    assert disk.traffic.written == sum(layout.trainable_nbytes for layout in zo.layouts)
    for name, values in model.state_dict().items():
        assert_same_bits(values, seen[name], name)
    zo.close()


def test_weights_that_are_replaced(tmp_path: Path) -> None:
    """`load_state_dict` and `masters`, from files and after write-backs."""
    folder = saved(tmp_path / "model", "llama", torch.bfloat16)
    other = tiny("llama", seed=9).to(torch.bfloat16).state_dict()
    results = []
    for more in ({}, DISK):
        config = zo2ext.ZOConfig(lr=1e-2, device="simulated", storage=torch.float32, **more)
        model, zo = zo2ext.load(folder, config)
        for batch in batches("llama", 2):
            zo.step(lambda batch=batch: model(**batch).loss)
        masters = {name: values.clone() for name, values in zo.exact_weights().items()}
        model.load_state_dict(other)
        zo.resume(steps=2, exact_weights=masters)
        results.append(trained(model, zo, "llama") | {f"master {n}": v for n, v in masters.items()})
    assert_same_run(results[1], results[0])


def test_a_journal_continues(tmp_path: Path) -> None:
    folder = saved(tmp_path / "model", "llama")
    data = batches("llama", 5)
    config = zo2ext.ZOConfig(lr=1e-2, device="cpu", write_back=2, **DISK)
    expected = usual(folder, "llama", lr=1e-2, device="cpu", write_back=2)
    for batch_list in (data[:2], data[2:3]):
        model, zo = zo2ext.load(folder, config)
        zo.keep_journal(tmp_path / "journal")
        for batch in batch_list:
            loss = zo.step(lambda batch=batch: model(**batch).loss)
        state = {name: values.clone() for name, values in model.state_dict().items()}
        zo.close(keep_weights=False)
    assert loss == expected["losses"][2]
    for name, values in state.items():
        assert_same_bits(values, expected[name], name)


def test_a_budget_that_is_too_small() -> None:
    for device in ("cpu", "simulated"):
        config = zo2ext.ZOConfig(device=device, store="disk", host_memory="40KB")
        with pytest.raises(ValueError, match=r"host_memory must be at least .* granularity"):
            zo2ext.offload(tiny("llama"), config)
    with pytest.raises(ValueError, match="host_memory must be a size"):
        zo2ext.ZOConfig(host_memory="much")
    with pytest.raises(ValueError, match="store must be one of 'host', 'disk'"):
        zo2ext.ZOConfig(store="tape")


def test_a_file_that_shrinks_is_named(tmp_path: Path) -> None:
    folder = saved(tmp_path / "model", "llama", shard="1GB")
    file = folder / "model.safetensors"
    model, _ = zo2ext.load(folder, zo2ext.ZOConfig(device="cpu", slots=2, **DISK))
    os.truncate(file, file.stat().st_size // 2)
    with pytest.raises(OSError, match=r"model\.safetensors ends at byte"):
        model(**batches("llama", 1)[0])


def test_where_the_page_cache_cannot_be_passed_by(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    folder = saved(tmp_path / "model", "llama")
    opened = os.open

    def refuse(path: str, flags: int, *rest: Any) -> int:
        if flags & os.O_DIRECT:
            raise OSError(22, "Invalid argument")
        return opened(path, flags, *rest)

    monkeypatch.setattr(os, "open", refuse)
    with caplog.at_level(logging.INFO, "zo2ext"):
        model, zo = zo2ext.load(folder, zo2ext.ZOConfig(lr=1e-2, device="cpu", **DISK))
        found = trained(model, zo, "llama")
    assert "through the page cache" in caplog.text
    assert_same_run(found, usual(folder, "llama", lr=1e-2, device="cpu"))


def test_seed_of_the_simulation_does_not_matter() -> None:
    finals = []
    for seed in range(6):
        model = tiny("llama-tied")
        config = zo2ext.ZOConfig(lr=1e-2, slots=3, **DISK)
        with ZOEngine(model, config, SimulatedDevice(seed, moves=seed % 2 == 0)) as zo:
            for batch in batches("llama-tied", 4):
                zo.step(lambda batch=batch: model(**batch).loss)
        finals.append({name: p.data.clone() for name, p in model.named_parameters()})
    for final in finals[1:]:
        for name, weights in final.items():
            assert_same_bits(weights, finals[0][name], name)


@pytest.mark.parametrize("write_back", [1, 2, "never"])
def test_disk_equals_host(device: torch.device, tmp_path: Path, write_back: int | str) -> None:
    """On each device, page-locked staging memory and its threads included."""
    folder = saved(tmp_path / "model", "llama-tied")
    runs = []
    for more in ({}, DISK):
        config = zo2ext.ZOConfig(lr=1e-2, device=device, write_back=write_back, **more)
        model, zo = zo2ext.load(folder, config)
        with zo:
            losses = [
                zo.step(lambda b=b: model(**{k: v.to(device) for k, v in b.items()}).loss)
                for b in batches("llama-tied", 6)
            ]
            weights = {name: values.clone() for name, values in model.state_dict().items()}
        runs.append({"losses": losses, **weights})
    assert_same_run(runs[1], runs[0])


def test_its_benchmark_runs(tmp_path: Path) -> None:
    script = Path(__file__).parents[2] / "benchmarks" / "disk.py"
    sizes = ["--gigabytes", "0.1", "--rounds", "1", "--disk", str(tmp_path)]
    command = [sys.executable, str(script), *sizes, "--json", str(tmp_path / "disk.json")]
    path = os.pathsep.join([str(script.parents[1]), os.environ.get("PYTHONPATH", "")])
    subprocess.run(command, check=True, timeout=300, env={**os.environ, "PYTHONPATH": path})
    found = json.loads((tmp_path / "disk.json").read_text())
    assert found["bytes"] > 0.09e9
    assert [row["name"] for row in found["rows"]] == ["dd, direct", "dd, page cache", "store"]
    assert all(row["bytes_s"] > 0 for row in found["rows"])


# -- memory

_LIMITED = """
    import json, resource, sys
    import torch, transformers, zo2ext

    def field(file, name):
        return next(int(x.split()[1]) for x in open(file) if x.startswith(name + ":"))

    def train(folder, steps, **config):
        config = zo2ext.ZOConfig(lr=1e-2, device="cpu", write_back="never", **config)
        model, zo = zo2ext.load(folder, config)
        ids = torch.arange(12)[None] + 3
        losses = [zo.step(lambda: model(input_ids=ids, labels=ids).loss) for _ in range(steps)]
        zo.close(keep_weights=False)
        return losses

    folder, limited = sys.argv[1], sys.argv[2] == "limited"
    torch.set_num_threads(1)
    disk = {"store": "disk", "host_memory": "104MiB"} if limited else {}
    train(folder + "-small", 1, **disk)  # imports, threads and their stacks
    before = field("/proc/self/status", "VmSize") * 1024
    room = 180 * 2**20
    if limited:
        resource.setrlimit(resource.RLIMIT_AS, (before + room, before + room))
    written = field("/proc/self/io", "write_bytes")
    losses = train(folder, 2, **disk)
    written = field("/proc/self/io", "write_bytes") - written
    print(json.dumps({"losses": losses, "room": room, "written": written}))
"""


def test_a_model_larger_than_the_memory_limit_trains(tmp_path: Path) -> None:
    """The limit is one of address space: nothing that is mapped or allocated escapes it."""
    sizes = {"hidden_size": 512, "intermediate_size": 1536, "vocab_size": 4000, "head_dim": 128}
    folder = tmp_path / "model"
    tiny("llama", num_hidden_layers=24, **sizes).save_pretrained(folder, max_shard_size="100MB")
    saved(tmp_path / "model-small", "llama")
    before = fingerprint_of(folder)
    size = sum(len(content) for content, _ in before.values())

    def run(way: str) -> dict[str, Any]:
        done = subprocess.run(
            [sys.executable, "-c", textwrap.dedent(_LIMITED), str(folder), way],
            capture_output=True,
            text=True,
            timeout=400,
            check=False,
        )
        assert done.returncode == 0, done.stderr[-3000:]
        result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
        return result

    limited = run("limited")
    assert size > 1.5 * limited["room"], f"{size} bytes of weights are no test"
    assert limited["losses"] == run("unlimited")["losses"]
    assert limited["written"] < 2**20, "more than the pages that note when files were read"
    assert fingerprint_of(folder) == before
