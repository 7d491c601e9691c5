"""Skips steps whose loss or gradient is NaN or infinite; non-finite weights are never saved.

    loss ──► backward ──► gradient norm ──► optimizer step ──► weights ──► checkpoint, evaluation, result
     │ × NaN if it is        │ the only         │ skipped on the    │ their norm is checked
     └─not finite            └─decision         └─device            └─before each of these

A non-finite loss makes the whole gradient NaN, and averaging over the processes spreads a NaN to all of them. So all
processes see the same gradient norm and skip the same steps without communication.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from loguru import logger
from torch import nn
from transformers import TrainerCallback

from stagewise.artifacts.processes import is_distributed
from stagewise.errors import NonFiniteError

# A broken batch or a spike passes within a step or two. A problem that lasts five steps will not pass: each further
# step would only waste time.
PATIENCE = 5
# Loss scaling for float16 finds its scale by overflowing: from 65536 down to 1 in 16 halvings.
FP16_PATIENCE = 16
NAMED = 8  # records named in a message
SKIPPED = "skipped_steps"  # in run.json, in trainer_state.json of a checkpoint, and in a training log


def gathered(mine: list[Any]) -> list[Any]:
    """The concatenated lists of all processes, on each of them."""
    if not is_distributed():
        return mine
    lists: list[list[Any]] = [[] for _ in range(dist.get_world_size())]
    dist.all_gather_object(lists, mine)
    return [item for part in lists for item in part]


def gradient_norm(optimizer: torch.optim.Optimizer) -> torch.Tensor:
    """The 2-norm of all gradients that an optimizer holds: ()."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    return torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])


def are_finite(model: nn.Module) -> bool:
    """Whether all trained weights are finite, on every process: one reduction, and one wait for the device.

    The squares are summed in float32, so a weight beyond about 1e19 counts as infinite, too: no model computes with
    it, and only a diverged step produces one.
    """
    # Under ZeRO-3 a process holds its shard of each weight in `ds_tensor`.
    trained = [getattr(p, "ds_tensor", p) for p in model.parameters() if p.requires_grad]
    norms = [torch.linalg.vector_norm(p.detach(), dtype=torch.float32) for p in trained if p.numel()]
    sound = torch.stack([norm.to(norms[0].device) for norm in norms]).isfinite().all() if norms else torch.tensor(True)
    return all(gathered([bool(sound)]))


@dataclass
class Verdict:
    """The verdict on a step, on its way from the device to the host."""

    step: int
    bad: torch.Tensor
    arrived: torch.Event | None
    seen: list[tuple[Sequence[str], torch.Tensor]]  # each forward pass's records, and whether its loss was finite

    def is_bad(self) -> bool:
        if self.arrived is not None:
            self.arrived.synchronize()  # of the previous step: the device has finished it long ago
        return bool(self.bad)


class NonFiniteGuard(TrainerCallback):
    """Skips optimizer steps whose gradient norm is NaN or infinite, and ends the run after a few in a row.

    On a GPU, fused Adam (the default) skips the step by itself; the host hears of it one step later and never waits.
    Other optimizers get no gradients for that step, so the host has to wait for the norm. DeepSpeed skips such steps
    on its own. Optimizers that step within the backward pass (LOMO, layerwise GaLore) cannot be held back; the weights
    are still checked before they are saved.
    """

    def __init__(self) -> None:
        self.skipped = 0  # steps since the run began, including those before it was resumed
        self.in_a_row = 0
        self.patience = PATIENCE
        self.fp16 = False
        self.records: Sequence[str] = ()  # of the batch in the model now
        self.seen: list[tuple[Sequence[str], torch.Tensor]] = []
        self.bad: torch.Tensor | None = None  # of the next step: 1.0 or 0.0, ()
        self.pending: Verdict | None = None
        self.held_back = False  # under DeepSpeed without ZeRO: the last step
        self.lent = False  # whether the optimizer's `found_inf` is ours
        self.hooks: list[Any] = []
        self.model: nn.Module | None = None

    def on_train_begin(self, args, state, control, model=None, optimizer=None, **kwargs):
        self.model = model
        self.skipped = state.stateful_callbacks.get(SKIPPED, 0)
        self.fp16 = args.fp16
        self.patience = FP16_PATIENCE if args.fp16 else PATIENCE
        while hasattr(optimizer, "optimizer") and not hasattr(optimizer, "overflow"):
            optimizer = optimizer.optimizer  # unwrapped from accelerate; ZeRO's has `overflow` and skips by itself
        for hook in self.hooks:
            hook.remove()
        self.hooks = []
        if isinstance(optimizer, torch.optim.Optimizer):
            before, after = optimizer.register_step_pre_hook, optimizer.register_step_post_hook
            self.hooks = [before(self._before_step), after(self._after_step)]

    def watch(self, loss: torch.Tensor) -> torch.Tensor:
        """Passes a finite loss through; turns a non-finite one into a form that makes every gradient NaN."""
        finite = loss.detach().isfinite()
        self.seen.append((self.records, finite))
        return loss * torch.where(finite, 1.0, math.nan).to(loss.dtype)

    def judge(self, step: int, bad: torch.Tensor) -> None:
        """Decides whether to skip a step: `bad` is 1.0 or 0.0, (); by now the previous verdict has arrived."""
        self.settle()
        self.bad, arrived = bad, None
        on_host = bad.to("cpu", non_blocking=True)
        if bad.device.type != "cpu":
            arrived = torch.accelerator.current_stream(bad.device).record_event()
        self.pending, self.seen = Verdict(step, on_host, arrived, self.seen), []

    def _before_step(self, optimizer: torch.optim.Optimizer, args: tuple, kwargs: dict) -> None:
        bad, self.bad = self.bad, None
        if bad is None:  # DeepSpeed without ZeRO steps before the Trainer has seen a norm
            bad = (~gradient_norm(optimizer).isfinite()).float()
            self.held_back = bool(bad)
        if isinstance(optimizer, torch.optim.Adam) and getattr(optimizer, "_step_supports_amp_scaling", False):
            found = getattr(optimizer, "found_inf", None)
            self.lent = found is None  # otherwise a GradScaler has set it, and removes it
            optimizer.found_inf = bad if found is None else torch.maximum(found, bad.to(found))
        elif bool(bad):
            optimizer.zero_grad(set_to_none=True)

    def _after_step(self, optimizer: torch.optim.Optimizer, args: tuple, kwargs: dict) -> None:
        if self.lent:
            del optimizer.found_inf
            self.lent = False

    def is_skipped(self) -> bool:
        """Whether the last step was skipped; waits for the device."""
        return self.pending.is_bad() if self.pending is not None else self.in_a_row > 0

    def settle(self) -> None:
        """Processes the last step's verdict.

        Raises:
            NonFiniteError: it was the last of too many in a row.
        """
        verdict, self.pending = self.pending, None
        if verdict is None:
            return
        if not verdict.is_bad():
            self.in_a_row = 0
            return
        self.skipped += 1
        self.in_a_row += 1
        passes = gathered([(list(records), bool(finite)) for records, finite in verdict.seen])
        broken = [records for records, finite in passes if not finite]
        what = "loss" if broken else "gradient"
        named = _named([record for records in broken or [records for records, _ in passes] for record in records])
        if self.in_a_row >= self.patience:
            raise NonFiniteError(
                f"the {what} of step {verdict.step} is NaN or infinite, {self.in_a_row} in a row by now; none of "
                f"these steps was taken. Its records: {named}. {self._way_out()}"
            )
        if self.fp16 and not broken:
            logger.info(f"step {verdict.step}: skipped; the gradient overflows float16, the loss is scaled less now")
        else:
            logger.warning(f"step {verdict.step}: skipped; its {what} is NaN or infinite. Its records: {named}")

    def _way_out(self) -> str:
        broken = [n for n, p in self.model.named_parameters() if p.is_floating_point() and not p.isfinite().all()]
        if broken:
            return f"The model's own {broken[0]} is NaN or infinite: its file is broken, or --torch_dtype too narrow"
        return (
            "Lower --learning_rate, set --max_grad_norm 1.0, or use --bf16 or --torch_dtype float32 in place of "
            "16-bit floats (fp16)"
        )

    def on_train_end(self, args, state, control, model=None, **kwargs):
        self.settle()
        if 0 < state.max_steps <= state.global_step == self.skipped:
            raise NonFiniteError(
                f"the loss or the gradient of every step ({state.global_step}) is NaN or infinite: no step was taken. "
                f"{self._way_out()}"
            )
        check_weights(model, state.global_step)


def _named(records: Sequence[str]) -> str:
    """A few records by file and line, and the number of the others."""
    found = list(dict.fromkeys(records))
    more = f" and {len(found) - NAMED} more" if len(found) > NAMED else ""
    return (", ".join(found[:NAMED]) or "not known") + more


def check_weights(model: nn.Module, step: int) -> None:
    """Raises NonFiniteError, on all processes, if a trained weight is NaN or infinite."""
    if not are_finite(model):
        raise NonFiniteError(
            f"weights are NaN or infinite after step {step}; they were not saved. Lower --learning_rate, and continue "
            "from the last complete checkpoint (--resume_from_checkpoint True)"
        )


class SkipsNonFinite:
    """Mixin for a Trainer: passes each step's gradient norm and records to the guard, and checks weights before they
    are used.

    A training batch may name its records as `where`, which no model sees. In the logged mean a non-finite loss counts
    as the last finite one before it; with --logging_nan_inf_filter False the log shows NaN.
    """

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.guard = NonFiniteGuard()
        self.add_callback(self.guard)
        self.last_loss = torch.zeros((), device=self.args.device)
        self.lost = torch.zeros((), device=self.args.device)  # non-finite losses since the last log

    def _prepare_inputs(self, inputs):
        return super()._prepare_inputs({name: value for name, value in inputs.items() if name != "where"})

    def training_step(self, model, inputs, *args: Any, **kwargs: Any) -> torch.Tensor:
        self.guard.records = inputs.get("where", ())
        loss = super().training_step(model, inputs, *args, **kwargs)
        finite = loss.isfinite()
        self.lost += ~finite
        self.last_loss = torch.where(finite, loss, self.last_loss.to(loss))
        return self.last_loss

    def _get_grad_norm(self, model, grad_norm=None):
        """Called once per optimizer step, before it, with or without clipping; under DeepSpeed after it."""
        norm = super()._get_grad_norm(model, grad_norm=grad_norm)
        if self.is_deepspeed_enabled:
            bad = torch.tensor(self.accelerator.optimizer_step_was_skipped or self.guard.held_back)
        else:
            bad = ~torch.as_tensor(norm).isfinite()
        self.guard.judge(self.state.global_step + 1, bad.float())
        return norm

    def _maybe_log_save_evaluate(self, *args: Any, **kwargs: Any) -> None:
        control = self.control
        if self.args.device.type == "cpu" or control.should_log or control.should_save or control.should_evaluate:
            self.guard.settle()
        if self.guard.skipped:
            self.state.stateful_callbacks[SKIPPED] = self.guard.skipped
        if control.should_save or control.should_evaluate:
            check_weights(self.model, self.state.global_step)
        super()._maybe_log_save_evaluate(*args, **kwargs)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds the number of skipped steps, if any, to a training log."""
        if "loss" in logs:
            if self.guard.skipped:
                logs[SKIPPED] = self.guard.skipped
                if self.accelerator.reduce(self.lost, "sum").item() and not self.args.logging_nan_inf_filter:
                    logs["loss"] = math.nan
            self.lost.zero_()
        super().log(logs, start_time)
