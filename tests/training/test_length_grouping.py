from itertools import pairwise

import pytest
import torch
from torch.utils.data import RandomSampler
from transformers import Trainer

from stagewise.data.examples import Example
from stagewise.data.packing import PackedRows, PaddedCollator
from stagewise.training.evaluation_set import padded_length
from stagewise.training.length_grouping import GroupsByLength, LengthGroups
from stagewise.training.settings import StageArguments
from tests.pair_runs import preferences


class PlainTrainer(GroupsByLength, Trainer):
    pass


def trainer_of(rows, folder, **changes):
    args = StageArguments(str(folder), use_cpu=True, report_to="none", **changes)
    return PlainTrainer(model=torch.nn.Linear(1, 1), args=args, train_dataset=rows, data_collator=PaddedCollator(0))


def examples(lengths):
    return [Example([5] * length, [5] * length) for length in lengths]


def test_every_row_once_and_like_lengths_beside_each_other():
    lengths = [3, 90, 4, 88, 5, 91, 3, 89] * 4
    order = list(LengthGroups(lengths, step_rows=2, seed=0))
    assert sorted(order) == list(range(32))
    assert lengths[order[0]] == 91
    # runs of short and long rows: far fewer borders between them than the 31 of the order they came in
    borders = sum((lengths[a] > 50) != (lengths[b] > 50) for a, b in pairwise(order))
    assert borders <= 8


def test_the_order_follows_from_seed_and_epoch_alone():
    lengths = list(range(1, 41))
    first, second = LengthGroups(lengths, 4, seed=7), LengthGroups(lengths, 4, seed=7)
    torch.manual_seed(1)
    order = list(first)
    torch.manual_seed(2)
    assert list(second) == order
    second.set_epoch(1)
    assert list(second) != order
    second.set_epoch(0)
    assert list(second) == order
    assert list(LengthGroups(lengths, 4, seed=8)) != order


def test_the_length_of_a_pair_is_that_of_its_longer_answer(tiny_tokenizer):
    # 139 tokens of prompt, then 5 and 38 of answers
    pair = preferences(tiny_tokenizer(), 1, 2)[0]
    assert (len(pair.chosen.input_ids), len(pair.rejected.input_ids), padded_length(pair)) == (144, 177, 177)


def test_batches_of_padded_rows_are_of_like_lengths_only_where_asked(tmp_path):
    lengths = [2, 40] * 32

    def padding(**changes):
        loader = trainer_of(examples(lengths), tmp_path, per_device_train_batch_size=4, **changes)
        return sum(int((batch["attention_mask"] == 0).sum()) for batch in loader.get_train_dataloader())

    assert padding(train_sampling_strategy="group_by_length") < padding() / 3


@pytest.mark.parametrize("accumulation", [1, 4])
def test_a_step_holds_like_lengths_over_its_micro_batches(tmp_path, accumulation):
    trainer = trainer_of(
        examples([9] * 8),
        tmp_path,
        train_sampling_strategy="group_by_length",
        gradient_accumulation_steps=accumulation,
        per_device_train_batch_size=2,
    )
    assert trainer._get_train_sampler().step_rows == 2 * accumulation


def test_the_loader_hands_the_epoch_on(tmp_path):
    rows = examples(range(1, 17))
    loader = trainer_of(rows, tmp_path, train_sampling_strategy="group_by_length").get_train_dataloader()

    def order(epoch):
        loader.set_epoch(epoch)
        return [length for batch in loader for length in batch["attention_mask"].sum(dim=1).tolist()]

    assert order(1) == order(1)
    assert order(1) != order(2)
    assert sorted(order(2)) == list(range(1, 17))


def test_packed_rows_keep_a_random_order(tmp_path):
    rows = PackedRows(examples([5, 6, 7]), 10)
    trainer = trainer_of(rows, tmp_path, train_sampling_strategy="group_by_length")
    assert isinstance(trainer._get_train_sampler(), RandomSampler)
