"""Dataclass fields as command-line flags: the words each one accepts, and the value they become."""

from __future__ import annotations

import dataclasses
import enum
import json
import types
import typing
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from stagewise.config.paths import PATHS, expanded
from stagewise.errors import ArgumentError

YES = frozenset(("yes", "true", "t", "y", "1", "on"))
NO = frozenset(("no", "false", "f", "n", "0", "off"))


@dataclass(frozen=True)
class Flag:
    """One flag.

    Attributes:
        kind: bool, int, float, str, dict (given as JSON), or an Enum.
        choices: the accepted words, if limited.
        several: takes one or more words, which become a list; any other flag takes exactly one, a bool also none.
        or_text: a word that is not of this kind stays text ("str | bool", "dict | str").
        required: has no default.
        help: the field's help text.
        owner: the dataclass that the field belongs to.
    """

    name: str
    kind: type
    choices: tuple[str, ...] = ()
    several: bool = False
    or_text: bool = False
    required: bool = False
    default: Any = None
    help: str = ""
    owner: type | None = None

    def value(self, words: Sequence[str]) -> Any:
        """Converts the words after the flag to its value. Raises ArgumentError."""
        if self.kind is bool and not words:
            return True
        if not words:
            raise ArgumentError(f"--{self.name}: a value is missing")
        if self.several:
            return [self._read(word) for word in words]
        if len(words) > 1:
            raise ArgumentError(f"--{self.name}: expected one value, found {len(words)}: {' '.join(words)}")
        return self._read(words[0])

    def _read(self, word: str) -> Any:
        if self.choices:
            if word not in self.choices:
                raise ArgumentError(f"--{self.name}: expected one of {', '.join(self.choices)}, found {word!r}")
            return self.kind(word) if self.several and issubclass(self.kind, enum.Enum) else word
        if self.name in PATHS:
            word = expanded(word, f"--{self.name}", several=PATHS[self.name])
        if self.or_text and self.kind is dict and not word.startswith("{"):
            return word  # the name of a file with the dictionary
        try:
            found = READERS.get(self.kind, str)(word)
            return word if self.or_text and self.kind is dict else found  # transformers parses it again in its own way
        except ValueError as error:
            if self.or_text and self.kind is not dict:
                return word
            raise ArgumentError(f"--{self.name}: expected {EXPECTED[self.kind]}, found {word!r}") from error


def yes_or_no(word: str) -> bool:
    if word.lower() in YES | NO:
        return word.lower() in YES
    raise ValueError(word)


def _dictionary(word: str) -> dict[str, Any]:
    found = json.loads(word)
    if not isinstance(found, dict):
        raise ValueError(word)
    return found


READERS: dict[type, Callable[[str], Any]] = {bool: yes_or_no, int: int, float: float, dict: _dictionary}
EXPECTED = {
    bool: "True or False",
    int: "a whole number",
    float: "a number",
    dict: """a dictionary such as '{"name": 1}'""",
}


def flags_of(kinds: Sequence[type]) -> dict[str, Flag]:
    """Every flag of these dataclasses by name, in order."""
    found: dict[str, Flag] = {}
    for owner in kinds:
        hints = typing.get_type_hints(owner)
        for field in dataclasses.fields(owner):
            shape = _shape(hints[field.name]) if field.init else None
            if shape is None:
                continue
            default = field.default_factory() if field.default_factory is not dataclasses.MISSING else field.default
            required = default is dataclasses.MISSING
            kind, several, or_text = shape
            choices = [m.value for m in kind] if issubclass(kind, enum.Enum) else field.metadata.get("choices") or ()
            found[field.name] = Flag(
                field.name,
                kind,
                tuple(map(str, choices)),
                several,
                or_text,
                required=required,
                default=None if required else default,
                help=field.metadata.get("help", ""),
                owner=owner,
            )
    return found


def _shape(hint: Any) -> tuple[type, bool, bool] | None:
    """(kind, several, or_text) of a field's type; None for a class that no word can name.

    `X | str` reads X where the words are one, else text; `str | list[str]` is read as text, which its user splits;
    `None` in a type only describes the value without the flag.
    """
    union = isinstance(hint, types.UnionType) or typing.get_origin(hint) is typing.Union
    parts = [part for part in (typing.get_args(hint) if union else (hint,)) if part is not type(None)]
    parts = [part for part in parts if typing.get_origin(part) is not Literal]
    text = str in parts
    for part in parts:
        origin = typing.get_origin(part) or part
        if origin is list:
            inner = typing.get_args(part)[0]
            if not text or (isinstance(inner, type) and issubclass(inner, enum.Enum)):
                return inner, True, False
        elif isinstance(origin, type) and (origin in (bool, int, float, dict) or issubclass(origin, enum.Enum)):
            return origin, False, text
    return (str, False, False) if text else None
