"""The order of training rows: grouped by length, if the user asks for it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial

import torch
from loguru import logger
from torch.utils.data import RandomSampler, Sampler, SequentialSampler
from transformers.trainer_pt_utils import get_length_grouped_indices

from stagewise.data.packing import PackedRows
from stagewise.data.statistics import StepContents, StepSize, measure, packed_step, padded_step
from stagewise.data.worker_signals import outlive_termination
from stagewise.training.evaluation_set import padded_length


class LengthGroups(Sampler[int]):
    """Every row once per epoch, shuffled, but grouped by similar length; the longest rows first.

    The order depends only on seed and epoch, so all processes, and a resumed run, have the same one; transformers' own
    LengthGroupedSampler draws from the global state of each process.
    """

    def __init__(self, lengths: Sequence[int], step_rows: int, seed: int):
        """`step_rows`: rows of one optimizer step over all processes, which should have similar lengths."""
        self.lengths, self.step_rows, self.seed, self.epoch = list(lengths), step_rows, seed, 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.lengths)

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.seed + self.epoch)
        return iter(get_length_grouped_indices(self.lengths, self.step_rows, generator=generator))


class GroupsByLength:
    """Mixin for a Trainer whose rows are examples or pairs: makes --train_sampling_strategy group_by_length work.

    transformers finds lengths only in rows that are dictionaries, or in a column of a dataset.
    """

    def _get_train_sampler(self, train_dataset=None):
        rows = self.train_dataset if train_dataset is None else train_dataset
        if self.args.train_sampling_strategy != "group_by_length":
            return super()._get_train_sampler(train_dataset)
        if isinstance(rows, PackedRows):
            logger.info("--train_sampling_strategy group_by_length: packed rows are full already; random order")
            return RandomSampler(rows)
        args = self.args
        seed = args.seed if args.data_seed is None else args.data_seed
        step_rows = args.train_batch_size * args.gradient_accumulation_steps * args.world_size
        return LengthGroups([padded_length(row) for row in rows], step_rows, seed)

    def get_train_dataloader(self):
        """transformers' own, except that a signal to all processes does not end the workers of
        --dataloader_num_workers.
        """
        loader = super().get_train_dataloader()
        if self.args.dataloader_num_workers:
            own = getattr(loader, "base_dataloader", loader)  # accelerate's wrapper iterates over the inner loader
            own.worker_init_fn = partial(outlive_termination, before=own.worker_init_fn)
        return loader

    def step_contents(self) -> StepContents:
        """The contents of an optimizer step."""
        rows, size = self.train_dataset, StepSize.of(self.args, self.args.world_size)
        if not isinstance(rows, PackedRows):
            return padded_step(measure(rows), size)
        return packed_step(measure(rows.examples), len(rows), rows.capacity, size)

    def _get_eval_sampler(self, eval_dataset):
        """In order: a ValidationSet is sorted by length."""
        return SequentialSampler(eval_dataset)
