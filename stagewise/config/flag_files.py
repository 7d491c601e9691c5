"""A .yaml or .json file of flags, equivalent to the same words on the command line."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from stagewise.config.flags import Flag
from stagewise.errors import ArgumentError

# A number that YAML 1.1 reads as text because it has no decimal point: 1e-4.
EXPONENT = re.compile(r"[-+]?\d+[eE][-+]?\d+")
NULL, BOOL, INT, FLOAT = (f"tag:yaml.org,2002:{name}" for name in ("null", "bool", "int", "float"))


def read_flags(path: Path, known: Mapping[str, Flag]) -> list[tuple[str, list[str]]]:
    """The flags of a file, each with the words that would follow it on the command line.

    A value keeps its spelling in the file. `null` leaves the flag at its default; an empty value is the flag alone. A
    list becomes several words if the flag takes several, else one word joined by commas. A mapping is a dictionary if
    the flag takes one.

    Raises:
        ArgumentError: with the file and line of what cannot be read.
    """
    if not path.is_file():
        raise ArgumentError(f"{path}: no such file of flags")
    try:
        text = path.read_text(encoding="utf-8-sig")
        if path.suffix == ".json":
            return _of_json(text, known, str(path))
        top = yaml.compose(text, Loader=yaml.SafeLoader)
    except ArgumentError:
        raise
    except (OSError, ValueError, yaml.YAMLError, RecursionError) as error:
        raise ArgumentError(f"{path}: not valid {path.suffix[1:]}: {' '.join(str(error).split())}") from error
    if not isinstance(top, yaml.MappingNode):
        found = "nothing" if top is None else "a list" if isinstance(top, yaml.SequenceNode) else repr(top.value)
        raise ArgumentError(f"{path}: expected flags and their values, found {found}")
    flags: list[tuple[str, list[str]]] = []
    lines: dict[str, int] = {}
    for key, node in top.value:
        line = key.start_mark.line + 1
        name = _name(str(key.value))
        if name in lines:
            raise ArgumentError(f"{path}:{line}: {name} is given twice, first in line {lines[name]}; leave one")
        lines[name] = line
        words = _words(node, known.get(name), f"{path}:{line}: {name}")
        if words is not None:
            flags.append((name, words))
    return flags


def _name(key: str) -> str:
    """A flag's name; dashes become underscores, as on the command line."""
    return key.lstrip("-").replace("-", "_")


def _words(node: yaml.Node, flag: Flag | None, place: str) -> list[str] | None:
    """The words after a flag; None if it keeps its default."""
    if isinstance(node, yaml.MappingNode):
        return _mapping(_plain(node, place), flag, place)
    if isinstance(node, yaml.SequenceNode):
        if any(not isinstance(item, yaml.ScalarNode) or item.tag == NULL for item in node.value):
            raise ArgumentError(f"{place}: expected a list of single values")
        return _list([item.value for item in node.value], flag)
    if node.tag == NULL:
        return [] if node.value == "" else None
    return [node.value]


def _mapping(value: dict[str, Any], flag: Flag | None, place: str) -> list[str]:
    if flag is not None and flag.kind is not dict:
        raise ArgumentError(f"{place}: expected one value, found names with values")
    return [json.dumps(value, ensure_ascii=False)]


def _list(words: list[str], flag: Flag | None) -> list[str] | None:
    """A word for each item if the flag takes several, else one word joined by commas; an empty list gives none."""
    return (words if flag is not None and flag.several else [",".join(words)]) if words else None


def _of_json(text: str, known: Mapping[str, Flag], path: str) -> list[tuple[str, list[str]]]:
    """The flags of a JSON file; see `read_flags`."""
    # Numbers keep their spelling: a text flag gets 1.10 as on the command line, not 1.1.
    top = json.loads(text, object_pairs_hook=lambda pairs: _once(pairs, path), parse_float=Spelled, parse_int=Spelled)
    if not isinstance(top, dict):
        raise ArgumentError(f"{path}: expected flags and their values, found {type(top).__name__}")
    flags = []
    for name, value in _once([(_name(key), value) for key, value in top.items()], path).items():
        flag, place = known.get(name), f"{path}: {name}"
        if isinstance(value, dict):
            words = _mapping(_numbers(value), flag, place)
        elif isinstance(value, list):
            if any(item is None or isinstance(item, dict | list) for item in value):
                raise ArgumentError(f"{place}: expected a list of single values")
            words = _list(list(map(str, value)), flag)
        else:
            words = None if value is None else [str(value)]
        if words is not None:
            flags.append((name, words))
    return flags


class Spelled(str):
    """A number of a JSON file with its spelling."""


def _numbers(value: Any) -> Any:
    """Converts Spelled numbers to plain ones, for a flag that takes a dictionary."""
    if isinstance(value, dict):
        return {name: _numbers(each) for name, each in value.items()}
    if isinstance(value, list):
        return [_numbers(each) for each in value]
    return json.loads(value) if isinstance(value, Spelled) else value


def _once(pairs: list[tuple[str, Any]], place: str) -> dict[str, Any]:
    """Pairs to a dictionary. Raises ArgumentError for a duplicate name."""
    names = [name for name, _ in pairs]
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise ArgumentError(f"{place}: {twice} is given twice; leave one")
    return dict(pairs)


def _plain(node: yaml.Node, place: str) -> Any:
    """A YAML node's value as JSON would have it."""
    if isinstance(node, yaml.MappingNode):
        return _once([(str(key.value), _plain(value, place)) for key, value in node.value], place)
    if isinstance(node, yaml.SequenceNode):
        return [_plain(item, place) for item in node.value]
    if node.tag in (NULL, BOOL, INT, FLOAT):
        return yaml.SafeLoader("").construct_object(node)
    return float(node.value) if node.style is None and EXPONENT.fullmatch(node.value) else node.value
