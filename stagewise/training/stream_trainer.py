"""--streaming in a stage: its flags, and a Trainer that takes its rows from a RecordStream and saves its position."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainingArguments
from transformers.trainer_utils import IntervalStrategy, SaveStrategy

from stagewise.config.arguments import DataArguments, LanguageModelArguments
from stagewise.data.packing import pack
from stagewise.data.statistics import Measures, StepContents, StepSize, packed_step, padded_step
from stagewise.data.streaming.dataset import RecordStream
from stagewise.errors import ArgumentError


def check_streaming(args: TrainingArguments, data: DataArguments, rows: LanguageModelArguments) -> None:
    """Raises ArgumentError for flags that --streaming needs, that it excludes, or that have no effect without it."""
    if not rows.streaming:
        default = LanguageModelArguments().shuffle_buffer
        if rows.shuffle_buffer != default:
            raise ArgumentError("--shuffle_buffer has no effect without --streaming: leave it out or add --streaming")
        return
    if rows.shuffle_buffer < 1:
        raise ArgumentError(
            f"--shuffle_buffer: expected at least 1 (the order of the files), found {rows.shuffle_buffer}"
        )
    if args.do_train and args.max_steps <= 0:
        raise ArgumentError(
            "--max_steps: missing; with --streaming the length of the files is unknown, so the number of steps has to "
            "be given (--num_train_epochs can't be counted)"
        )
    if args.do_train and not data.train_file_dir:
        raise ArgumentError("--streaming reads the files of --train_file_dir; a `datasets` set is not streamed: give "
                            "the folder of its parquet or jsonl files, or leave --streaming out")  # fmt: skip
    config = args.accelerator_config
    refused = {
        "validation_split_percentage": (
            data.validation_split_percentage is not None,
            "no share can be held out of files that are never read as a whole; give --validation_file_dir",
        ),
        "deduplicate": (
            data.deduplicate,
            "what was read before is not kept in memory; take doubles out of the files first, or --streaming out",
        ),
        "preprocessing_num_workers": (
            data.preprocessing_num_workers is not None,
            "records are encoded while training runs; --dataloader_num_workers is how many processes do that",
        ),
        "overwrite_cache": (
            data.overwrite_cache and not data.validation_file_dir,
            "the records that are streamed are not cached; leave it out",
        ),
        "train_sampling_strategy": (
            str(getattr(args.train_sampling_strategy, "value", args.train_sampling_strategy)) != "random",
            "records come in the order of the shuffle buffer; leave it out (--shuffle_buffer 1 is the files' order)",
        ),
        "save_strategy epoch": (args.save_strategy == SaveStrategy.EPOCH, "there are no epochs; use --save_steps"),
        "eval_strategy epoch": (args.eval_strategy == IntervalStrategy.EPOCH, "there are no epochs; use --eval_steps"),
        "logging_strategy epoch": (
            args.logging_strategy == IntervalStrategy.EPOCH,
            "there are no epochs; use --logging_steps",
        ),
        "dataloader_in_order False": (
            not args.dataloader_in_order,
            "the place in the files needs batches in order",
        ),
        "accelerator_config": (
            config.split_batches or config.dispatch_batches is not None,
            "split_batches and dispatch_batches have no place here: each process reads its own rows",
        ),
    }
    for flag, (given, why) in refused.items():
        if given:
            raise ArgumentError(f"--{flag}: not with --streaming: {why}")


class StreamPlaces(TrainerCallback):
    """Saves a stream's position in every checkpoint, and its account at the end."""

    def __init__(self, stream: RecordStream):
        self.stream = stream

    def on_step_end(self, args, state, control, **kwargs):
        state.epoch = state.global_step / state.max_steps  # a resumed Trainer would start again at 0

    def on_save(self, args, state, control, **kwargs):
        self.stream.save(Path(args.output_dir) / f"checkpoint-{state.global_step}")

    def on_train_end(self, args, state, control, **kwargs):
        self.stream.settle(finished=state.global_step >= state.max_steps)


def streamed_step(first: Measures, capacity: int | None, size: StepSize) -> StepContents:
    """The contents of a step, assuming all records are like the first ones: packed to `capacity`, or padded if it is
    None.
    """
    if capacity is None:
        step = padded_step(first, size)
    else:
        step = packed_step(first, len(pack(first.lengths.tolist(), capacity)), capacity, size)
    return replace(step, steps_per_epoch=None)


class TakesStreams:
    """Mixin for a Trainer whose training set may be a RecordStream."""

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        if isinstance(self.train_dataset, RecordStream):
            self.add_callback(StreamPlaces(self.train_dataset))

    def train(self, resume_from_checkpoint: str | None = None, *args: Any, **kwargs: Any):
        if isinstance(self.train_dataset, RecordStream):
            if resume_from_checkpoint and not self.args.ignore_data_skip:
                self.train_dataset.resume = Path(resume_from_checkpoint)
            self.args.ignore_data_skip = True  # the stream is at its position; the Trainer would skip that much again
        return super().train(resume_from_checkpoint, *args, **kwargs)

    def step_contents(self) -> StepContents | None:
        """The contents of a step, estimated from the first records of a stream."""
        stream = self.train_dataset
        if not isinstance(stream, RecordStream):
            return super().step_contents()
        size = StepSize.of(self.args, self.args.world_size)
        return streamed_step(stream.measures, stream.recipe.capacity, size) if stream.measures else None

    def get_train_dataloader(self):
        if not isinstance(self.train_dataset, RecordStream):
            return super().get_train_dataloader()
        return self.train_dataset.loader(self.data_collator, self.args, self._train_batch_size)
