"""Shapes of known models, as configs without weights. Needs transformers and nothing of zo2ext."""

from __future__ import annotations

from typing import Any


def _opt(hidden: int, layers: int, heads: int, **other: Any) -> tuple[str, dict[str, Any]]:
    config = {
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "ffn_dim": 4 * hidden,
        "word_embed_proj_dim": hidden,
        "vocab_size": 50272,
        "max_position_embeddings": 2048,
    }
    return "opt", config | other


def _gated(
    kind: str, hidden: int, inner: int, layers: int, heads: int, vocabulary: int, **other: Any
) -> tuple[str, dict[str, Any]]:
    config = {
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": 8,
        "vocab_size": vocabulary,
        "max_position_embeddings": 8192,
        "tie_word_embeddings": False,
    }
    return kind, config | other


SHAPES: dict[str, tuple[str, dict[str, Any]]] = {
    "tiny": _opt(64, 2, 4, vocab_size=512, max_position_embeddings=128),
    "opt-125m": _opt(768, 12, 12),
    "opt-350m": _opt(1024, 24, 16, word_embed_proj_dim=512, do_layer_norm_before=False),
    "opt-1.3b": _opt(2048, 24, 32),
    "opt-2.7b": _opt(2560, 32, 32),
    "opt-6.7b": _opt(4096, 32, 32),
    "opt-13b": _opt(5120, 40, 40),
    "opt-30b": _opt(7168, 48, 56),
    "opt-66b": _opt(9216, 64, 72),
    "opt-175b": _opt(12288, 96, 96),
    "llama-3-8b": _gated("llama", 4096, 14336, 32, 32, 128256),
    "llama-3-70b": _gated("llama", 8192, 28672, 80, 64, 128256),
    "qwen3-32b": _gated("qwen3", 5120, 25600, 64, 64, 151936, head_dim=128),
}


def make_config(shape: str, *, layers: int | None = None, length: int | None = None) -> Any:
    """The transformers config of a shape.

    Args:
        shape: A key of SHAPES.
        layers: Decoder blocks, where not the shape's own.
        length: Longest sequence that has to fit.
    """
    from transformers import AutoConfig

    kind, values = SHAPES[shape]
    values = dict(values)
    if layers:
        values["num_hidden_layers"] = layers
    if length:
        values["max_position_embeddings"] = max(values["max_position_embeddings"], length)
    config = AutoConfig.for_model(kind, **values)
    config.use_cache = False  # nothing is generated
    return config
