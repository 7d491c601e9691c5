"""Examples → rows → batches. A packed row keeps document boundaries:

input_ids     a a a a b b b c c        three documents in one row
position_ids  0 1 2 3 0 1 2 0 1        restart at each document
labels        x a a a x b b x c        x = -100: nothing predicts a document's first token
"""

from bisect import bisect_left, insort
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch.utils.data import Dataset

from stagewise.data.examples import IGNORE_INDEX, Example, Examples, PreferenceExample

Batch = dict[str, torch.Tensor]


def pack(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Rows of indices whose lengths sum to at most `capacity`; best-fit decreasing, every index once.

    The same lengths always give the same rows, in the order of each row's first index. Raises ValueError for a
    length below 1 or above the capacity.
    """
    for index, length in enumerate(lengths):
        if not 1 <= length <= capacity:
            raise ValueError(f"example {index} has {length} tokens; a packed row holds 1 to {capacity}")
    rows: list[list[int]] = []
    with_room: dict[int, list[int]] = {}  # room left → rows with that room
    rooms: list[int] = []  # its keys, sorted
    for index in sorted(range(len(lengths)), key=lambda index: (-lengths[index], index)):
        length = lengths[index]
        position = bisect_left(rooms, length)
        if position == len(rooms):
            row, room = len(rows), capacity
            rows.append([])
        else:
            room = rooms[position]
            row = with_room[room].pop()
            if not with_room[room]:
                del with_room[room], rooms[position]
        rows[row].append(index)
        left = room - length
        if left and left not in with_room:
            with_room[left] = []
            insort(rooms, left)
        if left:
            with_room[left].append(row)
    return sorted(sorted(row) for row in rows)


class PackedRows(Dataset):
    """Examples packed into rows of at most `capacity` tokens; item i is the list of examples of row i."""

    def __init__(self, examples: Sequence[Example], capacity: int):
        self.examples, self.capacity = examples, capacity
        sizes = token_counts(examples)
        self.rows = pack(sizes, capacity)  # of indices: an example is made when its row is accessed
        self.lengths = [sum(sizes[index] for index in row) for row in self.rows]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> list[Example]:
        return [self.examples[number] for number in self.rows[index]]


def token_counts(examples: Sequence[Example]) -> list[int]:
    """(N,) tokens of each example."""
    if isinstance(examples, Examples):
        return examples.tokens[:, 0].tolist()
    return [len(example.input_ids) for example in examples]


def collate_packed(rows: Sequence[Sequence[Example]]) -> Batch:
    """Rows of examples → one row without padding: input_ids, labels, position_ids of shape (1, T).

    There is no attention_mask on purpose: only without one does transformers build the block mask from the restarting
    positions.
    """
    examples = [example for row in rows for example in row]
    ids = [token for example in examples for token in example.input_ids]
    labels = [label for example in examples for label in (IGNORE_INDEX, *example.labels[1:])]
    positions = [position for example in examples for position in range(len(example.input_ids))]
    return {
        "input_ids": torch.tensor([ids], dtype=torch.long),
        "labels": torch.tensor([labels], dtype=torch.long),
        "position_ids": torch.tensor([positions], dtype=torch.long),
    }


@dataclass(frozen=True)
class PaddedCollator:
    """Examples → input_ids, labels, attention_mask of shape (B, T), padded on the right."""

    pad_token_id: int

    def __call__(self, examples: Sequence[Example]) -> Batch:
        length = max(len(example.input_ids) for example in examples)
        missing = [length - len(example.input_ids) for example in examples]
        pairs = list(zip(examples, missing, strict=True))
        ids = [[*example.input_ids, *[self.pad_token_id] * pad] for example, pad in pairs]
        labels = [[*example.labels, *[IGNORE_INDEX] * pad] for example, pad in pairs]
        mask = [[1] * (length - pad) + [0] * pad for pad in missing]
        return {
            "input_ids": torch.tensor(ids, dtype=torch.long),
            "labels": torch.tensor(labels, dtype=torch.long),
            "attention_mask": torch.tensor(mask, dtype=torch.long),
        }


@dataclass(frozen=True)
class PreferenceCollator:
    """B preference examples → input_ids, labels, attention_mask of shape (2B, T), the B chosen rows first."""

    pad_token_id: int

    def __call__(self, pairs: Sequence[PreferenceExample]) -> Batch:
        rows = [pair.chosen for pair in pairs] + [pair.rejected for pair in pairs]
        return PaddedCollator(self.pad_token_id)(rows)
