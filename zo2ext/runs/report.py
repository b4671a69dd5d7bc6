"""``zo2ext report``: a run as one page of pictures and numbers, for any browser."""

from __future__ import annotations

import base64
import html
import math
from collections.abc import Iterable
from statistics import median
from typing import Any

from zo2ext._format import gib
from zo2ext._version import __version__
from zo2ext.runs import plots, timeline
from zo2ext.runs.data import Points, RunData, mean_of_last

Rows = list[tuple[str, str]]


def draw(run: RunData) -> dict[str, tuple[str, bytes]]:
    """The pictures of a run, by name: a heading, and a PNG."""
    columns, evaluations = run.columns, run.evaluations
    held_out = next((name for name in evaluations if name.endswith("loss")), None)
    others = {name: points for name, points in evaluations.items() if name != held_out}
    memory = {
        "device, peak": columns.get("device_memory_bytes", []),
        "host": columns.get("host_memory_bytes", []),
    }
    moved = {
        "uploaded": columns.get("uploaded_bytes", []),
        "offloaded": columns.get("offloaded_bytes", []),
    }
    amounts = {"memory": _logged(memory), "moved a step": _logged(moved)}
    amounts = {heading: lines for heading, lines in amounts.items() if lines}

    judged = evaluations[held_out] if held_out else []
    pictures = {
        "loss": (
            "Loss",
            plots.score_curve(columns["loss"], judged, held_out or "loss", ylabel="loss"),
        )
    }
    if others:
        pictures["evaluations"] = ("Evaluations", plots.evaluations(others))
    pictures["projected_gradient"] = (
        "Projected gradient",
        plots.projected_gradient(columns["projected_grad"]),
    )
    if columns.get("tokens_per_s"):
        pictures["throughput"] = ("Throughput", plots.throughput(columns["tokens_per_s"]))
    if amounts:
        pictures["memory"] = ("Memory and traffic", plots.amounts(amounts))
    if run.spans is not None:
        image = timeline.draw(run.spans, run.title)
        pictures["timeline"] = ("Timeline of one step", image)
    return pictures


def warnings_of(run: RunData) -> list[str]:
    """What whoever reads the report should know first."""
    found = list(run.notes)
    done, losses = run.done, run.columns["loss"]
    if run.planned is not None and done < run.planned:
        found.append(f"the run is not finished: {done:,} of {run.planned:,} steps are logged")
    if run.skipped:
        found.append(
            f"{run.skipped:,} of {done:,} steps changed nothing, as their losses were not finite; "
            "a lower lr may help"
        )
    finite = [value for _, value in losses if math.isfinite(value)]
    if not finite:
        found.append("no loss is finite")
    still = sum(value == 0 for _, value in run.columns["projected_grad"])
    if still > len(losses) / 100:
        found.append(
            f"the projected gradient is exactly 0 in {still:,} of {len(losses):,} logged steps: "
            "both losses were the same, so these steps taught nothing; a larger eps, or a finer "
            "dtype of the loss, may help"
        )
    for name, points in run.evaluations.items():
        if not all(math.isfinite(value) for _, value in points):
            found.append(f"{name} is not finite in some evaluations")
        elif name.endswith("loss") and len(points) > 1 and points[-1][1] > points[0][1]:
            found.append(
                f"{name} rose, from {points[0][1]:.4g} to {points[-1][1]:.4g}; a lower lr may help"
            )
    return found


def numbers_of(run: RunData) -> Rows:
    """Where the run stands, in a few lines."""
    columns = run.columns
    rows: Rows = [("steps done", f"{run.done:,}")]
    rows.append(("steps skipped", f"{run.skipped:,}"))
    loss = mean_of_last(columns["loss"])
    rows.append(("training loss, mean of the last tenth", _number(loss)))
    for name, points in run.evaluations.items():
        first, last = points[0], points[-1]
        text = f"{_number(first[1])} at step {first[0]:,}"
        text += f", {_number(last[1])} at step {last[0]:,}" if len(points) > 1 else ""
        rows.append((name.replace("_", " "), text))
    squares = [(step, value * value) for step, value in columns["projected_grad"]]
    rms = math.sqrt(mean_of_last(squares)) if squares else math.nan
    rows.append(("projected gradient, root mean square of the last tenth", _number(rms)))
    if columns.get("lr"):
        rows.append(("learning rate of the last step", _number(columns["lr"][-1][1])))
    if columns.get("tokens_per_s"):
        rows.append(("tokens a second, median", f"{_median(columns['tokens_per_s']):,.0f}"))
    if columns.get("seconds"):
        seconds = [value for _, value in columns["seconds"]]
        rows.append(("seconds a step, median", f"{median(seconds):.4g}"))
        rows.append(("time in steps", _duration(sum(seconds))))
    for name, heading in (
        ("uploaded_bytes", "uploaded a step, median"),
        ("offloaded_bytes", "offloaded a step, median"),
    ):
        if columns.get(name):
            rows.append((heading, gib(round(_median(columns[name])))))
    for name, heading in (
        ("device_memory_bytes", "device memory, peak"),
        ("host_memory_bytes", "host memory of the process, peak"),
    ):
        most = max((value for _, value in columns.get(name, [])), default=0)
        if most:
            rows.append((heading, gib(round(most))))
    return rows


_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem;
       color: #222; background: #fff; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.15rem; margin-top: 2rem; }
img { max-width: 100%; height: auto; }
table { border-collapse: collapse; }
th, td { text-align: left; vertical-align: top; padding: 0.15rem 1.5rem 0.15rem 0;
         border-bottom: 1px solid #eee; overflow-wrap: anywhere; }
th { font-weight: normal; color: #555; }
.warning { background: #fff4e0; border-left: 4px solid #e08a00; padding: 0.4rem 0.8rem; }
footer { margin-top: 3rem; color: #777; font-size: 0.85rem; }
"""


def report_page(name: str, run: RunData, pictures: dict[str, tuple[str, bytes]]) -> str:
    title = html.escape(name)
    warnings = "".join(f'<p class="warning">{html.escape(w)}</p>\n' for w in warnings_of(run))
    figures = "".join(
        f'<h2>{heading}</h2>\n<img alt="{heading}" src="data:image/png;base64,'
        f'{base64.b64encode(image).decode()}">\n'
        for heading, image in pictures.values()
    )
    settings = [(key, _setting(value)) for key, value in run.settings.items()]
    tables = f"<h2>Numbers</h2>\n{_table(numbers_of(run))}"
    about = f"<h2>Settings</h2>\n{_table(settings)}" if settings else ""
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{title}</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n"
        f"<h1>{title}</h1>\n{warnings}{tables}{figures}{about}"
        f"<footer>zo2ext {__version__}</footer>\n</body>\n</html>\n"
    )


def _table(rows: Iterable[tuple[str, str]]) -> str:
    lines = (f"<tr><th>{html.escape(k)}</th><td>{html.escape(v)}</td></tr>\n" for k, v in rows)
    return f"<table>\n{''.join(lines)}</table>\n"


def _setting(value: Any) -> str:
    return "default" if value is None else str(value)


def _logged(lines: dict[str, Points]) -> dict[str, Points]:
    """Without what is 0 throughout: what a device does not have."""
    return {name: points for name, points in lines.items() if any(value for _, value in points)}


def _median(points: Points) -> float:
    return median(value for _, value in points)


def _number(value: float) -> str:
    return f"{value:.4g}"


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02} min" if hours else f"{minutes} min {rest:02} s"
