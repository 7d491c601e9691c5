"""The text of --help: the script's description, then its flags under headings, each with one name."""

from __future__ import annotations

import dataclasses
import shutil
import sys
import textwrap
from collections.abc import Mapping
from pathlib import Path

from stagewise.config.arguments import RunArguments
from stagewise.config.flags import Flag
from stagewise.config.paths import PATHS
from stagewise.config.transformers_flags import MOST_USED

COLUMN = 34  # the column where help texts begin
OWN = "Of this script alone"
WORDS = {bool: "True|False", int: "N", float: "NUMBER", dict: "JSON"}
RULES = """\
Flags may come from a .yaml or .json file, given first; what follows the file overrides it. Of a flag given twice the
last one counts. A yes-or-no flag alone says True. Paths are relative to the working directory; ~ and $NAME are
expanded."""


def help_text(flags: Mapping[str, Flag], about: str | None, everything: bool = False) -> str:
    """The text of --help.

    Args:
        flags: all flags of the script.
        about: the script's docstring, shown unchanged.
        everything: also the rarely used flags of transformers, in its own words (--help all).
    """
    width = min(shutil.get_terminal_size().columns, 119)
    main = sys.modules["__main__"]
    spec = getattr(main, "__spec__", None)  # the program of `python -m`
    program = f"-m {spec.name.removesuffix('.__main__')}" if spec else Path(sys.argv[0]).name
    sections = _sections(flags, everything)
    parts = [f"usage: python {program} [flags.yaml] --flag value …", (about or "").strip(), RULES]
    for heading, found in sections.items():
        parts.append(f"{heading}:\n" + "\n".join(_lines(flag, text, width, everything) for flag, text in found))
    hidden = len(flags) - sum(map(len, sections.values()))
    if hidden:
        parts.append(f"{hidden} more flags are those of transformers' TrainingArguments: --help all lists them, too.")
    return "\n\n".join(filter(None, parts))


def _sections(flags: Mapping[str, Flag], everything: bool) -> dict[str, list[tuple[Flag, str]]]:
    """Flags and their texts by heading: the script's own first, those of transformers last."""
    own: dict[str, list[tuple[Flag, str]]] = {OWN: []}
    training: list[tuple[Flag, str]] = []
    rest: list[tuple[Flag, str]] = []
    of_run = {field.name for field in dataclasses.fields(RunArguments)}
    for flag in flags.values():
        heading = getattr(flag.owner, "heading", OWN)
        if not issubclass(flag.owner, RunArguments) or flag.name in of_run:
            own.setdefault(heading, []).append((flag, flag.help))
        elif flag.name in MOST_USED:
            training.append((flag, MOST_USED[flag.name]))
        else:
            rest.append((flag, flag.help))
    if RunArguments.heading in own:
        own[RunArguments.heading] = own.pop(RunArguments.heading)
    if training:
        own["Training"] = sorted(training, key=lambda pair: list(MOST_USED).index(pair[0].name))
    if everything and rest:
        own["Training: the other flags of transformers, in its own words"] = rest
    return {heading: found for heading, found in own.items() if found}


def _lines(flag: Flag, text: str, width: int, everything: bool) -> str:
    """One flag: its name and values, then its text in a second column."""
    takes = "PATH" if flag.name in PATHS else WORDS.get(flag.kind, "TEXT")
    if flag.choices:
        takes = "|".join(flag.choices) if len(flag.choices) <= 4 else "NAME"
    left = f"  --{flag.name} {takes}{' …' if flag.several else ''}"
    text = " ".join(text.split()).rstrip(".")
    if everything and len(flag.choices) > 4:
        text += f": {', '.join(flag.choices)}"
    if flag.required:
        text += ". Required"
    elif flag.default not in (None, False, "") and flag.default != []:
        text += f" (default: {getattr(flag.default, 'value', flag.default)})"
    lines = textwrap.wrap(f"{text}." if text else "", max(20, width - COLUMN), break_on_hyphens=False)
    gap = " " * (COLUMN - len(left))
    first = left + (gap + lines.pop(0) if len(left) + 2 <= COLUMN and lines else "")
    return "\n".join([first, *(" " * COLUMN + line for line in lines)])
