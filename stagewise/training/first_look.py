"""What a script can answer before torch is imported: --help, wrong flags, and missing paths.

torch and transformers take several seconds to import; a mistyped flag should not. A script calls `first_look` above
the imports that need them; the command line is parsed again later, with transformers' own classes. The checks are
those of the actual run, by the same functions where these need no torch.
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
from stagewise.models.hub import check_adapter, local_source, refuse_adapter, refuse_family
from stagewise.reports.terminal_text import print_error

ALONE = 10  # seconds after which a process that failed, and was not stopped by its launcher, is the only one that did
MODELS = ("model_name_or_path", "ref_model_name_or_path", "base_model", "reward_model_name_or_path")
TOKENIZERS = ("tokenizer_name_or_path", "tokenizer_path")
FILES = ("data_file", "text_file")


def print_error_once(text: str) -> None:
    """Prints an error in one line, once per machine.

    Processes with the same error get here at about the same time: the first of the machine prints it, and its launcher
    then stops the others, which wait so as not to end before it. One that failed alone prints its error after a while.
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
    """Ends the program if its command line is wrong: with exit code 2 for a flag, `code` for a path.

    Args:
        kinds: the script's dataclasses of flags.
        about: the script's docstring, for --help.
        stage: whether transformers' TrainingArguments are flags, too.
        texts: suffixes of the data files that the script reads; none if it reads no data.
        code: the script's exit code for errors other than wrong flags.
        argv: the command line; default `sys.argv[1:]`.
        before: changes the flags before they are read; see `parse`.
    """
    training = training_arguments() if stage else None
    if stage and training is None:
        return  # a transformers version whose source is written differently: the class itself will be used
    if training:
        kinds = [dataclasses.make_dataclass("StageArguments", [], bases=(RunArguments, training)), *kinds]
    status, given = 2, {}

    def noted(flags: Given) -> Given:
        given.update(flags := before(flags))
        return flags

    logger.disable("stagewise")  # notes about flags and files are logged when they are read for the run
    try:
        parts = parse(list(kinds), argv, before=noted, description=about)
        for part in parts:
            if isinstance(part, RunArguments):
                part.check()
        check_shared(*parts)
        for part in parts:
            if folder := getattr(part, "peft_path", None):
                _check_folder("peft_path", folder)
                check_adapter(folder, "peft_path")
        status = code
        for part in parts:
            named_checkpoint(getattr(part, "resume_from_checkpoint", None))
            _check_models(part)
            _check_files(part)
            if isinstance(part, DataArguments) and texts:
                _check_data(part, given, texts)
    except ArgumentError as error:
        print_error_once(str(error))
        raise SystemExit(status) from None
    finally:
        logger.enable("stagewise")


def look_at_models(flags: Any) -> None:
    """Ends the program with exit code 1 if `flags`, parsed by argparse, name an unusable model."""
    try:
        _check_models(flags)
    except ArgumentError as error:
        print_error_once(str(error))
        raise SystemExit(1) from None


def _check_models(part: Any) -> None:
    """Raises ArgumentError for a local model that is missing or of a refused family, and for a missing adapter."""
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
    """Raises ArgumentError for a missing file or folder."""
    for flag in FILES:
        path = getattr(part, flag, None)
        if path and not Path(path).is_file():
            raise ArgumentError(
                f"--{flag} {path}: {'is a folder; give a file' if Path(path).is_dir() else 'no such file'}"
            )
    if path := getattr(part, "test_file", None):
        find_files(path, RECORD_FILES, "--test_file")
    for folder in getattr(part, "compare", None) or ():
        _check_folder("compare", folder)
    if folder := getattr(part, "benchmark_dir", None):
        _check_folder("benchmark_dir", folder)


def _check_folder(flag: str, folder: str) -> None:
    if not Path(folder).is_dir():
        trouble = "is a file; give a directory" if Path(folder).exists() else "no such directory"
        raise ArgumentError(f"--{flag} {folder}: {trouble}")


def _check_data(data: DataArguments, given: Mapping[str, list[str]], texts: Sequence[str]) -> None:
    """Raises ArgumentError for missing data files of the splits that the run reads."""

    def says(name: str, usual: bool) -> bool:
        words = given.get(name)
        return usual if words is None else not words or words[0].lower() not in NO

    if data.train_file_dir and says("do_train", not says("do_eval", False)):
        find_sources(data.train_file_dir, data.data_weights, texts, "--train_file_dir")
    if data.validation_file_dir and says("do_eval", True):
        find_sources(data.validation_file_dir, None, texts, "--validation_file_dir")
