"""A run's position in its training rows, counted in rows, so that a resumed run may use another step size.

    steps of 2 rows, stopped after 3    | 1 2 | 3 4 | 5 6 |
    continues in steps of 4                                  7 8 9 10 | 11 12 ||  the next epoch begins a new grid

The order of the rows depends only on seed and epoch, and process p of N gets the p-th part of every N batches: batch
size, accumulation and number of processes do not affect it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

from accelerate.data_loader import SeedableRandomSampler
from loguru import logger
from torch.utils.data import RandomSampler, Sampler
from transformers import Trainer, TrainerCallback
from transformers.trainer_utils import has_length

from stagewise.artifacts.checkpoints import trained_steps
from stagewise.training.length_grouping import LengthGroups
from stagewise.training.resume.identity import read_record, refuse


class RowPosition(NamedTuple):
    """Completed epochs, and rows of the next one."""

    epoch: int
    rows: int


START = RowPosition(0, 0)


@dataclass(frozen=True)
class Grid:
    """How the rows of an epoch are distributed over optimizer steps.

    Args:
        rows: rows of the training set.
        batch: rows of a forward pass, over all processes.
        accumulation: forward passes per step.
        drop_last: whether an incomplete last batch is dropped (--dataloader_drop_last).
    """

    rows: int
    batch: int
    accumulation: int = 1
    drop_last: bool = False

    @classmethod
    def of(cls, trainer: Trainer) -> Grid:
        args = trainer.args
        processes = 1 if args.accelerator_config.split_batches else args.world_size
        batch = trainer._train_batch_size * processes  # the size that --auto_find_batch_size has reached
        return cls(len(trainer.train_dataset), batch, args.gradient_accumulation_steps, args.dataloader_drop_last)

    @property
    def step(self) -> int:
        """Rows of an optimizer step."""
        return self.batch * self.accumulation

    def batches(self, rows: int) -> int:
        return rows // self.batch if self.drop_last else math.ceil(rows / self.batch)

    def steps(self, rows: int) -> int:
        return math.ceil(self.batches(rows) / self.accumulation)

    @property
    def an_epoch(self) -> int:
        """Steps of a full epoch."""
        return max(1, self.steps(self.rows))

    def after(self, steps: int, start: RowPosition = START) -> RowPosition:
        """The position of a run after some steps from `start`."""
        first = self.steps(self.rows - start.rows)
        if steps < first:
            return RowPosition(start.epoch, start.rows + steps * self.step)
        epochs, rest = divmod(steps - first, self.an_epoch)
        return RowPosition(start.epoch + 1 + epochs, rest * self.step)

    def left(self, place: RowPosition, epochs: float) -> int:
        """The steps from `place` to the end of a run of so many epochs; negative if that end is before it."""
        last, share = divmod(math.ceil(epochs * self.an_epoch), self.an_epoch)  # share: steps of a partial epoch
        if place.epoch < last:
            return self.steps(self.rows - place.rows) + (last - place.epoch - 1) * self.an_epoch + share
        rows = share * self.step - place.rows if place.epoch == last else -1
        return math.ceil(rows / self.step) if rows >= 0 else -1


class RowsFrom(Sampler[int]):
    """The order of another sampler, with one epoch that begins at a later row."""

    def __init__(self, sampler: Sampler[int]):
        self.sampler, self.start, self.epoch = sampler, START, 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch
        if hasattr(self.sampler, "set_epoch"):
            self.sampler.set_epoch(epoch)

    def __len__(self) -> int:
        """The rows of all other epochs."""
        return len(self.sampler)

    def __iter__(self) -> Iterator[int]:
        first = self.start.rows if self.epoch == self.start.epoch else 0
        return islice(iter(self.sampler), first, None)


class KeepsPosition:
    """Mixin for a Trainer with counted rows: a resumed run continues after the last row that was trained.

    transformers finds the position by the number of steps, which is right as long as steps have the same size.
    """

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.begun, self.begun_step = START, 0  # where this start of the run began
        self.moved = False  # whether the number of steps would give another position
        self.resumed: Path | None = None  # the checkpoint that this start continues from
        self.order: RowsFrom | None = None
        self.add_callback(EpochOfPosition(self))

    def place(self) -> dict[str, Any]:
        """The position to save in a checkpoint, for `read_position`."""
        if not has_length(self.train_dataset):
            return {}
        grid = Grid.of(self)
        place = grid.after(self.state.global_step - self.begun_step, self.begun)
        return {**place._asdict(), "rows_per_epoch": grid.rows, "rows_per_step": grid.step}

    def steps_left(self, checkpoint: Path) -> int:
        """The steps after a checkpoint up to the end of the run; negative if the checkpoint is beyond that end."""
        if self.args.max_steps > 0:
            return self.args.max_steps - trained_steps(checkpoint)
        grid = Grid.of(self)
        return grid.left(read_position(checkpoint, grid), self.args.num_train_epochs)

    def train(self, resume_from_checkpoint: str | None = None, *args: Any, **kwargs: Any):
        self.resumed = Path(resume_from_checkpoint) if resume_from_checkpoint else None
        return super().train(resume_from_checkpoint, *args, **kwargs)

    def _get_train_sampler(self, train_dataset=None):
        sampler = super()._get_train_sampler(train_dataset)
        if self.resumed is None or sampler is None:
            return sampler
        if isinstance(sampler, RandomSampler):  # accelerate would otherwise wrap it
            sampler = SeedableRandomSampler(sampler.data_source, data_seed=self.args.data_seed)
        self.order = RowsFrom(sampler)
        return self.order

    def set_initial_training_values(self, args, dataloader):
        """transformers' own, or, from a position that it would not find, the epochs and steps that are left from
        there.

        The step number continues from the checkpoint's: the optimizer has taken that many.
        """
        values = super().set_initial_training_values(args, dataloader)
        if self.resumed is None or not has_length(self.train_dataset):
            return values
        grid, step = Grid.of(self), trained_steps(self.resumed)
        place = RowPosition(step // grid.an_epoch, 0) if args.ignore_data_skip else read_position(self.resumed, grid)
        if isinstance(self.order.sampler, LengthGroups) and place.rows:
            self._check_groups(grid)
        self.begun, self.begun_step = place, step
        self.order.set_epoch(place.epoch)  # with skipped batches, accelerate only reaches its own sampler
        self.moved = not args.ignore_data_skip and (place != grid.after(step) or self._skips_too_little())
        if not self.moved:
            return values
        self.order.start = place
        _, _, examples, samples, total, batches, max_steps = values
        if args.max_steps <= 0:
            max_steps = step + grid.left(place, args.num_train_epochs)
        later = max(0, max_steps - step - grid.steps(grid.rows - place.rows))
        epochs = place.epoch + 1 + math.ceil(later / grid.an_epoch)
        then = position_to_save(self.resumed).get("rows_per_step", grid.step)
        logger.info(
            f"--per_device_train_batch_size × --gradient_accumulation_steps × processes: {grid.step} rows per step, "
            f"{then} when {self.resumed.name} was saved; continues after row {place.rows} of {grid.rows} in epoch "
            f"{place.epoch + 1}, {max_steps - step} steps are left, {max_steps} in all"
        )
        return epochs, grid.an_epoch, examples, samples, total, batches, max_steps

    def _check_groups(self, grid: Grid) -> None:
        """Raises ArgumentError if rows were grouped by length for other step sizes."""
        then = position_to_save(self.resumed).get("rows_per_step", grid.step)
        if then != grid.step:
            what = "--train_sampling_strategy group_by_length with a number of rows per step of"
            refuse(self.resumed, what, then, grid.step)

    def _skips_too_little(self) -> bool:
        """Whether transformers would skip one batch where each process had one (dispatch_batches)."""
        return bool(self.args.accelerator_config.dispatch_batches) and self.args.world_size > 1

    def _init_training_state(self, *args: Any, **kwargs: Any) -> tuple[int, int]:
        found = super()._init_training_state(*args, **kwargs)
        return (self.begun.epoch, 0) if self.moved else found  # `order` omits the rows, so no batch has to be skipped

    def _run_epoch(self, *, epoch: int, steps_in_epoch: int, num_update_steps_per_epoch: int, **kwargs: Any) -> None:
        if self.moved and epoch == self.begun.epoch:
            grid = Grid.of(self)
            rows = grid.rows - self.begun.rows
            steps_in_epoch, num_update_steps_per_epoch = grid.batches(rows), grid.steps(rows)
        super()._run_epoch(
            epoch=epoch,
            steps_in_epoch=steps_in_epoch,
            num_update_steps_per_epoch=num_update_steps_per_epoch,
            **kwargs,
        )


class EpochOfPosition(TrainerCallback):
    """The epoch in the logs of a run that resumed within one: transformers counts from its own start."""

    def __init__(self, trainer: KeepsPosition):
        self.trainer = trainer

    def on_step_end(self, args, state, control, **kwargs):
        trainer = self.trainer
        if trainer.moved and state.epoch <= trainer.begun.epoch + 1:
            place = trainer.place()
            state.epoch = place["epoch"] + place["rows"] / place["rows_per_epoch"]


def position_to_save(checkpoint: Path) -> dict[str, int]:
    return (read_record(checkpoint) or {}).get("place", {})


def read_position(checkpoint: Path, grid: Grid) -> RowPosition:
    """The position saved in a checkpoint; for older checkpoints, the one that follows from the number of steps."""
    place = position_to_save(checkpoint)
    if "epoch" not in place:
        return grid.after(trained_steps(checkpoint))
    found = RowPosition(place["epoch"], place["rows"])
    if found.rows and not grid.steps(grid.rows - found.rows):  # the rest of the epoch fills no batch
        return RowPosition(found.epoch + 1, 0)
    return found
