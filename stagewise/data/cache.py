"""Encoded records on disk, named by everything they depend on: a second run maps them into memory and parses nothing.

cache_dir/encoded-5f0c…/about.json          the accounts, written last
                        rejected.jsonl      what was left out, if anything was
                        train/ids.npy …     see stagewise/data/examples.py
"""

import hashlib
import inspect
import json
import os
import shutil
import socket
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from importlib.metadata import version
from pathlib import Path
from typing import Any

from loguru import logger

from stagewise.artifacts.json_files import inside, read_object
from stagewise.data.examples import Examples, read_examples
from stagewise.errors import ArgumentError

LIBRARIES = ("tokenizers", "transformers")
ENCODING_FOLDERS = ("chat", "data", "formats", "tokenizer")  # of the package: their code decides the encoding
VERSION = b"1"  # to be raised if the format of an entry changes for a reason outside these folders
REJECTED = "rejected.jsonl"


def cache_path(
    cache_dir: str | Path, *, files: Iterable[Path] = (), code: Iterable[Callable[..., Any]] = (), **settings: Any
) -> Path:
    """The cache entry for the records of `files` under `settings`: tokenizer=…, template=…, each limit by its name.

    Its name is a hash of the files' names and bytes, the tokenizer's behavior, the other settings as printed, and the
    source code that decides the encoding: ENCODING_FOLDERS and the modules of the functions `code`.
    """
    digest = hashlib.blake2b(digest_size=16)
    package = Path(__file__).parents[1]
    sources = {path for folder in ENCODING_FOLDERS for path in (package / folder).rglob("*.py")}
    _add(digest, VERSION)
    for function in map(_plain, code):
        _add(digest, function.__qualname__.encode())
        sources.add(Path(inspect.getfile(function)))
    for source in sorted(sources):
        _add(digest, source.read_bytes())
    for library in LIBRARIES:
        _add(digest, version(library).encode())
    for name, setting in sorted(settings.items()):
        _add(digest, name.encode())
        _add(digest, _content(setting))
    for path in files:
        _add(digest, os.fsencode(path))
        with open(path, "rb") as file:
            _add(digest, hashlib.file_digest(file, "blake2b").digest())
    return Path(cache_dir) / f"encoded-{digest.hexdigest()}"


def read_cache(path: Path, since: float | None = None) -> tuple[dict[str, Examples], dict[str, Any]] | None:
    """The entry that write_cache left at `path`, if it was written after the time `since`; None if none is complete.

    Returns:
        the examples of each split, mapped from their files, and the accounts as they were given.
    """
    about_file = path / "about.json"
    if not path.is_dir():
        return None
    try:
        if since is not None and about_file.stat().st_mtime < since:
            return None
        about = read_object(about_file, "made again")
        splits = {name: read_examples(inside(path, name, about_file), kind) for name, kind in about["kinds"].items()}
        accounts = about["accounts"]
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        logger.info(f"the cache {path} can't be read ({error}) and is made again")
        return None
    return splits, accounts


def copy_rejected(path: Path, rejected: Path | None) -> None:
    """Copies the rejected.jsonl of a finished or unfinished entry to `rejected`, if it has one."""
    if rejected and (path / REJECTED).is_file():
        rejected.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path / REJECTED, rejected)


@contextmanager
def write_cache(path: Path, alone: bool = False) -> Iterator["CacheWriter"]:
    """A new entry that appears at `path` when the block ends without an error, completely or not at all.

    Args:
        path: the entry.
        alone: whether no other process of this machine makes it: then leftovers of killed ones are removed.

    Raises ArgumentError if the folder can't be written to.
    """
    host = socket.gethostname()
    if alone:
        for left in (*path.parent.glob(f"{path.name}.{host}-*.part"), *path.parent.glob(f"{path.name}.{host}-*.old")):
            shutil.rmtree(left, ignore_errors=True)
    # Processes on machines that share the folder may have the same id.
    part, old = (path.with_name(f"{path.name}.{host}-{os.getpid()}.{kind}") for kind in ("part", "old"))
    shutil.rmtree(part, ignore_errors=True)
    try:
        part.mkdir(parents=True)
    except OSError as error:
        raise ArgumentError(
            f"--cache_dir {path.parent}: nothing can be written there ({error.strerror}); give another folder"
        ) from error
    try:
        yield CacheWriter(part, alone)
        # Another run may have written the same entry in the meantime: then that one stays; it has the same content.
        with suppress(FileNotFoundError):
            path.rename(old)  # made again, or damaged
        try:
            part.rename(path)
        except OSError:
            if not (path / "about.json").is_file():
                raise
    finally:
        shutil.rmtree(part, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)


class CacheWriter:
    """An unfinished entry: each split is encoded into its `folder`, rejected records go to `rejected`."""

    def __init__(self, path: Path, alone: bool):
        self.path, self.alone, self.rejected = path, alone, path / REJECTED

    def folder(self, split: str) -> Path:
        folder = self.path / split
        folder.mkdir(exist_ok=True)
        return folder

    def finish(self, splits: dict[str, Examples], accounts: dict[str, Any]) -> None:
        """Writes the accounts."""
        about = {"kinds": {name: examples.kind for name, examples in splits.items()}, "accounts": accounts}
        (self.path / "about.json").write_text(json.dumps(about), encoding="utf-8")


def _plain(function: Callable[..., Any]) -> Any:
    """The function or class with a source file: the class of a callable object."""
    return function if inspect.isroutine(function) or inspect.isclass(function) else type(function)


def _content(part: Any) -> bytes:
    """A representation of a setting that identifies it: never a memory address, which changes with every run."""
    if hasattr(part, "special_tokens_map"):
        backend = getattr(part, "backend_tokenizer", None)
        rules = backend.to_str() if backend is not None else repr(sorted(part.get_vocab().items()))
        text = repr((type(part).__name__, rules, sorted(part.special_tokens_map.items()), part.encode("a\n a")))
    elif hasattr(part, "jinja"):
        text = part.jinja()
    else:
        text = repr(part)
        if " at 0x" in text and type(part).__repr__ is object.__repr__:
            raise TypeError(f"a cache can't be named by {text}")
    return text.encode("utf-8", "backslashreplace")


def _add(digest: Any, data: bytes) -> None:
    digest.update(len(data).to_bytes(8, "little") + data)
