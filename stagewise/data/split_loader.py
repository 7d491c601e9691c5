"""The records of the training and validation split that the data flags name, parsed, with an account of each split."""

from __future__ import annotations

import os
import random
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

from loguru import logger

from stagewise.config.arguments import DataArguments, ModelArguments
from stagewise.data.mixture import Drawn, InOrder, Source, find_sources, load_sources
from stagewise.data.records import Account, Records, dataset_fingerprints, dataset_splits, read_dataset
from stagewise.errors import ArgumentError

T = TypeVar("T")
Loaded = InOrder[T] | Drawn[T]
VALIDATION_NAMES = ("validation", "valid", "dev", "eval", "test")


class SplitLoader:
    """Finds and parses the records of a split.

    Args:
        data: the data flags.
        model: the model flags, for the hub's token and the cache folder.
        args: the stage's own: `output_dir`, where rejected.jsonl is written (--on_bad_record skip) unless `dry_run`
            (eval_rejected.jsonl if the run only evaluates, which leaves the training run's alone); `seed`, of the
            shuffle behind --validation_split_percentage; `data_seed`, of the draw of --data_weights; `started`, a
            time before the run's processes met.
        suffixes: endings of the files that this stage reads.
    """

    def __init__(self, data: DataArguments, model: ModelArguments, args: Any, suffixes: Sequence[str]):
        self.data, self.cache_dir, self.suffixes = data, model.cache_dir, suffixes
        self.hub = {"cache_dir": model.cache_dir, "token": model.hf_hub_token}
        self.seed, self.data_seed = args.seed, args.seed if args.data_seed is None else args.data_seed
        self.quiet = getattr(args, "quiet", False)  # tools have no such flag
        self.started = getattr(args, "started", time.time())
        name = "rejected.jsonl" if args.do_train else "eval_rejected.jsonl"
        self.rejected = None if args.dry_run else Path(args.output_dir) / name
        self.is_first = os.environ.get("RANK", "0") == "0"  # the process of the run that writes `rejected`
        if data.overwrite_cache and not model.cache_dir:
            logger.info("--overwrite_cache: without --cache_dir nothing is cached that it could overwrite")

    def splits_to_read(self, train: bool, validation: bool) -> list[str]:
        """The splits whose records are read: "train" also where only its held-out share is needed for validation."""
        own = self.data.validation_split_percentage is None
        return ["train"] * (train or (validation and not own)) + ["validation"] * (validation and own)

    def load(
        self, split: str, parse: Callable[[dict[str, Any], str], T], rejected: Path | None, counts_blocks: bool
    ) -> tuple[Loaded, Account]:
        """The parsed records of a split, read as they are iterated over, and their account.

        Args:
            split: "train" or "validation".
            parse: record, where → parsed record; raises RecordError.
            rejected: the file that takes the records that are left out.
            counts_blocks: the sample limits count rows of encoded text, so no limit applies to records.

        Raises:
            ArgumentError, RecordError: naming the flag, or the file and line.
        """
        data = self.data
        limit = data.max_train_samples if split == "train" else data.max_eval_samples
        if counts_blocks or (split == "train" and data.validation_split_percentage is not None):
            limit = -1  # the limit applies to encoded rows, or to what the held-out share leaves
        seen: set[bytes] | None = set() if split == "train" and data.deduplicate else None
        options = {"on_bad_record": data.on_bad_record, "rejected_path": rejected, "seen": seen}
        if sources := self.sources(split):
            return load_sources(sources, parse, limit, self.data_seed, **options)
        names = dataset_splits(data.dataset_name, data.dataset_config_name, **self.hub)
        name = split if split == "train" else next((n for n in VALIDATION_NAMES if n in names), None)
        if name is None:
            raise ArgumentError(
                f"--dataset_name {data.dataset_name}: has no validation split, only {', '.join(names)}; "
                "give --validation_split_percentage or --validation_file_dir"
            )
        source = read_dataset(data.dataset_name, data.dataset_config_name, name, **self.hub)
        records = Records(source, parse, max_samples=limit, **options)
        return InOrder([records], records.account), records.account

    def sources(self, split: str) -> list[Source]:
        """The sources that --train_file_dir or --validation_file_dir names; none if the flag is not given."""
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

    def hold_out(
        self, loaded: Loaded, account: Account, counts_blocks: bool
    ) -> tuple[Drawn[T], tuple[Drawn[T], Account]]:
        """Splits training records by --validation_split_percentage: (rest, (held-out share, its own account)).

        `account` becomes that of the rest: every record that was read counts in exactly one of the two accounts.
        """
        data = self.data
        records = loaded.counted()
        order = list(range(len(records)))
        random.Random(self.seed).shuffle(order)
        count = round(len(records) * data.validation_split_percentage / 100)
        if not 0 < count < len(records):
            raise ArgumentError(
                f"--validation_split_percentage {data.validation_split_percentage}: of {len(records)} records "
                f"{count} would be held out; give another share"
            )

        def limit(samples: int) -> int | None:
            return None if samples == -1 or counts_blocks else samples

        held = records.only(sorted(order[:count])[: limit(data.max_eval_samples)])
        rest = records.only(sorted(order[count:])[: limit(data.max_train_samples)])
        account.left_out["held out for validation"] = count
        if len(records) - count > len(rest):
            account.left_out["beyond --max_train_samples"] = len(records) - count - len(rest)
        account.kept = len(rest)
        sources = [dict(source) for source in account.sources]
        held_account = Account(read=count, kept=len(held), files=account.files, sources=sources, again=account.again)
        if count > len(held):
            held_account.left_out["beyond --max_eval_samples"] = count - len(held)
        return rest, (held, held_account)

    def identity(self, train: bool, validation: bool) -> dict[str, Any]:
        """What the records depend on, as settings of the cache entry: the sources, or the dataset, and the seeds."""
        sources = [self.sources(name) for name in self.splits_to_read(train, validation)]
        files = [path for split in sources for source in split for path in source.files]
        identity = {"files": files, "sources": sources, "seed": self.seed, "data_seed": self.data_seed}
        if self.data.dataset_name:
            names = self.data.dataset_name, self.data.dataset_config_name
            identity["dataset"] = dataset_fingerprints(*names, **self.hub)
        return identity
