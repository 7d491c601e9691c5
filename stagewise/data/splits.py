"""The training and validation split: how a stage encodes them, and the encoded examples with their accounts."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from stagewise.data.block_limit import BlockLimit
from stagewise.data.cache import CacheWriter
from stagewise.data.control_tokens import count_control_tokens
from stagewise.data.encode_all import Encoder, encode_all
from stagewise.data.examples import Examples
from stagewise.data.mixture import count_shares
from stagewise.data.records import Account
from stagewise.data.split_loader import Loaded, SplitLoader
from stagewise.data.statistics import Summary, measure, summarize


@dataclass
class Splits:
    """Encoded examples of both splits and the accounts of their records; a split that is not needed stays empty."""

    train: list[Any] = field(default_factory=list)
    validation: list[Any] = field(default_factory=list)
    accounts: dict[str, Account] = field(default_factory=dict)
    summary: dict[str, Summary] = field(default_factory=dict)

    def keep_blocks(self, most: int) -> Examples:
        """Keeps the first `most` training examples: for a model that turns out, once loaded, not to be packed."""
        examples, account = self.train, self.accounts["train"]
        self.train = examples.first(most)
        kept = len({examples.where(number) for number in range(most)})
        account.leave_out("beyond --max_train_samples", account.kept - kept)
        account.kept, account.blocks_beyond = kept, account.blocks_beyond + len(examples) - most
        limits = self.summary["train"].limits
        self.summary["train"] = summarize(measure(self.train), kept, account.cut, limits)
        return self.train

    def as_dict(self) -> dict[str, Any]:
        """The accounts and summaries as run.json holds them under "data"."""
        accounts = {name: account.as_dict() for name, account in self.accounts.items()}
        return {**accounts, "summary": {name: summary.as_dict() for name, summary in self.summary.items()}}


@dataclass(frozen=True)
class Encoding:
    """How a stage turns a record into examples.

    Args:
        parse: record, where → what `encode` takes; raises RecordError.
        encode: makes examples of parsed records.
        limits: the token limits that `encode` keeps to, by the names of their flags.
        tokenizer: the tokenizer of `encode`; its control tokens in the records' text are counted.
        depends_on: what else `encode` depends on (the chat template …), for the cache.
        parse_always: call `parse` also where the cache has the examples, because it keeps something for itself.
        counts_blocks: --max_train_samples and --max_eval_samples count rows of encoded text, not records.
        packed_to: tokens of such a row of training records; None: each block of a text is a row.
    """

    parse: Callable[[dict[str, Any], str], Any]
    encode: Encoder
    limits: Mapping[str, int] = field(default_factory=dict)
    tokenizer: Any = None
    depends_on: Mapping[str, Any] = field(default_factory=dict)
    parse_always: bool = False
    counts_blocks: bool = False
    packed_to: int | None = None

    def settings(self, train: bool, validation: bool) -> dict[str, Any]:
        """Everything the encoded examples of these splits depend on, apart from the records, for the cache."""
        rows, limits = (self.counts_blocks, self.packed_to), dict(self.limits)
        own = {"tokenizer": self.tokenizer, "limits": limits, "splits": (train, validation), "rows": rows}
        return {**self.depends_on, **own}

    def block_limit(self, data: Any, split: str) -> BlockLimit | None:
        """The limit on rows of encoded text, if the sample limits of the data flags count those and one is given."""
        name = "max_train_samples" if split == "train" else "max_eval_samples"
        rows = getattr(data, name)
        if not self.counts_blocks or rows == -1:
            return None
        return BlockLimit(rows, self.packed_to if split == "train" else None, f"beyond --{name}")


def encode_splits(
    loader: SplitLoader,
    encoding: Encoding,
    train: bool,
    validation: bool,
    rejected: Path | None,
    writer: CacheWriter | None = None,
) -> Splits:
    """Loads and encodes the splits, into the cache entry of `writer` where one is given."""
    splits, held_out = Splits(), None
    if "train" in loader.splits_to_read(train, validation):
        records, account = loader.load("train", encoding.parse, rejected, encoding.counts_blocks)
        if validation and loader.data.validation_split_percentage is not None:
            records, held_out = loader.hold_out(records, account, encoding.counts_blocks)
        if train:
            splits.accounts["train"] = account
            splits.train = _encode_split(loader, encoding, "train", records, account, rejected, writer)
    if validation:
        records, account = held_out or loader.load("validation", encoding.parse, rejected, encoding.counts_blocks)
        splits.accounts["validation"] = account
        splits.validation = _encode_split(loader, encoding, "validation", records, account, rejected, writer)
    return splits


def _encode_split(
    loader: SplitLoader,
    encoding: Encoding,
    split: str,
    records: Loaded,
    account: Account,
    rejected: Path | None,
    writer: CacheWriter | None,
) -> Examples:
    examples = encode_all(
        count_control_tokens(records, account, encoding.tokenizer) if encoding.tokenizer else records,
        encoding.encode,
        account=account,
        on_bad_record=loader.data.on_bad_record,
        rejected_path=rejected,
        num_workers=loader.data.preprocessing_num_workers,
        alone=bool(writer and writer.alone),
        folder=writer and writer.folder(split),
        raw=account.again,
        description=f"encode {split}",
        quiet=loader.quiet,
        limit=encoding.block_limit(loader.data, split),
    )
    count_shares(account.sources, examples)
    return examples
