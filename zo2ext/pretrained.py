"""Models and tokenizers from a folder or the hub; never pickles, never remote code."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from safetensors import SafetensorError


def load_tokenizer(source: str) -> Any:
    """The tokenizer of a model folder or hub name.

    Raises:
        ValueError: There is none, or it cannot be read.
    """
    from transformers import AutoTokenizer

    _check_folder(source)
    try:
        return AutoTokenizer.from_pretrained(source, trust_remote_code=False)
    except Exception as error:  # whatever the libraries below raise, said as one thing
        raise ValueError(
            f"cannot load a tokenizer from model {source!r}: {_brief(error)}"
        ) from error


def load_model(source: str, *, max_length: int, max_token: int) -> Any:
    """The causal language model of a folder or hub name, in the dtype it is saved in, in eval mode.

    Args:
        source: Folder or hub name.
        max_length: Tokens that the model is to be run on.
        max_token: The largest token id that it is to be run on.

    Raises:
        ValueError: There is none, its files are damaged or incomplete, its context is shorter
            than `max_length`, or its vocabulary lacks `max_token`.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    _check_folder(source)
    try:
        config = AutoConfig.from_pretrained(source, trust_remote_code=False)
    except Exception as error:  # whatever the libraries below raise, said as one thing
        raise ValueError(f"cannot load model {source!r}: {_brief(error)}") from error
    _check_fit(config.get_text_config(), source, max_length, max_token)
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            source,
            config=config,
            dtype="auto",
            use_safetensors=True,
            trust_remote_code=False,
            output_loading_info=True,
        )
    except Exception as error:
        raise ValueError(f"cannot load model {source!r}: {_brief(error)}") from error
    model, info = loaded
    if info["missing_keys"]:
        missing = sorted(info["missing_keys"])
        raise ValueError(
            f"model {source!r} lacks {len(missing)} of its weights: {', '.join(missing[:5])}"
            + (", ..." if len(missing) > 5 else "")
        )
    return model.eval()


def save(model: Any, tokenizer: Any, folder: Path) -> None:
    """Write an ordinary checkpoint: weights as safetensors, settings and tokenizer.

    Raises:
        OSError: It cannot be written.
    """
    try:
        model.save_pretrained(folder)
    except SafetensorError as error:  # a full disk, mostly
        raise OSError(f"cannot write weights to {folder}: {error}") from error
    tokenizer.save_pretrained(folder)


def _check_folder(source: str) -> None:
    path = Path(source)
    looks_like_path = source.startswith((".", "/", "~")) or source.count("/") > 1
    if (looks_like_path or path.exists()) and not path.is_dir():
        raise ValueError(f"model is {source!r}, which is no folder")
    if path.is_dir() and not (path / "config.json").is_file():
        raise ValueError(f"model is {source!r}, a folder without a config.json")


def _check_fit(config: Any, source: str, max_length: int, max_token: int) -> None:
    context = getattr(config, "max_position_embeddings", None)
    if isinstance(context, int) and max_length > context:
        raise ValueError(
            f"seq_len is {max_length}, but model {source!r} reads at most {context} tokens"
        )
    vocabulary = getattr(config, "vocab_size", None)
    if isinstance(vocabulary, int) and max_token >= vocabulary:
        raise ValueError(
            f"model {source!r} has {vocabulary} tokens, but its tokenizer makes token {max_token} "
            "of the text: they do not belong together"
        )


def _brief(error: Exception) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text if len(text) <= 300 else text[:297] + '...'}"
