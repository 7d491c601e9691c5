"""The criteria of a pipeline report: paired differences over validation records, and the conditions they must meet.

Pure functions. `Rows` are the numbers of one evaluation: each record's location ("english.jsonl:17") -> its columns. A
change counts only if it exceeds two standard errors of the paired difference.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from stagewise.training.metrics import perplexity, standard_error

Rows = Mapping[str, Mapping[str, float]]

RM_ACCURACY, RM_PAIRS = 0.70, 80
LENGTH_ALONE = (0.40, 0.60)
PPO_KL, PPO_LENGTH, PPO_PERPLEXITY = 10.0, 0.30, 0.20


@dataclass(frozen=True)
class Line:
    """One metric before and after a stage.

    `holds` is None if there is no condition; `rule` describes the condition.
    """

    stage: str
    metric: str
    before: float | None
    after: float
    difference: float | None = None
    error: float | None = None
    holds: bool | None = None
    rule: str = ""


def in_language(rows: Rows, language: str) -> Rows:
    """The records of files named after the language: english*.jsonl."""
    return {where: row for where, row in rows.items() if where.rsplit("/", 1)[-1].startswith(language)}


def columns(before: Rows, after: Rows, *names: str) -> list[tuple[np.ndarray, np.ndarray]]:
    """For each column its values before and after, (N,) each, records in one order.

    Raises:
        ValueError: the two evaluations have different records.
    """
    if before.keys() != after.keys():
        odd = sorted(before.keys() ^ after.keys())
        raise ValueError(f"the evaluations before and after are of different records, {odd[0]} among them")
    order = sorted(before)
    return [tuple(np.array([rows[where][name] for where in order]) for rows in (before, after)) for name in names]


def mean_difference(before: np.ndarray, after: np.ndarray) -> tuple[float, float]:
    """Mean of after - before over records, and its standard error."""
    return float(np.mean(after - before)), standard_error(after - before)


def weighted_difference(before: np.ndarray, after: np.ndarray, weights: np.ndarray) -> tuple[float, float]:
    """Difference of sums per unit of weight, sum(after - before) / sum(weights), and its standard error.

    That is the mean D of d_i = (after_i - before_i) / w_i, weighted by w_i; its error is that of a ratio of sums:
    sqrt(n / (n - 1) * sum((w_i * (d_i - D))^2)) / sum(w_i).
    """
    difference = float((after - before).sum() / weights.sum())
    spread = (after - before) - difference * weights
    count = len(weights)
    error = math.sqrt(count / (count - 1) * float((spread**2).sum())) / float(weights.sum()) if count > 1 else math.nan
    return difference, error


def accuracy(rows: Rows) -> float:
    """Share of pairs whose chosen answer has the higher number; a tie counts one half."""
    return float(_wins(np.array([row["chosen"] - row["rejected"] for row in rows.values()])).mean())


def _wins(margins: np.ndarray) -> np.ndarray:
    return (margins > 0) + 0.5 * (margins == 0)


# ----------------------------------------------------------------------------------------------------------- stages


def language_model(stage: str, before: Rows, after: Rows) -> Line:
    """PT and SFT: the perplexity falls. The difference is in nats per token, weighted by the records' tokens."""
    (nll_before, nll_after), (tokens, _) = columns(before, after, "nll", "tokens")
    difference, error = weighted_difference(nll_before, nll_after, tokens)
    return Line(
        stage,
        "perplexity (difference: nats per token)",
        perplexity(nll_before.sum() / tokens.sum()),
        perplexity(nll_after.sum() / tokens.sum()),
        difference,
        error,
        difference < -2 * error,
        "falls by more than two standard errors",
    )


def reward_model(before: Rows, after: Rows, length_alone: float, bag_of_words: float) -> list[Line]:
    """RM: the accuracy reaches its threshold on enough pairs, and length alone does not explain it."""
    chosen, rejected = columns(before, after, "chosen", "rejected")
    was, now = (_wins(c - r) for c, r in zip(chosen, rejected, strict=True))
    reached = float(now.mean())
    low, high = LENGTH_ALONE
    return [
        Line(
            "RM",
            f"accuracy on {len(now)} pairs",
            float(was.mean()),
            reached,
            *mean_difference(was, now),
            reached >= RM_ACCURACY and len(now) >= RM_PAIRS,
            f"at least {RM_ACCURACY:.2f}, on {RM_PAIRS} pairs or more",
        ),
        Line(
            "RM",
            "accuracy of preferring the longer answer",
            None,
            length_alone,
            holds=low <= length_alone <= high,
            rule=f"from {low:.2f} to {high:.2f}",
        ),
        Line("RM", "accuracy of a bag of words trained on the same pairs", None, bag_of_words),
    ]


def ppo(before: Rows, after: Rows) -> list[Line]:
    """PPO: the reward rises, while the responses stay close to the SFT model's in KL, length and perplexity."""
    names = ("score", "kl", "length", "nll", "ended", "repetition")
    score, kl, length, nll, ended, repetition = columns(before, after, *names)
    difference, error = mean_difference(*score)
    lines = [
        Line(
            "PPO",
            f"mean reward on {len(score[0])} prompts",
            float(score[0].mean()),
            float(score[1].mean()),
            difference,
            error,
            difference > 2 * error,
            "rises by more than two standard errors",
        )
    ]
    kl_now = float(kl[1].mean())
    rule = f"under {PPO_KL:.0f}"
    lines.append(_ppo("KL to the SFT model, nats per response", kl, kl_now < PPO_KL, rule))
    shift = float(length[1].mean() / length[0].mean() - 1)
    lines.append(
        _ppo("length, tokens per response", length, abs(shift) <= PPO_LENGTH, f"within {PPO_LENGTH:.0%} of before")
    )
    was, now = (perplexity(n.sum() / t.sum()) for n, t in zip(nll, length, strict=True))
    lines.append(
        Line(
            "PPO",
            "perplexity of its answers under the SFT model",
            was,
            now,
            now - was,
            holds=now / was - 1 < PPO_PERPLEXITY,
            rule=f"rises by less than {PPO_PERPLEXITY:.0%}",
        )
    )
    lines.append(_ppo("share of answers that end by themselves", ended))
    lines.append(_ppo("repetition", repetition))
    return lines


def _ppo(metric: str, values: tuple[np.ndarray, np.ndarray], holds: bool | None = None, rule: str = "") -> Line:
    before, after = (float(v.mean()) for v in values)
    return Line("PPO", metric, before, after, *mean_difference(*values), holds, rule)


def dpo(before: Rows, after: Rows) -> list[Line]:
    """DPO: accuracy and margin of the implicit rewards rise (they start at one half and 0)."""
    chosen, rejected = columns(before, after, "chosen", "rejected")
    margins = [c - r for c, r in zip(chosen, rejected, strict=True)]
    lines = []
    for metric, (was, now) in (
        (f"implicit-reward accuracy on {len(margins[0])} pairs", map(_wins, margins)),
        ("implicit-reward margin", margins),
    ):
        difference, error = mean_difference(was, now)
        rule = "rises by more than two standard errors"
        holds = difference > 2 * error
        lines.append(Line("DPO", metric, float(was.mean()), float(now.mean()), difference, error, holds, rule))
    return lines


# -------------------------------------------------------------------------------------------------- without a model


def length_alone(pairs: Sequence[tuple[str, str]]) -> float:
    """Accuracy of preferring the longer answer of (chosen, rejected), in characters; a tie counts one half."""
    return float(_wins(np.array([len(chosen) - len(rejected) for chosen, rejected in pairs])).mean())


def words(text: str) -> list[str]:
    """Lower-case English words and single Chinese characters."""
    return re.findall(r"[a-z]+(?:'[a-z]+)?|[\u4e00-\u9fff]", text.lower().replace("\u2019", "'"))


def bag_of_words(
    training: Sequence[tuple[str, str]],
    validation: Sequence[tuple[str, str]],
    penalty: float = 1.0,
    steps: int = 2000,
) -> float:
    """Accuracy on validation pairs of a logistic regression on word counts.

    A pair's features x, (V,), are the counts of each training word in the chosen answer less those in the rejected.
    The weights w, (V,), minimise sum(log(1 + exp(-w x))) + penalty / 2 |w|^2 by gradient descent from 0. They stay
    sums of training features, w = a X with a (N,), so that only products of features are needed.
    """
    known = sorted({word for pair in training for text in pair for word in words(text)})
    place = {word: i for i, word in enumerate(known)}

    def features(pairs: Sequence[tuple[str, str]]) -> np.ndarray:
        x = np.zeros((len(pairs), len(place)))
        for row, (chosen, rejected) in zip(x, pairs, strict=True):
            for sign, text in ((1, chosen), (-1, rejected)):
                for word in words(text):
                    if word in place:
                        row[place[word]] += sign
        return x

    x = features(training)
    products = x @ x.T
    curvature = (
        penalty + np.linalg.norm(products, 2) / 4
    )  # of the loss, at most: a step of its inverse cannot overshoot
    a = np.zeros(len(x))
    for _ in range(steps):
        missing = 1 / (1 + np.exp(products @ a))  # 1 - p(the chosen answer is preferred), (N,)
        a -= (penalty * a - missing) / curvature
    return float(_wins(features(validation) @ (a @ x)).mean())
