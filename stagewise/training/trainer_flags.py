"""Flags of transformers' TrainingArguments that no stage supports, and impossible values: refused by name, before
anything is read.
"""

from __future__ import annotations

import dataclasses
import math

import torch
from transformers import Trainer, TrainingArguments, get_scheduler
from transformers.integrations import get_available_reporting_integrations
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK
from transformers.trainer_utils import IntervalStrategy

from stagewise.errors import ArgumentError

_MEASURED = "validation is measured in one way, which this would not change; leave it out"
_BATCHES = "batches hold what is needed, nothing more; leave it out"
# Flag -> why only its default is supported, and what to do.
NOT_FOLLOWED = {
    "do_predict": "no stage predicts; --do_eval evaluates on the validation records",
    "label_smoothing_factor": "no stage smooths its labels; leave it out",
    "average_tokens_across_devices": "the loss is the mean over all processes; leave it out",
    "neftune_noise_alpha": "this stage adds no noise; leave it out",
    "prediction_loss_only": _MEASURED,
    "batch_eval_metrics": _MEASURED,
    "eval_do_concat_batches": _MEASURED,
    "eval_use_gather_object": _MEASURED,
    "include_for_metrics": _MEASURED,
    "label_names": _BATCHES,
    "length_column_name": _BATCHES,
    "use_cache": "training keeps no keys and values; leave it out",
    "enable_jit_checkpoint": "SIGTERM always saves a complete checkpoint; leave it out",
    "fsdp": "not in this version. --deepspeed zero3.json splits the weights over the processes",
}
AT_LEAST_1 = ("per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps")
AT_LEAST_0 = ("learning_rate", "weight_decay", "max_grad_norm", "eval_delay", "dataloader_num_workers")
UNLISTED = ("azure_ml", "flyte")  # trackers that transformers does not check for, or not always


def check_trainer_flags(args: TrainingArguments) -> None:
    """Raises ArgumentError for a flag without effect, an impossible number, or a missing package."""
    for field in dataclasses.fields(TrainingArguments):
        default, value = field.default, getattr(args, field.name)
        default = None if default is dataclasses.MISSING else default
        if field.name in NOT_FOLLOWED and (bool(value) != bool(default) or (value and value != default)):
            said = f"--{field.name} False" if value is False else f"--{field.name}"
            raise ArgumentError(f"{said}: {NOT_FOLLOWED[field.name]}")
    if args.train_sampling_strategy == "batch_rebalance":
        raise ArgumentError("--train_sampling_strategy batch_rebalance: not in this version. Use group_by_length.")
    _check_numbers(args)
    _check_trackers(args)
    _check_optimizer(args)
    _check_schedule(args)


def _check_numbers(args: TrainingArguments) -> None:
    for names, least in ((AT_LEAST_1, 1), (AT_LEAST_0, 0)):
        for name in names:
            if not getattr(args, name) >= least:  # also excludes nan
                raise ArgumentError(f"--{name}: expected at least {least}, found {getattr(args, name)}")
    if math.isinf(args.learning_rate):
        raise ArgumentError(f"--learning_rate: expected a finite number, found {args.learning_rate}")
    for name in ("adam_beta1", "adam_beta2"):
        if not 0 <= getattr(args, name) < 1:
            raise ArgumentError(f"--{name}: expected 0 to below 1, found {getattr(args, name)}")
    if args.max_steps != -1 and args.max_steps < 1:
        raise ArgumentError(f"--max_steps: expected at least 1, or -1 (epochs count), found {args.max_steps}")
    if args.max_steps < 1 and not 0 < args.num_train_epochs < math.inf:
        raise ArgumentError(f"--num_train_epochs: expected more than 0, found {args.num_train_epochs}")
    if args.save_strategy == IntervalStrategy.STEPS and not args.save_steps > 0:
        raise ArgumentError(
            f"--save_steps: expected more than 0, found {args.save_steps}; --save_strategy no saves none"
        )
    if args.save_total_limit is not None and args.save_total_limit < 0:
        raise ArgumentError(f"--save_total_limit: expected at least 0 (all are kept), found {args.save_total_limit}")
    for name in ("seed", "data_seed"):
        if not 0 <= (getattr(args, name) or 0) < 2**32:
            raise ArgumentError(f"--{name}: expected 0 to {2**32 - 1}, found {getattr(args, name)}")


def _check_trackers(args: TrainingArguments) -> None:
    there = get_available_reporting_integrations()
    for name in args.report_to:
        if name not in INTEGRATION_TO_CALLBACK:
            raise ArgumentError(
                f"--report_to {name}: expected none, all, or some of {', '.join(INTEGRATION_TO_CALLBACK)}"
            )
        if name not in (*there, *UNLISTED):
            raise ArgumentError(f"--report_to {name}: is not installed: pip install {name}, or --report_to none")


def _check_optimizer(args: TrainingArguments) -> None:
    """Checks that the optimizer's package is installed; transformers only checks after reading the weights."""
    if args.optim_target_modules and not any(kind in args.optim for kind in ("galore", "apollo")):
        raise ArgumentError(f"--optim_target_modules has no effect on --optim {args.optim.value}: leave it out")
    try:
        Trainer.get_optimizer_cls_and_kwargs(args)
    except (ImportError, ValueError) as error:
        if "model" not in str(error):  # some need the model, which is not loaded yet
            raise ArgumentError(f"--optim {args.optim.value}: {error}") from error


def _check_schedule(args: TrainingArguments) -> None:
    """Checks that --lr_scheduler_kwargs contains what the schedule needs, and nothing else."""
    one = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=args.learning_rate)
    steps = args.max_steps if args.max_steps > 0 else 10**6
    try:
        get_scheduler(args.lr_scheduler_type, one, 0, steps, args.lr_scheduler_kwargs)
    except (TypeError, ValueError) as error:
        raise ArgumentError(
            f"--lr_scheduler_type {args.lr_scheduler_type.value}: {error}. What it takes is given as a dictionary, "
            """such as --lr_scheduler_kwargs '{"min_lr": 1e-6}'"""
        ) from error
