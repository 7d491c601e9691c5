"""Every loss, as pure functions of tensors.

Shapes: B rows (or pairs), T positions, V vocabulary, K positions with a label. Log-probabilities are computed in
float32, whatever the precision of the logits.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from stagewise.data.examples import IGNORE_INDEX


def label_positions(labels: torch.Tensor) -> torch.Tensor:
    """Positions whose next token has a label in any row: labels (B, T) -> (K,), ascending."""
    return (labels[:, 1:] != IGNORE_INDEX).any(dim=0).nonzero().squeeze(1)


def token_nll(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Negative log-likelihood of each target, 0 for ignored targets: (B, K, V), (B, K) -> (B, K)."""
    losses = F.cross_entropy(
        logits.float().flatten(0, 1), targets.flatten(), ignore_index=IGNORE_INDEX, reduction="none"
    )
    return losses.view_as(targets)


def sequence_logps(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Log-probability of each row's tokens with labels, summed: (B, K, V), (B, K) -> (B,)."""
    return -token_nll(logits, targets).sum(dim=1)


def pairwise_loss(chosen: torch.Tensor, rejected: torch.Tensor) -> torch.Tensor:
    """Bradley-Terry loss of reward models per pair: (B,), (B,) -> (B,). Ouyang et al. 2022, equation 1."""
    return -F.logsigmoid(chosen.float() - rejected.float())


def dpo_loss(
    policy_chosen: torch.Tensor,
    policy_rejected: torch.Tensor,
    reference_chosen: torch.Tensor,
    reference_rejected: torch.Tensor,
    beta: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """DPO loss and implicit rewards per pair, from summed log-probabilities. Rafailov et al. 2023, eq. 7.

    Returns:
        losses (B,), chosen rewards (B,), rejected rewards (B,); the rewards carry no gradient.
    """
    chosen = beta * (policy_chosen - reference_chosen)
    rejected = beta * (policy_rejected - reference_rejected)
    return -F.logsigmoid(chosen - rejected), chosen.detach(), rejected.detach()


def moments(values: torch.Tensor) -> torch.Tensor:
    """Count, sum and sum of squares in float64, (3,): those of several processes can be added up."""
    values = values.double()
    return torch.stack([torch.full_like(values.sum(), values.numel()), values.sum(), values.square().sum()])


def whiten(values: torch.Tensor, of: torch.Tensor | None = None) -> torch.Tensor:
    """Values minus their mean, divided by their standard deviation: any shape -> the same shape.

    Args:
        values: any shape.
        of: `moments` of all values to be whitened, if `values` is only a part of them.

    Equal values become 0.
    """
    count, total, squares = moments(values) if of is None else of
    mean = total / count
    variance = (squares / count - mean.square()).clamp_min(0)
    return ((values.double() - mean) * (variance + 1e-8).rsqrt()).to(values.dtype)


def gae(
    rewards: torch.Tensor, values: torch.Tensor, mask: torch.Tensor, gamma: float, lam: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Generalized advantage estimation. Schulman et al. 2016, equation 16.

    Args:
        rewards: (B, T), per token; what follows a row's last token is ignored.
        values: (B, T), the value head's estimate before each token.
        mask: (B, T), 1 at a row's tokens, which come first.
        gamma: discount factor.
        lam: weight of later errors of the value head; 1 gives the full return.

    Returns:
        advantages (B, T) and returns (B, T) = advantages + values, 0 after a row's last token.
    """
    mask = mask.to(values.dtype)
    rewards, values = rewards * mask, values * mask
    advantages = torch.zeros_like(values)
    later = torch.zeros_like(values[:, 0])
    for t in reversed(range(values.shape[1])):
        next_value = values[:, t + 1] if t + 1 < values.shape[1] else torch.zeros_like(later)
        later = (rewards[:, t] + gamma * next_value - values[:, t] + gamma * lam * later) * mask[:, t]
        advantages[:, t] = later
    return advantages, advantages + values


def ppo_policy_loss(
    logps: torch.Tensor, old_logps: torch.Tensor, advantages: torch.Tensor, clip: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Clipped policy loss per token, and where it was clipped: (N,) each -> (N,), (N,) bool.

    Schulman et al. 2017, equation 7.
    """
    ratio = (logps - old_logps).exp()
    plain = -advantages * ratio
    clipped = -advantages * ratio.clamp(1 - clip, 1 + clip)
    return torch.maximum(plain, clipped), clipped > plain


def value_loss(values: torch.Tensor, old_values: torch.Tensor, returns: torch.Tensor, clip: float) -> torch.Tensor:
    """Clipped squared error of the value head, halved, per token: (N,) each -> (N,)."""
    near = old_values + (values - old_values).clamp(-clip, clip)
    return 0.5 * torch.maximum((values - returns).square(), (near - returns).square())


def kl_to_older(logps: torch.Tensor, old_logps: torch.Tensor) -> torch.Tensor:
    """Estimate of KL(old || new) per token sampled from the old policy, never negative: (N,), (N,) -> (N,).

    The third estimator of Schulman's "Approximating KL divergence": ratio - 1 - log ratio.
    """
    log_ratio = logps - old_logps
    return log_ratio.exp() - 1 - log_ratio


def adapted_kl_coef(coef: float, kl: float, target: float) -> float:
    """The KL coefficient after a rollout with a KL of `kl` nats per response to the reference.

    Ziegler et al. 2019, section 2.2: coef * (1 + 0.1 e), e = (kl - target) / target within [-0.2, 0.2].
    """
    error = min(max((kl - target) / target, -0.2), 0.2)
    return coef * (1 + 0.1 * error)
