"""The bytes of plain, gzip and zstd files, as blocks and as lines, in constant memory."""

import gzip
import zlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

from stagewise.errors import FileError
from stagewise.formats.data_files import open_file

BLOCK = 1 << 20
MAX_RECORD = 64 << 20  # bytes; reading a record holds several copies of it in memory
MAX_KEPT = 100_000  # bytes of a line beyond MAX_RECORD, or of unreadable data, that rejected.jsonl shows
COMPRESSED = (".gz", ".zst")
BOM = b"\xef\xbb\xbf"
WIDE_BOMS = (b"\xff\xfe", b"\xfe\xff")  # byte-order marks of UTF-16 and UTF-32


class BrokenStream(Exception):
    """Compressed data that is truncated or damaged; nothing after that point can be read."""


class RawLine(NamedTuple):
    """A line without its line end: its number from 1, its bytes, and whether it had a line end.

    `problem` is why the line is incomplete: "long" (only its beginning is given), or the damage of a compressed file.
    """

    number: int
    data: bytes
    ended: bool
    problem: str | None = None


def suffixes_of(path: Path) -> tuple[str, str]:
    """The suffixes of a file's format and compression: (".jsonl", ".gz") of "a.jsonl.gz", (".csv", "") of "a.csv"."""
    packed = path.suffix.lower()
    if packed in COMPRESSED:
        return Path(path.stem).suffix.lower(), packed
    return packed, ""


def read_blocks(path: Path, progress: Callable[[int], None] | None = None) -> Iterator[bytes]:
    """The uncompressed bytes of a file. `progress` is called with the bytes of the file itself read since the last
    call.

    Raises BrokenStream if a compressed file is truncated or damaged, after everything before that point was given, and
    FileError if the file can't be read.
    """
    packed = suffixes_of(path)[1]
    with open_file(path) as raw:
        read: Callable[[int], bytes] = raw.read
        errors: tuple[type[Exception], ...] = (OSError,)
        if packed == ".gz":
            # read1 returns what is unpacked so far; read would lose it if the end turns out to be missing
            read, errors = gzip.GzipFile(fileobj=raw).read1, (EOFError, OSError, zlib.error)
        elif packed == ".zst":
            import pyarrow  # takes a tenth of a second to import and is needed only here

            read, errors = pyarrow.CompressedInputStream(raw, "zstd").read, (OSError, pyarrow.ArrowException)
        before = done = 0
        while True:
            try:
                block = read(BLOCK)
            except errors as error:
                if not packed:
                    raise FileError(f"{path}: can't be read: {error.strerror}") from error
                if packed == ".zst":
                    yield from _before_the_break(path, done)
                raise BrokenStream(f"the {packed} file is cut short or damaged ({error})") from error
            if progress:
                progress(raw.tell() - before)
                before = raw.tell()
            if not block:
                return
            done += len(block)
            yield block


def split_lines(blocks: Iterable[bytes]) -> Iterator[RawLine]:
    """The lines of `blocks`, ended by a newline, or by CR if there are no newlines; without a byte-order mark.

    Only the beginning of a line longer than MAX_RECORD is held and given.
    """
    number, pending, size, problem = 0, [], 0, None
    try:
        for block in with_newlines(without_mark(blocks)):
            first, *others = block.split(b"\n")
            if size <= MAX_RECORD:
                pending.append(first)
            size += len(first)
            if not others:
                if size > MAX_RECORD:
                    pending = [b"".join(pending)[:MAX_KEPT]]
                continue
            number += 1
            yield _line(number, pending, size, True)
            for line in others[:-1]:
                number += 1
                yield _line(number, [line], len(line), True)
            pending, size = [others[-1]], len(others[-1])
    except BrokenStream as error:
        problem = str(error)
    if size or problem:
        yield _line(number + 1, pending, size, False, problem)


def _before_the_break(path: Path, done: int) -> Iterator[bytes]:
    """The output of a damaged zstd file after its first `done` bytes: a read that fails loses what it had unpacked."""
    import pyarrow

    with pyarrow.CompressedInputStream(str(path), "zstd") as file:
        while done:
            done -= len(file.read(min(done, BLOCK)))
        rest = bytearray()
        try:
            while byte := file.read(1):
                rest += byte
        except (OSError, pyarrow.ArrowException):
            if rest:
                yield bytes(rest)


def _line(number: int, parts: list[bytes], size: int, ended: bool, problem: str | None = None) -> RawLine:
    data = parts[0] if len(parts) == 1 else b"".join(parts)
    if size > MAX_RECORD:
        return RawLine(number, data[:MAX_KEPT], ended, "long")
    return RawLine(number, data, ended, problem)


def ends_with_cr(start: bytes) -> bool:
    """Whether the lines of a file with this beginning end in CR only, as on Macs before 2001."""
    return b"\n" not in start and b"\r" in start.rstrip(b"\r")  # a CR at the end may be half of a CRLF


def with_newlines(blocks: Iterable[bytes]) -> Iterator[bytes]:
    """`blocks` with CR replaced by a newline if the lines end in CR only."""
    translated = None
    for block in blocks:
        if translated is None:
            translated = ends_with_cr(block)
        yield block.replace(b"\r", b"\n") if translated else block


def is_wide(start: bytes) -> bool:
    """Whether a file with this beginning is UTF-16 or UTF-32, or not text at all."""
    return start.startswith(WIDE_BOMS) or start[:64].count(0) * 4 >= max(len(start[:64]), 1)


def without_mark(blocks: Iterable[bytes]) -> Iterator[bytes]:
    """`blocks` without a UTF-8 byte-order mark at their beginning."""
    start = True
    for block in blocks:
        yield block.removeprefix(BOM) if start else block
        start = False
