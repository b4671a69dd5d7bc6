"""Ranks of a run, as ``torchrun`` would start them, but from a process that has all imports.

`Launch` starts them; `process` is what each of them is.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import socket
import sys
import time
import traceback
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import matplotlib.figure  # noqa: F401
import rank_trainer
import torch

from zo2ext.commands import main as cli
from zo2ext.commands import task, train
from zo2ext.engine import engine

torch.set_num_threads(1)
WARM = (task, train)  # what the commands import


def process(rank: int, ranks: int, port: int, output: Path, job: Mapping[str, Any]) -> None:
    """One rank. `job`: "words" of a command, or "trainer": what `rank_trainer` takes; perhaps
    "kill" or "fail": a step, before which it dies, or raises."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks)}
    os.environ |= {"LOCAL_WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1"}
    os.environ["MASTER_PORT"] = str(port)
    with output.open("w", buffering=1) as file:
        sys.stdout = sys.stderr = file
        _arm(job)
        try:
            status = (
                cli.main(job["words"]) if "words" in job else rank_trainer.main(*job["trainer"])
            )
        except BaseException:
            traceback.print_exc()
            status = 1
    os._exit(status or 0)


def _arm(job: Mapping[str, Any]) -> None:
    """Have the process end before a step."""
    step = engine.ZOEngine.step

    def armed(self: engine.ZOEngine, *args: Any, **options: Any) -> float:
        if self.steps == job.get("kill"):
            os.kill(os.getpid(), signal.SIGKILL)
        if self.steps == job.get("fail"):
            raise OSError("no space is left")
        return step(self, *args, **options)

    engine.ZOEngine.step = armed  # type: ignore[method-assign]


class Launch:
    """Starts ranks and waits for them.

    Args:
        folder: For what they say.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload(["launched"])
        self.said: list[str] = []

    def __call__(
        self, ranks: int, job: Mapping[str, Any], at: Mapping[int, Mapping[str, Any]] | None = None
    ) -> list[int]:
        """Run `job` in so many processes, with other entries `at` some; returns how they ended."""
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        outputs = [self._folder / f"said.{rank}" for rank in range(ranks)]
        started = [
            self._context.Process(
                target=process,
                args=(rank, ranks, port, outputs[rank], {**job, **(at or {}).get(rank, {})}),
            )
            for rank in range(ranks)
        ]
        for one in started:
            one.start()
        end = time.monotonic() + 120
        for one in started:
            one.join(max(end - time.monotonic(), 0.1))
            if one.exitcode is None:
                one.kill()
                one.join()
        self.said = [path.read_text() if path.exists() else "" for path in outputs]
        return [int(one.exitcode or 0) for one in started]
