"""From the data flags to encoded training and validation examples, with an account of every record."""

from __future__ import annotations

import os
import random
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from loguru import logger

from stagewise.artifacts.lock_file import Turn, turn
from stagewise.config.arguments import DataArguments, ModelArguments
from stagewise.data.bad_records import check_share, too_long_line
from stagewise.data.block_limit import BlockLimit
from stagewise.data.cache import CacheWriter, cache_path, copy_rejected, read_cache, write_cache
from stagewise.data.control_tokens import control_line, watched
from stagewise.data.encode_all import Encoder, encode_all
from stagewise.data.examples import Examples
from stagewise.data.mixture import Drawn, InOrder, Source, count_shares, find_sources, load_sources
from stagewise.data.records import (
    Account,
    Records,
    dataset_fingerprints,
    dataset_splits,
    read_dataset,
)
from stagewise.data.statistics import Summary, counted, measure, summarize
from stagewise.data.streaming.dataset import stream_of
from stagewise.errors import ArgumentError

T = TypeVar("T")
FIRST, FIRST_TOKENS = 1000, 1 << 20  # records of a stream that are summed up before training, and their tokens
VALIDATION_NAMES = ("validation", "valid", "dev", "eval", "test")
HEAD_START = 1.0  # seconds that the first process has for itself: the bar and the log of the one that encodes are seen


def beyond_line(account: Account, split: str) -> str:
    """How much of the encoded texts lies beyond the limit, for a person."""
    flag = "--max_train_samples" if split == "train" else "--max_eval_samples"
    blocks = counted(account.blocks_beyond, "block", "blocks")
    counts = "rows of --block_size tokens, not texts" if split == "train" else "blocks, not texts"
    return f"{blocks} more of the encoded texts not used: {flag} counts {counts}"


@dataclass
class Splits:
    """Encoded examples of both splits and what became of the records; a split that is not needed stays empty."""

    train: list[Any] = field(default_factory=list)
    validation: list[Any] = field(default_factory=list)
    accounts: dict[str, Account] = field(default_factory=dict)
    summary: dict[str, Summary] = field(default_factory=dict)

    def keep_blocks(self, most: int) -> Examples:
        """The training examples, the first `most` of them, where only the loaded model told that none are packed."""
        examples, account = self.train, self.accounts["train"]
        self.train = examples.first(most)
        kept = len({examples.where(number) for number in range(most)})
        account.leave_out("beyond --max_train_samples", account.kept - kept)
        account.kept, account.blocks_beyond = kept, account.blocks_beyond + len(examples) - most
        limits = self.summary["train"].limits
        self.summary["train"] = summarize(measure(self.train), kept, account.cut, limits)
        return self.train

    def as_dict(self) -> dict[str, Any]:
        accounts = {name: account.as_dict() for name, account in self.accounts.items()}
        return {**accounts, "summary": {name: summary.as_dict() for name, summary in self.summary.items()}}


class SplitReader:
    """Reads and encodes the records that the data flags name.

    Args:
        data: the data flags.
        model: the model flags, for the hub's token and the cache folder.
        args: the stage's own: `output_dir`, where rejected.jsonl is written (--on_bad_record skip) unless `dry_run`
            (eval_rejected.jsonl by a run that only evaluates, which leaves the training run's alone); `seed`, of the
            shuffle behind --validation_split_percentage; `data_seed`, of the draw of --data_weights; `started`, when
            the run's processes had not met yet.
        suffixes: endings of the files that this stage reads.

    With --cache_dir one process of a run encodes, or one a machine where machines share no such folder; the others
    wait for it and read the cache.
    """

    def __init__(self, data: DataArguments, model: ModelArguments, args: Any, suffixes: Sequence[str]):
        self.data, self.model, self.suffixes = data, model, suffixes
        self.seed, self.data_seed = args.seed, args.seed if args.data_seed is None else args.data_seed
        name = "rejected.jsonl" if args.do_train else "eval_rejected.jsonl"
        self.quiet = getattr(args, "quiet", False)  # tools have no such flag
        self.started = getattr(args, "started", time.time())
        self.rejected = None if args.dry_run else Path(args.output_dir) / name
        self.is_first = os.environ.get("RANK", "0") == "0"  # of the run's processes, the one that writes `rejected`
        if data.overwrite_cache and not model.cache_dir:
            logger.info("--overwrite_cache: without --cache_dir nothing is cached that it could overwrite")

    def read(
        self,
        parse: Callable[[dict[str, Any], str], T],
        encode: Encoder,
        *,
        train: bool,
        validation: bool,
        limits: Mapping[str, int] | None = None,
        parse_always: bool = False,
        stream: int | None = None,
        counts_blocks: bool = False,
        packed_to: int | None = None,
        **key: Any,
    ) -> Splits:
        """Records → parsed → encoded examples.

        Args:
            parse: record, where → what `encode` takes; raises RecordError.
            encode: makes examples of parsed records.
            train: whether training records are needed.
            validation: the same for validation records.
            limits: the token limits that `encode` keeps to, by the names of their flags.
            parse_always: call `parse` also where the cache has the examples, because it keeps something for itself.
            stream: read training records while training runs, shuffled among so many of them (--streaming).
            counts_blocks: --max_train_samples and --max_eval_samples count rows of encoded text, and not records.
            packed_to: tokens of such a row of training records; None: each block of a text is a row.
            key: what `encode` depends on beside the records (tokenizer, template, limits …), for the cache.

        Raises:
            ArgumentError, RecordError: naming the flag, or the file and line.
        """
        if self.rejected and self.is_first:
            self.rejected.unlink(missing_ok=True)
        limits = dict(limits or {})
        self.counts_blocks, self.packed_to = counts_blocks, packed_to
        self._tokenizer = key.get("tokenizer")
        streamed = self._stream(parse, encode, stream) if train and stream is not None else None
        train = train and streamed is None
        entry = None
        if train or validation:
            settings = {"limits": limits, "splits": (train, validation), "rows": (counts_blocks, packed_to)}
            entry = self._cache_entry(parse, encode, {**key, **settings})
        splits, made = self._cached(entry), False
        if splits is None:
            splits, made = self._made(entry, parse, encode, train, validation)
        if parse_always and not made:
            for split in self._needed(train, validation):
                deque(self._load(split, parse, rejected=None)[0], maxlen=0)
        self._say(splits, limits)
        if streamed is not None:
            splits.train, splits.accounts["train"] = streamed, streamed.account
            self._say_first(splits, limits)
        return splits

    def _stream(self, parse: Callable[[dict[str, Any], str], T], encode: Encoder, buffer: int):
        skip = self.data.on_bad_record == "skip"
        sources, limit = self._sources("train"), self.data.max_train_samples
        stream = stream_of(sources, limit, parse, encode, self._block_limit("train"), buffer=buffer, skip=skip,
                           rejected=self.rejected)  # fmt: skip
        return stream

    def _made(
        self,
        entry: Path | None,
        parse: Callable[[dict[str, Any], str], T],
        encode: Encoder,
        train: bool,
        validation: bool,
    ) -> tuple[Splits, bool]:
        """The splits, and whether this process encoded them; with a cache entry one process does it for all."""
        work = (parse, encode, train, validation)
        own = self.rejected if self.is_first else None
        if entry is None or self.rejected is None:  # a dry run writes nothing
            return self._prepare(*work, own), True
        with suppress(OSError):  # said where the entry can't be written
            entry.parent.mkdir(parents=True, exist_ok=True)
        if not self.is_first:
            time.sleep(HEAD_START)
        while True:
            with turn(entry.with_name(f"{entry.name}.lock"), f"the encoded data {entry}") as whose:
                if whose is Turn.UNKNOWN and not self.is_first:
                    return self._prepare(*work, own), True
                if whose is not Turn.UNKNOWN and (splits := self._cached(entry)):
                    return splits, False
                if whose is not Turn.OVER:
                    return self._written(entry, work, alone=whose is Turn.MINE), True

    def _written(self, entry: Path, work: tuple[Any, ...], alone: bool) -> Splits:
        """The splits, encoded into the cache; `alone`: no other process encodes them, on this machine at least."""
        whole = False
        with write_cache(entry, alone) as writer:
            try:
                splits = self._prepare(*work, writer.rejected, writer)
                made = {name: getattr(splits, name) for name in splits.accounts}
                writer.finish(made, {name: account.as_dict() for name, account in splits.accounts.items()})
                whole = True
            finally:
                if self.is_first or not whole:  # of an error nobody else will tell
                    copy_rejected(writer.path, self.rejected)
        return splits

    def _prepare(
        self,
        parse: Callable[[dict[str, Any], str], T],
        encode: Encoder,
        train: bool,
        validation: bool,
        rejected: Path | None,
        writer: CacheWriter | None = None,
    ) -> Splits:
        splits = Splits()
        held_out: tuple[Drawn[T], Account] | None = None
        if "train" in self._needed(train, validation):
            records, account = self._load("train", parse, rejected)
            if validation and not self._has_own_validation():
                records, held_out = self._hold_out(records, account)
            if train:
                splits.accounts["train"] = account
                splits.train = self._encode("train", records, account, encode, rejected, writer)
        if validation:
            records, account = held_out or self._load("validation", parse, rejected)
            splits.accounts["validation"] = account
            splits.validation = self._encode("validation", records, account, encode, rejected, writer)
        return splits

    def _needed(self, train: bool, validation: bool) -> list[str]:
        """Whose records are read: those of training also where a share of them is held out for validation alone."""
        own = self._has_own_validation()
        return ["train"] * (train or (validation and not own)) + ["validation"] * (validation and own)

    def _cache_entry(self, parse: Callable[..., Any], encode: Encoder, key: dict[str, Any]) -> Path | None:
        """Where --cache_dir keeps what these flags make of these files, if it does."""
        if not self.model.cache_dir:
            return None
        data = self.data
        own = ("overwrite_cache", "preprocessing_num_workers")
        flags = {name: value for name, value in vars(data).items() if name not in own}
        names = self._needed(*key["splits"])
        key["sources"] = sources = [self._sources(name) for name in names]
        key["data_seed"] = self.data_seed
        files = [path for split in sources for source in split for path in source.files]
        if data.dataset_name:
            options = {"cache_dir": self.model.cache_dir, "token": self.model.hf_hub_token}
            key["dataset"] = dataset_fingerprints(data.dataset_name, data.dataset_config_name, **options)
        code = [parse, encode, type(self)]
        return cache_path(self.model.cache_dir, files=files, code=code, flags=flags, seed=self.seed, **key)

    def _cached(self, entry: Path | None) -> Splits | None:
        """What an earlier start encoded, or with --overwrite_cache another process since this run started."""
        found = read_cache(entry, self.started if self.data.overwrite_cache else None) if entry else None
        if found is None:
            return None
        examples, accounts = found
        if self.is_first:
            copy_rejected(entry, self.rejected)
        logger.info(f"read from {entry} (--overwrite_cache encodes again)")
        return Splits(**examples, accounts={name: Account(**account) for name, account in accounts.items()})

    def _has_own_validation(self) -> bool:
        return self.data.validation_split_percentage is None

    def _load(
        self, split: str, parse: Callable[[dict[str, Any], str], T], rejected: Path | None
    ) -> tuple[InOrder[T] | Drawn[T], Account]:
        data = self.data
        limit = data.max_train_samples if split == "train" else data.max_eval_samples
        if self.counts_blocks or (split == "train" and data.validation_split_percentage is not None):
            limit = -1  # it counts what is encoded, or what is left after the split
        seen: set[bytes] | None = set() if split == "train" and data.deduplicate else None
        options = {"on_bad_record": data.on_bad_record, "rejected_path": rejected, "seen": seen}
        if sources := self._sources(split):
            return load_sources(sources, parse, limit, self.data_seed, **options)
        hub = {"cache_dir": self.model.cache_dir, "token": self.model.hf_hub_token}
        names = dataset_splits(data.dataset_name, data.dataset_config_name, **hub)
        name = split if split == "train" else next((n for n in VALIDATION_NAMES if n in names), None)
        if name is None:
            raise ArgumentError(
                f"--dataset_name {data.dataset_name}: has no validation split, only {', '.join(names)}; "
                "give --validation_split_percentage or --validation_file_dir"
            )
        source = read_dataset(data.dataset_name, data.dataset_config_name, name, **hub)
        records = Records(source, parse, max_samples=limit, **options)
        return InOrder([records], records.account), records.account

    def _sources(self, split: str) -> list[Source]:
        """What --train_file_dir or --validation_file_dir names."""
        data = self.data
        if split == "train":
            given, weights = data.train_file_dir, data.data_weights
            if weights is not None and not given:
                raise ArgumentError("--data_weights: weighs the sources of --train_file_dir, which is not given")
        else:
            given, weights = data.validation_file_dir, None
        sources = find_sources(given, weights, self.suffixes, f"--{split}_file_dir") if given else []
        if split == "validation" and any(source.weight is not None for source in sources):
            raise ArgumentError(f"--validation_file_dir {given}: all validation records count alike; leave out weight")
        return sources

    def _hold_out(self, loaded: InOrder[T] | Drawn[T], account: Account) -> tuple[Drawn[T], tuple[Drawn[T], Account]]:
        """Training records without the held-out share, and that share with an account of its own."""
        records = loaded.counted()
        order = list(range(len(records)))
        random.Random(self.seed).shuffle(order)
        count = round(len(records) * self.data.validation_split_percentage / 100)
        if not 0 < count < len(records):
            raise ArgumentError(
                f"--validation_split_percentage {self.data.validation_split_percentage}: of {len(records)} records "
                f"{count} would be held out; give another share"
            )
        held = records.only(sorted(order[:count])[: self._limit(self.data.max_eval_samples)])
        rest = records.only(sorted(order[count:])[: self._limit(self.data.max_train_samples)])
        # Each record read belongs to one of the two: trained on, held out, or beyond --max_train_samples.
        account.left_out["held out for validation"] = count
        if len(records) - count > len(rest):
            account.left_out["beyond --max_train_samples"] = len(records) - count - len(rest)
        account.kept = len(rest)
        sources = [dict(source) for source in account.sources]
        own = Account(read=count, kept=len(held), files=account.files, sources=sources, again=account.again)
        if count > len(held):
            own.left_out["beyond --max_eval_samples"] = count - len(held)
        return rest, (held, own)

    def _encode(
        self,
        split: str,
        records: InOrder[T] | Drawn[T],
        account: Account,
        encode: Encoder,
        rejected: Path | None,
        writer: CacheWriter | None,
    ) -> Examples:
        examples = encode_all(
            watched(records, account, self._tokenizer) if self._tokenizer else records,
            encode,
            account=account,
            on_bad_record=self.data.on_bad_record,
            rejected_path=rejected,
            num_workers=self.data.preprocessing_num_workers,
            alone=bool(writer and writer.alone),
            folder=writer and writer.folder(split),
            raw=account.again,
            description=f"encode {split}",
            quiet=self.quiet,
            limit=self._block_limit(split),
        )
        count_shares(account.sources, examples)
        return examples

    def _limit(self, samples: int) -> int | None:
        return None if samples == -1 or self.counts_blocks else samples

    def _block_limit(self, split: str) -> BlockLimit | None:
        name = "max_train_samples" if split == "train" else "max_eval_samples"
        rows = getattr(self.data, name)
        if not self.counts_blocks or rows == -1:
            return None
        return BlockLimit(rows, self.packed_to if split == "train" else None, f"beyond --{name}")

    def _say(self, splits: Splits, limits: dict[str, int]) -> None:
        folders = [f and Path(f).resolve() for f in (self.data.train_file_dir, self.data.validation_file_dir)]
        if folders[0] and folders[0] == folders[1] and splits.train and splits.validation:
            logger.warning("--validation_file_dir is --train_file_dir: validation numbers are of trained records")
        for name, account in splits.accounts.items():
            left_out = sum(account.left_out.values())
            logger.info(
                f"{name}: {account.read} records read, {account.kept} kept, {left_out} left out, "
                f"{account.cut} cut short"
            )
            if account.blocks_beyond:
                logger.info(f"{name}: {beyond_line(account, name)}")
            for line in filter(None, (too_long_line(account.left_out, account.kept, limits), control_line(account))):
                logger.info(f"{name}: {line}")
            if examples := getattr(splits, name):
                splits.summary[name] = summarize(measure(examples), account.kept, account.cut, limits)
                for line in splits.summary[name].lines():
                    logger.info(f"{name}: {line}")

    def _say_first(self, splits: Splits, limits: dict[str, int]) -> None:
        """Of a stream the first records are looked at before training begins."""
        examples, account, refused = splits.train.first(FIRST, FIRST_TOKENS)
        if self.data.on_bad_record == "error" and refused:
            check_share(account.left_out, account.kept, refused[0], "--train_file_dir, the first records")
        if line := too_long_line(account.left_out, account.kept, limits):
            logger.info(f"train, the first records: {line}")
        if examples:
            splits.train.measures = measure(examples)
            splits.summary["train"] = found = summarize(
                splits.train.measures, account.kept, account.cut, limits, streamed=True
            )
            for line in found.lines():
                logger.info(f"train, the first records: {line}")
