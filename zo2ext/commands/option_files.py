"""Options from a file: what a ``--config`` says, as words that the command line could have said."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

import yaml

Value = str | list[str] | None  # one word, several, or nothing (null)


class _Mapping(list[tuple[Any, Any]]):
    """Keys and values as they are written, a key that is there twice included."""


class OptionFile(NamedTuple):
    """A file of options.

    Attributes:
        path: Where it is, as the user named it.
        values: By option name, with underscores.
    """

    path: str
    values: dict[str, Value]

    def refusal(self, problem: str) -> ValueError:
        return ValueError(f"config file {self.path!r}: {problem}")


def read_options(path: str) -> OptionFile:
    """Read a YAML or JSON mapping of option names to values.

    A value is taken as it is written: ``1e-4``, ``no`` and ``12:30`` mean what they would mean on
    the command line, and nothing that YAML makes of them.

    Args:
        path: A file whose name ends in .yaml, .yml or .json, in UTF-8.

    Raises:
        ValueError: There is no such file, it cannot be read, or it is no mapping of names to
            values, each there once. The message names the file and what is wrong with it.
    """
    read = OptionFile(path, {})
    parse = {".yaml": _yaml, ".yml": _yaml, ".json": _json}.get(Path(path).suffix.lower())
    if parse is None:
        raise read.refusal("expected a name ending in .yaml, .yml or .json")
    try:
        content = parse(Path(path).read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise read.refusal(f"it cannot be read: {error.strerror}") from error
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise read.refusal(f"it cannot be understood: {' '.join(str(error).split())}") from error
    if not isinstance(content, _Mapping):
        raise read.refusal(f"expected a mapping of options to values, got {_what(content)}")
    written: dict[str, str] = {}
    for key, value in content:
        if not isinstance(key, str):
            raise read.refusal(f"expected the name of an option as a key, got {_what(key)}")
        name = key.replace("-", "_")
        if name in written:
            raise read.refusal(f"{name} has two values, as {written[name]!r} and as {key!r}")
        words = value if isinstance(value, list) and not isinstance(value, _Mapping) else [value]
        if any(not isinstance(word, str) for word in words) and value is not None:
            raise read.refusal(f"{key}: expected a value or a list of values, got {_what(value)}")
        written[name], read.values[name] = key, value
    return read


def _what(content: Any) -> str:
    match content:
        case None:
            return "nothing"
        case _Mapping():
            return "a mapping"
        case list():
            return "a list that holds more than values"
    return f"{content!r}"


def _yaml(text: str) -> Any:
    return _written(yaml.compose(text, yaml.SafeLoader))


def _written(node: yaml.Node | None) -> Any:
    """What `node` says, scalars as the words that stand there."""
    match node:
        case yaml.MappingNode():
            return _Mapping((_written(key), _written(value)) for key, value in node.value)
        case yaml.SequenceNode():
            return [_written(entry) for entry in node.value]
        case yaml.ScalarNode() if node.tag != "tag:yaml.org,2002:null":
            return node.value
    return None


def _json(text: str) -> Any:
    return _worded(
        json.loads(
            text, parse_int=str, parse_float=str, parse_constant=str, object_pairs_hook=_Mapping
        )
    )


def _worded(value: Any) -> Any:
    """`value`, from JSON, its truths as words."""
    match value:
        case bool():
            return str(value).lower()
        case _Mapping():
            return _Mapping((key, _worded(entry)) for key, entry in value)
        case list():
            return [_worded(entry) for entry in value]
    return value
