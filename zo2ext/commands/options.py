"""Command-line options from a dataclass: a field is an option, its type and default hold.

The parser is transformers' own; behind the words of the command line stands a ``--config`` file.
"""

from __future__ import annotations

import argparse
import sys
import types
from collections.abc import Sequence
from dataclasses import MISSING, field, fields, make_dataclass
from enum import StrEnum
from typing import Any, TypeVar, Union, get_args, get_origin, get_type_hints

from zo2ext._version import __version__
from zo2ext.commands.option_files import OptionFile, read_options

Options = TypeVar("Options")

REQUIRED, PLACE = "required", "memory and speed"  # headings that come first and last
VERSION_KEY = "zo2ext"  # of a file: the version that wrote it
_METAVARS = {int: "N", float: "X", bool: "yes|no"}
_EXPECTED = {int: "an integer", float: "a number", bool: "yes or no", str: "a text"}


def option(
    help: str, default: Any = MISSING, *, group: str = "options", first: bool = False
) -> Any:
    """A field of an options dataclass; a required one where it has no default.

    Args:
        help: What the option means. Choices and the default are added to it.
        default: Its value where it is not given. If None, `help` says what happens then.
        group: Heading to list it under.
        first: Whether the first word of the command line, if it is no option, is its value.
    """
    return field(default=default, metadata={"help": help, "group": group, "first": first})


def parse(kind: type[Options], words: Sequence[str], *, prog: str) -> Options:
    """The dataclass `kind`, filled from a command line; see `CommandLine`."""
    return CommandLine(words, prog=prog).parse(kind)


class CommandLine:
    """The words after a command, and the file that ``--config`` names among them.

    Args:
        words: Of the command line.
        prog: The command, as the user called it.

    Raises:
        SystemExit: With 2 and a message, where there is a ``--config`` that cannot be read.
    """

    def __init__(self, words: Sequence[str], *, prog: str) -> None:
        self._prog = prog
        parser = argparse.ArgumentParser(**_manners(prog))
        parser.add_argument("--config", action="append", default=[])
        found, self._words = parser.parse_known_args(list(words))
        if len(found.config) > 1:
            parser.error(f"argument --config: expected one file, got {', '.join(found.config)}")
        try:
            self._file = read_options(found.config[0]) if found.config else OptionFile("", {})
        except ValueError as error:
            parser.error(str(error))
        self._note_version()

    def names(self, option: str) -> bool:
        """Whether `option` has a value, among the words or in the file."""
        among_words = any(word.partition("=")[0] == f"--{option}" for word in self._words)
        return among_words or self._file.values.get(option) is not None

    def parse(self, kind: type[Options]) -> Options:
        """The dataclass `kind`: each option from the words, else the file, else its default.

        The field ``batch_size`` is the option ``--batch-size``; ``--batch_size`` is understood
        too, and so are both in a file.

        Raises:
            SystemExit: With 0 after ``--help``; with 2 and a message, where the words or the file
                do not fit.
        """
        parser = _parser(kind, self._prog)
        try:
            values = self._from_file(kind, parser)
        except ValueError as error:
            parser.error(str(error))
        for action in parser._actions:
            action.required = action.required and action.dest not in values
        words = self._words
        if (name := _first(kind)) is not None and words and not words[0].startswith("-"):
            words = [f"--{name.replace('_', '-')}={words[0]}", *words[1:]]
        values |= vars(parser.parse_args(words))
        kinds = _kinds(kind)
        for name, value in values.items():
            if value is not None and _is_choice(kinds[name]):
                values[name] = kinds[name](value)
        return kind(**values)

    def _note_version(self) -> None:
        version = self._file.values.pop(VERSION_KEY, None)
        if version not in (None, __version__):
            print(
                f"{self._prog}: config file {self._file.path!r} was written by zo2ext {version}, "
                f"this is {__version__}: the same options may not give the same bits",
                file=sys.stderr,
            )

    def _from_file(self, kind: type[Any], parser: argparse.ArgumentParser) -> dict[str, Any]:
        """The file's values, as the parser would make them of the same words."""
        known = {entry.name: entry for entry in fields(kind)}
        if unknown := [repr(name) for name in self._file.values if name not in known]:
            raise self._file.refusal(
                f"unknown key {', '.join(unknown)}; {self._prog} takes "
                f"{', '.join(known) or 'no options'}"
            )
        kinds = _kinds(kind)
        actions = {action.dest: action for action in parser._actions}
        values: dict[str, Any] = {}
        for name, value in self._file.values.items():
            several = get_origin(kinds[name]) is list
            if isinstance(value, list) and several:
                values[name] = [self._converted(actions[name], kinds[name], w) for w in value]
            elif isinstance(value, str):
                word = self._converted(actions[name], kinds[name], value)
                values[name] = [word] if several else word
            elif value is None and known[name].default is None:
                values[name] = None
            else:
                got = "nothing" if value is None else f"a list of {len(value)}"
                raise self._file.refusal(f"{name}: expected {_expected(kinds[name])}, got {got}")
        return values

    def _converted(self, action: argparse.Action, kind: Any, word: str) -> Any:
        convert: Any = action.type
        try:
            value = convert(word)
        except (ValueError, argparse.ArgumentTypeError):
            value = None
        if value is None or (_is_choice(kind) and value not in list(kind)):
            raise self._file.refusal(f"{action.dest}: expected {_expected(kind)}, got {word!r}")
        return value


def _is_choice(kind: Any) -> bool:
    return isinstance(kind, type) and issubclass(kind, StrEnum)


def _expected(kind: Any) -> str:
    return f"one of {', '.join(kind)}" if _is_choice(kind) else _EXPECTED.get(kind, "a text")


def _manners(prog: str) -> dict[str, Any]:
    return {
        "prog": prog,
        "usage": f"{prog} [OPTIONS]",
        "add_help": False,
        "allow_abbrev": False,
        "formatter_class": argparse.HelpFormatter,
    }


def _first(kind: type[Any]) -> str | None:
    """The field that the first word may stand for."""
    return next((entry.name for entry in fields(kind) if entry.metadata.get("first")), None)


def _parser(kind: type[Any], prog: str) -> Any:
    from transformers import HfArgumentParser

    manners = _manners(prog)
    if (name := _first(kind)) is not None:
        manners["usage"] = f"{prog} {name.upper()} [OPTIONS]"
    parser = HfArgumentParser(_by_group(kind), description=kind.__doc__, **manners)
    general = parser.add_argument_group("general")
    general.add_argument(
        "--config",
        metavar="FILE",
        help="YAML or JSON file of these options, by name. What stands on the command line wins.",
    )
    general.add_argument("-h", "--help", action="help", help="Show this and exit.")
    for action in parser._actions:
        # Both spellings are understood, one is shown.
        action.option_strings = [word for word in action.option_strings if "_" not in word]
        # What is not given is left to the file and to the dataclass.
        action.default = argparse.SUPPRESS
    return parser


def _by_group(kind: type[Any]) -> list[Any]:
    """The fields of `kind`, as a dataclass a heading: so `HfArgumentParser` makes its groups."""
    kinds = _kinds(kind)
    groups: dict[str, list[Any]] = {}
    for entry in fields(kind):
        help = entry.metadata.get("help", "")
        if not any(entry.default is silent for silent in (MISSING, None, False)):
            help += f" Default: {entry.default}."
        metadata: dict[str, Any] = {"help": help.replace("%", "%%")}
        value_type = kinds[entry.name]
        if value_type in _METAVARS:
            metadata["metavar"] = _METAVARS[value_type]
        if get_origin(value_type) is list:
            metadata["action"] = "extend"  # an option that is given again adds to it
        made = field(default=entry.default, metadata=metadata)
        groups.setdefault(entry.metadata.get("group", "options"), []).append(
            (entry.name, value_type, made)
        )
    return [
        make_dataclass(title, made, kw_only=True, namespace={"_argument_group_name": title})
        for title, made in sorted(
            groups.items(), key=lambda g: (g[0] == PLACE) - (g[0] == REQUIRED)
        )
    ]


def _kinds(kind: type[Any]) -> dict[str, Any]:
    """Types of the fields of `kind`, None taken out of unions."""
    hints = get_type_hints(kind)
    return {entry.name: _without_none(hints[entry.name]) for entry in fields(kind)}


def _without_none(hint: Any) -> Any:
    if get_origin(hint) in (Union, types.UnionType):
        (hint,) = (part for part in get_args(hint) if part is not type(None))
    return hint
