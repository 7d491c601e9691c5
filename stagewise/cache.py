"""Lists of token ids on disk, named by what they were made from: a second start of the same run reads them."""

import hashlib
import json
import os
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from loguru import logger

DATA_PATH = ("cache", "conversation", "encoding", "records", "rendering")


def cache_path(cache_dir: str | Path, *, records: Sequence[Any], **settings: Any) -> Path:
    """The cache file for `records` encoded under `settings`: tokenizer=…, template=…, and every limit by its name.

    Its name is a hash of the records' contents, of everything the tokenizer does, of the template's text, of the
    other settings as they print, and of the source code of the data path.
    """
    digest = hashlib.sha256()

    for name in DATA_PATH:
        _add(digest, (Path(__file__).parent / f"{name}.py").read_bytes())
    for name, setting in sorted(settings.items()):
        _add(digest, name.encode())
        _add(digest, _content(setting))
    for record in records:
        _add(digest, _content(record))
    return Path(cache_dir) / f"encoded-{digest.hexdigest()[:32]}.npz"


def write_cache(path: str | Path, rows: Sequence[Sequence[int]], about: dict[str, Any]) -> None:
    """Write rows of token ids (or labels) of any lengths, and what there is to say about them, whole or not at all."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.stem}.{os.getpid()}.part")
    with part.open("wb") as file:
        np.savez(
            file,
            tokens=np.concatenate([np.asarray(row, dtype=np.int32) for row in rows]),
            lengths=np.asarray([len(row) for row in rows], dtype=np.int64),
            about=np.frombuffer(json.dumps(about).encode(), dtype=np.uint8),
        )
    part.replace(path)


def read_cache(path: str | Path) -> tuple[list[list[int]], dict[str, Any]] | None:
    """The rows and the `about` that write_cache wrote, or None where there is no such file or it is damaged."""
    if not Path(path).is_file():
        return None
    try:
        with np.load(path, allow_pickle=False) as file:
            tokens, lengths, about = file["tokens"], file["lengths"], json.loads(file["about"].tobytes())
    except (ValueError, OSError, KeyError, EOFError, zipfile.BadZipFile) as error:
        logger.info(f"the cache {path} can't be read ({error}) and is made again")
        return None
    ends = np.cumsum(lengths)
    return [tokens[end - length : end].tolist() for end, length in zip(ends, lengths, strict=True)], about


def _content(part: Any) -> bytes:
    """What tells a part from others of its kind: never an address in memory, which changes with every start."""
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
