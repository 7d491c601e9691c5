"""How long a PPO run is, by hand; which flags refuse each other is in tests/test_ppo_training.py."""

from types import SimpleNamespace

import pytest

from stagewise.errors import ArgumentError
from stagewise.rl.schedule import Schedule, settle_batches


def trained(**changes):
    """Stands for transformers' TrainingArguments."""
    flags = {"world_size": 2, "gradient_accumulation_steps": 2, "max_steps": -1, "num_train_epochs": 1.0}
    flags |= {"do_train": True, "per_device_train_batch_size": 8, "metric_for_best_model": None}
    return SimpleNamespace(**flags | changes)


@pytest.mark.parametrize(
    ("changes", "rollouts", "last", "steps"),
    [
        ({}, 5, 5, 30),  # a rollout: 3 passes over 8 / 2 minibatches, two of which make an update
        ({}, None, 2, 12),  # 20 prompts are two rollouts of 16
        ({"num_train_epochs": 2.5}, None, 5, 30),
        ({"max_steps": 13}, None, 3, 13),
    ],
)
def test_the_length_of_a_run(changes, rollouts, last, steps):
    args = trained(**changes)
    schedule = Schedule.plan(args, 8, 2, 3, rollouts, prompts=range(20))
    assert (schedule.minibatches, schedule.an_epoch, schedule.last, args.max_steps) == (12, 2, last, steps)


def test_a_rollout_takes_no_more_prompts_than_there_are():
    with pytest.raises(ArgumentError, match="--batch_size 8: a rollout takes 16 prompts, there are 15"):
        Schedule.plan(trained(), 8, 2, 3, None, prompts=range(15))


@pytest.mark.parametrize(
    ("per_device", "asked", "expected"),
    [(8, None, 4), (2, None, 2), (8, 1, 1)],  # at most the rollout's four prompts
)
def test_the_answers_of_a_forward_pass(per_device, asked, expected):
    args = trained(per_device_train_batch_size=per_device)
    assert settle_batches(args, {}, 4, asked, passes=2, rollouts=None) == expected
    assert args.per_device_train_batch_size == expected and args.ignore_data_skip


def test_no_answers_in_a_forward_pass_are_refused():
    with pytest.raises(ArgumentError, match="--batch_size 4: expected a multiple of --mini_batch_size 0"):
        settle_batches(trained(), {}, 4, 0, passes=2, rollouts=None)


def test_the_best_checkpoint_is_chosen_by_reward():
    args = trained(metric_for_best_model="loss")
    settle_batches(args, {}, 4, 2, passes=2, rollouts=None)
    assert (args.metric_for_best_model, args.greater_is_better) == ("reward", True)
