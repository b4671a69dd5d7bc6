"""The command line: what it understands, what it says, how it ends."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import zo2ext
from zo2ext.commands import arguments
from zo2ext.commands import main as cli
from zo2ext.commands.options import option, parse

Capture = pytest.CaptureFixture[str]


class Color(StrEnum):
    RED = "red"
    BLUE = "blue"


@dataclass
class Paint:
    """Paint a wall."""

    wall: str = option("Which wall.")
    batch_size: int = option("Strokes, 100% of them.", 8)
    rate: float | None = option("Strokes a second. Default: as fast as it goes.", None)
    color: Color = option("Of the paint.", Color.RED, group="taste")
    coats: list[str] | None = option("Their names. Default: one.", None, group="taste")
    quiet: bool = option("Without a word.", False, group="taste")


def paint(*words: str) -> Paint:
    return parse(Paint, words, prog="paint")


# -- options


def test_options_take_their_defaults() -> None:
    assert paint("--wall", "north") == Paint("north", 8, None, Color.RED)


@pytest.mark.parametrize(
    "words", ["--batch-size 4", "--batch_size 4", "--batch-size=4", "--batch_size=4"]
)
def test_hyphens_and_underscores_are_alike(words: str) -> None:
    assert paint("--wall", "w", *words.split()).batch_size == 4


@pytest.mark.parametrize(
    ("words", "quiet"),
    [("", False), ("--quiet", True), ("--quiet no", False), ("--quiet=yes", True)],
)
def test_yes_or_no(words: str, quiet: bool) -> None:
    assert paint("--wall", "w", *words.split()).quiet is quiet


def test_several_values_add_up() -> None:
    read = paint("--coats", "a b", "c", "--wall", "w", "--coats=--d")
    assert read.coats == ["a b", "c", "--d"]


def test_values_are_converted_and_otherwise_left_alone() -> None:
    read = paint("--wall=my_wall=a_b", "--rate", "1e-4", "--color", "blue")
    assert read == Paint("my_wall=a_b", 8, 1e-4, Color.BLUE)
    assert read.color is Color.BLUE


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("", "required: --wall"),
        ("--wall", "argument --wall: expected one argument"),
        ("--wall w --batch-size few", "argument --batch-size: invalid int value: 'few'"),
        ("--wall w --color green", "argument --color: invalid choice: 'green' (choose from"),
        ("--wall w --speed 3", "unknown option --speed"),
        ("--wall w --quiet perhaps", "argument --quiet: Truthy value expected: got perhaps"),
        ("--wall w --coats", "argument --coats: expected at least one argument"),
        ("--wall w --config", "argument --config: expected one argument"),
        ("--wall w --batch 3", "unknown option --batch; did you mean --batch-size?"),
        ("--wall w south", "unknown option south"),
    ],
)
def test_what_does_not_fit_is_said_with_the_usage(
    words: str, message: str, capsys: Capture
) -> None:
    with pytest.raises(SystemExit) as end:
        paint(*words.split())
    assert end.value.code == 2
    said = capsys.readouterr().err
    assert said.startswith("usage: paint [OPTIONS]")
    assert message in said


def test_help_states_defaults_choices_and_headings(
    capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "100")
    with pytest.raises(SystemExit) as end:
        paint("--help")
    assert end.value.code == 0
    said = " ".join(capsys.readouterr().out.split())
    for part in (
        "Paint a wall.",
        "--wall WALL Which wall. --batch-size N Strokes, 100% of them. Default: 8.",
        "--rate X Strokes a second. Default: as fast as it goes. taste:",
        "taste: --color {red,blue} Of the paint. Default: red.",
        "--coats COATS [COATS ...] Their names. Default: one.",
        "--quiet [yes|no] Without a word. general:",
        "general: --config FILE",
        "-h, --help Show this help and exit.",
    ):
        assert part in said


# -- commands


@pytest.mark.parametrize("words", [["--help"], ["-h"]])
def test_help_lists_the_commands(words: list[str], capsys: Capture) -> None:
    assert cli.main(words) == 0
    said = capsys.readouterr().out
    assert all(f"  {name} " in said for name in cli.COMMANDS)


@pytest.mark.parametrize("words", [["--version"], ["-V"]])
def test_the_version(words: list[str], capsys: Capture) -> None:
    assert cli.main(words) == 0
    assert capsys.readouterr().out == f"zo2ext {zo2ext.__version__}\n"


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_every_command_explains_each_of_its_options(
    name: str, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    assert cli.main([name, "--help"]) == 0
    said = capsys.readouterr().out
    options = getattr(arguments, cli.COMMANDS[name].options)
    entries = options.__dataclass_fields__.values()
    first = "".join(f" {e.name.upper()}" for e in entries if e.metadata.get("first"))
    assert said.startswith(f"usage: zo2ext {name}{first} [OPTIONS]")
    for entry in entries:
        assert f"  --{entry.name.replace('_', '-')} " in said
        assert len(entry.metadata["help"]) > 10
    assert said.rstrip().endswith("\n".join(f"  zo2ext {e}" for e in cli.COMMANDS[name].examples))
    for entry in entries:
        if entry.default is None:
            assert "Default:" in entry.metadata["help"], entry.name
    assert all(len(line) <= 100 for line in said.splitlines())


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "a command is missing"),
        (["trian"], "unknown command 'trian'; did you mean train?"),
        (["--steps", "3"], "unknown command '--steps'"),
        (["train"], "required: --model, --text, --out"),
        (["train", "--model", "m", "--text", "t"], "required: --out"),
        (["train", "--model=m", "--text=t", "--out=o", "--speed=3"], "unknown option --speed"),
        (
            ["train", "--model=m", "--text=t", "--out=o", "--storage=fp8"],
            "argument --storage: invalid",
        ),
        (["train", "--model=m", "--text=t", "--out=o", "--granularity=x"], "granularity: invalid"),
    ],
)
def test_a_wrong_call_is_answered_with_the_usage(
    words: list[str], message: str, capsys: Capture
) -> None:
    assert cli.main(words) == 2
    said = capsys.readouterr()
    assert said.err.startswith("usage: zo2ext")
    assert message in said.err
    assert said.out == ""


@pytest.mark.parametrize("word", ["--help", "--version", "trian"])
def test_libraries_are_not_waited_for(word: str) -> None:
    program = (
        "import sys; from zo2ext.commands.main import main; main(sys.argv[1:]); "
        "print(sorted({'torch', 'transformers', 'numpy'} & {*sys.modules}))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, word],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    assert done.stdout.splitlines()[-1] == "[]"


def test_the_package_has_its_names_when_asked() -> None:
    program = (
        "import zo2ext, zo2ext.commands.session; from zo2ext import *; "
        "print(load is zo2ext.load, callable(load), zo2ext.ops.direction_key is direction_key, "
        "zo2ext.config.ZOConfig is ZOConfig, {*zo2ext.__all__} <= {*dir(zo2ext)})"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.stdout.split() == ["True"] * 5, done.stderr
    modules = {path.stem for path in Path(zo2ext.__file__).parent.glob("*.py")}
    assert not modules & {*zo2ext._MODULES}, "a module takes its name's place once it is imported"


@pytest.mark.parametrize("name", ["train", "eval"])
def test_tasks_have_options_of_their_own(name: str, capsys: Capture) -> None:
    assert cli.main([name, "--task=sst2", "--help"]) == 0
    said = capsys.readouterr().out
    assert "  --shots N " in said
    assert "  --text " not in said
    assert said.index("\nrequired:") < said.index("\ndata:") < said.index("\nmemory and speed:")


# -- endings


def ending(work: Callable[[Any], None], monkeypatch: pytest.MonkeyPatch) -> int:
    command = cli.Command("paint a wall", "Paint", "paint:paint", ("paint a", "paint b"))
    monkeypatch.setitem(cli.COMMANDS, "paint", command)
    monkeypatch.setattr(arguments, "Paint", Paint, raising=False)
    monkeypatch.setitem(sys.modules, "zo2ext.commands.paint", SimpleNamespace(paint=work))
    return cli.main(["paint", "--wall", "north"])


@pytest.mark.parametrize("error", [zo2ext.UserError, zo2ext.OutOfDeviceMemory])
def test_a_failure_is_one_message_and_status_1(
    error: type[Exception], capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(_: Paint) -> None:
        raise error("the wall is wet")

    assert ending(fail, monkeypatch) == 1
    assert capsys.readouterr() == ("", "zo2ext paint: error: the wall is wet\n")


def test_an_interruption_ends_with_130(capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(_: Paint) -> None:
        raise KeyboardInterrupt("after 3 strokes")

    assert ending(interrupt, monkeypatch) == 130
    assert capsys.readouterr().err == "\nzo2ext paint: interrupted after 3 strokes\n"


def test_a_success_passes_the_options_on(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Paint] = []
    assert ending(seen.append, monkeypatch) == 0
    assert seen == [Paint("north")]


def test_a_file_that_cannot_be_read_is_one_message(
    capsys: Capture, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    assert ending(lambda _: (tmp_path / "missing").read_text(), monkeypatch) == 1  # type: ignore[arg-type, return-value]
    assert "zo2ext paint: error: [Errno 2] No such file" in capsys.readouterr().err


@pytest.mark.parametrize("error", [AssertionError, ValueError, TypeError, RuntimeError, OSError])
def test_an_error_in_the_program_keeps_its_traceback(
    error: type[Exception], monkeypatch: pytest.MonkeyPatch
) -> None:
    def break_down(_: Paint) -> None:
        raise error("never happens")

    with pytest.raises(error, match="never happens"):
        ending(break_down, monkeypatch)


def test_text_and_task_exclude_each_other(capsys: Capture) -> None:
    words = ["train", "--model=m", "--out=o", "--task=sst2", "--text=t"]
    assert cli.main(words) == 2
    assert "--text and --task exclude each other" in capsys.readouterr().err


def test_a_closed_pipe_ends_quietly() -> None:
    code = f"{sys.executable} -m zo2ext --help | head -n 1"
    done = subprocess.run(["bash", "-o", "pipefail", "-c", code], capture_output=True, text=True)
    assert (done.stdout, done.stderr) == ("usage: zo2ext COMMAND [OPTIONS]\n", "")


@pytest.mark.parametrize("words", [["train", "--modle=m"], ["plan", "--help"]])
def test_words_are_checked_before_torch_is_imported(words: list[str]) -> None:
    program = (
        "import sys; from zo2ext.commands.main import main; main(sys.argv[1:]); "
        "print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", program, *words], capture_output=True, text=True)
    assert done.stdout.splitlines()[-1] == "False", done.stderr


def test_the_package_runs_as_a_program() -> None:
    words = [sys.executable, "-m", "zo2ext", "train", "--model", "m", "--text", "t", "--out", "o"]
    done = subprocess.run(
        [*words, "--steps", "0"], capture_output=True, text=True, timeout=120, check=False
    )
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == "zo2ext train: error: steps must be at least 1, got 0\n"


# -- what it needs

_EXTRAS = ("datasets", "peft", "trl", "bitsandbytes", "torchao", "matplotlib", "tensorboard")


def test_commands_need_nothing_but_the_core_dependencies(
    model_folder: Path, text_file: Path, tmp_path: Path
) -> None:
    """What `pip install .` brings: as if nothing else were installed."""
    model, text = str(model_folder), text_file
    out = str(tmp_path / "out")
    small = ["--seq-len", "16", "--eval-windows", "2", "--device", "cpu"]
    train = ["train", "--model", model, "--text", str(text), "--out", out, *small]
    prompt = ["--prompt", "Once", "--max-new-tokens", "3", "--device", "cpu"]
    commands = [
        [*train, "--steps", "2"],
        [*train, "--steps", "3"],
        ["eval", "--model", f"{out}/final", "--text", str(text), *small],
        ["generate", "--model", f"{out}/final", *prompt],
        ["export", out, "--step", "1", "--out", str(tmp_path / "one")],
        ["verify", out, "--checkpoint", f"{out}/final"],
        ["plan", "--model", model, "--seq-len", "16", "--device", "cpu"],
        ["info"],
    ]
    code = (
        "import json, sys\n"
        f"sys.modules.update(dict.fromkeys({_EXTRAS!r}))\n"  # they cannot be imported
        "from zo2ext.commands.main import main\n"
        f"sys.exit(max(main(words) for words in json.loads({json.dumps(json.dumps(commands))})))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
