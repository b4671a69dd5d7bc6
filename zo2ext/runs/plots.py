"""Pictures. Matplotlib is an extra: whoever lacks it is told, and keeps the numbers as CSV."""

from __future__ import annotations

import importlib.util
import io
import math
from collections.abc import Mapping, Sequence
from itertools import accumulate
from typing import Any

import numpy as np

HOW_TO_GET = "for a picture too: pip install 'zo2ext[plot]'"
PALE = {"alpha": 0.25, "lw": 0.8}  # single steps, behind their mean
Points = Sequence[tuple[int, float]]  # (step, value)


def available() -> bool:
    """Whether matplotlib is installed."""
    return importlib.util.find_spec("matplotlib") is not None


def figure(width: float = 7.0, height: float = 4.2) -> tuple[Any, Any]:
    """A figure without a display, and its axes. Size in inches."""
    from matplotlib.figure import Figure

    canvas = Figure(figsize=(width, height), layout="constrained")
    axes = canvas.subplots()
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    return canvas, axes


def png(canvas: Any) -> bytes:
    """The figure as PNG, the same bytes for the same figure."""
    image = io.BytesIO()
    canvas.savefig(image, format="png", dpi=150, metadata={"Software": None})
    return image.getvalue()


def score_curve(train: Points, scores: Points, title: str, *, ylabel: str = "") -> bytes:
    """Draw training losses and a score over steps, as PNG. Values that are not finite are left out.

    Args:
        train: Training losses.
        scores: Losses, which share the axis, or shares from 0 to 1 with an axis of their own.
        title: Name of the score; one that ends in "loss" is a loss.
        ylabel: Label of the losses' axis.
    """
    canvas, axes = figure()
    steps, losses = _finite(train)
    window = _window(losses)
    label = "training loss" + ("" if window == 1 else f", mean of {window} steps")
    axes.plot(steps, losses, color="C0", **PALE)
    lines = axes.plot(
        steps, _smooth(losses, window), _style(steps), color="C0", lw=1.5, label=label
    )
    judged, values = _finite(scores)
    is_loss = title.endswith("loss")
    axes.set(ylabel=ylabel or ("loss, nats per token" if is_loss else "loss"))
    _over_steps(axes)
    _limit(axes, losses, values if is_loss else [])
    _mark_missing(axes, [step for step, loss in train if not math.isfinite(loss)])
    right = axes if is_loss else axes.twinx()
    if judged:
        lines += right.plot(judged, values, "o-", color="C1", lw=2, label=title)
    if not is_loss:
        right.set(ylabel=title)
        right.yaxis.set_major_formatter("{x:.1%}")
        right.spines[["top"]].set_visible(False)
    canvas.legend(handles=lines, loc="outside upper center", ncols=2, frameon=False)
    return png(canvas)


def evaluations(curves: Mapping[str, Points]) -> bytes:
    """What was measured of the model over steps, a panel each, as PNG."""
    canvas, panels = _panels(len(curves))
    for axes, (name, points) in zip(panels, curves.items(), strict=True):
        axes.plot(*_finite(points), "o-", color="C1", lw=2)
        axes.set(ylabel=name.replace("_", " "))
    _over_steps(panels[-1])
    return png(canvas)


def projected_gradient(points: Points) -> bytes:
    """Each step's projected gradient, how its size changes and how it is distributed, as PNG."""
    from matplotlib.figure import Figure

    canvas = Figure(figsize=(7.0, 4.2), layout="constrained")
    axes, side = canvas.subplots(1, 2, sharey=True, width_ratios=(4, 1))
    steps, values = _finite(points)
    window = _window(values)
    size = min(12.0, max(1.0, 4e3 / max(1, len(values))))
    axes.scatter(steps, values, s=size, color="C0", alpha=0.4, lw=0)
    axes.scatter([], [], s=12, color="C0", label="a step")  # for the legend: others may be tiny
    if len(values) > 1:
        squares = np.square(np.clip(values, *_usual(values))).tolist()
        sizes = np.sqrt(_smooth(squares, window))
        axes.plot(steps, sizes, color="C3", lw=1.5, label=f"root mean square of {window} steps")
        axes.plot(steps, -sizes, color="C3", lw=1.5)
    axes.set(ylabel="projected gradient, loss per unit along z")
    _over_steps(axes)
    low, high = _limit(axes, values, [0.0])
    if not values:
        axes.set_xlim(0, len(points))
    side.hist(values, bins=np.linspace(low, high, 41), orientation="horizontal", color="C0")
    side.set(xlabel="steps")
    side.locator_params(axis="x", nbins=3, integer=True)
    for each in (axes, side):
        each.grid(alpha=0.3)
        each.spines[["top", "right"]].set_visible(False)
    canvas.legend(loc="outside upper left", ncols=2, frameon=False)
    return png(canvas)


def throughput(points: Points) -> bytes:
    """Tokens a second over steps, as PNG."""
    canvas, axes = figure()
    steps, rates = _finite(points)
    window = _window(rates)
    axes.plot(steps, rates, color="C2", **PALE)
    label = "each step" if window == 1 else f"mean of {window} steps"
    means = _smooth(rates, window)
    axes.plot(steps, means, _style(steps), color="C2", lw=1.5, label=label)
    axes.set(ylabel="tokens a second")
    _over_steps(axes)
    _limit(axes, rates, [0.0])
    axes.set_ylim(bottom=0)
    axes.yaxis.set_major_formatter("{x:,.0f}")
    axes.legend(frameon=False, loc="lower right")
    return png(canvas)


def amounts(panels: Mapping[str, Mapping[str, Points]]) -> bytes:
    """Bytes over steps, as PNG: a panel a heading, a line a name, each panel in its own unit."""
    canvas, places = _panels(len(panels))
    for axes, (heading, lines) in zip(places, panels.items(), strict=True):
        curves = {name: _finite(points) for name, points in lines.items()}
        most = max((max(values, default=0) for _, values in curves.values()), default=0)
        scale, unit = next(
            (2**power, unit)
            for power, unit in ((30, "GiB"), (20, "MiB"), (10, "KiB"), (0, "bytes"))
            if most >= 2**power or power == 0
        )
        for index, (name, (steps, values)) in enumerate(curves.items()):
            scaled = [value / scale for value in values]
            style = _style(steps) if index == 0 else {"-": "--"}.get(_style(steps), "x")
            axes.plot(steps, scaled, style, color=f"C{index}", lw=1.5, label=name)
        axes.set(ylabel=f"{heading}, {unit}", ylim=(0, 1.15 * most / scale or 1))
        axes.legend(
            frameon=False,
            loc="lower right",
            bbox_to_anchor=(1, 1),
            borderaxespad=0,
            ncols=len(lines),
        )
    _over_steps(places[-1])
    return png(canvas)


def running_mean(values: Sequence[float], window: int) -> list[float]:
    """At each place, the mean of the last `window` values; of fewer near the beginning."""
    sums = [0.0, *accumulate(values)]
    means = []
    for end in range(1, len(sums)):
        begin = max(0, end - window)
        means.append((sums[end] - sums[begin]) / (end - begin))
    return means


def _window(values: Sequence[float]) -> int:
    """Over how many to take the mean: enough to see a trend, few enough to see it change."""
    return max(1, min(10, len(values) // 5), len(values) // 25)


def _panels(count: int) -> tuple[Any, list[Any]]:
    """A figure with `count` axes below one another."""
    from matplotlib.figure import Figure

    canvas = Figure(figsize=(7.0, 1.2 + 1.8 * count), layout="constrained")
    panels = list(canvas.subplots(count, 1, sharex=True, squeeze=False)[:, 0])
    for axes in panels:
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    return canvas, panels


def _style(steps: Sequence[int]) -> str:
    return "-" if len(steps) > 1 else "o"  # a line needs two points


def _usual(values: Sequence[float]) -> tuple[float, float]:
    """The lowest and the highest but for outliers, which are one in fifty at most."""
    quarter, three = np.quantile(values, (0.25, 0.75))
    reach = 5 * (three - quarter)
    usual = [v for v in values if quarter - reach <= v <= three + reach]
    if len(usual) < 0.98 * len(values):
        usual = list(values)
    return min(usual), max(usual)


def _smooth(values: Sequence[float], window: int) -> list[float]:
    """The running mean, with outliers pulled in: one of them would lift a whole window.

    NaN near the beginning, where it would be the mean of less than a tenth of the window.
    """
    if not values:
        return []
    means = running_mean(np.clip(values, *_usual(values)).tolist(), window)
    few = window // 10
    return [math.nan] * few + means[few:]


def _limit(axes: Any, values: Sequence[float], always: Sequence[float]) -> tuple[float, float]:
    """Show `values` but for outliers, and all of `always`; say what was done to outliers.

    Returns:
        The lowest and the highest that is seen.
    """
    if not values:
        _note(axes, "no step has a finite value")
        return (0.0, 1.0)
    usual = _usual(values)
    low, high = min(*usual, *always), max(*usual, *always)
    margin = 0.05 * (high - low) or 0.05 * abs(high) or 1.0
    axes.set_ylim(low - margin, high + margin)
    outliers = sum(not usual[0] <= value <= usual[1] for value in values)
    if outliers:
        _note(axes, f"outliers, pulled in for the mean: {outliers:,} of {len(values):,} steps")
    return low, high


def _note(axes: Any, text: str) -> None:
    axes.set_title(text, fontsize=8, color="0.4", loc="right")


def _over_steps(axes: Any) -> None:
    """Label the axis of steps."""
    from matplotlib.ticker import MaxNLocator

    axes.set(xlabel="step")
    low, high = axes.get_xlim()
    if high - low < 1:  # one step
        axes.set_xlim((low + high - 1) / 2, (low + high + 1) / 2)
    axes.xaxis.set_major_locator(MaxNLocator(8, integer=True, min_n_ticks=1))
    axes.xaxis.set_major_formatter("{x:,.0f}")


def _mark_missing(axes: Any, steps: Sequence[int]) -> None:
    """Ticks at the bottom for steps whose losses are not finite."""
    if steps:
        label = f"{len(steps):,} not finite"
        place = axes.get_xaxis_transform()
        axes.plot(steps, [0.01] * len(steps), "|", color="C3", transform=place, label=label)


def _finite(points: Points) -> tuple[list[int], list[float]]:
    kept = [(step, value) for step, value in points if math.isfinite(value)]
    return [step for step, _ in kept], [value for _, value in kept]
