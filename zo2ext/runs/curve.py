"""The curve of a run, as a table and as a picture."""

from __future__ import annotations

import csv
import io
import math
from dataclasses import dataclass, field

from zo2ext.runs import plots


@dataclass
class Curve:
    """Losses of batches, and a score of the model, over a run.

    Attributes:
        score: What is measured: "held_out_loss", say, or "dev_accuracy".
        losses: (step, training loss met in it).
        scores: (steps done, score of the weights then).
    """

    score: str
    losses: list[tuple[int, float]] = field(default_factory=list)
    scores: list[tuple[int, float]] = field(default_factory=list)

    @property
    def title(self) -> str:
        """The score's name for readers: "held-out loss"."""
        return self.score.replace("held_out", "held-out").replace("_", " ")

    def csv(self) -> bytes:
        """A line a step: the loss met in it, and the score of the weights before it."""
        table = io.StringIO()
        writer = csv.writer(table, lineterminator="\n")
        writer.writerow(["step", "train_loss", self.score])
        losses, scores = dict(self.losses), dict(self.scores)
        for step in sorted(losses.keys() | scores.keys()):
            writer.writerow([step, losses.get(step, ""), scores.get(step, "")])
        return table.getvalue().encode()

    def png(self) -> bytes:
        """Losses, and the score: beside them, or, where it is a share, on an axis of its own."""
        if self.score.endswith("loss"):
            return plots.loss_curve(self.losses, self.scores)
        canvas, axes = plots.figure()
        losses = [(step, loss) for step, loss in self.losses if math.isfinite(loss)]
        window = max(1, len(losses) // 50)
        means = plots.running_mean([loss for _, loss in losses], window)
        label = "training loss" + (f", mean of {window} steps" if window > 1 else "")
        lines = axes.plot([step for step, _ in losses], means, color="C0", lw=1.5, label=label)
        axes.set(xlabel="step", ylabel="loss")
        right = axes.twinx()
        lines += right.plot(*zip(*self.scores, strict=True), "o-", color="C1", lw=2)
        lines[-1].set_label(self.title)
        right.set(ylabel=self.score.partition("_")[2])
        right.yaxis.set_major_formatter("{x:.1%}")
        right.spines[["top"]].set_visible(False)
        canvas.legend(handles=lines, loc="outside upper center", ncols=2, frameon=False)
        return plots.png(canvas)
