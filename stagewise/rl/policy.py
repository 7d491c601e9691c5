"""Policy, value head and reference with one set of weights.

prompt and response ─► base + adapter ─► last hidden states ─┬─► output head ─► log-probabilities of the response
                                                             └─► value head  ─► expected future reward
                   └─► base alone ────────────────────────────► output head ─► the reference's log-probabilities
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from contextlib import nullcontext

import torch
from torch import nn

from stagewise.data.examples import IGNORE_INDEX
from stagewise.losses import label_positions, token_nll
from stagewise.models.forward import base_of, takes_kept_logits
from stagewise.models.reward_head import Float32Linear

Batch = dict[str, torch.Tensor]


def answer_batch(prompts: Sequence[list[int]], answers: Sequence[list[int]], pad_id: int) -> Batch:
    """Prompts with their responses, which have labels: input_ids, labels, attention_mask of shape (B, T).

    All responses begin at the same column, so logits, the largest matrix product, are only computed for responses:

        . . p p p | a a a a
        p p p p p | a a . .
    """
    before, after = (max(map(len, part)) for part in (prompts, answers))
    ids, labels, mask = [], [], []
    for prompt, answer in zip(prompts, answers, strict=True):
        left, right = before - len(prompt), after - len(answer)
        ids.append([pad_id] * left + prompt + answer + [pad_id] * right)
        labels.append([IGNORE_INDEX] * before + answer + [IGNORE_INDEX] * right)
        mask.append([0] * left + [1] * (len(prompt) + len(answer)) + [0] * right)
    return {"input_ids": torch.tensor(ids), "labels": torch.tensor(labels), "attention_mask": torch.tensor(mask)}


class Policy:
    """What PPO needs from a causal language model, which gets a `value_head`.

    Args:
        model: with an adapter, or without; the value head becomes a part of it, and is trained with it.
        reference: None if the reference is the model without its adapter; else a frozen copy.
        temperature: of sampling and of log-probabilities.
    """

    def __init__(self, model: nn.Module, reference: nn.Module | None, temperature: float):
        self.model, self.reference, self.temperature = model, reference, temperature
        base = base_of(model)
        self.keep_logits = takes_kept_logits(model)
        self.takes_positions = "position_ids" in inspect.signature(base.forward).parameters
        self.hidden: torch.Tensor | None = None  # the last input of the output head
        weight = model.get_output_embeddings().weight
        model.value_head = Float32Linear(weight.shape[1], 1, device=weight.device)
        nn.init.zeros_(model.value_head.weight)
        nn.init.zeros_(model.value_head.bias)
        for each in (model, reference):
            if each is not None:
                each.get_output_embeddings().register_forward_pre_hook(self._see)

    def _see(self, head: nn.Module, args: tuple) -> None:
        self.hidden = args[0]

    def logps_and_values(self, model: nn.Module, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        """Each response token's log-probability at the policy's temperature, and the value before it.

        Args:
            model: the model, wrapped (DDP, DeepSpeed) or not.
            batch: from `answer_batch`, on the model's device.

        Returns:
            (N,) and (N,) in float32, for the N tokens of the batch's responses, row after row.
        """
        logits, hidden, targets = self._before_answers(model, batch)
        answered = targets != IGNORE_INDEX
        values = self.model.value_head(hidden[answered]).squeeze(1).float()
        return _logps(logits, targets, self.temperature), values

    @torch.no_grad()
    def reference_logps(self, batch: Batch, *others: float) -> list[torch.Tensor]:
        """Log-probabilities of the response tokens under the reference, at the policy's and at other temperatures.

        Returns:
            (N,) for the policy's temperature, then one for each of `others`.
        """
        with self.model.disable_adapter() if self.reference is None else nullcontext():
            logits, _, targets = self._before_answers(self.reference or self.model, batch)
        found = {temperature: _logps(logits, targets, temperature) for temperature in {self.temperature, *others}}
        return [found[temperature] for temperature in (self.temperature, *others)]

    def _before_answers(self, model: nn.Module, batch: Batch) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Logits (B, A, V) and hidden states (B, A, H) at the columns before response tokens, and those tokens, (B,
        A).
        """
        features = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"], "use_cache": False}
        places = label_positions(batch["labels"])
        if self.takes_positions:
            features["position_ids"] = (batch["attention_mask"].cumsum(dim=1) - 1).clamp_min(0)
        if self.keep_logits:
            features["logits_to_keep"] = places
        logits = model(**features).logits
        hidden, self.hidden = self.hidden, None
        if not self.keep_logits:
            logits, hidden = logits[:, places], hidden[:, places]
        return logits, hidden, batch["labels"][:, places + 1]


def _logps(logits: torch.Tensor, targets: torch.Tensor, temperature: float) -> torch.Tensor:
    """Log-probabilities of the targets that are not padding: (B, A, V), (B, A) -> (N,)."""
    logps = -token_nll(logits if temperature == 1 else logits.float() / temperature, targets)
    return logps[targets != IGNORE_INDEX]
