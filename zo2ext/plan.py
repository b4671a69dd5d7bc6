"""``zo2ext plan``: what a model will need, from its config, before any weights are loaded."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import nn

from zo2ext.activations import Activations, counted, estimated
from zo2ext.config import Granularity, ZOConfig
from zo2ext.devices import make_device
from zo2ext.engine_options import as_count
from zo2ext.formats import TRAINABLE_DTYPES, Storage
from zo2ext.layout import lay_out
from zo2ext.memory import gib
from zo2ext.options import option
from zo2ext.pipeline import slot_sizes
from zo2ext.pretrained import failing_as
from zo2ext.rates import Rates, measure_rates
from zo2ext.stored_sizes import StoredWeight, put_stored_weights, stored_tensors
from zo2ext.units import find_units


@dataclass(frozen=True)
class Plan:
    """Needs of one model under one config. Bytes, seconds, tokens."""

    config: ZOConfig
    tokens: int
    parameters: int
    units: int
    host: int  # weights at rest
    slots: int
    copies: int
    activations: int
    uploaded: int  # a step
    offloaded: int  # a step, averaged over write-backs
    slab_nbytes: int  # that the fused passes of a step read and write of packed weights
    copies_nbytes: int  # and of perturbed copies
    transfer_seconds: float
    token_seconds: float  # of all forward passes, for one token of the batch
    compute_seconds: float
    hiding_tokens: float  # a step; from there on, compute hides the transfers

    @property
    def device(self) -> int:
        """Device bytes in all, the driver's own few hundred MB not counted."""
        return self.slots + self.copies + self.activations

    @property
    def floor_seconds(self) -> float:
        """No step can be faster."""
        return max(self.transfer_seconds, self.compute_seconds)


def make_plan(
    model: nn.Module,
    config: ZOConfig,
    *,
    tokens: int,
    rates: Rates,
    activations: Activations | None = None,
) -> Plan:
    """Plan training `model`, whose parameters may be on the meta device.

    Args:
        model: A causal language model.
        config: Of the run; residents are not planned for.
        tokens: In a batch: its size times its sequence length.
        rates: Of the machine, with the compute dtype among its products.
        activations: Of a forward pass over as many tokens, in the compute dtype; estimated where
            None.
    """
    units, _ = find_units(model, config.granularity)
    layouts = [lay_out(unit, config) for unit in units]
    text = _text_config(model)
    compute = config.compute_dtype or next(
        (part.compute for layout in layouts for part in layout.parts), torch.float32
    )
    activations = activations or estimated(text, tokens, compute)
    parameters = sum(p.numel() for p in model.parameters())
    forwards = 2 * config.directions
    host = sum(layout.nbytes for layout in layouts)
    share = 1 / config.write_back_period if config.write_back_period else 0
    uploaded = host - round(sum(layout.low_nbytes for layout in layouts) * (1 - share))
    offloaded = round(sum(layout.trainable_nbytes for layout in layouts) * share)
    slab_nbytes = 2 * sum(layout.trainable_nbytes for layout in layouts)
    copies_nbytes = forwards * sum(layout.compute_nbytes for layout in layouts)
    per_token = 2 * _multiplied(model, text) * forwards / rates.multiply[compute]
    transfer = max(uploaded / rates.upload, offloaded / rates.offload)
    kernel_seconds = (slab_nbytes + copies_nbytes) / rates.copy
    return Plan(
        config=config,
        tokens=tokens,
        parameters=parameters,
        units=len(units),
        host=host,
        slots=sum(slot_sizes((layout.nbytes for layout in layouts), config.slots)),
        copies=config.copies * max(layout.compute_nbytes for layout in layouts),
        activations=activations.of(forwards),
        uploaded=uploaded,
        offloaded=offloaded,
        slab_nbytes=slab_nbytes,
        copies_nbytes=copies_nbytes,
        transfer_seconds=transfer,
        token_seconds=per_token,
        compute_seconds=tokens * per_token + kernel_seconds,
        hiding_tokens=max(0.0, (transfer - kernel_seconds) / per_token),
    )


def _text_config(model: nn.Module) -> Any:
    settings: Any = getattr(model, "config", None)
    return settings.get_text_config() if settings is not None else None


def _multiplied(model: nn.Module, text: Any) -> float:
    """Weights that a token is multiplied with: no tables that are only looked up in, and of experts
    (whose weights lie side by side, in three dimensions) those that it visits."""
    looked_up: set[int] = set()
    other: set[int] = set()
    for module in model.modules():
        owned = looked_up if isinstance(module, nn.Embedding) else other
        owned.update(id(p) for p in module.parameters(recurse=False))
    visited = getattr(text, "num_experts_per_tok", None)
    total = 0.0
    for parameter in model.parameters():
        if id(parameter) in other:
            share = visited / len(parameter) if visited and parameter.dim() == 3 else 1
            total += parameter.numel() * min(share, 1)
    return total


def hollow_model(source: str) -> nn.Module:
    """The model that a folder's or hub name's config describes, without memory for weights.

    Of a quantised checkpoint the headers of the weight files are read, too: its weights are frozen,
    and of the sizes that they have there.

    Raises:
        ValueError: There is no config, it describes no causal language model, or that is quantised
            and its files do not say its sizes.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    with failing_as(f"model {source!r} has no usable config"):
        config = AutoConfig.from_pretrained(source, trust_remote_code=False)
        with torch.device("meta"):
            model: nn.Module = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    if getattr(config, "quantization_config", None) is not None:
        put_stored_weights(model, stored_tensors(source))
    return model


def every_plan(
    model: nn.Module,
    *,
    tokens: int,
    directions: int,
    write_back: int | str,
    rates: Rates,
    activations: Callable[[torch.dtype], Activations | None],
) -> Iterator[Plan]:
    """Plans of `model` for each storage and granularity, computing in the storage dtype, or in
    bfloat16 where that has scales.

    Args:
        activations: By compute dtype; otherwise as for `make_plan`.
    """
    for storage in Storage:
        for granularity in Granularity:
            compute = torch.bfloat16 if storage.scaled else storage.dtype
            config = ZOConfig(
                storage=storage,
                compute_dtype=compute,
                granularity=granularity,
                directions=directions,
                write_back=write_back,
            )
            taken = activations(compute)
            yield make_plan(model, config, tokens=tokens, rates=rates, activations=taken)


def plan_table(plans: list[Plan]) -> str:
    """The plans as text: a table of memory and one of time, a plan a line."""

    def table(title: str, headings: tuple[str, ...], row: Callable[[Plan], tuple[str, ...]]) -> str:
        which = [(str(plan.config.storage), plan.config.granularity.value) for plan in plans]
        rows = [("storage", "granularity", *headings)]
        rows += [(*head, *row(plan)) for head, plan in zip(which, plans, strict=True)]
        return f"{title}\n{aligned(rows)}"

    return "\n\n".join(
        (
            table(
                "memory",
                ("host", "GPU", "= slots", "+ copies", "+ activations"),
                _memory,
            ),
            table(
                "a step",
                ("up", "down", "transfers", "compute", "floor", "at most", "hidden from"),
                _time,
            ),
        )
    )


def _memory(plan: Plan) -> tuple[str, ...]:
    parts = (plan.slots, plan.copies, plan.activations)
    return tuple(gib(nbytes) for nbytes in (plan.host, plan.device, *parts))


def _time(plan: Plan) -> tuple[str, ...]:
    return (
        gib(plan.uploaded),
        gib(plan.offloaded),
        seconds_text(plan.transfer_seconds),
        seconds_text(plan.compute_seconds),
        seconds_text(plan.floor_seconds),
        f"{three(plan.tokens / plan.floor_seconds)} tok/s",
        f"{math.ceil(plan.hiding_tokens):,} tok" if plan.hiding_tokens else "always",
    )


def seconds_text(value: float) -> str:
    """`value` seconds for people."""
    return f"{three(value)} s" if value >= 0.1 or value == 0 else f"{three(value * 1e3)} ms"


def three(value: float) -> str:
    """`value` with three digits, or all digits before the point."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def aligned(rows: list[tuple[str, ...]]) -> str:
    """A table as text, its columns right-aligned."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True))
        for row in rows
    )


@dataclass(frozen=True)
class PlanArguments:
    """Say what a model needs, before its weights are downloaded or loaded."""

    model: str = option("Model folder, or its name on the Hugging Face hub.", group="required")
    batch_size: int = option("Windows in a batch.", 1)
    seq_len: int = option("Tokens in a window.", 2048)
    directions: int = option("Directions a step averages over.", 1)
    write_back: str = option("Steps between write-backs of the weights, or never.", "1")
    ranks: int = option("Predict what 1, 2, 4, ... up to this many GPUs of one host make of it.", 1)
    link: float | None = option(
        "GB/s that one GPU sends to the others, for --ranks: 450 is NVLink of the H100. Default: "
        "none, and every rank uploads all weights.",
        None,
    )
    ranks_storage: Storage = option("Format of the weights that --ranks predicts.", Storage.BF16)
    device: str | None = option(
        "Whose rates to measure: cuda or cpu. Default: cuda where there is one.", None
    )


def plan(arguments: PlanArguments) -> None:
    """Run ``zo2ext plan``; see `PlanArguments`.

    Raises:
        ValueError: An argument is wrong, or the model has no usable config.
    """
    if arguments.link is not None and not 0 < arguments.link < math.inf:
        raise ValueError(f"link must be above 0 and finite, got {arguments.link}")
    for name in ("batch_size", "seq_len", "ranks"):
        if getattr(arguments, name) < 1:
            raise ValueError(f"{name} must be at least 1, got {getattr(arguments, name)}")
    write_back = as_count(arguments.write_back)
    ZOConfig(directions=arguments.directions, write_back=write_back)
    if write_back == "auto":
        raise ValueError("write_back is 'auto', which a run measures; expected a count or 'never'")
    device = make_device(arguments.device).torch_device
    model = hollow_model(arguments.model)
    context = getattr(_text_config(model), "max_position_embeddings", None)
    if isinstance(context, int) and arguments.seq_len > context:
        raise ValueError(
            f"seq_len is {arguments.seq_len}, but model {arguments.model!r} reads at most "
            f"{context} tokens"
        )
    print("measuring this machine's rates ...", file=sys.stderr, flush=True)
    rates = measure_rates(device, TRAINABLE_DTYPES)
    tokens = arguments.batch_size * arguments.seq_len
    plans = list(
        every_plan(
            model,
            tokens=tokens,
            directions=arguments.directions,
            write_back=write_back,
            rates=rates,
            activations=counted(
                cast("Any", model).config,
                batch_size=arguments.batch_size,
                seq_len=arguments.seq_len,
            ),
        )
    )
    print(
        f"{arguments.model}: {plans[0].parameters:,} parameters; {tokens:,} tokens a step, "
        f"{2 * arguments.directions} forward passes\n{_quantised(model)}{rates}\n\n"
        f"{plan_table(plans)}\n\n{_legend(device)}"
    )
    if arguments.ranks > 1:
        print(f"\n{_of_ranks(arguments, plans, rates)}")


def _quantised(model: nn.Module) -> str:
    """A line on the weights of `model` that are quantised; nothing where none are."""
    weights = [p for p in model.parameters() if isinstance(p, StoredWeight)]
    if not weights:
        return ""
    numel, nbytes = sum(p.numel() for p in weights), sum(sum(p.sizes) for p in weights)
    return (
        f"{numel:,} of them are quantised: frozen, and {gib(nbytes)} as the files have them; all "
        "others are trained\n"
        "(a library that unpacks them takes more, in the model or while a layer computes)\n"
    )


def _of_ranks(arguments: PlanArguments, plans: list[Plan], rates: Rates) -> str:
    from zo2ext.plan_ranks import assumptions, rank_plans, rank_table

    link = None if arguments.link is None else arguments.link * 1e9
    wanted = (arguments.ranks_storage, Granularity.BLOCK)
    plan = next(p for p in plans if (p.config.storage, p.config.granularity) == wanted)
    table = rank_table(list(rank_plans(plan, rates, most=arguments.ranks, link=link)))
    return (
        f"several GPUs, {arguments.ranks_storage}, {plan.tokens:,} tokens a data rank and step\n"
        f"{table}\n\nassuming that\n{assumptions(link)}"
    )


def _legend(device: torch.device) -> str:
    lines = (
        "host         the weights at rest, once; store='disk' takes its host_memory instead, and",
        "             reads the weights from there each step",
        "slots        buffers that weights pass through; --slots, --granularity",
        "copies       of the largest unit, perturbed, one a forward pass",
        "activations  of all forward passes, loss included; the driver takes some hundred MB more",
        "up, down     bytes to the GPU and back; --resident trades GPU memory for fewer",
        "floor        the longer of transfers and compute: no step here is faster",
        "at most      tokens a second, at the floor",
        "hidden from  tokens a step from which on compute hides the transfers",
    )
    on_cpu = (
        "",
        "These times are of the CPU, which uses the weights where they are: nothing travels, slots",
        "take no memory, and the other parts are memory of the host.",
    )
    return "\n".join((*lines, *(on_cpu if device.type == "cpu" else ())))
