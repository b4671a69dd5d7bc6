"""Write the tables of the documentation from the results of real runs in benchmarks/results.

    python benchmarks/tables.py            rewrite the text between the markers
    python benchmarks/tables.py --check    exit with 1 if that would change anything

The files are benchmarks/RESULTS.md, docs/precision.md, docs/distributed.md and docs/learning.md,
unless others are given. Markers are <!-- results:NAME --> and <!-- /results -->, each on its own
line. NAME is kernels-cpu, kernels-cuda, step-cpu, step-cuda, precision-cpu, scaling-cpu, targets,
or learning-TASK. Where there is no result, the table is one line that states so.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from statistics import fmean
from typing import Any

import learning_tables
from learning_tables import markdown

Json = dict[str, Any]  # content of a results file
ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
MARKED = re.compile(r"(<!-- results:(?P<name>[\w-]+) -->\n).*?(<!-- /results -->)", re.DOTALL)
PAGES = [
    ROOT / "benchmarks" / "RESULTS.md",
    *(ROOT / "docs" / f"{page}.md" for page in ("precision", "distributed", "learning")),
]
DEVICES = {"cpu": "CPU", "cuda": "GPU"}


def read(folder: Path) -> list[Json]:
    """Return all results in the order of their file names; each row of a battery is a result."""
    found: list[Json] = []
    for path in sorted(folder.glob("*.json")):
        content = json.loads(path.read_text())
        gathered = content["rows"].values() if content["benchmark"] == "battery" else [content]
        found += gathered
    return found + learning_tables.read(folder)


def where(content: Json) -> str:
    """Return one sentence on the hardware and software of a result."""
    place = content["environment"]
    gpu = place["gpu"]
    hardware = (
        f"{gpu['name']}, driver {gpu['driver']}, CUDA {gpu['cuda']}"
        if gpu
        else f"{place['cpu']}, {place['simd'].upper()}"
    )
    commit = place["commit"][:10] if place["commit"] else "unknown"
    changed = " with uncommitted changes" if place["dirty"] else ""
    return (
        f"{hardware}, {place['threads']} CPU threads of {place['cores']} cores; torch "
        f"{place['torch']}, transformers {place['transformers']}, Python {place['python']}, commit "
        f"{commit}{changed}, {place['date']}. Load average when it began: {place['load_at_start']}"
        " (other work on the machine slows both sides)."
    )


def ms(seconds: float) -> str:
    return f"{seconds * 1e3:.1f}" if seconds < 0.1 else f"{seconds * 1e3:.0f}"


def kernels(content: Json) -> list[str]:
    rows = [
        [
            row["storage"],
            row["name"],
            ms(row["seconds"]["median"]),
            ms(row["seconds"]["minimum"]),
            f"{row['elements_s'] / 1e9:.2f}",
            f"{row['bytes_per_element']:.3g}" if row["bytes_s"] else "",
            f"{row['bytes_s'] / 1e9:.1f}" if row["bytes_s"] else "",
            f"{row['of_copy']:.0%}" if row["bytes_s"] else "",
            f"{row['speedup']:.1f}" if row["speedup"] else "",
            f"{row['tight_speedup']:.1f}" if row["tight_speedup"] else "",
        ]
        for row in content["rows"]
        if row["name"].startswith("update + 2 copies") or "3 perturbations" in row["name"]
    ]
    elements = content["rows"][0]["elements"]
    copy = content["rates"]["copy_bytes_s"] / 1e9
    headings = ["storage", "case", "median ms", "min ms", "G elements/s", "B per element"]
    headings += ["GB/s", "of copy"]
    return [
        f"{elements:,} elements; a plain copy moves {copy:.1f} GB/s. {where(content)}",
        "",
        *markdown([*headings, "x eager", "x tight"], rows),
    ]


def steps(content: Json) -> list[str]:
    settings = content["settings"]
    moves = content["environment"]["device"] == "cuda"
    names = {"streamed": "zo2ext, streamed" if moves else "zo2ext", "resident": "zo2ext, resident"}
    rows = []
    for row in content["rows"]:
        parts = row["parts_seconds"]
        peak = row.get("device_process_bytes") or row.get("device_peak_bytes")
        peak = peak or row["host_peak_bytes"]
        aliased = " (host-aliased)" if row.get("host_aliased") else ""
        rows.append(
            [
                names.get(row["mode"], row["mode"]) + aliased,
                ms(row["seconds"]["median"]),
                ms(row["seconds"]["minimum"]),
                ms(parts["weights"]),
                ms(parts["forward"]),
                f"{row['of_floor']:.2f}" if "of_floor" in row else "",
                f"{row['tokens_s']:.0f}",
                f"{peak / 1e9:.2f}" if peak else "?",
                f"{row['speedup']:.1f}" if "speedup" in row else "",
                f"{row['weights_speedup']:.1f}" if "weights_speedup" in row else "",
                f"{row['tight_speedup']:.1f}" if "tight_speedup" in row else "",
            ]
        )
        if not moves:
            core, speedup = row["core_seconds"]["minimum"], row.get("core_speedup")
            rows[-1] += [ms(core), f"{speedup:.1f}" if speedup else ""]
    headings = ["loop", "step, median ms", "min ms", "on weights ms", "forward ms", "of floor"]
    headings += ["tokens/s", "peak GB", "x eager", "on weights x eager", "x tight"]
    headings += [] if moves else ["core ms", "core x eager"]
    return [
        f"{settings['shape']}, {content['parameters']:,} parameters, random weights, batch "
        f"{settings['batch']} x {settings['length']}, {settings['dtype']}. {where(content)}",
        "",
        *markdown(headings, rows),
    ]


# -- targets


def _step_rows(results: list[Json], device: str, mode: str, **settings: object) -> list[Json]:
    return [
        row
        for content in results
        if content["benchmark"] == "step" and content["environment"]["device"] == device
        if all(content["settings"].get(key) == value for key, value in settings.items())
        for row in content["rows"]
        if row["mode"] == mode
    ]


def _first(rows: list[Json], key: str, form: str) -> str:
    return next((form.format(row[key]) for row in rows if row.get(key)), "")


def targets(results: list[Json]) -> list[str]:
    """Return each target and its measured value; GPU targets are measured on GPUs only."""
    long = {"batch": 1, "length": 2048}
    rows = []
    for shape in ("opt-13b", "opt-30b"):
        found = _step_rows(results, "cuda", "streamed", shape=shape, granularity="block", **long)
        what = f"streamed step / floor, {shape}, batch 1 x 2048, GPU"
        rows.append([what, "<= 1.10", _first(found, "of_floor", "{:.2f}")])
    for shape in ("opt-1.3b", "opt-13b"):
        for length, target in ((2048, ">= 1.6x"), (128, ">= 3.5x")):
            found = _step_rows(results, "cuda", "resident", shape=shape, batch=1, length=length)
            what = f"resident step against eager MeZO, {shape}, batch 1 x {length}, GPU"
            rows.append([what, target, _first(found, "speedup", "{:.1f}x")])
    for shape in ("opt-1.3b", "opt-13b", "opt-30b"):
        peers = [
            row["tokens_s"]
            for content in results
            if content["benchmark"] == "peer"
            for row in content["rows"]
            if row["mode"] == "zo2" and row["shape"] == shape
        ]
        found = _step_rows(results, "cuda", "streamed", shape=shape, granularity="block", **long)
        ratio = f"{found[0]['tokens_s'] / peers[0]:.1f}x" if peers and found else ""
        what = f"tokens/s against ZO2, {shape}, batch 1 x 2048, same GPU"
        rows.append([what, ">= 3x", ratio])
    for kind, target in (("gaussian", ">= 55%"), ("rademacher", ">= 90%")):
        passes = [
            row
            for content in results
            if content["benchmark"] == "kernels" and content["environment"]["device"] == "cuda"
            for row in content["rows"]
            if row["storage"] == "bfloat16" and row["name"] == f"update + 2 copies, {kind}, nearest"
        ]
        what = f"fused pass, bfloat16, {kind}: share of a copy, GPU"
        rows.append([what, target, _first(passes, "of_copy", "{:.0%}")])
    for shape, limit in (("13b", 3.1), ("30b", 4.0), ("66b", 5.0), ("175b", 6.5)):
        found = _step_rows(results, "cuda", "streamed", shape=f"opt-{shape}", **long)
        sizes = [row["device_process_bytes"] for row in found if row.get("device_process_bytes")]
        what = f"GPU memory of the process, opt-{shape}, batch 1 x 2048"
        rows.append([what, f"<= {limit} GB", f"{min(sizes) / 1e9:.1f} GB" if sizes else ""])
    cpu = _step_rows(results, "cpu", "streamed", shape="opt-125m", batch=1, length=128)
    what = "step against eager MeZO, opt-125m, batch 1 x 128, CPU"
    rows.append([what, ">= 4x", _first(cpu, "speedup", "{:.1f}x")])
    what = "fused pass against eager work on weights, the same"
    rows.append([what, ">= 8x", _first(cpu, "weights_speedup", "{:.1f}x")])
    filled = [[what, target, found or "unmeasured"] for what, target, found in rows]
    return markdown(["what", "target", "measured"], filled)


# -- the file


def tables(name: str, results: list[Json]) -> list[str]:
    """Return the lines between the markers of the table `name`.

    Raises:
        ValueError: There is no table of this name.
    """
    if name == "targets":
        return targets(results)
    if name.startswith("learning-"):
        found = [content for content in results if content.get("task") == name[len("learning-") :]]
        return learning_tables.table(found[0]) if found else ["Not measured yet."]
    benchmark, _, device = name.partition("-")
    makers: dict[str, Callable[[Json], list[str]]] = {
        "kernels": kernels,
        "step": steps,
        "precision": precision,
        "scaling": scaling,
    }
    if benchmark not in makers or device not in DEVICES:
        raise ValueError(f"no table is called {name!r}")
    lines: list[str] = []
    for content in results:
        if content["benchmark"] == benchmark and content["environment"]["device"] == device:
            lines += ["", *makers[benchmark](content)] if lines else makers[benchmark](content)
    return lines or [f"Unmeasured: no {DEVICES[device]} has been measured yet."]


def scaling(content: Json) -> list[str]:
    """Return a line on the runs, and a table with one row per arrangement of ranks."""
    what = f"{content['shape']}, a batch of {content['batch']} windows per step, float32."
    return [f"{what} {where(content)}", "", *markdown(*scaling_rows(content["rows"]))]


def scaling_rows(found: list[Json]) -> tuple[list[str], list[list[str]]]:
    """Return headings and rows; each figure is the largest of all ranks."""
    headings = ["ranks", "core s", "of one", "wall s", "up MB", "gathered MB", "sent B", "host MB"]
    one = found[0]["rows"][0]["core"]
    lines = []
    for way in found:
        most = {k: max(row[k] for row in way["rows"]) for k in way["rows"][0] if k != "loss"}
        host = most["host"] * (1 if "shared" in way["way"] else way["ranks"])
        lines.append(
            [
                way["way"],
                *(f"{most['core']:.2f}", f"{most['core'] / one:.2f}", f"{most['wall']:.2f}"),
                *(f"{most[k] / 1e6:.1f}" for k in ("uploaded", "gathered")),
                *(f"{most['sent']:.0f}", f"{host / 1e6:.0f}"),
            ]
        )
    return headings, lines


def precision(content: Json) -> list[str]:
    """Return a line on the runs, and a table with one row per format."""
    start = f"Held-out loss at the start: {content['start']:.3f}. {where(content)}"
    return [start, "", *markdown(*precision_rows(content))]


def precision_rows(content: Json) -> tuple[list[str], list[list[str]]]:
    """Return headings and rows: for each setting the mean loss, its difference to float32 over the
    seeds that both have, and the number of seeds; then the drift."""
    found: dict[tuple[str, float, int], dict[int, float]] = {}
    for row in content["rows"]:
        losses = found.setdefault((row["name"], row["lr"], row["steps"]), {})
        losses[row["seed"]] = row["loss"]
    settings = sorted({key[1:] for key in found}, reverse=True)
    heads = ["format"]
    for lr, steps in settings:
        heads += [f"lr {lr:g}, {steps} steps", "to fp32", "seeds"]
    rows = []
    for name, drift in content["drift"].items():
        row = [name]
        for setting in settings:
            losses, base = found.get((name, *setting), {}), found.get(("fp32", *setting), {})
            gaps = [losses[seed] - base[seed] for seed in losses.keys() & base.keys()]
            row += [f"{fmean(losses.values()):.3f}" if losses else ""]
            row += [f"{fmean(gaps):+.3f}" if gaps else "", str(len(losses))]
        rows.append([*row, f"{drift:.2%}"])
    return [*heads, "drift"], rows


def filled(text: str, results: list[Json]) -> str:
    """Return `text` with every marked table rewritten."""

    def fill(match: re.Match[str]) -> str:
        body = "\n".join(tables(match["name"], results))
        return f"{match[1]}\n{body}\n\n{match[3]}"

    return MARKED.sub(fill, text)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("files", nargs="*", type=Path, default=PAGES, metavar="FILE")
    parser.add_argument("--results", type=Path, default=RESULTS, metavar="DIR")
    parser.add_argument(
        "--check", action="store_true", help="change nothing; exit with 1 if a table is out of date"
    )
    arguments = parser.parse_args()
    results = read(arguments.results)
    for file in arguments.files:
        text = file.read_text()
        try:
            new = filled(text, results)
        except ValueError as error:
            sys.exit(f"{file.name}: {error}")
        if arguments.check and new != text:
            sys.exit(f"{file.name} is out of date: run python benchmarks/tables.py")
        if new != text:
            file.write_text(new)


if __name__ == "__main__":
    main()
