import pytest
import torch

from stagewise.callbacks import NonFiniteError, NonFiniteGuard


def test_one_process_on_a_cpu_ends_at_once():
    guard = NonFiniteGuard()
    guard.watch(torch.tensor(1.0), at_once=False)
    with pytest.raises(NonFiniteError, match="the loss of step 1 is NaN or infinite; the step was not taken"):
        guard.watch(torch.tensor(float("nan")), at_once=False)


@pytest.fixture
def beside_another(monkeypatch):
    """This process is one of two; `say(finite)` sets what the other one found."""
    other = []

    def all_reduce(tensor, op):
        assert op == torch.distributed.ReduceOp.MIN
        tensor.copy_(torch.minimum(tensor, torch.tensor(float(other[-1]))))

    monkeypatch.setattr("torch.distributed.is_initialized", lambda: True)
    monkeypatch.setattr("torch.distributed.get_world_size", lambda: 2)
    monkeypatch.setattr("torch.distributed.all_reduce", all_reduce)
    return other.append


@pytest.mark.parametrize(("own", "others"), [(1.0, False), (float("nan"), True)])
def test_of_several_processes_all_end_together_before_the_step(beside_another, own, others):
    beside_another(others)
    guard = NonFiniteGuard()
    guard.watch(torch.tensor(own), at_once=False)  # the other process may still be in its backward pass
    with pytest.raises(NonFiniteError):
        guard.on_pre_optimizer_step(None, None, None)


def test_with_deepspeed_they_agree_before_the_backward_pass(beside_another):
    beside_another(False)
    with pytest.raises(NonFiniteError):
        NonFiniteGuard().watch(torch.tensor(1.0), at_once=True)


def test_where_all_are_finite_the_step_is_taken(beside_another):
    beside_another(True)
    guard = NonFiniteGuard()
    guard.watch(torch.tensor(1.0), at_once=False)
    guard.on_pre_optimizer_step(None, None, None)
    guard.on_pre_optimizer_step(None, None, None)  # nothing was watched since
