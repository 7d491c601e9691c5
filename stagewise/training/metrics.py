"""Metrics of a model, with the standard errors that show whether two of them differ."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np


def perplexity(nll: float) -> float:
    """exp of a mean negative log-likelihood in nats; infinity if exp overflows."""
    return math.exp(nll) if nll < 700 else math.inf


def standard_error(values: Sequence[float] | np.ndarray) -> float:
    """Standard error of the mean; nan for fewer than two values."""
    values = np.asarray(values, dtype=np.float64)
    return float(values.std(ddof=1) / math.sqrt(len(values))) if len(values) > 1 else math.nan


def language_model_metrics(rows: np.ndarray) -> dict[str, float]:
    """Columns nll (summed over a record's labels), tokens -> loss per token, perplexity, number of labels."""
    nll, tokens = rows[:, 0].sum(), rows[:, 1].sum()
    return {"loss": float(nll / tokens), "perplexity": perplexity(nll / tokens), "tokens": int(tokens)}


def pair_metrics(rows: np.ndarray) -> dict[str, float]:
    """Columns chosen reward, rejected reward -> accuracy (a tie counts one half), mean margin, losses.

    The loss is the pairwise one, -log sigmoid(chosen - rejected).
    """
    margins = rows[:, 0] - rows[:, 1]
    correct = (margins > 0) + 0.5 * (margins == 0)
    return {
        "loss": float(np.logaddexp(0.0, -margins).mean()),
        "accuracy": float(correct.mean()),
        "accuracy_standard_error": standard_error(correct),
        "margin": float(margins.mean()),
        "margin_standard_error": standard_error(margins),
        "chosen_reward": float(rows[:, 0].mean()),
        "rejected_reward": float(rows[:, 1].mean()),
    }
