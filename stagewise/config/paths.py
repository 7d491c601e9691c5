"""Paths in flags, treated alike everywhere: relative to the working directory, with `~` and variables expanded."""

from __future__ import annotations

import argparse
import os
import re
from pathlib import Path

from stagewise.errors import ArgumentError

# Flags that take a path, or a path in place of a hub name -> whether they take several, joined by commas.
PATHS = {
    "train_file_dir": True,
    "validation_file_dir": True,
    **dict.fromkeys(
        (
            *("model_name_or_path", "tokenizer_name_or_path", "reward_model_name_or_path", "base_model"),
            *("ref_model_name_or_path",),
            *("lora_model", "tokenizer_path", "peft_path", "checkpoint_dir", "resume_from_checkpoint"),
            *("dataset_name", "data_file", "test_file", "text_file", "benchmark_dir", "compare", "rope_factors_file"),
            *("output_dir", "output_file", "logging_dir", "cache_dir"),
            *("deepspeed", "fsdp_config", "accelerator_config"),
        ),
        False,
    ),
}
VARIABLE = re.compile(r"\$(\w+)|\$\{(\w+)\}")


def expanded(path: str, where: str, several: bool = False) -> str:
    """A path with `~`, `$NAME` and `${NAME}` replaced; a path that exists as written stays as it is.

    Args:
        where: where it was given ("--output_dir"), for the error message.
        several: paths joined by commas, each of which may begin with `~`.

    Raises:
        ArgumentError: a variable is not set, or `~name` is not a user.
    """
    if path.lstrip().startswith("{") or not re.search(r"[~$]", path) or os.path.exists(path):
        return path  # the first may be JSON in place of a file's name
    if several and "," in path:
        return ",".join(expanded(part.strip(), where) for part in path.split(","))

    def of_environment(match: re.Match[str]) -> str:
        name = match[1] or match[2]
        if name not in os.environ:
            raise ArgumentError(f"{where} {path}: the environment variable {name} is not set")
        return os.environ[name]

    found = os.path.expanduser(VARIABLE.sub(of_environment, path))
    if path.startswith("~") and found == path:
        raise ArgumentError(f"{where} {path}: there is no such home directory")
    return found


def name_of(word: str) -> str:
    """The type of an argparse flag that takes a path or a hub name."""
    try:
        return expanded(word, "path")
    except ArgumentError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def path_of(word: str) -> Path:
    """The type of an argparse flag that takes a path."""
    return Path(name_of(word))
