"""The prompts of a file, and the file of their answers: in order, and complete or absent.

Unfinished answers are in FILE.part, after a first line with the settings they were generated with. A run that was
stopped continues after its last complete line; with other settings it refuses to.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO

from stagewise.artifacts.file_hashes import sha256_of
from stagewise.errors import ChatModelError, RecordError
from stagewise.formats.byte_stream import suffixes_of
from stagewise.formats.data_files import trouble_with
from stagewise.formats.json_lines import json_bytes
from stagewise.formats.parsers import Conversation, form_of, parse_prompt
from stagewise.formats.readers import RECORD_FILES, read_file


@dataclass(frozen=True)
class Prompt:
    """A record of the file, and its prompt; or the reason why it has none."""

    record: dict[str, Any]
    conversation: Conversation | None
    reason: str = ""


def written_fields(field: str) -> tuple[str, str, str]:
    """The fields added to a record: its answer, whether the answer ended, and why there is none."""
    return field, f"{field}_ended", f"{field}_error"


def read_prompts(file: str | Path, field: str, system: str | None = None, *, skips: bool = False) -> list[Prompt]:
    """The prompts of a file: records of any form that the stages read, {"prompt": …}, or a .txt with one per line.

    If a conversation ends with an answer, that answer is dropped. `system` applies to records without a system prompt.

    Args:
        file: the file of prompts.
        field: the name of the answer in a record.
        system: see above.
        skips: keep a record without a prompt, with the reason.

    Raises:
        ChatModelError: naming file and line; also for a line that is not a record, and for a record that already has a
            field that an answer would overwrite.
    """
    path = Path(file)
    if path.is_dir():
        raise ChatModelError(f"--data_file {file}: is a folder; give a file")
    if trouble := trouble_with(path):
        raise ChatModelError(f"--data_file {file}: {trouble}")
    kind = suffixes_of(path)[0]
    if kind != ".txt" and kind not in RECORD_FILES:
        raise ChatModelError(f"--data_file {file}: expected {', '.join(RECORD_FILES)} or .txt (a question a line)")
    prompts = []
    try:
        for where, record in _lines(path) if kind == ".txt" else _records(path):
            if taken := [name for name in written_fields(field) if name in record]:
                raise ChatModelError(f"{where}: has a field {taken[0]!r} already: give another --answer_field")
            try:
                asked = parse_prompt(_as_question(record, where), where)
            except RecordError as error:
                if not skips:
                    raise
                prompts.append(Prompt(record, None, str(error)))
                continue
            if asked.system is None and system is not None:
                asked = replace(asked, system=system)
            prompts.append(Prompt(record, asked))
    except RecordError as error:
        raise ChatModelError(str(error)) from error
    if not prompts:
        raise ChatModelError(f"--data_file {file}: holds no record")
    return prompts


def _lines(path: Path):
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ChatModelError(f"--data_file {path}: byte {error.start} is no UTF-8; save the file as UTF-8") from error
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            yield f"{path.name}:{number}", {"prompt": line.rstrip("\r")}


def _records(path: Path):
    for line in read_file(path, path.name):
        if isinstance(line.value, RecordError):
            raise line.value
        yield line.where, line.value


def _as_question(record: dict[str, Any], where: str) -> dict[str, Any]:
    """{"prompt": …} converted to another form."""
    if form_of(record) is not None or "prompt" not in record:
        return record
    asked = record["prompt"]
    if asked is None:
        raise RecordError(where, "no prompt", '"prompt" is null')
    rest = {name: value for name, value in record.items() if name != "prompt"}
    return {**rest, "messages": asked} if isinstance(asked, list) else {**rest, "question": asked}


class AnswerFile:
    """The file of answers while it is written, by the first process only.

    Args:
        path: the final file.
        settings: what the answers depend on; a run that continues must have the same.
        records: the records in order, to which `field` is added.
        overwrite: replace an existing file.
    """

    def __init__(
        self,
        path: str | Path,
        settings: dict[str, Any],
        records: Sequence[dict[str, Any]],
        field: str,
        *,
        overwrite: bool = False,
    ):
        self.path, self.part = Path(path), Path(f"{path}.part")
        self.settings, self.records, self.field = settings, records, field
        self.file: BinaryIO | None = None
        if self.path.is_dir():
            raise ChatModelError(f"--output_file {path}: is a folder; give a file")
        if overwrite:
            self.part.unlink(missing_ok=True)
        elif self.path.exists():
            raise ChatModelError(
                f"--output_file {path}: is there already; --overwrite_output_file replaces it, another name keeps it"
            )

    def begin(self) -> int:
        """Opens the file; returns the number of answers it already has. Raises ChatModelError for other settings."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        kept, done = self._kept()
        if kept:
            with self.part.open("r+b") as file:
                file.truncate(kept)
        self.file = self.part.open("ab" if kept else "wb")
        if not kept:
            self._line({"settings": self.settings})
        return done

    def _kept(self) -> tuple[int, int]:
        """The bytes of existing complete lines, and the number of answers in them."""
        if not self.part.is_file():
            return 0, 0
        data = self.part.read_bytes()
        lines = data[: data.rfind(b"\n") + 1].splitlines(keepends=True)
        found = _settings_in(lines[0] if lines else data)
        if data and found is None:
            raise ChatModelError(
                f"--output_file {self.path}: {self.part.name} is not a file of unfinished answers, or is damaged; "
                "move it away, or --overwrite_output_file to start over"
            )
        if len(lines) < 2:  # no answer yet
            return 0, 0
        now = json.loads(json.dumps(self.settings, default=str))
        differ = [name for name in now if found.get(name) != now[name]]
        if differ:
            told = ", ".join(f"{name} {found.get(name)!r}, now {now[name]!r}" for name in differ[:3])
            raise ChatModelError(
                f"--output_file {self.path}: {self.part.name} holds {len(lines) - 1} answers of a run that was "
                f"stopped, with other settings ({told}). Give the same to continue, or "
                "--overwrite_output_file to start over"
            )
        return sum(map(len, lines)), len(lines) - 1

    def write(self, place: int, answer: str | None, **more: Any) -> None:
        """Adds an answer and `ended`, or None and `error`, to the record at `place`; see `written_fields`."""
        answered, ended, error = written_fields(self.field)
        names = {"ended": ended, "error": error}
        self._line({**self.records[place], answered: answer, **{names[name]: value for name, value in more.items()}})

    def flush(self) -> None:
        """Flushes the file, so that what was written outlives this process."""
        self.file.flush()

    def finish(self) -> None:
        """Moves the file to its final place, without its first line."""
        self.file.close()
        whole = Path(f"{self.part}.tmp")
        with self.part.open("rb") as source, whole.open("wb") as target:
            source.readline()
            while block := source.read(1 << 20):
                target.write(block)
        os.replace(whole, self.path)
        self.part.unlink()

    def close(self) -> None:
        """Closes the part for a later run."""
        if self.file is not None:
            self.file.close()

    def _line(self, value: dict[str, Any]) -> None:
        self.file.write(json_bytes(value))


def _settings_in(line: bytes) -> dict[str, Any] | None:
    """The settings in a file's first line, {} if the line is incomplete; None if it is another kind of line."""
    if line.startswith(b'{"settings": ') and not line.endswith(b"\n"):
        return {}
    try:
        found = json.loads(line)["settings"]
    except (ValueError, TypeError, KeyError):
        return None
    return found if isinstance(found, dict) else None


def fingerprint(path: str | Path) -> str:
    """The first 16 hexadecimal digits of a file's SHA-256."""
    return sha256_of(path)[:16]
