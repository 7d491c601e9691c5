"""Rows and batches: every token once, boundaries kept."""

import random

import pytest
import torch

from stagewise.data.examples import Example, PreferenceExample
from stagewise.data.packing import PackedRows, PaddedCollator, PreferenceCollator, collate_packed, pack


def example(*ids, masked=0):
    return Example(list(ids), [-100] * masked + list(ids)[masked:])


def lists(batch):
    return {name: tensor.tolist() for name, tensor in batch.items()}


# --- pack ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("lengths", "capacity", "rows"),
    [
        ([], 8, []),
        ([8], 8, [[0]]),
        ([3, 5], 8, [[0, 1]]),
        ([5, 4, 4, 3], 8, [[0, 3], [1, 2]]),
        # best fit: the 1 goes where it leaves nothing (6 + 5 + 1), not to the first row with room (8)
        ([8, 6, 5, 1], 12, [[0], [1, 2, 3]]),
        ([1, 1, 1, 1, 1], 2, [[0, 1], [2, 3], [4]]),
        ([7, 7, 7], 8, [[0], [1], [2]]),
    ],
)
def test_small_packings(lengths, capacity, rows):
    assert pack(lengths, capacity) == rows


def test_every_index_once_and_no_row_above_capacity():
    rng = random.Random(7)
    for _ in range(50):
        capacity = rng.randint(1, 64)
        lengths = [rng.randint(1, capacity) for _ in range(rng.randint(1, 200))]
        rows = pack(lengths, capacity)
        assert sorted(index for row in rows for index in row) == list(range(len(lengths)))
        assert max(sum(lengths[index] for index in row) for row in rows) <= capacity
        assert rows == pack(lengths, capacity)
        # no two rows fit into one: best fit never opens a row that an earlier one had room for
        loads = sorted(sum(lengths[index] for index in row) for row in rows)
        assert len(loads) < 2 or loads[0] + loads[1] > capacity


def test_many_documents_are_packed_tightly_and_fast():
    rng = random.Random(7)
    lengths = [min(2048, int(rng.lognormvariate(5, 1)) + 1) for _ in range(50_000)]
    rows = pack(lengths, 2048)
    assert len(rows) <= -(-sum(lengths) // 2048) + 1


@pytest.mark.parametrize(
    ("lengths", "says"), [([4, 9], "example 1 has 9 tokens; a packed row holds 1 to 8"), ([0], "has 0")]
)
def test_lengths_that_fit_no_row(lengths, says):
    with pytest.raises(ValueError, match=says):
        pack(lengths, 8)


# --- packed rows -----------------------------------------------------------------------------------------------------


def test_packed_rows_hold_the_examples_of_a_row():
    a, b, c = example(1, 2, 3, 4, 5), example(6, 7, 8, 9), example(10, 11, 12)
    rows = PackedRows([a, b, c], capacity=8)
    assert len(rows) == 2
    assert rows[0] == [a, c]
    assert rows[1] == [b]
    assert rows.lengths == [8, 4]


def test_a_packed_batch():
    rows = [[example(11, 12, 13, 14, masked=2), example(21, 22)], [example(31, 32, 33, masked=1)]]
    batch = collate_packed(rows)
    assert lists(batch) == {
        "input_ids": [[11, 12, 13, 14, 21, 22, 31, 32, 33]],
        "labels": [[-100, -100, 13, 14, -100, 22, -100, 32, 33]],
        "position_ids": [[0, 1, 2, 3, 0, 1, 0, 1, 2]],
    }
    assert {tensor.dtype for tensor in batch.values()} == {torch.int64}
    assert rows[0][1].labels == [21, 22]  # the examples themselves stay as they are


def test_no_attention_mask_is_passed_with_packed_rows():
    """With one, transformers lets documents see each other."""
    assert set(collate_packed([[example(1, 2)]])) == {"input_ids", "labels", "position_ids"}


def test_a_packed_batch_keeps_documents_apart(tiny_model):
    """What the boundaries are for: logits of a document in a row are those of the document alone."""
    model = tiny_model("llama")
    documents = [example(5, 6, 7, 8), example(9, 10, 11), example(12, 13, 14, 15, 16)]
    batch = collate_packed([documents[:2], documents[2:]])
    with torch.no_grad():
        packed = model(input_ids=batch["input_ids"], position_ids=batch["position_ids"], use_cache=False).logits[0]
        alone = [model(input_ids=torch.tensor([document.input_ids])).logits[0] for document in documents]
    assert torch.allclose(packed, torch.cat(alone), atol=1e-5)


# --- padded batches --------------------------------------------------------------------------------------------------


def test_a_padded_batch():
    batch = PaddedCollator(pad_token_id=9)([example(1, 2, 3, masked=1), example(4), example(5, 6)])
    assert lists(batch) == {
        "input_ids": [[1, 2, 3], [4, 9, 9], [5, 6, 9]],
        "labels": [[-100, 2, 3], [4, -100, -100], [5, 6, -100]],
        "attention_mask": [[1, 1, 1], [1, 0, 0], [1, 1, 0]],
    }


def test_a_document_may_hold_the_pad_token():
    """pad = eos is common: the end marker stays learned and seen."""
    batch = PaddedCollator(pad_token_id=2)([example(1, 2), example(3, 4, 2)])
    assert lists(batch)["labels"] == [[1, 2, -100], [3, 4, 2]]
    assert lists(batch)["attention_mask"] == [[1, 1, 0], [1, 1, 1]]


def test_a_preference_batch_has_the_chosen_rows_first():
    pairs = [
        PreferenceExample(example(1, 2, 3, masked=1), example(1, 4, masked=1)),
        PreferenceExample(example(5, 6, masked=1), example(5, 7, 8, 9, masked=1)),
    ]
    assert lists(PreferenceCollator(pad_token_id=0)(pairs)) == {
        "input_ids": [[1, 2, 3, 0], [5, 6, 0, 0], [1, 4, 0, 0], [5, 7, 8, 9]],
        "labels": [[-100, 2, 3, -100], [-100, 6, -100, -100], [-100, 4, -100, -100], [-100, 7, 8, 9]],
        "attention_mask": [[1, 1, 1, 0], [1, 1, 0, 0], [1, 1, 0, 0], [1, 1, 1, 1]],
    }
