"""Statistics of encoded records: how many, how long, the share with labels, and the contents of a training step.

lengths        3 3 4 9        tokens of four records
packed, 10     3 3 4 | 9      two rows: 19 of 20 tokens are filled, nothing is padding
padded by 2    3 3 | 4 9      two batches: 6 and 18 tokens, 5 of them padding
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from stagewise.data.examples import IGNORE_INDEX, Example, Examples, PreferenceExample

QUANTILES = {"median": 0.5, "p90": 0.9, "p99": 0.99}
UNITS = {"records": ("record", "records"), "pairs": ("pair", "pairs"), "prompts": ("prompt", "prompts")}


# --- what the records are --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Measures:
    """Tokens, and tokens with labels, of N examples, (N, 1), or of the two rows of N pairs, (N, 2)."""

    tokens: np.ndarray
    learned: np.ndarray

    @property
    def kind(self) -> str:
        """ "pairs", "prompts" (no labels: answers follow), or "records"."""
        if self.tokens.shape[1] == 2:
            return "pairs"
        return "records" if self.learned.any() else "prompts"

    @property
    def lengths(self) -> np.ndarray:
        """(N,): what each needs in a batch; for a pair, the longer row."""
        return self.tokens.max(axis=1)


def measure(items: Sequence[Example | PreferenceExample]) -> Measures:
    """Counts the tokens of examples or of pairs; `items` may be empty."""
    if isinstance(items, Examples):
        return Measures(items.tokens, items.learned)
    rows = [(item.chosen, item.rejected) if isinstance(item, PreferenceExample) else (item,) for item in items]
    shape = (len(rows), len(rows[0]) if rows else 1)
    tokens = [len(example.input_ids) for row in rows for example in row]
    learned = [count_labels(example.labels) for row in rows for example in row]
    return Measures(np.array(tokens, np.int64).reshape(shape), np.array(learned, np.int64).reshape(shape))


def count_labels(labels: Sequence[int] | np.ndarray) -> int:
    """The number of labels that are not −100, without the first, which nothing predicts."""
    if isinstance(labels, np.ndarray):
        return int(np.count_nonzero(labels[1:] != IGNORE_INDEX))
    return len(labels) - labels.count(IGNORE_INDEX) - (labels[0] != IGNORE_INDEX)


def quantiles(lengths: np.ndarray) -> dict[str, int]:
    """min, median, p90, p99 and max of (N,), N at least 1: p90 is the smallest value that 90% do not exceed."""
    middle = np.quantile(lengths, list(QUANTILES.values()), method="inverted_cdf")
    named = dict(zip(QUANTILES, map(int, middle), strict=True))
    return {"min": int(lengths.min()), **named, "max": int(lengths.max())}


def bins(lengths: np.ndarray, most: int = 16) -> list[tuple[int, int, int]]:
    """A histogram of (N,): (shortest, longest, count) of at most `most` bins, whose width is a power of two.

    The limits that people set are usually such powers or sums of a few, so records cut at one are in the last bin.
    """
    width = 1
    while (lengths.max() - 1) // width - (lengths.min() - 1) // width >= most:
        width *= 2
    first = (int(lengths.min()) - 1) // width
    counts = np.bincount((lengths - 1) // width - first)
    return [((first + n) * width + 1, (first + n + 1) * width, int(count)) for n, count in enumerate(counts)]


@dataclass(frozen=True)
class Summary:
    """One split: `records` were kept, and make `examples` (more than records if texts are cut into blocks)."""

    kind: str
    records: int
    examples: int
    tokens: int
    learned: int
    cut: int
    lengths: dict[str, int]
    limits: dict[str, int] = field(default_factory=dict)
    streamed: bool = False  # these are the first records of a stream and stand for all of it

    def as_dict(self) -> dict[str, Any]:
        learned_share, cut_share = round(self.learned / self.tokens, 4), round(self.cut / self.records, 4)
        return {**asdict(self), "learned_share": learned_share, "cut_share": cut_share}

    def lines(self) -> list[str]:
        """A few lines for a person; possible mistakes are stated as facts."""
        (one, many), n = UNITS[self.kind], self.lengths
        blocks = f" in {counted(self.examples, 'block', 'blocks')}" if self.examples != self.records else ""
        part = {
            "records": f", {self.learned:,} with labels ({percent(self.learned, self.tokens)})",
            "pairs": f" in both rows, {self.learned:,} of them the answers' ({percent(self.learned, self.tokens)})",
            "prompts": "; the answers are still to come",
        }[self.kind]
        whose = "a block" if blocks else "a pair's longer row" if self.kind == "pairs" else f"a {one}"
        lines = [
            f"{counted(self.records, one, many)}{blocks}, {self.tokens:,} tokens{part}",
            f"tokens of {whose}: {n['min']:,} at least, median {n['median']:,}, 90% have at most {n['p90']:,}, "
            f"99% at most {n['p99']:,}, the longest {n['max']:,}",
        ]
        if self.cut:
            at = " or ".join(f"--{name} {limit}" for name, limit in self.limits.items()) or "the limit"
            lines.append(f"{percent(self.cut, self.records)} of the {many} ({self.cut:,}) are cut at {at}")
        return lines


def summarize(
    measures: Measures, records: int, cut: int = 0, limits: Mapping[str, int] | None = None, streamed: bool = False
) -> Summary:
    """The summary of a non-empty split.

    Args:
        measures: of its examples.
        records: the number of records they were made from.
        cut: how many of the records were shortened.
        limits: the limits they were shortened to, by the names of their flags.
        streamed: whether they are the first records of a stream.
    """
    return Summary(
        kind=measures.kind,
        records=records,
        examples=len(measures.tokens),
        tokens=int(measures.tokens.sum()),
        learned=int(measures.learned.sum()),
        cut=cut,
        lengths=quantiles(measures.lengths),
        limits=dict(limits or {}),
        streamed=streamed,
    )


# --- what a step holds -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class StepSize:
    """The settings that determine the rows of a step.

    Args:
        batch: rows per forward pass and process (pairs, if the records are pairs).
        accumulation: forward passes per step.
        processes: the number of processes.
        drop_last: whether an incomplete last batch is dropped (--dataloader_drop_last).
        grouped: whether rows of similar lengths are grouped (--train_sampling_strategy group_by_length).
        epochs, max_steps: the length of the run; max_steps counts if it is above 0.
    """

    batch: int
    accumulation: int = 1
    processes: int = 1
    drop_last: bool = False
    grouped: bool = False
    epochs: float = 1.0
    max_steps: int = -1

    @classmethod
    def of(cls, args: Any, processes: int) -> StepSize:
        """From transformers' TrainingArguments."""
        return cls(
            batch=args.per_device_train_batch_size,
            accumulation=args.gradient_accumulation_steps,
            processes=processes,
            drop_last=args.dataloader_drop_last,
            grouped=args.train_sampling_strategy == "group_by_length",
            epochs=args.num_train_epochs,
            max_steps=args.max_steps,
        )

    @property
    def rows(self) -> int:
        return self.batch * self.accumulation * self.processes

    def steps_per_epoch(self, rows: int) -> int:
        """As transformers and accelerate distribute rows: whole batches to each process, the last of them shared."""
        batches = rows // self.batch if self.drop_last else math.ceil(rows / self.batch)
        a_process = batches // self.processes if self.drop_last else math.ceil(batches / self.processes)
        return max(1, math.ceil(a_process / self.accumulation))

    def steps(self, rows: int) -> int:
        return self.max_steps if self.max_steps > 0 else math.ceil(self.epochs * self.steps_per_epoch(rows))


@dataclass(frozen=True)
class StepContents:
    """The contents of an optimizer step (for PPO, a rollout) over all processes; means if steps differ.

    `rows` counts pairs if the records are pairs; `tokens` are without `padding`; `filled` is the filled share of
    packed rows, None for padded ones. A stream has no `steps_per_epoch`.
    """

    kind: str
    rows: int
    examples: float
    tokens: float
    learned: float
    padding: float
    steps_per_epoch: int | None
    steps: int
    filled: float | None = None

    def as_dict(self) -> dict[str, Any]:
        return {name: round(value, 4) if isinstance(value, float) else value for name, value in asdict(self).items()}

    def line(self) -> str:
        names = ("rollout", "rollouts") if self.kind == "prompts" else ("step", "steps")
        held = counted(self.rows, *UNITS[self.kind])
        if self.filled is not None:
            rows = counted(self.rows, "packed row", "packed rows")
            held = f"{rows}, {self.filled:.1%} full, with {self.examples:,.1f} examples"
        elif self.kind == "pairs":
            held += f" in {2 * self.rows:,} rows"
        which = {"records": "with labels", "pairs": "of them the answers'"}.get(self.kind)
        learned = f", {self.learned:,.0f} {which}" if which else ""
        padding = "no padding"
        if round(self.padding):
            padding = f"{self.padding:,.0f} of padding ({percent(self.padding, self.tokens + self.padding)})"
        an_epoch = "" if self.steps_per_epoch is None else f"{counted(self.steps_per_epoch, *names)} per epoch, "
        return (
            f"a {names[0]}: {held}; {self.tokens:,.0f} tokens{learned}, and {padding}; {an_epoch}{self.steps:,} in all"
        )


def packed_step(measures: Measures, rows: int, capacity: int, size: StepSize) -> StepContents:
    """The contents of a step whose examples are packed into `rows` rows of at most `capacity` tokens."""
    held, tokens = min(size.rows, rows), int(measures.tokens.sum())
    return StepContents(
        kind=measures.kind,
        rows=held,
        examples=len(measures.tokens) * held / rows,
        tokens=tokens * held / rows,
        learned=float(measures.learned.sum()) * held / rows,
        padding=0.0,
        steps_per_epoch=size.steps_per_epoch(rows),
        steps=size.steps(rows),
        filled=tokens / (rows * capacity),
    )


def padded_step(measures: Measures, size: StepSize) -> StepContents:
    """The contents of a step in which every example is a row (every pair two) of a batch padded to its longest."""
    count, sides = measures.tokens.shape
    held, batch = min(size.rows, count), min(size.batch, count)
    longest = grouped_longest(measures.lengths, batch, size) if size.grouped else longest_of(measures.lengths, batch)
    tokens = int(measures.tokens.sum()) * held / count
    return StepContents(
        kind=measures.kind,
        rows=held,
        examples=float(held * sides),
        tokens=tokens,
        learned=float(measures.learned.sum()) * held / count,
        padding=max(0.0, longest * held * sides - tokens),
        steps_per_epoch=size.steps_per_epoch(count),
        steps=size.steps(count),
    )


def longest_of(lengths: np.ndarray, batch: int) -> float:
    """The mean longest length over all batches that can be drawn from (N,); 1 <= batch <= N.

    Of the i shortest come C(i, batch) of the C(N, batch) batches, which is the product of (i - j) / (N - j).
    """
    count = len(lengths)
    shortest = np.arange(count + 1, dtype=np.float64)
    within = np.ones(count + 1)
    for j in range(batch):
        within *= np.maximum(shortest - j, 0) / (count - j)
    return float((np.sort(lengths) * np.diff(within)).sum())


def grouped_longest(lengths: np.ndarray, batch: int, size: StepSize) -> float:
    """The mean longest length if similar lengths are grouped: the rows of up to 50 steps are sorted at a time.

    transformers' get_length_grouped_indices does this (except for its first batch); one random order stands for all.
    """
    count = len(lengths)
    steps = max(1, min(count // (size.rows * 4), 50))
    order = np.random.default_rng(0).permutation(count)
    parts = [order[first : first + steps * size.rows] for first in range(0, count, steps * size.rows)]
    arranged = np.concatenate([np.sort(lengths[part])[::-1] for part in parts])
    batches = [arranged[first : first + batch] for first in range(0, count, batch)]
    return float(sum(part.max() * len(part) for part in batches) / count)


def rollout_contents(measures: Measures, batch: int, processes: int, rollouts: int) -> StepContents:
    """The contents of a PPO rollout: `batch` prompts per process, padded to the longest; `rollouts` per run."""
    return padded_step(measures, StepSize(batch, processes=processes, max_steps=rollouts))


def counted(number: int, one: str, many: str) -> str:
    return f"{number:,} {one if number == 1 else many}"


def percent(part: float, whole: float) -> str:
    """A share as text: "7.5%"; never 0% of something, nor 100% of less than all."""
    share = 100 * part / whole
    if 0 < share < 0.1:
        return "less than 0.1%"
    if 99.9 < share < 100:
        return "more than 99.9%"
    return f"{share:.1f}%".replace(".0%", "%")
