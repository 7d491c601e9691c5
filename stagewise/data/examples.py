"""Examples, and many of them as flat arrays: in memory while they are few, otherwise in memory-mapped files.

ids       5 6 7 8 9 | 4 5 6 | …        4 bytes per token, row after row
spans     2 5       | 1 3   | …        which tokens of a row have labels, from – to
"""

import os
import sys
import tempfile
from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

IGNORE_INDEX = -100
IN_MEMORY = 1 << 25  # bytes of a column that stay in memory before it moves to a file


@dataclass(frozen=True)
class Example:
    """Token ids and labels of equal length; a label is the token's own id, or −100 for no label."""

    input_ids: list[int]
    labels: list[int]
    where: str = "?"


@dataclass(frozen=True)
class PreferenceExample:
    """Two examples with the same prompt tokens; the answers' tokens have labels."""

    chosen: Example
    rejected: Example
    where: str = "?"


class Row(NamedTuple):
    """An example in compact form: its ids, and the spans with labels as from, to, from, to …"""

    ids: array
    spans: array
    where: str

    def example(self) -> Example:
        return Example(self.ids.tolist(), labels_of(self.ids, self.spans), self.where)


class Encoded(NamedTuple):
    """The result of one record: the rows of each of its items (see ExampleWriter.add), and whether it was cut."""

    kind: str
    items: list[tuple[Row, ...]]
    cut: bool = False


def labels_of(ids: Sequence[int], spans: Sequence[int]) -> list[int]:
    """The ids within the spans, −100 elsewhere."""
    labels = [IGNORE_INDEX] * len(ids)
    for start, end in zip(spans[::2], spans[1::2], strict=True):
        labels[start:end] = ids[start:end].tolist()
    return labels


class Examples(Sequence):
    """Examples or preference examples (`kind`), made from flat arrays on access."""

    def __init__(self, kind: str, columns: dict[str, np.ndarray]):
        self.kind, self._columns = kind, columns
        self._ids, self._spans, self._wheres = columns["ids"], columns["spans"], columns["wheres"]
        self._ends, self._span_ends, self._where_ends = (columns[f"{name}_ends"] for name in COLUMNS)
        self._rows = 2 if kind == "PreferenceExample" else 1  # of an item

    def __len__(self) -> int:
        return len(self._ends) // self._rows

    def __getitem__(self, index: int) -> Any:
        size = len(self)
        if not -size <= index < size:
            raise IndexError(f"there are {size} examples, none at {index}")
        index %= size
        if self.kind == "Example":
            return self._example(index)
        return PreferenceExample(self._example(2 * index), self._example(2 * index + 1), self._where(2 * index))

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Examples):
            return NotImplemented
        mine, theirs = self._columns, other._columns
        return self.kind == other.kind and all(np.array_equal(mine[name], theirs[name]) for name in mine)

    @property
    def tokens(self) -> np.ndarray:
        """(N, 1), or (N, 2) of pairs: tokens of each row."""
        return np.diff(self._ends, prepend=0).reshape(-1, self._rows)

    @property
    def learned(self) -> np.ndarray:
        """Like `tokens`: tokens with labels in each row, without the first one, which nothing predicts."""
        starts, ends = self._spans[::2], self._spans[1::2]
        counted = np.concatenate([[0], np.cumsum(ends - np.maximum(starts, 1), dtype=np.int64)])
        return np.diff(counted[self._span_ends // 2], prepend=0).reshape(-1, self._rows)

    def columns_of_tokens(self) -> list[np.ndarray]:
        """All arrays that training reads: everything but the records' locations."""
        return [array for name, array in sorted(self._columns.items()) if not name.startswith("wheres")]

    def first(self, count: int) -> "Examples":
        """The first `count` items."""
        rows, columns = count * self._rows, {}
        for name in COLUMNS:
            ends = self._columns[f"{name}_ends"][:rows]
            columns |= {name: self._columns[name][: ends[-1] if rows else 0], f"{name}_ends": ends}
        return Examples(self.kind, columns)

    def where(self, index: int) -> str:
        """The location of an item's record."""
        return self._where(self._rows * index)

    def _part(self, name: str, row: int) -> np.ndarray:
        ends = self._columns[f"{name}_ends"]
        return self._columns[name][ends[row - 1] if row else 0 : ends[row]]

    def _where(self, row: int) -> str:
        return self._part("wheres", row).tobytes().decode("utf-8", "surrogateescape")

    def _example(self, row: int) -> Example:
        ids = self._part("ids", row)
        return Example(ids.tolist(), labels_of(ids, self._part("spans", row)), self._where(row))


COLUMNS = ("ids", "spans", "wheres")
TYPES = {"ids": "i", "spans": "i", "wheres": "B", **{f"{name}_ends": "q" for name in COLUMNS}}


class ExampleWriter:
    """Takes rows one by one and returns them as Examples.

    With a folder the columns are written there as .npy files; otherwise columns larger than IN_MEMORY go to temporary
    files, which are removed with the examples.
    """

    def __init__(self, folder: str | Path | None = None):
        self._folder = Path(folder) if folder is not None else None
        self._columns = {name: _Column(name, self._folder) for name in TYPES}
        self.kind: str | None = None

    def add(self, kind: str, rows: Sequence[Row]) -> None:
        """Adds an item of one row, or of two for a pair. Raises ValueError for mixed kinds."""
        if self.kind not in (None, kind):
            raise ValueError(f"examples of one set must be of one kind, found {self.kind} and {kind}")
        self.kind = kind
        for row in rows:
            where = row.where.encode("utf-8", "surrogateescape")
            for name, part in zip(COLUMNS, (row.ids, row.spans, where), strict=True):
                self._columns[name].extend(part)
                self._columns[f"{name}_ends"].append(self._columns[name].size)

    def truncate(self, rows: int) -> None:
        """Removes all rows but the first `rows`."""
        for name in COLUMNS:
            ends = self._columns[f"{name}_ends"]
            self._columns[name].truncate(ends.at(rows - 1) if rows else 0)
            ends.truncate(rows)

    def finish(self) -> Examples:
        return Examples(self.kind or "Example", {name: column.finish() for name, column in self._columns.items()})


def read_examples(folder: str | Path, kind: str) -> Examples:
    """Maps the files that an ExampleWriter left in `folder`. Raises OSError or ValueError if files are missing or
    damaged.
    """
    columns = {}
    for name, letter in TYPES.items():
        columns[name] = np.load(Path(folder) / f"{name}.npy", mmap_mode="r", allow_pickle=False)
        if columns[name].dtype != np.dtype(letter) or columns[name].ndim != 1:
            raise ValueError(f"{name}.npy holds {columns[name].dtype} numbers of shape {columns[name].shape}")
    for name in COLUMNS:
        ends = columns[f"{name}_ends"]
        if len(ends) != len(columns["ids_ends"]) or (ends[-1] if len(ends) else 0) != len(columns[name]):
            raise ValueError(f"{name}.npy and {name}_ends.npy do not belong together")
    return Examples(kind, columns)


class _Column:
    """One flat array that grows: first in memory, then in a file."""

    def __init__(self, name: str, folder: Path | None):
        self._name, self._folder, self._buffer = name, folder, array(TYPES[name])
        self._file, self._written = None, 0

    @property
    def size(self) -> int:
        return self._written + len(self._buffer)

    def append(self, number: int) -> None:
        self._buffer.append(number)
        self._spill()

    def extend(self, part: array | bytes) -> None:
        if isinstance(part, bytes):
            self._buffer.frombytes(part)
        else:
            self._buffer.extend(part)
        self._spill()

    def at(self, index: int) -> int:
        """The number at `index`."""
        if index >= self._written:
            return self._buffer[index - self._written]
        size = self._buffer.itemsize
        self._file.flush()
        return int.from_bytes(os.pread(self._file.fileno(), size, HEADER + index * size), sys.byteorder, signed=True)

    def truncate(self, size: int) -> None:
        """Removes all numbers but the first `size`."""
        del self._buffer[max(0, size - self._written) :]
        if size < self._written:
            self._file.seek(HEADER + size * self._buffer.itemsize)
            self._file.truncate()
            self._written = size

    def finish(self) -> np.ndarray:
        if self._file is None and self._folder is None:
            return np.frombuffer(self._buffer, dtype=self._buffer.typecode)
        self._flush()
        with self._file:
            self._header()
            if not self._written:
                return np.zeros(0, self._buffer.typecode)
            return np.memmap(self._file, self._buffer.typecode, "r", HEADER, (self._written,))

    def _spill(self) -> None:
        if len(self._buffer) * self._buffer.itemsize >= IN_MEMORY:
            self._flush()

    def _flush(self) -> None:
        if self._file is None:
            path = self._folder and self._folder / f"{self._name}.npy"
            self._file = open(path, "w+b") if path else tempfile.TemporaryFile()  # noqa: SIM115 finish() closes it
            self._file.write(bytes(HEADER))
        self._buffer.tofile(self._file)
        self._written += len(self._buffer)
        del self._buffer[:]

    def _header(self) -> None:
        """Writes the .npy header in the space reserved for it: the size is only known now."""
        text = repr({"descr": np.dtype(self._buffer.typecode).str, "fortran_order": False, "shape": (self._written,)})
        self._file.seek(0)
        self._file.write(b"\x93NUMPY\x01\x00" + (HEADER - 10).to_bytes(2, "little"))
        self._file.write(text.encode().ljust(HEADER - 11) + b"\n")
        self._file.flush()


HEADER = 128  # bytes before the numbers of a .npy file
