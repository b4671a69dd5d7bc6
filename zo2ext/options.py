"""Command-line options from a dataclass: a field is an option, its type and default hold."""

from __future__ import annotations

import argparse
import types
from collections.abc import Callable, Sequence
from dataclasses import MISSING, field, fields
from enum import StrEnum
from typing import Any, TypeVar, Union, get_args, get_origin, get_type_hints

Options = TypeVar("Options")


def option(help: str, default: Any = MISSING, *, group: str = "options") -> Any:
    """A field of an options dataclass; a required one where it has no default.

    Args:
        help: What the option means. Choices and the default are added to it.
        default: Its value where it is not given. If None, `help` says what happens then.
        group: Heading to list it under.
    """
    return field(default=default, metadata={"help": help, "group": group})


def parse(kind: type[Options], words: Sequence[str], *, prog: str) -> Options:
    """The dataclass `kind`, filled from the words of a command line.

    The field ``batch_size`` is the option ``--batch-size``; ``--batch_size`` is understood too.

    Raises:
        SystemExit: With 0 after ``--help``; with 2 and a message, where `words` do not fit.
    """
    return kind(**vars(_parser(kind, prog).parse_args([_hyphenated(word) for word in words])))


def _hyphenated(word: str) -> str:
    if not word.startswith("--"):
        return word
    name, equals, value = word.partition("=")
    return name.replace("_", "-") + equals + value


def _parser(kind: type[Any], prog: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=prog,
        usage=f"{prog} [OPTIONS]",
        description=kind.__doc__,
        add_help=False,
        allow_abbrev=False,
    )
    hints = get_type_hints(kind)
    groups: dict[str, Any] = {"required": parser.add_argument_group("required")}
    for entry in fields(kind):
        title = entry.metadata.get("group", "options")
        if title not in groups:
            groups[title] = parser.add_argument_group(title)
        required, value_type = entry.default is MISSING, _without_none(hints[entry.name])
        help = entry.metadata.get("help", "")
        if not required and entry.default is not None:
            help += f" Default: {entry.default}."
        groups[title].add_argument(
            "--" + entry.name.replace("_", "-"),
            type=_choice(value_type) if issubclass(value_type, StrEnum) else value_type,
            metavar=_metavar(value_type),
            required=required,
            default=None if required else entry.default,
            help=help.replace("%", "%%"),
        )
    end = groups.get("options", parser)
    end.add_argument("-h", "--help", action="help", help="Show this and exit.")
    return parser


def _without_none(hint: Any) -> Any:
    if get_origin(hint) in (Union, types.UnionType):
        (hint,) = (part for part in get_args(hint) if part is not type(None))
    return hint


def _metavar(value_type: type[Any]) -> str | None:
    if issubclass(value_type, StrEnum):
        return "{" + ",".join(value_type) + "}"
    return {int: "N", float: "X"}.get(value_type)


def _choice(enum: type[StrEnum]) -> Callable[[str], StrEnum]:
    def convert(word: str) -> StrEnum:
        try:
            return enum(word)
        except ValueError:
            message = f"must be one of {', '.join(enum)}, got {word!r}"
            raise argparse.ArgumentTypeError(message) from None

    return convert
