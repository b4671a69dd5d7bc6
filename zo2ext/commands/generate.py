"""``zo2ext generate``: complete prompts with a causal language model whose weights are streamed."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from zo2ext._format import gib, without_surrogates
from zo2ext.checkpoints.pretrained import as_user_errors, load_config, load_model, load_tokenizer
from zo2ext.commands.arguments import GenerateArguments
from zo2ext.config import config_from
from zo2ext.engine.engine import ZOEngine
from zo2ext.engine.offload import offload
from zo2ext.errors import UserError
from zo2ext.ops.formats import Storage
from zo2ext.streaming.devices.select import make_device


@dataclass(frozen=True)
class Completion:
    """A model's completion of a prompt.

    Attributes:
        prompt: The prompt.
        text: New text.
        tokens: Ids of the new tokens, including the one that ends the text.
    """

    prompt: str
    text: str
    tokens: list[int]


def generate(arguments: GenerateArguments) -> None:
    """Run ``zo2ext generate``; see `GenerateArguments`."""
    config = config_from(arguments)
    make_device(config.device)
    prompts = _prompts(arguments)
    settings = load_config(arguments.model, max_length=1)
    tokenizer = load_tokenizer(arguments.model)
    encoded = _encode(arguments, prompts, tokenizer, settings)
    storage = config.storage
    assert storage is None or isinstance(storage, Storage)
    # Only trainable weights are converted to a storage format with scales.
    packed = storage is not None and storage.scaled
    if storage is not None and not packed:
        settings.dtype = storage.dtype
    model = load_model(
        arguments.model, settings, max_token=max(max(tokens) for tokens in encoded)
    ).requires_grad_(packed)
    with offload(model, config, train=False) as zo:
        made, start = 0, time.perf_counter()
        for number, completion in enumerate(
            complete(zo, model, tokenizer, list(zip(prompts, encoded, strict=True)), arguments), 1
        ):
            of = f"{number} of {len(prompts)}"
            print(f"--- prompt {of}\n{completion.prompt}\n--- completion {of}\n{completion.text}")
            sys.stdout.flush()
            made += len(completion.tokens)
        seconds = time.perf_counter() - start
        print(
            f"{made} tokens in {seconds:.1f} s, {made / seconds:,.1f} tok/s; "
            f"{gib(zo.host_nbytes)} of weights on the host, {gib(zo.device_nbytes)} of buffers on "
            f"{zo.config.device or zo.device}, {gib(zo.traffic.uploaded)} uploaded",
            file=sys.stderr,
        )


def complete(
    zo: ZOEngine,
    model: Any,
    tokenizer: Any,
    prompts: Sequence[tuple[str, list[int]]],
    arguments: GenerateArguments,
) -> Iterator[Completion]:
    """Complete `prompts` (text, token ids) in order, ``arguments.batch_size`` at a time.

    Args:
        zo: Engine of `model`.
        model: Model to run.
        tokenizer: Tokenizer of `model`.
        prompts: Texts and their token ids.
        arguments: Options of the command.
    """
    ends = _ends(model)
    padding = next((t for t in (tokenizer.pad_token_id, *ends) if t is not None), 0)
    torch.manual_seed(arguments.seed)
    for begin in range(0, len(prompts), arguments.batch_size):
        batch = prompts[begin : begin + arguments.batch_size]
        width = max(len(tokens) for _, tokens in batch)
        rows = [[padding] * (width - len(tokens)) + tokens for _, tokens in batch]
        mask = [[0] * (width - len(tokens)) + [1] * len(tokens) for _, tokens in batch]
        output = model.generate(
            input_ids=torch.tensor(rows, device=zo.device),
            attention_mask=torch.tensor(mask, device=zo.device),
            max_new_tokens=arguments.max_new_tokens,
            pad_token_id=padding,
            num_beams=1,
            use_cache=True,
            **arguments.sampling(),
        )
        for (prompt, tokens), new in zip(batch, output[:, width:].tolist(), strict=True):
            length = next((i + 1 for i, token in enumerate(new) if token in ends), len(new))
            new = new[:length]
            yield Completion(prompt, _text(tokenizer, tokens, new), new)


def _prompts(arguments: GenerateArguments) -> list[str]:
    if arguments.prompt is not None:
        prompts = arguments.prompt
    elif arguments.prompts == "-":
        prompts = [line for line in sys.stdin.read().split("\n") if line.strip()]
    else:
        path = Path(arguments.prompts or "")
        try:
            text = path.read_text(encoding="utf-8-sig")
        except OSError as error:
            raise UserError(
                f"prompts is {str(path)!r}, which cannot be read: {error.strerror}"
            ) from error
        except UnicodeDecodeError as error:
            raise UserError(
                f"prompts {str(path)!r} is not UTF-8: {error.reason} at byte {error.start}"
            ) from error
        prompts = [line for line in text.split("\n") if line.strip()]
    if not prompts:
        raise UserError("expected at least one prompt, got none")
    return [without_surrogates(prompt) for prompt in prompts]


def _encode(
    arguments: GenerateArguments, prompts: Sequence[str], tokenizer: Any, settings: Any
) -> list[list[int]]:
    """Return the token ids of each prompt. A prompt that leaves no room for the new tokens loses
    its beginning; standard error reports it."""
    texts = [_in_template(arguments, tokenizer, prompt) for prompt in prompts]
    special = not arguments.chat  # a template includes them
    encoded = tokenizer(texts, add_special_tokens=special, verbose=False)["input_ids"]
    for number, tokens in enumerate(encoded, 1):
        if not tokens:
            raise UserError(f"prompt {number} is {prompts[number - 1]!r}, which has no tokens")
    context = getattr(settings.get_text_config(), "max_position_embeddings", None)
    if not isinstance(context, int):
        return list(encoded)
    room = context - arguments.max_new_tokens
    if room < 1:
        raise UserError(
            f"max_new_tokens is {arguments.max_new_tokens}, but model {arguments.model!r} reads at "
            f"most {context} tokens, including the prompt"
        )
    if all(len(tokens) <= room for tokens in encoded):
        return list(encoded)
    tokenizer.truncation_side = "left"
    cut = tokenizer(texts, add_special_tokens=special, truncation=True, max_length=room)
    lost = [len(a) - len(b) for a, b in zip(encoded, cut["input_ids"], strict=True) if a != b]
    print(
        f"prompts that lost their beginning: {len(lost)} of {len(prompts)}, {sum(lost)} tokens in "
        f"all: the model reads {context} tokens, {arguments.max_new_tokens} of them new",
        file=sys.stderr,
    )
    return list(cut["input_ids"])


def _in_template(arguments: GenerateArguments, tokenizer: Any, prompt: str) -> str:
    if not arguments.chat:
        return prompt
    if not tokenizer.chat_template:
        raise UserError(
            f"chat needs a chat template, and the tokenizer of model {arguments.model!r} has none; "
            "without --chat the prompt is completed as plain text"
        )
    with as_user_errors(f"cannot use the chat template of model {arguments.model!r}"):
        text: str = tokenizer.apply_chat_template(
            [{"role": "user", "content": prompt}], tokenize=False, add_generation_prompt=True
        )
    return text


def _ends(model: Any) -> tuple[int, ...]:
    """Return the ids of the tokens that end a text."""
    ends = model.generation_config.eos_token_id
    if ends is None:
        return ()
    return tuple(ends) if isinstance(ends, (list, tuple)) else (ends,)


def _text(tokenizer: Any, prompt: list[int], new: list[int]) -> str:
    """Return the text of `new`; both are decoded together, as the first space depends on both."""
    before = tokenizer.decode(prompt, skip_special_tokens=True)
    both = tokenizer.decode(prompt + new, skip_special_tokens=True)
    if both.startswith(before):
        return str(both[len(before) :])
    return str(tokenizer.decode(new, skip_special_tokens=True))
