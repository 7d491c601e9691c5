"""The locations of records in files: files are traversed from any position, and a record is read when it is needed.

a.jsonl   {…}⏎{…}⏎{…}⏎        records at bytes 0, 4 and 8: nothing is parsed, only numbers are kept
b.txt     once upon a …       pieces of at most PIECE bytes, cut at a paragraph; joined they are the file
c.csv     a,b⏎1,2⏎            records are counted and kept as read; the same for compressed files
"""

from __future__ import annotations

import os
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import BinaryIO, NamedTuple

from stagewise.data.records import Line
from stagewise.errors import CutError, RecordError
from stagewise.formats.byte_stream import (
    BLOCK,
    BOM,
    MAX_KEPT,
    MAX_RECORD,
    BrokenStream,
    RawLine,
    ends_with_cr,
    is_wide,
    read_blocks,
    split_lines,
    suffixes_of,
)
from stagewise.formats.data_files import open_file
from stagewise.formats.json_stream import wrong_encoding
from stagewise.formats.readers import file_names, parse_line, plain_newlines, read_file, start_of

PIECE = 1 << 16  # bytes of a .txt file in one document, at most
SPACE = b" \t\r\n"
OPEN_FILES = 16


class Position(NamedTuple):
    """Where traversal continues: the position of the next record, which is number `record` over all files.

    `offset` is in bytes for an uncompressed .jsonl and any .txt file, in lines for a compressed .jsonl, else in
    records; `line` counts from 1.
    """

    file: int = 0
    offset: int = 0
    line: int = 1
    record: int = 0


class RecordLocation(NamedTuple):
    """One record: where it begins, and, for a file without random access, its value."""

    start: Position
    length: int
    lines: int = 0
    held: bytes | RawLine | Line | None = None

    @property
    def after(self) -> Position:
        file, offset, line, record = self.start
        return Position(file, offset + self.length, line + self.lines, record + 1)


class Files:
    """The records of a list of files, in order, by location.

    Args:
        paths: files that `readers` can read.
        limit: the number of records to use; −1 for all.
        names: the names of the files in messages; default: file_names.
    """

    def __init__(self, paths: Sequence[Path], limit: int = -1, names: Sequence[str] | None = None):
        self.paths, self.limit = list(paths), limit
        self.names = list(names or file_names(self.paths))
        self._open: OrderedDict[tuple[int, int], BinaryIO] = OrderedDict()

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_open": OrderedDict()}  # a file handle belongs to one process

    @property
    def seekable(self) -> bool:
        """Whether every record can be read again by its location, so a location is only a few numbers."""
        return all(suffixes_of(path) in ((".jsonl", ""), (".txt", "")) for path in self.paths)

    def fingerprint(self) -> list[list]:
        """Names and sizes of the files, which the locations depend on."""
        return [[name, path.stat().st_size] for name, path in zip(self.names, self.paths, strict=True)]

    def places(self, start: Position, wanted: Callable[[int], bool] = lambda record: True) -> Iterator[RecordLocation]:
        """The records from `start` on whose number is `wanted`, to the end of the last file, without blank lines."""
        record = start.record
        for file in range(start.file, len(self.paths)):
            at = start if file == start.file else Position(file)
            for place in self._walk(at._replace(record=record)):
                record = place.start.record
                if 0 <= self.limit <= record:
                    return
                if wanted(record):
                    yield place
                record += 1

    def read(self, place: RecordLocation) -> Line:
        """The record at a location; an unreadable one is a Line with its RecordError."""
        file, offset, line, _ = place.start
        held, name = place.held, self.names[file]
        if isinstance(held, Line):
            return held
        if isinstance(held, RawLine):
            return parse_line(f"{name}:{held.number}", held)
        if suffixes_of(self.paths[file])[0] == ".txt":
            data = self._bytes(file, offset, place.length) if held is None else held
            return text_line(name if offset == 0 else f"{name}:{line}", data.removeprefix(BOM) if not offset else data)
        problem = "long" if place.length > MAX_RECORD else None
        data = self._bytes(file, offset, MAX_KEPT if problem else place.length)
        data = data.removeprefix(BOM) if offset == 0 else data
        ended = bool(problem) or data.endswith(b"\n")
        return parse_line(f"{name}:{line}", RawLine(line, data.removesuffix(b"\n"), ended, problem))

    def _walk(self, position: Position) -> Iterator[RecordLocation]:
        path = self.paths[position.file]
        kind, packed = suffixes_of(path)
        start = start_of(path) if kind in (".jsonl", ".txt") else b""
        # lines that end in CR only are counted, like the rows of a table
        if kind not in (".jsonl", ".txt") or is_wide(start) or (kind == ".jsonl" and ends_with_cr(start)):
            return records(path, self.names[position.file], position)
        if kind == ".txt":
            return pieces(path, self.names[position.file], position)
        return packed_lines(path, position) if packed else lines(path, position)

    def _bytes(self, file: int, offset: int, length: int) -> bytes:
        key = os.getpid(), file  # a forked worker that shared a handle would move it for the others
        if key not in self._open:
            self._open[key] = open_file(self.paths[file])
            if len(self._open) > OPEN_FILES:
                self._open.popitem(last=False)[1].close()
        self._open.move_to_end(key)
        self._open[key].seek(offset)
        data = self._open[key].read(length)
        if len(data) != length:
            raise RecordError(self.names[file], "changed file", f"{self.paths[file]} became shorter while it was read")
        return data


# --- one file, from a position on ------------------------------------------------------------------------------------


def lines(path: Path, position: Position) -> Iterator[RecordLocation]:
    """The non-blank lines of an uncompressed file."""
    file, offset, line, record = position
    with open_file(path) as stream:
        stream.seek(offset)
        while data := stream.readline(MAX_RECORD):
            size, blank = len(data), not (data.strip() if offset else data.removeprefix(BOM).strip())
            while not data.endswith(b"\n") and (data := stream.readline(BLOCK)):  # the rest of a very long line
                size += len(data)
            if not blank:
                yield RecordLocation(Position(file, offset, line, record), size, 1)
                record += 1
            offset, line = offset + size, line + 1


def packed_lines(path: Path, position: Position) -> Iterator[RecordLocation]:
    """The same for a compressed file, which is unpacked, but not parsed, up to the position."""
    file, offset, _, record = position
    for number, raw in enumerate(split_lines(read_blocks(path))):
        if number >= offset and (raw.data.strip() or raw.problem):
            yield RecordLocation(Position(file, number, raw.number, record), 1, 1, raw)
            record += 1


def records(path: Path, name: str, position: Position) -> Iterator[RecordLocation]:
    """The records of a list, a table, or any other format of `readers`."""
    file, offset, line, record = position
    for number, read in enumerate(read_file(path, name)):
        if number >= offset:
            yield RecordLocation(Position(file, number, line, record + number - offset), 1, 0, read)


def pieces(path: Path, name: str, position: Position) -> Iterator[RecordLocation]:
    """A text in pieces of at most 2 · PIECE."""
    file, offset, line, record = position
    packed = suffixes_of(path)[1]
    blocks, rest, done = blocks_from(path, offset), b"", False
    while True:
        try:
            while len(rest) < 2 * PIECE and not done:
                block = next(blocks, b"")
                rest, done = rest + block, not block
        except BrokenStream as error:
            where = f"{name}:{line}"
            broken = Line(where, "", CutError(where, str(error), len(rest)))
            yield RecordLocation(Position(file, offset, line, record), len(rest), 0, broken)
            return
        if not rest:
            return
        while len(rest) >= 2 * PIECE or (done and rest):
            size = piece_size(rest[: 2 * PIECE])
            piece, rest = rest[:size], rest[size:]
            breaks = piece.count(b"\n") or piece.count(b"\r")
            yield RecordLocation(Position(file, offset, line, record), size, breaks, piece if packed else None)
            offset, line, record = offset + size, line + breaks, record + 1


def blocks_from(path: Path, offset: int) -> Iterator[bytes]:
    """The uncompressed bytes from `offset` on."""
    if suffixes_of(path)[1]:
        for block in read_blocks(path):
            if len(block) > offset:
                yield block[offset:]
            offset = max(0, offset - len(block))
        return
    with open_file(path) as stream:
        stream.seek(offset)
        while block := stream.read(BLOCK):
            yield block


def piece_size(data: bytes) -> int:
    """The size of a text's next piece: all up to PIECE bytes, otherwise up to the end of a paragraph or line.

    The cut is in the second half of PIECE: after the last paragraph there, or else line, word or character. White
    space after it belongs to the piece, so no piece is blank.
    """
    if len(data) <= PIECE:
        return len(data)
    for end in (b"\n\n", b"\n\r\n", b"\n", b"\r", b" "):
        found = data.rfind(end, PIECE // 2, PIECE)
        if found > 0:
            size = found + len(end)
            break
    else:
        size = PIECE
        while size > PIECE - 4 and data[size] & 0b1100_0000 == 0b1000_0000:  # within a multi-byte character
            size -= 1
    while size < len(data) and data[size] in SPACE:
        size += 1
    return size


def text_line(where: str, data: bytes) -> Line:
    """A piece of a text as a record {"text": …}."""
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        place = "line {} of this piece,".format(1 + data.count(b"\n", 0, error.start))
        return Line(where, data.decode("utf-8", "backslashreplace"), wrong_encoding(where, data[error.start], place))
    return Line(where, text, {"text": plain_newlines(text)})
