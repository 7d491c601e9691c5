"""Callbacks around the steps: complete checkpoints, resuming, records of an evaluation."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from loguru import logger
from torch.optim.lr_scheduler import LambdaLR
from torch.serialization import register_package
from transformers import TrainerCallback

from stagewise.artifacts.checkpoints import mark_whole, rotate, unmark
from stagewise.training.evaluation_set import EvaluationTable


def _load_on_cpu(storage: torch.UntypedStorage, location: str) -> torch.UntypedStorage | None:
    """Loads storages for "cpu:0": torch.load only knows "cpu", and accelerate numbers the CPU of each of several
    processes, which transformers before 5.23 uses for the optimizer's state.
    """
    return storage if re.fullmatch(r"cpu:\d+", location) else None


# consulted after torch's own handler for "cpu", whose priority is 10
register_package(11, lambda storage: None, _load_on_cpu)


class WholeCheckpoints(TrainerCallback):
    """Marks each checkpoint once all processes have written it, then removes old ones (--save_total_limit)."""

    def __init__(self, keep: int | None) -> None:
        self.keep = keep

    def on_save(self, args, state, control, **kwargs):
        if dist.is_initialized():
            dist.barrier()
        if args.should_save:
            mark_whole(Path(args.output_dir) / f"checkpoint-{state.global_step}")
            rotate(args.output_dir, self.keep, state.best_model_checkpoint)


class Resumes:
    """Mixin for a Trainer: a resumed run follows its own flags, and ends at its last step.

    transformers takes learning rate, weight decay and betas from the checkpoint, ignoring the flags, and a run resumed
    after its last step takes one more. DeepSpeed loads its optimizer itself and keeps the checkpoint's settings. A
    loss-based schedule (reduce_lr_on_plateau, greedy) continues from its current learning rate.
    """

    FROM_FLAGS = ("initial_lr", "weight_decay", "betas", "eps")

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is None or self.is_deepspeed_enabled:
            super()._load_optimizer_and_scheduler(checkpoint)
            return
        asked = [{k: v for k, v in group.items() if k in self.FROM_FLAGS} for group in self.optimizer.param_groups]
        rates, schedule = [group["lr"] for group in self.optimizer.param_groups], self.lr_scheduler
        try:
            super()._load_optimizer_and_scheduler(checkpoint)
        except KeyError as missing:
            if missing.args != ("lr_lambdas",):
                raise
            schedule.last_epoch = self.state.global_step  # the checkpoint had a loss-based schedule
        groups = self.optimizer.param_groups
        changes = {
            f"{name.replace('initial_lr', 'learning rate')} {value}, the checkpoint had {group[name]}": None
            for group, flags in zip(groups, asked, strict=True)
            for name, value in flags.items()
            if name in group and group[name] != value
        }
        for change in changes:
            logger.info(f"continues with {change}")
        for group, flags in zip(groups, asked, strict=True):
            group.update(flags)
        if isinstance(schedule, LambdaLR):  # the current schedule's value at this step
            schedule.base_lrs = [group["initial_lr"] for group in groups]
            for group, share in zip(groups, schedule.lr_lambdas, strict=True):
                group["lr"] = group["initial_lr"] * share(schedule.last_epoch)
            schedule._last_lr = [group["lr"] for group in groups]
            return
        for group, rate in zip(groups, rates, strict=True):
            if group.pop("initial_lr", None) is not None:  # the checkpoint had a step-based schedule
                group["lr"] = rate
            elif group["lr"] != rate:
                logger.info(f"continues with the checkpoint's learning rate {group['lr']:g}, not {rate:g}")

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> tuple[list, Any]:
        if self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True
            return [], None
        return super().get_batch_samples(*args, **kwargs)

    def _save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        """Unmarks a checkpoint that is being overwritten; it does not count until it is complete again."""
        if self.args.should_save:
            unmark(Path(self.args.output_dir) / f"checkpoint-{self.state.global_step}")
        super()._save_checkpoint(*args, **kwargs)


class IntervalsOfNow(TrainerCallback):
    """A resumed run logs, evaluates and saves as often as its flags say; transformers would use the checkpoint's
    settings.
    """

    def on_train_begin(self, args, state, control, **kwargs):
        state.compute_steps(args, state.max_steps)


class EvaluationRows(TrainerCallback):
    """Writes the numbers of each validation record to the output directory (--save_eval_records)."""

    def __init__(self, table: EvaluationTable) -> None:
        self.table = table

    def on_evaluate(self, args, state, control, **kwargs):
        if args.should_save:
            self.table.write(Path(args.output_dir) / "eval_records" / f"step-{state.global_step}.jsonl")
