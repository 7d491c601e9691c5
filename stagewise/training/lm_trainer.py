"""Shared by pretraining and supervised finetuning: rows, and a Trainer with an exact validation loss."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from loguru import logger
from torch import nn
from torch.utils.data import Dataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase, Trainer

from stagewise.data.examples import IGNORE_INDEX, Example
from stagewise.data.packing import PackedRows, PaddedCollator, collate_packed
from stagewise.data.streaming.dataset import RecordStream
from stagewise.losses import token_nll
from stagewise.models.attention.choose import packs_exactly
from stagewise.models.forward import EmbeddingNoise, document_sums, label_logits, takes_kept_logits
from stagewise.models.router_loss import BalancesExperts, RouterLoss
from stagewise.training.callbacks import Resumes
from stagewise.training.evaluation_set import WithIndex
from stagewise.training.finiteness import SkipsNonFinite
from stagewise.training.length_grouping import GroupsByLength
from stagewise.training.resume.position import KeepsPosition
from stagewise.training.sample_generations import Sample, choose_examples, generate_samples
from stagewise.training.stream_trainer import TakesStreams
from stagewise.training.throughput import LogsSpeed


def training_rows(
    examples: Sequence[Example] | RecordStream,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    capacity: int,
    packing: bool,
    padded_because: str | None = None,
) -> tuple[Dataset | Sequence[Example], WithIndex, str]:
    """Packs examples into rows of at most `capacity` tokens if that is exact for the model, otherwise leaves them
    alone.

    A stream packs during training. `padded_because` is the reason why the training method cannot use packed rows, or
    None.

    Returns:
        the training set, the collator of both splits, and a description of the choice for the log and run.json.
    """
    exact, reason = False, "--packing False" if not packing else padded_because
    if reason is None:
        exact, reason = packs_exactly(model, tokenizer)
    collate = (
        WithIndex(collate_packed, rows=True)
        if exact
        else WithIndex(PaddedCollator(tokenizer.pad_token_id), rows=False)
    )
    how = f"packed: {reason}" if exact else f"padded, one record a row: {reason}"
    if isinstance(examples, RecordStream):
        examples.pack_to(capacity if exact else None)
        how += "; read while training runs"
    if not exact or isinstance(examples, RecordStream):
        logger.info(f"rows: {how}")
        return examples, collate, how
    rows = PackedRows(examples, capacity)
    tokens = sum(rows.lengths)
    if len(rows):
        logger.info(
            f"rows: {how}; {len(examples)} records in {len(rows)} rows of at most {capacity} tokens, "
            f"{tokens / len(rows):.0f} on average"
        )
    return rows, collate, how


class LanguageModelTrainer(
    TakesStreams, KeepsPosition, GroupsByLength, BalancesExperts, SkipsNonFinite, Resumes, LogsSpeed, Trainer
):
    """The token loss of the stages that train on text; the stage's own subclass has `compute_loss`."""

    loss_is_scaled_for_ga = True

    def __init__(
        self,
        *args: Any,
        neft_alpha: float | None,
        router: RouterLoss | None = None,
        **kwargs: Any,
    ):
        super().__init__(*args, **kwargs)
        self.router = router
        self.model_accepts_loss_kwargs = True  # the Trainer then counts the labels of the whole batch
        self.noise = EmbeddingNoise(self.model, neft_alpha) if neft_alpha else None
        self.keep_logits = takes_kept_logits(self.model)

    def token_losses(self, model: nn.Module, inputs: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        """Negative log-likelihoods of the tokens with labels, and those tokens (-100 elsewhere): (B, K), (B, K)."""
        if self.noise:
            self.noise.see(inputs)
        logits, targets = label_logits(model, inputs, self.keep_logits)
        return token_nll(logits, targets), targets

    def eval_samples(self, count: int, stops: Sequence[str], synced: bool = False) -> list[Sample]:
        """The model's answers to a few validation records, beside the reference answers (--eval_samples)."""
        return generate_samples(self, choose_examples(self, count), stops, synced)

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        """Each record's summed loss and number of labels, (B, 2), and its index, (B,)."""
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad(), self.compute_loss_context_manager():
            nll, targets = self.token_losses(model, inputs)
        counts = (targets != IGNORE_INDEX).to(nll.dtype)
        return None, torch.stack([document_sums(values, inputs) for values in (nll, counts)], dim=1), inputs["index"]
