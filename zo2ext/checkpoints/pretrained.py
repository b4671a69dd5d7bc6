"""Models and tokenizers from a folder or the hub; never pickles, never remote code."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


def load_config(source: str, *, max_length: int) -> Any:
    """The settings of a model folder or hub name.

    Args:
        source: Folder or hub name.
        max_length: Tokens that the model is to be run on.

    Raises:
        ValueError: There are none, they cannot be read, or the context is shorter than
            `max_length`.
    """
    from transformers import AutoConfig

    _check_folder(source)
    hub = "" if Path(source).is_dir() else " (no folder here has that name; the hub was asked)"
    with failing_as(f"cannot load model {source!r}{hub}"):
        config: Any = AutoConfig.from_pretrained(source, trust_remote_code=False)
    context = getattr(config.get_text_config(), "max_position_embeddings", None)
    if isinstance(context, int) and max_length > context:
        raise ValueError(
            f"seq_len is {max_length}, but model {source!r} reads at most {context} tokens"
        )
    return config


def load_tokenizer(source: str) -> Any:
    """The tokenizer of a model folder or hub name.

    Raises:
        ValueError: There is none, or it cannot be read.
    """
    from transformers import AutoTokenizer

    with failing_as(f"cannot load a tokenizer from model {source!r}"):
        return AutoTokenizer.from_pretrained(source, trust_remote_code=False)


def load_model(source: str, config: Any, *, max_token: int) -> Any:
    """The causal language model of a folder or hub name, in the dtype it is saved in, in eval mode.

    Args:
        source: Folder or hub name.
        config: Its settings, from `load_config`.
        max_token: The largest token id that it is to be run on.

    Raises:
        ValueError: There is none, its files are damaged or incomplete, or its vocabulary lacks
            `max_token`.
    """
    from transformers import AutoModelForCausalLM

    check_vocabulary(source, config, max_token=max_token)
    with failing_as(f"cannot load model {source!r}"):
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            source,
            config=config,
            dtype="auto",
            use_safetensors=True,
            trust_remote_code=False,
            ignore_mismatched_sizes=True,  # refused below, by name
            output_loading_info=True,
        )
    model, info = loaded
    refuse(f"model {source!r} lacks weights", info["missing_keys"])
    refuse(
        f"model {source!r} has weights of other shapes than its config.json says",
        [f"{name} {tuple(there)}" for name, there, _ in info["mismatched_keys"]],
    )
    return model.eval()


def check_vocabulary(source: str, config: Any, *, max_token: int) -> None:
    """Refuse a model whose vocabulary lacks a token.

    Args:
        source: Its folder or hub name, for the message.
        config: Its settings, from `load_config`.
        max_token: The largest token id that it is to be run on.

    Raises:
        ValueError: With both numbers.
    """
    vocabulary = getattr(config.get_text_config(), "vocab_size", None)
    if isinstance(vocabulary, int) and max_token >= vocabulary:
        raise ValueError(
            f"model {source!r} has {vocabulary} tokens, but its tokenizer makes token {max_token} "
            "of the text: they do not belong together"
        )


def _check_folder(source: str) -> None:
    path = Path(source)
    looks_like_path = source.startswith((".", "/", "~")) or source.count("/") > 1
    if (looks_like_path or path.exists()) and not path.is_dir():
        raise ValueError(f"model is {source!r}, which is no folder")
    if not path.is_dir():
        return
    if not (path / "config.json").is_file():
        raise ValueError(f"model is {source!r}, a folder without a config.json")
    if not any(path.glob("*.safetensors")):
        raise ValueError(
            f"model is {source!r}, a folder without weights as safetensors"
            + (" (pickles are not read)" if any(path.glob("*.bin")) else "")
        )


@contextmanager
def failing_as(what: str) -> Iterator[None]:
    """Whatever the libraries below raise, as one ValueError."""
    try:
        yield
    except Exception as error:
        text = " ".join(str(error).split())
        text = text if len(text) <= 300 else text[:297] + "..."
        raise ValueError(f"{what}: {type(error).__name__}: {text}") from error


def refuse(problem: str, names: Collection[str]) -> None:
    """Raise a ValueError that says `problem` and some of `names`, where there are any."""
    if names:
        shown = sorted(names)[:5] + ["..."] * (len(names) > 5)
        raise ValueError(f"{problem}: {', '.join(shown)}")
