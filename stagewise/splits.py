"""From the data flags to encoded training and validation examples, with an account of every record."""

from __future__ import annotations

import os
import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from loguru import logger

from stagewise.arguments import ArgumentError, DataArguments, ModelArguments
from stagewise.cache import cache_path
from stagewise.encoding import encode_all
from stagewise.records import Account, Line, dataset_splits, find_files, load_records, read_dataset

T = TypeVar("T")
VALIDATION_NAMES = ("validation", "valid", "dev", "eval", "test")


@dataclass
class Splits:
    """Encoded examples of both splits and what became of the records; a split that is not needed stays empty."""

    train: list[Any] = field(default_factory=list)
    validation: list[Any] = field(default_factory=list)
    accounts: dict[str, Account] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        return {name: account.as_dict() for name, account in self.accounts.items()}


class SplitReader:
    """Reads and encodes the records that the data flags name.

    Args:
        data: the data flags.
        model: the model flags, for the hub's token and the cache folder.
        output_dir: where rejected.jsonl is written (--on_bad_record skip).
        seed: of the shuffle behind --validation_split_percentage.
        suffixes: endings of the files that this stage reads.
    """

    def __init__(
        self, data: DataArguments, model: ModelArguments, output_dir: str, seed: int, suffixes: Sequence[str]
    ):
        self.data, self.model, self.seed, self.suffixes = data, model, seed, suffixes
        self.rejected = Path(output_dir) / "rejected.jsonl"

    def read(
        self,
        parse: Callable[[dict[str, Any], str], T],
        encode: Callable[[T], Any],
        *,
        train: bool,
        validation: bool,
        **key: Any,
    ) -> Splits:
        """Records → parsed → encoded examples.

        Args:
            parse: record, where → what `encode` takes; raises RecordError.
            encode: parsed record → an example, (example, cut) or a list of examples; raises RecordError.
            train: whether training records are needed.
            validation: the same for validation records.
            key: what `encode` depends on beside the records (tokenizer, template, limits …), for the cache.

        Raises:
            ArgumentError, RecordError: naming the flag, or the file and line.
        """
        if os.environ.get("RANK", "0") == "0":  # the one process that writes it
            self.rejected.unlink(missing_ok=True)
        splits = Splits()
        held_out: tuple[list[T], Account] | None = None
        # A split of the training records must be made even when only one side of it is used.
        if train or (validation and not self._has_own_validation()):
            records, account = self._load("train", parse)
            if validation and not self._has_own_validation():
                records, held_out = self._hold_out(records, account)
            if train:
                splits.accounts["train"] = account
                splits.train = self._encode("train", records, account, encode, key)
        if validation:
            records, account = held_out or self._load("validation", parse)
            splits.accounts["validation"] = account
            splits.validation = self._encode("validation", records, account, encode, key)
        self._say(splits)
        return splits

    def _has_own_validation(self) -> bool:
        return self.data.validation_split_percentage is None

    def _load(self, split: str, parse: Callable[[dict[str, Any], str], T]) -> tuple[list[T], Account]:
        data = self.data
        folder = data.train_file_dir if split == "train" else data.validation_file_dir
        limit = data.max_train_samples if split == "train" else data.max_eval_samples
        if split == "train" and data.validation_split_percentage is not None:
            limit = -1  # the limit counts what is left after the split
        if folder:
            source: Iterable[Line] | list[Path] = find_files(folder, self.suffixes, f"--{split}_file_dir")
        else:
            options = {"cache_dir": self.model.cache_dir, "token": self.model.hf_hub_token}
            names = dataset_splits(data.dataset_name, data.dataset_config_name, **options)
            name = split if split == "train" else next((n for n in VALIDATION_NAMES if n in names), None)
            if name is None:
                raise ArgumentError(
                    f"--dataset_name {data.dataset_name}: has no validation split, only {', '.join(names)}; "
                    "give --validation_split_percentage or --validation_file_dir"
                )
            source = read_dataset(data.dataset_name, data.dataset_config_name, name, **options)
        return load_records(
            source, parse, on_bad_record=data.on_bad_record, rejected_path=self.rejected, max_samples=limit
        )

    def _hold_out(self, records: list[T], account: Account) -> tuple[list[T], tuple[list[T], Account]]:
        """Training records without the held-out share, and that share with an account of its own."""
        order = list(range(len(records)))
        random.Random(self.seed).shuffle(order)
        count = round(len(records) * self.data.validation_split_percentage / 100)
        if not 0 < count < len(records):
            raise ArgumentError(
                f"--validation_split_percentage {self.data.validation_split_percentage}: of {len(records)} records "
                f"{count} would be held out; give another share"
            )
        held = [records[i] for i in sorted(order[:count])][: self._limit(self.data.max_eval_samples)]
        rest = [records[i] for i in sorted(order[count:])][: self._limit(self.data.max_train_samples)]
        # Each record read belongs to one of the two: trained on, held out, or beyond --max_train_samples.
        account.left_out["held out for validation"] = count
        if len(records) - count > len(rest):
            account.left_out["beyond --max_train_samples"] = len(records) - count - len(rest)
        account.kept = len(rest)
        own = Account(read=count, kept=len(held), files=account.files)
        if count > len(held):
            own.left_out["beyond --max_eval_samples"] = count - len(held)
        return rest, (held, own)

    def _encode(self, split: str, records: list[T], account: Account, encode: Callable[[T], Any], key: dict[str, Any]):
        cache_file = cache_path(self.model.cache_dir, records=records, **key) if self.model.cache_dir else None
        return encode_all(
            records,
            encode,
            account=account,
            on_bad_record=self.data.on_bad_record,
            rejected_path=self.rejected,
            num_workers=self.data.preprocessing_num_workers,
            cache_file=cache_file,
            overwrite_cache=self.data.overwrite_cache,
            description=f"encode {split}",
        )

    @staticmethod
    def _limit(samples: int) -> int | None:
        return None if samples == -1 else samples

    def _say(self, splits: Splits) -> None:
        folders = [f and Path(f).resolve() for f in (self.data.train_file_dir, self.data.validation_file_dir)]
        if folders[0] and folders[0] == folders[1] and splits.train and splits.validation:
            logger.warning("--validation_file_dir is --train_file_dir: validation numbers are of trained records")
        for name, account in splits.accounts.items():
            left_out = sum(account.left_out.values())
            logger.info(
                f"{name}: {account.read} records read, {account.kept} kept, {left_out} left out, "
                f"{account.cut} cut short"
            )
