"""The bytes of plain, gzip and zstd files, block by block and line by line: files of any size in constant memory."""

import gzip
import zlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

from stagewise.errors import FileError
from stagewise.formats.data_files import open_file

BLOCK = 1 << 20
MAX_RECORD = 64 << 20  # bytes; a record is held in memory several times over while it is read
MAX_KEPT = 100_000  # bytes of a line beyond MAX_RECORD, or of what can't be read, that rejected.jsonl shows
COMPRESSED = (".gz", ".zst")
BOM = b"\xef\xbb\xbf"
WIDE_BOMS = (b"\xff\xfe", b"\xfe\xff")  # of UTF-16 and UTF-32


class BrokenStream(Exception):
    """Packed data that ends or breaks in the middle; nothing behind that place can be read."""


class RawLine(NamedTuple):
    """A line without its end mark: its number from 1, its bytes, whether an end mark stood there.

    `problem` says why the line isn't whole: "long" (only its beginning is given), or what broke in a packed file.
    """

    number: int
    data: bytes
    ended: bool
    problem: str | None = None


def suffixes_of(path: Path) -> tuple[str, str]:
    """The suffixes of a file's form and of its packing: (".jsonl", ".gz") of "a.jsonl.gz", (".csv", "") of "a.csv"."""
    packed = path.suffix.lower()
    if packed in COMPRESSED:
        return Path(path.stem).suffix.lower(), packed
    return packed, ""


def read_blocks(path: Path, progress: Callable[[int], None] | None = None) -> Iterator[bytes]:
    """The unpacked bytes of a file. `progress` is told how many bytes of the file itself have been read since.

    Raises BrokenStream where a packed file is cut short or damaged, after all that stands before, and FileError for
    what can't be read.
    """
    packed = suffixes_of(path)[1]
    with open_file(path) as raw:
        read: Callable[[int], bytes] = raw.read
        errors: tuple[type[Exception], ...] = (OSError,)
        if packed == ".gz":
            # read1 gives what is unpacked so far; read would lose it when the end turns out to be missing.
            read, errors = gzip.GzipFile(fileobj=raw).read1, (EOFError, OSError, zlib.error)
        elif packed == ".zst":
            import pyarrow  # a tenth of a second to import, needed only here

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
    """The lines of `blocks`, ended by a newline, or by CR where that is all there is; without a byte-order mark.

    Of a line longer than MAX_RECORD only the beginning is held and given.
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
    """What a broken zstd file gives behind its first `done` bytes: a read that fails loses what it had unpacked."""
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
    """Whether the lines of a file that begins like this end in CR alone, as on Macs before 2001."""
    return b"\n" not in start and b"\r" in start.rstrip(b"\r")  # one at the end may be half of a CRLF


def with_newlines(blocks: Iterable[bytes]) -> Iterator[bytes]:
    """`blocks`, in which CR becomes a newline where the lines end in CR alone."""
    translated = None
    for block in blocks:
        if translated is None:
            translated = ends_with_cr(block)
        yield block.replace(b"\r", b"\n") if translated else block


def is_wide(start: bytes) -> bool:
    """Whether a file that begins like this is UTF-16 or UTF-32, or no text at all."""
    return start.startswith(WIDE_BOMS) or start[:64].count(0) * 4 >= max(len(start[:64]), 1)


def without_mark(blocks: Iterable[bytes]) -> Iterator[bytes]:
    """`blocks` without a UTF-8 byte-order mark at their beginning."""
    start = True
    for block in blocks:
        yield block.removeprefix(BOM) if start else block
        start = False
