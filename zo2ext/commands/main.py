"""The command line: ``zo2ext COMMAND --help`` lists the options of a command."""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from zo2ext.commands.options import CommandLine


@dataclass(frozen=True)
class Command:
    """A command of the command line.

    Attributes:
        summary: Description in one line.
        options: Name of a dataclass of options in `zo2ext.commands.arguments`.
        work: Function that runs the command, as "module:function" in `zo2ext.commands`.
        examples: Two examples, without the leading "zo2ext".
        forms: Commands that replace this one, by the option that chooses them; the first wins.
    """

    summary: str
    options: str
    work: str
    examples: tuple[str, str]
    forms: Mapping[str, Command] = field(default_factory=dict)

    def choose(self, line: CommandLine) -> Command:
        """Return this command, or the form of it that an option of `line` chooses.

        Raises:
            SystemExit: With 2 and a message if there is a ``--text``, too.
        """
        for name, form in self.forms.items():
            if line.names(name):
                if line.names("text"):
                    line.error(f"--text and --{name} exclude each other: use one of them")
                return form
        return self


COMMANDS = {
    "train": Command(
        "fine-tune a causal language model on a --text, on rows of --data, or on a --task",
        "TrainArguments",
        "train:train",
        (
            "train --model ./my-model --text my.txt --out runs/first",
            "train --model facebook/opt-13b --text my.txt --out runs/big --granularity module",
        ),
        {
            "task": Command(
                "fine-tune on a task",
                "TrainTaskArguments",
                "task:train_task",
                (
                    "train --task sst2 --model facebook/opt-1.3b --out runs/sst2",
                    "train --task rte --data ./rte --model ./my-model --out runs/rte --lr 1e-5",
                ),
            ),
            "data": Command(
                "fine-tune on rows",
                "TrainRowsArguments",
                "data:train_rows",
                (
                    "train --data chats.jsonl --model ./my-chat-model --out runs/chats",
                    "train --data qa.csv --prompt-column question --completion-column answer "
                    "--model ./my-model --out runs/qa",
                ),
            ),
        },
    ),
    "eval": Command(
        "evaluate a causal language model on a --text, on rows of --data, or on a --task",
        "EvalTextArguments",
        "eval_text:evaluate_text",
        (
            "eval --model ./my-model --text my.txt",
            "eval --model runs/first/final --text my.txt --seq-len 512",
        ),
        {
            "task": Command(
                "evaluate on a task",
                "EvalTaskArguments",
                "task:evaluate_task",
                (
                    "eval --task sst2 --model facebook/opt-1.3b",
                    "eval --task rte --data ./rte --model ./my-model --shots 8",
                ),
            ),
            "data": Command(
                "evaluate on rows",
                "EvalRowsArguments",
                "data:evaluate_rows",
                (
                    "eval --data test.jsonl --model runs/chats/final",
                    'eval --data chats.jsonl --split "train[90%:]" --model ./my-chat-model --json',
                ),
            ),
        },
    ),
    "generate": Command(
        "complete prompts with a model that need not fit the GPU",
        "GenerateArguments",
        "generate:generate",
        (
            'generate --model runs/first/final --prompt "Once upon a time"',
            "generate --model ./my-model --prompts prompts.txt --chat --temperature 0.7",
        ),
    ),
    "demo": Command(
        "fine-tune the packaged tiny model; needs no download",
        "DemoArguments",
        "demo:demo",
        ("demo", "demo --out runs/demo --seed 1"),
    ),
    "report": Command(
        "write a page of pictures and numbers of a run",
        "ReportArguments",
        "report:report",
        ("report runs/first", "report runs/first --out first-report"),
    ),
    "export": Command(
        "rebuild the weights after any step from base weights and journal",
        "ExportArguments",
        "export:export",
        (
            "export runs/first --out exported",
            "export runs/first --step 400 --out step-400 --dtype bf16",
        ),
    ),
    "verify": Command(
        "check a run's journal, or a checkpoint against it",
        "VerifyArguments",
        "export:verify",
        ("verify runs/first", "verify runs/first --checkpoint runs/first/final"),
    ),
    "check": Command(
        "compare a model on the engine with plain forward passes",
        "CheckArguments",
        "check:check",
        ("check ./my-model", "check facebook/opt-13b --tiny"),
    ),
    "plan": Command(
        "predict memory and speed before weights are loaded",
        "PlanArguments",
        "plan:plan",
        ("plan --model facebook/opt-13b", "plan --model ./my-model --batch-size 4 --ranks 8"),
    ),
    "info": Command(
        "print versions, and the devices of this machine with their rates",
        "InfoArguments",
        "info:info",
        ("info", "info --help"),
    ),
}


def usage() -> str:
    """Return the text of ``zo2ext --help``."""
    lines = "\n".join(f"  {name:<9} {command.summary}" for name, command in COMMANDS.items())
    examples = "\n".join(f"  zo2ext {COMMANDS[name].examples[0]}" for name in ("demo", "train"))
    return (
        "usage: zo2ext COMMAND [OPTIONS]\n\n"
        "Zeroth-order fine-tuning of language models that do not fit the GPU.\n\n"
        f"commands:\n{lines}\n\n"
        "zo2ext COMMAND --help lists the options of a command; for train and eval, with\n"
        "--data FILE, those of rows, with --task NAME, those of tasks. zo2ext --version prints\n"
        "the version.\n\n"
        f"examples:\n{examples}"
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command.

    Args:
        arguments: Words of the command line; None: those of this process.

    Returns:
        The exit status: 0; 1 if the command failed; 2 for wrong usage; 130 if it was interrupted;
        141 if its output was closed. Errors are on standard error.
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    try:
        status = _main(words)
        sys.stdout.flush()
        return status
    except KeyboardInterrupt as interrupt:
        print(" ".join((f"\nzo2ext {words[0]}: interrupted", *interrupt.args)), file=sys.stderr)
        return 130
    except BrokenPipeError:  # zo2ext --help | head: end without a message
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141


def _main(words: list[str]) -> int:
    if words[:1] in (["--version"], ["-V"]):
        from zo2ext._version import __version__

        print(f"zo2ext {__version__}")
        return 0
    if words and words[0] in ("-h", "--help"):
        print(usage())
        return 0
    if not words or words[0] not in COMMANDS:
        from difflib import get_close_matches

        problem = f"unknown command {words[0]!r}" if words else "a command is missing"
        like = get_close_matches(words[0], COMMANDS, n=1) if words else []
        hint = f"; did you mean {like[0]}?" if like else ""
        print(f"{usage()}\n\nzo2ext: error: {problem}{hint}", file=sys.stderr)
        return 2
    return _run(words[0], words[1:])


def _run(name: str, words: list[str]) -> int:
    # Commands report for themselves. Read when transformers and datasets are imported.
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    if not sys.stderr.isatty():
        os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    from zo2ext.commands import arguments
    from zo2ext.commands.options import CommandLine
    from zo2ext.errors import needs_traceback

    prog, ranks = f"zo2ext {name}", int(os.environ.get("WORLD_SIZE", 1)) > 1
    try:
        line = CommandLine(words, prog=prog)
        command = COMMANDS[name].choose(line)
        line.examples = [f"zo2ext {example}" for example in command.examples]
        parsed: Any = line.parse(getattr(arguments, command.options))
    except SystemExit as done:
        return int(done.code or 0)
    try:
        if isinstance(parsed, arguments.Checked) and not ranks:
            parsed.check()  # several ranks check later, where they can report errors to each other
        module, _, function = command.work.partition(":")
        work: Callable[[Any], object] = getattr(
            import_module(f"zo2ext.commands.{module}"), function
        )
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            work(parsed)
    except BrokenPipeError:
        raise
    except Exception as error:
        if needs_traceback(error):
            raise
        rank = f"rank {os.environ['RANK']}: " if ranks else ""
        print(f"{prog}: {rank}error: {error}", file=sys.stderr)
        return 1
    return 0
