"""Tables and the picture of what benchmarks/learning.py measured."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

Json = dict[str, Any]
Curve = Sequence[Sequence[float]]  # points of passes, loads, loss and perhaps accuracy
PASSES, LOADS, LOSS, ACCURACY = range(4)
FEW_LOADS = 16  # forward passes per load at which methods are compared at equal loads


def markdown(headings: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """Return the lines of a table."""
    rule = ["---", *("---:" for _ in headings[1:])]
    return ["| " + " | ".join(cells) + " |" for cells in (headings, rule, *rows)]


def read(folder: Path) -> list[Json]:
    """Return the results of all tasks: their description, "environments" and "runs"."""
    found = []
    for path in sorted(folder.glob("learning-*.jsonl")):
        lines = [json.loads(line) for line in path.read_text().splitlines()]
        places = {line["id"]: line["environment"] for line in lines if "id" in line}
        runs = [line for line in lines if "curve" in line and line["passes"] == lines[0]["passes"]]
        found.append({**lines[0], "environments": places, "runs": runs})
    return found


def at(curve: Curve, axis: int, place: float, value: int) -> float | None:
    """Return a value of a curve where its passes or loads are `place`, between points linearly.

    None where the curve ends more than a tenth before.
    """
    before = curve[0]
    for point in curve:
        if point[axis] >= place:
            share = (place - before[axis]) / ((point[axis] - before[axis]) or 1)
            return before[value] + share * (point[value] - before[value])
        before = point
    return before[value] if before[axis] >= 0.9 * place else None


def first(curve: Curve, target: float) -> Sequence[float] | None:
    """Return the first point whose loss is at most `target`; None if there is none."""
    return next((point for point in curve if point[LOSS] <= target), None)


def chosen(content: Json) -> dict[str, list[Json]]:
    """Return by method the runs with its best rate: most seeds, then the lowest loss at the end."""
    rates: dict[tuple[str, float | str | None], list[Json]] = {}
    for run in content["runs"]:
        rates.setdefault((run["title"], run["lr"]), []).append(run)

    def badness(runs: list[Json]) -> tuple[int, float]:
        return -len(runs), fmean(1e9 if r["diverged"] else r["curve"][-1][LOSS] for r in runs)

    best: dict[str, list[Json]] = {}
    for (title, _), runs in rates.items():
        if title not in best or badness(runs) < badness(best[title]):
            best[title] = runs
    return dict(sorted(best.items(), key=lambda pair: badness(pair[1])[1]))


def table(content: Json) -> list[str]:
    """Return a line on the task, and a table with one row per method, the best at the end first."""
    passes, target = content["passes"], content["target"]
    loads = passes // FEW_LOADS
    start = content["runs"][0]["curve"][0] if content["runs"] else []
    classes = len(start) > ACCURACY
    heads = ["method", "rate", f"loss after {passes} passes", f"after {loads} loads"]
    heads += [f"accuracy after {passes} passes", f"after {loads} loads"] if classes else []
    heads += [f"passes to {target:g}", f"loads to {target:g}"] if target else []
    rows = []
    for title, runs in chosen(content).items():
        curves = [_curve(run) for run in runs]
        rates = [run.get("found", run["lr"]) for run in runs]
        row = [title, "" if None in rates else _spread(sorted(set(rates)), ".1e")]
        for value, form in ((LOSS, ".3f"), *([(ACCURACY, ".1%")] if classes else [])):
            for axis, place in ((PASSES, passes), (LOADS, loads)):
                row.append(_spread([at(curve, axis, place, value) for curve in curves], form))
        if target:
            points = [first(curve, target) for curve in curves]
            row += [_spread([p and p[axis] for p in points], ".0f") for axis in (PASSES, LOADS)]
        lost = sum(run["diverged"] for run in runs)
        rows.append([*row, f"{len(runs)}" + (f", {lost} diverged" if lost else "")])
    begin = f"Start: loss {start[LOSS]:.3f}" if start else "No run yet"
    begin += f", accuracy {start[ACCURACY]:.1%}" if classes else ""
    places = _where(content["environments"].values())
    what = f"{content['title']}; {content['weights']:,} weights. {begin}. {places}."
    return [what, "", *markdown([*heads, "seeds"], rows)]


def _curve(run: Json) -> Curve:
    """Return the curve of a run; of a fit, which has no learning rate, its end everywhere."""
    end = run["curve"][-1][LOSS:]
    return run["curve"] if run["lr"] is not None else [[0, 0, *end], [1e9, 1e9, *end]]


def _spread(values: Sequence[float | None], form: str) -> str:
    """Return mean, lowest and highest of the values that are there, and how many are if not all."""
    there = [value for value in values if value is not None]
    if not there:
        return "-"
    text = format(fmean(there), form)
    if len(there) > 1:
        text += f" ({min(there):{form}}..{max(there):{form}})"
    return text if len(there) == len(values) else f"{text}, {len(there)} of {len(values)}"


def _where(places: Iterable[Json]) -> str:
    """Return hardware, versions and commits of measurements, each once."""
    machines, commits = {}, {}
    for place in places:
        machine = f"{place['cpu']}, {place['simd'].upper()}, {place['threads']} thread; "
        machine += f"torch {place['torch']}, transformers {place['transformers']}"
        changed = " with uncommitted changes" if place["dirty"] else ""
        machines[machine] = commits[f"{str(place['commit'])[:10]}{changed}"] = place["date"]
    dates = sorted({*commits.values()})
    return f"{'; '.join(machines)}; commits {', '.join(commits)}; {' to '.join(dates)}"


def picture(found: Sequence[Json], path: Path) -> None:
    """Draw the loss, or the accuracy of tasks without a target, over passes and over loads."""
    from zo2ext._files import write_atomically
    from zo2ext.runs import plots

    found = [content for content in found if content["runs"]]
    canvas, panels = plots.figure(len(found), 2, sharey="row")
    canvas.set_size_inches(10, 3.2 * len(found) + 1.2)
    titles = sorted({title for content in found for title in chosen(content)})
    styles = {title: (f"C{i % 10}", "-" if i < 10 else "--") for i, title in enumerate(titles)}
    lines = {}
    for content, left, right in zip(found, panels[::2], panels[1::2], strict=True):
        value = LOSS if content["target"] else ACCURACY
        for title, runs in chosen(content).items():
            color, style = styles[title]
            if runs[0]["lr"] is None:
                for axes in (left, right):
                    end = runs[0]["curve"][-1][value]
                    lines[title] = axes.axhline(end, color=color, ls=style, lw=1.4)
                continue
            for axes, axis in ((left, PASSES), (right, LOADS)):
                points = list(zip(*(run["curve"] for run in runs), strict=False))  # the shortest
                xs = [same[0][axis] for same in points]
                ys = [[point[value] for point in same] for same in points]
                means = [fmean(y) for y in ys]
                (lines[title],) = axes.plot(xs, means, style, color=color, lw=1.4)
                low, high = [min(y) for y in ys], [max(y) for y in ys]
                axes.fill_between(xs, low, high, color=color, alpha=0.1, lw=0)
        left.set(xlabel="forward passes", ylabel="held-out loss" if value == LOSS else "accuracy")
        left.set_title(content["title"], fontsize=9, loc="left")
        right.set(xlabel="loads of the weights", xscale="log")
        start = content["runs"][0]["curve"][0]
        if value == LOSS:  # a run that diverges leaves the picture
            left.set_ylim(top=1.1 * start[LOSS])
        if content["target"]:
            left.axhline(content["target"], color="0.6", lw=0.8, ls=":")
            right.axhline(content["target"], color="0.6", lw=0.8, ls=":")
    canvas.legend(
        lines.values(), lines.keys(), loc="outside lower center", ncols=3, frameon=False, fontsize=8
    )
    write_atomically(path, plots.png(canvas))
