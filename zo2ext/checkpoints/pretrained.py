"""Loads models and tokenizers from a folder or the hub; never pickles, never remote code."""

from __future__ import annotations

import sys
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from zo2ext.checkpoints.folders import check_folder
from zo2ext.errors import UserError


def load_config(source: str, *, max_length: int, causal: bool = True) -> Any:
    """Load the config of a model, given its folder or hub name.

    Args:
        source: Folder or hub name.
        max_length: Number of tokens that the model has to read.
        causal: Whether the model has to be a causal language model.

    Raises:
        UserError: It cannot be read, the model's context is shorter than `max_length` tokens, or
            it is a masked language model where a causal one is needed.
    """
    from transformers import MODEL_FOR_MASKED_LM_MAPPING, AutoConfig

    _check_folder(source)
    hub = "" if Path(source).is_dir() else " (there is no such folder; the hub was asked)"
    with as_user_errors(f"cannot load model {source!r}{hub}"):
        config: Any = AutoConfig.from_pretrained(source, trust_remote_code=False)
    decodes = any(getattr(config, n, False) for n in ("is_decoder", "is_encoder_decoder", "causal"))
    if causal and type(config) in MODEL_FOR_MASKED_LM_MAPPING and not decodes:
        raise UserError(
            f"model {source!r} is a masked language model ({config.model_type}), which sees the "
            "token that it has to predict; expected a causal language model"
        )
    context = context_of(config)
    if context is not None and max_length > context:
        raise UserError(
            f"seq_len is {max_length}, but model {source!r} reads at most {context} tokens"
        )
    return config


def context_of(config: Any) -> int | None:
    """Return the number of tokens that a model reads at most; None if its config has no limit."""
    context = getattr(config.get_text_config(), "max_position_embeddings", None)
    return context if isinstance(context, int) else None


def load_tokenizer(source: str) -> Any:
    """Load the tokenizer of a model, or raise a `UserError`."""
    from transformers import AutoTokenizer

    with as_user_errors(f"cannot load a tokenizer from model {source!r}"):
        return AutoTokenizer.from_pretrained(source, trust_remote_code=False)


def load_model(source: str, config: Any, *, max_token: int) -> Any:
    """Load a causal language model, in eval mode and in the dtype that it was saved in.

    Raises:
        UserError: Its files are missing, damaged or incomplete, or its vocabulary lacks the token
            id `max_token`.
    """
    from transformers import AutoModelForCausalLM

    check_vocabulary(source, config, max_token=max_token)
    with as_user_errors(f"cannot load model {source!r}"), transformers_bars(sys.stderr.isatty()):
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            source,
            config=config,
            dtype="auto",
            use_safetensors=True,
            trust_remote_code=False,
            ignore_mismatched_sizes=True,  # an error below, with names
            output_loading_info=True,
        )
    model, info = loaded
    check_loading(source, info)
    return model.eval()


@contextmanager
def transformers_bars(shown: bool) -> Iterator[None]:
    """Enable or disable transformers' progress bars in this block."""
    from transformers.utils import logging

    before = logging.is_progress_bar_enabled()
    if before and not shown:
        logging.disable_progress_bar()
    try:
        yield
    finally:
        if before:
            logging.enable_progress_bar()


def check_loading(source: str, info: Mapping[str, Any]) -> None:
    """Raise an error if transformers' loading `info` lists missing or mismatched weights."""
    raise_if_any(info["missing_keys"], f"model {source!r} lacks weights")
    raise_if_any(
        [f"{name} {tuple(shape)}" for name, shape, _ in info["mismatched_keys"]],
        f"model {source!r} has weights of other shapes than its config.json says",
    )


def check_vocabulary(source: str, config: Any, *, max_token: int) -> None:
    """Raise a `UserError` if a model's vocabulary lacks the token id `max_token`."""
    vocabulary = getattr(config.get_text_config(), "vocab_size", None)
    if isinstance(vocabulary, int) and max_token >= vocabulary:
        raise UserError(
            f"model {source!r} has {vocabulary} tokens, but its tokenizer makes token {max_token} "
            "of the text: they do not belong together"
        )


def _check_folder(source: str) -> None:
    path = Path(source)
    looks_like_path = source.startswith((".", "/", "~")) or source.count("/") > 1
    if (looks_like_path or path.exists()) and not path.is_dir():
        raise UserError(f"model is {source!r}, which is not a directory")
    if not path.is_dir():
        return
    check_folder(path)
    if not any(path.glob("*.safetensors")):
        raise UserError(
            f"model is {source!r}, a folder without weights as safetensors"
            + (" (pickles are not read)" if any(path.glob("*.bin")) else "")
        )


@contextmanager
def as_user_errors(what: str) -> Iterator[None]:
    """Turn any exception in this block into a `UserError` whose message begins with `what`."""
    try:
        yield
    except Exception as error:
        text = " ".join(str(error).split())
        text = text if len(text) <= 300 else text[:297] + "..."
        raise UserError(f"{what}: {type(error).__name__}: {text}") from error


def raise_if_any(names: Collection[str], problem: str) -> None:
    """Raise a `UserError` with `problem` and some of `names`, if there are any."""
    if names:
        shown = sorted(names)[:5] + ["..."] * (len(names) > 5)
        raise UserError(f"{problem}: {', '.join(shown)}")
