"""Metrics over records with confidence intervals, and whether two models differ.

Every metric is a function of sums over records, so one resampling scheme serves them all: records are drawn with
replacement and the sums recomputed (Efron 1979). Two models are compared on the same draws of the same records.

    columns   nll    tokens  rouge1 …        one row per record
    sums      412.0  230     17.3   …        over all records, or a draw
    metric    exp(412.0 / 230)
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from stagewise.evaluation.text_metrics import BLEU_COUNTS, ROUGES, bleu
from stagewise.training.metrics import perplexity

DRAWS = 1000
SEED = 0
LEVEL = 0.95
AT_ONCE = 50  # draws whose counts are in memory at a time

Row = Mapping[str, Any]


@dataclass(frozen=True)
class Metric:
    """A number computed from sums.

    Args:
        name: its key in metrics.json.
        title: its name in tables.
        columns: of a record; a record that lacks one, or has None, does not count.
        of: the columns' sums (C,) and the number of records -> the metric.
        better: 1 higher is better, -1 lower is better, 0 neither.
        digits: decimal places in tables.
        of_model: False if it depends only on the records, so models cannot differ.
    """

    name: str
    title: str
    columns: tuple[str, ...]
    of: Callable[[Sequence[float], int], float]
    better: int = 1
    digits: int = 3
    of_model: bool = True


def _mean(sums: Sequence[float], count: int) -> float:
    return float(sums[0] / count)


def mean_of(name: str, title: str, better: int = 1, digits: int = 3, of_model: bool = True) -> Metric:
    """The mean of a column of the same name."""
    return Metric(name, title, (name,), _mean, better, digits, of_model)


def _perplexity(sums: Sequence[float], count: int) -> float:
    return perplexity(float(sums[0] / sums[1])) if sums[1] else math.nan


SFT_METRICS = (
    Metric("perplexity", "perplexity of the references", ("nll", "tokens"), _perplexity, -1, 2),
    *(mean_of(name, name.replace("rouge", "ROUGE-")) for name in ROUGES),
    Metric("bleu", "BLEU", BLEU_COUNTS, lambda sums, count: bleu(list(sums)), 1, 2),
    mean_of("reward", "reward model's score"),
    mean_of("answer_tokens", "answer, tokens", 0, 1),
    mean_of("reference_tokens", "reference, tokens", 0, 1, of_model=False),
    mean_of("ended", "answers that end by themselves"),
)
RM_METRICS = (
    mean_of("correct", "accuracy"),
    mean_of("margin", "margin", 0),  # every reward model has its own scale
    mean_of("chosen", "score of the chosen", 0),
    mean_of("rejected", "score of the rejected", 0),
    mean_of("longer_is_better", "accuracy of preferring the longer", 0, of_model=False),
)
BENCHMARK_METRICS = (mean_of("correct", "accuracy", 1, 4),)


def column_sums(rows: Sequence[Row], metric: Metric) -> np.ndarray:
    """The metric's columns for the records that have all of them: (N, C)."""
    kept = [[row[name] for name in metric.columns] for row in rows if has(row, metric)]
    return np.asarray(kept, dtype=np.float64).reshape(len(kept), len(metric.columns))


def has(row: Row, metric: Metric) -> bool:
    return all(row.get(name) is not None for name in metric.columns)


def draws(count: int, number: int = DRAWS, seed: int = SEED) -> Iterator[np.ndarray]:
    """How often each of `count` records is drawn: (AT_ONCE, count) arrays, `number` rows in total."""
    generator = np.random.default_rng(seed)
    for start in range(0, number, AT_ONCE):
        yield generator.multinomial(count, np.full(count, 1 / count), size=min(AT_ONCE, number - start))


def interval(values: Sequence[float]) -> tuple[float, float]:
    """The central interval that contains LEVEL of the draws' values."""
    edge = 100 * (1 - LEVEL) / 2
    low, high = np.percentile(values, (edge, 100 - edge))
    return float(low), float(high)


def measure(rows: Sequence[Row], metrics: Sequence[Metric]) -> dict[str, dict[str, float]]:
    """Each metric that any record has: {"value", "low", "high", "records"}; a single record has no interval."""
    found = {}
    for metric in metrics:
        columns = column_sums(rows, metric)
        count = len(columns)
        if not count:
            continue
        value = metric.of(columns.sum(axis=0), count)
        found[metric.name] = {"value": value, "records": count}
        if count > 1 and math.isfinite(value):
            drawn = [metric.of(sums, count) for weights in draws(count) for sums in weights @ columns]
            found[metric.name]["low"], found[metric.name]["high"] = interval(drawn)
    return found


@dataclass(frozen=True)
class Difference:
    """How much higher a metric is for another model than for the first, on the records that both answered."""

    metric: Metric
    first: float
    other: float
    low: float
    high: float
    records: int

    @property
    def difference(self) -> float:
        return self.other - self.first

    @property
    def verdict(self) -> str:
        """ "better" or "worse" ("higher", "lower" if neither applies), or "no difference" if the interval has 0."""
        if not (self.low > 0 or self.high < 0):
            return "no difference that these records show"
        up = self.difference > 0
        if not self.metric.better:
            return "higher" if up else "lower"
        return "better" if up == (self.metric.better > 0) else "worse"


def differences(first: Mapping[str, Row], other: Mapping[str, Row], metrics: Sequence[Metric]) -> Iterator[Difference]:
    """The differences of each metric over records with the same key: paired bootstrap (Koehn 2004)."""
    for metric in metrics:
        keys = [key for key in first if key in other and has(first[key], metric) and has(other[key], metric)]
        if len(keys) < 2:
            continue
        one, two = (column_sums([rows[key] for key in keys], metric) for rows in (first, other))
        count = len(keys)
        values = [metric.of(columns.sum(axis=0), count) for columns in (one, two)]
        drawn = [
            metric.of(b, count) - metric.of(a, count)
            for weights in draws(count)
            for a, b in zip(weights @ one, weights @ two, strict=True)
        ]
        yield Difference(metric, *values, *interval(drawn), count)


# ── pairs by their length ──────────────────────────────────────────────────────────────────────────────────────────

LENGTH_STEPS = (-50, -10, 10, 50)  # chosen - rejected, tokens


def length_group(difference: int) -> str:
    """The group of a pair by the difference in length of its answers, in tokens (chosen - rejected)."""
    low, short, long, high = LENGTH_STEPS
    if difference <= low:
        return f"chosen shorter by {-low} or more"
    if difference <= short:
        return f"chosen shorter by {-short} to {-low - 1}"
    if difference < long:
        return f"within {long - 1}"
    if difference < high:
        return f"chosen longer by {long} to {high - 1}"
    return f"chosen longer by {high} or more"


LENGTH_GROUPS = tuple(length_group(n) for n in (-50, -10, 0, 10, 50))


def by_length(rows: Sequence[Row]) -> dict[str, dict[str, dict[str, float]]]:
    """Accuracy and margin of pairs grouped by difference in length, from shorter to longer chosen answers."""
    groups: dict[str, list[Row]] = {name: [] for name in LENGTH_GROUPS}
    for row in rows:
        groups[length_group(row["chosen_tokens"] - row["rejected_tokens"])].append(row)
    return {name: measure(members, RM_METRICS[:2]) for name, members in groups.items() if members}
