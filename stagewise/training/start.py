"""From a stage's command line to its Run: parses and checks flags, output directory and checkpoint."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from loguru import logger
from transformers import set_seed
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled

from stagewise.adapters.compatibility import check_methods
from stagewise.artifacts.checkpoints import check_resumable, resume_point
from stagewise.artifacts.manifest import effective_words, given_flags, settled_flags
from stagewise.artifacts.processes import leave_processes
from stagewise.config.arguments import AdapterArguments, DataArguments
from stagewise.config.checks import check_shared
from stagewise.config.command_line import Given, parse
from stagewise.errors import ArgumentError
from stagewise.reports.console import hide_progress_bars
from stagewise.reports.logs import set_up_logging
from stagewise.training.first_look import print_error_once
from stagewise.training.output_dir import check_output_dir, is_already_finished
from stagewise.training.preemption import Preemption
from stagewise.training.resume.identity import Identity
from stagewise.training.run import Run
from stagewise.training.settings import (
    StageArguments,
    check_eval_samples,
    device_flags,
    settle_long_context,
    settle_precision,
    settle_what_to_do,
)
from stagewise.training.trainer_flags import check_trainer_flags


def start(stage: str, dataclass_types: Sequence[type], argv: list[str] | None = None) -> tuple[Any, ...]:
    """Parses and checks the command line, prepares the device and the output directory.

    Args:
        stage: "pt", "sft", "rm", "dpo" or "ppo".
        dataclass_types: the stage's own and shared dataclasses; StageArguments is added here.

    Returns:
        the Run, then one instance for each dataclass in order. Ends the program with exit code 2 if a flag cannot be
        honored, before any weights are read.
    """
    set_up_logging()
    preemption = Preemption()
    given: Given = []

    def before(flags: Given) -> Given:
        given.extend(flags)
        return device_flags(flags)

    try:
        args, *parts = parse([StageArguments, *dataclass_types], argv, before=before)
        names = set(dict(given))
        said = given_flags([args, *parts], names)
        for part in parts:
            if isinstance(part, AdapterArguments):
                part.given = frozenset(name for name, _ in given)
        check_shared(*parts)
        data = next((part for part in parts if isinstance(part, DataArguments)), None)
        check_trainer_flags(args)
        settle_what_to_do(args, data, given)
        check_eval_samples(args, "eval_samples" in dict(given))
        settle_precision(args, parts)
        check_methods(stage, args, parts)  # first, because --peft_path sets the method
        settle_long_context(stage, parts)
        if args.dry_run and is_deepspeed_zero3_enabled():
            raise ArgumentError("--dry_run: not under ZeRO-3, whose engine is there only in training; try zero2.json")
        flags = given_flags([args, *parts], names)
        if is_already_finished(args, stage, flags):
            leave_processes(0)
            raise SystemExit(0)
        check_output_dir(args)
        identity = Identity(stage, args, parts, _resume_point(args))
        identity.check_flags()
    except ValueError as error:
        print_error_once(str(error))
        raise SystemExit(2) from error
    if torch.cuda.device_count() > 1 and "WORLD_SIZE" not in os.environ:
        # transformers would use DataParallel, which cannot split a packed row.
        args._n_gpu = 1
        logger.info(f"1 of {torch.cuda.device_count()} GPUs is used; torchrun --nproc_per_node uses them all")
    if args.quiet:
        hide_progress_bars()
    set_seed(args.seed)
    effective, replaced = effective_words([word for name, values in given for word in (f"--{name}", *values)])
    run = Run(stage, args, parts, flags, identity, preemption)
    run.note(effective=effective, replaced=replaced, settled=settled_flags(said, flags))
    return run, *parts


def _resume_point(args: StageArguments) -> Path | None:
    """The checkpoint to resume from; also sets the flag to its folder for later readers."""
    if not args.do_train or args.dry_run:
        return None
    folder = resume_point(args.output_dir, args.resume_from_checkpoint)
    args.resume_from_checkpoint = str(folder) if folder else None
    if folder:
        check_resumable(folder)
    return folder
