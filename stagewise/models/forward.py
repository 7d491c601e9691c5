"""The forward pass of training: logits only at positions with a label, and NEFTune's noise.

In a prompt-heavy batch most positions have no label, and the output head is the largest matrix of a small model;
skipping those positions changes neither loss nor gradients.
"""

from __future__ import annotations

import inspect

import torch
from torch import nn

from stagewise.losses import label_positions


def base_of(model: nn.Module) -> nn.Module:
    """The model under an adapter, or the model itself."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def takes_kept_logits(model: nn.Module) -> bool:
    """Whether the architecture can compute logits at chosen positions only (`logits_to_keep`)."""
    base = base_of(model)
    return "logits_to_keep" in inspect.signature(base.forward).parameters


def label_logits(
    model: nn.Module, inputs: dict[str, torch.Tensor], keep_logits: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits at the positions whose next token has a label, and those tokens.

    Args:
        model: a causal language model, wrapped (DDP, DeepSpeed, PEFT) or not.
        inputs: a packed batch (1, T) with `position_ids` and no `attention_mask`, or a padded one (B, T) with a mask.
        keep_logits: the result of `takes_kept_logits` for the unwrapped model.

    Returns:
        logits (B, K, V) and targets (B, K), -100 where only another row has a label at a position.
    """
    labels = inputs["labels"]
    features = {name: value for name, value in inputs.items() if name not in ("labels", "index")}
    positions = label_positions(labels)
    targets = labels[:, positions + 1]
    positions = positions - labels.shape[1]  # counted from the end: virtual tokens of an adapter may precede the row
    if keep_logits:
        return model(**features, use_cache=False, logits_to_keep=positions).logits, targets
    return model(**features, use_cache=False).logits[:, positions], targets


def document_sums(values: torch.Tensor, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    """Sums of per-token values for each record of a batch.

    Args:
        values: (B, K), at the positions of `label_positions(inputs["labels"])`.
        inputs: the batch; a packed one (it has `position_ids`) holds several documents in its one row.

    Returns:
        (documents,): one sum per row of a padded batch, per document of a packed batch.
    """
    if "position_ids" not in inputs:
        return values.sum(dim=1)
    document = (inputs["position_ids"][0] == 0).cumsum(0) - 1
    sums = values.new_zeros(int(document[-1]) + 1)
    # A token belongs to the document at its own position, one after the position that predicts it.
    return sums.index_add_(0, document[label_positions(inputs["labels"]) + 1], values[0])


class EmbeddingNoise:
    """NEFTune (Jain et al. 2023): uniform noise within ±alpha / sqrt(L d) on the embeddings, only in training.

    L is the length of the token's document, without padding, and d the embedding size, so a document gets the same
    noise level alone, in a padded batch and in a packed row.
    """

    def __init__(self, model: nn.Module, alpha: float):
        self.alpha = alpha
        self.lengths: torch.Tensor | None = None
        self.handle = model.get_input_embeddings().register_forward_hook(self._add)

    def see(self, inputs: dict[str, torch.Tensor]) -> None:
        """Stores the document lengths of the batch, (B, T), that the next forward pass embeds."""
        if "position_ids" in inputs:
            document = (inputs["position_ids"][0] == 0).cumsum(0) - 1
            self.lengths = torch.bincount(document)[document].unsqueeze(0)
        else:
            mask = inputs["attention_mask"]
            self.lengths = mask.sum(dim=1, keepdim=True).expand_as(mask)

    def _add(self, module: nn.Module, args: tuple, embeddings: torch.Tensor) -> torch.Tensor:
        if not module.training:
            return embeddings
        bound = self.alpha / (self.lengths.unsqueeze(-1) * embeddings.shape[-1]).sqrt()
        # At bound 0 (a document of no tokens) there is no token to disturb.
        return embeddings + ((torch.rand_like(embeddings) * 2 - 1) * bound).to(embeddings.dtype)
