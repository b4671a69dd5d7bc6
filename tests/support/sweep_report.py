"""What a sweep over model types found, as a table and as a page of the documentation."""

from __future__ import annotations

import datetime
import platform
import re
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import transformers

import zo2ext
from zo2ext._files import write_atomically

VERDICTS = ["equal", "differs", "fails", "not run", "not built", "unsupported"]


@dataclass(frozen=True)
class Outcome:
    """What became of one model type; `verdict` is one of VERDICTS."""

    model_type: str
    verdict: str
    detail: str = ""
    parameters: int = 0
    seconds: float = 0.0


@dataclass(frozen=True)
class Sweep:
    """All types of one kind, their forward passes run in one way."""

    kind: str
    way: str
    outcomes: Sequence[Outcome]

    def types(self, *verdicts: str) -> list[str]:
        return [o.model_type for o in self.outcomes if o.verdict in verdicts]


def summary(sweeps: Sequence[Sweep]) -> str:
    """A Markdown table: how many types came to which verdict."""
    lines = [
        "| " + " | ".join(["kind", "way", "types", *VERDICTS]) + " |",
        "|---|---|" + "---:|" * (1 + len(VERDICTS)),
    ]
    for sweep in sweeps:
        counts = Counter(outcome.verdict for outcome in sweep.outcomes)
        cells = [sweep.kind, sweep.way, len(sweep.outcomes), *(counts[v] for v in VERDICTS)]
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines)


def write(path: Path, sweeps: Sequence[Sweep]) -> None:
    """Write the page of documentation about `sweeps` to `path`; its section on factors stays."""
    factored = _SECTION.search(path.read_text()) if path.exists() else None
    page = _page(sweeps)
    if factored:
        page = page.replace(_LAST, factored.group() + _LAST)
    write_atomically(path, page.encode())


def factored_table(found: Mapping[str, Sequence[Outcome]]) -> str:
    """A Markdown table: how many types of each kind read factors, and in which way."""
    verdicts = ["factored", "dense", "differs", "fails", "not run", "not built"]
    lines = [
        "| " + " | ".join(["kind", "types", *verdicts]) + " |",
        "|---|" + "---:|" * (1 + len(verdicts)),
    ]
    for kind, outcomes in found.items():
        counts = Counter(outcome.verdict for outcome in outcomes)
        cells = [kind, len(outcomes), *(counts[v] for v in verdicts)]
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines)


def write_factored(path: Path, found: Mapping[str, Sequence[Outcome]]) -> None:
    """Write the section on factors into the page at `path`, in place of the one that is there."""
    rows: dict[tuple[str, str, str], list[str]] = {}
    for kind, outcomes in found.items():
        for o in outcomes:
            if o.verdict not in ("factored", "not built"):
                reason = o.detail.replace("|", "\\|").replace("<", "&lt;")
                rows.setdefault((kind, o.verdict, reason), []).append(o.model_type)
    section = _FACTORED.format(
        date=datetime.datetime.now(tz=datetime.UTC).date(),
        command=" ".join(["python", "tests/support/factored_models.py", *sys.argv[1:]]),
        table=factored_table(found),
        rows="\n".join(
            f"| {k} | {v} | {why} | {', '.join(t)} |" for (k, v, why), t in rows.items()
        ),
    )
    page = _SECTION.sub("", path.read_text())
    write_atomically(path, page.replace(_LAST, section + _LAST).encode())


_LAST = "## A model of your own\n"
_SECTION = re.compile(r"^## Factored directions\n.*?(?=^## )", re.MULTILINE | re.DOTALL)
_FACTORED = """\
## Factored directions

With `rank` ([Factored directions](factored.md)), a model reads `W + u @ v.mT` where it reads a
matrix `W`, and the dense sum is not made unless an operation is not known to the handlers in
`zo2ext/model/factored/`. For each type, the logits of a tiny model with such matrices are compared,
in float64, with those of the model with the dense sums. {date}; run it from the repository:

    {command}

{table}

*factored*: same logits within 1e-12 of the largest, and nothing was made dense. *dense*: the same,
and the operations named below got the dense sum of a weight, which is right, but slower. *differs*:
other logits. *fails*: does not run. *not run*, *not built*: not without factors either.

| kind | verdict | operations or reason | types |
|---|---|---|---|
{rows}

"""

_PAGE = """\
# Models

zo2ext has no code per model family. A sweep over every type that `transformers` can build checks
that it works with models it has never seen. For each type, a tiny random model is built from the
type's config class with all sizes reduced, and trained for two steps with streamed units. Its
losses at `+eps` and `-eps` and its final weights are compared, bit for bit in float32, with plain
perturbed forward passes. Sequences are longer than sliding windows, and the router losses of
experts are part of the loss.

The sweep writes this page. {date}; zo2ext {zo2ext}, transformers {transformers},
torch {torch}, Python {python}. Run it from the repository:

    {command}

## Results

{summary}

*equal*: same bits. *differs*: other bits. *fails*: runs in memory, but not streamed. *not run*:
does not run in memory either, on random tokens. *not built*: the library cannot build it from a
generic tiny config with the installed packages. *unsupported*: the library does not run the type
in this way.

Ways of running a forward pass: *own*, in eval mode with the attention that the model chooses
itself; *eager* and *sdpa* attention; *autocast* to bfloat16, of float32 weights; *train*, with
dropout; *checkpointing*, in train mode with gradient checkpointing on. A sample of the types, and
every way of some, is part of the test suite (`tests/model/test_models.py`).

{wrong}## Not built or not run

{missing}

## Checked and equal

{equal}

## A model of your own

    zo2ext check ./my-model

compares a checkpoint that fits into memory three times in float32 in the same way, streamed and
resident, by block and by module; the exit status is 0 if all are equal. For a larger one, `--tiny`
reads only its config and checks a tiny random model of the same architecture. `--kind` is the
purpose of the model: `causal`, `classification` or `seq2seq`.

A model that is not one of transformers' is compared by `plain_run` and `engine_run` of
`zo2ext.engine.check`, which take a loss function.
"""


def _page(sweeps: Sequence[Sweep]) -> str:
    kinds = dict.fromkeys(sweep.kind for sweep in sweeps)
    found = {kind: [s for s in sweeps if s.kind == kind] for kind in kinds}
    wrong = _rows(found, "differs", "fails")
    return _PAGE.format(
        date=datetime.datetime.now(tz=datetime.UTC).date(),
        zo2ext=zo2ext.__version__,
        transformers=transformers.__version__,
        torch=torch.__version__,
        python=platform.python_version(),
        command=" ".join(["python", "tests/support/models.py", *sys.argv[1:]]),
        summary=summary(sweeps),
        wrong=f"## Differs or fails\n\n{wrong}\n\n" if wrong else "",
        missing=_rows(found, "not run", "not built") or "None.",
        equal="\n\n".join(f"**{k}**: {_names(found[k])}." for k in kinds),
    )


def _rows(found: dict[str, list[Sweep]], *verdicts: str) -> str:
    """A Markdown table of the types with `verdicts`, each reason once; empty if there are none."""
    rows: dict[tuple[str, str, str], list[str]] = {}
    for kind, sweeps in found.items():
        for sweep in sweeps:
            for outcome in sweep.outcomes:
                if outcome.verdict in verdicts:
                    reason = outcome.detail.replace("|", "\\|").replace("<", "&lt;")
                    row = (kind, outcome.model_type, f"{outcome.verdict}: {reason}")
                    rows.setdefault(row, []).append(sweep.way)
    head = "| kind | type | way | reason |\n|---|---|---|---|\n"
    lines = [f"| {k} | {t} | {', '.join(a)} | {why} |" for (k, t, why), a in rows.items()]
    return head + "\n".join(lines) if lines else ""


def _names(sweeps: list[Sweep]) -> str:
    """Types that were equal in at least one sweep, and in none differed or failed."""
    equal = {t for sweep in sweeps for t in sweep.types("equal")}
    return ", ".join(sorted(equal - {t for s in sweeps for t in s.types("differs", "fails")}))
