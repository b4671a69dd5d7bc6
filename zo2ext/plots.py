"""Pictures. Matplotlib is an extra: whoever lacks it is told, and keeps the numbers as CSV."""

from __future__ import annotations

import importlib.util
import io
import math
from itertools import accumulate
from typing import Any

HOW_TO_GET = "for a picture too: pip install 'zo2ext[plot]'"


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


def loss_curve(train: list[tuple[int, float]], held_out: list[tuple[int, float]]) -> bytes:
    """Training and held-out loss over steps, as PNG. Losses that are not finite are left out."""
    canvas, axes = figure()
    steps, losses = _finite(train)
    window = max(1, len(losses) // 50)
    axes.plot(steps, losses, color="C0", alpha=0.25, lw=0.8)
    axes.plot(
        steps,
        running_mean(losses, window),
        color="C0",
        lw=1.5,
        label="training" if window == 1 else f"training, mean of {window} steps",
    )
    axes.plot(*_finite(held_out), "o-", color="C1", lw=2, label="held out")
    axes.set(xlabel="step", ylabel="loss, nats a token")
    axes.legend(frameon=False)
    return png(canvas)


def running_mean(values: list[float], window: int) -> list[float]:
    """At each place, the mean of the last `window` values; of fewer near the beginning."""
    sums = [0.0, *accumulate(values)]
    means = []
    for end in range(1, len(sums)):
        begin = max(0, end - window)
        means.append((sums[end] - sums[begin]) / (end - begin))
    return means


def _finite(points: list[tuple[int, float]]) -> tuple[list[int], list[float]]:
    kept = [(step, loss) for step, loss in points if math.isfinite(loss)]
    return [step for step, _ in kept], [loss for _, loss in kept]
