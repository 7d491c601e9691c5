"""A run from its start to its end: arguments, device, output directory, training, and the manifest `run.json`."""

from __future__ import annotations

import atexit
import json
import math
import os
import resource
import shutil
import sys
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from loguru import logger
from transformers import PreTrainedTokenizerBase, Trainer, TrainerCallback, set_seed
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled
from transformers.trainer_callback import PrinterCallback, ProgressCallback
from transformers.utils import logging as transformers_logging

from stagewise.adapter import method_callbacks
from stagewise.arguments import AdapterArguments, ArgumentError, DataArguments, check_shared, parse
from stagewise.callbacks import EvaluationRows, NonFiniteError, NonFiniteGuard, Preemption, Progress, WholeCheckpoints
from stagewise.checkpoint import checkpoints, resume_point
from stagewise.encoding import Example, PreferenceExample
from stagewise.manifest import MANIFEST, device_name, given_flags, read_manifest, versions, without_tokens
from stagewise.methods import check_methods
from stagewise.model import finish_generation_config
from stagewise.results import draw_curves, show_sample, write_results
from stagewise.rope import kept_rope
from stagewise.settings import (
    StageArguments,
    device_words,
    settle_long_context,
    settle_precision,
    settle_what_to_do,
)
from stagewise.validation import EvaluationTable

PREEMPTED = 143  # exit code of a run that was stopped by SIGTERM after a whole checkpoint


def is_main() -> bool:
    return int(os.environ.get("RANK", "0")) == 0


def set_up_logging() -> None:
    """The log on stderr: of the first process all, of the others errors."""
    logger.remove()
    level = "INFO" if is_main() else "ERROR"
    logger.add(sys.stderr, level=level, format="<green>{time:HH:mm:ss}</green> <level>{message}</level>")
    transformers_logging.set_verbosity_error()
    # Renamings inside transformers and PEFT, which a user of these scripts can do nothing about.
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
    if not is_main() or not sys.stderr.isatty():
        transformers_logging.disable_progress_bar()


def leave_processes(status: int) -> None:
    """Ends the group of processes where all of them have come to their end, and this process with `status`, later.

    Threads of gloo that are still there while Python ends abort the process now and then, and a finished run would
    count as failed. Once DistributedDataParallel was there they outlive the group and the model (torch 2.13). So the
    process leaves with the last of Python's exit handlers and does not wait for what comes after them.
    """
    if not (dist.is_available() and dist.is_initialized()):
        return
    has_gloo = "gloo" in dist.get_backend()
    dist.destroy_process_group()
    if has_gloo:
        _leave_with.append(status)


_leave_with: list[int] = []


def _leave() -> None:
    if _leave_with and not hasattr(sys, "last_type"):  # which an error that nothing caught has set
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(_leave_with[0])


atexit.register(_leave)  # handlers that are registered later, a tracker's for instance, run before it


def start(stage: str, dataclass_types: Sequence[type], argv: list[str] | None = None) -> tuple[Any, ...]:
    """Parses and checks the command line, prepares the device and the output directory.

    Args:
        stage: "pt", "sft", "rm", "dpo" or "ppo".
        dataclass_types: the stage's own and shared dataclasses; StageArguments is added here.

    Returns:
        the Run, then one instance for each dataclass in order. Ends the program with exit code 2 where a flag cannot
        be honoured, before any weights are read.
    """
    set_up_logging()
    given: list[str] = []

    def before(words: list[str]) -> list[str]:
        given.extend(words)
        return device_words(words)

    try:
        args, *parts = parse([StageArguments, *dataclass_types], argv, before=before)
        for part in parts:
            if isinstance(part, AdapterArguments):
                part.given = frozenset(word[2:] for word in given if word.startswith("--"))
        check_shared(*parts)
        data = next((part for part in parts if isinstance(part, DataArguments)), None)
        settle_what_to_do(args, data)
        settle_precision(args, parts)
        settle_long_context(stage, parts)
        check_methods(stage, args, parts)
        if args.dry_run and is_deepspeed_zero3_enabled():
            raise ArgumentError("--dry_run: not under ZeRO-3, whose engine is there only in training; try zero2.json")
        _check_output_dir(args)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from error
    if torch.cuda.device_count() > 1 and "WORLD_SIZE" not in os.environ:
        # transformers would use DataParallel, which cannot split a packed row.
        args._n_gpu = 1
        logger.info(f"1 of {torch.cuda.device_count()} GPUs is used; torchrun --nproc_per_node uses them all")
    set_seed(args.seed)
    flags = given_flags([args, *parts], {word[2:] for word in given if word.startswith("--")})
    return Run(stage, args, parts, flags), *parts


def _check_output_dir(args: StageArguments) -> None:
    """Raises ArgumentError if the run would write over what is there."""
    folder = Path(args.output_dir)
    if folder.is_file():
        raise ArgumentError(f"--output_dir {folder}: is a file; give a folder")
    if args.overwrite_output_dir or args.dry_run or not args.do_train:
        return
    manifest = read_manifest(folder)
    way_out = "--overwrite_output_dir replaces it, another --output_dir keeps it"
    finished = manifest is not None and manifest.get("status") == "finished"
    if args.resume_from_checkpoint and (checkpoints(folder) or not finished):
        return
    if finished:
        raise ArgumentError(f"--output_dir {folder}: holds a finished {manifest.get('stage')} run; {way_out}")
    if checkpoints(folder):
        raise ArgumentError(
            f"--output_dir {folder}: holds {checkpoints(folder)[-1].name} of a run that did not finish; "
            f"--resume_from_checkpoint True goes on from it, {way_out}"
        )
    if not manifest and any((folder / name).exists() for name in ("config.json", "adapter_config.json")):
        raise ArgumentError(f"--output_dir {folder}: holds a model that this run did not make; {way_out}")


class Run:
    """One run and its manifest. Use it as a context: an error ends up in run.json and, if expected, in one line.

    `note(key=value)` adds to the manifest; it is written at the start, at the end, and when the run fails.
    """

    def __init__(self, stage: str, args: StageArguments, parts: Sequence[Any], flags: dict[str, Any]):
        self.stage, self.args = stage, args
        self.output_dir = Path(args.output_dir)
        self.started = time.time()
        self.preemption: Preemption | None = None
        self.adapter = next((part for part in parts if isinstance(part, AdapterArguments)), None)
        base = getattr(next((p for p in parts if hasattr(p, "model_name_or_path")), None), "model_name_or_path", None)
        before = read_manifest(base) if base and Path(base).is_dir() else None
        self.manifest: dict[str, Any] = {
            "stage": stage,
            "status": "running",
            "command": [Path(sys.argv[0]).name, *without_tokens(sys.argv[1:])],
            "flags": flags,
            "base_model": base,
            "lineage": [*(before or {}).get("lineage", []), {"stage": stage, "base_model": base}],
            "versions": versions(),
            "device": device_name(args),
            "processes": args.world_size,
        }

    def note(self, **entries: Any) -> None:
        self.manifest.update(entries)

    def write(self) -> None:
        if self.args.dry_run or not is_main():
            return
        self.output_dir.mkdir(parents=True, exist_ok=True)
        temporary = self.output_dir / (MANIFEST + ".tmp")
        temporary.write_text(
            json.dumps(self.manifest, indent=2, ensure_ascii=False, default=str) + "\n", encoding="utf-8"
        )
        os.replace(temporary, self.output_dir / MANIFEST)

    def __enter__(self) -> Run:
        return self

    def __exit__(self, kind, error, trace) -> bool:
        if error is None or (isinstance(error, SystemExit) and error.code == PREEMPTED):
            leave_processes(PREEMPTED if error else 0)
        if error is None or isinstance(error, SystemExit):
            return False
        message = _out_of_memory_advice(error) if isinstance(error, torch.OutOfMemoryError) else str(error)
        # What an earlier, finished run left is not written over by a run that failed before it trained.
        if self.manifest.get("began"):
            self.note(status="failed", error=f"{kind.__name__}: {message}", **self._costs())
            self.write()
        expected = isinstance(error, (ValueError, NonFiniteError)) and type(error).__module__.startswith("stagewise")
        if expected or isinstance(error, torch.OutOfMemoryError):
            print(f"error: {message}", file=sys.stderr)
            raise SystemExit(1) from error
        return False

    def _costs(self) -> dict[str, Any]:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
        costs = {"seconds": round(time.time() - self.started, 1), "peak_memory_gib": round(peak, 2)}
        if torch.cuda.is_available():
            costs["peak_gpu_memory_gib"] = round(torch.cuda.max_memory_allocated() / 2**30, 2)
        return costs

    @property
    def zero3(self) -> bool:
        """Whether DeepSpeed partitions the weights while they load."""
        return is_deepspeed_zero3_enabled()

    def show_sample(self, tokenizer: PreTrainedTokenizerBase, examples: Sequence[Example | PreferenceExample]) -> None:
        """Prints the first example, learned tokens marked, on the main process."""
        if examples and is_main():
            first = examples[0]
            show_sample(tokenizer, first.chosen if isinstance(first, PreferenceExample) else first)

    def attach(self, trainer: Trainer, table: EvaluationTable | None, guard: NonFiniteGuard) -> None:
        """Puts the callbacks of every stage onto a trainer."""
        trainer.remove_callback(ProgressCallback)
        trainer.remove_callback(PrinterCallback)
        self.preemption = Preemption()
        keep, self.args.save_total_limit = self.args.save_total_limit, None
        own: list[TrainerCallback] = [Progress(), guard, self.preemption]
        own += [*method_callbacks(trainer, self.adapter), WholeCheckpoints(keep)]
        if table is not None and self.args.save_eval_records:
            own.append(EvaluationRows(table))
        for callback in own:
            trainer.add_callback(callback)
        config = trainer.model.config
        self.note(attention=config.get_text_config()._attn_implementation)
        if "rope_scaling" in self.manifest["flags"]:
            self.note(rope=kept_rope(config))

    def train(self, trainer: Trainer, stop: Sequence[str] | None) -> None:
        """Evaluates, trains, saves and writes the results as the flags say; ends the program if it was preempted.

        Args:
            trainer: the stage's trainer, with its callbacks attached.
            stop: the template's end markers, at which the saved model's generation ends; None for plain text.
        """
        args = self.args
        if args.do_train and (step := trainer.step_contents()):
            logger.info(step.line())
            self.manifest["data"]["summary"]["step"] = step.as_dict()
        if args.dry_run:
            self._dry_run(trainer)
            return
        if not args.do_train:
            self._evaluate_only(trainer)
            return
        resume = resume_point(args.output_dir, args.resume_from_checkpoint)
        if args.overwrite_output_dir and resume is None and is_main():
            remove_earlier_run(args.output_dir)
        self.note(began=time.strftime("%Y-%m-%d %H:%M:%S"))
        self.write()
        result = trainer.train(resume_from_checkpoint=str(resume) if resume else None)
        if self.preemption and self.preemption.stopped:
            self.note(status="stopped", **self._costs())
            self.write()
            logger.warning(
                "stopped by SIGTERM after a whole checkpoint; --resume_from_checkpoint True goes on from it"
            )
            raise SystemExit(PREEMPTED)
        metrics = {"train": result.metrics}
        if args.do_eval:
            metrics["eval"] = trainer.evaluate()
        self._save(trainer, stop)
        before = [log for log in trainer.state.log_history if log.get("step") == 0 and "eval_runtime" in log]
        if before:
            metrics["eval_before"] = before[0]
        if is_main():
            trainer.save_state()
            for split in ("train", "eval"):
                if split in metrics:
                    write_results(self.output_dir, split, metrics[split])
            draw_curves(trainer.state.log_history, self.output_dir / "loss.png")
        self.note(status="finished", metrics=metrics, steps=trainer.state.global_step, **self._costs())
        self.write()
        logger.info(f"finished in {self.manifest['seconds']:.0f} s; {self.output_dir}/{MANIFEST} holds the account")

    def _save(self, trainer: Trainer, stop: Sequence[str] | None) -> None:
        """The adapter or the model, the tokenizer with its chat template, and where generation ends."""
        model = trainer.accelerator.unwrap_model(trainer.model)
        if hasattr(model, "generation_config") or hasattr(model, "get_base_model"):
            base = model.get_base_model() if hasattr(model, "get_base_model") else model
            if base.can_generate():
                finish_generation_config(base, trainer.processing_class, stop)
                if is_main():
                    base.generation_config.save_pretrained(self.output_dir)
        trainer.save_model()

    def _dry_run(self, trainer: Trainer) -> None:
        """One batch forward and backward, and what the run will take by it; no step is taken."""
        args = self.args
        loader = trainer.get_train_dataloader()
        steps = args.max_steps
        if steps <= 0:  # a stream has no length, and --max_steps
            updates = math.ceil(len(loader) / args.gradient_accumulation_steps)
            steps = math.ceil(args.num_train_epochs * updates)
        trainer.current_gradient_accumulation_steps = args.gradient_accumulation_steps
        model = trainer.model.to(args.device)
        started = time.time()
        batch = next(iter(loader))
        count = trainer._get_num_items_in_batch([batch], args.device)
        loss = trainer.compute_loss(model.train(), trainer._prepare_inputs(batch), num_items_in_batch=count)
        loss.backward()
        loss = float(loss.detach())  # waits for the device
        seconds = (time.time() - started) * args.gradient_accumulation_steps * steps
        # Adam keeps two float32 numbers a trained parameter; gradients are in the peak already.
        optimizer = sum(p.numel() for p in model.parameters() if p.requires_grad) * 8 / 2**30
        peak = self._costs().get("peak_gpu_memory_gib", self._costs()["peak_memory_gib"]) + optimizer
        shapes = {name: tuple(value.shape) for name, value in batch.items() if torch.is_tensor(value)}
        logger.info(f"dry run: one batch {shapes}, loss {loss:.4f}")
        logger.info(
            f"dry run: {steps} steps, about {seconds / 60:.1f} minutes and {peak:.1f} GiB a process "
            f"({self.args.device.type}); nothing was trained or written"
        )
        if is_main() and self.output_dir.is_dir() and not any(self.output_dir.iterdir()):
            self.output_dir.rmdir()  # the Trainer made it

    def _evaluate_only(self, trainer: Trainer) -> None:
        metrics = trainer.evaluate()
        self.output_dir.mkdir(parents=True, exist_ok=True)
        if is_main():
            write_results(self.output_dir, "eval", metrics)
        for key, value in metrics.items():
            logger.info(f"{key} = {value}")


# What a run writes; --overwrite_output_dir removes these and nothing else. rejected.jsonl is not among them: when this
# happens the data has been read, and the file is this run's.
WRITTEN = (
    *("checkpoint-*", "eval_records", "logs", "rejected-*.jsonl", "*_results.json", "*_results.txt", "loss.png"),
    *("adapter_config.json", "adapter_model.*", "config.json", "generation_config.json", "model*.safetensors*"),
    *("run.json", "trainer_state.json", "training_args.bin", "ppo_state.pt"),
)


def remove_earlier_run(output_dir: str | Path) -> None:
    """Removes what an earlier run wrote; other files stay."""
    for path in (path for pattern in WRITTEN for path in Path(output_dir).glob(pattern)):
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()


def _out_of_memory_advice(error: BaseException) -> str:
    return (
        "out of memory. Lower --per_device_train_batch_size (and raise --gradient_accumulation_steps by as much), "
        "add --gradient_checkpointing, shorten the rows (--block_size, --model_max_length, --max_source_length, "
        f"--max_target_length), or use --torch_dtype bfloat16. ({str(error).splitlines()[0]})"
    )
