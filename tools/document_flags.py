"""Writes the tables of flags in docs/arguments.md, on the pages of the scripts, and in Chinese.

    python -m tools.document_flags

A table in docs/arguments.md is between `<!-- flags NAME -->` and `<!-- end -->`; NAME is a dataclass of flags, or one
of `LISTS`. A script's page has its own flags between `<!-- flags of SCRIPT -->` and `<!-- end -->`. Everything else is
written by hand. Chinese texts are in `tools/flag_texts.py`, keyed by the English ones: if a help text changes, this
program fails until its translation does, too.
"""

from __future__ import annotations

import argparse


def parser() -> argparse.ArgumentParser:
    """The parser of a program whose only flag is --help."""
    return argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )


if __name__ == "__main__":
    parser().parse_args()  # answered before torch has loaded

import dataclasses
import enum
import importlib
import inspect
import re
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from stagewise.config.arguments import RunArguments
from stagewise.config.command_line import ALWAYS_SO, NOT_YET, RENAMED, RENAMED_OPTIMIZERS
from stagewise.config.flags import Flag
from stagewise.config.flags import flags_of as flags_by_name
from stagewise.config.stages import BY_SCRIPT, STAGES
from stagewise.config.transformers_flags import MOST_USED
from stagewise.training.settings import StageArguments
from tools.flag_texts import CHINESE, TRAINING
from tools.stage_scripts import dataclasses_of

MERGE = "merge_peft_adapter"
# Scripts that use a model, and where the list of their dataclasses is.
USERS = {"inference": "inference", "evaluation": "stagewise.evaluation.arguments", "web_demo": "stagewise.web.server"}
DOCUMENTS = {"en": Path("docs/arguments.md"), "zh": Path("docs/arguments_zh.md")}
# The page that has all flags of a script, without its language.
PAGES = {
    **{script: script for script in USERS},
    **{stage.script: stage.name for stage in STAGES.values()},
}
# What a stage's page says behind its own flags.
SHARED = (
    "All other flags are shared by the stages: [Arguments](arguments.md#shared-flags).",
    "其余参数为各阶段共用：[参数](arguments_zh.md#共用参数)。",
)
# The same for the scripts that use a model.
USE_TITLES = {
    "ChatModelArguments": ("The model", "模型"),
    "SamplingArguments": ("How answers are made", "回答怎样生成"),
    "InferenceArguments": ("What is done with it", "做什么"),
    "EvaluationArguments": ("What is measured", "测量什么"),
    "PairLimits": ("A reward model's pairs", "奖励模型的偏好对"),
    "WebArguments": ("The page", "页面"),
}
COLUMNS = {
    "flags": {"en": ("flag", "default", "what it does"), "zh": ("参数", "默认值", "作用")},
    "renamed": {"en": ("name of earlier pipelines", "today"), "zh": ("早期流程中的名称", "今天的名称")},
    "dropped": {"en": ("flag", "taken and left out, because"), "zh": ("参数", "接受但略去，因为")},
    "refused": {"en": ("flag", "what to do today"), "zh": ("参数", "今天的做法")},
}
REQUIRED = {"en": "required", "zh": "必填"}
LISTS = ("TrainingArguments", "renamed", "dropped", "refused")
BLOCK = re.compile(r"(<!-- flags (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)
MEMORY_BLOCK = re.compile(r"(<!-- memory table -->\n).*?(<!-- end -->)", re.DOTALL)
MEMORY_PAGES = (Path("docs/memory_settings.md"), Path("docs/memory_settings_zh.md"))
STAGE_BLOCK = re.compile(r"(<!-- flags of (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)


class FlagsError(ValueError):
    """Documents and code do not match; the message says what to add."""


def flag_names() -> dict[str, dict[str, Flag]]:
    """The flags of each stage script and of the merge script, by the script's name without .py."""
    types = {script: dataclasses_of(script) for script in BY_SCRIPT} | {MERGE: importlib.import_module(MERGE).FLAGS}
    return {script: flags_by_name(found) for script, found in types.items()}


def groups() -> dict[str, tuple[type, list[str]]]:
    """Each dataclass by name, with the titles of the stages that have its flags."""
    found: dict[str, tuple[type, list[str]]] = {}
    for script, title in ((stage.script, stage.label) for stage in STAGES.values()):
        for kind in dataclasses_of(script):
            found.setdefault(kind.__name__, (kind, []))[1].append(title)
    found["MergeArguments"] = importlib.import_module(MERGE).MergeArguments, []
    return found


def flags_of(script: str) -> list[type]:
    """The dataclasses whose fields are the flags of a script that uses a model."""
    return importlib.import_module(USERS[script]).FLAGS


def own_fields(kind: type) -> list[dataclasses.Field]:
    """The fields that a dataclass declares itself, without inherited ones."""
    declared = inspect.get_annotations(RunArguments if issubclass(kind, RunArguments) else kind)
    return [field for field in dataclasses.fields(kind) if field.init and field.name in declared]


# ------------------------------------------------------------------------------------------------------------ tables


def table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [columns, ["---"] * len(columns), *rows]
    return "".join(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in line)} |\n" for line in lines)


def default_of(field: dataclasses.Field, language: str, kind: type) -> str:
    """The default of a field of `kind` as it would be given on a command line."""
    required = field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
    if required or (
        field.name == "output_dir" and issubclass(kind, RunArguments)
    ):  # a stage's has a default in transformers, which is not taken
        return REQUIRED[language]
    value: Any = field.default if field.default is not dataclasses.MISSING else field.default_factory()
    value = value.value if isinstance(value, enum.Enum) else value
    return "" if value in (None, [], "") else f"`{value}`"


def in_language(text: str, language: str) -> str:
    """An English text, or its translation.

    Raises:
        FlagsError: the text has no translation.
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
        rows.append((f"`--{field.name}`", default_of(field, language, kind), text))
    return table(COLUMNS["flags"][language], rows)


def common_table(language: str) -> str:
    """The most used flags of transformers, with our descriptions and defaults."""
    fields = {field.name: field for field in dataclasses.fields(StageArguments)}
    own = {field.name for field in own_fields(StageArguments)}
    rows = []
    for name, text in MOST_USED.items():
        if name not in fields or name in own or name not in TRAINING:
            raise FlagsError(f"--{name}: no flag of transformers here, or tools/flag_texts.py has no translation")
        rows.append(
            (
                f"`--{name}`",
                default_of(fields[name], language, StageArguments),
                text if language == "en" else TRAINING[name],
            )
        )
    return table(COLUMNS["flags"][language], rows)


def renamed_rows() -> list[tuple[str, str]]:
    rows = {old: f"`--{new}`" for old, new in RENAMED.items()}
    rows["group_by_length"] = "`--train_sampling_strategy group_by_length`"
    rows |= {f"optim {old}": f"`--optim {new}`" for old, new in RENAMED_OPTIMIZERS.items()}
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
    """The text between the two marks of one table."""
    if name in LISTS:
        return list_table(name, language)
    if name not in known:
        raise FlagsError(f"{DOCUMENTS[language]}: a table is marked {name}, which is no dataclass of flags")
    kind, stages = known[name]
    words = {"en": ("Stages: ", ", ", "."), "zh": ("用于：", "、", "。")}[language]
    who = f"{words[0]}{words[1].join(stages)}{words[2]}\n\n" if stages else ""
    return who + flag_table(kind, language)


def written(text: str, language: str) -> str:
    """A document with its tables regenerated.

    Raises:
        FlagsError: a table is missing from the document, or occurs twice.
    """
    known = groups()
    marked = [match[2] for match in BLOCK.finditer(text)]
    for name in (*known, *LISTS):
        if marked.count(name) != 1:
            raise FlagsError(
                f"{DOCUMENTS[language]}: expected one table marked '<!-- flags {name} -->', found {marked.count(name)}"
            )
    return BLOCK.sub(lambda match: match[1] + block(match[2], language, known) + match[3], text)


# ---------------------------------------------------------------------------------------------------- scripts' pages


def page_of(script: str, language: str) -> Path:
    return Path(f"docs/{PAGES[script]}{'' if language == 'en' else '_zh'}.md")


def stage_tables(script: str, language: str) -> str:
    """The flags that only this stage has, with a link to the shared ones; for a script that uses a model, every flag.

    Raises:
        FlagsError: a flag lacks its text.
    """
    index = ("en", "zh").index(language)
    if script in USERS:
        return titled([(USE_TITLES[kind.__name__][index], flag_table(kind, language)) for kind in flags_of(script)])
    stages = groups()
    own = [kind for kind in dataclasses_of(script) if stages[kind.__name__][1] == [BY_SCRIPT[script].label]]
    tables = [flag_table(kind, language) for kind in own if own_fields(kind)]
    return "\n" + "".join(f"{rows}\n" for rows in tables) + f"{SHARED[index]}\n\n"


def titled(parts: Sequence[tuple[str, str]]) -> str:
    """Tables, each with its title."""
    return "\n" + "\n".join(f"**{title}**\n\n{rows}" for title, rows in parts) + "\n"


def stage_page(text: str, script: str, language: str) -> str:
    """A script's page with its tables regenerated.

    Raises:
        FlagsError: the page does not have exactly one place for them.
    """
    marked = [match[2] for match in STAGE_BLOCK.finditer(text)]
    if marked != [script]:
        raise FlagsError(
            f"{page_of(script, language)}: expected one table marked '<!-- flags of {script} -->', found {marked}"
        )
    return STAGE_BLOCK.sub(lambda match: match[1] + stage_tables(script, language) + match[3], text)


def memory_page(text: str) -> str:
    """The page on memory settings with the table of benchmarks/README.md.

    Raises:
        FlagsError: the benchmarks have no such table, or the page no place for it.
    """
    measured = Path(__file__).resolve().parent.parent / "benchmarks/README.md"
    tables = re.findall(r"^\| shape \| method \|.*\n(?:\|.*\n)+", measured.read_text(encoding="utf-8"), re.MULTILINE)
    if len(tables) != 1 or len(MEMORY_BLOCK.findall(text)) != 1:
        raise FlagsError(
            f"{MEMORY_PAGES[0]}: expected one place for one table of benchmarks/README.md, found {len(tables)}"
        )
    return MEMORY_BLOCK.sub(lambda match: match[1] + tables[0] + match[2], text)


def documents() -> list[tuple[Path, Callable[[str], str]]]:
    """Every document with tables, and the function that regenerates them."""
    found: list[tuple[Path, Callable[[str], str]]] = []
    for language, path in DOCUMENTS.items():
        found.append((path, partial(written, language=language)))
        found += [
            (page_of(script, language), partial(stage_page, script=script, language=language)) for script in PAGES
        ]
    return [*found, *((path, memory_page) for path in MEMORY_PAGES)]


def main(argv: list[str] | None = None) -> None:
    parser().parse_args(argv)
    root = Path(__file__).resolve().parent.parent
    try:
        for path, renew in documents():
            before = (root / path).read_text(encoding="utf-8")
            after = renew(before)
            (root / path).write_text(after, encoding="utf-8")
            print(f"{path}: {'the same' if after == before else 'written'}", file=sys.stderr)
    except FlagsError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
