"""What is said of encoded records, against numbers counted by hand and against the libraries that deal rows out."""

import itertools
import math
import time

import numpy as np
import pytest

from stagewise.data.examples import Example, ExampleWriter, PreferenceExample
from stagewise.data.statistics import (
    Measures,
    StepSize,
    bins,
    count_labels,
    grouped_longest,
    longest_of,
    measure,
    packed_step,
    padded_step,
    percent,
    quantiles,
    rollout_contents,
    summarize,
)
from tests.encoders import row_of


def example(labels: list[int]) -> Example:
    """An example whose ids are 7 everywhere; its labels are 7 where learned and -100 elsewhere."""
    return Example([7] * len(labels), [7 if learned else -100 for learned in labels], "a.jsonl:1")


# --- what the records are ---


def test_learned_tokens_leave_out_the_first_which_nothing_predicts():
    assert count_labels([-100, -100, 5, 6]) == 2
    assert count_labels([5, 6, -100]) == 1  # 5 stands first
    assert count_labels([5]) == count_labels([-100]) == 0
    assert count_labels(np.array([5, 6, -100, 8])) == 2


def test_examples_are_measured():
    measures = measure([example([0, 0, 1, 1]), example([0, 1]), example([1, 1, 1])])
    assert measures.tokens.tolist() == [[4], [2], [3]]
    assert measures.learned.tolist() == [[2], [1], [2]]
    assert measures.lengths.tolist() == [4, 2, 3]
    assert measures.kind == "records"


def test_pairs_are_measured_by_their_longer_row():
    pair = PreferenceExample(example([0, 0, 1]), example([0, 0, 1, 1, 1]))
    measures = measure([pair])
    assert measures.tokens.tolist() == [[3, 5]]
    assert measures.learned.tolist() == [[1, 3]]
    assert measures.lengths.tolist() == [5]
    assert measures.kind == "pairs"


def test_prompts_are_what_nothing_is_learned_of():
    assert measure([example([0, 0, 0]), example([0])]).kind == "prompts"


def test_examples_that_are_kept_as_arrays_are_measured_alike():
    rows = [example([0, 0, 1, 1, 0, 1]), example([1, 1, 0]), example([1])]
    writer = ExampleWriter()
    for row in rows:
        writer.add("Example", [row_of(row)])
    stored, plain = measure(writer.finish()), measure(rows)
    assert stored.tokens.tolist() == plain.tokens.tolist() == [[6], [3], [1]]
    assert stored.learned.tolist() == plain.learned.tolist() == [[3], [1], [0]]


def test_quantiles_are_lengths_that_occur():
    # Of ten records nine are not longer than 9, and all are not longer than 100.
    assert quantiles(np.array([1, 2, 3, 4, 5, 6, 7, 8, 9, 100])) == {
        "min": 1,
        "median": 5,
        "p90": 9,
        "p99": 100,
        "max": 100,
    }
    assert set(quantiles(np.array([6])).values()) == {6}


def test_bins_have_a_power_of_two_for_a_width_and_hold_every_length():
    assert bins(np.array([1, 2, 2, 5]), most=16) == [(1, 1, 1), (2, 2, 2), (3, 3, 0), (4, 4, 0), (5, 5, 1)]
    assert bins(np.array([1, 4, 5, 8]), most=2) == [(1, 4, 2), (5, 8, 2)]
    # From 513 to 1024: the limit of 1024 ends the last bin.
    assert bins(np.array([600, 1024, 1024]), most=4) == [(513, 640, 1), (641, 768, 0), (769, 896, 0), (897, 1024, 2)]
    assert bins(np.array([3])) == [(3, 3, 1)]


def test_a_summary_counts_what_is_learned_and_cut():
    measures = measure([example([0, 0, 1, 1]), example([0, 1, 1, 1, 1, 1])])
    summary = summarize(measures, records=2, cut=1, limits={"model_max_length": 6})
    assert summary.as_dict() == {
        "kind": "records",
        "records": 2,
        "examples": 2,
        "tokens": 10,
        "learned": 7,
        "cut": 1,
        "lengths": {"min": 4, "median": 4, "p90": 6, "p99": 6, "max": 6},
        "limits": {"model_max_length": 6},
        "streamed": False,
        "learned_share": 0.7,
        "cut_share": 0.5,
    }
    assert summary.lines() == [
        "2 records, 10 tokens, 7 with labels (70%)",
        "tokens of a record: 4 at least, median 4, 90% have at most 6, 99% at most 6, the longest 6",
        "50% of the records (1) are cut at --model_max_length 6",
    ]


def test_a_summary_tells_blocks_from_the_records_that_they_come_from():
    summary = summarize(measure([example([1, 1, 1])] * 3), records=1, limits={"block_size": 3})
    assert summary.lines()[0] == "1 record in 3 blocks, 9 tokens, 6 with labels (66.7%)"
    assert summary.lines()[1].startswith("tokens of a block: 3 at least")
    assert len(summary.lines()) == 2  # nothing is cut


def test_a_summary_of_pairs_and_of_prompts_says_what_they_are():
    pair = PreferenceExample(example([0, 1]), example([0, 1, 1, 1]))
    limits = {"max_source_length": 8, "max_target_length": 3}
    lines = summarize(measure([pair, pair]), records=2, cut=2, limits=limits).lines()
    assert lines[0] == "2 pairs, 12 tokens in both rows, 8 of them the answers' (66.7%)"
    assert lines[1].startswith("tokens of a pair's longer row: 4 at least")
    assert lines[2] == "100% of the pairs (2) are cut at --max_source_length 8 or --max_target_length 3"
    assert summarize(measure([example([0, 0])]), 1).lines()[0] == "1 prompt, 2 tokens; the answers are still to come"


@pytest.mark.parametrize(
    ("part", "whole", "words"),
    [(1, 4, "25%"), (1, 3, "33.3%"), (0, 5, "0%"), (5, 5, "100%"), (1, 5000, "less than 0.1%")],
)
def test_a_share_in_words(part, whole, words):
    assert percent(part, whole) == words


def test_nearly_all_is_not_all():
    assert percent(4999, 5000) == "more than 99.9%"


# --- what a step holds ---


def lengths(*numbers: int) -> Measures:
    """Records of so many tokens, of which all but two are learned."""
    tokens = np.array(numbers, np.int64)[:, None]
    return Measures(tokens, tokens - 2)


def test_the_longest_of_all_batches():
    # Batches of two from 1, 2, 4: (1,2) (1,4) (2,4) have 2, 4 and 4 for their longest.
    assert longest_of(np.array([4, 1, 2]), 2) == pytest.approx(10 / 3)
    assert longest_of(np.array([4, 1, 2]), 1) == pytest.approx(7 / 3)
    assert longest_of(np.array([4, 1, 2]), 3) == pytest.approx(4)


def test_the_longest_of_all_batches_as_counted_one_by_one():
    numbers = [3, 3, 5, 8, 13, 2, 7, 7]
    for batch in range(1, 9):
        all_batches = [max(some) for some in itertools.combinations(numbers, batch)]
        assert longest_of(np.array(numbers), batch) == pytest.approx(sum(all_batches) / len(all_batches))


def test_a_padded_step():
    # Batches of 2 from lengths 1 and 3 alone: two rows of 3, of which 4 tokens are records'.
    step = padded_step(Measures(np.array([[1], [3]]), np.array([[0], [2]])), StepSize(2))
    assert step.as_dict() == {
        "kind": "records",
        "rows": 2,
        "examples": 2.0,
        "tokens": 4.0,
        "learned": 2.0,
        "padding": 2.0,
        "steps_per_epoch": 1,
        "steps": 1,
        "filled": None,
    }
    assert step.line() == (
        "a step: 2 records; 4 tokens, 2 with labels, and 2 of padding (33.3%); 1 step per epoch, 1 in all"
    )


def test_a_step_is_no_larger_than_the_records():
    step = padded_step(lengths(4, 4, 4), StepSize(batch=2, accumulation=4))
    assert (step.rows, step.tokens, step.learned, step.padding) == (3, 12, 6, 0)


def test_a_step_over_accumulation_and_processes():
    step = padded_step(lengths(*[6] * 48), StepSize(batch=2, accumulation=3, processes=4, epochs=2.5))
    assert (step.rows, step.tokens, step.learned) == (24, 144, 96)
    assert (step.steps_per_epoch, step.steps) == (2, 5)
    assert "24 records; 144 tokens, 96 with labels, and no padding; 2 steps per epoch, 5 in all" in step.line()


def test_max_steps_count_where_they_are_given():
    assert padded_step(lengths(*[6] * 48), StepSize(batch=2, max_steps=7)).steps == 7


def test_a_packed_step():
    # 3 + 3 + 4 fill a row of 10, 9 stand alone: 19 of 20 tokens; a step of one row has half of everything.
    step = packed_step(lengths(3, 3, 4, 9), rows=2, capacity=10, size=StepSize(1))
    assert (step.rows, step.examples, step.tokens, step.learned, step.padding) == (1, 2, 9.5, 5.5, 0)
    assert (step.filled, step.steps_per_epoch) == (0.95, 2)
    assert step.line() == (
        "a step: 1 packed row, 95.0% full, with 2.0 examples; 10 tokens, 6 with labels, and no padding; "
        "2 steps per epoch, 2 in all"
    )


def test_a_step_of_pairs_pads_both_rows_to_the_longest():
    # Pairs of (2, 4) and (6, 3) tokens: four rows of 6, of which 15 tokens are records'.
    measures = Measures(np.array([[2, 4], [6, 3]]), np.array([[1, 2], [3, 1]]))
    step = padded_step(measures, StepSize(2))
    assert (step.rows, step.examples, step.tokens, step.learned, step.padding) == (2, 4, 15, 7, 9)
    assert step.line().startswith("a step: 2 pairs in 4 rows; 15 tokens, 7 of them the answers', and 9 of padding")


def test_a_rollout():
    # Two processes of one prompt each: nothing is padded.
    prompts = Measures(np.array([[2], [4], [6]]), np.zeros((3, 1), np.int64))
    step = rollout_contents(prompts, batch=1, processes=2, rollouts=5)
    assert (step.rows, step.tokens, step.padding, step.steps_per_epoch, step.steps) == (2, 8, 0, 2, 5)
    assert step.line() == "a rollout: 2 prompts; 8 tokens, and no padding; 2 rollouts per epoch, 5 in all"


def test_rows_of_like_lengths_need_less_padding():
    numbers = np.array([10] * 32 + [50] * 32)
    by_chance, together = longest_of(numbers, 4), grouped_longest(numbers, 4, StepSize(4, grouped=True))
    assert by_chance > 46 and together < 40  # 30 without any padding
    grouped = padded_step(Measures(numbers[:, None], numbers[:, None]), StepSize(4, grouped=True))
    assert grouped.padding == pytest.approx(4 * (together - 30))


def test_rows_of_like_lengths_are_grouped_as_the_sampler_groups_them():
    from stagewise.training.length_grouping import LengthGroups

    numbers = np.random.default_rng(3).integers(1, 1000, 400)
    found = []
    for seed in range(20):
        order = numbers[list(LengthGroups(numbers.tolist(), 8, seed))]
        found.append(np.mean([order[first : first + 4].max() for first in range(0, 400, 4)]))
    estimate = grouped_longest(numbers, 4, StepSize(batch=4, accumulation=2, grouped=True))
    assert estimate == pytest.approx(np.mean(found), rel=0.02)
    assert longest_of(numbers, 4) > 1.3 * estimate


def test_steps_of_an_epoch_are_as_the_libraries_deal_rows_out():
    from accelerate.data_loader import BatchSamplerShard
    from torch.utils.data import BatchSampler

    for rows, batch, processes, drop_last in itertools.product((7, 8, 9, 24), (1, 2, 3), (1, 2, 4), (False, True)):
        sampler = BatchSampler(range(rows), batch, drop_last)
        if processes > 1:
            sampler = BatchSamplerShard(sampler, num_processes=processes, process_index=0)
        for accumulation in (1, 2, 3):
            size = StepSize(batch, accumulation, processes, drop_last)
            # An update takes `accumulation` batches of the loader; the last of an epoch may take fewer.
            assert size.steps_per_epoch(rows) == max(1, math.ceil(len(sampler) / accumulation)), (rows, size)


def test_a_set_of_many_long_records_is_summed_up_at_once():
    writer = ExampleWriter()
    long = row_of(example(([0] * 150 + [1] * 150) * 4))
    for _ in range(17_671):
        writer.add("Example", [long])
    examples = writer.finish()
    started = time.process_time()
    measures = measure(examples)
    summary = summarize(measures, len(examples))
    padded_step(measures, StepSize(8, 4, 8))
    assert time.process_time() - started < 0.5
    assert (summary.tokens, summary.learned) == (17_671 * 1200, 17_671 * 600)
