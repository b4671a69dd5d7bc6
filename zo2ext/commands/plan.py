"""``zo2ext plan``: predict memory and speed of a model on this machine."""

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
    """Return a table of memory and a table of time, one line per plan."""

    def table(title: str, headings: tuple[str, ...], row: Callable[[Plan], tuple[str, ...]]) -> str:
        rows: list[tuple[str, ...]] = [("storage", "granularity", *headings)]
        rows += [(str(p.config.storage), p.config.granularity.value, *row(p)) for p in plans]
        return f"{title}\n{aligned(rows)}"

    memory = ("host", "GPU", "= slots", "+ copies", "+ activations")
    step = ("up", "down", "transfers", "compute", "floor", "at most", "hidden from")
    return f"{table('memory', memory, _memory)}\n\n{table('one step', step, _time)}"


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
    """Run ``zo2ext plan``; see `PlanArguments`."""
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
        f"{arguments.model}: {plans[0].parameters:,} parameters; {tokens:,} tokens per step, "
        f"{2 * config.directions} forward passes\n{_quantized_line(model)}{rates}\n\n"
        f"{plan_table(plans)}\n\n{_legend(device)}"
    )
    if arguments.ranks > 1:
        print(f"\n{_several_gpus(arguments, plans, rates)}")


def _quantized_line(model: nn.Module) -> str:
    """Return lines on the quantized weights of `model`; "" if it has none."""
    weights = [p for p in model.parameters() if isinstance(p, StoredWeight)]
    if not weights:
        return ""
    numel, nbytes = sum(p.numel() for p in weights), sum(sum(p.sizes) for p in weights)
    return (
        f"{numel:,} of them are quantized: frozen, and {gib(nbytes)} as stored in the files; all "
        "others are trained\n"
        "(a library that unpacks them uses more, in the model or while a layer computes)\n"
    )


def _several_gpus(arguments: PlanArguments, plans: list[Plan], rates: Rates) -> str:
    from zo2ext.planning.several_gpus import assumptions, rank_plans, rank_table

    link = None if arguments.link is None else arguments.link * 1e9
    wanted = (arguments.ranks_storage, Granularity.BLOCK)
    plan = next(p for p in plans if (p.config.storage, p.config.granularity) == wanted)
    table = rank_table(list(rank_plans(plan, rates, most=arguments.ranks, link=link)))
    return (
        f"several GPUs, {arguments.ranks_storage}, {plan.tokens:,} tokens per data rank and step\n"
        f"{table}\n\nassuming that\n{assumptions(link)}"
    )


def _legend(device: torch.device) -> str:
    lines = (
        "host         stored weights; store='disk' uses its host_memory instead, and reads the",
        "             weights from files at each step",
        "slots        buffers for streamed weights; --slots, --granularity",
        "copies       perturbed copies of the largest unit, one per forward pass",
        "activations  all forward passes with their losses; the driver uses some hundred MB more",
        "up, down     bytes to the GPU and back; --resident reduces them and uses GPU memory",
        "floor        the longer of transfers and compute, and the shortest possible step",
        "at most      tokens per second at the floor",
        "hidden from  tokens per step at which compute begins to hide the transfers",
    )
    on_cpu = (
        "",
        "On the CPU weights are used where they are stored: there are no transfers, slots use no",
        "memory, and copies and activations are in host memory.",
    )
    return "\n".join((*lines, *(on_cpu if device.type == "cpu" else ())))
