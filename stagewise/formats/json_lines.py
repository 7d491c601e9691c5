"""JSON that this project writes and reads back: manifests, and files with one value per line.

Text stays readable (no ASCII escapes), and any string can be written: a lone surrogate, as in the name of a file that
is not UTF-8, is written as its JSON escape. Lines end at newlines only: strings may contain U+2028, U+0085 and other
characters at which `str.splitlines` splits.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any


def json_bytes(value: Any, indent: int | None = None) -> bytes:
    """A value as UTF-8 JSON with a final newline; types that JSON lacks are written as strings."""
    text = json.dumps(value, ensure_ascii=False, indent=indent, default=str)
    # Surrogates occur only inside JSON strings, where Python's escape \udc80 is also JSON's.
    return (text + "\n").encode("utf-8", "backslashreplace")


def write_json_lines(path: Path, values: Iterable[Any]) -> None:
    """Writes a file with one value per line, and its folder if it is missing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as file:
        file.writelines(map(json_bytes, values))


def read_json_lines(path: Path) -> list[Any]:
    """The values of a file written by `write_json_lines`; empty if there is no file."""
    if not path.is_file():
        return []
    return [json.loads(line) for line in path.read_bytes().split(b"\n") if line]
