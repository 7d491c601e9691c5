"""Speed and memory of a run, as numbers in every training log."""

from __future__ import annotations

import time
from typing import Any

import psutil
import torch
from torch import nn
from transformers import TrainingArguments


def memory_gib(args: TrainingArguments) -> float:
    """The memory of this process: on a GPU what torch has reserved, otherwise the resident set size."""
    if args.device.type == "cuda":
        return torch.cuda.memory_reserved(args.device) / 2**30
    return psutil.Process().memory_info().rss / 2**30


class TokenCount:
    """Counts the tokens of a model's forward passes in training mode, without padding.

    The count stays on the model's device until it is read, so no forward pass waits for it.
    """

    def __init__(self, model: nn.Module, device: torch.device):
        self.count = torch.zeros((), dtype=torch.long, device=device)
        model.register_forward_pre_hook(self._see, with_kwargs=True)

    def _see(self, model: nn.Module, args: tuple, inputs: dict[str, Any]) -> None:
        if model.training and inputs.get("input_ids") is not None:
            mask, ids = inputs.get("attention_mask"), inputs["input_ids"]
            self.count += ids.numel() if mask is None else mask.sum().to(self.count)

    def read(self) -> torch.Tensor:
        """Tokens since the last call: ()."""
        seen, self.count = self.count, torch.zeros_like(self.count)
        return seen


class LogsSpeed:
    """Mixin for a Trainer: adds `tokens_per_second` of all processes and `memory_gib` of this one to every training
    log.

    The time between two logs counts in full, except for evaluations and checkpoints.
    """

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.tokens = TokenCount(self.model, self.args.device)
        self.last_log: float | None = None  # start of the time that the next log covers

    def start_clock(self) -> None:
        """Starts the clock unless it is running."""
        if self.last_log is None:
            self.last_log = time.perf_counter()

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        self.start_clock()
        return super().training_step(*args, **kwargs)

    def _without_time(self, work: Any, *args: Any, **kwargs: Any) -> Any:
        began = time.perf_counter()
        found = work(*args, **kwargs)
        if self.last_log is not None:
            self.last_log += time.perf_counter() - began
        return found

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        return self._without_time(super().evaluate, *args, **kwargs)

    def _save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        self._without_time(super()._save_checkpoint, *args, **kwargs)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs and self.last_log is not None:
            now = time.perf_counter()
            tokens = int(self.accelerator.reduce(self.tokens.read(), "sum"))
            logs["tokens_per_second"] = round(tokens / max(now - self.last_log, 1e-9), 1)
            logs["memory_gib"] = round(memory_gib(self.args), 3)
            self.last_log = now
        super().log(logs, start_time)
