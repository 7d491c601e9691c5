"""A run: training, evaluation, results, and the manifest `run.json`."""

from __future__ import annotations

import os
import resource
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from loguru import logger
from transformers import PreTrainedTokenizerBase, Trainer, TrainerCallback
from transformers.integrations import TensorBoardCallback
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled
from transformers.trainer_callback import PrinterCallback, ProgressCallback

from stagewise.adapters.attach import method_callbacks
from stagewise.artifacts.checkpoints import leave_later, step_of, trained_steps
from stagewise.artifacts.lineage import earlier_steps, finish_lineage_step, start_lineage_step
from stagewise.artifacts.manifest import (
    MANIFEST,
    device_name,
    parameters_of,
    versions,
    without_tokens,
    write_manifest,
)
from stagewise.artifacts.processes import from_first_process, is_main, leave_processes, skip_shutdown
from stagewise.chat.encoding import AnyTemplate
from stagewise.config.arguments import AdapterArguments
from stagewise.data.examples import Example, PreferenceExample
from stagewise.errors import ArgumentError, NonFiniteError
from stagewise.models.attention.rope import kept_rope
from stagewise.models.forward import base_of
from stagewise.models.generation_config import finish_generation_config
from stagewise.reports.console import Progress
from stagewise.reports.curves import write_pictures
from stagewise.reports.error_hints import explain_error
from stagewise.reports.results import read_results, show_sample, write_results
from stagewise.reports.run_page import PAGE, write_page
from stagewise.reports.terminal_text import print_error
from stagewise.training.callbacks import EvaluationRows, IntervalsOfNow, WholeCheckpoints
from stagewise.training.dry_run import dry_run
from stagewise.training.evaluation_set import EvaluationTable
from stagewise.training.finiteness import SKIPPED
from stagewise.training.output_dir import is_finished, remove_earlier_run
from stagewise.training.preemption import PREEMPTED, Preemption
from stagewise.training.resume.identity import Identity, KeepsIdentity
from stagewise.training.sample_generations import EvaluationSamples
from stagewise.training.settings import (
    StageArguments,
)

INTERRUPTED = 130  # exit code after Ctrl-C


class Run:
    """One run and its manifest. Used as a context: an error goes to run.json and, if expected, is printed in one line.

    `note(key=value)` adds to the manifest; it is written at the start, at the end, and when the run fails.
    """

    def __init__(
        self,
        stage: str,
        args: StageArguments,
        parts: Sequence[Any],
        flags: dict[str, Any],
        identity: Identity,
        preemption: Preemption,
    ):
        self.stage, self.args, self.identity = stage, args, identity
        self.output_dir = Path(args.output_dir)
        self.started = time.time()
        self.preemption = preemption
        self.progress = Progress(args.quiet)
        self.trainer: Trainer | None = None
        self.evaluated: int | None = None  # the step of the last evaluation
        self.adapter = next((part for part in parts if isinstance(part, AdapterArguments)), None)
        step = start_lineage_step(stage, parts)
        self.manifest: dict[str, Any] = {
            "stage": stage,
            "status": "running",
            "command": [Path(sys.argv[0]).name, *without_tokens(sys.argv[1:])],
            "flags": flags,
            "base_model": step["base_model"],
            "method": self.adapter.method if self.adapter else None,
            "lineage": [*earlier_steps(parts), step],
            "versions": versions(),
            "device": device_name(args),
            "processes": args.world_size,
            "nodes": args.world_size // int(os.environ.get("LOCAL_WORLD_SIZE", args.world_size)),
        }

    def note(self, **entries: Any) -> None:
        self.manifest.update(entries)

    def write(self) -> None:
        if self.args.dry_run or not is_main():
            return
        self.output_dir.mkdir(parents=True, exist_ok=True)
        write_manifest(self.output_dir, self.manifest, weights=self.manifest["status"] == "finished")

    def __enter__(self) -> Run:
        return self

    def __exit__(self, kind, error, trace) -> bool:
        self.progress.close()
        preempted = isinstance(error, SystemExit) and error.code == PREEMPTED
        if error is None or (preempted and self.preemption.stopped):
            leave_processes(PREEMPTED if error else 0)
        elif preempted and dist.is_initialized():
            skip_shutdown(PREEMPTED)  # the others may not have received the signal yet: wait for none
        if error is None or isinstance(error, SystemExit):
            return False
        advice = explain_error(error, self.output_dir)
        # A run that failed before training does not overwrite the results of an earlier, finished one.
        if self.manifest.get("began"):
            message = ": ".join(filter(None, (kind.__name__, advice or str(error))))
            self.note(status="failed", error=message, **self._steps(), **self._costs())
            try:
                self.write()
            except OSError as full:  # the disk, most likely; the message below names what ended the run
                logger.warning(f"{MANIFEST} was not written: {full}")
            self.show(pictures=True)
        expected = isinstance(error, (ValueError, NonFiniteError)) and type(error).__module__.startswith("stagewise")
        if advice or expected:
            if kind is KeyboardInterrupt:
                print(advice, file=sys.stderr)
            else:
                print_error(advice or error)
            raise SystemExit(INTERRUPTED if kind is KeyboardInterrupt else 1) from error
        return False

    def show(self, pictures: bool = False) -> None:
        """Writes report.html in its current state and, with `pictures`, the curves as PNG files; on the main process.

        A report is not worth ending a run: if it can't be written, the log says why.
        """
        if self.args.dry_run or not is_main() or self.trainer is None:
            return
        history = self.trainer.state.log_history
        try:
            write_page(self.output_dir, self.manifest, history)
            if pictures:
                write_pictures(history, self.output_dir)
        except Exception as error:
            logger.warning(f"{PAGE} and the pictures were not written: {type(error).__name__}: {error}")

    def _steps(self) -> dict[str, int]:
        """Optimizer steps since the run began, and how many of them were skipped because they were not finite."""
        if self.trainer is None:
            return {}
        return {"steps": self.trainer.state.global_step, SKIPPED: self.trainer.guard.skipped}

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
        """Prints the first example, with labels marked, on the main process."""
        if examples and is_main():
            first = examples[0]
            show_sample(tokenizer, first.chosen if isinstance(first, PreferenceExample) else first)

    def identify(self, examples: Any, template: AnyTemplate | None = None) -> None:
        """Compares the training records, or their stream, with those of the checkpoint to resume from.

        Raises:
            ArgumentError: they differ, or the template or the model does.
        """
        if self.args.do_train and not self.args.dry_run:
            self.identity.check_data(examples, template)

    def attach(self, trainer: Trainer, table: EvaluationTable | None) -> None:
        """Adds the callbacks of every stage to a trainer."""
        trainer.remove_callback(ProgressCallback)
        trainer.remove_callback(PrinterCallback)
        keep, self.args.save_total_limit = self.args.save_total_limit, None
        self.trainer = trainer
        own: list[TrainerCallback] = [IntervalsOfNow(), self.progress, self.preemption]
        own += [
            *method_callbacks(trainer, self.adapter),
            KeepsIdentity(self.identity, trainer),
            WholeCheckpoints(keep),
        ]
        if table is not None and self.args.save_eval_records:
            own.append(EvaluationRows(table))
        for callback in own:
            trainer.add_callback(callback)
        config = trainer.model.config
        self.note(attention=config.get_text_config()._attn_implementation, parameters=parameters_of(trainer.model))
        if "rope_scaling" in self.manifest["flags"]:
            self.note(rope=kept_rope(config))

    def train(self, trainer: Trainer, stop: Sequence[str] | None) -> None:
        """Evaluates, trains, saves and writes the results, depending on the flags; ends the program if it was
        preempted.

        Args:
            trainer: the stage's trainer, with its callbacks attached.
            stop: the template's end markers, at which the saved model's generation ends; None for plain text.
        """
        args = self.args
        if args.do_train and (step := trainer.step_contents()):
            logger.info(step.line())
            self.manifest["data"]["summary"]["step"] = step.as_dict()
        if args.dry_run:
            dry_run(trainer, lambda: peak_memory_gib(self._costs()))
            return
        if not args.do_train:
            self._evaluate_only(trainer, stop)
            return
        resume = self.identity.checkpoint
        self.identity.check_trainer(trainer)
        if resume and not self._has_steps_left(trainer, resume):
            return
        # --save_total_limit may remove that checkpoint during training
        before = trained_steps(resume) if resume else 0
        self._watch(trainer, stop)
        if resume and is_main():
            leave_later(args.output_dir, resume)
        if args.overwrite_output_dir and resume is None and is_main():
            remove_earlier_run(args.output_dir)
        self.note(began=time.strftime("%Y-%m-%d %H:%M:%S"), **({"resumed_from": resume.name} if resume else {}))
        self.write()
        result = trainer.train(resume_from_checkpoint=str(resume) if resume else None)
        if self.preemption.stopped:
            self.note(status="stopped", stopped_by=self.preemption.asked, **self._steps(), **self._costs())
            self.write()
            self.show(pictures=True)
            logger.warning(
                f"stopped by {self.preemption.asked} after a complete checkpoint; --resume_from_checkpoint True "
                "continues from it"
            )
            raise SystemExit(PREEMPTED)
        metrics = {"train": self._train_metrics(result.metrics, before)}
        self._save(trainer, stop)  # before the evaluation, in which --bf16_full_eval rounds the weights
        if args.do_eval:
            metrics["eval"] = self._evaluated_at_end() or trainer.evaluate()
        at_start = [log for log in trainer.state.log_history if log.get("step") == 0 and "eval_runtime" in log]
        if at_start:
            metrics["eval_before"] = at_start[0]
        if is_main():
            trainer.save_state()
            for split in ("train", "eval"):
                if split in metrics:
                    write_results(self.output_dir, split, metrics[split])
        self.note(status="finished", metrics=metrics, **self._steps(), **self._costs())
        self.manifest["lineage"][-1] = finish_lineage_step(self.manifest, self.output_dir)
        self.write()
        self.show(pictures=True)
        folder = self.output_dir
        logger.info(f"finished in {self.manifest['seconds']:.0f} s; {folder}/{MANIFEST} holds the account")
        logger.info(f"to look at: {folder}/{PAGE} in a browser")

    def _has_steps_left(self, trainer: Trainer, resume: Path) -> bool:
        """Whether training, or what follows it, still has to be done; a finished run is not touched.

        Raises:
            ArgumentError: the checkpoint is beyond the end that the flags set.
        """
        left = trainer.steps_left(resume)
        if left < 0:
            name = next((n for n in ("rollouts", "max_steps") if n in self.manifest["flags"]), "num_train_epochs")
            given = f"{self.manifest['flags'].get(name, self.args.num_train_epochs)}".removesuffix(".0")
            raise ArgumentError(
                f"--{name} {given}: {resume} has been trained for longer ({trained_steps(resume)} steps); give more, "
                "or resume from an earlier checkpoint: --resume_from_checkpoint FOLDER"
            )
        return left > 0 or not from_first_process(lambda: is_finished(self.output_dir, self.stage))

    def _train_metrics(self, metrics: dict[str, float], before: int) -> dict[str, float]:
        """The metrics of training; those of the existing results if no step was left after `before`."""
        if before == 0 or self.trainer.state.global_step > before:
            return metrics
        there = from_first_process(lambda: read_results(self.output_dir, "train"))
        return there or {name: value for name, value in metrics.items() if name != "train_loss"}

    def _watch(self, trainer: Trainer, stop: Sequence[str] | None) -> None:
        """Adds the callbacks that show a run during training: samples, TensorBoard and the page, in this order."""
        self._watch_evaluations(trainer, stop)
        trainer.add_callback(UpdatesPage(self))

    def _watch_evaluations(self, trainer: Trainer, stop: Sequence[str] | None) -> None:
        """Samples come first: TensorBoard shows them, too."""
        if self.args.eval_samples and trainer.eval_dataset is not None:
            trainer.add_callback(EvaluationSamples(trainer, self.args.eval_samples, stop or (), self.zero3))
        if trainer.pop_callback(TensorBoardCallback):
            from stagewise.reports.tensorboard import (
                Board,  # a run without such files does not need tensorboard
            )

            trainer.add_callback(Board(self.manifest))

    def _evaluated_at_end(self) -> dict[str, Any] | None:
        """The last evaluation during training, if it was of the final weights; None otherwise.

        With --load_best_model_at_end these are from an earlier step, at which the curves show the numbers.
        """
        state = self.trainer.state
        best = state.best_model_checkpoint if self.args.load_best_model_at_end else None
        if best is None and self.evaluated != state.global_step:
            return None
        step = step_of(best) if best else state.global_step
        found = [log for log in state.log_history if "eval_runtime" in log and log["step"] == step]
        return {name: value for name, value in found[-1].items() if name != "step"} if found else None

    def _save(self, trainer: Trainer, stop: Sequence[str] | None) -> None:
        """Saves the adapter or the model, the tokenizer with its chat template, and the generation config."""
        model = trainer.accelerator.unwrap_model(trainer.model)
        if hasattr(model, "generation_config") or hasattr(model, "get_base_model"):
            base = base_of(model)
            if base.can_generate():
                finish_generation_config(base, trainer.processing_class, stop)
                if is_main():
                    base.generation_config.save_pretrained(self.output_dir)
        trainer.save_model()

    def _evaluate_only(self, trainer: Trainer, stop: Sequence[str] | None) -> None:
        self._watch_evaluations(trainer, stop)
        metrics = trainer.evaluate()
        self.output_dir.mkdir(parents=True, exist_ok=True)
        if is_main():
            write_results(self.output_dir, "eval", metrics)
        for key, value in metrics.items():
            logger.info(f"{key} = {value}")


class UpdatesPage(TrainerCallback):
    """Updates the page during a run, so that a killed run has one, too."""

    def __init__(self, run: Run):
        self.run = run

    def on_train_begin(self, args, state, control, **kwargs):
        self.run.show()

    on_save = on_train_begin

    def on_evaluate(self, args, state, control, **kwargs):
        self.run.evaluated = state.global_step
        self.run.show()


def peak_memory_gib(costs: dict[str, Any]) -> float:
    """The peak memory of a run in GiB: the GPU's if there is one."""
    return costs.get("peak_gpu_memory_gib", costs["peak_memory_gib"])
