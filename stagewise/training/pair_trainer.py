"""Shared by reward modeling and DPO: reading pairs, and a Trainer with exact validation, pair by pair."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from transformers import Trainer, TrainingArguments

from stagewise.chat.encoding import AnyTemplate
from stagewise.chat.preference_encoding import PreferenceEncoder
from stagewise.chat.reward_template import Ending
from stagewise.config.arguments import PairArguments
from stagewise.data.read_splits import read_splits
from stagewise.data.split_loader import SplitLoader
from stagewise.data.splits import Encoding, Splits
from stagewise.formats.parsers import parse_preference
from stagewise.training.callbacks import Resumes
from stagewise.training.finiteness import SkipsNonFinite
from stagewise.training.length_grouping import GroupsByLength
from stagewise.training.resume.position import KeepsPosition
from stagewise.training.sample_generations import Sample, choose_examples, scored_pairs
from stagewise.training.throughput import LogsSpeed


def read_pairs(
    loader: SplitLoader,
    args: TrainingArguments,
    tokenizer: Any,
    template: AnyTemplate,
    pair_args: PairArguments,
    ending: Ending | None = None,
) -> Splits:
    """Preferences as encoded pairs of answers within the length limits; with `ending`, rows of a reward model."""
    limits = {"max_source_length": pair_args.max_source_length, "max_target_length": pair_args.max_target_length}
    encoding = Encoding(
        parse_preference,
        PreferenceEncoder(tokenizer, template, **limits, ending=ending),
        limits=limits,
        tokenizer=tokenizer,
        depends_on={"template": template.jinja(), "ending": ending},
    )
    return read_splits(loader, encoding, train=args.do_train, validation=args.do_eval)


class PairTrainer(KeepsPosition, GroupsByLength, SkipsNonFinite, Resumes, LogsSpeed, Trainer):
    """Batches are (2B, T), the B chosen rows first. The stage's subclass has `rewards` and `compute_loss`.

    `compute_loss` gets the number of pairs of the whole batch, over all micro-batches and processes, as
    `num_items_in_batch`, so its loss is the mean over pairs however they are distributed.
    """

    loss_is_scaled_for_ga = True

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        # Since the last log: pairs, chosen rewards, rejected rewards, correctly ordered pairs (a tie counts half).
        self.seen = torch.zeros(4, device=self.args.device)

    def rewards(self, model: nn.Module, inputs: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        """Rewards of a batch's chosen and rejected answers: (B,), (B,)."""
        raise NotImplementedError

    def see(self, chosen: torch.Tensor, rejected: torch.Tensor) -> None:
        """Adds a training batch's rewards, (B,) each, to the next log."""
        with torch.no_grad():
            right = (chosen > rejected).float() + 0.5 * (chosen == rejected).float()
            count = torch.tensor(float(len(chosen)), device=chosen.device)
            self.seen += torch.stack([count, chosen.sum(), rejected.sum(), right.sum()]).to(self.seen)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds accuracy, margin and mean rewards since the last log, over all processes, to a training log."""
        if "loss" in logs:
            pairs, chosen, rejected, right = self.accelerator.reduce(self.seen, "sum").tolist()
            self.seen.zero_()
            logs["accuracy"], logs["margin"] = right / pairs, (chosen - rejected) / pairs
            logs["chosen_reward"], logs["rejected_reward"] = chosen / pairs, rejected / pairs
        super().log(logs, start_time)

    def _get_num_items_in_batch(self, batch_samples: list[dict], device: torch.device) -> int:
        """The pairs of an optimizer step, over all processes; transformers would count labels."""
        pairs = torch.tensor(sum(len(batch["input_ids"]) // 2 for batch in batch_samples), device=device)
        return int(self.accelerator.gather(pairs).sum())

    def eval_samples(self, count: int, stops: Sequence[str], synced: bool = False) -> list[Sample]:
        """A few validation pairs with their rewards (--eval_samples)."""
        return scored_pairs(self, choose_examples(self, count))

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        """Each pair's two rewards, (B, 2), and its index, (B,)."""
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad(), self.compute_loss_context_manager():
            chosen, rejected = self.rewards(model, inputs)
        return None, torch.stack([chosen, rejected], dim=1), inputs["index"]
