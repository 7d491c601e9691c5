"""The length of a PPO run, and how a rollout is split into minibatches and updates."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from loguru import logger
from transformers import TrainingArguments

from stagewise.data.examples import Example
from stagewise.errors import ArgumentError


def settle_batches(
    args: TrainingArguments,
    given: Mapping[str, Any],
    batch_size: int,
    mini_batch_size: int | None,
    passes: int,
    rollouts: int | None,
) -> int:
    """Determines how a rollout is split into minibatches, and sets the Trainer's related flags.

    Args:
        args: the Trainer's arguments; `per_device_train_batch_size` and others are set.
        given: the flags of the command line, with their values.
        batch_size: prompts of a rollout, per process.
        mini_batch_size: --mini_batch_size; None: --per_device_train_batch_size.
        passes: passes over each rollout.
        rollouts: --rollouts.

    Returns:
        the responses of a forward pass, per process.

    Raises:
        ArgumentError: for sizes that don't fit together, and flags that would have no effect.
    """
    mini = min(args.per_device_train_batch_size, batch_size) if mini_batch_size is None else mini_batch_size
    if given.get("per_device_train_batch_size", mini) != mini:
        raise ArgumentError("--mini_batch_size and --per_device_train_batch_size are the same thing: give one of them")
    if mini < 1 or batch_size % mini:
        raise ArgumentError(f"--batch_size {batch_size}: expected a multiple of --mini_batch_size {mini}")
    if (minibatches := passes * batch_size // mini) % args.gradient_accumulation_steps:
        raise ArgumentError(f"--gradient_accumulation_steps: must divide a rollout's {minibatches} minibatches")
    if rollouts and args.max_steps > 0:
        raise ArgumentError("--rollouts and --max_steps both say how long the run is: give one of them")
    for name in ("auto_find_batch_size", "dataloader_drop_last", "dataloader_num_workers", "train_sampling_strategy"):
        if given.get(name) not in (None, False, 0, "random"):
            raise ArgumentError(f"--{name} has no effect: the batches of a rollout are made here; leave it out")
    if args.metric_for_best_model == "loss":  # set by --load_best_model_at_end; there is no validation loss here
        args.metric_for_best_model, args.greater_is_better = "reward", True
    args.per_device_train_batch_size = mini
    args.ignore_data_skip = True  # a resumed run restores its place in the prompts itself
    return mini


@dataclass(frozen=True)
class Schedule:
    """The numbers of prompts, updates and rollouts.

    Args:
        batch_size: prompts of a rollout, per process.
        mini_batch_size: responses of a forward pass, per process.
        passes: passes over each rollout.
        an_epoch: rollouts of about one pass over the prompts.
        last: rollouts of the whole run.
    """

    batch_size: int
    mini_batch_size: int
    passes: int
    an_epoch: int
    last: int

    @classmethod
    def plan(
        cls,
        args: TrainingArguments,
        batch_size: int,
        mini_batch_size: int,
        passes: int,
        rollouts: int | None,
        prompts: Sequence[Example],
    ) -> Schedule:
        """The schedule of `rollouts`, else --max_steps, else --num_train_epochs; sets `args.max_steps` accordingly.

        Raises:
            ArgumentError: a rollout takes more prompts than there are.
        """
        size, minibatches = batch_size * args.world_size, passes * batch_size // mini_batch_size
        if args.do_train and size > len(prompts):
            raise ArgumentError(f"--batch_size {batch_size}: a rollout takes {size} prompts, there are {len(prompts)}")
        updates, an_epoch = minibatches // args.gradient_accumulation_steps, max(1, math.ceil(len(prompts) / size))
        if args.max_steps > 0:
            last = math.ceil(args.max_steps / updates)
        else:
            last = rollouts or math.ceil(args.num_train_epochs * an_epoch)
            args.max_steps = last * updates
        if args.do_train:
            logger.info(
                f"schedule: {last} rollouts of {size} prompts, {updates} updates each, {args.max_steps} in all"
            )
        return cls(batch_size, mini_batch_size, passes, an_epoch, last)

    @property
    def minibatches(self) -> int:
        """Forward passes with gradients per rollout."""
        return self.passes * self.batch_size // self.mini_batch_size
