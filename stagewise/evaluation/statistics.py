"""Metrics of records with intervals: what an evaluation comes to, and whether two models differ.

Every metric is a function of sums over records, so that one way of resampling serves them all: records are drawn with
replacement and the sums are taken anew (Efron 1979). Two models are compared on the same draws of the same records.

    columns   nll    tokens  rouge1 …        one row a record
    sums      412.0  230     17.3   …        of all, or of a draw
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
AT_ONCE = 50  # draws whose counts are in memory together

Row = Mapping[str, Any]


@dataclass(frozen=True)
class Metric:
    """A number that is made of sums.

    Args:
        name: its key in metrics.json.
        title: as tables call it.
        columns: of a record; a record that lacks one, or has None there, does not count.
        of: the columns' sums (C,) and the number of records -> the metric.
        better: 1 more is better, -1 less is better, 0 neither.
        digits: behind the point in tables.
        of_model: False for what the records alone say, in which models do not differ.
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
    mean_of("margin", "margin", 0),  # each reward model has a scale of its own
    mean_of("chosen", "score of the chosen", 0),
    mean_of("rejected", "score of the rejected", 0),
    mean_of("longer_is_better", "accuracy of preferring the longer", 0, of_model=False),
)
BENCHMARK_METRICS = (mean_of("correct", "accuracy", 1, 4),)


def column_sums(rows: Sequence[Row], metric: Metric) -> np.ndarray:
    """The metric's columns of the records that have them all: (N, C)."""
    kept = [[row[name] for name in metric.columns] for row in rows if has(row, metric)]
    return np.asarray(kept, dtype=np.float64).reshape(len(kept), len(metric.columns))


def has(row: Row, metric: Metric) -> bool:
    return all(row.get(name) is not None for name in metric.columns)


def draws(count: int, number: int = DRAWS, seed: int = SEED) -> Iterator[np.ndarray]:
    """How often each of `count` records is drawn: (AT_ONCE, count) arrays, `number` rows in all."""
    generator = np.random.default_rng(seed)
    for start in range(0, number, AT_ONCE):
        yield generator.multinomial(count, np.full(count, 1 / count), size=min(AT_ONCE, number - start))


def interval(values: Sequence[float]) -> tuple[float, float]:
    """The middle LEVEL of the draws' values."""
    edge = 100 * (1 - LEVEL) / 2
    low, high = np.percentile(values, (edge, 100 - edge))
    return float(low), float(high)


def measure(rows: Sequence[Row], metrics: Sequence[Metric]) -> dict[str, dict[str, float]]:
    """Each metric that any record has: {"value", "low", "high", "records"}; one record has no interval."""
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
    """What another model has more of a metric than the first, on the records that both have answered."""

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
        """ "better" or "worse" ("higher", "lower" where neither is), or "no difference" where the interval holds 0."""
        if not (self.low > 0 or self.high < 0):
            return "no difference that these records show"
        up = self.difference > 0
        if not self.metric.better:
            return "higher" if up else "lower"
        return "better" if up == (self.metric.better > 0) else "worse"


def differences(first: Mapping[str, Row], other: Mapping[str, Row], metrics: Sequence[Metric]) -> Iterator[Difference]:
    """For each metric, over records of the same key: paired bootstrap (Koehn 2004)."""
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
    """Which group a pair is in, by how many tokens the chosen answer has more than the rejected one."""
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
    """Accuracy and margin of pairs in groups of like difference in length, from chosen shorter to chosen longer."""
    groups: dict[str, list[Row]] = {name: [] for name in LENGTH_GROUPS}
    for row in rows:
        groups[length_group(row["chosen_tokens"] - row["rejected_tokens"])].append(row)
    return {name: measure(members, RM_METRICS[:2]) for name, members in groups.items() if members}
