"""Strict JSON for records: refuses what Python's json accepts although it is invalid or loses data.

NaN, Infinity             no JSON values
{"a": 1, "a": 2}          Python keeps the last one and loses the first
[[[[ … ]]]]               deeper than MAX_DEPTH: whatever walks through it later would end with a RecursionError
integers of 4,300 digits  which Python does not convert
"""

import json
import re
from typing import Any

from stagewise.errors import RefusedJSON

MAX_DEPTH = 100
BRACKETS = re.compile(r'"(?:[^"\\]|\\.)*"|[\[{]|[\]}]', re.DOTALL)
TOO_DEEP = ("nested too deep", f"lists or objects stand in each other more than {MAX_DEPTH} deep")


def parse_json(text: str) -> Any:
    """The single value of a text. Raises RefusedJSON, or another ValueError if the text is not JSON."""
    try:
        value = _DECODER.decode(text)
    except RecursionError:
        raise RefusedJSON(*TOO_DEEP) from None
    if is_deep(text, value):
        raise RefusedJSON(*TOO_DEEP)
    return value


def is_deep(text: str, value: Any) -> bool:
    """Whether lists and objects of a value, read from `text`, are nested deeper than MAX_DEPTH."""
    if text.count("[") + text.count("{") <= MAX_DEPTH:
        return False
    level = [value] if isinstance(value, (dict, list)) else []
    for _ in range(MAX_DEPTH):
        parts = (part.values() if isinstance(part, dict) else part for part in level)
        level = [inner for part in parts for inner in part if isinstance(inner, (dict, list))]
        if not level:
            return False
    return True


def end_of(text: str, start: int) -> int | None:
    """The end of the list or object that begins at `start`; None if it is not in the text."""
    depth = 0
    for found in BRACKETS.finditer(text, start):
        if found[0] in "[{":
            depth += 1
        elif found[0] in "]}":
            depth -= 1
            if not depth:
                return found.end()
    return None


class Noting:
    """A decoder that collects refused values in `problems` and continues, so that the value's end is known."""

    def __init__(self) -> None:
        self.problems: list[RefusedJSON] = []
        self._decoder = json.JSONDecoder(
            parse_constant=self._constant, parse_int=self._integer, object_pairs_hook=self._object
        )

    def raw_decode(self, text: str, start: int) -> tuple[Any, int]:
        """(value, its end), like json's. Raises JSONDecodeError, RecursionError."""
        self.problems.clear()
        return self._decoder.raw_decode(text, start)

    def _constant(self, name: str) -> None:
        self.problems.append(_constant_error(name))

    def _integer(self, digits: str) -> int:
        try:
            return int(digits)
        except ValueError as error:
            self.problems.append(RefusedJSON("broken JSON", f"not JSON: {error}"))
            return 0

    def _object(self, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        made = dict(pairs)
        if len(made) != len(pairs):
            self.problems.append(_twice_error(pairs))
        return made


def _constant_error(name: str) -> RefusedJSON:
    return RefusedJSON("broken JSON", f"not JSON: {name} is not a JSON value; write null or leave the key out")


def _twice_error(pairs: list[tuple[str, Any]]) -> RefusedJSON:
    keys = [key for key, _ in pairs]
    twice = next(key for number, key in enumerate(keys) if key in keys[:number])
    return RefusedJSON("key given twice", f"the key {twice!r} stands twice in one object; leave one out")


def _refuse_constant(name: str) -> None:
    raise _constant_error(name)


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) != len(pairs):
        raise _twice_error(pairs)
    return made


_DECODER = json.JSONDecoder(parse_constant=_refuse_constant, object_pairs_hook=_object)
