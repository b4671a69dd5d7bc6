"""A tiny random model of any type that transformers knows, from its own config class.

Every size that a config has by a common name is shrunk, in the parts of composite configs too.
Nothing here knows an architecture: the second table only holds sizes that must agree with each
other, for the types where the common ones do not.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel

VOCABULARY = 199
LENGTH = 12  # of a sequence: longer than the sliding windows below
LARGEST = 5_000_000  # parameters of a model that is still tiny


def _each(names: str, value: Any) -> dict[str, Any]:
    return dict.fromkeys(names.split(), value)


# Sizes by the names that configs give them. Applied where a config has the name.
_SMALL: dict[str, Any] = {
    **_each("vocab_size src_vocab_size tgt_vocab_size vocab_size_per_layer_input", VOCABULARY),
    **_each("hidden_size d_model n_embd dim embedding_size attention_hidden_size", 32),
    **_each("intermediate_size ffn_dim d_ff n_inner inner_dim hidden_dim", 64),
    **_each("encoder_ffn_dim decoder_ffn_dim ffn_hidden_size", 64),
    **_each("num_hidden_layers num_layers n_layer n_layers", 3),
    **_each("encoder_layers decoder_layers num_decoder_layers", 2),
    **_each("num_attention_heads n_head n_heads num_heads", 4),
    **_each("encoder_attention_heads decoder_attention_heads", 4),
    "num_key_value_heads": 2,
    **_each("head_dim d_kv", 8),
    **_each("max_position_embeddings n_positions n_ctx max_seq_len", 64),
    **_each("num_experts n_routed_experts num_local_experts moe_num_experts", 4),
    **_each("num_experts_per_tok num_experts_per_token moe_k moe_top_k", 2),
    **_each("moe_intermediate_size shared_expert_intermediate_size", 16),
    **_each("n_group topk_group", 1),
    "first_k_dense_replace": 1,
    **_each("q_lora_rank kv_lora_rank o_lora_rank", 16),
    **_each("qk_rope_head_dim qk_nope_head_dim", 4),
    "v_head_dim": 8,
    **_each("state_size mamba_d_state ssm_state_size", 4),
    **_each("mamba_n_heads mamba_num_heads linear_num_value_heads", 4),
    "linear_num_key_heads": 2,
    **_each("linear_key_head_dim linear_value_head_dim mamba_head_dim", 8),
    "mamba_d_head": 16,
    "sliding_window": 4,
    "rotary_dim": 4,
    "hidden_size_per_layer_input": 8,
    **_each("hidden_size_global audio_hidden_size", 32),
    "index_n_heads": 4,
    "index_head_dim": 8,
    # Dropout is for train mode only.
    **_each("dropout attention_dropout hidden_dropout resid_dropout dropout_rate", 0.1),
    **_each("resid_pdrop embd_pdrop emb_pdrop", 0.1),
    **_each("hidden_dropout_prob attention_probs_dropout_prob", 0.1),
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "use_cache": False,
    "output_router_logits": True,  # the auxiliary loss of experts becomes part of the loss
}

# What single types need beside that: sizes that must agree with each other.
_ALSO: dict[str, dict[str, Any]] = {
    "ctrl": {"dff": 64},
    "opt": {"word_embed_proj_dim": 32},
    "mamba2": {"num_heads": 8, "head_dim": 8, "expand": 2, "n_groups": 2, "chunk_size": 8},
    "bigbird_pegasus": {"attention_type": "original_full"},
    "big_bird": {"attention_type": "original_full"},
    "cpmant": {"dim_head": 8, "dim_ff": 64, "prompt_length": 4},
    "xmod": {"languages": ["en_XX"], "default_language": "en_XX"},
    "reformer": {"axial_pos_embds": False, "attn_layers": ["local", "local"]},
    "rwkv": {"context_length": 64},
    "gemma3n_text": {"num_kv_shared_layers": 1},
    "dots1": {"n_shared_experts": 1},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]], "num_layers": 2},
    "zaya": {"num_experts_per_tok": 1},
    "lfm2_moe": {"layer_types": ["conv", "full_attention", "conv"]},
    "nemotron_h": {"n_groups": 2},
    "falcon_h1": {"mamba_d_ssm": 64, "mamba_d_head": 16, "mamba_n_groups": 1},
    "roc_bert": {"shape_vocab_size": 50, "pronunciation_vocab_size": 50},
    "prophetnet": {
        "num_hidden_layers": None,
        "num_encoder_attention_heads": 4,
        "num_decoder_attention_heads": 4,
        "num_encoder_layers": 2,
    },
    "cohere_compass_text": {
        "layer_types": ["sliding_attention", "full_attention", "full_attention"],
        "rope_parameters": {
            kind: {"rope_type": "default", "rope_theta": 1e4}
            for kind in ("sliding_attention", "full_attention")
        },
    },
    "zamba": {
        "num_hidden_layers": 6,
        "attn_layer_period": 3,
        "attn_layer_offset": 2,
        "attention_hidden_size": 64,
        "attention_head_dim": 16,
    },
    "zamba2": {"attention_hidden_size": 64, "attention_head_dim": 16},
    **{key: {"head_dim": 4} for key in ["axk1", "deepseek_v3", "longcat_flash", "youtu"]},
    "xlnet": {"max_position_embeddings": None, "d_inner": 64},
    "blt": {"encoder_hash_byte_group_vocab": 50},
    "dots3_note_text": {
        **_each("swa_num_attention_heads swa_num_key_value_heads", 4),
        **_each("swa_q_lora_rank swa_kv_lora_rank", 16),
        **_each("swa_head_dim swa_v_head_dim", 8),
        "swa_qk_nope_head_dim": 4,
    },
    "dots3_note_vision_encoder": {"adapter_in_dim": 32, "adapter_out_dim": 32},
    "dots3_note_audio_encoder": {"adapter_input_size": 32, "adapter_out_dim": 32},
    "esmc": {"num_key_value_heads": 4},
    "funnel": {"num_hidden_layers": None, "block_sizes": [1, 1, 1]},
    "layoutlmv3": {"coordinate_size": 6, "shape_size": 4},
    "lilt": {"hidden_size": 48},
    "luke": {"entity_vocab_size": 50, "entity_emb_size": 32},
    "diffllama": {"attention_dropout": 0.0},
    "led": {"attention_window": 8},
    "nllb-moe": {"output_router_logits": False},  # which the library cannot gather in 5.23
    "perceiver": {"num_latents": 8, "d_latents": 32, "num_self_attends_per_block": 2},
    "nemotron3_5_transcribe_word_timestamp": {"blank_token_id": VOCABULARY - 1},
    "vibevoice_acoustic_tokenizer_encoder": {"num_filters": 2},
    "phi4_multimodal_audio": {"nemo_conv_channels": 32, "num_blocks": 2},
    "qwen4_exp_text": {
        "indexer_n_heads": 2,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 8,
        "indexer_budget": 8,
        "indexer_compress_ratio": 2,
        "ngram_vocab_size_base": 50,
    },
}

# What parts of composite configs need, of which some have no parts of their own accord.
_PARTS: dict[str, dict[str, Any]] = {
    "dbrx": {"attn_config": {"rope_theta": 1e4, "clip_qkv": 8}, "ffn_config": {"hidden_size": 32}},
    "encoder-decoder": {
        "encoder": {"model_type": "bert"},
        "decoder": {"model_type": "bert", "is_decoder": True, "add_cross_attention": True},
    },
}


def small_config(model_type: str, **given: Any) -> Any:
    """The config of `model_type` with every size shrunk that it knows by a common name.

    Args:
        given: What the config is to have beside that, known to it by default or not.
    """
    parts = _PARTS.get(model_type, {})
    return _shrink(AutoConfig.for_model(model_type, **parts), parts | given)


def _shrink(config: Any, given: dict[str, Any]) -> Any:
    config.allow_global_per_layer_attribute_access = True
    also = _ALSO.get(config.model_type, {})
    sizes = {k: v for k, v in _SMALL.items() if _settable(config, k)} | also
    if "qk_nope_head_dim" in sizes:
        sizes["num_key_value_heads"] = sizes["num_attention_heads"]
    sizes |= {k: v for k, v in given.items() if k != "model_type"}
    for name, value in vars(config).items():
        if isinstance(value, PreTrainedConfig):
            sizes[name] = _shrink(value, given.get(name, {}))
        elif _is_per_layer(value, config) and name not in also:
            layers = sizes.get("num_hidden_layers", 3)
            sizes[name.removeprefix("_")] = _every_kind(value, layers)
    return type(config)(**{k: v for k, v in sizes.items() if v is not None})


def _settable(config: Any, name: str) -> bool:
    attribute = getattr(type(config), name, None)
    readonly = isinstance(attribute, property) and attribute.fset is None
    return not readonly and hasattr(config, name)


def _is_per_layer(value: Any, config: Any) -> bool:
    layers = getattr(config, "num_hidden_layers", 0)
    return isinstance(value, list) and len(value) == layers > 0 and isinstance(value[0], str)


def _every_kind(kinds: list[str], count: int) -> list[str]:
    """`count` layer kinds, as many different ones as fit, in the order they first appear."""
    distinct = list(dict.fromkeys(kinds))
    return (distinct + [distinct[-1]] * count)[:count]


def small_model(model_class: type[PreTrainedModel], model_type: str, **given: Any) -> nn.Module:
    """A tiny random model of `model_type`, float32, eval mode, no weight left at zero or one.

    Args:
        model_class: Of transformers, one that takes this type's config or a part of it.
        model_type: As in a config.json.
        given: See `small_config`.

    Raises:
        ValueError: It has more than LARGEST parameters even when shrunk. The library's own errors
            come out as they are.
    """
    config = _part_for(model_class, small_config(model_type, **given))
    with torch.device("meta"):
        size = sum(p.numel() for p in model_class(copy.deepcopy(config)).parameters())
    if size > LARGEST:
        raise ValueError(f"{size:,} parameters even when shrunk")
    torch.manual_seed(0)
    model: nn.Module = model_class(config).float().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.is_floating_point():
                parameter.add_(0.02 * torch.randn_like(parameter))
    return model


def _part_for(model_class: type[PreTrainedModel], config: Any) -> Any:
    """`config`, or the part of it that `model_class` is made from."""
    wanted = model_class.config_class
    if wanted is None or isinstance(config, wanted):
        return config
    parts = [part for part in vars(config).values() if isinstance(part, wanted)]
    return parts[0] if parts else config
