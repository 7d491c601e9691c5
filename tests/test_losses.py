import math

import pytest
import torch

from stagewise.losses import dpo_loss, label_positions, pairwise_loss, sequence_logps, token_nll


def logits_of(*probabilities, dtype=torch.float32):
    """(1, K, V) logits whose softmax is the given rows of probabilities."""
    return torch.tensor([probabilities]).log().to(dtype)


def test_learned_positions_are_those_before_a_learned_token_in_any_row():
    labels = torch.tensor([[-100, -100, 7, 8, -100, -100], [-100, 5, -100, -100, -100, 9]])
    # Tokens 2 and 3 of the first row and tokens 1 and 5 of the second are learned, each from the position before it.
    assert label_positions(labels).tolist() == [0, 1, 2, 4]


def test_the_first_token_of_a_row_is_learned_from_nowhere():
    assert label_positions(torch.tensor([[4, -100, 6]])).tolist() == [1]


def test_token_nll_is_minus_the_log_of_the_target_probability():
    nll = token_nll(logits_of([0.5, 0.25, 0.25], [0.1, 0.1, 0.8]), torch.tensor([[1, 2]]))
    torch.testing.assert_close(nll, torch.tensor([[math.log(4), -math.log(0.8)]]))


def test_an_ignored_target_costs_nothing_and_has_no_gradient():
    logits = logits_of([0.5, 0.25, 0.25], [0.1, 0.1, 0.8]).requires_grad_()
    nll = token_nll(logits, torch.tensor([[-100, 0]]))
    assert nll[0, 0] == 0
    nll.sum().backward()
    assert logits.grad[0, 0].tolist() == [0, 0, 0]
    # softmax minus the one-hot target
    torch.testing.assert_close(logits.grad[0, 1], torch.tensor([0.1 - 1, 0.1, 0.8]))


def test_token_nll_of_16_bit_logits_is_computed_in_float32():
    nll = token_nll(torch.zeros(1, 1, 1000, dtype=torch.bfloat16), torch.tensor([[3]]))
    assert nll.dtype == torch.float32
    # ln 1000 = 6.907755; bfloat16 could only hold 6.90625
    assert nll.item() == pytest.approx(6.907755, abs=1e-5)


def test_sequence_logps_sum_the_learned_tokens_of_each_row():
    rows = torch.cat([logits_of([0.5, 0.5], [0.2, 0.8]), logits_of([0.9, 0.1], [0.4, 0.6])])
    logps = sequence_logps(rows, torch.tensor([[0, 1], [-100, 0]]))
    torch.testing.assert_close(logps, torch.tensor([math.log(0.5 * 0.8), math.log(0.4)]))


@pytest.mark.parametrize(
    ("chosen", "rejected", "expected"),
    [
        (0.0, 0.0, 0.693147),  # ln 2
        (1.5, 0.5, 0.313262),  # ln(1 + 1/e)
        (-1.0, 1.0, 2.126928),  # ln(1 + e^2)
        (0.0, 300.0, 300.0),  # where e^300 would overflow float32
    ],
)
def test_pairwise_loss(chosen, rejected, expected):
    loss = pairwise_loss(torch.tensor([chosen]), torch.tensor([rejected]))
    assert loss.shape == (1,)
    assert loss.item() == pytest.approx(expected, rel=1e-5)


def test_the_gradient_of_the_pairwise_loss_is_the_probability_of_the_wrong_order():
    chosen = torch.tensor([0.0, math.log(3.0)], requires_grad=True)
    pairwise_loss(chosen, torch.zeros(2)).sum().backward()
    torch.testing.assert_close(chosen.grad, torch.tensor([-0.5, -0.25]))


def test_dpo_loss_and_implicit_rewards():
    losses, chosen, rejected = dpo_loss(
        torch.tensor([-10.0, -20.0]),
        torch.tensor([-12.0, -18.0]),
        torch.tensor([-11.0, -20.0]),
        torch.tensor([-11.5, -20.0]),
        beta=0.1,
    )
    torch.testing.assert_close(chosen, torch.tensor([0.1, 0.0]))
    torch.testing.assert_close(rejected, torch.tensor([-0.05, 0.2]))
    # ln(1 + e^-0.15) and ln(1 + e^0.2)
    torch.testing.assert_close(losses, torch.tensor([0.620957, 0.798139]), atol=1e-6, rtol=0)


def test_dpo_loss_is_ln_2_where_model_and_reference_agree():
    logps = torch.tensor([-3.0]), torch.tensor([-90.0])
    losses, chosen, rejected = dpo_loss(*logps, *logps, beta=0.5)
    assert (losses.item(), chosen.item(), rejected.item()) == (pytest.approx(math.log(2)), 0, 0)


def test_the_gradient_of_the_dpo_loss_pushes_both_answers_by_beta_and_the_rewards_carry_none():
    policy = torch.tensor([-5.0], requires_grad=True), torch.tensor([-5.0], requires_grad=True)
    losses, chosen, rejected = dpo_loss(*policy, torch.tensor([-5.0]), torch.tensor([-5.0]), beta=0.3)
    losses.sum().backward()
    # beta times sigmoid(0)
    assert policy[0].grad.item() == pytest.approx(-0.15)
    assert policy[1].grad.item() == pytest.approx(0.15)
    assert not chosen.requires_grad and not rejected.requires_grad
