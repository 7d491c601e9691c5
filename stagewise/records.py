"""Files or `datasets` sets → parsed records, plus an account of every record that was left out."""

import itertools
import json
import os
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from loguru import logger

from stagewise.arguments import ArgumentError
from stagewise.conversation import RecordError

T = TypeVar("T")
UNREAD = (".gz", ".bz2", ".xz", ".zst", ".zip", ".tar", ".7z", ".parquet", ".arrow", ".csv", ".tsv", ".xlsx")
_SPACE = re.compile(r"[ \t\r\n]*")


@dataclass
class Account:
    """What became of the records: `read` = `kept` + the sum of `left_out` (reason → count).

    `cut` counts kept records that were shortened to a length limit.
    """

    read: int = 0
    kept: int = 0
    cut: int = 0
    left_out: dict[str, int] = field(default_factory=dict)
    files: list[str] = field(default_factory=list)

    def leave_out(self, reason: str) -> None:
        self.left_out[reason] = self.left_out.get(reason, 0) + 1

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


class Line(NamedTuple):
    """One record as it was read: `value` is the record, or the RecordError that says why there is none."""

    where: str
    raw: str
    value: dict[str, Any] | RecordError


def find_files(folder: str | Path, suffixes: Sequence[str], flag: str) -> list[Path]:
    """Every file under `folder` (nested, sorted) whose name ends with one of `suffixes`; a single file is taken too.

    Raises ValueError, naming `flag`, where nothing is found or a data file is in a form that is not read.
    """
    top = Path(folder)
    wanted = " or ".join(suffixes)
    if top.is_file():
        if top.suffix.lower() not in suffixes:
            raise ArgumentError(f"{flag}: {top} is not a {wanted} file")
        return [top]
    if not top.is_dir():
        raise ArgumentError(f"{flag}: there is no folder or file {str(folder)!r}")
    found, others = [], []
    for path in _walk(top):
        suffix = path.suffix.lower()
        if suffix in suffixes:
            found.append(path)
        elif suffix in UNREAD:
            raise ArgumentError(
                f"{flag}: {path} is a {suffix} file, which is not read; unpack it or convert it to .jsonl "
                "(csv: python convert_dataset.py), or move it away"
            )
        else:
            others.append(path.name)
    if not found:
        only = f", only {', '.join(others[:5])}" if others else ""
        raise ArgumentError(f"{flag}: no {wanted} file under {top}{only}")
    if others:
        logger.info(f"{flag}: {len(others)} files that are not {wanted} are not read: {', '.join(others[:5])}")
    return sorted(found)


def read_files(files: Sequence[Path]) -> Iterator[Line]:
    """The records of .jsonl, .json (a list, one object, or lines) and .txt (one file is one document) files, in order.

    A line that can't be read is yielded with its RecordError, so that the caller may count it and go on.
    """
    top = os.path.commonpath([path.resolve().parent for path in files]) if files else ""
    for path in files:
        name = str(path.resolve().relative_to(top))
        suffix = path.suffix.lower()
        if suffix == ".txt":
            yield _document(path, name)
        elif suffix == ".json":
            yield from read_json(path, name)
        else:
            yield from read_lines(path, name)


def read_lines(path: Path, name: str) -> Iterator[Line]:
    """One JSON object a line, streamed; blank lines and a byte-order mark are skipped."""
    with path.open("rb") as file:
        for number, data in enumerate(file, 1):
            where = f"{name}:{number}"
            if number == 1:
                if data.startswith((b"\xff\xfe", b"\xfe\xff")):
                    error = RecordError(where, "wrong encoding", "the file is UTF-16; save it as UTF-8")
                    yield Line(where, "", error)
                    return
                data = data.removeprefix(b"\xef\xbb\xbf")
            if data.strip():
                yield _parsed(where, data)


def read_json(path: Path, name: str) -> Iterator[Line]:
    """A .json file: a list of records ("name:12#3" is the third, it begins in line 12), one record, or one a line."""
    data = path.read_bytes().removeprefix(b"\xef\xbb\xbf")
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        yield Line(name, data[:1000].decode("utf-8", "backslashreplace"), _wrong_encoding(name, data, error))
        return
    if text.lstrip().startswith("["):
        yield from _list_items(text, name)
        return
    whole = _parsed(f"{name}:1", data)
    lines = [] if isinstance(whole.value, dict) else list(read_lines(path, name))
    # A broken record of many lines is one error, not one a line: lines count only where the first is a record.
    yield from lines if lines and isinstance(lines[0].value, dict) else [whole._replace(raw=whole.raw[:100_000])]


def dataset_splits(name: str, config: str | None = None, **options: Any) -> list[str]:
    """The names of the splits of a `datasets` set; see read_dataset."""
    return list(_load_dataset(name, config, options))


def read_dataset(name: str, config: str | None = None, split: str = "train", **options: Any) -> Iterator[Line]:
    """The records of a `datasets` set: a Hub name, a local folder, or one that save_to_disk wrote.

    `options` (cache_dir, token, revision) go to `datasets.load_dataset`. Raises ValueError for an unknown split.
    """
    splits = _load_dataset(name, config, options)
    if split not in splits:
        raise ArgumentError(f"--dataset_name: {name} has no split {split!r}, only {', '.join(splits)}")
    return _dataset_lines(splits[split], f"{name}[{split}]")


def load_records(
    source: Sequence[Path] | Iterable[Line],
    parse: Callable[[dict[str, Any], str], T],
    *,
    on_bad_record: str = "error",
    rejected_path: str | Path | None = None,
    max_samples: int = -1,
) -> tuple[list[T], Account]:
    """Every record of `source` through `parse(record, where)`, and the account of them.

    `source` is a list of files, or lines as read_dataset gives them. `on_bad_record` "error" raises the first
    RecordError; "skip" counts it and appends {"where", "reason", "raw"} to `rejected_path`. `max_samples` counts
    kept records, −1 takes all. Raises ValueError where no record is left.
    """
    check_on_bad_record(on_bad_record)
    account = Account()
    if isinstance(source, (list, tuple)) and all(isinstance(item, Path) for item in source):
        account.files = [str(path) for path in source]
        source = read_files(source)
    kept: list[T] = []
    for line in source:
        if 0 <= max_samples <= len(kept):
            break
        account.read += 1
        try:
            if isinstance(line.value, RecordError):
                raise line.value
            kept.append(parse(line.value, line.where))
            account.kept += 1
        except RecordError as error:
            if on_bad_record == "error":
                raise
            account.leave_out(error.reason)
            write_rejected(rejected_path, error, line.raw)
    if not kept and max_samples != 0:
        files, why = ", ".join(account.files) or "the set", account.left_out or "the files are empty"
        raise ArgumentError(f"no record is left of the {account.read} read from {files}: {why}")
    if account.left_out:
        logger.info(f"{sum(account.left_out.values())} of {account.read} records left out: {account.left_out}")
    return kept, account


def check_on_bad_record(value: str) -> None:
    if value not in ("error", "skip"):
        raise ArgumentError(f'--on_bad_record: expected "error" or "skip", found {value!r}')


def write_rejected(path: str | Path | None, error: RecordError, raw: str) -> None:
    """Append a left-out record to `path`; in a distributed run the first process alone writes."""
    if path is None or os.environ.get("RANK", "0") != "0":
        return
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    entry = {"where": error.where, "reason": error.reason, "message": error.message, "raw": raw}
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(entry) + "\n")  # ASCII: a broken character must not break this file as well


# --- pieces ----------------------------------------------------------------------------------------------------------


def _walk(top: Path) -> Iterator[Path]:
    seen = set()
    for folder, folders, names in os.walk(top, followlinks=True):
        real = os.path.realpath(folder)
        if real in seen:  # a link back up
            folders.clear()
            continue
        seen.add(real)
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        yield from (Path(folder, name) for name in names if not name.startswith("."))


def _document(path: Path, name: str) -> Line:
    data = path.read_bytes().removeprefix(b"\xef\xbb\xbf")
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        return Line(name, data.decode("utf-8", "backslashreplace"), _wrong_encoding(name, data, error))
    return Line(name, text, {"text": text.replace("\r\n", "\n")})


def _list_items(text: str, name: str) -> Iterator[Line]:
    """The records of a JSON list, one by one; what stands before a break (a file cut short) can still be read."""
    constants: list[str] = []
    decoder = json.JSONDecoder(parse_constant=constants.append)
    position, line, counted = text.index("[") + 1, 1, 0
    for number in itertools.count(1):
        position = _SPACE.match(text, position).end()
        if number == 1 and text[position : position + 1] == "]":
            return
        line, counted = line + text.count("\n", counted, position), position
        where = f"{name}:{line}#{number}"
        try:
            constants.clear()
            value, end = decoder.raw_decode(text, position)
            raw, position = text[position:end], _SPACE.match(text, end).end()
            if text[position : position + 1] not in (",", "]"):
                raise json.JSONDecodeError("expecting ',' or ']'", text, position)
        except (ValueError, RecursionError) as error:
            message = f"not JSON: {error}; nothing behind it in this file can be read"
            yield Line(where, text[counted : counted + 1000], RecordError(where, "broken JSON", message))
            return
        if constants:
            error = RecordError(where, "broken JSON", f"not JSON: {constants[0]} is not a JSON value; write null")
            yield Line(where, raw, error)
        else:
            yield Line(where, raw, value if isinstance(value, dict) else _not_an_object(where, value))
        if text[position] == "]":
            return
        position += 1


def _parsed(where: str, data: bytes) -> Line:
    try:
        raw = data.decode("utf-8").strip("\r\n")
    except UnicodeDecodeError as error:
        return Line(where, data.decode("utf-8", "backslashreplace"), _wrong_encoding(where, data, error))
    try:
        value = json.loads(raw, parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:  # JSONDecodeError is a ValueError
        return Line(where, raw, RecordError(where, "broken JSON", f"not JSON: {error}"))
    if not isinstance(value, dict):
        return Line(where, raw, _not_an_object(where, value))
    return Line(where, raw, value)


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not a JSON value; write null or leave the key out")


def _not_an_object(where: str, value: Any) -> RecordError:
    return RecordError(where, "not an object", f"a record must be a JSON object, found {type(value).__name__}")


def _wrong_encoding(where: str, data: bytes, error: UnicodeDecodeError) -> RecordError:
    byte = data[error.start]
    return RecordError(where, "wrong encoding", f"byte 0x{byte:02x} at position {error.start + 1} is not UTF-8; save "
                       "the file as UTF-8 (iconv -f GB18030 -t UTF-8, for instance)")  # fmt: skip


def _load_dataset(name: str, config: str | None, options: dict[str, Any]) -> dict[str, Any]:
    import datasets  # seconds to import, needed only here

    folder = Path(name)
    if (folder / "dataset_dict.json").is_file() or (folder / "state.json").is_file():
        loaded = datasets.load_from_disk(name)
    else:
        loaded = datasets.load_dataset(name, config, **options)
    return loaded if isinstance(loaded, dict) else {"train": loaded}


def _dataset_lines(rows: Iterable[dict[str, Any]], name: str) -> Iterator[Line]:
    for number, row in enumerate(rows, 1):
        # A set's rows all have every key, with null where a record had none.
        record = {key: value for key, value in row.items() if value is not None}
        yield Line(f"{name}:{number}", json.dumps(record, ensure_ascii=False, default=str), record)
