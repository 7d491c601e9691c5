"""Files → one Line per record: .jsonl, .json, .csv, .tsv, .parquet and .txt, each also compressed as .gz or .zst.

Files are read in pieces, so a file of any size takes little memory. A record that can't be read is a Line with its
RecordError, so the caller may count it and continue.
"""

import json
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from stagewise.errors import CutError, RecordError, RefusedJSON
from stagewise.formats.byte_stream import (
    BrokenStream,
    RawLine,
    is_wide,
    read_blocks,
    split_lines,
    suffixes_of,
)
from stagewise.formats.json_stream import Line, not_an_object, read_values, too_long, was_cut, wrong_encoding
from stagewise.formats.strict_json import parse_json
from stagewise.formats.tables import read_csv, read_parquet, read_tsv

MAX_DOCUMENT = 16 << 20  # bytes; a larger .txt file is read in parts that end with a line
Progress = Callable[[int], None] | None


def file_names(files: Sequence[Path]) -> list[str]:
    """The name of each file in messages: its path below the folder that all files share."""
    paths = [Path(os.path.abspath(path)) for path in files]  # a link keeps its own name
    top = os.path.commonpath([path.parent for path in paths]) if files else ""
    return [str(path.relative_to(top)) for path in paths]


def read_file(path: Path, name: str, progress: Progress = None, kind: str | None = None) -> Iterator[Line]:
    """The records of one file, in the format of its name or of `kind` (".jsonl" …)."""
    kind = kind or suffixes_of(path)[0]
    if kind != ".parquet" and is_wide(start_of(path)):
        why = "the file is UTF-16, or no text (it holds NUL bytes); save it as UTF-8"
        yield Line(f"{name}:1", "", RecordError(f"{name}:1", "wrong encoding", why))
        return
    yield from READERS[kind](path, name, progress)


def read_lines(path: Path, name: str, progress: Progress = None) -> Iterator[Line]:
    """One JSON object per line; blank lines are skipped."""
    for line in split_lines(read_blocks(path, progress)):
        if line.data.strip() or line.problem:
            yield parse_line(f"{name}:{line.number}", line)


def parse_line(where: str, line: RawLine) -> Line:
    """The JSON object of one line."""
    data = line.data
    if line.problem:
        error: RecordError = too_long(where) if line.problem == "long" else CutError(where, line.problem, len(data))
        return Line(where, data.decode("utf-8", "backslashreplace"), error)
    try:
        # Concatenated files with byte-order marks have one in the middle.
        raw = data.decode("utf-8").strip("\r\n").removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        cut = not line.ended and error.reason == "unexpected end of data"
        place = f"position {error.start + 1}"
        refusal = _cut_line(where, data, "") if cut else wrong_encoding(where, data[error.start], place)
        return Line(where, data.decode("utf-8", "backslashreplace"), refusal)
    try:
        value = parse_json(raw)
    except RefusedJSON as error:
        return Line(where, raw, RecordError(where, error.reason, str(error)))
    except ValueError as error:  # JSONDecodeError is one
        cut = not line.ended and isinstance(error, json.JSONDecodeError) and was_cut(error)
        broken = RecordError(where, "broken JSON", f"not JSON: {error}{_lone_cr(raw)}")
        return Line(where, raw, _cut_line(where, data, f": {error}") if cut else broken)
    return Line(where, raw, value if isinstance(value, dict) else not_an_object(where, value))


def read_json(path: Path, name: str, progress: Progress = None) -> Iterator[Line]:
    """A .json file: a list of records, one record, or one a line."""
    start = start_of(path).lstrip()
    try:
        # A broken multi-line record is one error, not one per line: lines count only if the first is a record.
        in_lines = start[:1] == b"{" and isinstance(parse_json(start.partition(b"\n")[0].decode("utf-8")), dict)
    except RefusedJSON:  # complete, even if malformed
        in_lines = True
    except ValueError:
        in_lines = False
    yield from (read_lines if in_lines else read_values)(path, name, progress)


def read_document(path: Path, name: str, progress: Progress = None) -> Iterator[Line]:
    """A .txt file is one document {"text": …}; one above MAX_DOCUMENT is given in parts: "name:1", "name:5201" …"""
    part, size, first = [], 0, 1
    for line in split_lines(read_blocks(path, progress)):
        where = f"{name}:{line.number}"
        if line.problem:
            error = too_long(where) if line.problem == "long" else CutError(where, line.problem, len(line.data))
            if part:
                yield _document(f"{name}:{first}", part, first)
            part, size, first = [], 0, line.number + 1
            yield Line(where, line.data.decode("utf-8", "backslashreplace"), error)
            continue
        if size + len(line.data) + line.ended > MAX_DOCUMENT and part:
            yield _document(f"{name}:{first}", part, first)
            part, size, first = [], 0, line.number
        part.append(line.data + b"\n" if line.ended else line.data)
        size += len(part[-1])
    if part or first == 1:
        yield _document(name if first == 1 else f"{name}:{first}", part, first)


# --- pieces ----------------------------------------------------------------------------------------------------------


def plain_newlines(text: str) -> str:
    """Converts CRLF and CR to newlines."""
    return text.replace("\r\n", "\n").replace("\r", "\n") if "\r" in text else text


def start_of(path: Path) -> bytes:
    """The first uncompressed bytes of a file without a UTF-8 byte-order mark; empty if it can't be unpacked."""
    try:
        return next(read_blocks(path), b"").removeprefix(b"\xef\xbb\xbf")
    except BrokenStream:  # reported when the file is read
        return b""


def _cut_line(where: str, data: bytes, why: str) -> CutError:
    return CutError(where, f"the file ends in the middle of this record{why}", len(data))


def _lone_cr(raw: str) -> str:
    """A hint for the error of a line with a carriage return, which some programs take for a line end."""
    found = "; a CR stands inside this line: the file mixes line ends, save it with LF or CRLF alone"
    return found if "\r" in raw else ""


def _document(where: str, part: list[bytes], first: int) -> Line:
    data = b"".join(part)
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        line = first + data.count(b"\n", 0, error.start)
        column = error.start - data.rfind(b"\n", 0, error.start)
        place = f"line {line}, position {column},"
        return Line(where, data.decode("utf-8", "backslashreplace"),
                    wrong_encoding(where, data[error.start], place))  # fmt: skip
    return Line(where, text, {"text": plain_newlines(text)})


READERS: dict[str, Callable[[Path, str, Progress], Iterator[Line]]] = {
    ".jsonl": read_lines,
    ".json": read_json,
    ".csv": read_csv,
    ".tsv": read_tsv,
    ".parquet": read_parquet,
    ".txt": read_document,
}
RECORD_FILES = (".jsonl", ".json", ".csv", ".tsv", ".parquet")
TEXT_FILES = (".txt", *RECORD_FILES)
