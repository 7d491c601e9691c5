"""TensorBoard: scalars under names that keep what belongs together side by side, hyperparameters, samples as text.

learning/loss/train  learning/loss/validation  learning/reward/train …      what is learned, split beside split
optimizer/grad_norm  optimizer/learning_rate …                              how steps are taken
speed/memory_gib  speed/tokens_per_second …                                 what they cost
run/…  samples/…                                                            texts
"""

from __future__ import annotations

import json
import math
from typing import Any

from tensorboard.compat.proto.summary_pb2 import Summary
from torch.utils.tensorboard import SummaryWriter
from torch.utils.tensorboard.summary import hparams
from transformers import TrainerCallback

from stagewise.artifacts.eval_samples import read_samples
from stagewise.reports.only_shown import errors_logged
from stagewise.reports.terminal_text import visible

OPTIMISER = ("learning_rate", "grad_norm", "epoch", "kl_coef", "clip_fraction")
SPEED = ("tokens_per_second", "memory_gib")
EVALUATION = "eval_"
# Of the logs' names these are no scalars: totals at the end of training, in train_results.json, and doubled speeds.
NOT_SHOWN = ("samples_per_second", "steps_per_second", "total_flos", "train_runtime", "train_loss", "step", "tokens")
# What the HPARAMS page compares runs by, where the run has it.
COMPARED = ("loss", "accuracy", "margin", "reward", "kl", "perplexity")
# Settings that say what a run was, though no flag gave them.
ALWAYS = (
    *("learning_rate", "per_device_train_batch_size", "gradient_accumulation_steps", "num_train_epochs", "max_steps"),
    *("weight_decay", "warmup_steps", "seed"),
)


def tag_of(name: str) -> str | None:
    """The name in TensorBoard of a number that the Trainer logs, or None for one that is not shown."""
    evaluation, bare = name.startswith(EVALUATION), name.removeprefix(EVALUATION)
    if name in NOT_SHOWN or bare in NOT_SHOWN or name.startswith("train_"):
        return None
    if evaluation:
        return "speed/evaluation_seconds" if bare == "runtime" else f"learning/{bare}/validation"
    if bare in OPTIMISER:
        return f"optimizer/{bare}"
    return f"speed/{bare}" if bare in SPEED else f"learning/{bare}/train"


def as_text(sample: dict[str, Any]) -> str:
    """A sample as Markdown that shows every text as it is, whatever it holds."""
    parts = [("prompt", sample["prompt"])] if sample["prompt"] else []
    for text in sample["texts"]:
        score = "" if text.get("score") is None else f" ({text['score']:.4g})"
        parts.append((f"{text['label']}{score}", text["text"]))
    # Indented lines are code in Markdown: what looks like HTML or a heading in them stays what it is.
    blocks = [f"**{name}**\n\n{_as_code(visible(text))}" for name, text in parts]
    return "\n\n".join([f"`{visible(sample['where'])}`", *blocks])


def _as_code(text: str) -> str:
    return "\n".join(f"    {line}" for line in text.split("\n"))


class Board(TrainerCallback):
    """Writes a run to TensorBoard's files, from the main process; takes the place of transformers' own callback."""

    def __init__(self, manifest: dict[str, Any]):
        self.manifest = manifest
        self.writer: SummaryWriter | None = None
        self.resumed_at = 0

    @errors_logged("TensorBoard")
    def on_train_begin(self, args, state, control, model=None, **kwargs):
        if not state.is_world_process_zero:
            return
        self.resumed_at = state.global_step
        writer = self._open(args)
        writer.add_text("run/command", _as_code(visible(" ".join(self.manifest["command"]))))
        writer.add_text("run/arguments", _as_code(args.to_json_string()))
        if getattr(model, "config", None) is not None:
            writer.add_text("run/model_config", _as_code(model.config.to_json_string()))
        names = [tag_of(f"{EVALUATION}{name}") for name in COMPARED] + [tag_of("loss"), "speed/tokens_per_second"]
        for part in hparams(self._hyperparameters(args), dict.fromkeys(names, 0.0)):
            self._write(part)

    @errors_logged("TensorBoard")
    def on_log(self, args, state, control, logs=None, **kwargs):
        if not state.is_world_process_zero or not logs:
            return
        writer = self._open(args)
        for name, value in logs.items():
            tag = tag_of(name)
            if tag and isinstance(value, int | float) and not isinstance(value, bool):
                writer.add_scalar(tag, value, state.global_step)
        writer.flush()

    @errors_logged("TensorBoard")
    def on_evaluate(self, args, state, control, **kwargs):
        if not state.is_world_process_zero:
            return
        writer = self._open(args)
        for number, sample in enumerate(read_samples(args.output_dir, state.global_step), 1):
            writer.add_text(f"samples/{number}", as_text(sample), state.global_step)
        writer.flush()  # an evaluation alone ends here

    @errors_logged("TensorBoard")
    def on_train_end(self, args, state, control, **kwargs):
        if self.writer is not None:
            self.writer.flush()

    def close(self) -> None:
        if self.writer is not None:
            self.writer.close()
            self.writer = None

    def _open(self, args) -> SummaryWriter:
        if self.writer is None:
            # Of a resumed run, what an earlier process wrote beyond the checkpoint is not shown any more.
            purge = self.resumed_at + 1 if self.resumed_at else None
            self.writer = SummaryWriter(log_dir=args.logging_dir, purge_step=purge)
        return self.writer

    def _write(self, summary: Summary) -> None:
        # add_hparams would begin a run of its own in a folder of its own, and write the metrics' values as 0.
        self.writer.file_writer.add_summary(summary)

    def _hyperparameters(self, args) -> dict[str, Any]:
        """The stage, the flags that were given, and the settings that every run has."""
        found = {"stage": self.manifest["stage"], **{name: getattr(args, name) for name in ALWAYS}}
        found |= {name: value for name, value in self.manifest["flags"].items() if not name.endswith("_dir")}
        return {name: _as_hyperparameter(value) for name, value in found.items()}


def _as_hyperparameter(value: Any) -> int | float | str | bool:
    """A setting as TensorBoard takes it."""
    if isinstance(value, int | float):  # bool, too
        return str(value) if value == math.inf else value
    return visible(value) if isinstance(value, str) else json.dumps(value, default=str)
