"""JSON that this project writes for itself and reads back: manifests, and files with one value on each line.

Text stays readable (no ASCII escapes), and any string can be written: a lone surrogate, which a file name that is not
UTF-8 becomes in Python, is written as its JSON escape. Lines end at newlines alone: strings may hold U+2028, U+0085
and others at which `str.splitlines` splits, too.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any


def json_bytes(value: Any, indent: int | None = None) -> bytes:
    """A value as UTF-8 JSON that ends with a newline; what JSON has no form for is written as its string."""
    text = json.dumps(value, ensure_ascii=False, indent=indent, default=str)
    # Surrogates stand only inside of JSON strings, where Python's escape \udc80 is JSON's as well.
    return (text + "\n").encode("utf-8", "backslashreplace")


def write_json_lines(path: Path, values: Iterable[Any]) -> None:
    """Writes a file with one value on each line, in a folder that is made if it is missing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as file:
        file.writelines(map(json_bytes, values))


def read_json_lines(path: Path) -> list[Any]:
    """The values of a file of `write_json_lines`; none where there is no file."""
    if not path.is_file():
        return []
    return [json.loads(line) for line in path.read_bytes().split(b"\n") if line]
