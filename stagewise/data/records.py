"""Files or `datasets` datasets → parsed records, with an account of every record that was left out."""

import hashlib
import json
import os
from array import array
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, is_dataclass
from functools import partial
from itertools import chain, islice
from pathlib import Path
from typing import Any, Generic, TypeVar

from loguru import logger

from stagewise.data.bad_records import with_those_behind
from stagewise.errors import ArgumentError, FileError, RecordError
from stagewise.formats.byte_stream import suffixes_of
from stagewise.formats.data_files import check_file
from stagewise.formats.json_stream import Line, parsed
from stagewise.formats.readers import file_names, read_file
from stagewise.formats.tables import present

T = TypeVar("T")
UNREAD = (".bz2", ".xz", ".zip", ".tar", ".7z", ".arrow", ".xlsx", ".xls")


@dataclass
class Account:
    """The account of the records: `read` = `kept` + the sum of `left_out` (reason → count).

    `cut` counts kept records that were shortened to a length limit. `sources` has the same numbers per source.
    `control` counts records with the text of a control token. `again` returns the source text of a record by its
    location. `blocks_beyond` counts the blocks of encoded texts beyond a limit.
    """

    read: int = 0
    kept: int = 0
    cut: int = 0
    left_out: dict[str, int] = field(default_factory=dict)
    files: list[str] = field(default_factory=list)
    sources: list[dict[str, Any]] = field(default_factory=list)
    control: int = 0
    first_control: str = ""
    blocks_beyond: int = 0
    again: Callable[[str], str] | None = field(default=None, repr=False, compare=False)

    def leave_out(self, reason: str, count: int = 1) -> None:
        if count:
            self.left_out[reason] = self.left_out.get(reason, 0) + count

    def leave_out_as(self, other: "Account") -> None:
        """Adds the left-out records of another account."""
        for reason, count in other.left_out.items():
            self.leave_out(reason, count)

    def reasons(self) -> str:
        """What was left out, for a person: "2 broken JSON, 1 empty turn"."""
        return ", ".join(f"{count} {reason}" for reason, count in self.left_out.items())

    def as_dict(self) -> dict[str, Any]:
        """For run.json; `Account(**…)` restores it."""
        optional = ("sources", "control", "first_control", "blocks_beyond")
        unsaid = {"again", *(name for name in optional if not getattr(self, name))}
        return {name: value for name, value in vars(self).items() if name not in unsaid}


class SourceText:
    """Reads files or a dataset a second time, for the source text of records refused after parsing.

    Args:
        lines: the name of a file or dataset in messages → a function that returns its lines from the start. If records
            are asked for in order, each file is read once.
    """

    def __init__(self, lines: Mapping[str, Callable[[], Iterator[Line]]]):
        self.lines, self._open = lines, {}

    def __call__(self, where: str) -> str:
        """The record's source text. Raises KeyError if there is no such record."""
        name = file_of(where, self.lines)
        for _ in range(2):  # from the start again
            for line in self._open.setdefault(name, self.lines[name]()):
                if line.where == where:
                    return line.as_read()
            del self._open[name]
        raise KeyError(where)


def file_of(where: str, names: Container[str]) -> str:
    """The file, by its name in messages, that the location `where` is in. Raises KeyError if there is none."""
    name = where
    while name not in names:
        name, colon, _ = name.rpartition(":")
        if not colon:
            raise KeyError(where)
    return name


def find_files(folder: str | Path, suffixes: Sequence[str], flag: str) -> list[Path]:
    """Every file below `folder`, sorted, with a suffix of `suffixes`, compressed or not; a single file is accepted,
    too.

    Raises an ArgumentError that names `flag` if nothing is found, a data file has an unsupported format, or a file
    can't be read: a broken link, a pipe, missing permissions.
    """
    top = Path(folder)
    wanted = ", ".join(suffixes)
    if not os.path.lexists(top):
        raise ArgumentError(f"{flag}: there is no folder or file {str(folder)!r}")
    if not top.is_dir():
        check_file(top, flag)
        if suffixes_of(top)[0] not in suffixes:
            raise ArgumentError(f"{flag}: {top} is not a {wanted} file, nor one of them packed as .gz or .zst")
        return [top]
    files, others = [], []
    for path in _walk(top, flag):
        suffix, packed = suffixes_of(path)
        if suffix in suffixes or path.is_symlink():  # a broken link may have been meant to be a folder
            check_file(path, flag)
        if suffix in suffixes:
            files.append(path)
        elif suffix in UNREAD:
            raise ArgumentError(
                f"{flag}: {path} is a {suffix}{packed} file, which is not read; unpack it, save it as .jsonl, .csv or "
                ".parquet, or move it away"
            )
        else:
            others.append(path.name)
    if not files:
        only = f", only {', '.join(others[:5])}" if others else ""
        raise ArgumentError(f"{flag}: no {wanted} file under {top}{only}")
    if others:
        logger.info(f"{flag}: files that are not {wanted} are not read ({len(others)}): {', '.join(others[:5])}")
    return sorted(files)


def dataset_splits(name: str, config: str | None = None, **options: Any) -> list[str]:
    """The names of a dataset's splits; see read_dataset."""
    return list(_load_dataset(name, config, options))


def dataset_fingerprints(name: str, config: str | None = None, **options: Any) -> dict[str, str]:
    """A fingerprint of each split of a dataset; see read_dataset."""
    return {split: rows._fingerprint for split, rows in _load_dataset(name, config, options).items()}


def read_dataset(name: str, config: str | None = None, split: str = "train", **options: Any) -> "DatasetLines":
    """The records of a dataset: a Hub name, a local folder, or one written by save_to_disk.

    `options` (cache_dir, token, revision) go to `datasets.load_dataset`. Raises ValueError for an unknown split.
    """
    splits = _load_dataset(name, config, options)
    if split not in splits:
        raise ArgumentError(f"--dataset_name: {name} has no split {split!r}, only {', '.join(splits)}")
    return DatasetLines(splits[split], f"{name}[{split}]")


@dataclass
class DatasetLines:
    """The rows of a dataset as records; can be iterated over several times."""

    rows: Iterable[dict[str, Any]]
    name: str

    def __iter__(self) -> Iterator[Line]:
        for number, row in enumerate(self.rows, 1):
            yield Line(f"{self.name}:{number}", "", present(row))


class Records(Generic[T]):
    """The parsed records of files or a dataset, made on iteration, so that none has to stay in memory.

    An iteration fills `account`; `pick` reads some of them a second time.

    Args:
        source: a list of files, or a dataset from read_dataset.
        parse: record, where → parsed record; raises RecordError.
        on_bad_record: "error" raises the first RecordError, with the number of bad ones after it; "skip" counts it and
            appends {"where", "reason", "message", "raw"} to `rejected_path`.
        max_samples: limit on kept records; −1 for all.
        names: the names of the files in messages; default: file_names.
        seen: keys of earlier records (see content_key): records in it are left out as "duplicate", others are added.
    """

    def __init__(
        self,
        source: Sequence[Path] | DatasetLines,
        parse: Callable[[dict[str, Any], str], T],
        *,
        on_bad_record: str = "error",
        rejected_path: str | Path | None = None,
        max_samples: int = -1,
        names: Sequence[str] | None = None,
        seen: set[bytes] | None = None,
    ):
        check_on_bad_record(on_bad_record)
        self.parse, self.skip, self.rejected_path = parse, on_bad_record == "skip", rejected_path
        self.max_samples, self.seen = max_samples, seen
        self.places = array("q")  # of the kept records among all records read
        self.account = Account()
        if isinstance(source, DatasetLines):
            self._lines = {source.name: source.__iter__}
        else:
            pairs = list(zip(source, names or file_names(source), strict=True))
            self.account.files = [str(path) for path in source]
            self._lines = {name: partial(read_file, path, name) for path, name in pairs}
        self.account.again = SourceText(self._lines)

    def __iter__(self) -> Iterator[T]:
        account, kept = self.account, 0
        lines = self.lines()
        try:
            for place, line in enumerate(lines):
                if 0 <= self.max_samples <= kept:
                    break
                account.read += 1
                try:
                    record = line.parsed(self.parse)
                except RecordError as error:
                    if not self.skip:
                        raise with_those_behind(error, parsed(lines, self.parse)) from error.__cause__
                    account.leave_out(error.reason)
                    write_rejected(self.rejected_path, error, line.as_read())
                    continue
                if self.seen is not None:
                    key = content_key(record)
                    if key in self.seen:
                        account.leave_out("duplicate")
                        continue
                    self.seen.add(key)
                self.places.append(place)
                kept += 1
                yield record
        finally:  # also if no more records are needed
            account.kept += kept
        if account.left_out:
            left_out = sum(account.left_out.values())
            logger.info(f"{left_out} of {account.read} records left out: {account.reasons()}")

    def pick(self, chosen: Iterable[int]) -> Iterator[T]:
        """The kept records with these ascending numbers, read again."""
        lines, at = self.lines(), 0
        for number in chosen:
            place = self.places[number]
            line = next(islice(lines, place - at, None))
            at = place + 1
            yield line.parsed(self.parse)

    def lines(self) -> Iterator[Line]:
        """Every line of the source, as it is read."""
        return chain.from_iterable(start() for start in self._lines.values())


def load_records(
    source: Sequence[Path] | DatasetLines, parse: Callable[[dict[str, Any], str], T], **options: Any
) -> tuple[list[T], Account]:
    """All records of `source` at once, and their account; `options` are those of Records.

    Raises RecordError; ArgumentError if no record is left.
    """
    records = Records(source, parse, **options)
    kept = list(records)
    if not kept and records.max_samples != 0:
        raise nothing_left(records.account)
    return kept, records.account


def nothing_left(account: Account) -> ArgumentError:
    """The error for an account without a kept record."""
    files, why = ", ".join(account.files) or "the set", account.reasons() or "the files are empty"
    return ArgumentError(f"no record is left of the {account.read} read from {files}: {why}")


def content_key(record: Any) -> bytes:
    """A hash of every text in a parsed record: equal for records that differ only in their locations."""
    digest = hashlib.blake2b(digest_size=16)
    # A pretraining record is (text, where).
    for part in _texts(record[0] if isinstance(record, tuple) else record):
        data = part.encode("utf-8", "surrogatepass")
        digest.update(len(data).to_bytes(8, "little") + data)
    return digest.digest()


def check_on_bad_record(value: str) -> None:
    if value not in ("error", "skip"):
        raise ArgumentError(f'--on_bad_record: expected "error" or "skip", found {value!r}')


def write_rejected(path: str | Path | None, error: RecordError, raw: str) -> None:
    """Appends a left-out record to the file `path`, which only this process writes; does nothing if it is None."""
    if path is None:
        return
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    entry = {"where": error.where, "reason": error.reason, "message": error.message, "raw": raw}
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(entry) + "\n")  # ASCII: a broken character must not break this file, too


# --- pieces ----------------------------------------------------------------------------------------------------------


def _walk(top: Path, flag: str) -> Iterator[Path]:
    def stop(error: OSError) -> None:
        raise FileError(f"{flag}: {error.filename}: can't be read: {error.strerror}") from error

    seen = set()
    for folder, folders, names in os.walk(top, followlinks=True, onerror=stop):
        real = os.path.realpath(folder)
        if real in seen:  # a link to a parent folder
            folders.clear()
            continue
        seen.add(real)
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        yield from (Path(folder, name) for name in names if not name.startswith("."))


def _texts(value: Any) -> Iterator[str]:
    """Every text of a parsed record, with the structure that holds it, without locations."""
    value = vars(value) if is_dataclass(value) else value
    if isinstance(value, dict):
        for name, part in value.items():
            if name != "where":
                yield name
                yield from _texts(part)
    elif isinstance(value, (list, tuple)):
        yield f"{len(value)} parts"
        for part in value:
            yield from _texts(part)
    else:
        yield from (value,) if isinstance(value, str) else ("no text", repr(value))  # None is not "None"


def _load_dataset(name: str, config: str | None, options: dict[str, Any]) -> dict[str, Any]:
    import datasets  # takes seconds to import and is needed only here

    folder = Path(name)
    try:
        if (folder / "dataset_dict.json").is_file() or (folder / "state.json").is_file():
            loaded = datasets.load_from_disk(name)
        else:
            loaded = datasets.load_dataset(name, config, **options)
    except (datasets.exceptions.DatasetsError, OSError, ValueError) as error:
        raise ArgumentError(f"--dataset_name: `datasets` can't load {name!r}: {error.__cause__ or error}") from error
    return loaded if isinstance(loaded, dict) else {"train": loaded}
