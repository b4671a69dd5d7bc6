"""Page of ``zo2ext report``: plots and numbers of a run in one HTML file."""

from __future__ import annotations

import base64
import html
import math
from collections.abc import Callable, Iterable
from operator import itemgetter
from statistics import median

from zo2ext._format import gib
from zo2ext._version import __version__
from zo2ext.runs import plots, timeline
from zo2ext.runs.data import RunData, mean_of_last

Rows = list[tuple[str, str]]


def draw(run: RunData) -> dict[str, tuple[str, bytes]]:
    """Return a heading and a PNG for each plot of a run, by name."""
    columns, evaluations = run.columns, run.evaluations
    held_out = next((name for name in evaluations if name.endswith("loss")), None)
    others = {name: points for name, points in evaluations.items() if name != held_out}
    amounts = {
        "memory": {"device, peak": "device_memory_bytes", "host": "host_memory_bytes"},
        "moved per step": {"uploaded": "uploaded_bytes", "offloaded": "offloaded_bytes"},
    }
    curves = {
        heading: {
            label: columns[name]
            for label, name in names.items()
            if any(value for _, value in columns[name])  # else the device has none
        }
        for heading, names in amounts.items()
    }
    curves = {heading: lines for heading, lines in curves.items() if lines}

    scores = evaluations[held_out] if held_out else []
    loss = plots.score_curve(columns["loss"], scores, held_out or "loss", ylabel="loss")
    pictures = {"loss": ("Loss", loss)}
    if others:
        pictures["evaluations"] = ("Evaluations", plots.evaluations(others))
    gradient = plots.projected_gradient(columns["projected_grad"])
    pictures["projected_gradient"] = ("Projected gradient", gradient)
    pictures["throughput"] = ("Throughput", plots.throughput(columns["tokens_per_s"]))
    if curves:
        pictures["memory"] = ("Memory and traffic", plots.amounts(curves))
    if run.curve is not None:
        pictures["learning_rate"] = ("Search for the learning rate", run.curve.png())
    if run.spans is not None:
        pictures["timeline"] = ("Timeline of one step", timeline.draw(run.spans, run.title))
    return pictures


def warnings_of(run: RunData) -> list[str]:
    """Return the warnings about a run, to be read before its numbers."""
    found = list(run.notes)
    done, losses = run.done, run.columns["loss"]
    if run.planned is not None and done < run.planned:
        found.append(f"the run is not finished: {done:,} of {run.planned:,} steps are logged")
    if run.skipped:
        found.append(
            f"{run.skipped:,} of {done:,} steps changed nothing, as their losses were not finite "
            "or all equal; a lower lr may help"
        )
    finite = [value for _, value in losses if math.isfinite(value)]
    if not finite:
        found.append("no loss is finite")
    still = sum(value == 0 for _, value in run.columns["projected_grad"])
    if still > len(losses) / 100:
        found.append(
            f"the projected gradient is exactly 0 in {still:,} of {len(losses):,} logged steps: "
            "all losses were equal, so these steps have no gradient; a larger eps, or a finer "
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
    """Return the main numbers of a run, with their headings."""
    columns = run.columns
    loss = mean_of_last(columns["loss"])
    rows: Rows = [
        ("steps done", f"{run.done:,}"),
        ("steps skipped", f"{run.skipped:,}"),
        *([("steps shortened by clip", f"{run.clipped:,}")] if run.clipped else []),
        ("training loss, mean of the last tenth", f"{loss:.4g}"),
    ]
    for name, points in run.evaluations.items():
        ends = points if len(points) == 1 else (points[0], points[-1])
        text = ", ".join(f"{value:.4g} at step {step:,}" for step, value in ends)
        rows.append((name.replace("_", " "), text))
    rms = math.sqrt(mean_of_last([(s, value * value) for s, value in columns["projected_grad"]]))
    rows.append(("projected gradient, root mean square of the last tenth", f"{rms:.4g}"))
    if run.curve is not None:
        found = f"{run.curve.lr:.4g}, in {len(run.curve.rates)} steps before the run"
        rows.append(("learning rate, as found", found))
    summaries: tuple[tuple[str, str, Callable[[list[float]], float], Callable[[float], str]], ...]
    summaries = (
        ("lr", "learning rate of the last step", itemgetter(-1), "{:.4g}".format),
        ("tokens_per_s", "tokens per second, median", median, "{:,.0f}".format),
        ("seconds", "seconds per step, median", median, "{:.4g}".format),
        ("seconds", "time in steps", sum, _duration),
        ("uploaded_bytes", "uploaded per step, median", median, _bytes),
        ("offloaded_bytes", "offloaded per step, median", median, _bytes),
        ("device_memory_bytes", "device memory, peak", max, _bytes),
        ("host_memory_bytes", "host memory of the process, peak", max, _bytes),
    )
    for name, heading, summary, text_of in summaries:
        values = [value for _, value in columns[name] if math.isfinite(value)]
        if values and (summary is not max or any(values)):  # a CPU has no device memory
            rows.append((heading, text_of(summary(values))))
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
    """Return the HTML page of a run, with the plots that `draw` returned inside."""
    title = html.escape(name)
    warnings = "".join(f'<p class="warning">{html.escape(w)}</p>\n' for w in warnings_of(run))
    figures = "".join(
        f'<h2>{heading}</h2>\n<img alt="{heading}" src="data:image/png;base64,'
        f'{base64.b64encode(image).decode()}">\n'
        for heading, image in pictures.values()
    )
    settings = [
        (key, "default" if value is None else str(value)) for key, value in run.settings.items()
    ]
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


def _bytes(value: float) -> str:
    return gib(round(value))


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02} min" if hours else f"{minutes} min {rest:02} s"
