"""What a script can answer before torch has loaded: --help, flags that are wrong, and paths that lead nowhere.

torch and transformers take several seconds to import, a mistyped flag should not. A script calls `first_look` above
the imports that need them; the command line is parsed once more, with transformers' own classes, where it is used.
The checks are the ones that are made later in any case, by the same functions where these need no torch.
"""

from __future__ import annotations

import dataclasses
import os
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from loguru import logger

from stagewise.config.arguments import DataArguments, PredecessorArguments, RunArguments
from stagewise.config.checks import check_shared, named_checkpoint
from stagewise.config.command_line import Given, parse
from stagewise.config.flags import NO
from stagewise.config.transformers_flags import training_arguments
from stagewise.data.mixture import find_sources
from stagewise.data.records import find_files
from stagewise.errors import ArgumentError
from stagewise.formats.readers import RECORD_FILES
from stagewise.models.hub import check_adapter, find_adapter_config, local_source, refuse_adapter, refuse_family
from stagewise.reports.terminal_text import print_error

ALONE = 10  # seconds after which a process that failed, and was not ended by its launcher, is the only one that did
MODELS = ("model_name_or_path", "ref_model_name_or_path", "base_model", "reward_model_name_or_path")
TOKENIZERS = ("tokenizer_name_or_path", "tokenizer_path")
FILES = ("data_file", "text_file")


def say_error(text: str) -> None:
    """An error in one line, once a machine.

    Processes that fail alike come here at about the same time: the machine's first says it, and its launcher then ends
    the others while they wait, which must not end before it did. One that failed alone says so after a while.
    """
    if os.environ.get("LOCAL_RANK", "0") != "0":
        time.sleep(ALONE)
    print_error(text)


def first_look(
    kinds: Sequence[type],
    about: str | None,
    *,
    stage: bool = False,
    texts: Sequence[str] = RECORD_FILES,
    code: int = 1,
    argv: list[str] | None = None,
    before: Callable[[Given], Given] = lambda given: given,
) -> None:
    """Ends the program if its command line cannot be followed: with exit code 2 for a flag, `code` for a path.

    Args:
        kinds: the script's dataclasses of flags.
        about: the script's docstring, for --help.
        stage: whether transformers' TrainingArguments are flags, too.
        texts: endings of the data files that the script reads; none: it reads no data.
        code: the script's exit code for what is wrong beyond the flags.
        argv: the words that are looked at; default `sys.argv[1:]`.
        before: changes the flags before they are read; see `parse`.
    """
    training = training_arguments() if stage else None
    if stage and training is None:
        return  # a transformers whose source is written in another way: the class itself will tell
    if training:
        kinds = [dataclasses.make_dataclass("StageArguments", [], bases=(RunArguments, training)), *kinds]
    status, given = 2, {}

    def noted(flags: Given) -> Given:
        given.update(flags := before(flags))
        return flags

    logger.disable("stagewise")  # what is noted about flags and files is said when they are read in earnest
    try:
        parts = parse(list(kinds), argv, before=noted, description=about)
        for part in parts:
            if isinstance(part, RunArguments):
                part.check()
        check_shared(*parts)
        for part in parts:
            if folder := getattr(part, "peft_path", None):
                find_adapter_config(folder)
        status = code
        for part in parts:
            named_checkpoint(getattr(part, "resume_from_checkpoint", None))
            _check_models(part)
            _check_files(part)
            if isinstance(part, DataArguments) and texts:
                _check_data(part, given, texts)
    except ArgumentError as error:
        say_error(str(error))
        raise SystemExit(status) from None
    finally:
        logger.enable("stagewise")


def look_at_models(flags: Any) -> None:
    """Ends the program with exit code 1 if `flags`, parsed by argparse, name a model that cannot be used."""
    try:
        _check_models(flags)
    except ArgumentError as error:
        say_error(str(error))
        raise SystemExit(1) from None


def _check_models(part: Any) -> None:
    """Raises ArgumentError for a local model that is missing, or of a family that is refused, and for no adapter."""
    for flag in (*MODELS, *TOKENIZERS):
        name = getattr(part, flag, None)
        folder = local_source(name, flag) if name else None
        if folder is None:
            continue
        if flag == "model_name_or_path" and not hasattr(part, "test_file"):  # evaluation.py takes adapters, too
            refuse_adapter(folder, flag)
        if flag in MODELS:
            refuse_family(folder, flag)
    adapter = "checkpoint_dir" if isinstance(part, PredecessorArguments) else "lora_model"
    if name := getattr(part, adapter, None):
        check_adapter(name, adapter)


def _check_files(part: Any) -> None:
    """Raises ArgumentError for a file that is not there."""
    for flag in FILES:
        path = getattr(part, flag, None)
        if path and not Path(path).is_file():
            raise ArgumentError(
                f"--{flag} {path}: {'is a folder; give a file' if Path(path).is_dir() else 'no such file'}"
            )
    if path := getattr(part, "test_file", None):
        find_files(path, RECORD_FILES, "--test_file")


def _check_data(data: DataArguments, given: Mapping[str, list[str]], texts: Sequence[str]) -> None:
    """Raises ArgumentError for data files that are not there, of the splits that the run reads."""

    def says(name: str, usual: bool) -> bool:
        words = given.get(name)
        return usual if words is None else not words or words[0].lower() not in NO

    if data.train_file_dir and says("do_train", not says("do_eval", False)):
        find_sources(data.train_file_dir, data.data_weights, texts, "--train_file_dir")
    if data.validation_file_dir and says("do_eval", True):
        find_sources(data.validation_file_dir, None, texts, "--validation_file_dir")
