"""Pictures. Matplotlib is an extra: whoever lacks it is told, and keeps the numbers as CSV."""

from __future__ import annotations

import importlib.util
import io
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
    """Training and held-out loss over steps, as PNG."""
    canvas, axes = figure()
    window = max(1, len(train) // 50)
    smooth = [
        sum(loss for _, loss in train[max(0, i - window + 1) : i + 1])
        / len(train[max(0, i - window + 1) : i + 1])
        for i in range(len(train))
    ]
    steps = [step for step, _ in train]
    axes.plot(steps, [loss for _, loss in train], color="C0", alpha=0.25, lw=0.8)
    axes.plot(steps, smooth, color="C0", lw=1.5, label=f"training, mean of {window} steps")
    axes.plot(*zip(*held_out, strict=True), "o-", color="C1", lw=2, label="held out")
    axes.set(xlabel="step", ylabel="loss, nats a token")
    axes.legend(frameon=False)
    return png(canvas)
