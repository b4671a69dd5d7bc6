"""Plots of a run as PNG. Matplotlib is an optional dependency; the numbers are in CSV files."""

from __future__ import annotations

import importlib.util
import io
import math
from collections.abc import Mapping, Sequence
from itertools import accumulate
from typing import Any

import numpy as np

HOW_TO_GET = "for plots: pip install 'zo2ext[plot]'"
Points = Sequence[tuple[int, float]]  # (step, value)


def available() -> bool:
    """Return whether matplotlib is installed."""
    return importlib.util.find_spec("matplotlib") is not None


def figure(rows: int = 1, columns: int = 1, **options: Any) -> tuple[Any, list[Any]]:
    """Return a figure that needs no display and its panels. For `options`, see pyplot.subplots."""
    from matplotlib.figure import Figure

    canvas = Figure(figsize=(7.0, 4.2 if rows == 1 else 1.2 + 1.8 * rows), layout="constrained")
    panels = list(canvas.subplots(rows, columns, squeeze=False, **options).flat)
    for axes in panels:
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    return canvas, panels


def png(canvas: Any) -> bytes:
    """Return the figure as PNG, the same bytes for the same figure."""
    image = io.BytesIO()
    canvas.savefig(image, format="png", dpi=150, metadata={"Software": None})
    return image.getvalue()


def score_curve(train: Points, scores: Points, title: str, *, ylabel: str = "") -> bytes:
    """Draw training losses and a score over steps. Values that are not finite are not drawn.

    Args:
        train: Training losses.
        scores: Losses on the same axis, or fractions from 0 to 1 on a second axis.
        title: Name of the score; a score is a loss if its name ends in "loss".
        ylabel: Label of the losses' axis.
    """
    canvas, (axes,) = figure()
    steps, losses = _finite(train)
    lines = _plot_smooth(axes, steps, losses, "C0", "training loss")
    scored, values = _finite(scores)
    is_loss = title.endswith("loss")
    axes.set(ylabel=ylabel or ("loss, nats per token" if is_loss else "loss"))
    _over_steps(axes)
    _limit(axes, losses, values if is_loss else [])
    _mark_missing(axes, [step for step, loss in train if not math.isfinite(loss)])
    right = axes if is_loss else axes.twinx()
    if scored:
        lines += right.plot(scored, values, "o-", color="C1", lw=2, label=title)
    if not is_loss:
        right.set(ylabel=title)
        right.yaxis.set_major_formatter("{x:.1%}")
        right.spines[["top"]].set_visible(False)
    canvas.legend(handles=lines, loc="outside upper center", ncols=2, frameon=False)
    return png(canvas)


def evaluations(curves: Mapping[str, Points]) -> bytes:
    """Draw evaluated values over steps, with one panel per name."""
    canvas, panels = figure(len(curves), sharex=True)
    for axes, (name, points) in zip(panels, curves.items(), strict=True):
        axes.plot(*_finite(points), "o-", color="C1", lw=2)
        axes.set(ylabel=name.replace("_", " "))
    _over_steps(panels[-1])
    return png(canvas)


def projected_gradient(points: Points) -> bytes:
    """Draw the projected gradient of each step, its root mean square, and a histogram."""
    canvas, (axes, side) = figure(1, 2, sharey=True, width_ratios=(4, 1))
    steps, values = _finite(points)
    window = _window(values)
    size = min(12.0, max(1.0, 4e3 / max(1, len(values))))
    axes.scatter(steps, values, s=size, color="C0", alpha=0.4, lw=0)
    axes.scatter([], [], s=12, color="C0", label="one step")  # for the legend: others may be tiny
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
    canvas.legend(loc="outside upper left", ncols=2, frameon=False)
    return png(canvas)


def throughput(points: Points) -> bytes:
    """Draw tokens per second over steps."""
    canvas, (axes,) = figure()
    steps, rates = _finite(points)
    _plot_smooth(axes, steps, rates, "C2", "throughput")
    axes.set(ylabel="tokens per second")
    _over_steps(axes)
    _limit(axes, rates, [0.0])
    axes.set_ylim(bottom=0)
    axes.yaxis.set_major_formatter("{x:,.0f}")
    axes.legend(frameon=False, loc="lower right")
    return png(canvas)


def amounts(panels: Mapping[str, Mapping[str, Points]]) -> bytes:
    """Draw bytes over steps, with one panel per heading, in its own unit, and one line per name."""
    canvas, drawn = figure(len(panels), sharex=True)
    for axes, (heading, lines) in zip(drawn, panels.items(), strict=True):
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
    _over_steps(drawn[-1])
    return png(canvas)


def rate_curve(rates: Sequence[float], losses: Sequence[float], chosen: float) -> bytes:
    """Draw the losses of a search for the learning rate, and the rate that it chose."""
    canvas, (axes,) = figure()
    finite = [(rate, loss) for rate, loss in zip(rates, losses, strict=True) if math.isfinite(loss)]
    axes.plot(*zip(*finite, strict=True), color="C0", lw=1.5, label="loss while the rate rises")
    axes.axvline(chosen, color="C1", lw=1.5, label=f"chosen: {chosen:.3g}")
    axes.axvline(rates[-1], color="C3", lw=1.5, ls="--", label="the search ended")
    before = [loss for _, loss in finite[: len(losses) - 1]]
    margin = 0.05 * (max(before) - min(before)) or 1.0
    axes.set(xscale="log", xlabel="learning rate", ylabel="loss")
    axes.set_ylim(min(before) - margin, max(before) + margin)
    canvas.legend(loc="outside upper center", ncols=3, frameon=False)
    return png(canvas)


def running_mean(values: Sequence[float], window: int) -> list[float]:
    """Return the mean of the last `window` values at each place; of fewer near the beginning."""
    sums = [0.0, *accumulate(values)]
    means = []
    for end in range(1, len(sums)):
        begin = max(0, end - window)
        means.append((sums[end] - sums[begin]) / (end - begin))
    return means


def _window(values: Sequence[float]) -> int:
    """Return the number of values per mean: enough to show a trend, too few to hide a change."""
    return max(1, min(10, len(values) // 5), len(values) // 25)


def _plot_smooth(
    axes: Any, steps: Sequence[int], values: Sequence[float], color: str, name: str
) -> list[Any]:
    window = _window(values)
    axes.plot(steps, values, color=color, alpha=0.25, lw=0.8)
    label = name if window == 1 else f"{name}, mean of {window} steps"
    means = _smooth(values, window)
    lines: list[Any] = axes.plot(steps, means, _style(steps), color=color, lw=1.5, label=label)
    return lines


def _style(steps: Sequence[int]) -> str:
    return "-" if len(steps) > 1 else "o"  # a line needs two points


def _usual(values: Sequence[float]) -> tuple[float, float]:
    """Return the lowest and the highest value except for outliers, which are at most 2%."""
    quarter, three = np.quantile(values, (0.25, 0.75))
    reach = 5 * (three - quarter)
    usual = [v for v in values if quarter - reach <= v <= three + reach]
    if len(usual) < 0.98 * len(values):
        usual = list(values)
    return min(usual), max(usual)


def _smooth(values: Sequence[float], window: int) -> list[float]:
    """Return the running mean with outliers clipped, as one of them would move a whole window.

    NaN near the beginning, where it would be a mean over less than a tenth of the window.
    """
    if not values:
        return []
    means = running_mean(np.clip(values, *_usual(values)).tolist(), window)
    few = window // 10
    return [math.nan] * few + means[few:]


def _limit(axes: Any, values: Sequence[float], always: Sequence[float]) -> tuple[float, float]:
    """Limit the y axis to `values` without outliers and to all of `always`; note the outliers.

    Returns:
        Lowest and highest value shown.
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
        _note(axes, f"outliers, clipped in the mean: {outliers:,} of {len(values):,} steps")
    return low, high


def _note(axes: Any, text: str) -> None:
    axes.set_title(text, fontsize=8, color="0.4", loc="right")


def _over_steps(axes: Any) -> None:
    """Label the x axis as steps."""
    from matplotlib.ticker import MaxNLocator

    axes.set(xlabel="step")
    low, high = axes.get_xlim()
    if high - low < 1:  # one step
        axes.set_xlim((low + high - 1) / 2, (low + high + 1) / 2)
    axes.xaxis.set_major_locator(MaxNLocator(8, integer=True, min_n_ticks=1))
    axes.xaxis.set_major_formatter("{x:,.0f}")


def _mark_missing(axes: Any, steps: Sequence[int]) -> None:
    """Draw ticks at the bottom for steps whose losses are not finite."""
    if steps:
        label = f"{len(steps):,} not finite"
        place = axes.get_xaxis_transform()
        axes.plot(steps, [0.01] * len(steps), "|", color="C3", transform=place, label=label)


def _finite(points: Points) -> tuple[list[int], list[float]]:
    kept = [(step, value) for step, value in points if math.isfinite(value)]
    return [step for step, _ in kept], [value for _, value in kept]
