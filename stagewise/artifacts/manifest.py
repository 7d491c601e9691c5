"""run.json: a run's command, environment and results; the next stage reads its lineage there."""

from __future__ import annotations

import dataclasses
import enum
import importlib.metadata
import os
import platform
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import TrainingArguments

from stagewise.artifacts.json_files import read_object, write_durably
from stagewise.artifacts.weight_files import weight_hashes
from stagewise.errors import FileError
from stagewise.formats.json_lines import json_bytes

MANIFEST = "run.json"
ELSEWHERE = "put a sound copy in its place, or move it away: the directory then counts as one that was made elsewhere"
PACKAGES = ("torch", "transformers", "peft", "accelerate", "datasets", "trl", "deepspeed", "stagewise")


def read_manifest(folder: str | Path) -> dict[str, Any] | None:
    """The run.json of a directory, or None if there is none.

    Raises:
        FileError: it cannot be read, or is not what a run writes.
    """
    path = Path(folder) / MANIFEST
    if not path.is_file():
        return None
    manifest = read_object(path, ELSEWHERE)
    lineage = manifest.get("lineage", [])
    if not isinstance(lineage, list) or not all(isinstance(step, dict) and "stage" in step for step in lineage):
        raise FileError(f"{path}: expected a list of steps with a stage each at lineage, found others; {ELSEWHERE}")
    return manifest


def write_manifest(folder: Path, manifest: dict[str, Any], *, weights: bool = False) -> None:
    """Writes run.json; with `weights`, including the hashes of the finished weight files in the directory."""
    if weights:
        manifest = {**manifest, "files": weight_hashes(folder)}
    write_durably(folder / MANIFEST, json_bytes(manifest, indent=2))


def without_tokens(words: Sequence[str]) -> list[str]:
    """A command line without the values of access tokens."""
    kept, secret = [], False
    for word in words:
        name, equals, _ = word.partition("=")
        if secret and not word.startswith("--"):
            word = "…"
        secret = name.startswith("--") and name.endswith(("token", "token_path"))
        kept.append(f"{name}=…" if secret and equals else word)
    return kept


def given_flags(parts: Sequence[Any], names: set[str]) -> dict[str, Any]:
    """The flags given on the command line or in its file, with their values but without access tokens."""
    flags: dict[str, Any] = {}
    for part in parts:
        for f in dataclasses.fields(part):
            if (f.name in names or f"no_{f.name}" in names) and not f.name.endswith("token"):
                value = getattr(part, f.name)
                value = value.value if isinstance(value, enum.Enum) else value
                flags[f.name] = value if isinstance(value, int | float | bool | str | dict | list) else str(value)
    return flags


def effective_words(words: Sequence[str]) -> tuple[list[str], dict[str, list[str]]]:
    """A command line without flags that a later one overrides, and the overridden values by flag."""
    groups: list[list[str]] = []
    for word in words:
        if word.startswith("--") and len(word) > 2:
            groups.append([word])
        else:
            groups[-1].append(word)
    last = {group[0]: group for group in groups}
    replaced: dict[str, list[str]] = {}
    for group in groups:
        if last[group[0]] is not group and not group[0].endswith("token"):
            replaced.setdefault(group[0][2:], []).append(" ".join(group[1:]) or "True")
    kept = [word for group in groups if last[group[0]] is group for word in group]
    return without_tokens(kept), replaced


def settled_flags(given: dict[str, Any], flags: dict[str, Any]) -> dict[str, Any]:
    """The given values of flags that another flag changed."""
    return {name: value for name, value in given.items() if name in flags and flags[name] != value}


def versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def device_name(args: TrainingArguments) -> str:
    if args.device.type == "cuda":
        return torch.cuda.get_device_name(args.device)
    return f"{args.device.type} ({os.cpu_count()} cores)"


def parameters_of(model: nn.Module) -> dict[str, int]:
    """The number of parameters and of trainable ones; a byte of 4-bit weights holds two."""
    counts = {"all": 0, "trained": 0}
    for parameter in model.parameters():
        size = getattr(parameter, "ds_numel", parameter.numel())  # under ZeRO-3 only a shard is here
        size *= 2 if type(parameter).__name__ == "Params4bit" or parameter.dtype == torch.uint8 else 1
        counts["all"] += size
        counts["trained"] += size if parameter.requires_grad else 0
    return counts
