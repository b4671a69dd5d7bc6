"""Completions: the tokens of a model in memory, for the price of one prompt a batch."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import zo2ext
from zo2ext import ops
from zo2ext._format import gib
from zo2ext.checkpoints.pretrained import load_config, load_model
from zo2ext.commands import main as cli
from zo2ext.commands.arguments import GenerateArguments
from zo2ext.commands.generate import Completion, _prompts, complete
from zo2ext.config import config_from

Capture = pytest.CaptureFixture[str]
PROMPTS = [
    "anna and jack went to the park",
    "the hotel was great. the rooms were small. how was the supper? terrible. would you",
    "the",
    "did you see henry?",
    "everyone clapped at",
]


@pytest.fixture(scope="module")
def source(model_folder: Path) -> str:
    return str(model_folder)


@pytest.fixture(scope="module")
def tokenizer(source: str) -> Any:
    return AutoTokenizer.from_pretrained(source)


def streamed(
    source: str, tokenizer: Any, prompts: list[str] = PROMPTS, **options: Any
) -> tuple[list[Completion], zo2ext.ZOEngine]:
    """Completions of `prompts`, and the engine that they came from."""
    arguments = GenerateArguments(model=source, prompt=prompts, **options)
    settings = load_config(source, max_length=1)
    model = load_model(source, settings, max_token=0).requires_grad_(False)
    encoded = [(prompt, tokenizer(prompt)["input_ids"]) for prompt in prompts]
    with zo2ext.offload(model, config_from(arguments), train=False) as zo:
        return list(complete(zo, model, tokenizer, encoded, arguments)), zo


def in_memory(
    source: str, tokenizer: Any, prompts: list[str], dtype: torch.dtype, **options: Any
) -> list[list[int]]:
    """New tokens of plain ``generate``, the whole batch at once."""
    model = AutoModelForCausalLM.from_pretrained(source, dtype=dtype).eval()
    tokenizer.padding_side = "left"
    batch = tokenizer(prompts, padding=True, return_tensors="pt")
    made = model.generate(**batch, **{"do_sample": False, **options})
    return made[:, batch["input_ids"].shape[1] :].tolist()


# -- tokens


@pytest.mark.parametrize(
    "place",
    [
        {"device": "cpu"},
        {"device": "simulated"},
        {"device": "simulated", "granularity": zo2ext.Granularity.MODULE, "slots": 2},
        {"device": "simulated", "resident": "3"},
        {"device": "simulated", "resident": "all"},
    ],
    ids=lambda place: "-".join(place.values() if len(place) < 3 else ["module"]),
)
def test_tokens_are_those_of_a_model_in_memory(
    place: dict[str, Any], source: str, tokenizer: Any
) -> None:
    expected = in_memory(source, tokenizer, PROMPTS, torch.float32, max_new_tokens=24)
    found, _ = streamed(source, tokenizer, max_new_tokens=24, **place)
    assert [c.tokens for c in found] == expected
    assert [c.prompt for c in found] == PROMPTS


@pytest.mark.parametrize("batch_size", [1, 2, 5])
def test_a_prompt_is_completed_alike_in_any_company(
    batch_size: int, source: str, tokenizer: Any
) -> None:
    alone = [
        in_memory(source, tokenizer, [prompt], torch.float32, max_new_tokens=24)[0]
        for prompt in PROMPTS
    ]
    found, _ = streamed(
        source, tokenizer, max_new_tokens=24, device="simulated", batch_size=batch_size
    )
    assert [c.tokens for c in found] == alone


def test_sampling_follows_the_seed(source: str, tokenizer: Any) -> None:
    def sampled(seed: int, **options: Any) -> list[list[int]]:
        options = {"temperature": 0.9, "top_k": 20, "top_p": 0.95, **options}
        found, _ = streamed(source, tokenizer, max_new_tokens=12, seed=seed, **options)
        return [c.tokens for c in found]

    first = sampled(3, device="cpu")
    torch.manual_seed(3)
    options = {"temperature": 0.9, "top_k": 20, "top_p": 0.95, "max_new_tokens": 12}
    assert first == in_memory(source, tokenizer, PROMPTS, torch.float32, **options, do_sample=True)
    assert first == sampled(3, device="simulated")
    assert first != sampled(4, device="cpu")
    assert sampled(4, device="cpu", top_k=1) == sampled(5, device="cpu", top_k=1), "the likeliest"


def test_a_text_ends_where_the_model_ends_it(source: str, tokenizer: Any) -> None:
    whole, _ = streamed(source, tokenizer, max_new_tokens=24, device="cpu")
    last = whole[0].tokens[5]
    end = whole[0].tokens.index(last)
    settings = load_config(source, max_length=1)
    model = load_model(source, settings, max_token=0).requires_grad_(False)
    model.generation_config.eos_token_id = [last, 2]
    arguments = GenerateArguments(model=source, max_new_tokens=24)
    encoded = [(prompt, tokenizer(prompt)["input_ids"]) for prompt in PROMPTS]
    with zo2ext.offload(model, zo2ext.ZOConfig(device="cpu"), train=False) as zo:
        ended = list(complete(zo, model, tokenizer, encoded, arguments))
    assert ended[0].tokens == whole[0].tokens[: end + 1]
    for some, every in zip(ended, whole, strict=True):
        assert some.tokens == every.tokens[: len(some.tokens)]
        assert len(some.tokens) == 24 or some.tokens[-1] == last


# -- what it costs


@pytest.mark.parametrize("granularity", list(zo2ext.Granularity))
def test_a_batch_costs_the_uploads_of_one_prompt(
    granularity: zo2ext.Granularity, source: str, tokenizer: Any
) -> None:
    place: dict[str, Any] = {"device": "simulated", "granularity": granularity}
    _, one = streamed(source, tokenizer, PROMPTS[:1], max_new_tokens=16, **place)
    _, five = streamed(source, tokenizer, PROMPTS, max_new_tokens=16, **place)
    assert five.traffic.uploaded == one.traffic.uploaded >= 15 * one.host_nbytes
    assert five.traffic.offloaded == 0
    _, apart = streamed(source, tokenizer, PROMPTS, max_new_tokens=16, batch_size=1, **place)
    assert apart.traffic.uploaded > 4 * one.traffic.uploaded


def test_a_token_is_read_once(source: str, tokenizer: Any) -> None:
    settings = load_config(source, max_length=1)
    model = load_model(source, settings, max_token=0).requires_grad_(False)
    read: list[int] = []
    model.register_forward_pre_hook(
        lambda _, args, kwargs: read.append(kwargs["input_ids"].shape[1]), with_kwargs=True
    )
    arguments = GenerateArguments(model=source, max_new_tokens=5)
    ids = tokenizer(PROMPTS[0])["input_ids"]
    with zo2ext.offload(model, zo2ext.ZOConfig(device="simulated"), train=False) as zo:
        list(complete(zo, model, tokenizer, [(PROMPTS[0], ids)], arguments))
    assert read == [len(ids), 1, 1, 1, 1], "the rest is in the cache"


def test_no_perturbed_copies_are_made(
    source: str, tokenizer: Any, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    def refuse(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("a kernel ran")

    for name in ("update_perturb", "update_", "perturb_", "unpack"):
        monkeypatch.setattr(ops, name, refuse)
    _, zo = streamed(source, tokenizer, max_new_tokens=4, device="simulated", slots=3)
    slots = sum(sorted(layout.nbytes for layout in zo.layouts)[-3:])
    words = ["--model", source, "--max-new-tokens=4", "--prompt=The", "--device=simulated"]
    assert cli.main(["generate", *words]) == 0
    assert f" {gib(slots)} of buffers on simulated" in capsys.readouterr().err


# -- the command


def generate(capsys: Capture, *words: str) -> tuple[int, str, str]:
    status = cli.main(["generate", "--device=cpu", *words])
    said = capsys.readouterr()
    return status, said.out, said.err


def test_prompts_and_completions_are_printed_apart(
    source: str, tokenizer: Any, capsys: Capture
) -> None:
    words = ["--model", source, "--max-new-tokens=12", "--batch-size=1"]
    status, out, err = generate(capsys, *words, "--prompt", *PROMPTS[:2])
    found, _ = streamed(source, tokenizer, PROMPTS[:2], max_new_tokens=12, device="cpu")
    assert status == 0
    assert out == (
        f"--- prompt 1 of 2\n{PROMPTS[0]}\n--- completion 1 of 2\n{found[0].text}\n"
        f"--- prompt 2 of 2\n{PROMPTS[1]}\n--- completion 2 of 2\n{found[1].text}\n"
    )
    assert found[0].text.startswith(". what did i bring home?")
    assert found[1].text.startswith(" "), "a separate word"
    assert err.startswith("24 tokens in ")
    assert " tok/s; 0.67 MiB of weights on the host, 0.00 MiB of buffers on cpu" in err


def test_prompts_come_from_a_file_or_from_standard_input(
    source: str, tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ["--model", source, "--max-new-tokens=4"]
    expected = generate(capsys, *words, "--prompt", *PROMPTS[:2])[1]
    (tmp_path / "prompts.txt").write_text(f"{PROMPTS[0]}\n\n  \n{PROMPTS[1]}\n")
    assert generate(capsys, *words, "--prompts", str(tmp_path / "prompts.txt"))[1] == expected
    monkeypatch.setattr("sys.stdin", io.StringIO("\n".join(PROMPTS[:2])))
    assert generate(capsys, *words, "--prompts", "-")[1] == expected
    (tmp_path / "prompts.txt").write_text("one\u2028line\n", encoding="utf-8")
    assert len(_prompts(GenerateArguments(model="", prompts=str(tmp_path / "prompts.txt")))) == 1
    assert _prompts(GenerateArguments(model="", prompt=["\udcff"])) == ["\ufffd"]


def test_long_prompts_lose_their_beginning_and_it_is_said(
    source: str, tokenizer: Any, capsys: Capture
) -> None:
    long = "anna found a red hat. " * 200
    tokens = tokenizer(long)["input_ids"]
    words = ["--model", source, "--max-new-tokens=12", "--prompt", long, PROMPTS[0]]
    status = cli.main(["generate", "--device=cpu", *words])
    said = capsys.readouterr()
    assert status == 0
    lost = len(tokens) - 500
    assert (
        f"prompts that lost their beginning: 1 of 2, {lost} tokens in all: the model reads 512 "
        "tokens, 12 of them new\n"
    ) in said.err
    cut = [tokens[0], *tokens[-499:]]  # the token that begins a text stays
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).eval()
    new = model.generate(torch.tensor([cut]), max_new_tokens=12, do_sample=False)[0, 500:]
    completion = said.out.split("--- completion 1 of 2\n")[1].split("\n--- prompt 2")[0]
    assert completion.strip() == tokenizer.decode(new, skip_special_tokens=True).strip()


def test_weights_can_be_kept_in_another_dtype(source: str, tokenizer: Any, capsys: Capture) -> None:
    words = ["--model", source, "--max-new-tokens=8", "--prompt", PROMPTS[0], "--storage=bf16"]
    status, out, err = generate(capsys, *words)
    (expected,) = in_memory(source, tokenizer, PROMPTS[:1], torch.bfloat16, max_new_tokens=8)
    assert status == 0
    assert "0.33 MiB of weights on the host" in err
    completion = out.split("--- completion 1 of 1\n")[1]
    assert completion.strip() == tokenizer.decode(expected, skip_special_tokens=True).strip()


def test_chat_goes_through_the_template(
    source: str, tokenizer: Any, tmp_path: Path, capsys: Capture
) -> None:
    folder = tmp_path / "chat"
    AutoModelForCausalLM.from_pretrained(source).save_pretrained(folder)
    chatty = AutoTokenizer.from_pretrained(source)
    chatty.chat_template = (
        "{{ bos_token }}{% for m in messages %}{{ m.role }} said: {{ m.content }}. {% endfor %}"
        "{% if add_generation_prompt %}Then{% endif %}"
    )
    chatty.save_pretrained(folder)
    words = ["--model", str(folder), "--max-new-tokens=12"]
    status, out, _ = generate(capsys, *words, "--chat", "--prompt", "I see a cat")
    assert status == 0
    ids = tokenizer("user said: I see a cat. Then")["input_ids"]  # begins with one <s>
    model = AutoModelForCausalLM.from_pretrained(source).eval()
    new = model.generate(torch.tensor([ids]), max_new_tokens=12, do_sample=False)[0, len(ids) :]
    assert out.startswith("--- prompt 1 of 1\nI see a cat\n--- completion 1 of 1\n")
    completion = out.split("--- completion 1 of 1\n")[1]
    assert completion.strip() == tokenizer.decode(new, skip_special_tokens=True).strip()
    assert generate(capsys, *words, "--prompt", "I see a cat")[1] != out

    chatty.chat_template = "{{ raise_exception('no users here') }}"
    chatty.save_pretrained(folder)
    assert cli.main(["generate", *words, "--device=cpu", "--chat", "--prompt", "a"]) == 1
    said = capsys.readouterr().err
    assert f"cannot use the chat template of model {str(folder)!r}" in said
    assert "no users here" in said


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("", "expected either prompt or prompts, got neither"),
        ("--prompt a --prompts b", "expected either prompt or prompts, got both"),
        ("--prompts missing.txt", "prompts is 'missing.txt', which cannot be read: No such file"),
        ("--prompts latin.txt", "prompts 'latin.txt' is not UTF-8: unexpected end of data at b"),
        ("--prompts blank.txt", "expected at least one prompt, got none"),
        ("--prompt a --max-new-tokens 0", "max_new_tokens must be at least 1, got 0"),
        ("--prompt a --batch-size 0", "batch_size must be at least 1, got 0"),
        ("--prompt a --top-k 0", "top_k must be at least 1, got 0"),
        ("--prompt a --top-p 0", "top_p must be above 0 and at most 1, got 0.0"),
        ("--prompt a --top-p 1.5", "top_p must be above 0 and at most 1, got 1.5"),
        ("--prompt a --temperature 0", "temperature must be above 0 and finite, got 0.0"),
        ("--prompt a --temperature nan", "temperature must be above 0 and finite, got nan"),
        ("--prompt a --seed -1", "seed must be at least 0, got -1"),
        ("--prompt a --slots 1", "slots must be an integer from 2"),
        ("--prompt a --resident much", "resident must be a count, 'all', or a size"),
        ("--prompt a --device tpu", "device"),
        ("--prompt a --chat", "has none; without --chat the prompt is completed as plain text"),
        ("--prompt a --max-new-tokens 512", "max_new_tokens is 512, but model "),
    ],
)
def test_wrong_calls_are_refused(
    words: str,
    message: str,
    source: str,
    tmp_path: Path,
    capsys: Capture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("latin.txt").write_bytes(b"abc\xe9")
    Path("blank.txt").write_text(" \n\n")
    assert cli.main(["generate", "--model", source, *words.split()]) == 1
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.startswith("zo2ext generate: error: ")
    assert message in said.err


def test_an_empty_prompt_without_tokens_is_refused(
    source: str, tmp_path: Path, capsys: Capture
) -> None:
    folder = tmp_path / "model"
    AutoModelForCausalLM.from_pretrained(source).save_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(source)
    tokenizer.chat_template = "{{ messages[0].content }}"  # nothing begins the text
    tokenizer.save_pretrained(folder)
    words = ["generate", f"--model={folder}", "--device=cpu", "--chat", "--prompt", "a", ""]
    assert cli.main(words) == 1
    assert "error: prompt 2 is '', which has no tokens" in capsys.readouterr().err


@pytest.mark.parametrize("model", ["missing/model", "./nowhere"])
def test_a_model_that_is_not_there_is_refused(model: str, capsys: Capture) -> None:
    assert cli.main(["generate", "--model", model, "--prompt", "a", "--device=cpu"]) == 1
    assert capsys.readouterr().err.startswith("zo2ext generate: error: ")
