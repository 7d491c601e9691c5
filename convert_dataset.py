"""Turn instruction or question-and-answer data into the ShareGPT jsonl that every stage reads.

    python convert_dataset.py --in_file alpaca.json --out_file sft.jsonl --data_type alpaca --file_type json
    python convert_dataset.py --in_file faq.csv --out_file sft.jsonl --data_type qa --file_type csv

alpaca: instruction, output, and if there are any input, system, history.  qa: question, answer, and system.
"""

import argparse
import csv
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from loguru import logger

from stagewise.conversation import Message, RecordError, instruction_text, parse_conversation, parse_history
from stagewise.records import Account, Line, read_json, read_lines, write_rejected

QUESTION = ("question", "query", "prompt", "input", "instruction")
ANSWER = ("answer", "response", "output", "completion")
LATER_DATA_TYPES = ("sharegpt", "history", "preference", "text")
LATER_FILE_TYPES = ("parquet", "txt", "xlsx", "tsv")


def from_alpaca(record: dict[str, Any], where: str) -> dict[str, Any]:
    """{instruction, input?, output, system?, history?} → a ShareGPT record."""
    if not isinstance(record.get("output"), str):
        raise RecordError(where, "no answer", f'expected "output" as text, found {record.get("output")!r:.60}')
    messages = parse_history(record.get("history"), where)
    return _sharegpt(record, [*messages, Message("user", instruction_text(record, where))], record["output"])


def from_qa(record: dict[str, Any], where: str) -> dict[str, Any]:
    """{question, answer, system?} and its usual other names → a ShareGPT record."""
    texts = []
    for names in (QUESTION, ANSWER):
        found = [name for name in names if record.get(name)]
        if len(found) != 1 or not isinstance(record[found[0]], str):
            raise RecordError(where, f"no {names[0]}", f"expected exactly one of {', '.join(names)} with a text, "
                              f"found the keys {', '.join(map(str, record))}")  # fmt: skip
        texts.append(record[found[0]])
    return _sharegpt(record, [Message("user", texts[0])], texts[1])


CONVERTERS = {"alpaca": from_alpaca, "qa": from_qa}


def read_csv(path: Path, name: str) -> Iterator[Line]:
    """The rows of a csv file with a header line, streamed; "name:7" is the line on which the row ends."""
    csv.field_size_limit(min(sys.maxsize, 2**31 - 1))  # texts are longer than csv's 128 KB
    with path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.DictReader(file, strict=True)
        try:
            for row in reader:
                where = f"{name}:{reader.line_num}"
                raw = json.dumps({str(key): value for key, value in row.items()}, ensure_ascii=False)
                if None in row or None in row.values():
                    error = RecordError(where, "ragged row", f"the header has {len(reader.fieldnames or ())} columns, "
                                        "this row has another number; quote cells that hold commas")  # fmt: skip
                    yield Line(where, raw, error)
                else:
                    yield Line(where, raw, row)
        except csv.Error as error:
            raise RecordError(f"{name}:{reader.line_num}", "broken csv", f"not csv: {error}") from error
        except UnicodeDecodeError as error:
            raise RecordError(f"{name}:{reader.line_num + 1}", "wrong encoding", f"not UTF-8: {error}; save the file "
                              "as UTF-8") from error  # fmt: skip


READERS = {"json": read_json, "jsonl": read_lines, "csv": read_csv}


def convert(in_file: Path, out_file: Path, data_type: str, file_type: str, on_bad_record: str = "error") -> Account:
    """Convert `in_file` record by record; `out_file` appears when all of it is written.

    With `on_bad_record` "skip" what can't be converted goes to `out_file`.rejected.jsonl, counted by reason;
    otherwise the first raises RecordError. Raises ValueError where nothing is left.
    """
    account = Account(files=[str(in_file)])
    rejected = out_file.with_name(out_file.name + ".rejected.jsonl")
    rejected.unlink(missing_ok=True)
    out_file.parent.mkdir(parents=True, exist_ok=True)
    part = out_file.with_name(out_file.name + ".part")
    try:
        with part.open("w", encoding="utf-8") as out:
            for where, raw, value in READERS[file_type](in_file, in_file.name):
                account.read += 1
                try:
                    if isinstance(value, RecordError):
                        raise value
                    converted = CONVERTERS[data_type](value, where)
                    parse_conversation(converted, where)  # what is written must be readable by the stages
                except RecordError as error:
                    if on_bad_record == "error":
                        raise
                    account.leave_out(error.reason)
                    write_rejected(rejected, error, raw)
                    continue
                out.write(json.dumps(converted, ensure_ascii=False) + "\n")
                account.kept += 1
        if not account.kept:
            raise ValueError(f"--in_file: none of the {account.read} records of {in_file} could be converted: "
                             f"{account.left_out or 'the file is empty'}")  # fmt: skip
        part.replace(out_file)
    finally:
        part.unlink(missing_ok=True)
    return account


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line, checked; ends with a message that names the flag where something is wrong."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--in_file", required=True, type=Path)
    parser.add_argument("--out_file", required=True, type=Path)
    parser.add_argument("--data_type", required=True, help=" or ".join(CONVERTERS))
    parser.add_argument("--file_type", default="jsonl", help=" or ".join(READERS) + " (jsonl)")
    parser.add_argument("--on_bad_record", default="error", choices=("error", "skip"))
    args = parser.parse_args(argv)
    for flag, known, later in (
        ("data_type", CONVERTERS, LATER_DATA_TYPES),
        ("file_type", READERS, LATER_FILE_TYPES),
    ):
        value = getattr(args, flag)
        if value in later:
            parser.error(f"--{flag} {value} is not supported yet; today: {', '.join(known)}")
        if value not in known:
            parser.error(f"--{flag}: unknown value {value!r}; expected {', '.join(known)}")
    if not args.in_file.is_file():
        parser.error(f"--in_file: there is no file {str(args.in_file)!r}")
    if args.out_file.is_dir():
        parser.error(f"--out_file: {args.out_file} is a folder, name a file in it")
    if args.out_file.resolve() == args.in_file.resolve() or (
        args.out_file.exists() and args.out_file.samefile(args.in_file)
    ):
        parser.error(f"--out_file: {args.out_file} is the input file; write to another one")
    return args


def main(argv: list[str] | None = None) -> None:
    args = parse_arguments(argv)
    try:
        account = convert(args.in_file, args.out_file, args.data_type, args.file_type, args.on_bad_record)
    except ValueError as error:
        sys.exit(f"convert_dataset.py: {error}")
    left_out = f", {account.read - account.kept} left out: {account.left_out}" if account.left_out else ""
    logger.info(f"{account.read} records read, {account.kept} written to {args.out_file}{left_out}")


def _sharegpt(record: dict[str, Any], messages: list[Message], answer: str) -> dict[str, Any]:
    names = {"user": "human", "assistant": "gpt"}
    turns = [{"from": names[message.role], "value": message.content} for message in messages]
    converted: dict[str, Any] = {"conversations": [*turns, {"from": "gpt", "value": answer}]}
    return {"system": record["system"], **converted} if record.get("system") else converted


if __name__ == "__main__":
    main()
