"""Writes the tables of flags in docs/arguments.md and docs/arguments_zh.md from what the code says.

    python -m tools.document_flags

A table stands between `<!-- flags NAME -->` and `<!-- end -->`; NAME is a dataclass of flags, or one of `LISTS`. What
stands outside is written by hand. The Chinese words are in `tools/flag_texts.py`, found by the English ones: a help
text that changed ends this program until its translation does too.
"""

from __future__ import annotations

import dataclasses
import enum
import importlib
import inspect
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from unittest import mock

from transformers.hf_argparser import HfArgumentParser

from stagewise.arguments import ALWAYS_SO, NOT_YET, OPTIMIZERS, RENAMED
from stagewise.settings import StageArguments
from tools.flag_texts import CHINESE, COMMON

STAGES = {
    "pretraining": "PT",
    "supervised_finetuning": "SFT",
    "reward_modeling": "RM",
    "ppo_training": "PPO",
    "dpo_training": "DPO",
}
MERGE = "merge_peft_adapter"
DOCUMENTS = {"en": Path("docs/arguments.md"), "zh": Path("docs/arguments_zh.md")}
COLUMNS = {
    "flags": {"en": ("flag", "default", "what it does"), "zh": ("参数", "默认值", "作用")},
    "renamed": {"en": ("name of earlier pipelines", "today"), "zh": ("早期流程中的名称", "今天的名称")},
    "dropped": {"en": ("flag", "taken and left out, because"), "zh": ("参数", "接受但略去,因为")},
    "refused": {"en": ("flag", "what to do today"), "zh": ("参数", "今天的做法")},
}
LISTS = ("TrainingArguments", "renamed", "dropped", "refused")
BLOCK = re.compile(r"(<!-- flags (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)


class FlagsError(ValueError):
    """Documents and code that do not fit together; the message says what to add."""


class _Started(Exception):
    """Carries the dataclasses that a stage gives to `start`, which is then not run."""


def dataclasses_of(script: str) -> list[type]:
    """The dataclasses whose fields are the flags of a stage script, StageArguments first."""

    def started(stage: str, types: Sequence[type], argv: list[str] | None = None) -> None:
        raise _Started(list(types))

    module = importlib.import_module(script)
    try:
        with mock.patch.object(module, "start", started):
            module.main()
    except _Started as found:
        return [StageArguments, *found.args[0]]
    raise FlagsError(f"{script}.py: main() does not call start()")


def parsers() -> dict[str, HfArgumentParser]:
    """The parser of each stage script and of the merge script, by the script's name without .py."""
    merge = importlib.import_module(MERGE).MergeArguments
    types = {script: dataclasses_of(script) for script in STAGES} | {MERGE: [merge]}
    return {script: HfArgumentParser(found, allow_abbrev=False) for script, found in types.items()}


def groups() -> dict[str, tuple[type, list[str]]]:
    """Each dataclass by its name, with the titles of the stages that have its flags."""
    found: dict[str, tuple[type, list[str]]] = {}
    for script, title in STAGES.items():
        for kind in dataclasses_of(script):
            found.setdefault(kind.__name__, (kind, []))[1].append(title)
    found["MergeArguments"] = importlib.import_module(MERGE).MergeArguments, []
    return found


def own_fields(kind: type) -> list[dataclasses.Field]:
    """The fields that a dataclass declares itself, without those of the class that it extends."""
    return [field for field in dataclasses.fields(kind) if field.init and field.name in inspect.get_annotations(kind)]


# ------------------------------------------------------------------------------------------------------------ tables


def table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [columns, ["---"] * len(columns), *rows]
    return "".join(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in line)} |\n" for line in lines)


def default_of(field: dataclasses.Field, language: str) -> str:
    """A field's default as it is written on a command line."""
    if field.name == "output_dir" or (
        field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
    ):
        return {"en": "required", "zh": "必填"}[language]
    value: Any = field.default if field.default is not dataclasses.MISSING else field.default_factory()
    value = value.value if isinstance(value, enum.Enum) else value
    return "" if value is None else f"`{value}`"


def in_language(text: str, language: str) -> str:
    """An English text, or its translation.

    Raises:
        FlagsError: the text has no translation (any more).
    """
    if language == "en":
        return text
    if text not in CHINESE:
        raise FlagsError(f"tools/flag_texts.py: CHINESE has no translation of {text!r}")
    return CHINESE[text]


def flag_table(kind: type, language: str) -> str:
    rows = []
    for field in own_fields(kind):
        if "help" not in field.metadata:
            raise FlagsError(f"{kind.__name__}.{field.name}: has no help text")
        text = in_language(field.metadata["help"], language)
        rows.append((f"`--{field.name}`", default_of(field, language), text))
    return table(COLUMNS["flags"][language], rows)


def common_table(language: str) -> str:
    """The flags of transformers that are used most, with our words and the defaults that they have here."""
    fields = {field.name: field for field in dataclasses.fields(StageArguments)}
    own = {field.name for field in own_fields(StageArguments)}
    rows = []
    for name, texts in COMMON.items():
        if name not in fields or name in own:
            raise FlagsError(f"tools/flag_texts.py: COMMON has --{name}, which is no flag of transformers here")
        rows.append((f"`--{name}`", default_of(fields[name], language), texts[("en", "zh").index(language)]))
    return table(COLUMNS["flags"][language], rows)


def renamed_rows() -> list[tuple[str, str]]:
    rows = {old: f"`--{new}`" for old, new in RENAMED.items()}
    rows["group_by_length"] = "`--train_sampling_strategy group_by_length`"
    rows |= {f"optim {old}": f"`--optim {new}`" for old, new in OPTIMIZERS.items()}
    return [(f"`--{old}`", new) for old, new in sorted(rows.items())]


def list_table(name: str, language: str) -> str:
    if name == "TrainingArguments":
        return common_table(language)
    if name == "renamed":
        return table(COLUMNS[name][language], renamed_rows())
    texts = ALWAYS_SO if name == "dropped" else NOT_YET
    rows = [(f"`--{flag}`", in_language(text, language)) for flag, text in texts.items()]
    return table(COLUMNS[name][language], rows)


def block(name: str, language: str, known: dict[str, tuple[type, list[str]]]) -> str:
    """What stands between the two marks of one table."""
    if name in LISTS:
        return list_table(name, language)
    if name not in known:
        raise FlagsError(f"{DOCUMENTS[language]}: a table is marked {name}, which is no dataclass of flags")
    kind, stages = known[name]
    words = {"en": ("Stages: ", ", ", "."), "zh": ("用于:", "、", "。")}[language]
    who = f"{words[0]}{words[1].join(stages)}{words[2]}\n\n" if stages else ""
    return who + flag_table(kind, language)


def written(text: str, language: str) -> str:
    """A document with its tables made anew.

    Raises:
        FlagsError: a table is missing from the document, or stands there twice.
    """
    known = groups()
    marked = [match[2] for match in BLOCK.finditer(text)]
    for name in (*known, *LISTS):
        if marked.count(name) != 1:
            raise FlagsError(
                f"{DOCUMENTS[language]}: expected one table marked '<!-- flags {name} -->', found {marked.count(name)}"
            )
    return BLOCK.sub(lambda match: match[1] + block(match[2], language, known) + match[3], text)


def main() -> None:
    root = Path(__file__).resolve().parent.parent
    try:
        for language, path in DOCUMENTS.items():
            before = (root / path).read_text(encoding="utf-8")
            after = written(before, language)
            (root / path).write_text(after, encoding="utf-8")
            print(f"{path}: {'the same' if after == before else 'written'}", file=sys.stderr)
    except FlagsError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
