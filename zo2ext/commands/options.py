"""Command-line options from dataclasses: a field is an option, with its type, default and help.

The parser is transformers' ``HfArgumentParser``. Options may also come from a ``--config`` file.
"""

from __future__ import annotations

import difflib
import json
import sys
import textwrap
import types
from argparse import SUPPRESS, RawDescriptionHelpFormatter
from collections.abc import Sequence
from dataclasses import MISSING, field, fields, make_dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any, TypeVar, Union, get_args, get_origin, get_type_hints

import yaml
from transformers.hf_argparser import HfArgumentParser

from zo2ext._version import __version__
from zo2ext.config import PLACE, PRESETS, group_of

Options = TypeVar("Options")

REQUIRED = "required"  # heading that comes first; PLACE comes last
VERSION_KEY = "zo2ext"  # key of a config file: the version that wrote it
_METAVARS = {int: "N", float: "X", bool: "yes|no"}


def option(
    help: str,
    default: Any = MISSING,
    *,
    group: str = "options",
    first: bool = False,
    choices: Sequence[str] | None = None,
) -> Any:
    """Declare an option as a dataclass field; it is required if it has no default.

    Args:
        help: Help text. Choices and the default are added to it.
        default: Default value. If None, `help` explains what happens then.
        group: Heading of the option in ``--help``.
        first: Whether the first word of the command line is its value unless it is an option.
        choices: Valid words; not needed for an enumeration.
    """
    metadata = {"help": help, "group": group, "first": first, "choices": choices}
    return field(default=default, metadata=metadata)


class CommandLine:
    """The words after a command, and the options of a ``--config`` file.

    Args:
        words: Words of the command line.
        prog: Command, for messages.

    Attributes:
        examples: Example command lines for the end of ``--help``.

    Raises:
        SystemExit: With 2 and a message if the ``--config`` file cannot be read.
    """

    def __init__(self, words: Sequence[str], *, prog: str) -> None:
        self._prog = prog
        self.examples: Sequence[str] = ()
        parser = _Parser(prog=prog, usage=f"{prog} [OPTIONS]", add_help=False, allow_abbrev=False)
        parser.add_argument("--config", action="append", default=[])
        found, self._words = parser.parse_known_args(list(words))
        if len(found.config) > 1:
            parser.error(f"argument --config: expected one file, got {', '.join(found.config)}")
        self._path = found.config[0] if found.config else ""
        try:
            self._file = read_options(self._path) if self._path else {}
        except ValueError as error:
            parser.error(f"config file {self._path!r}: {error}")
        version = self._file.pop(VERSION_KEY, __version__)
        if version != __version__:
            print(
                f"{prog}: config file {self._path!r} was written by zo2ext {version}, this is "
                f"{__version__}: the same options may give other bits",
                file=sys.stderr,
            )

    def error(self, message: str) -> None:
        """Print the usage and `message`, and exit with status 2."""
        _Parser(prog=self._prog, usage=f"{self._prog} [OPTIONS]", add_help=False).error(message)

    def names(self, option: str) -> bool:
        """Return whether `option` has a value in the words or in the file."""
        return self._is_word(option) or self._file.get(option) is not None

    def parse(self, kind: type[Options]) -> Options:
        """Return the dataclass `kind`: each option from the words, else the file, else its default.

        The field ``batch_size`` is the option ``--batch-size``; ``--batch_size`` is valid, too.

        Raises:
            SystemExit: With 0 after ``--help``; with 2 and a message if words or file are invalid.
        """
        parser, kinds = self._parser(kind), _kinds(kind)
        defaults = {entry.name: entry.default for entry in fields(kind)}  # type: ignore[arg-type]
        parser.prefix = f"config file {self._path!r}: "
        from_file: dict[str, Any] = {}
        for name, value in self._file.items():
            if name not in kinds:
                parser.unknown(f"key {name!r}", name, list(kinds))
            if value is None:
                if defaults[name] is not None:
                    parser.error(f"{name}: expected a value, got nothing")
                continue
            several = get_origin(kinds[name]) is list
            if isinstance(value, list) and not several:
                parser.error(f"{name}: expected one value, got a list of {len(value)}")
            words = [f"--{name}={word}" for word in (value if isinstance(value, list) else [value])]
            from_file |= vars(parser.parse_known_args(words)[0])
        parser.prefix = ""
        for action in parser._actions:
            needed = action.dest in kinds and defaults[action.dest] is MISSING
            action.required = needed and action.dest not in from_file
        words = self._words
        first = next((f.name for f in fields(kind) if f.metadata.get("first")), None)  # type: ignore[arg-type]
        if first and words and not words[0].startswith("-"):
            words = [f"--{first.replace('_', '-')}={words[0]}", *words[1:]]
        given, unknown = parser.parse_known_args(words)
        if unknown:
            name = unknown[0].partition("=")[0]
            parser.unknown(
                f"option {unknown[0]}", name, [f"--{n.replace('_', '-')}" for n in kinds]
            )
        values = from_file | vars(given)
        values = PRESETS.get(values.get("preset", ""), {}) | values
        for name, value in values.items():
            if value is not None and _is_enum(kinds[name]):
                values[name] = kinds[name](value)
        return kind(**values)

    def _is_word(self, name: str) -> bool:
        spelled = {f"--{name}", f"--{name.replace('_', '-')}"}
        return any(word.partition("=")[0] in spelled for word in self._words)

    def _parser(self, kind: type[Any]) -> _Parser:
        first = next((f.name for f in fields(kind) if f.metadata.get("first")), None)
        examples = "\n".join(f"  {line}" for line in self.examples)
        parser = _Parser(
            _by_group(kind),
            prog=self._prog,
            usage=f"{self._prog} {first.upper() + ' ' if first else ''}[OPTIONS]",
            description=textwrap.fill(" ".join((kind.__doc__ or "").split()), 98),
            epilog=f"examples:\n{examples}" if examples else None,
            add_help=False,
            allow_abbrev=False,
            formatter_class=RawDescriptionHelpFormatter,
        )
        for action in parser._actions:
            # Both spellings are valid, one is shown.
            action.option_strings = [word for word in action.option_strings if "_" not in word]
            action.default, action.required = SUPPRESS, False
        general = parser.add_argument_group("general")
        general.add_argument(
            "--config",
            metavar="FILE",
            default=SUPPRESS,
            help="YAML or JSON file of these options. Options on the command line override it.",
        )
        general.add_argument(
            "-h", "--help", action="help", default=SUPPRESS, help="Show this help and exit."
        )
        return parser


def parse(kind: type[Options], words: Sequence[str], *, prog: str) -> Options:
    """Return the dataclass `kind` filled from a command line; see `CommandLine`."""
    return CommandLine(words, prog=prog).parse(kind)


class _Parser(HfArgumentParser):
    prefix = ""  # of error messages: the file that the words come from

    def error(self, message: str) -> Any:
        super().error(self.prefix + message)

    def unknown(self, what: str, name: str, known: Sequence[str]) -> None:
        """Report an unknown name and the most similar known one."""
        like = difflib.get_close_matches(name, known, n=1)
        self.error(f"unknown {what}" + (f"; did you mean {like[0]}?" if like else ""))


class _AsText(yaml.BaseLoader):  # type: ignore[misc]
    """Loads scalars as text, so that 1e-4, no and 12:30 mean the same as on the command line; null
    is None. Repeated keys are errors."""

    def construct_scalar(self, node: Any) -> Any:
        plain_null = node.style is None and node.value in ("", "~", "null", "Null", "NULL")
        return None if plain_null else super().construct_scalar(node)

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        return _mapping(
            [(self.construct_object(k), self.construct_object(v)) for k, v in node.value]
        )


def read_options(path: str) -> dict[str, Any]:
    """Read a YAML or JSON mapping of option names to values, as text.

    Args:
        path: UTF-8 file whose name ends in .yaml, .yml or .json.

    Returns:
        A text, a list of texts, or None for null, by option name with underscores.

    Raises:
        ValueError: The file cannot be read, or is not such a mapping.
    """
    suffix = Path(path).suffix.lower()
    if suffix not in (".yaml", ".yml", ".json"):
        raise ValueError("expected a name ending in .yaml, .yml or .json")
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
        if suffix == ".json":
            content = json.loads(
                text, object_pairs_hook=_mapping, parse_int=str, parse_float=str, parse_constant=str
            )
        else:
            content = yaml.load(text, _AsText)
    except OSError as error:
        raise ValueError(f"it cannot be read: {error.strerror}") from error
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise ValueError(f"invalid content: {' '.join(str(error).split())}") from error
    if not isinstance(content, dict):
        raise ValueError(f"expected a mapping of options to values, got {_kind(content)}")
    return {name: _words(name, value) for name, value in _mapping(content.items()).items()}


def _kind(content: Any) -> str:
    if isinstance(content, list):
        return "a list"
    return "nothing" if content is None else repr(content)


def _mapping(pairs: Any) -> dict[str, Any]:
    """Return `pairs` as a dictionary; raise an error for keys that are not text or are repeated."""
    found: dict[str, Any] = {}
    for key, value in pairs:
        if not isinstance(key, str):
            raise ValueError(f"expected the name of an option as a key, got {_kind(key)}")
        name = key.replace("-", "_")
        if name in found:
            raise ValueError(f"{name} is repeated")
        found[name] = value
    return found


def _words(name: str, value: Any) -> Any:
    if isinstance(value, list):
        words = [_words(name, item) for item in value]
        if all(isinstance(word, str) for word in words):
            return words
    elif value is None or isinstance(value, str):
        return value
    elif isinstance(value, bool):  # in JSON
        return "yes" if value else "no"
    got = "a mapping" if isinstance(value, dict) else "a nested list"
    raise ValueError(f"{name}: expected a value or a list of values, got {got}")


def _is_enum(kind: Any) -> bool:
    return isinstance(kind, type) and issubclass(kind, StrEnum)


def _by_group(kind: type[Any]) -> list[Any]:
    """Return the fields of `kind` as one dataclass per heading, for `HfArgumentParser`."""
    kinds = _kinds(kind)
    groups: dict[str, list[Any]] = {}
    for entry in fields(kind):
        help = entry.metadata.get("help", "")
        if entry.default not in (MISSING, None, False):
            help += f" Default: {entry.default}."
        metadata: dict[str, Any] = {"help": help.replace("%", "%%")}
        value_type = kinds[entry.name]
        if entry.metadata.get("choices"):
            metadata["choices"] = list(entry.metadata["choices"])
        elif value_type in _METAVARS:
            metadata["metavar"] = _METAVARS[value_type]
        if get_origin(value_type) is list:
            metadata["action"] = "extend"  # a repeated option adds to the list
        made = field(default=entry.default, metadata=metadata)
        group = entry.metadata.get("group") or group_of(entry.name) or "options"
        groups.setdefault(group, []).append((entry.name, value_type, made))
    ordered = sorted(groups.items(), key=lambda g: (g[0] == PLACE) - (g[0] == REQUIRED))
    return [
        make_dataclass(title, made, kw_only=True, namespace={"_argument_group_name": title})
        for title, made in ordered
    ]


def _kinds(kind: type[Any]) -> dict[str, Any]:
    """Return the types of the fields of `kind`, without None in unions."""
    hints = get_type_hints(kind)
    return {entry.name: _without_none(hints[entry.name]) for entry in fields(kind)}


def _without_none(hint: Any) -> Any:
    if get_origin(hint) in (Union, types.UnionType):
        (hint,) = (part for part in get_args(hint) if part is not type(None))
    return hint
