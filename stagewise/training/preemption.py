"""Signals that ask a run to stop: it saves a complete checkpoint first, so the same command can continue.

SIGTERM          a scheduler or an operator ends the job
SIGUSR1, SIGUSR2 a scheduler's warning before it does (Slurm's --signal)
SIGHUP           the terminal was closed; if nohup made the run ignore it, it stays ignored
"""

from __future__ import annotations

import os
import signal
from types import FrameType

import torch
import torch.distributed as dist
from transformers import TrainerCallback

from stagewise.artifacts.processes import is_distributed
from stagewise.data.worker_signals import SIGNALS

PREEMPTED = 143  # exit code of a run stopped by a signal


class Preemption(TrainerCallback):
    """During training, a signal ends the run after the current step, with a checkpoint; before training, immediately.

    Processes agree on it at the end of each step. After the last step there is nothing to stop: the run finishes.
    """

    def __init__(self) -> None:
        self.asked: str | None = None  # the signal received
        self.training = self.stopped = self.trained = False
        self.process = os.getpid()
        for number in SIGNALS:
            if number == signal.SIGTERM or signal.getsignal(number) != signal.SIG_IGN:
                signal.signal(number, self._on_signal)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self.process:  # a forked worker: it ends with the training process
            if number == signal.SIGTERM:
                os._exit(PREEMPTED)
            return
        self.asked = signal.Signals(number).name
        if not (self.training or self.trained):
            if os.environ.get("LOCAL_RANK", "0") == "0":  # bypasses the log, which may be in the middle of a line
                os.write(2, f"stopped by {self.asked} before training began; start the same command again\n".encode())
            raise SystemExit(PREEMPTED)

    def on_train_begin(self, args, state, control, **kwargs):
        self.training = True

    def on_train_end(self, args, state, control, **kwargs):
        self.training, self.trained = False, True

    def on_step_end(self, args, state, control, **kwargs):
        asked = self.asked is not None
        if is_distributed():
            flag = torch.tensor(float(asked), device=args.device)
            dist.all_reduce(flag, op=dist.ReduceOp.MAX)
            asked = bool(flag.item())
        if asked:
            self.asked = self.asked or "a signal to another process"
            self.stopped = True
            control.should_save = True
            control.should_training_stop = True
