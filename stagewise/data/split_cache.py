"""Encodes the splits, or reads them from --cache_dir; of several processes one encodes for all."""

from __future__ import annotations

import time
from contextlib import suppress
from pathlib import Path

from loguru import logger

from stagewise.artifacts.lock_file import LockResult, exclusive_lock
from stagewise.data.cache import cache_path, copy_rejected, read_cache, write_cache
from stagewise.data.records import Account
from stagewise.data.split_loader import SplitLoader
from stagewise.data.splits import Encoding, Splits, encode_splits

HEAD_START = 1.0  # seconds that the first process is ahead, so that the one whose bar and log are shown encodes


def encode_or_read_cache(
    loader: SplitLoader, encoding: Encoding, train: bool, validation: bool
) -> tuple[Splits, bool]:
    """The splits, and whether this process encoded them.

    With --cache_dir one process of a run encodes, or one per machine where machines share no such folder; the others
    wait for it and read the cache.
    """
    rejected = loader.rejected if loader.is_first else None
    entry = _cache_entry(loader, encoding, train, validation) if train or validation else None
    if splits := _read(loader, entry):
        return splits, False
    if entry is None or loader.rejected is None:  # a dry run writes nothing
        return encode_splits(loader, encoding, train, validation, rejected), True
    with suppress(OSError):  # write_cache says where nothing can be written
        entry.parent.mkdir(parents=True, exist_ok=True)
    if not loader.is_first:
        time.sleep(HEAD_START)
    while True:
        with exclusive_lock(entry.with_name(f"{entry.name}.lock"), f"the encoded data {entry}") as lock:
            if lock is LockResult.UNSUPPORTED and not loader.is_first:
                return encode_splits(loader, encoding, train, validation, rejected), True
            if lock is not LockResult.UNSUPPORTED and (splits := _read(loader, entry)):
                return splits, False
            if lock is not LockResult.RELEASED:
                alone = lock is LockResult.ACQUIRED
                return _encode_into(entry, loader, encoding, train, validation, alone), True


def _encode_into(
    entry: Path, loader: SplitLoader, encoding: Encoding, train: bool, validation: bool, alone: bool
) -> Splits:
    """The splits, encoded into the cache; `alone`: no other process encodes them, on this machine at least."""
    complete = False
    with write_cache(entry, alone) as writer:
        try:
            splits = encode_splits(loader, encoding, train, validation, writer.rejected, writer)
            examples = {name: getattr(splits, name) for name in splits.accounts}
            writer.finish(examples, {name: account.as_dict() for name, account in splits.accounts.items()})
            complete = True
        finally:
            if loader.is_first or not complete:  # no other process reports an error
                copy_rejected(writer.path, loader.rejected)
    return splits


def _read(loader: SplitLoader, entry: Path | None) -> Splits | None:
    """What an earlier run encoded, or with --overwrite_cache another process since this run started."""
    cached = read_cache(entry, loader.started if loader.data.overwrite_cache else None) if entry else None
    if cached is None:
        return None
    examples, accounts = cached
    if loader.is_first:
        copy_rejected(entry, loader.rejected)
    logger.info(f"read from {entry} (--overwrite_cache encodes again)")
    return Splits(**examples, accounts={name: Account(**account) for name, account in accounts.items()})


def _cache_entry(loader: SplitLoader, encoding: Encoding, train: bool, validation: bool) -> Path | None:
    """Where --cache_dir keeps what these flags make of these files, if it does."""
    if not loader.cache_dir:
        return None
    own = ("overwrite_cache", "preprocessing_num_workers")
    flags = {name: value for name, value in vars(loader.data).items() if name not in own}
    settings = {**encoding.settings(train, validation), **loader.identity(train, validation)}
    code = [encoding.parse, encoding.encode, SplitLoader]
    return cache_path(loader.cache_dir, code=code, flags=flags, **settings)
