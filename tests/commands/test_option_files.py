"""Options from a file: what it may say, who wins, and what is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import zo2ext
from zo2ext.commands import main as cli
from zo2ext.commands.options import option, parse

Capture = pytest.CaptureFixture[str]
Write = Callable[..., str]


class Color(StrEnum):
    RED = "red"
    BLUE = "blue"


@dataclass
class Paint:
    """Paint a wall."""

    wall: str = option("Which wall.", group="required")
    batch_size: int = option("Strokes.", 8)
    rate: float | None = option("Strokes a second. Default: as fast as it goes.", None)
    color: Color = option("Of the paint.", Color.RED)
    coats: list[str] | None = option("Their names. Default: one.", None)
    quiet: bool = option("Without a word.", False)


@pytest.fixture
def write(tmp_path: Path) -> Write:
    def write(text: str, name: str = "paint.yaml") -> str:
        (tmp_path / name).write_text(text, encoding="utf-8")
        return str(tmp_path / name)

    return write


def paint(*words: str) -> Paint:
    return parse(Paint, words, prog="paint")


def refused(capsys: Capture, *words: str) -> str:
    """What `paint` says against `words`, without the usage."""
    with pytest.raises(SystemExit) as end:
        paint(*words)
    assert end.value.code == 2
    said = capsys.readouterr()
    usage, _, problem = said.err.partition("paint: error: ")
    assert (usage, said.out) == ("usage: paint [OPTIONS]\n", "")
    return problem.rstrip("\n")


WHOLE = Paint("north", 4, 1e-4, Color.BLUE, ["a b", "c"], True)
YAML = """# a wall
wall: north
batch-size: 4
rate: 1e-4
color: blue
coats: [a b, "c"]
quiet: yes
"""
JSON = (
    '{"wall": "north", "batch_size": 4, "rate": 0.0001, "color": "blue", "coats": ["a b", "c"], '
    '"quiet": true}'
)


@pytest.mark.parametrize(
    ("text", "name"), [(YAML, "x.yaml"), (YAML, "x.YML"), (JSON, "x.json"), (JSON, "x.yaml")]
)
def test_a_file_stands_for_words(text: str, name: str, write: Write) -> None:
    read = paint("--config", write(text, name))
    assert read == WHOLE
    assert read.color is Color.BLUE


def test_words_win_over_the_file_wherever_they_stand(write: Write) -> None:
    path = write(YAML)
    words = ["--batch_size=5", "--color", "red", "--coats", "d", "--quiet", "no"]
    expected = Paint("north", 5, 1e-4, Color.RED, ["d"], False)
    assert paint(f"--config={path}", *words) == expected
    assert paint(*words, "--config", path) == expected


def test_null_is_a_default_that_stands_for_something(write: Write) -> None:
    path = write("{wall: n, rate: null, coats: ~}")
    assert paint("--config", path) == Paint("n")
    assert paint("--config", path, "--rate", "3").rate == 3


@pytest.mark.parametrize("word", ["no", "12:30", "0x10", "010", "2024-01-01", "1e-4", "'a: b'"])
def test_a_value_means_what_it_means_on_the_command_line(word: str, write: Write) -> None:
    assert paint("--config", write(f"wall: {word}")).wall == word.strip("'")


def test_one_value_of_several(write: Write) -> None:
    assert paint("--config", write("{wall: n, coats: a}")).coats == ["a"]


texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)


@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    paint_=st.builds(
        Paint,
        wall=texts,
        batch_size=st.integers(),
        rate=st.none() | st.floats(allow_nan=False),
        color=st.sampled_from(Color),
        coats=st.none() | st.lists(texts, min_size=1, max_size=3),
        quiet=st.booleans(),
    )
)
def test_what_a_run_writes_is_what_it_reads(paint_: Paint, write: Write) -> None:
    path = write(json.dumps({"zo2ext": zo2ext.__version__, **asdict(paint_)}, indent=2), "a.json")
    assert paint("--config", path) == paint_


# -- refusals


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        (
            "speed: 3",
            "unknown key 'speed'",
        ),
        ("config: other.yaml", "unknown key 'config'"),
        ("batch-size: many", "argument --batch-size: invalid int value: 'many'"),
        ("batch-size: 2.5", "argument --batch-size: invalid int value: '2.5'"),
        ("batch_size: true", "argument --batch-size: invalid int value: 'true'"),
        ("batch_size: null", "batch_size: expected a value, got nothing"),
        ("batch_size: [1, 2]", "batch_size: expected one value, got a list of 2"),
        ("wall:", "wall: expected a value, got nothing"),
        ("rate: fast", "argument --rate: invalid float value: 'fast'"),
        ("color: green", "argument --color: invalid choice: 'green'"),
        ("quiet: perhaps", "argument --quiet: Truthy value expected: got perhaps"),
        ("wall: {a: b}", "wall: expected a value or a list of values, got a mapping"),
        ("coats: [[a]]", "coats: expected a value or a list of values, got a nested list"),
        ("coats: [a, null]", "coats: expected a value or a list of values, got a nested list"),
        ("wall: a\nwall: b", "invalid content: wall is repeated"),
        ("batch-size: 1\nbatch_size: 2", "invalid content: batch_size is repeated"),
        ("? [a, b]\n: c", "invalid content: expected the name of an option as a key"),
        ("", "expected a mapping of options to values, got nothing"),
        ("wall", "expected a mapping of options to values, got 'wall'"),
        ("- wall: a", "expected a mapping of options to values, got a list"),
        ("wall: [a", "invalid content: while parsing a flow sequence"),
        ("wall: a\n---\nwall: b", "invalid content: expected a single document"),
        ("[" * 9999, "invalid content: "),
    ],
)
def test_what_does_not_fit_is_refused(
    text: str, problem: str, write: Write, capsys: Capture
) -> None:
    path = write(text)
    assert refused(capsys, "--config", path).startswith(f"config file {path!r}: {problem}")


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ('{"wall": "a", "wall": "b"}', "invalid content: wall is repeated"),
        ('{"wall": {}}', "wall: expected a value or a list of values, got a mapping"),
        ('{"batch_size": 2.0}', "argument --batch-size: invalid int value: '2.0'"),
        ('{"batch_size": false}', "argument --batch-size: invalid int value: 'no'"),
        ("[1]", "expected a mapping of options to values, got a list"),
        ("3", "expected a mapping of options to values, got '3'"),
        ("{", "invalid content: Expecting property name"),
        ("", "invalid content: Expecting value"),
    ],
)
def test_what_does_not_fit_in_json_is_refused(
    text: str, problem: str, write: Write, capsys: Capture
) -> None:
    path = write(text, "paint.json")
    assert refused(capsys, "--config", path).startswith(f"config file {path!r}: {problem}")


def test_files_of_no_use_are_refused(tmp_path: Path, write: Write, capsys: Capture) -> None:
    missing = str(tmp_path / "missing.yaml")
    said = refused(capsys, "--config", missing)
    assert said == f"config file {missing!r}: it cannot be read: No such file or directory"
    (folder := tmp_path / "folder.yaml").mkdir()
    assert refused(capsys, f"--config={folder}").endswith("it cannot be read: Is a directory")
    other = write(YAML, "paint.toml")
    assert "expected a name ending in .yaml, .yml or .json" in refused(capsys, "--config", other)
    (tmp_path / "latin.yaml").write_bytes(b"wall: \xe9t\xe9")
    said = refused(capsys, "--config", str(tmp_path / "latin.yaml"))
    assert "invalid content: 'utf-8' codec can't decode" in said


def test_two_files_are_refused(write: Write, capsys: Capture) -> None:
    one, two = write(YAML, "one.yaml"), write(YAML, "two.yaml")
    said = refused(capsys, "--config", one, f"--config={two}")
    assert said == f"argument --config: expected one file, got {one}, {two}"


def test_what_neither_words_nor_file_give_is_missing(write: Write, capsys: Capture) -> None:
    said = refused(capsys, "--config", write("color: blue"))
    assert said == "the following arguments are required: --wall"


def test_a_file_of_another_version_is_pointed_out(write: Write, capsys: Capture) -> None:
    path = write("{wall: n, zo2ext: 0.0.1}")
    assert paint("--config", path) == Paint("n")
    said = capsys.readouterr().err
    assert said.startswith(f"paint: config file {path!r} was written by zo2ext 0.0.1, this is ")
    assert paint("--config", write(f"{{wall: n, zo2ext: {zo2ext.__version__}}}")) == Paint("n")
    assert capsys.readouterr().err == ""


# -- commands


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_every_command_reads_a_file(name: str, write: Write, capsys: Capture) -> None:
    path = write("{spede: 3}")
    assert cli.main([name, "--config", path]) == 2
    said = capsys.readouterr().err
    assert f"zo2ext {name}: error: config file {path!r}: unknown key 'spede'" in said


@pytest.mark.parametrize("command", ["train", "eval"])
def test_a_task_in_the_file_chooses_the_command_for_tasks(
    command: str, write: Write, capsys: Capture
) -> None:
    path = write("{task: imdb, model: m, out: o, shots: 2}")
    words = [] if command == "train" else ["--config", write("{task: imdb, model: m, shots: 2}")]
    assert cli.main([command, *(words or ["--config", path])]) == 1
    assert (
        f"zo2ext {command}: error: there is no task 'imdb'; tasks are sst2"
        in capsys.readouterr().err
    )
    path = write("{task: null, model: m, shots: 2}")
    assert cli.main([command, "--config", path]) == 2
    assert "unknown key 'task'" in capsys.readouterr().err


def _weights(run: Path) -> bytes:
    return (run / "final" / "model.safetensors").read_bytes()


@pytest.mark.parametrize("task", [False, True], ids=["text", "task"])
def test_the_settings_of_a_run_repeat_it(
    task: bool,
    model_folder: Path,
    text_file: Path,
    task_data: Path,
    tmp_path: Path,
    capsys: Capture,
) -> None:
    first, again = tmp_path / "first", tmp_path / "again"
    words = ["train", "--model", str(model_folder), "--device=cpu", "--steps=2"]
    words += ["--batch-size=2", "--seed=5", "--storage=bf16", "--lr", "1e-5", "--out", str(first)]
    if task:
        words += ["--task", "sst2", "--data", str(task_data / "sst2")]
        words += ["--train-size=4", "--dev-size=2", "--test-size=2"]
    else:
        words += ["--text", str(text_file), "--seq-len=16", "--eval-windows=2"]
    assert cli.main(words) == 0
    settings_ = str(first / "arguments.json")
    assert cli.main(["train", "--config", settings_]) == 0
    assert "finished already: 2 steps" in capsys.readouterr().out
    assert cli.main(["train", "--config", settings_, "--out", str(again)]) == 0
    assert _weights(again) == _weights(first)
    read: dict[str, Any] = json.loads((again / "arguments.json").read_text())
    assert read == json.loads((first / "arguments.json").read_text()) | {"out": str(again)}
    assert cli.main(["eval", "--config", settings_]) == 2, "other commands take other options"
    assert "unknown key " in capsys.readouterr().err
