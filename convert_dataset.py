"""Convert instruction, question-answer, chat or preference data to the ShareGPT jsonl that every stage reads.

    python convert_dataset.py --in_file alpaca.json --out_file sft.jsonl
    python convert_dataset.py --in_file faq.csv.gz --out_file sft.jsonl --data_type qa --on_bad_record skip
    python convert_dataset.py --in_file download.json --out_file sft.jsonl --recover

The record format and the file type are detected from the keys and the file name, unless --data_type and --file_type
give them. Files of any size are converted in constant memory. A record that can't be converted ends the program with
file and line, or is left out, counted and written to <out_file>.rejected.jsonl. Fields that no stage reads are
dropped.
"""

import argparse
import os
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from loguru import logger
from tqdm import tqdm

from stagewise.config.paths import path_of
from stagewise.data.bad_records import with_those_behind
from stagewise.data.records import Account, write_rejected
from stagewise.errors import CutError, RecordError
from stagewise.formats.byte_stream import COMPRESSED, suffixes_of
from stagewise.formats.data_files import trouble_with
from stagewise.formats.json_lines import json_bytes
from stagewise.formats.json_stream import Line, parsed
from stagewise.formats.parsers import Conversation, Message, form_of, parse_conversation, parse_preference, parse_text
from stagewise.formats.readers import READERS, read_file
from stagewise.reports.terminal_text import visible

QUESTION = ("question", "query", "prompt", "input", "instruction")
ANSWER = ("answer", "response", "output", "completion")
FROM = {"user": "human", "assistant": "gpt", "tool_call": "function_call", "observation": "observation"}


@dataclass
class Conversion(Account):
    """The account of a conversion; `lost` is the number of bytes after the file's last complete record, `why` the
    reason.
    """

    lost: int = field(default=0)
    why: str = field(default="")


# ── forms of records ─────────────────────────────────────────────────────────────────────────────────────────────────


def from_chat(record: dict[str, Any], where: str) -> dict[str, Any]:
    """ShareGPT `conversations` or OpenAI `messages`, with any known role names → a ShareGPT record."""
    _expect(record, where, ("conversation",), '"conversations" or "messages"')
    return _sharegpt(parse_conversation(record, where))


def from_alpaca(record: dict[str, Any], where: str) -> dict[str, Any]:
    """{instruction, input?, output, system?, history?} → a ShareGPT record."""
    _expect(record, where, ("alpaca",), '"instruction" and "output"')
    return _sharegpt(parse_conversation(record, where))


def from_qa(record: dict[str, Any], where: str) -> dict[str, Any]:
    """{question, answer, system?, history?}, or the usual other names of the first two → a ShareGPT record."""
    texts = []
    for names in (QUESTION, ANSWER):
        given = [name for name in names if record.get(name) not in (None, "")]
        if len(given) != 1:
            raise RecordError(where, f"no {names[0]}", f"expected exactly one of {', '.join(names)} with a text, "
                              f"found the keys {', '.join(map(str, record))}")  # fmt: skip
        texts.append(record[given[0]])
    others = {key: record[key] for key in ("system", "history", "tools") if key in record}
    return _sharegpt(parse_conversation({**others, "question": texts[0], "answer": texts[1]}, where))


def from_history(record: dict[str, Any], where: str) -> dict[str, Any]:
    """A question and answer, or instruction and output, with the exchanges before them → a ShareGPT record."""
    if not record.get("history"):
        raise RecordError(where, "no history", f'expected "history", found the keys {", ".join(map(str, record))}')
    return (from_alpaca if record.get("output") and form_of(record) == "alpaca" else from_qa)(record, where)


def from_preference(record: dict[str, Any], where: str) -> dict[str, Any]:
    """Any form of preference → {conversations, chosen, rejected}."""
    preference = parse_preference(record, where)
    answers = {"chosen": preference.chosen, "rejected": preference.rejected}
    return {**_sharegpt(preference.prompt), **{side: _answer(messages) for side, messages in answers.items()}}


def from_text(record: dict[str, Any], where: str) -> dict[str, Any]:
    """{text} → the same, for pretraining."""
    return {"text": parse_text(record, where)}


def from_any(record: dict[str, Any], where: str) -> dict[str, Any]:
    """Converts each record by its keys."""
    form = form_of(record)
    if form is None and not any(name in record for name in QUESTION):
        raise RecordError(where, "no known form", f"found the keys {', '.join(map(str, record)) or 'none'}: no "
                          "conversation, instruction, question, preference or text")  # fmt: skip
    return BY_FORM[form or "qa"](record, where)


BY_FORM: dict[str, Callable[[dict[str, Any], str], dict[str, Any]]] = {
    "conversation": from_chat,
    "alpaca": from_alpaca,
    "qa": from_qa,
    "preference": from_preference,
    "text": from_text,
}
CONVERTERS = {
    "auto": from_any,
    "alpaca": from_alpaca,
    "qa": from_qa,
    "sharegpt": from_chat,
    "messages": from_chat,
    "history": from_history,
    "preference": from_preference,
    "text": from_text,
}


def _expect(record: dict[str, Any], where: str, forms: Sequence[str], wanted: str) -> None:
    if form_of(record) not in forms:
        raise RecordError(where, "another form", f"expected {wanted}, found the keys {', '.join(map(str, record))}; "
                          "--data_type auto tells each record by its keys")  # fmt: skip


def _sharegpt(conversation: Conversation) -> dict[str, Any]:
    record: dict[str, Any] = {"conversations": [_turn(message) for message in conversation.messages]}
    if conversation.system is not None:
        record["system"] = conversation.system
    if conversation.tools is not None:
        record["tools"] = conversation.tools
    return record


def _turn(message: Message) -> dict[str, Any]:
    turn: dict[str, Any] = {"from": FROM[message.role], "value": message.content}
    return turn if message.learn else {**turn, "weight": 0}


def _answer(messages: Sequence[Message]) -> str | list[dict[str, Any]]:
    """The answer, if it is plain text."""
    if len(messages) == 1 and messages[0].role == "assistant" and messages[0].learn:
        return messages[0].content
    return [_turn(message) for message in messages]


# ── the file ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def convert(
    in_file: Path,
    out_file: Path,
    data_type: str = "auto",
    file_type: str | None = None,
    on_bad_record: str = "error",
    recover: bool = False,
) -> Conversion:
    """Converts `in_file` record by record; `out_file` appears once it is complete.

    With `on_bad_record` "skip", records that can't be converted go to `out_file`.rejected.jsonl, counted by reason;
    otherwise the first one raises RecordError. With `recover`, a truncated file gives its complete records. Raises
    ValueError if none is left.
    """
    account = Conversion(files=[str(in_file)])
    kind = f".{file_type}" if file_type else suffixes_of(in_file)[0]
    rejected = rejected_of(out_file)
    out_file.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{out_file.name}.", dir=out_file.parent) as folder:
        part, refused = Path(folder, "out"), Path(folder, "rejected")
        with part.open("wb") as out, _progress(in_file) as bar:
            lines: Iterable[Line] = read_file(in_file, in_file.name, bar.update, kind)
            if recover:
                lines = _whole_records(lines, account, _cut_row(in_file, kind))
            lines = iter(lines)
            for line in lines:
                account.read += 1
                try:
                    converted = line.parsed(CONVERTERS[data_type])
                except RecordError as error:
                    if isinstance(error, CutError) and on_bad_record == "error":
                        raise  # --recover is the way out
                    if on_bad_record == "error":
                        raise with_those_behind(error, parsed(lines, CONVERTERS[data_type])) from error.__cause__
                    account.leave_out(error.reason)
                    write_rejected(refused, error, line.as_read())
                    continue
                out.write(json_bytes(converted))
                account.kept += 1
        if refused.exists():
            os.replace(refused, rejected)
        else:
            rejected.unlink(missing_ok=True)
        if not account.kept and account.why and not account.read:
            raise ValueError(f"{account.why.rstrip('.')}; no whole record stands before")
        if not account.kept:
            raise ValueError(f"--in_file: none of the {account.read} records of {in_file} could be converted: "
                             f"{account.reasons() or 'there are no records in it'}")  # fmt: skip
        os.replace(part, out_file)
    return account


def rejected_of(out_file: Path) -> Path:
    """The path of the rejected records."""
    return out_file.with_name(out_file.name + ".rejected.jsonl")


def _progress(in_file: Path) -> tqdm:
    return tqdm(total=in_file.stat().st_size, unit="B", unit_scale=True, desc=in_file.name, leave=False)


def _whole_records(lines: Iterable[Line], account: Conversion, last_is_cut: bool) -> Iterator[Line]:
    """The lines before the point where the file is cut off; what follows the last complete one is counted as lost."""
    held = None
    for line in lines:
        if isinstance(line.value, CutError):
            account.lost += line.value.lost
            account.why = str(line.value)
            last_is_cut = False
            break
        if held:
            yield held
        held = line
    if held and last_is_cut:
        account.lost += len(held.raw.encode("utf-8", "surrogateescape"))
    elif held:
        yield held


def _cut_row(in_file: Path, kind: str) -> bool:
    """Whether the last row of a table lacks its line end: cut within its last cell, it would look complete."""
    if kind not in (".csv", ".tsv") or in_file.suffix.lower() in COMPRESSED or not in_file.stat().st_size:
        return False
    with in_file.open("rb") as file:
        file.seek(-1, os.SEEK_END)
        return file.read(1) != b"\n"


# ── the command ──────────────────────────────────────────────────────────────────────────────────────────────────────


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """Parses and checks the command line; a bad flag ends the program with a message that names it."""
    file_types = [suffix.removeprefix(".") for suffix in READERS]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--in_file", required=True, type=path_of, help="also packed as .gz or .zst")
    parser.add_argument("--out_file", required=True, type=path_of, help="ShareGPT jsonl")
    parser.add_argument(
        "--data_type", default="auto", help=", ".join(CONVERTERS) + "; auto tells by each record's keys"
    )
    parser.add_argument("--file_type", help=", ".join(file_types) + "; default: as the name of --in_file ends")
    parser.add_argument(
        "--on_bad_record", default="error", help="error: stop at the first; skip: leave out, count, write"
    )
    parser.add_argument("--recover", action="store_true", help="take the whole records of a file that is cut off")
    parser.add_argument("--overwrite", action="store_true", help="replace --out_file if it is there")
    args = parser.parse_args(argv)
    if args.in_file.is_dir():
        parser.error(f"--in_file: {args.in_file} is a folder; give one file of it")
    if not os.path.lexists(args.in_file):
        parser.error(f"--in_file: there is no file {str(args.in_file)!r}")
    if args.file_type is None and suffixes_of(args.in_file)[0] in READERS:
        args.file_type = suffixes_of(args.in_file)[0].removeprefix(".")
    if args.file_type is None:
        parser.error(
            f"--file_type: can't be told from the name {args.in_file.name}; give one of {', '.join(file_types)}"
        )
    for flag, known in (("data_type", CONVERTERS), ("file_type", file_types), ("on_bad_record", ("error", "skip"))):
        if getattr(args, flag) not in known:
            parser.error(f"--{flag}: unknown value {getattr(args, flag)!r}; expected {', '.join(known)}")
    _check_files(parser, args)
    return args


def _check_files(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    source, target = args.in_file, args.out_file
    if trouble := trouble_with(source):
        sys.exit(f"convert_dataset.py: --in_file: {source}: {trouble}")
    if target.is_dir():
        parser.error(f"--out_file: {target} is a folder, name a file in it")
    if target.suffix.lower() in (*COMPRESSED, *READERS) and target.suffix.lower() not in (".jsonl", ".json"):
        parser.error(f"--out_file: {target} is written as plain jsonl; let its name end in .jsonl")
    for path in (target, rejected_of(target)):
        if path.resolve() == source.resolve() or (path.exists() and path.samefile(source)):
            parser.error(f"--out_file: {path} is the input file; write to another one")
        if path.exists() and not args.overwrite:
            parser.error(f"--out_file: {path} is there already; --overwrite replaces it")


def main(argv: list[str] | None = None) -> None:
    args = parse_arguments(argv)
    try:
        account = convert(
            args.in_file, args.out_file, args.data_type, args.file_type, args.on_bad_record, args.recover
        )
    except CutError as error:
        way_out = "" if args.file_type == "parquet" else "; --recover takes the whole records before"
        sys.exit(visible(f"convert_dataset.py: {error}{way_out}"))
    except ValueError as error:
        sys.exit(visible(f"convert_dataset.py: {error}"))
    left_out = f", {account.read - account.kept} left out: {account.reasons()}" if account.left_out else ""
    logger.info(f"{account.read} records read, {account.kept} written to {args.out_file}{left_out}")
    if account.left_out:
        logger.info(f"what was left out is in {rejected_of(args.out_file)}")
    if args.recover:
        lost = f"cut off: its last {account.lost} bytes belong to no whole record" if account.lost else "whole"
        logger.info(f"{args.in_file} is {lost}")


if __name__ == "__main__":
    main()
