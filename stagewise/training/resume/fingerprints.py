"""Fingerprints that identify weights or encoded records without reading all of their bytes.

A fingerprint detects what differs between runs (another model of the same shape, other records, another order), not
deliberate manipulation.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import xxhash
from huggingface_hub import try_to_load_from_cache

from stagewise.config.arguments import ModelArguments
from stagewise.data.examples import Examples
from stagewise.data.streaming.dataset import RecordStream
from stagewise.models.hub import find_source

WHOLE = 1 << 22  # bytes of weights up to which all of them are read
SAMPLES, SAMPLE = 4096, 256  # beyond that: number and size of the samples
ROWS_WHOLE, ROWS_SAMPLES, ROWS_SAMPLE = 1 << 28, 4096, 1 << 14  # the same for a column of encoded records
OTHER_WEIGHTS = ("pytorch_model*.bin", "adapter_model.bin", "*.gguf")


def model_fingerprint(name: str, args: ModelArguments, flag: str = "model_name_or_path") -> str | None:
    """The fingerprint of the weights that a flag names: a directory (also of an adapter), or a hub model.

    Returns:
        hexadecimal digits; None if a hub's weights have not been downloaded yet.
    """
    folder = Path(find_source(name, args, flag))
    if not folder.is_dir():
        options = {"cache_dir": args.cache_dir, "revision": args.model_revision}
        config = try_to_load_from_cache(name, "config.json", **options)
        if not isinstance(config, str):
            return None
        folder = Path(config).parent
    return weights_fingerprint(folder)


def weights_fingerprint(folder: str | Path) -> str | None:
    """The fingerprint of the weights in a directory; None if it has none.

    Each tensor of safetensors files contributes its name, type, shape and samples of its bytes, so the same weights in
    other shards have the same fingerprint. Takes about 30 ms, plus the disk's time for 4096 short reads.
    """
    folder = Path(folder)
    files = sorted(folder.glob("*.safetensors")) or sorted(
        path for pattern in OTHER_WEIGHTS for path in folder.glob(pattern)
    )
    if not files:
        return None
    pieces = sorted((piece for path in files for piece in _pieces(path)), key=lambda piece: piece[:2])
    whole = sum(size for *_, size in pieces) <= WHOLE
    count = max(2, SAMPLES // max(1, len(pieces)))
    digest = xxhash.xxh3_128()
    opened = {path: open(path, "rb") for path in files}  # noqa: SIM115 closed below
    try:
        for name, about, path, start, size in pieces:
            digest.update(f"{name}\0{about}\0{size}\0".encode())
            for offset, length in _samples(size, count, SAMPLE, whole):
                opened[path].seek(start + offset)
                digest.update(opened[path].read(length))
    finally:
        for file in opened.values():
            file.close()
    return digest.hexdigest()


def records_fingerprint(examples: Any) -> str | None:
    """The fingerprint of encoded training records in their order, independent of where their files are; None for none.

    For a stream it covers the files' names and sizes, and the lengths of its first records.
    """
    digest = xxhash.xxh3_128()
    if isinstance(examples, RecordStream):
        digest.update(json.dumps([files.fingerprint() for files in examples.recipe.sources]).encode())
        if examples.measures is not None:
            digest.update(np.ascontiguousarray(examples.measures.tokens).tobytes())
            digest.update(np.ascontiguousarray(examples.measures.learned).tobytes())
        return digest.hexdigest()
    if not isinstance(examples, Examples) or not len(examples):
        return None
    digest.update(examples.kind.encode())
    for column in examples.columns_of_tokens():
        data = memoryview(np.ascontiguousarray(column)).cast("B")
        digest.update(str(len(data)).encode())
        for offset, length in _samples(len(data), ROWS_SAMPLES, ROWS_SAMPLE, len(data) <= ROWS_WHOLE):
            digest.update(data[offset : offset + length])
    return digest.hexdigest()


def text_fingerprint(text: str) -> str:
    return xxhash.xxh3_128(text.encode("utf-8", "surrogatepass")).hexdigest()


Piece = tuple[str, str, Path, int, int]  # name, type and shape, file, offset, bytes


def _pieces(path: Path) -> Iterator[Piece]:
    """The tensors of a safetensors file; a file of another format, or a damaged one, is a single piece."""
    size = path.stat().st_size
    try:
        with open(path, "rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            header = json.loads(file.read(length)) if length < size else None
        found = []
        for name, about in header.items():
            if name != "__metadata__":
                start, end = (8 + length + offset for offset in about["data_offsets"])
                if not 8 + length <= start <= end <= size:
                    raise ValueError(f"{name} lies outside of the file")
                found.append((name, f"{about['dtype']} {about['shape']}", path, start, end - start))
    except (struct.error, ValueError, AttributeError, KeyError, TypeError):
        found = [(path.name, "", path, 0, size)]  # the error is raised when the file is loaded
    yield from found


def _samples(size: int, count: int, length: int, whole: bool) -> Iterable[tuple[int, int]]:
    """Offsets and lengths of `count` samples, evenly spaced from the first byte to the last; or of all bytes."""
    if whole or size <= count * length:
        return [(0, size)]
    return [((size - length) * number // (count - 1), length) for number in range(count)]
