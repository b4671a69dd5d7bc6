"""Every causal language model that transformers can build small, run unmodified.

    python tests/models.py                  the whole sweep, as a table (minutes)
    python tests/models.py llama gpt2 ...   some model types
    python tests/models.py --attention eager

For each model type a tiny random model is made from its own config class, with every size shrunk;
then two steps of the streamed engine are compared, bit for bit, with two steps of the plain loop in
`reference.py`. A type passes (same losses and weights), differs, fails (the plain loop runs, the
engine does not), or cannot be built or run plainly from a generic tiny config, with the reason.
"""

from __future__ import annotations

import argparse
import gc
import signal
import sys
import time
import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import reference
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

import zo2ext

VOCABULARY = 199
LARGEST = 3_000_000  # parameters of a model that is still tiny
SETTINGS: dict[str, Any] = {"lr": 1e-3, "eps": 1e-3, "seed": 3}

# Sizes by the names that configs give them. Applied where a config has the name.
_SMALL: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    **dict.fromkeys(["hidden_size", "d_model", "n_embd", "dim", "embedding_size"], 32),
    **dict.fromkeys(["intermediate_size", "ffn_dim", "d_ff", "n_inner", "inner_dim"], 64),
    **dict.fromkeys(["encoder_ffn_dim", "decoder_ffn_dim", "ffn_hidden_size"], 64),
    **dict.fromkeys(["num_hidden_layers", "num_layers", "n_layer", "n_layers"], 3),
    **dict.fromkeys(["encoder_layers", "decoder_layers", "num_decoder_layers"], 2),
    **dict.fromkeys(["num_attention_heads", "n_head", "n_heads", "num_heads"], 4),
    **dict.fromkeys(["encoder_attention_heads", "decoder_attention_heads"], 4),
    "num_key_value_heads": 2,
    "head_dim": 8,
    **dict.fromkeys(["max_position_embeddings", "n_positions", "n_ctx", "max_seq_len"], 64),
    **dict.fromkeys(["num_experts", "n_routed_experts", "num_local_experts", "moe_num_experts"], 4),
    **dict.fromkeys(["num_experts_per_tok", "num_experts_per_token", "moe_k", "moe_top_k"], 2),
    **dict.fromkeys(["moe_intermediate_size", "shared_expert_intermediate_size"], 16),
    **dict.fromkeys(["n_group", "topk_group"], 1),
    "first_k_dense_replace": 1,
    **dict.fromkeys(["q_lora_rank", "kv_lora_rank", "o_lora_rank"], 16),
    "qk_rope_head_dim": 4,
    "qk_nope_head_dim": 4,
    "v_head_dim": 8,
    **dict.fromkeys(["state_size", "mamba_d_state", "ssm_state_size"], 4),
    **dict.fromkeys(["mamba_n_heads", "mamba_num_heads", "linear_num_value_heads"], 4),
    "linear_num_key_heads": 2,
    **dict.fromkeys(["linear_key_head_dim", "linear_value_head_dim", "mamba_head_dim"], 8),
    "mamba_d_head": 16,
    "sliding_window": 4,
    "rotary_dim": 4,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "is_decoder": True,
    "use_cache": False,
    **dict.fromkeys(["vocab_size_per_layer_input"], VOCABULARY),
    "hidden_size_per_layer_input": 8,
    "attention_hidden_size": 32,
}

# What single types need beside that: sizes that must agree with each other.
_ALSO: dict[str, dict[str, Any]] = {
    "ctrl": {"dff": 64},
    "gptj": {"rotary_dim": 4},
    "codegen": {"rotary_dim": 4},
    "opt": {"word_embed_proj_dim": 32},
    "mamba2": {"num_heads": 8, "head_dim": 8, "expand": 2, "n_groups": 2, "chunk_size": 8},
    "bigbird_pegasus": {"attention_type": "original_full"},
    "big_bird": {"attention_type": "original_full"},
    "cpmant": {"dim_head": 8, "dim_ff": 64, "prompt_length": 4},
    "xmod": {"languages": ["en_XX"], "default_language": "en_XX"},
    "reformer": {"axial_pos_embds": False, "attn_layers": ["local", "local"]},
    "rwkv": {"attention_hidden_size": 32, "context_length": 64},
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
    "cohere_compass_text": {"layer_types": ["sliding_attention"] * 3},
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
}


@dataclass(frozen=True)
class Outcome:
    """What became of one model type."""

    model_type: str
    verdict: str  # passes, differs, fails, not run
    detail: str = ""
    parameters: int = 0
    seconds: float = 0.0


def small_config(model_type: str) -> Any:
    """The config of `model_type` with every size shrunk that it knows by a common name."""
    config = AutoConfig.for_model(model_type)
    config = config.get_text_config(decoder=True)
    kind, also = type(config), _ALSO.get(model_type, {})
    config.allow_global_per_layer_attribute_access = True
    sizes = {k: v for k, v in _SMALL.items() if _settable(config, k)} | also
    if "qk_nope_head_dim" in sizes:
        sizes["num_key_value_heads"] = sizes["num_attention_heads"]
    layers = sizes.get("num_hidden_layers", 3)
    for name, value in vars(config).items():
        per_layer = isinstance(value, list) and len(value) == getattr(
            config, "num_hidden_layers", 0
        )
        if per_layer and isinstance(value[0], str) and name not in also:
            sizes[name.removeprefix("_")] = _every_kind(value, layers)
    return kind(**{k: v for k, v in sizes.items() if v is not None})


def _settable(config: Any, name: str) -> bool:
    attribute = getattr(type(config), name, None)
    readonly = isinstance(attribute, property) and attribute.fset is None
    return not readonly and hasattr(config, name)


def _every_kind(kinds: list[str], count: int) -> list[str]:
    """`count` layer kinds, as many different ones as fit, in the order they first appear."""
    distinct = list(dict.fromkeys(kinds))
    return (distinct + [distinct[-1]] * count)[:count]


def tiny_model(model_type: str) -> nn.Module:
    """A tiny random model of `model_type`, float32, eval mode."""
    torch.manual_seed(0)
    with torch.device("meta"):
        size = sum(p.numel() for p in _build(model_type).parameters())
    if size > LARGEST:
        raise ValueError(f"{size:,} parameters even when shrunk")
    torch.manual_seed(0)
    model = _build(model_type).float().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.is_floating_point():
                parameter.add_(0.02 * torch.randn_like(parameter))
    return model


def _build(model_type: str) -> nn.Module:
    model: nn.Module = AutoModelForCausalLM.from_config(small_config(model_type))
    return model


def batches(count: int = 2) -> list[dict[str, torch.Tensor]]:
    """Random tokens with labels, (2, 12)."""
    generator = torch.Generator().manual_seed(1)
    made = [torch.randint(3, VOCABULARY, (2, 12), generator=generator) for _ in range(count)]
    return [{"input_ids": ids, "labels": ids.clone()} for ids in made]


def check(model_type: str, *, attention: str | None = None, granularity: str = "block") -> Outcome:
    """Two streamed steps of a tiny `model_type` against the plain loop."""
    start = time.perf_counter()

    def outcome(verdict: str, detail: str = "", parameters: int = 0) -> Outcome:
        return Outcome(model_type, verdict, detail, parameters, time.perf_counter() - start)

    try:
        model, plain = tiny_model(model_type), tiny_model(model_type)
        if attention is not None:
            for made in (model, plain):
                made.set_attn_implementation(attention)
        size = sum(p.numel() for p in model.parameters())
        data = batches()
        torch.manual_seed(2)
        expected = reference.mezo(plain, data, **SETTINGS)
    except Exception as error:  # any library's any error: the table says which
        return outcome("not run", _brief(error))
    if any(loss != loss for step in expected.losses for pair in step for loss in pair):
        return outcome("not run", "the plain loss is NaN", size)
    try:
        torch.manual_seed(2)
        config = zo2ext.ZOConfig(device="simulated", granularity=granularity, **SETTINGS)
        with zo2ext.offload(model, config) as zo:
            for step, batch in enumerate(data):
                zo.step(lambda batch=batch: model(**batch).loss)
                assert zo.last is not None
                losses = (zo.last.losses_plus[0], zo.last.losses_minus[0])
                if losses != expected.losses[step][0]:
                    return outcome("differs", f"step {step}: {losses}", size)
    except Exception as error:
        return outcome("fails", _brief(error), size)
    final = dict(model.named_parameters())
    for name, weights in expected.weights.items():
        if not torch.equal(final[name].data, weights):
            return outcome("differs", f"weights of {name}", size)
    return outcome("passes", "", size)


def _brief(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:110]


@contextmanager
def time_limit(seconds: int) -> Iterator[None]:
    def expire(*_: Any) -> None:
        raise TimeoutError(f"took more than {seconds} s")

    signal.signal(signal.SIGALRM, expire)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("types", nargs="*", help="model types; default: all causal ones")
    parser.add_argument("--attention", choices=["eager", "sdpa"], help="default: the model's own")
    parser.add_argument("--granularity", choices=["block", "module"], default="block")
    parser.add_argument("--seconds", type=int, default=60, help="limit a type (default 60)")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    counts: Counter[str] = Counter()
    for model_type in options.types or sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES):
        try:
            with time_limit(options.seconds):
                result = check(
                    model_type, attention=options.attention, granularity=options.granularity
                )
        except TimeoutError as error:
            result = Outcome(model_type, "not run", str(error))
        counts[result.verdict] += 1
        print(
            f"{result.model_type:<28}{result.verdict:<9}{result.parameters:>10,}"
            f"{result.seconds:>7.1f} s  {result.detail}",
            flush=True,
        )
        gc.collect()
    print(", ".join(f"{count} {verdict}" for verdict, count in counts.most_common()))
    return 1 if counts["differs"] or counts["fails"] else 0


if __name__ == "__main__":
    sys.exit(main())
