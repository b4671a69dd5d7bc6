"""``zo2ext check``: compare training on the engine with plain forward passes in memory."""

from __future__ import annotations

import copy
from typing import Any

import torch

from zo2ext._format import aligned
from zo2ext.checkpoints.pretrained import as_user_errors, load_config
from zo2ext.commands.arguments import CheckArguments
from zo2ext.config import Granularity, ZOConfig, config_from
from zo2ext.engine import check as comparison
from zo2ext.errors import UserError
from zo2ext.model.factored import Factored
from zo2ext.model.tiny import tiny_config, tiny_model
from zo2ext.streaming.devices.select import make_device

_CLASSES = {
    "causal": "AutoModelForCausalLM",
    "classification": "AutoModelForSequenceClassification",
    "seq2seq": "AutoModelForSeq2SeqLM",
}


def check(arguments: CheckArguments) -> None:
    """Run ``zo2ext check``; see `CheckArguments`."""
    has_gpu = torch.cuda.is_available()
    given = config_from(arguments)
    name, rank = str(given.device or ("cuda" if has_gpu else "simulated")), given.rank
    make_device(name)  # raises if the machine does not have it
    device = torch.device("cpu" if name == "simulated" else name)
    model = _load(arguments)
    batches = comparison.random_batches(
        model, length=arguments.seq_len, classes=2 * (arguments.kind == "classification")
    )
    config = ZOConfig(lr=1e-3, eps=1e-3, seed=3, device=name, rank=rank)

    def reference(config: ZOConfig) -> comparison.Run:
        if rank is None:
            return _plain_run(model, batches, config, device)
        return comparison.engine_run(model, batches, config.replace(resident="all"))

    with as_user_errors(f"model {arguments.model!r} does not run on random tokens"):
        plain = reference(config)
    if not plain.finite:
        raise UserError(f"model {arguments.model!r} has a loss that is not finite: {plain.losses}")
    size = sum(p.numel() for p in model.parameters())
    print(f"{type(model).__name__}, {size:,} parameters, on {name}")
    rows: list[tuple[str, ...]] = [("granularity", "weights", "result")]
    wrong = 0
    for granularity in Granularity:
        for where, resident in (("streamed", 0), ("resident", "all")):
            place = config.replace(granularity=granularity, resident=resident)
            found = comparison.engine_run(model, batches, place).difference(plain)
            if found is not None:
                wrong += 1
                still = place.replace(lr=0.0)  # no update, so that only forward passes can differ
                module = comparison.first_different_module(
                    model,
                    lambda: reference(still),
                    lambda: comparison.engine_run(model, batches, still),
                )
                found += f"; first different module: {module or 'none'}"
            rows.append((granularity, where, found or "equal"))
    print(aligned(rows))
    if rank is not None:
        dense = Factored.described()
        print(f"made dense in each forward pass: {', '.join(dense) or 'nothing'}")
    if wrong:
        raise UserError(f"{wrong} of {len(rows) - 1} runs differ from plain forward passes")


def _plain_run(
    model: Any, batches: list[dict[str, torch.Tensor]], config: ZOConfig, device: torch.device
) -> comparison.Run:
    """Run the plain steps on `device`; the model is on the CPU before and after."""
    there = [{name: tensor.to(device) for name, tensor in batch.items()} for batch in batches]
    run = comparison.plain_run(model.to(device), there, config)
    model.to("cpu")
    return comparison.Run(run.losses, {name: w.cpu() for name, w in run.weights.items()})


def _load(arguments: CheckArguments) -> Any:
    """Load the model in float32 and eval mode, or make a tiny one from its config."""
    import transformers

    auto = getattr(transformers, _CLASSES[arguments.kind])
    if arguments.tiny:
        from transformers import AutoConfig

        with as_user_errors(f"cannot make a tiny model from the config of {arguments.model!r}"):
            config = AutoConfig.from_pretrained(arguments.model, trust_remote_code=False)
            model: Any = tiny_model(auto, tiny_config(config))
    else:
        config = load_config(arguments.model, max_length=arguments.seq_len, causal=False)
        with as_user_errors(f"cannot load model {arguments.model!r}"):
            model = auto.from_pretrained(
                arguments.model,
                config=copy.deepcopy(config),
                dtype=torch.float32,
                use_safetensors=True,
                trust_remote_code=False,
            ).eval()
    if arguments.attention is not None:
        with as_user_errors(f"attention {arguments.attention} cannot be used"):
            model.set_attn_implementation(arguments.attention)
    return model
