"""``zo2ext report``: write a page of pictures of a run."""

from __future__ import annotations

from pathlib import Path

from zo2ext._files import write_atomically
from zo2ext.commands.arguments import ReportArguments
from zo2ext.errors import UserError
from zo2ext.runs import plots
from zo2ext.runs.data import load_run
from zo2ext.runs.report import draw, report_page, warnings_of


def report(arguments: ReportArguments) -> Path:
    """Run ``zo2ext report``; see `ReportArguments`.

    Returns:
        Path of the page. It replaces an earlier report.
    """
    if not plots.available():
        raise UserError(f"a report needs matplotlib; {plots.HOW_TO_GET}")
    folder = Path(arguments.run)
    run = load_run(folder)
    out = Path(arguments.out) if arguments.out else folder / "report"
    pictures = draw(run)
    out.mkdir(parents=True, exist_ok=True)
    for name, (_, image) in pictures.items():
        write_atomically(out / f"{name}.png", image)
    page = out / "index.html"
    write_atomically(page, report_page(folder.resolve().name, run, pictures).encode())
    print(f"report: {page}, and {len(pictures)} pictures in the same folder")
    for line in warnings_of(run):
        print(f"warning: {line}")
    return page
