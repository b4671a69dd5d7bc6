"""The command line: ``zo2ext COMMAND --help`` says what a command takes."""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

Loaded = tuple[type[Any], Callable[[Any], object]]  # options, and what runs on them


@dataclass(frozen=True)
class Command:
    """A command: its one line, its options (a dataclass), and what runs it.

    `for_task` stands in for `load` where ``--task`` is among the words.
    """

    summary: str
    load: Callable[[], Loaded]
    for_task: Callable[[], Loaded] | None = None

    def choose(self, words: Sequence[str]) -> Loaded:
        """Options and work, for these words."""
        names_task = any(word.partition("=")[0] == "--task" for word in words)
        return self.for_task() if self.for_task and names_task else self.load()


def _train() -> Loaded:
    from zo2ext.train import TrainArguments, train

    return TrainArguments, train


def _train_task() -> Loaded:
    from zo2ext.task_run import TrainTaskArguments, train_task

    return TrainTaskArguments, train_task


def _eval_task() -> Loaded:
    from zo2ext.task_run import EvalTaskArguments, evaluate_task

    return EvalTaskArguments, evaluate_task


def _demo() -> Loaded:
    from zo2ext.demo import DemoArguments, demo

    return DemoArguments, demo


def _plan() -> Loaded:
    from zo2ext.plan import PlanArguments, plan

    return PlanArguments, plan


def _info() -> Loaded:
    from zo2ext.info import InfoArguments, info

    return InfoArguments, info


COMMANDS = {
    "train": Command(
        "fine-tune a causal language model on a text, or a --task", _train, _train_task
    ),
    "eval": Command("judge a causal language model on a --task", _eval_task),
    "demo": Command("fine-tune a tiny model that ships with zo2ext; needs nothing", _demo),
    "plan": Command("say what a model needs, before its weights are loaded", _plan),
    "info": Command("say what is installed, and what this machine can do", _info),
}


def usage() -> str:
    lines = "\n".join(f"  {name:<8} {command.summary}" for name, command in COMMANDS.items())
    return (
        "usage: zo2ext COMMAND [OPTIONS]\n\n"
        "Zeroth-order fine-tuning of language models that do not fit the GPU.\n\n"
        f"commands:\n{lines}\n\n"
        "zo2ext COMMAND --help lists a command's options, zo2ext train --task NAME --help those\n"
        "of fine-tuning on a task; zo2ext --version the version."
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command.

    Args:
        arguments: Words of the command line; those of this process when None.

    Returns:
        The exit status: 0; 1 where the command failed; 2 where it was called wrongly; 130 where
        it was interrupted. What went wrong is on standard error.
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    if words[:1] in (["--version"], ["-V"]):
        from zo2ext import __version__

        print(f"zo2ext {__version__}")
        return 0
    if words and words[0] in ("-h", "--help"):
        print(usage())
        return 0
    if not words or words[0] not in COMMANDS:
        problem = f"no command {words[0]!r}" if words else "a command is missing"
        print(f"{usage()}\n\nzo2ext: error: {problem}", file=sys.stderr)
        return 2
    try:
        return _run(words[0], words[1:])
    except KeyboardInterrupt as interrupt:
        print(" ".join((f"\nzo2ext {words[0]}: interrupted", *interrupt.args)), file=sys.stderr)
        return 130


def _run(name: str, words: list[str]) -> int:
    # What a command has to say, it says itself. Read when transformers is imported.
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    from zo2ext.options import parse

    options, work = COMMANDS[name].choose(words)
    try:
        parsed = parse(options, words, prog=f"zo2ext {name}")
    except SystemExit as done:
        return int(done.code or 0)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            work(parsed)
    except (ValueError, TypeError, OSError, RuntimeError) as error:
        print(f"zo2ext {name}: error: {error}", file=sys.stderr)
        return 1
    return 0
