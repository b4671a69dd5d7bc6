"""Models and tokenizers from a folder or the hub; never pickles, never remote code."""

from __future__ import annotations

from pathlib import Path
from typing import Any


def load_tokenizer(source: str) -> Any:
    """The tokenizer of a model folder or hub name.

    Raises:
        ValueError: There is none, or it cannot be read.
    """
    from transformers import AutoTokenizer

    _check_folder(source)
    try:
        return AutoTokenizer.from_pretrained(source)
    except Exception as error:  # whatever the libraries below raise, said as one thing
        raise ValueError(
            f"cannot load a tokenizer from model {source!r}: {_brief(error)}"
        ) from error


def load_model(source: str, *, max_length: int) -> Any:
    """The causal language model of a folder or hub name, in the dtype it is saved in, in eval mode.

    Args:
        source: Folder or hub name.
        max_length: Tokens that the model is to be run on.

    Raises:
        ValueError: There is none, its files are damaged or incomplete, or its context is shorter
            than `max_length`.
    """
    from transformers import AutoModelForCausalLM

    _check_folder(source)
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            source, use_safetensors=True, output_loading_info=True
        )
    except Exception as error:  # whatever the libraries below raise, said as one thing
        raise ValueError(f"cannot load model {source!r}: {_brief(error)}") from error
    model, info = loaded
    if info["missing_keys"]:
        raise ValueError(
            f"model {source!r} lacks weights: {', '.join(sorted(info['missing_keys'])[:5])}"
        )
    context = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if isinstance(context, int) and max_length > context:
        raise ValueError(
            f"seq_len is {max_length}, but model {source!r} reads at most {context} tokens"
        )
    return model.eval()


def _check_folder(source: str) -> None:
    path = Path(source)
    if path.is_dir() and not (path / "config.json").is_file():
        raise ValueError(f"model is {source!r}, a folder without a config.json")
    looks_like_path = source.startswith((".", "/", "~")) or source.count("/") > 1
    if looks_like_path and not path.is_dir():
        raise ValueError(f"model is {source!r}, which is no folder")


def _brief(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
