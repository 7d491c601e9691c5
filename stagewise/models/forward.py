"""The forward pass of training: the output head runs only where a token is learned, and NEFTune's noise.

On a prompt-heavy batch most positions have no learned next token, and the head is the widest matrix of a small model;
leaving those positions out changes no loss and no gradient.
"""

from __future__ import annotations

import inspect

import torch
from torch import nn

from stagewise.losses import learned_positions


def takes_kept_logits(model: nn.Module) -> bool:
    """Whether the architecture's forward can compute logits at chosen positions alone (`logits_to_keep`)."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    return "logits_to_keep" in inspect.signature(base.forward).parameters


def learned_logits(
    model: nn.Module, inputs: dict[str, torch.Tensor], keep_logits: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits at the positions whose next token is learned, and those tokens.

    Args:
        model: a causal language model, wrapped (DDP, DeepSpeed, PEFT) or not.
        inputs: a packed batch (1, T) with `position_ids` and no `attention_mask`, or a padded one (B, T) with a mask.
        keep_logits: what `takes_kept_logits` said of the unwrapped model.

    Returns:
        logits (B, K, V) and targets (B, K), -100 where a row does not learn a position that another row does.
    """
    labels = inputs["labels"]
    features = {name: value for name, value in inputs.items() if name not in ("labels", "index")}
    positions = learned_positions(labels)
    targets = labels[:, positions + 1]
    positions = positions - labels.shape[1]  # from the end: virtual tokens of an adapter may stand before the row
    if keep_logits:
        return model(**features, use_cache=False, logits_to_keep=positions).logits, targets
    return model(**features, use_cache=False).logits[:, positions], targets


def document_sums(values: torch.Tensor, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    """Sums of per-token values for each record of a batch.

    Args:
        values: (B, K), at the positions of `learned_positions(inputs["labels"])`.
        inputs: the batch; a packed one (it has `position_ids`) holds several documents in its one row.

    Returns:
        (documents,): one sum a row of a padded batch, one a document of a packed batch.
    """
    if "position_ids" not in inputs:
        return values.sum(dim=1)
    document = (inputs["position_ids"][0] == 0).cumsum(0) - 1
    sums = values.new_zeros(int(document[-1]) + 1)
    # A token belongs to the document it stands in, one position after the one that predicts it.
    return sums.index_add_(0, document[learned_positions(inputs["labels"]) + 1], values[0])


class EmbeddingNoise:
    """NEFTune (Jain et al. 2023): uniform noise within ±alpha / sqrt(L d) on the embeddings, in training only.

    L is the length of the token's own document, without padding, and d the embedding's size, so that a document is
    treated alike whether it stands alone, in a padded batch or in a packed row.
    """

    def __init__(self, model: nn.Module, alpha: float):
        self.alpha = alpha
        self.lengths: torch.Tensor | None = None
        self.handle = model.get_input_embeddings().register_forward_hook(self._add)

    def see(self, inputs: dict[str, torch.Tensor]) -> None:
        """Notes the documents' lengths of the batch that the next forward pass embeds: (B, T)."""
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
