"""Validation records in the Trainer: each batch knows its records, so every record's numbers are kept."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset
from transformers import EvalPrediction

from stagewise.data.examples import Example, PreferenceExample
from stagewise.formats.json_lines import write_json_lines


def padded_length(example: Example | PreferenceExample) -> int:
    """Tokens of a row, or of each row of a pair, in a batch of its own."""
    if isinstance(example, PreferenceExample):
        return max(len(example.chosen.input_ids), len(example.rejected.input_ids))
    return len(example.input_ids)


class ValidationSet(Dataset):
    """Validation examples, longest first so that a batch has similar lengths; an item is (index, example)."""

    def __init__(self, examples: Sequence[Example | PreferenceExample]):
        self.examples = sorted(examples, key=padded_length, reverse=True)

    @property
    def wheres(self) -> list[str]:
        return [example.where for example in self.examples]

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, index: int) -> tuple[int, Any]:
        return index, self.examples[index]


class WithIndex:
    """A collator for training items, and for validation items with their index.

    A validation batch has `index` (B,), a training batch `where`: each record's file and line.
    """

    def __init__(self, collate: Callable[[Sequence[Any]], dict[str, torch.Tensor]], rows: bool):
        """`rows`: a training item is a list of examples, so a validation example becomes a row of its own."""
        self.collate, self.rows = collate, rows

    def __call__(self, items: Sequence[Any]) -> dict[str, torch.Tensor]:
        if not isinstance(items[0], tuple):
            examples = [example for row in items for example in row] if self.rows else items
            return {**self.collate(items), "where": [example.where for example in examples]}
        examples = [[example] if self.rows else example for _, example in items]
        return {**self.collate(examples), "index": torch.tensor([index for index, _ in items])}


class EvaluationTable:
    """`compute_metrics` for the Trainer: metrics of all validation records, and a row for each of them.

    The stage's `prediction_step` returns a record's numbers as `logits` of shape (B, columns) and its index in the
    validation set as `labels` (B,); the Trainer gathers them over all processes.

    Args:
        wheres: each validation record's location, "english.jsonl:17", by index.
        columns: names of the numbers.
        summarize: rows (N, columns) -> metrics.
    """

    def __init__(self, wheres: Sequence[str], columns: Sequence[str], summarize: Callable[[np.ndarray], dict]):
        self.wheres, self.columns, self.summarize = list(wheres), list(columns), summarize
        self.rows = np.zeros((0, len(columns)))
        self.order = np.zeros(0, dtype=np.int64)

    def __call__(self, prediction: EvalPrediction) -> dict[str, float]:
        rows = np.asarray(prediction.predictions, dtype=np.float64)
        index = np.asarray(prediction.label_ids)
        # Processes get whole batches, so the last ones may repeat a record: each counts once.
        self.order, first = np.unique(index, return_index=True)
        self.rows = rows[first]
        return self.summarize(self.rows)

    def write(self, path: Path) -> None:
        """Writes the rows of the last evaluation as jsonl, one record per line."""
        rows = zip(self.order, self.rows, strict=True)
        numbers = ((self.wheres[index], zip(self.columns, map(float, row), strict=True)) for index, row in rows)
        write_json_lines(path, ({"where": where, **dict(columns)} for where, columns in numbers))
