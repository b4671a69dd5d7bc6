"""The command line: ``zo2ext COMMAND --help`` says what a command takes."""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from zo2ext.commands.options import CommandLine

Loaded = tuple[type[Any], Callable[[Any], object]]  # options, and what runs on them


@dataclass(frozen=True)
class Command:
    """A command: its one line, its options (a dataclass), and what runs it.

    `for_task` stands in for `load` where a ``--task`` is given, on the command line or in a file.
    """

    summary: str
    load: Callable[[], Loaded]
    for_task: Callable[[], Loaded] | None = None

    def choose(self, line: CommandLine) -> Loaded:
        """Options and work, for this command line."""
        return self.for_task() if self.for_task and line.names("task") else self.load()


def _train() -> Loaded:
    from zo2ext.commands.train import TrainArguments, train

    return TrainArguments, train


def _train_task() -> Loaded:
    from zo2ext.commands.task import train_task
    from zo2ext.commands.task_options import TrainTaskArguments

    return TrainTaskArguments, train_task


def _eval_text() -> Loaded:
    from zo2ext.commands.eval_text import EvalTextArguments, evaluate_text

    return EvalTextArguments, evaluate_text


def _eval_task() -> Loaded:
    from zo2ext.commands.task import evaluate_task
    from zo2ext.commands.task_options import EvalTaskArguments

    return EvalTaskArguments, evaluate_task


def _generate() -> Loaded:
    from zo2ext.commands.generate import GenerateArguments, generate

    return GenerateArguments, generate


def _demo() -> Loaded:
    from zo2ext.commands.demo import DemoArguments, demo

    return DemoArguments, demo


def _plan() -> Loaded:
    from zo2ext.commands.plan import PlanArguments, plan

    return PlanArguments, plan


def _report() -> Loaded:
    from zo2ext.commands.report import ReportArguments, report

    return ReportArguments, report


def _export() -> Loaded:
    from zo2ext.commands.export import ExportArguments, export

    return ExportArguments, export


def _verify() -> Loaded:
    from zo2ext.commands.export import VerifyArguments, verify

    return VerifyArguments, verify


def _info() -> Loaded:
    from zo2ext.commands.info import InfoArguments, info

    return InfoArguments, info


def _check() -> Loaded:
    from zo2ext.commands.check import CheckArguments, check

    return CheckArguments, check


COMMANDS = {
    "train": Command(
        "fine-tune a causal language model on a text, or a --task", _train, _train_task
    ),
    "eval": Command("judge a causal language model on a text, or a --task", _eval_text, _eval_task),
    "generate": Command("complete prompts with a model that need not fit the GPU", _generate),
    "demo": Command("fine-tune a tiny model that ships with zo2ext; needs nothing", _demo),
    "report": Command("show a run as a page of pictures and numbers", _report),
    "export": Command("rebuild any step's weights from base weights and journal", _export),
    "verify": Command("check a run's journal, or a checkpoint against it", _verify),
    "check": Command("compare a model on the engine with plain forward passes", _check),
    "plan": Command("say what a model needs, before its weights are loaded", _plan),
    "info": Command("say what is installed, and what this machine can do", _info),
}


def usage() -> str:
    lines = "\n".join(f"  {name:<9} {command.summary}" for name, command in COMMANDS.items())
    return (
        "usage: zo2ext COMMAND [OPTIONS]\n\n"
        "Zeroth-order fine-tuning of language models that do not fit the GPU.\n\n"
        f"commands:\n{lines}\n\n"
        "zo2ext COMMAND --help lists a command's options; for train and eval, with --task NAME,\n"
        "those of tasks. zo2ext --version says the version."
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
        from zo2ext._version import __version__

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
    from zo2ext.commands.options import CommandLine
    from zo2ext.errors import ExtensionError

    try:
        line = CommandLine(words, prog=f"zo2ext {name}")
        options, work = COMMANDS[name].choose(line)
        parsed = line.parse(options)
    except SystemExit as done:
        return int(done.code or 0)
    except ExtensionError as error:
        print(f"zo2ext {name}: error: {error}", file=sys.stderr)
        return 1
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            work(parsed)
    except (ValueError, TypeError, OSError, RuntimeError) as error:
        rank = f"rank {os.environ['RANK']}: " if int(os.environ.get("WORLD_SIZE", 1)) > 1 else ""
        print(f"zo2ext {name}: {rank}error: {error}", file=sys.stderr)
        return 1
    return 0
