"""``zo2ext plan``: what a model will need on this machine."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from typing import Any, cast

import torch
from torch import nn

from zo2ext._format import aligned, gib, seconds_text, three
from zo2ext.commands.arguments import PlanArguments
from zo2ext.config import Granularity, config_from
from zo2ext.errors import UserError
from zo2ext.ops.formats import TRAINABLE_DTYPES
from zo2ext.planning.activations import activation_counter
from zo2ext.planning.plan import Plan, every_plan, hollow_model, text_config
from zo2ext.planning.quantized_sizes import StoredWeight
from zo2ext.planning.rates import Rates, measure_rates
from zo2ext.streaming.devices.select import make_device


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


def plan(arguments: PlanArguments) -> None:
    """Run ``zo2ext plan``; see `PlanArguments`.

    Raises:
        ValueError: An argument is wrong, or the model has no usable config.
    """
    config = config_from(arguments)
    device = make_device(config.device).torch_device
    model = hollow_model(arguments.model)
    context = getattr(text_config(model), "max_position_embeddings", None)
    if isinstance(context, int) and arguments.seq_len > context:
        raise UserError(
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
            directions=config.directions,
            write_back=config.write_back,
            rates=rates,
            activations=activation_counter(
                cast("Any", model).config,
                batch_size=arguments.batch_size,
                seq_len=arguments.seq_len,
            ),
        )
    )
    print(
        f"{arguments.model}: {plans[0].parameters:,} parameters; {tokens:,} tokens a step, "
        f"{2 * config.directions} forward passes\n{_quantised(model)}{rates}\n\n"
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
    from zo2ext.planning.several_gpus import assumptions, rank_plans, rank_table

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
