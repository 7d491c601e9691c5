import math
from itertools import pairwise

import pytest
import torch
from transformers import TrainerState, TrainingArguments

from stagewise.errors import NonFiniteError
from stagewise.training import finiteness
from stagewise.training.finiteness import NonFiniteGuard, are_finite

BAD, SOUND = torch.tensor(1.0), torch.tensor(0.0)


@pytest.fixture
def guarded(tmp_path):
    """guarded(kind, fp16=False, **options): a guard around an optimizer of one weight, as training begins."""

    def make(kind=torch.optim.AdamW, fp16=False, **options):
        model = torch.nn.Linear(3, 1, bias=False)
        with torch.no_grad():
            model.weight.copy_(torch.tensor([[1.0, -2.0, 0.5]]))
        optimizer = kind(model.parameters(), lr=0.1, **options)
        guard, args = NonFiniteGuard(), TrainingArguments(output_dir=tmp_path, use_cpu=True)
        args.fp16 = fp16
        guard.on_train_begin(args, TrainerState(), None, model=model, optimizer=optimizer)
        return guard, model, optimizer

    return make


def step(guard, model, optimizer, number, gradient):
    model.weight.grad = torch.tensor([gradient])
    guard.judge(number, (~model.weight.grad.norm().isfinite()).float())
    optimizer.step()
    optimizer.zero_grad()


OPTIMIZERS = [
    (torch.optim.AdamW, {"fused": True, "weight_decay": 0.3}),
    (torch.optim.AdamW, {"foreach": True, "weight_decay": 0.3}),
    (torch.optim.Adam, {"fused": True, "amsgrad": True}),
    (torch.optim.SGD, {"momentum": 0.9, "weight_decay": 0.3}),
    (torch.optim.SGD, {"momentum": 0.9, "fused": True}),
    (torch.optim.RMSprop, {}),
]


@pytest.mark.parametrize(("kind", "options"), OPTIMIZERS, ids=lambda value: getattr(value, "__name__", str(value)))
@pytest.mark.parametrize("first", [True, False])
def test_steps_with_a_broken_one_between_are_the_steps_without_it(kind, options, first, guarded):
    sound = [[0.5, 1.0, -3.0], [2.0, 0.1, 0.1], [-1.0, 1.0, 0.2]]
    with_it = [[math.nan, 1.0, 1.0], *sound] if first else [sound[0], [1.0, math.inf, 1.0], *sound[1:]]
    guard, model, optimizer = guarded(kind, **options)
    for number, gradient in enumerate(with_it, 1):
        step(guard, model, optimizer, number, gradient)
    guard.settle()
    expected = torch.nn.Parameter(torch.tensor([[1.0, -2.0, 0.5]]))
    plain = kind([expected], lr=0.1, **options)
    for gradient in sound:
        expected.grad = torch.tensor([gradient])
        plain.step()
    assert torch.equal(model.weight, expected)
    assert guard.skipped == 1


def test_a_scaler_of_float16_and_the_guard_skip_the_same_step(guarded):
    guard, model, optimizer = guarded(torch.optim.AdamW, fp16=True, fused=True)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0, backoff_factor=0.5, growth_interval=1000)
    weights = [model.weight.detach().clone()]
    for number, gradient in enumerate([[8.0, 8.0, 8.0], [math.inf, 8.0, 8.0], [8.0, 8.0, 8.0]], 1):
        model.weight.grad = torch.tensor([gradient])
        scaler.scale(torch.ones(()))
        scaler.unscale_(optimizer)
        guard.judge(number, (~model.weight.grad.norm().isfinite()).float())
        scaler.step(optimizer)
        scaler.update()
        weights.append(model.weight.detach().clone())
    guard.settle()
    moved = [not torch.equal(before, after) for before, after in pairwise(weights)]
    assert moved == [True, False, True]
    assert scaler.get_scale() == 4.0, "halved once"
    assert guard.skipped == 1
    assert not hasattr(optimizer, "found_inf")


def test_a_loss_that_is_not_finite_makes_every_gradient_nan():
    guard, weight = NonFiniteGuard(), torch.ones(3, requires_grad=True)
    guard.watch(weight.sum() * 2).backward()
    assert weight.grad.tolist() == [2.0, 2.0, 2.0]
    guard.watch(weight.sum() + math.inf).backward()  # whose own gradient is 1
    assert weight.grad.isnan().all()


def test_fp16_searches_for_its_scale_longer_than_other_runs_go_on(guarded):
    for fp16, most in ((False, 5), (True, 16)):
        guard, _, _ = guarded(fp16=fp16)
        for number in range(1, most):
            guard.judge(number, BAD)
            guard.settle()
        guard.judge(most, BAD)
        with pytest.raises(NonFiniteError, match=f"step {most} is NaN or infinite, {most} in a row by now"):
            guard.settle()


def test_the_verdict_of_a_step_is_in_with_the_next_one(guarded):
    guard, _, _ = guarded()
    for number, verdict in enumerate([BAD, BAD, SOUND, BAD], 1):
        guard.judge(number, verdict)
    assert (guard.skipped, guard.in_a_row) == (2, 0), "the fourth is still on its way"
    assert guard.is_skipped()
    guard.settle()
    assert (guard.skipped, guard.in_a_row) == (3, 1)


def test_records_of_the_broken_passes_are_named_and_of_all_where_none_stands_out(guarded, monkeypatch):
    said = []
    monkeypatch.setattr(finiteness.logger, "warning", said.append)
    guard, _, _ = guarded()
    for records, loss in ((["a:1", "a:2"], 1.0), (["b:7"], math.nan)):
        guard.records = records
        guard.watch(torch.tensor(loss))
    guard.judge(3, BAD)
    guard.settle()
    guard.records = [f"c:{n}" for n in range(1, 12)]
    guard.watch(torch.tensor(1.0))
    guard.judge(4, BAD)
    guard.settle()
    assert said == [
        "step 3: skipped; its loss is NaN or infinite. Its records: b:7",
        "step 4: skipped; its gradient is NaN or infinite. Its records: "
        "c:1, c:2, c:3, c:4, c:5, c:6, c:7, c:8 and 3 more",
    ]


def test_records_of_all_processes_are_named(guarded, monkeypatch):
    said = []
    monkeypatch.setattr(finiteness.logger, "warning", said.append)
    monkeypatch.setattr("torch.distributed.is_initialized", lambda: True)
    monkeypatch.setattr("torch.distributed.get_world_size", lambda: 2)

    def all_gather_object(lists, mine):
        lists[:] = [mine, [(["other:5"], False)]]

    monkeypatch.setattr("torch.distributed.all_gather_object", all_gather_object)
    guard, _, _ = guarded()
    guard.records = ["mine:1"]
    guard.watch(torch.tensor(1.0))
    guard.judge(1, BAD)
    guard.settle()
    assert said == ["step 1: skipped; its loss is NaN or infinite. Its records: other:5"]


@pytest.mark.parametrize(
    ("value", "dtype", "finite"),
    [
        (3.0, torch.float32, True),
        (math.nan, torch.float32, False),
        (-math.inf, torch.bfloat16, False),
        (1e38, torch.float32, False),  # finite, but what a step at --learning_rate 1e38 leaves
        (1e15, torch.bfloat16, True),
        (60000.0, torch.float16, True),  # the norm of all of them is beyond float16
    ],
)
def test_weights_that_are_finite(value, dtype, finite):
    model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 4)).to(dtype)
    model[1].weight.data[:] = value
    assert are_finite(model) is finite
    model[1].weight.requires_grad_(False)
    assert are_finite(model), "what is not trained is the base's own"
