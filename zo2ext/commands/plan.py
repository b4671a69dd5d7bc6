"""``zo2ext plan``: predict memory and speed of a model, on this machine or on named hardware."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from typing import Any, cast

from torch import nn

from zo2ext._format import aligned, gib, seconds_text, three
from zo2ext.commands.arguments import PlanArguments
from zo2ext.config import Granularity, ZOConfig, config_from
from zo2ext.ops.formats import TRAINABLE_DTYPES, Storage
from zo2ext.planning.activations import activation_counter, text_config
from zo2ext.planning.directions import FEWEST, automatic, directions_under_an_upload
from zo2ext.planning.gpus import given_rates, named_rates, nearest_gpu
from zo2ext.planning.plan import (
    DRIVER,
    Counter,
    Plan,
    every_plan,
    hollow_model,
    recommend,
    stored,
)
from zo2ext.planning.quantized_sizes import StoredWeight
from zo2ext.planning.rates import Rates, measure_rates
from zo2ext.streaming.devices.select import make_device


def plan_table(plans: list[Plan], memory: int | None = None, ram: int | None = None) -> str:
    """Return a table of memory and a table of time, one line per plan.

    Args:
        plans: What to show.
        memory: Bytes of device memory; None if unknown.
        ram: Bytes of host memory; None if unknown.
    """

    def table(title: str, headings: tuple[str, ...], row: Callable[[Plan], tuple[str, ...]]) -> str:
        rows: list[tuple[str, ...]] = [("storage", "granularity", *headings)]
        rows += [(str(p.config.storage), p.config.granularity.value, *row(p)) for p in plans]
        return f"{title}\n{aligned(rows)}"

    def space(plan: Plan) -> tuple[str, ...]:
        parts = (plan.slots, plan.copies, plan.activations)
        sizes = tuple(gib(nbytes) for nbytes in (plan.host, plan.device, *parts))
        return *sizes, fit_text(plan, memory, ram)

    spaces = ("host", "GPU", "= slots", "+ copies", "+ activations", "fits")
    step = ("write_back", "up", "down", "transfers", "compute", "floor", "step", "speed")
    return f"{table('memory', spaces, space)}\n\n{table('one step, predicted', step, _time)}"


def fit_text(plan: Plan, memory: int | None, ram: int | None) -> str:
    """Return what `plan` fits: "yes", or where it does not."""
    missing = [] if plan.fits(memory) else ["not the GPU"]
    if ram is not None and plan.host > ram:
        missing.append("not the host")
    return ", ".join(missing) or ("yes" if memory or ram else "unknown")


def _time(plan: Plan) -> tuple[str, ...]:
    step = plan.step
    return (
        str(plan.config.write_back),
        gib(round(step.uploaded)),
        gib(round(step.offloaded)),
        *(seconds_text(s) for s in (step.transfers, step.compute, step.floor, step.seconds)),
        f"{three(plan.tokens_per_second)} tok/s",
    )


def plan(arguments: PlanArguments) -> None:
    """Run ``zo2ext plan``; see `PlanArguments`."""
    rates = _rates(arguments)
    model = hollow_model(arguments.model)
    seq_len = readable(model, arguments.seq_len)
    tokens = arguments.batch_size * seq_len
    ram = _ram(arguments)
    counter = activation_counter(
        cast("Any", model).config, batch_size=arguments.batch_size, seq_len=seq_len
    )
    config, under_an_upload = _directions(arguments, model, rates, counter)
    plans = list(every_plan(model, config, tokens=tokens, rates=rates, activations=counter))
    best = recommend(
        model,
        config,
        Storage(arguments.storage),
        tokens=tokens,
        rates=rates,
        activations=counter,
    )
    print(
        f"{arguments.model}: {plans[0].parameters:,} parameters; {tokens:,} tokens per step, "
        f"{config.forwards} forward passes\n{_clamped(arguments.seq_len, seq_len)}"
        f"{_quantized_line(model)}{rates}\n\n"
        f"{plan_table(plans, rates.memory, ram)}\n\n"
        f"{recommendation(best, arguments.storage, rates, ram)}\n"
        f"{_directions_line(best, under_an_upload)}\n\n"
        f"{_legend(rates, counted=plans[0].counted)}"
    )
    if arguments.ranks > 1:
        print(f"\n{_several_gpus(arguments, plans)}")


def readable(model: nn.Module, seq_len: int) -> int:
    """Return `seq_len`, or the most tokens that `model` reads if these are fewer."""
    context = getattr(text_config(model), "max_position_embeddings", None)
    return min(seq_len, context) if isinstance(context, int) and context > 0 else seq_len


def recommendation(best: Plan | None, storage: str, rates: Rates, ram: int | None) -> str:
    """Return the settings of the plan that `recommend` chose, and what it takes."""
    if best is None:
        return (
            f"recommended, {storage}: nothing fits {gib(rates.memory or 0)} of GPU memory; try a "
            "smaller batch, or one_copy"
        )
    config = best.config
    streams = config.resident != "all" and rates.device.type == "cuda"
    names = ["storage", *(["granularity", "slots"] if streams else []), "resident", "write_back"]
    settings = ", ".join(f"{name}={config.words()[name]!r}" for name in names)
    text = (
        f"recommended: {settings}\n"
        f"  predicted {seconds_text(best.step.seconds)} per step, "
        f"{three(best.tokens_per_second)} tok/s; {gib(best.device)} of GPU memory and "
        f"{gib(best.host)} of host memory"
    )
    if ram is not None and best.host > ram:
        text += f"\n  the host has {gib(ram)}: add store='disk', which its disk's speed then limits"
    return text


def _directions(
    arguments: PlanArguments, model: nn.Module, rates: Rates, activations: Counter
) -> tuple[ZOConfig, int | None]:
    """Return the settings to plan for, and how many directions fit under one upload."""
    config = stored(config_from(arguments, storage=None), Storage(arguments.storage))
    assert config.compute_dtype is not None, "plans have one"
    counted = activations(config.compute_dtype)
    stages = () if counted is None else counted.stages
    found = directions_under_an_upload(model, config, rates, stages)
    if config.directions == "auto":
        config = config.replace(directions=automatic(found))
    return config, found


def _directions_line(best: Plan | None, under_an_upload: int | None) -> str:
    if under_an_upload is None or (best is not None and best.config.resident == "all"):
        text, number = "each takes the time of its forward pass, as no weights stream", FEWEST
    else:
        number = automatic(under_an_upload)
        text = f"{under_an_upload} centered ones of this batch take little longer than one upload"
    return f"directions: {text}; --directions auto takes {number}"


def _rates(arguments: PlanArguments) -> Rates:
    given = {
        "upload": arguments.upload,
        "download": arguments.download,
        "matmul": arguments.matmul,
        "memory": arguments.gpu_memory,
    }
    name = arguments.gpu
    if name is None and arguments.matmul is not None:
        name = nearest_gpu(arguments.matmul * 1e12)
    if name is not None:
        return given_rates(named_rates(name), **given)
    device = make_device(config_from(arguments, storage=None).device).torch_device
    print("measuring this machine's rates ...", file=sys.stderr, flush=True)
    return given_rates(measure_rates(device, TRAINABLE_DTYPES), **given)


def _ram(arguments: PlanArguments) -> int | None:
    """Return the bytes of host memory; None if other hardware is named without them."""
    if arguments.ram is not None:
        return round(arguments.ram * 2**30)
    if arguments.gpu is not None or arguments.matmul is not None:
        return None
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _clamped(asked: int, read: int) -> str:
    if asked == read:
        return ""
    return f"seq_len is {asked:,}, of which the model reads {read:,}: predicted for these\n"


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


def _several_gpus(arguments: PlanArguments, plans: list[Plan]) -> str:
    from zo2ext.planning.several_gpus import assumptions, rank_plans, rank_table

    link = None if arguments.link is None else arguments.link * 1e9
    wanted = (arguments.storage, Granularity.BLOCK)
    plan = next(p for p in plans if (p.config.storage, p.config.granularity) == wanted)
    table = rank_table(list(rank_plans(plan, most=arguments.ranks, link=link)))
    return (
        f"several GPUs, {arguments.storage}, {plan.tokens:,} tokens per data rank and step\n"
        f"{table}\n\nassuming that\n{assumptions(link)}"
    )


def _legend(rates: Rates, *, counted: bool) -> str:
    source = f"given, or of {rates.name}'s data sheet" if rates.name else "measured or given"
    lines = (
        "Everything here is predicted: a virtual clock runs the order of a real run with the rates",
        f"above, which are {source}.",
        "",
        "host         stored weights; store='disk' uses its host_memory instead, and reads the",
        "             weights from files at each step",
        "slots        buffers for streamed weights; --slots, --granularity",
        "copies       perturbed copies of the largest unit, one per forward pass",
        f"activations  all forward passes with their losses; the driver uses {gib(DRIVER)} more",
        *(() if counted else ("             (estimated from the config's sizes, not counted)",)),
        "write_back   steps between write-backs; 'auto' is decided for this batch, while a run",
        "             assumes 2,048 tokens per pass",
        "up, down     bytes to the GPU and back; --resident reduces them and uses GPU memory",
        "floor        the longer of transfers and compute, and the shortest possible step",
        "step         the predicted step",
    )
    on_cpu = (
        "",
        "On the CPU weights are used where they are stored: there are no transfers, slots use no",
        "memory, and copies and activations are in host memory.",
    )
    return "\n".join((*lines, *(on_cpu if rates.device.type == "cpu" else ())))
