"""Tiny random models of many families: float32, seeded, no weight left at zero or one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
)

VOCABULARY = 199

_COMMON: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_OPT: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "ffn_dim": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "word_embed_proj_dim": 16,
    "pad_token_id": 1,
}
_GPT2: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "n_embd": 32,
    "n_layer": 3,
    "n_head": 4,
    "n_positions": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_MOE: dict[str, Any] = {"num_experts_per_tok": 2, "output_router_logits": True}

# name: (auto class, model type, config)
CASES: dict[str, tuple[Any, str, dict[str, Any]]] = {
    "opt": (AutoModelForCausalLM, "opt", _OPT),
    "opt-untied": (AutoModelForCausalLM, "opt", _OPT | {"tie_word_embeddings": False}),
    "llama": (AutoModelForCausalLM, "llama", _COMMON),
    "llama-tied": (AutoModelForCausalLM, "llama", _COMMON | {"tie_word_embeddings": True}),
    "mistral-sw": (AutoModelForCausalLM, "mistral", _COMMON | {"sliding_window": 4, "head_dim": 8}),
    "qwen2": (AutoModelForCausalLM, "qwen2", _COMMON),
    "qwen3": (AutoModelForCausalLM, "qwen3", _COMMON | {"head_dim": 8}),
    "qwen3_moe": (
        AutoModelForCausalLM,
        "qwen3_moe",
        _COMMON
        | _MOE
        | {"head_dim": 8, "num_experts": 4, "moe_intermediate_size": 16, "decoder_sparse_step": 1},
    ),
    "mixtral": (
        AutoModelForCausalLM,
        "mixtral",
        _COMMON | _MOE | {"num_local_experts": 4, "head_dim": 8},
    ),
    "gpt2": (AutoModelForCausalLM, "gpt2", _GPT2),
    "gpt_neox": (AutoModelForCausalLM, "gpt_neox", _COMMON),
    "gemma2": (AutoModelForCausalLM, "gemma2", _COMMON | {"head_dim": 8, "sliding_window": 4}),
    "gemma3_text": (
        AutoModelForCausalLM,
        "gemma3_text",
        _COMMON | {"head_dim": 8, "sliding_window": 4},
    ),
    "phi3": (AutoModelForCausalLM, "phi3", _COMMON),
    "deepseek_v3": (
        AutoModelForCausalLM,
        "deepseek_v3",
        _COMMON
        | {
            "num_key_value_heads": 4,
            "n_routed_experts": 4,
            "num_experts_per_tok": 2,
            "n_group": 1,
            "topk_group": 1,
            "moe_intermediate_size": 16,
            "q_lora_rank": 16,
            "kv_lora_rank": 16,
            "qk_rope_head_dim": 4,
            "qk_nope_head_dim": 4,
            "v_head_dim": 8,
            "first_k_dense_replace": 1,
        },
    ),
    "gpt_oss": (
        AutoModelForCausalLM,
        "gpt_oss",
        _COMMON | {"head_dim": 8, "num_local_experts": 4, "num_experts_per_tok": 2},
    ),
    "bloom": (
        AutoModelForCausalLM,
        "bloom",
        {"vocab_size": VOCABULARY, "hidden_size": 32, "n_layer": 3, "n_head": 4},
    ),
    "falcon": (
        AutoModelForCausalLM,
        "falcon",
        {
            "vocab_size": VOCABULARY,
            "hidden_size": 32,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
        },
    ),
    "mamba": (
        AutoModelForCausalLM,
        "mamba",
        {"vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": 3, "state_size": 4},
    ),
    "llama-seqcls": (AutoModelForSequenceClassification, "llama", _COMMON),
    "bert-seqcls": (AutoModelForSequenceClassification, "bert", _COMMON),
    "roberta-seqcls": (AutoModelForSequenceClassification, "roberta", _COMMON),
    "modernbert-seqcls": (
        AutoModelForSequenceClassification,
        "modernbert",
        _COMMON | {"cls_token_id": 1, "sep_token_id": 2},
    ),
    "t5": (
        AutoModelForSeq2SeqLM,
        "t5",
        {
            "vocab_size": VOCABULARY,
            "d_model": 32,
            "d_kv": 8,
            "d_ff": 64,
            "num_layers": 3,
            "num_heads": 4,
            "decoder_start_token_id": 0,
        },
    ),
    "bart": (
        AutoModelForSeq2SeqLM,
        "bart",
        {
            "vocab_size": VOCABULARY,
            "d_model": 32,
            "encoder_layers": 2,
            "decoder_layers": 2,
            "encoder_attention_heads": 4,
            "decoder_attention_heads": 4,
            "encoder_ffn_dim": 64,
            "decoder_ffn_dim": 64,
            "max_position_embeddings": 64,
            "decoder_start_token_id": 2,
        },
    ),
}


def tiny(name: str, *, seed: int = 0, **config: Any) -> nn.Module:
    """A model of about 30,000 parameters, in eval mode; torch's generator is left as it was.

    Args:
        name: A key of CASES.
        seed: Of the weights.
        config: Overrides of the config, for instance ``resid_pdrop=0.0``.
    """
    auto, model_type, case = CASES[name]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        made = AutoConfig.for_model(model_type, **(case | config))
        model: nn.Module = auto.from_config(made).float().eval()
        with torch.no_grad():
            for p in model.parameters():
                p.add_(0.05 * torch.randn_like(p))
    return model


def batch(name: str, *, seed: int = 7, size: int = 3, length: int = 11) -> dict[str, Tensor]:
    """Random tokens with labels, shape [size, length]; the second row ends in padding."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, VOCABULARY, (size, length), generator=generator)
    mask = torch.ones_like(ids)
    mask[1:2, length - length // 3 :] = 0
    ids[mask == 0] = CASES[name][2].get("pad_token_id", 0)
    if CASES[name][0] is AutoModelForSequenceClassification:
        labels = torch.randint(0, 2, (size,), generator=generator)
    else:
        labels = ids.masked_fill(mask == 0, -100)
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def batches(name: str, count: int, **shape: int) -> list[dict[str, Tensor]]:
    """`count` different batches."""
    return [batch(name, seed=7 + i, **shape) for i in range(count)]


def pretrained(folder: Path) -> nn.Module:
    """A model from a folder, float32, eval mode."""
    model: nn.Module = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return model.eval()
