"""The splits of a run with --streaming: training records as a stream, validation records encoded before training."""

from __future__ import annotations

from loguru import logger

from stagewise.data.bad_records import check_share, too_long_line
from stagewise.data.read_splits import read_splits
from stagewise.data.split_loader import SplitLoader
from stagewise.data.splits import Encoding, Splits
from stagewise.data.statistics import measure, summarize
from stagewise.data.streaming.dataset import stream_of

# records of a stream that are summarized before training, and the limit of their tokens
FIRST, FIRST_TOKENS = 1000, 1 << 20


def read_streamed_splits(
    loader: SplitLoader, encoding: Encoding, *, train: bool, validation: bool, buffer: int
) -> Splits:
    """Splits whose training examples are read and encoded while training runs; logs an account of the first ones.

    Args:
        loader, encoding, train, validation: as for `read_splits`.
        buffer: the number of records that are shuffled among each other.

    Raises:
        ArgumentError, RecordError: naming the flag, or the file and line.
    """
    if not train:
        return read_splits(loader, encoding, train=False, validation=validation)
    data = loader.data
    stream = stream_of(
        loader.sources("train"),
        data.max_train_samples,
        encoding.parse,
        encoding.encode,
        encoding.block_limit(data, "train"),
        buffer=buffer,
        skip=data.on_bad_record == "skip",
        rejected=loader.rejected,
    )
    splits = read_splits(loader, encoding, train=False, validation=validation)
    splits.train, splits.accounts["train"] = stream, stream.account
    _log_first_records(splits, data.on_bad_record, encoding.limits)
    return splits


def _log_first_records(splits: Splits, on_bad_record: str, limits: dict[str, int]) -> None:
    examples, account, refused = splits.train.first(FIRST, FIRST_TOKENS)
    if on_bad_record == "error" and refused:
        check_share(account.left_out, account.kept, refused[0], "--train_file_dir, the first records")
    if line := too_long_line(account.left_out, account.kept, limits):
        logger.info(f"train, the first records: {line}")
    if examples:
        splits.train.measures = measure(examples)
        summary = summarize(splits.train.measures, account.kept, account.cut, limits, streamed=True)
        splits.summary["train"] = summary
        for line in summary.lines():
            logger.info(f"train, the first records: {line}")
