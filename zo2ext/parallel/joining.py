"""How the ranks of a run meet: all of them with the same run, model, build and settings.

Rank 0 publishes the run so far; every other rank compares it with its own and answers.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from zo2ext.journal.records import Content, parse
from zo2ext.parallel.exchange import Exchange

logger = logging.getLogger(__name__)

_COORDINATORS_JOURNAL = Path("the coordinator's journal")  # for error messages


def roll_call(exchange: Exchange) -> None:
    """Wait for all ranks, before they wait in other ways that would not notice one that failed."""
    exchange.put(f"here/{exchange.rank}")
    for rank in range(exchange.mesh.ranks):
        exchange.get(f"here/{rank}", exchange.startup, f"rank {rank} did not come")


def publish_run(exchange: Exchange, history: bytes, next_step: int, build: str) -> None:
    """Publish the run so far, as rank 0, and wait for the other ranks' answers.

    Args:
        history: The run as bytes: `records.opening` and all records.
        build: This build, which must be the same on all ranks.
    """
    exchange.put("start", json.dumps(_terms(exchange, build)).encode() + b"\n" + history)
    contents, failures = exchange.collect("hello/{}", exchange.startup)
    for rank in exchange.missing(contents, failures):
        failures[rank] = f"rank {rank} did not come within {exchange.startup:g} s"
    if failures and not exchange.tolerant:
        exchange.publish_failure("go", failures)
    for rank in sorted(failures):
        logger.warning("the run begins without rank %d: %s", rank, failures[rank])
        exchange.away[rank] = next_step - 1
    exchange.put("go")


def receive_run(exchange: Exchange, build: str) -> tuple[Content, list[str]]:
    """Return the run that rank 0 published, and how this rank's settings differ from rank 0's."""
    start = exchange.get("start", exchange.startup, "rank 0 did not start")
    terms, history = start.split(b"\n", 1)
    theirs, mine = json.loads(terms), _terms(exchange, build)
    problems = [f"{n} was {theirs[n]} and is {mine[n]}" for n in mine if mine[n] != theirs[n]]
    return parse(history, _COORDINATORS_JOURNAL), problems


def answer(exchange: Exchange, problems: Sequence[str]) -> None:
    """Join the run that `receive_run` returned, or refuse it because of `problems`."""
    text = "; ".join(problems[:4])
    if text:
        text = f"rank {exchange.rank} differs from rank 0: {text}"
        exchange.put_failure(f"hello/{exchange.rank}", text)
    else:
        exchange.put(f"hello/{exchange.rank}")
    if not (text and exchange.tolerant):  # otherwise nobody is going to answer
        late = f"rank 0 did not greet rank {exchange.rank}"
        exchange.get("go", exchange.startup + exchange.deadline, late)
    if text:
        exchange.end(text)


def _terms(exchange: Exchange, build: str) -> dict[str, Any]:
    """Return the settings that must be the same on all ranks."""
    return {"build": build, "mesh": asdict(exchange.mesh), "tolerant": exchange.tolerant}
