"""The examples run, learn something, and leave what they promise."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import REPOSITORY
from safetensors.torch import load_file
from tiny_models import tiny
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    PreTrainedTokenizerFast,
)

# Trainer asks for pinned memory by default, and torch says when there is no GPU to pin it for.
pytestmark = pytest.mark.filterwarnings("ignore:'pin_memory' argument is set as true but no acc")


def run(example: str, *words: str) -> None:
    """``python examples/EXAMPLE.py WORDS``, in this process."""
    path = REPOSITORY / "examples" / f"{example}.py"
    spec = importlib.util.spec_from_file_location(f"examples_{example}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.main(*words)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model with its tokenizer, a text, and the same as JSON lines."""
    folder = tmp_path_factory.mktemp("examples")
    words = ["<pad>", "<s>", "</s>", "<unk>", *(f"w{i}" for i in range(195))]
    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>"
    )
    fast.save_pretrained(folder / "model")
    tiny("llama-tied").save_pretrained(folder / "model")
    text = " ".join(f"w{i * 7 % 11}" for i in range(1500))
    (folder / "text.txt").write_text(text)
    lines = [json.dumps({"text": text[i : i + 60]}) for i in range(0, 2000, 50)]
    (folder / "text.jsonl").write_text("\n".join(lines))
    return folder


def loss_on(model: nn.Module, folder: Path) -> float:
    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    ids = tokenizer((folder / "text.txt").read_text(), return_tensors="pt").input_ids[:, :60]
    with torch.no_grad():
        return float(model.eval()(input_ids=ids, labels=ids).loss)


@pytest.fixture
def assert_learnt(folder: Path, tmp_path: Path) -> Callable[[Path], None]:
    """That the model in a folder is another than the one it began as, and a better one."""

    def check(out: Path) -> None:
        model, before = (AutoModelForCausalLM.from_pretrained(f) for f in (out, folder / "model"))
        assert AutoTokenizer.from_pretrained(out).eos_token == "</s>"
        assert loss_on(model, folder) < loss_on(before, folder)

    return check


@pytest.mark.parametrize(
    ("example", "length"), [("bare_loop", "20"), ("accelerate_loop", "8"), ("trainer", "20")]
)
def test_loops(
    folder: Path,
    tmp_path: Path,
    assert_learnt: Callable[[Path], None],
    example: str,
    length: str,
) -> None:
    pytest.importorskip("accelerate")
    out = tmp_path / "out"
    run(example, str(folder / "model"), str(folder / "text.txt"), str(out), length)
    assert_learnt(out)


def test_the_distributed_loop(
    folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    assert_learnt: Callable[[Path], None],
) -> None:
    """Two processes come to the weights of one, which goes on from where they were stopped."""
    path, words = REPOSITORY / "examples", [str(folder / "model"), str(folder / "text.txt")]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    script = [*torchrun, "--nproc-per-node=2", str(path / "distributed_loop.py")]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(sys.path))
    command = [*script, *words, str(tmp_path / "two"), "12"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=180, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("step    11  loss") == 1
    assert_learnt(tmp_path / "two" / "final")

    alone = {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    for name, value in alone.items():
        monkeypatch.setenv(name, value)
    for steps in ("4", "12"):
        run("distributed_loop", *words, str(tmp_path / "one"), steps)
    two, one = (load_file(tmp_path / n / "final" / "model.safetensors") for n in ("two", "one"))
    assert all(torch.equal(two[name], one[name]) for name in one)


def test_the_trainer_example_continues(folder: Path, tmp_path: Path) -> None:
    words = (str(folder / "model"), str(folder / "text.txt"))
    run("trainer", *words, str(tmp_path / "whole"), "52")
    whole = load_file(tmp_path / "whole" / "model.safetensors")
    # Runs again, from checkpoint-50: the last two steps come out as they were.
    (tmp_path / "whole" / "checkpoint-52").rename(tmp_path / "other")
    run("trainer", *words, str(tmp_path / "whole"), "52")
    again = load_file(tmp_path / "whole" / "model.safetensors")
    assert all(torch.equal(whole[name], again[name]) for name in whole)


def test_sft(folder: Path, tmp_path: Path, assert_learnt: Callable[[Path], None]) -> None:
    pytest.importorskip("trl")
    words = (str(folder / "model"), str(folder / "text.jsonl"), str(tmp_path / "out"), "20")
    run("sft", *words)
    assert_learnt(tmp_path / "out")


def test_lora(folder: Path, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    words = (str(folder / "model"), str(folder / "text.txt"), str(tmp_path / "out"), "20")
    run("lora", *words)
    base = AutoModelForCausalLM.from_pretrained(folder / "model")
    before = loss_on(base, folder)
    assert loss_on(peft.PeftModel.from_pretrained(base, tmp_path / "out"), folder) != before


@pytest.mark.parametrize("bits", ["4", "8"])
def test_lora_on_a_base_in_few_bits(folder: Path, tmp_path: Path, bits: str) -> None:
    peft = pytest.importorskip("peft")
    pytest.importorskip("bitsandbytes")
    base = tmp_path / "model"  # bitsandbytes wants rows of 64
    tiny("llama-tied", hidden_size=64, intermediate_size=128).save_pretrained(base)
    AutoTokenizer.from_pretrained(folder / "model").save_pretrained(base)
    out = tmp_path / "out"
    run("lora", str(base), str(folder / "text.txt"), str(out), "20", bits)
    assert set(load_file(out / "adapter_model.safetensors"))
    settings = {"load_in_4bit": bits == "4", "load_in_8bit": bits == "8"}
    few = AutoModelForCausalLM.from_pretrained(
        base, quantization_config=BitsAndBytesConfig(**settings)
    )
    before = loss_on(few, folder)
    assert loss_on(peft.PeftModel.from_pretrained(few, out), folder) != before


def test_the_resident_loop(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run("mezo_loop", str(folder / "model"), str(folder / "text.txt"), "11")
    assert "step    10  loss" in capsys.readouterr().out


@pytest.mark.filterwarnings("ignore")  # the harness's own
def test_the_evaluation_harness(
    folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A local multiple-choice task, scored as a plain model scores it."""
    pytest.importorskip("lm_eval", reason="lm_eval is not installed: pip install lm_eval")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    rows = [
        {"question": f"w{i} w{i + 1}", "choices": ["w1 w2", "w3", "w9"], "answer": i % 3}
        for i in range(24)
    ]
    (tmp_path / "rows.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    (tmp_path / "local_choice.yaml").write_text(
        "task: local_choice\n"
        "dataset_path: json\n"
        f"dataset_kwargs: {{data_files: {{test: {tmp_path / 'rows.jsonl'}}}}}\n"
        "test_split: test\n"
        "output_type: multiple_choice\n"
        "doc_to_text: question\n"
        "doc_to_choice: choices\n"
        "doc_to_target: answer\n"
        "metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]\n"
    )
    run("lm_harness", str(folder / "model"), "local_choice", str(tmp_path))
    table = capsys.readouterr().out

    model = AutoModelForCausalLM.from_pretrained(folder / "model").eval()
    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    right = 0
    for row in rows:
        scores = []
        for choice in row["choices"]:
            prompt = tokenizer(row["question"]).input_ids
            ids = torch.tensor([prompt + tokenizer(choice).input_ids])
            with torch.no_grad():
                logprobs = model(ids).logits.log_softmax(-1)[0, :-1]
            picked = logprobs.gather(1, ids[0, 1:, None])[len(prompt) - 1 :]
            scores.append(float(picked.sum()))
        right += scores.index(max(scores)) == row["answer"]
    assert f"{right / len(rows):.4f}" in table
