"""Every loss, as pure functions of tensors.

Shapes: B rows (or pairs), T positions, V vocabulary, K positions kept. Log-probabilities are computed in
float32 whatever the logits' precision.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from stagewise.encoding import IGNORE_INDEX


def learned_positions(labels: torch.Tensor) -> torch.Tensor:
    """Positions whose next token is learned in any row: labels (B, T) -> (K,), ascending."""
    return (labels[:, 1:] != IGNORE_INDEX).any(dim=0).nonzero().squeeze(1)


def token_nll(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Negative log-likelihood of each target, 0 where the target is ignored: (B, K, V), (B, K) -> (B, K)."""
    losses = F.cross_entropy(
        logits.float().flatten(0, 1), targets.flatten(), ignore_index=IGNORE_INDEX, reduction="none"
    )
    return losses.view_as(targets)


def sequence_logps(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Log-probability of each row's learned tokens, summed: (B, K, V), (B, K) -> (B,)."""
    return -token_nll(logits, targets).sum(dim=1)


def pairwise_loss(chosen: torch.Tensor, rejected: torch.Tensor) -> torch.Tensor:
    """Bradley-Terry loss of reward models, one value a pair: (B,), (B,) -> (B,). Ouyang et al. 2022, equation 1."""
    return -F.logsigmoid(chosen.float() - rejected.float())


def dpo_loss(
    policy_chosen: torch.Tensor,
    policy_rejected: torch.Tensor,
    reference_chosen: torch.Tensor,
    reference_rejected: torch.Tensor,
    beta: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """DPO loss and implicit rewards, one value a pair, from summed log-probabilities. Rafailov et al. 2023, eq. 7.

    Returns:
        losses (B,), chosen rewards (B,), rejected rewards (B,); the rewards carry no gradient.
    """
    chosen = beta * (policy_chosen - reference_chosen)
    rejected = beta * (policy_rejected - reference_rejected)
    return -F.logsigmoid(chosen - rejected), chosen.detach(), rejected.detach()
