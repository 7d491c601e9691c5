"""Policy, value head and reference on one set of weights."""

import copy

import pytest
import torch

from stagewise.adapters.attach import attach_adapter
from stagewise.config.arguments import AdapterArguments
from stagewise.data.examples import IGNORE_INDEX
from stagewise.rl.policy import Policy, answer_batch
from tests.conftest import FAMILIES, PAD_ID

ROWS = [([5, 6, 7, 8, 9], [10, 11, 2]), ([20], [21, 22, 23, 24, 2]), ([30, 31], [32])]
PROMPTS, ANSWERS = map(list, zip(*ROWS, strict=True))
BATCH = answer_batch(PROMPTS, ANSWERS, PAD_ID)


def test_answers_begin_at_one_column():
    x = IGNORE_INDEX
    assert {name: value.tolist() for name, value in answer_batch([[5, 6, 7], [8]], [[9], [10, 2]], 0).items()} == {
        "input_ids": [[5, 6, 7, 9, 0], [0, 0, 8, 10, 2]],
        "labels": [[x, x, x, 9, x], [x, x, x, 10, 2]],
        "attention_mask": [[1, 1, 1, 1, 0], [0, 0, 1, 1, 1]],
    }


def alone(model, temperature=1.0):
    """Log-probabilities of each row's answer and the hidden states before it, row by row: (9,), (9, H)."""
    logps, hidden = [], []
    for prompt, answer in ROWS:
        with torch.no_grad():
            output = model(input_ids=torch.tensor([prompt + answer]), output_hidden_states=True)
        before = slice(len(prompt) - 1, -1)
        shares = (output.logits[0, before] / temperature).log_softmax(dim=-1)
        logps.append(shares[range(len(answer)), answer])
        hidden.append(output.hidden_states[-1][0, before])
    return torch.cat(logps), torch.cat(hidden)


def disturb(module):
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.requires_grad:
                parameter += 0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_reference_is_the_model_without_its_adapter(family, temperature, tiny_model):
    expected, _ = alone(tiny_model(family), temperature)
    model = attach_adapter(tiny_model(family), AdapterArguments(), "CAUSAL_LM").eval()
    policy = Policy(model, None, temperature)
    disturb(model)
    torch.testing.assert_close(policy.reference_logps(BATCH)[0], expected, rtol=1e-4, atol=2e-4)
    moved, _ = policy.logps_and_values(model, BATCH)
    assert (moved - expected).abs().max() > 0.01, "the adapter is switched on again"
    _, plain = policy.reference_logps(BATCH, 1.0)
    torch.testing.assert_close(plain, alone(tiny_model(family))[0], rtol=1e-4, atol=2e-4)
    assert all(p.requires_grad for name, p in model.named_parameters() if "lora_" in name)


@pytest.mark.parametrize("family", FAMILIES)
def test_log_probabilities_and_values_are_those_of_each_row_alone(family, tiny_model):
    model = tiny_model(family)
    expected, hidden = alone(model)
    policy = Policy(model, copy.deepcopy(model), 1.0)
    values = policy.logps_and_values(model, BATCH)[1]
    assert values.tolist() == [0.0] * 9, "a new value head says 0"
    disturb(model.value_head)
    head = model.value_head
    logps, values = policy.logps_and_values(model, BATCH)
    torch.testing.assert_close(logps, expected, rtol=1e-4, atol=2e-4)
    torch.testing.assert_close(values, (hidden @ head.weight.T + head.bias)[:, 0], rtol=1e-4, atol=2e-4)
    torch.testing.assert_close(policy.reference_logps(BATCH)[0], expected, rtol=1e-4, atol=2e-4)


def test_the_value_head_is_float32_on_a_16_bit_model_and_both_get_gradients(tiny_model):
    model = attach_adapter(tiny_model("llama").to(torch.bfloat16), AdapterArguments(), "CAUSAL_LM")
    policy = Policy(model, None, 1.0)
    disturb(model)
    logps, values = policy.logps_and_values(model, BATCH)
    assert (logps.dtype, values.dtype, model.value_head.weight.dtype) == (torch.float32,) * 3
    (logps.sum() + values.square().sum()).backward()
    trained = {name for name, p in model.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0}
    assert {"value_head.weight", "value_head.bias"} < trained
    assert any("lora_" in name for name in trained)
    assert all("lora_" in name or name.startswith("value_head") for name in trained)


@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_are_those_of_each_row_alone(family, tiny_model):
    """Padding on both sides leaves nothing in the gradients, no NaN either."""
    model = tiny_model(family)
    policy = Policy(model, None, 1.0)
    policy.logps_and_values(model, BATCH)[0].sum().backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    for prompt, answer in ROWS:
        logits = model(input_ids=torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1]
        logits.log_softmax(dim=-1)[range(len(answer)), answer].sum().backward()
    for name, parameter in model.named_parameters():
        if not name.startswith("value_head"):
            scale = parameter.grad.abs().max()
            torch.testing.assert_close(found[name], parameter.grad, rtol=1e-3, atol=float(1e-4 * scale + 1e-5))
