"""transformers' TrainingArguments with this project's defaults, and the flags among them that have to be set or
refused before anything is read.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from loguru import logger
from transformers import TrainingArguments
from transformers.trainer_utils import IntervalStrategy

from stagewise.artifacts.manifest import read_manifest
from stagewise.config.arguments import VIRTUAL_TOKENS, AdapterArguments, DataArguments, ModelArguments, RunArguments
from stagewise.config.command_line import Given
from stagewise.config.flags import NO
from stagewise.config.stages import STAGES
from stagewise.errors import ArgumentError
from stagewise.models.attention.rope import check_continued

USER_LOGGING_DIR = os.environ.get("TENSORBOARD_LOGGING_DIR")


@dataclass
class StageArguments(RunArguments, TrainingArguments):
    """transformers' TrainingArguments with this project's defaults and a few additions for every stage."""

    def __post_init__(self):
        self.started = time.time()  # before the run's processes meet: anything written later belongs to this run
        self.check()
        if self.gradient_checkpointing_kwargs is None:
            self.gradient_checkpointing_kwargs = {"use_reentrant": False}
        if str(self.resume_from_checkpoint).lower() in (*NO, "none", ""):
            self.resume_from_checkpoint = None
        if isinstance(self.report_to, str):
            self.report_to = [name.strip() for name in self.report_to.split(",")]
        # transformers 5 takes the folder of TensorBoard's files only from the environment
        self.logging_dir = self.logging_dir or USER_LOGGING_DIR or os.path.join(self.output_dir, "logs")
        if os.path.isfile(self.logging_dir):
            raise ArgumentError(f"--logging_dir {self.logging_dir}: is a file; give a folder")
        os.environ["TENSORBOARD_LOGGING_DIR"] = self.logging_dir
        super().__post_init__()


def is_yes(given: Given, flag: str) -> bool:
    """Whether a boolean flag is given as true; the last one counts."""
    words = dict(given).get(flag, ["no"])
    return not words or words[0].lower() not in NO


def device_flags(given: Given) -> Given:
    """Adds flags that make the same command run without an accelerator, including DeepSpeed."""
    if torch.accelerator.is_available() and not is_yes(given, "use_cpu"):
        return given
    if is_yes(given, "fp16"):
        raise ArgumentError("--fp16: needs a GPU; on a CPU use --bf16 or neither")
    if is_yes(given, "use_liger_kernel"):
        raise ArgumentError("--use_liger_kernel: needs a GPU; leave it out on a CPU")
    names = dict(given)
    distributed = int(os.environ.get("WORLD_SIZE", "1")) > 1
    if "deepspeed" not in names:
        extra = [] if is_yes(given, "use_cpu") else [("use_cpu", ["True"])]
        return [*given, *extra, *([("ddp_backend", ["gloo"])] if distributed and "ddp_backend" not in names else [])]
    # DeepSpeed only starts on a CPU if accelerate's state is created first, over gloo
    from accelerate import PartialState

    os.environ.update(DS_ACCELERATOR="cpu", ACCELERATE_USE_DEEPSPEED="true")
    for name, value in (("RANK", "0"), ("WORLD_SIZE", "1"), ("LOCAL_RANK", "0"), ("MASTER_ADDR", "127.0.0.1")):
        os.environ.setdefault(name, value)
    os.environ.setdefault("MASTER_PORT", "29512")
    PartialState(cpu=False, backend="gloo")
    return [*given, ("accelerator_config", [json.dumps({"use_configured_state": True})])]


def settle_what_to_do(args: StageArguments, data: DataArguments | None, given: Given) -> None:
    """Sets --do_train and --do_eval: as given, or else train, and evaluate if there are validation records.

    `given`: the flags of the command line, by today's names.
    """
    has_validation = bool(data and (data.validation_file_dir or data.validation_split_percentage or data.dataset_name))
    between = args.eval_strategy != IntervalStrategy.NO  # for which transformers turns on --do_eval
    said_no = {name for name in ("do_train", "do_eval") if name in dict(given) and not getattr(args, name)}
    if "do_train" not in said_no and not args.do_train and (not args.do_eval or between):
        args.do_train, args.do_eval = True, has_validation and "do_eval" not in said_no
    elif said_no == {"do_train"}:
        args.do_eval = True
    if not (args.do_train or args.do_eval):
        raise ArgumentError("--do_train False and --do_eval False: nothing is left to do; leave one of them out")
    wants_eval = args.eval_strategy != IntervalStrategy.NO or args.eval_on_start
    if wants_eval and "do_eval" in dict(given) and not is_yes(given, "do_eval"):
        raise ArgumentError("--do_eval False contradicts --eval_strategy and --eval_on_start: leave one of them out")
    if args.do_train and data and not (data.train_file_dir or data.dataset_name):
        raise ArgumentError("--train_file_dir: missing; give a file or folder of training records, or --dataset_name")
    if data and not has_validation and (wants_eval or args.do_eval):
        raise ArgumentError(
            "evaluation is asked for without validation records: give --validation_file_dir or "
            "--validation_split_percentage, or leave out --do_eval, --eval_strategy and --eval_on_start"
        )


def check_eval_samples(args: StageArguments, given: bool) -> None:
    """Raises ArgumentError for an --eval_samples below 0, or that no evaluation would show."""
    if args.eval_samples < 0:
        raise ArgumentError(f"--eval_samples: expected 0 (none) or more, found {args.eval_samples}")
    if given and args.eval_samples and not args.do_eval:
        raise ArgumentError(
            "--eval_samples has no effect without evaluation: give validation records (--validation_file_dir or "
            "--validation_split_percentage), or leave it out"
        )


def settle_long_context(stage: str, parts: Sequence[Any]) -> None:
    """Checks that scaled positions match those of an adapter to continue from, and that --shift_attn has an effect."""
    model = next((part for part in parts if isinstance(part, ModelArguments)), None)
    adapter = next((part for part in parts if isinstance(part, AdapterArguments)), None)
    if not (model and adapter):
        return
    for flag in ("peft_path", "checkpoint_dir"):
        folder = next((value for part in parts if (value := getattr(part, flag, None))), None)
        if folder:
            check_continued(model, flag, folder, (read_manifest(folder) or {}).get("rope"))
    if adapter.asks("longlora_plus") and not (model.shift_attn and adapter.trains_adapter):
        missing = "without --shift_attn" if adapter.trains_adapter else "when all weights are trained"
        raise ArgumentError(f"--longlora_plus has no effect {missing}: leave it out")
    if not model.shift_attn:
        return
    if STAGES[stage].reference:
        raise ArgumentError(
            f"--shift_attn: not in {stage.upper()}, which compares the model in training with one in evaluation, "
            "where attention is full; use it in pretraining or supervised finetuning"
        )
    if adapter.method in VIRTUAL_TOKENS:
        raise ArgumentError(
            f"--shift_attn: not with {adapter.method}, whose virtual tokens stand before every row; use lora"
        )


def settle_precision(args: StageArguments, parts: Sequence[Any]) -> None:
    """Checks that mixed precision and the weights' precision are not two different 16-bit formats."""
    model = next((part for part in parts if isinstance(part, ModelArguments)), None)
    adapter = next((part for part in parts if isinstance(part, AdapterArguments)), None)
    if model and args.bf16 and model.torch_dtype == "float16":
        # commands of earlier pipelines give both; layer norms on a CPU reject the mixture
        logger.info(
            "--torch_dtype float16 with --bf16: the weights are loaded in bfloat16, the precision of the computation"
        )
        model.torch_dtype = "bfloat16"
    if not (model and adapter) or adapter.trains_adapter:
        return
    if model.torch_dtype == "auto" and not args.deepspeed:
        # a 16-bit weight does not change by updates below a few thousandths of itself; DeepSpeed keeps float32 copies
        logger.info("all weights are trained: they are loaded in float32 (--torch_dtype bfloat16 halves the memory)")
        model.torch_dtype = "float32"
    if model.torch_dtype == "float16":
        raise ArgumentError(
            "--torch_dtype float16: all weights are trained, and float16 cannot hold their gradients; "
            "use --torch_dtype float32 (with --fp16 or --bf16), or bfloat16"
        )
