"""The weight files of a model or an adapter: their names, whether they are complete, and their hashes."""

from __future__ import annotations

import functools
import os
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from stagewise.artifacts.file_hashes import ALGORITHM, hash_file, hash_files
from stagewise.artifacts.json_files import inside, read_object
from stagewise.errors import FileError

INDEX = "model.safetensors.index.json"
INDEXES = (INDEX, "pytorch_model.bin.index.json")
SINGLE = ("model.safetensors", "pytorch_model.bin")
ADAPTER = ("adapter_model.safetensors", "adapter_model.bin")
WEIGHTS = ("model*.safetensors", "pytorch_model*.bin", *ADAPTER)  # the files whose hashes a finished directory records
AGAIN = "download or copy the directory again"


def shard_names(folder: Path, index: str = INDEX) -> list[str]:
    """The files named by the index of a model directory, each once, in order; empty if there is no index.

    Raises:
        FileError: the index is broken, or names a file that is not below the directory.
    """
    path = folder / index
    if not path.exists():
        return []
    weight_map = read_object(path, AGAIN).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise FileError(f"{path}: expected an object at weight_map, the file of each tensor; {AGAIN}")
    for name in weight_map.values():
        inside(folder, name, path)
    return sorted(set(weight_map.values()))


def check_weight_files(folder: Path) -> None:
    """Checks names and headers of a model directory's weights before a library reads them; takes no time.

    Raises:
        FileError: an index is broken or names a file that is missing or elsewhere; a file is empty or truncated.
    """
    for index in INDEXES:
        for name in shard_names(folder, index):
            if not (folder / name).is_file():
                raise FileError(f"{folder / name}: no such file, which {index} names; {AGAIN}")
            check_header(folder / name)
    for name in SINGLE:
        if (folder / name).is_file():
            check_header(folder / name)


def check_header(path: Path) -> None:
    """Raises FileError for an empty weight file, and for a .safetensors file that is truncated or invalid."""
    if path.stat().st_size == 0:
        raise FileError(f"{path}: is empty; {AGAIN}")
    if path.suffix == ".safetensors":
        try:
            with safe_open(path, framework="pt"):
                pass
        except (SafetensorError, OSError) as error:
            raise FileError(f"{path}: cut short, or not a safetensors file ({error}); {AGAIN}") from error


# --- hashes ----------------------------------------------------------------------------------------------------------


def weight_hashes(folder: Path) -> dict[str, str]:
    """The hash of each weight file of a finished directory by name: "files" in its run.json."""
    paths = sorted({path for pattern in WEIGHTS for path in folder.glob(pattern) if path.is_file()})
    return {path.name: found for path, found in hash_files(paths).items()}


def check_hashes(folder: Path) -> None:
    """Compares a directory's weights with the hashes in its run.json, or in a checkpoint's whole.json.

    Configs and chat templates are not compared: they may be edited. The first process of a machine compares, and ends
    the others with it. Directories made elsewhere have no hashes and are accepted.

    Raises:
        FileError: a file is not what was saved; says what to do.
    """
    if os.environ.get("LOCAL_RANK", "0") != "0":
        return
    for account, files in (("run.json", _files_of_run), ("whole.json", _files_of_checkpoint)):
        path = folder / account
        if not path.is_file():
            continue
        for name, expected in files(read_object(path, f"{AGAIN}, or move the file away")).items():
            file = inside(folder, name, path)
            if file.is_file() and _hash(file, file.stat().st_mtime_ns, file.stat().st_size) != expected:
                raise FileError(
                    f"{file}: is not what was saved: its hash differs from the one in {path}. Make or copy the "
                    f"directory again; if you changed the weights on purpose, remove {_entry(account)}"
                )


def _files_of_run(manifest: dict[str, Any]) -> dict[str, Any]:
    files = manifest.get("files")
    return files if isinstance(files, dict) else {}


def _files_of_checkpoint(mark: dict[str, Any]) -> dict[str, Any]:
    return {
        name: about[ALGORITHM]
        for name, about in mark.items()
        if isinstance(about, dict) and ALGORITHM in about and any(fnmatchcase(name, weights) for weights in WEIGHTS)
    }


def _entry(account: str) -> str:
    return '"files" there' if account == "run.json" else "that file"


@functools.lru_cache
def _hash(path: Path, changed: int, size: int) -> str:
    """`hash_file`, cached for a file that has not changed since it was read."""
    return hash_file(path)
