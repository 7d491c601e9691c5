"""From the data flags to encoded training and validation examples: load, encode or read from the cache, report."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from pathlib import Path

from loguru import logger

from stagewise.config.arguments import DataArguments
from stagewise.data.bad_records import too_long_line
from stagewise.data.control_tokens import control_line
from stagewise.data.records import Account
from stagewise.data.split_cache import encode_or_read_cache
from stagewise.data.split_loader import SplitLoader
from stagewise.data.splits import Encoding, Splits
from stagewise.data.statistics import counted, measure, summarize


def read_splits(loader: SplitLoader, encoding: Encoding, *, train: bool, validation: bool) -> Splits:
    """Records → parsed → encoded examples, from the cache of --cache_dir where it has them; logs the account.

    Args:
        loader: reads the records.
        encoding: what becomes of them.
        train: whether training records are needed.
        validation: the same for validation records.

    Raises:
        ArgumentError, RecordError: naming the flag, or the file and line.
    """
    if loader.rejected and loader.is_first:
        loader.rejected.unlink(missing_ok=True)
    splits, encoded_here = encode_or_read_cache(loader, encoding, train, validation)
    if encoding.parse_always and not encoded_here:
        for split in loader.splits_to_read(train, validation):
            deque(loader.load(split, encoding.parse, None, encoding.counts_blocks)[0], maxlen=0)
    log_splits(splits, loader.data, encoding.limits)
    return splits


def log_splits(splits: Splits, data: DataArguments, limits: Mapping[str, int]) -> None:
    """Logs the account of each split and sums up its examples, in `splits.summary`, too."""
    folders = [path and Path(path).resolve() for path in (data.train_file_dir, data.validation_file_dir)]
    if folders[0] and folders[0] == folders[1] and splits.train and splits.validation:
        logger.warning("--validation_file_dir is --train_file_dir: validation numbers are of trained records")
    for name, account in splits.accounts.items():
        left_out = sum(account.left_out.values())
        logger.info(
            f"{name}: {account.read} records read, {account.kept} kept, {left_out} left out, {account.cut} cut short"
        )
        if account.blocks_beyond:
            logger.info(f"{name}: {beyond_line(account, name)}")
        for line in filter(None, (too_long_line(account.left_out, account.kept, limits), control_line(account))):
            logger.info(f"{name}: {line}")
        if examples := getattr(splits, name):
            splits.summary[name] = summarize(measure(examples), account.kept, account.cut, limits)
            for line in splits.summary[name].lines():
                logger.info(f"{name}: {line}")


def beyond_line(account: Account, split: str) -> str:
    """How many blocks of encoded text lie beyond the sample limit, as a line."""
    flag = "--max_train_samples" if split == "train" else "--max_eval_samples"
    blocks = counted(account.blocks_beyond, "block", "blocks")
    counts = "rows of --block_size tokens, not texts" if split == "train" else "blocks, not texts"
    return f"{blocks} more of the encoded texts not used: {flag} counts {counts}"
