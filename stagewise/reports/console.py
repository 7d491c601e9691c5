"""The progress line of a run: overwritten in place on a terminal, plain lines elsewhere.

train 120/400 ━━━━━━━━━╌╌╌╌╌╌╌╌╌╌╌  loss 1.432  lr 8.7e-05  2,310 tokens/s  5.2 GiB  3:04 left
"""

from __future__ import annotations

import os
import shutil
import sys
import time
from typing import Any, TextIO

import datasets
from huggingface_hub.utils import disable_progress_bars
from loguru import logger
from tqdm import tqdm
from transformers import TrainerCallback
from transformers.utils import logging as transformers_logging

from stagewise.reports.only_shown import errors_logged

WIDEST_BAR = 30
# Left out of an evaluation's line: constant, or unrelated to the model.
UNSAID = ("epoch", "total_flos", "eval_samples_per_second", "eval_steps_per_second")


def clock_text(seconds: float) -> str:
    """3:04, or 2:03:04 from an hour on."""
    minutes, seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"


def figures(logs: dict[str, Any]) -> list[str]:
    """The main numbers of a training log: loss, learning rate, tokens per second, memory; for PPO reward and KL."""
    forms = {
        "loss": "loss {:.3f}",
        "reward": "reward {:.3f}",
        "kl": "KL {:.2f}",
        "accuracy": "right {:.0%}",
        "learning_rate": "lr {:.1e}",
        "tokens_per_second": "{:,.0f} tokens/s",
        "memory_gib": "{:.1f} GiB",
    }
    return [form.format(logs[name]) for name, form in forms.items() if isinstance(logs.get(name), int | float)]


def columns_of(stream: TextIO) -> int:
    """The current width of a stream's terminal; of the screen if the stream has none."""
    try:
        return os.get_terminal_size(stream.fileno()).columns or shutil.get_terminal_size().columns
    except (OSError, ValueError):
        return shutil.get_terminal_size().columns


def line_of(phase: str, done: int, total: int, words: list[str], columns: int) -> str:
    """One line within `columns`: the phase with a bar as long as the room allows, then the numbers.

    If there is no room for all numbers, those before the last one are dropped first.
    """
    words = list(words)
    while True:
        head, tail = f"{phase} {done}/{total}", "".join(f"  {word}" for word in words)
        room = columns - len(head) - len(tail) - 1
        if room >= 0 or not words:
            break
        words.pop(-2 if len(words) > 1 else -1)
    width = min(room - 1, WIDEST_BAR)
    if width < 5:
        return f"{head}{tail}"[:columns]
    full = round(width * min(done / total, 1)) if total else 0
    return f"{head} {'━' * full}{'╌' * (width - full)}{tail}"


def write_log_line(message: str) -> None:
    """Writes a log line above the progress line, if there is one."""
    tqdm.write(message, file=sys.stderr, end="")


def hide_progress_bars() -> None:
    """--quiet: also hides the progress bars of libraries that load models and datasets."""
    datasets.disable_progress_bars()
    transformers_logging.disable_progress_bar()
    disable_progress_bars()


class Progress(TrainerCallback):
    """The progress line on a terminal, plain lines elsewhere and with --quiet; on the main process only."""

    def __init__(self, quiet: bool = False) -> None:
        self.updates = not quiet and sys.stderr.isatty()
        self.line: tqdm | None = None
        self.logs: dict[str, Any] = {}  # the latest value of each number of training
        self.evaluated = 0  # batches of the current evaluation
        self.began: tuple[float, int] | None = None  # when steps began, and how many were done then
        self.training = False

    @errors_logged("progress")
    def on_train_begin(self, args, state, control, **kwargs):
        self.training = True
        self._show("train", state.global_step, state)

    @errors_logged("progress")
    def on_epoch_begin(self, args, state, control, **kwargs):
        """After --eval_on_start, and before the first batch is made: PPO's is a whole rollout."""
        self.began = self.began or (time.time(), state.global_step)

    @errors_logged("progress")
    def on_step_end(self, args, state, control, **kwargs):
        self._show("train", state.global_step, state)

    @errors_logged("progress")
    def on_prediction_step(self, args, state, control, eval_dataloader=None, **kwargs):
        self.evaluated += 1
        self._show("evaluate", self.evaluated, state, total=len(eval_dataloader))

    @errors_logged("progress")
    def on_evaluate(self, args, state, control, **kwargs):
        self.evaluated = 0
        if self.training:
            self._show("train", state.global_step, state)
        else:
            self.close(leave=False)

    @errors_logged("progress")
    def on_log(self, args, state, control, logs=None, **kwargs):
        if not state.is_world_process_zero or not logs:
            return
        of_training = "loss" in logs
        if of_training:
            self.logs = {**self.logs, **logs}
        if of_training and self.updates:
            self._show("train", state.global_step, state)
            return
        shown = {k: v for k, v in logs.items() if k not in UNSAID and isinstance(v, int | float)}
        words = " ".join(f"{key} {value:.4g}" for key, value in shown.items())
        left = self._left(state)
        logger.info(f"step {state.global_step}/{state.max_steps}{f' ({left})' if left else ''} {words}")

    @errors_logged("progress")
    def on_train_end(self, args, state, control, **kwargs):
        self.training = False
        self.close()

    def close(self, leave: bool = True) -> None:
        """Ends the line, so that later output follows below it, or in its place."""
        if self.line is not None:
            self.line.leave = leave
            self.line.close()
            self.line = None

    def _left(self, state) -> str:
        """The time that the remaining steps will take at the current speed."""
        if self.began is None or not self.began[1] < state.global_step < state.max_steps:
            return ""
        a_step = (time.time() - self.began[0]) / (state.global_step - self.began[1])
        return f"{clock_text(a_step * (state.max_steps - state.global_step))} left"

    def _show(self, phase: str, done: int, state, total: int | None = None) -> None:
        if not (self.updates and state.is_world_process_zero):
            return
        if self.line is None:
            self.line = tqdm(total=1, bar_format="{desc}", file=sys.stderr, leave=True, dynamic_ncols=True)
        words = figures(self.logs)
        if phase == "train" and (left := self._left(state)):
            words.append(left)
        elif phase == "evaluate":
            words = [f"at step {state.global_step}"] if state.max_steps else []
        columns = columns_of(sys.stderr) - 1
        self.line.set_description_str(line_of(phase, done, total or state.max_steps, words, columns))
