"""What happens around the steps: progress, whole checkpoints, stopping on a signal, stopping on NaN."""

from __future__ import annotations

import signal
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist
from loguru import logger
from tqdm.auto import tqdm
from transformers import TrainerCallback

from stagewise.checkpoint import mark_whole, rotate
from stagewise.validation import EvaluationTable


class NonFiniteError(RuntimeError):
    """The loss is NaN or infinite; no step was taken with it."""


class NonFiniteGuard(TrainerCallback):
    """Ends the run before a step is taken with a NaN or infinite loss.

    On a GPU the check waits for the optimizer step, so that micro-batches do not wait for the device one by one; with
    DeepSpeed, which steps inside the backward pass, and on a CPU it is made at once.
    """

    def __init__(self) -> None:
        self.finite: torch.Tensor | None = None
        self.step = 0

    def watch(self, loss: torch.Tensor, at_once: bool) -> None:
        finite = torch.isfinite(loss.detach())
        self.finite = finite if self.finite is None else self.finite & finite
        if at_once or loss.device.type == "cpu":
            self._check()

    def _check(self) -> None:
        finite, self.finite = self.finite, None
        if finite is not None and not bool(finite):
            raise NonFiniteError(
                f"the loss of step {self.step + 1} is NaN or infinite; the step was not taken. Lower --learning_rate, "
                "set --max_grad_norm 1.0, or use --bf16 or --torch_dtype float32 in place of 16-bit floats (fp16)"
            )

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        self._check()

    def on_step_end(self, args, state, control, **kwargs):
        self.step = state.global_step


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


class Preemption(TrainerCallback):
    """On SIGTERM: finish the step, save a checkpoint, stop. Processes agree on it at the end of each step."""

    def __init__(self) -> None:
        self.asked = False
        self.stopped = False
        signal.signal(signal.SIGTERM, self._on_signal)

    def _on_signal(self, number, frame) -> None:
        self.asked = True

    def on_step_end(self, args, state, control, **kwargs):
        asked = self.asked
        if dist.is_initialized() and dist.get_world_size() > 1:
            flag = torch.tensor(float(asked), device=args.device)
            dist.all_reduce(flag, op=dist.ReduceOp.MAX)
            asked = bool(flag.item())
        if asked:
            self.stopped = True
            control.should_save = True
            control.should_training_stop = True


class EvaluationRows(TrainerCallback):
    """Writes the numbers of each validation record beside the run (--save_eval_records)."""

    def __init__(self, table: EvaluationTable) -> None:
        self.table = table

    def on_evaluate(self, args, state, control, **kwargs):
        if args.should_save:
            self.table.write(Path(args.output_dir) / "eval_records" / f"step-{state.global_step}.jsonl")


class Progress(TrainerCallback):
    """One bar a phase on the main process of a terminal; plain lines where there is none."""

    def __init__(self) -> None:
        self.bar: tqdm | None = None
        self.eval_bar: tqdm | None = None
        self.began: tuple[float, int] | None = None  # when the first step began, and how many were done then

    def on_train_begin(self, args, state, control, **kwargs):
        if state.is_world_process_zero and sys.stderr.isatty():
            self.bar = tqdm(total=state.max_steps, initial=state.global_step, desc="train", unit="step")

    def on_step_begin(self, args, state, control, **kwargs):
        self.began = self.began or (time.time(), state.global_step)

    def on_step_end(self, args, state, control, **kwargs):
        if self.bar:
            self.bar.update(state.global_step - self.bar.n)

    def on_prediction_step(self, args, state, control, eval_dataloader=None, **kwargs):
        if not state.is_world_process_zero or not sys.stderr.isatty():
            return
        if self.eval_bar is None:
            self.eval_bar = tqdm(total=len(eval_dataloader), desc="evaluate", unit="batch", leave=False)
        self.eval_bar.update(1)

    def on_evaluate(self, args, state, control, **kwargs):
        if self.eval_bar:
            self.eval_bar.close()
            self.eval_bar = None

    on_predict = on_evaluate

    def on_log(self, args, state, control, logs=None, **kwargs):
        if not state.is_world_process_zero or not logs:
            return
        shown = {k: v for k, v in logs.items() if k not in ("epoch", "total_flos") and isinstance(v, (int, float))}
        line = " ".join(f"{key} {value:.4g}" for key, value in shown.items())
        line = f"step {state.global_step}/{state.max_steps}{self._time_left(state)} {line}"
        tqdm.write(line, file=sys.stderr) if self.bar else logger.info(line)

    def _time_left(self, state) -> str:
        if self.began is None or not self.began[1] < state.global_step < state.max_steps:
            return ""
        seconds_a_step = (time.time() - self.began[0]) / (state.global_step - self.began[1])
        minutes, seconds = divmod(int(seconds_a_step * (state.max_steps - state.global_step)), 60)
        return f" ({minutes}:{seconds:02d} left)"

    def on_train_end(self, args, state, control, **kwargs):
        if self.bar:
            self.bar.close()
            self.bar = None
