"""The records of a .json file of any size, one by one: a list, a single one, or several after each other."""

import codecs
import json
import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from stagewise.errors import CutError, RecordError, RefusedJSON
from stagewise.formats.byte_stream import MAX_KEPT, MAX_RECORD, BrokenStream, read_blocks, without_mark
from stagewise.formats.strict_json import TOO_DEEP, Noting, end_of, is_deep

T = TypeVar("T")
SPACE = re.compile(r"[ \t\r\n]*")
NOT_UTF8 = re.compile("[\udc80-\udcff]")  # bytes that are not UTF-8, as "surrogateescape" decodes them
CUT_NUMBER = re.compile(r"\.|[eE][+-]?")
CONSTANTS = ("true", "false", "null", "NaN", "Infinity", "-Infinity")
MIB = MAX_RECORD >> 20


class Line(NamedTuple):
    """One record: `value` is the record, or the RecordError that explains why there is none.

    `raw` is its source text; "" if there is none, as in parquet files, where as_read makes a substitute.
    """

    where: str
    raw: str
    value: dict[str, Any] | RecordError

    def parsed(self, parse: Callable[[dict[str, Any], str], T]) -> T:
        """`parse(record, where)`. Raises the line's RecordError if it has one, or that of `parse`."""
        if isinstance(self.value, RecordError):
            raise self.value
        return parse(self.value, self.where)

    def as_read(self) -> str:
        """The record's source text, for rejected.jsonl."""
        if self.raw or isinstance(self.value, RecordError):
            return self.raw
        return json.dumps(self.value, ensure_ascii=False, default=str)


def parsed(lines: Iterable[Line], parse: Callable[[dict[str, Any], str], T]) -> Iterator[T | RecordError]:
    """Each line's record parsed by `parse`, or its RecordError."""
    for line in lines:
        try:
            yield line.parsed(parse)
        except RecordError as error:
            yield error


def read_values(path: Path, name: str, progress: Callable[[int], None] | None = None) -> Iterator[Line]:
    """The values of a .json file: "name:12#3" is the third and begins in line 12; "name:1" is the only one.

    A syntax error ends the file with one error; everything before it is given.
    """
    text = _Text(read_blocks(path, progress))
    listed = text.next() == "["
    if listed:
        text.move(text.at + 1)

    def where() -> str:
        return f"{name}:{text.line}#{number}" if listed or number > 1 else f"{name}:{text.line}"

    number = 1
    while text.next() and not (listed and number == 1 and text.next() == "]"):
        yield _value(text, where())
        if text.broken:
            return
        number += 1
        if listed and text.next() != ",":
            break
        if listed:
            text.move(text.at + 1)
    if listed and text.next() == "]":
        text.move(text.at + 1)
        if text.next():
            yield text.stop(where(), "text behind the end of the list")
    elif listed and text.next():
        yield text.stop(where(), "expecting ',' or ']'")
    elif listed or text.problem:
        yield text.cut(where(), "the list has no end")


def not_an_object(where: str, value: Any) -> RecordError:
    return RecordError(where, "not an object", f"a record must be a JSON object, found {type(value).__name__}")


def wrong_encoding(where: str, byte: int, place: str) -> RecordError:
    return RecordError(where, "wrong encoding", f"byte 0x{byte:02x} at {place} is not UTF-8; save the file as UTF-8 "
                       "(iconv -f GB18030 -t UTF-8, for instance)")  # fmt: skip


def too_long(where: str) -> RecordError:
    return RecordError(where, "record too long", f"it is longer than {MIB} MiB; split it, or leave it out")


def was_cut(error: json.JSONDecodeError) -> bool:
    """Whether the text failed to parse because its end is missing, rather than because of an error in it."""
    rest = error.doc[error.pos :].strip()
    if not rest or error.msg.startswith("Unterminated string"):
        return True
    # A truncated constant or escape is reported where it begins, a number where its integer part ends.
    escape = error.msg.startswith("Invalid \\u") and len(rest) <= len("\\uffff")
    return escape or any(word.startswith(rest) for word in CONSTANTS) or bool(CUT_NUMBER.fullmatch(rest))


def escaped_byte(where: str, raw: str) -> RecordError | None:
    """The error for the first byte of `raw` that is not UTF-8, if there is one."""
    bad = NOT_UTF8.search(raw)
    if bad is None:
        return None
    position = len(raw[: bad.start()].encode("utf-8", "surrogateescape")) + 1
    return wrong_encoding(where, ord(bad[0]) - 0xDC00, f"position {position} of the record")


def readable(raw: str) -> str:
    """Text decoded with "surrogateescape", its invalid bytes written as \xe9."""
    return raw.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


class _Text:
    """The decoded text of a file; only the unused part is held, `at` is the position in it."""

    def __init__(self, blocks: Iterable[bytes]):
        self.blocks, self.decoder = iter(without_mark(blocks)), codecs.getincrementaldecoder("utf-8")()
        self.text, self.at, self.line = "", 0, 1
        self.ended = self.broken = False
        self.problem: str | None = None  # why it ended too early

    def next(self) -> str:
        """The next character that is not white space, "" at the end of the file."""
        while True:
            self.move(SPACE.match(self.text, self.at).end())
            if self.at < len(self.text) or not self.grow():
                return self.text[self.at : self.at + 1]

    def move(self, to: int) -> None:
        self.line += self.text.count("\n", self.at, to)
        self.at = to

    def grow(self) -> bool:
        """Reads at least as much as is held; False at the end of the file."""
        parts = [self.text[self.at :]]
        wanted = max(len(parts[0]), 1)
        while not self.ended and wanted > 0:
            parts.append(self._decoded())
            wanted -= len(parts[-1])
        grown = any(parts[1:])
        self.text, self.at = "".join(parts), 0
        return grown

    def _decoded(self) -> str:
        try:
            block = next(self.blocks, b"")
        except BrokenStream as error:
            block, self.problem = b"", str(error)
        self.ended = not block
        try:
            return self.decoder.decode(block, self.ended)
        except UnicodeDecodeError:
            self.decoder.errors = "surrogateescape"  # records with such bytes are refused one by one
            return self.decoder.decode(block, self.ended)

    def stop(self, where: str, why: str) -> Line:
        """The error after which nothing is read."""
        self.broken = True
        message = f"not JSON: {why}; nothing behind it in this file can be read"
        return Line(where, readable(self.text[self.at : self.at + 1000]), RecordError(where, "broken JSON", message))

    def cut(self, where: str, why: str) -> Line:
        self.broken = True
        rest = self.text[self.at :]
        lost = len(rest.encode("utf-8", "surrogateescape"))
        return Line(where, readable(rest), CutError(where, f"the file is cut short: {self.problem or why}", lost))


def _value(text: _Text, where: str) -> Line:
    """The next value; sets text.broken if it can't be parsed."""
    decoder = Noting()
    while True:
        try:
            value, end = decoder.raw_decode(text.text, text.at)
        except json.JSONDecodeError as error:
            if not was_cut(error):
                return text.stop(where, f"{error.msg}, {error.pos - text.at} characters behind its beginning")
            if len(text.text) - text.at > MAX_RECORD:
                text.broken = True
                return Line(where, readable(text.text[text.at : text.at + MAX_KEPT]), too_long(where))
            if not text.grow():
                return text.cut(where, str(error.msg))
        except RecursionError:
            if len(text.text) - text.at > MAX_RECORD:
                text.broken = True
                return Line(where, readable(text.text[text.at : text.at + MAX_KEPT]), too_long(where))
            if end := end_of(text.text, text.at):
                decoder.problems[:], value = [RefusedJSON(*TOO_DEEP)], None
                break
            if not text.grow():
                return text.cut(where, "the record has no end")
        else:
            if end < len(text.text) or isinstance(value, (dict, list, str)) or not text.grow():
                break  # a number could continue in the next block
    raw = text.text[text.at : end]
    text.move(end)
    if is_deep(raw, value):
        decoder.problems.append(RefusedJSON(*TOO_DEEP))
    if decoder.problems:
        refused = decoder.problems[0]
        return Line(where, readable(raw), RecordError(where, refused.reason, str(refused)))
    if text.decoder.errors != "strict" and (error := escaped_byte(where, raw)):
        return Line(where, readable(raw), error)
    return Line(where, raw, value if isinstance(value, dict) else not_an_object(where, value))
