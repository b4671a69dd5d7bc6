"""Sizes that must agree with each other in tiny models of single types; see zo2ext.model.tiny."""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers import AutoConfig, PreTrainedModel

from zo2ext.model.tiny import LENGTH as LENGTH
from zo2ext.model.tiny import VOCABULARY, tiny_config, tiny_model


def _each(names: str, value: Any) -> dict[str, Any]:
    return dict.fromkeys(names.split(), value)


# By model type.
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

# For the parts of composite configs; some configs have no parts by default.
_PARTS: dict[str, dict[str, Any]] = {
    "dbrx": {"attn_config": {"rope_theta": 1e4, "clip_qkv": 8}, "ffn_config": {"hidden_size": 32}},
    "encoder-decoder": {
        "encoder": {"model_type": "bert"},
        "decoder": {"model_type": "bert", "is_decoder": True, "add_cross_attention": True},
    },
}


def small_config(model_type: str, **given: Any) -> Any:
    """Make the config of a tiny model of `model_type`; see `tiny_config`."""
    parts = _PARTS.get(model_type, {})
    config = AutoConfig.for_model(model_type, **parts)
    return tiny_config(config, changes=_ALSO, **(parts | given))


def small_model(model_class: type[PreTrainedModel], model_type: str, **given: Any) -> nn.Module:
    """Make a tiny random model of `model_type`; see `tiny_config` and `tiny_model`."""
    return tiny_model(model_class, small_config(model_type, **given))
