"""Tables → one Line per row: .csv and .tsv with a header line, and .parquet."""

import csv
import tempfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import IO, Any

from stagewise.errors import CutError, RecordError
from stagewise.formats.byte_stream import (
    MAX_KEPT,
    MAX_RECORD,
    BrokenStream,
    RawLine,
    read_blocks,
    split_lines,
    suffixes_of,
)
from stagewise.formats.json_stream import Line, escaped_byte, readable, too_long, wrong_encoding

ROWS_AT_ONCE = 64  # rows of a parquet file that are converted to Python objects at a time
Progress = Callable[[int], None] | None


def read_csv(path: Path, name: str, progress: Progress = None, delimiter: str = ",") -> Iterator[Line]:
    """The rows of a table with a header line; "name:7" is the line on which the row begins.

    An empty cell is a missing key, a cell NaN a missing number.
    """
    csv.field_size_limit(MAX_RECORD)  # texts exceed csv's limit of 128 KB
    rows = _Rows(split_lines(read_blocks(path, progress)))
    reader = csv.reader(rows, delimiter=delimiter, strict=True)
    header: list[str] | None = None
    while True:
        rows.begin()
        try:
            cells = next(reader, None)
        except csv.Error as error:
            yield rows.stop(name, str(error))
            return
        where, raw = f"{name}:{rows.first}", "".join(rows.lines)
        if cells is None:
            if rows.problem:
                yield rows.stop(name, "")
            return
        if not cells:  # a blank line
            continue
        if rows.damaged:
            yield Line(where, readable(raw).rstrip("\r\n"), escaped_byte(where, raw))
            if header is None:
                return
        elif header is None:
            header = [cell.strip() for cell in cells]
            if twice := {cell for cell in header if cell and header.count(cell) > 1}:
                error = RecordError(where, "broken header", f"the header has two columns {', '.join(sorted(twice))}")
                yield Line(where, raw, error)
                return
        elif len(cells) != len(header):
            widths = f"the header has {len(header)} columns, this row has {len(cells)}"
            if len(cells) < len(header) and not raw.endswith("\n"):
                lost = len(raw.encode("utf-8", "surrogateescape"))
                error = CutError(where, f"the file ends in the middle of this row: {widths}", lost)
            else:
                marks = "tabs" if delimiter == "\t" else "commas"
                error = RecordError(where, "ragged row", f"{widths}; quote cells that hold {marks}")
            yield Line(where, raw.rstrip("\r\n"), error)
        else:
            value = {key: _cell(cell) for key, cell in zip(header, cells, strict=True) if key and cell}
            yield Line(where, raw.rstrip("\r\n"), value)


def read_tsv(path: Path, name: str, progress: Progress = None) -> Iterator[Line]:
    """Like read_csv, with tab-separated cells."""
    return read_csv(path, name, progress, "\t")


def read_parquet(path: Path, name: str, progress: Progress = None) -> Iterator[Line]:
    """The rows of a parquet file, "name:7" is the seventh; null, also within a row, is a missing key."""
    import pyarrow.parquet  # takes a tenth of a second to import and is needed only here

    number = 0
    with tempfile.TemporaryFile() as unpacked:
        try:
            table = pyarrow.parquet.ParquetFile(_seekable(path, unpacked))
            share = path.stat().st_size / max(table.metadata.num_rows, 1)
            for batch in table.iter_batches(ROWS_AT_ONCE):
                for row in _rows(batch):
                    number += 1
                    where = f"{name}:{number}"
                    bad = isinstance(row, UnicodeDecodeError)
                    byte = f"position {row.start + 1} of a text" if bad else ""
                    value = wrong_encoding(where, row.object[row.start], byte) if bad else present(row)
                    yield Line(where, repr(row.object) if bad else "", value)
                if progress:
                    progress(round(number * share) - round((number - batch.num_rows) * share))
        except (pyarrow.ArrowException, OSError, BrokenStream, UnicodeDecodeError) as error:
            where = f"{name}:{number + 1}"
            message = f"the parquet file is cut short or damaged, fetch it again: {error}"
            yield Line(where, "", CutError(where, message, path.stat().st_size if not number else 0))


def present(value: Any) -> Any:
    """A row without the nulls of missing keys: in a column every row has every key that any row has."""
    if isinstance(value, dict):
        return {key: present(part) for key, part in value.items() if part is not None}
    return [present(part) for part in value] if isinstance(value, list) else value


# --- pieces ----------------------------------------------------------------------------------------------------------


def _cell(cell: str) -> str | float:
    return float("nan") if cell in ("NaN", "nan") else cell


class _Rows:
    """The lines of a table for csv.reader; remembers those of the current row."""

    def __init__(self, lines: Iterable[RawLine]):
        self.source, self.number, self.problem, self.unused = iter(lines), 0, None, b""
        self.begin()

    def begin(self) -> None:
        self.lines: list[str] = []
        self.damaged, self.first = False, self.number + 1

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        line = next(self.source)
        if line.problem:
            self.problem, self.unused = line.problem, line.data
            raise StopIteration
        self.number = line.number
        try:
            text = line.data.decode("utf-8")
        except UnicodeDecodeError:
            text, self.damaged = line.data.decode("utf-8", "surrogateescape"), True
        self.lines.append(text + "\n" if line.ended else text)
        return self.lines[-1]

    def stop(self, name: str, why: str) -> Line:
        """The error after which nothing is read."""
        where, raw = f"{name}:{self.first}", "".join(self.lines)
        lost = len(raw.encode("utf-8", "surrogateescape")) + len(self.unused)
        if self.problem == "long" or "field larger" in why:
            error: RecordError = too_long(where)
        elif "new-line character" in why:
            message = "a CR stands inside a row: the file mixes line ends, save it with LF or CRLF alone"
            error = RecordError(where, "broken csv", f"not csv: {message}; nothing behind it can be read")
        elif self.problem or why == "unexpected end of data":
            cause = self.problem or "the file ends within a quoted cell, or a quote is missing before"
            error = CutError(where, f"the file is cut short: {cause}", lost)
        else:
            error = RecordError(where, "broken csv", f"not csv: {why}; nothing behind it in this file can be read")
        return Line(where, readable(raw)[:MAX_KEPT].rstrip("\r\n"), error)


def _rows(batch: Any) -> Iterator[dict[str, Any] | UnicodeDecodeError]:
    """The rows of a batch of a parquet file; an error in place of one whose text is not UTF-8."""
    try:
        yield from batch.to_pylist()
    except UnicodeDecodeError:
        for number in range(batch.num_rows):
            try:
                yield batch.slice(number, 1).to_pylist()[0]
            except UnicodeDecodeError as error:
                yield error


def _seekable(path: Path, unpacked: IO[bytes]) -> Path | IO[bytes]:
    """A compressed file, unpacked into a seekable file: a parquet file's index is at its end."""
    if not suffixes_of(path)[1]:
        return path
    for block in read_blocks(path):
        unpacked.write(block)
    unpacked.seek(0)
    return unpacked
