"""A tiny random model of any architecture that transformers knows, from its config class.

Every size that a config has under a common name is reduced, in parts of composite configs too.
Nothing here depends on an architecture.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

VOCABULARY = 199
LENGTH = 12  # tokens per row: longer than the sliding windows below
LARGEST = 5_000_000  # parameters of a tiny model

Changes = Mapping[str, Mapping[str, Any]]  # settings by model type


# Sizes and the names that configs have for them; each is applied if the config has the name.
_SIZES: list[tuple[Any, str]] = [
    (VOCABULARY, "vocab_size src_vocab_size tgt_vocab_size vocab_size_per_layer_input"),
    (32, "hidden_size d_model n_embd dim embedding_size attention_hidden_size"),
    (32, "hidden_size_global audio_hidden_size"),
    (64, "intermediate_size ffn_dim d_ff n_inner inner_dim hidden_dim"),
    (64, "encoder_ffn_dim decoder_ffn_dim ffn_hidden_size"),
    (64, "max_position_embeddings n_positions n_ctx max_seq_len"),
    (3, "num_hidden_layers num_layers n_layer n_layers"),
    (2, "encoder_layers decoder_layers num_decoder_layers"),
    (4, "num_attention_heads n_head n_heads num_heads"),
    (4, "encoder_attention_heads decoder_attention_heads index_n_heads"),
    (2, "num_key_value_heads linear_num_key_heads"),  # may be aliases of the above
    (2, "num_experts_per_tok num_experts_per_token moe_k moe_top_k"),
    (4, "num_experts n_routed_experts num_local_experts moe_num_experts"),
    (4, "qk_rope_head_dim qk_nope_head_dim sliding_window rotary_dim"),
    (4, "state_size mamba_d_state ssm_state_size"),
    (4, "mamba_n_heads mamba_num_heads linear_num_value_heads"),
    (8, "head_dim d_kv v_head_dim linear_key_head_dim linear_value_head_dim mamba_head_dim"),
    (8, "hidden_size_per_layer_input index_head_dim"),
    (16, "moe_intermediate_size shared_expert_intermediate_size mamba_d_head"),
    (16, "q_lora_rank kv_lora_rank o_lora_rank"),
    (1, "n_group topk_group first_k_dense_replace"),
    (0.1, "dropout attention_dropout hidden_dropout resid_dropout dropout_rate"),  # in train mode
    (0.1, "resid_pdrop embd_pdrop emb_pdrop hidden_dropout_prob attention_probs_dropout_prob"),
]
_SMALL: dict[str, Any] = {
    **{name: size for size, names in _SIZES for name in names.split()},
    **{"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "use_cache": False},
    "output_router_logits": True,  # the auxiliary loss of experts becomes part of the loss
}
_NOT_KEPT = {"model_type", "transformers_version", "dtype", "torch_dtype", "_name_or_path"}


def tiny_config(config: Any, *, changes: Changes | None = None, **given: Any) -> Any:
    """Make a config of the same type as `config` with every size reduced that has a common name.

    Args:
        config: Config of transformers. Its flags, names and rates are kept.
        changes: Further settings by model type, for sizes that must agree with each other.
        given: Further settings of the outermost config, even those that it lacks by default.
    """
    from transformers import PreTrainedConfig

    config.allow_global_per_layer_attribute_access = True
    special = dict((changes or {}).get(config.model_type, {}))
    sizes: dict[str, Any] = {
        name: value
        for name, value in config.to_diff_dict().items()
        if isinstance(value, (bool, float, str)) and name not in _NOT_KEPT
    }
    sizes |= {k: v for k, v in _SMALL.items() if _settable(config, k)} | special
    if "qk_nope_head_dim" in sizes:
        sizes["num_key_value_heads"] = sizes["num_attention_heads"]
    sizes |= {k: v for k, v in given.items() if k != "model_type"}
    for name, value in vars(config).items():
        if isinstance(value, PreTrainedConfig):
            sizes[name] = tiny_config(value, changes=changes, **given.get(name, {}))
        elif _is_per_layer(value, config) and name not in special:
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
    """Choose `count` layer kinds, as many different ones as fit, in the order they first appear."""
    distinct = list(dict.fromkeys(kinds))
    return (distinct + [distinct[-1]] * count)[:count]


def tiny_model(model_class: Any, config: Any) -> nn.Module:
    """Make a random model: float32, eval mode, seeded, with no weight left at zero or one.

    Args:
        model_class: Model class or auto class of transformers, for `config` or for a part of it.
        config: Config from `tiny_config`.

    Raises:
        ValueError: The model has more than LARGEST parameters.
    """
    config = _part_for(model_class, config)
    make = getattr(model_class, "_from_config", None) or model_class.from_config
    with torch.device("meta"):
        size = sum(p.numel() for p in make(copy.deepcopy(config)).parameters())
    if size > LARGEST:
        raise ValueError(f"{size:,} parameters even when reduced")
    torch.manual_seed(0)
    model: nn.Module = make(config).float().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.is_floating_point():
                parameter.add_(0.02 * torch.randn_like(parameter))
    return model


def _part_for(model_class: Any, config: Any) -> Any:
    wanted = getattr(model_class, "config_class", None)
    if wanted is None or isinstance(config, wanted):
        return config
    parts = [part for part in vars(config).values() if isinstance(part, wanted)]
    return parts[0] if parts else config
