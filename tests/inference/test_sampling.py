"""Sampling: a row's answer follows from its prompt and its own random numbers alone."""

import math

import pytest
import torch

from stagewise.inference import sampling as generation
from stagewise.inference.sampling import (
    Sampling,
    adapters_folded,
    probabilities,
    random_numbers,
    repetition,
    sample_answers,
    sample_token,
)
from tests.conftest import EOS_ID, FAMILIES, OTHER_FAMILIES

PROMPTS = [[5, 6, 7, 8, 9, 10, 11], [20], [30, 31, 32], [41, 42, 43, 44], [50, 51]]
KEYS = [(3, 1, 0, n) for n in range(len(PROMPTS))]


def spelled_out(model, prompt: list[int], numbers: list[float], stop_ids: tuple[int, ...]) -> list[int]:
    """One prompt alone, without a cache, drawn in float64."""
    ids, answer = list(prompt), []
    for number in numbers:
        with torch.no_grad():
            shares = model(input_ids=torch.tensor([ids])).logits[0, -1].double().softmax(0).tolist()
        total, token = 0.0, -1
        while total <= number:
            token += 1
            total += shares[token]
        answer.append(token)
        ids.append(token)
        if token in stop_ids:
            break
    return answer


@pytest.mark.parametrize("family", FAMILIES + OTHER_FAMILIES)
def test_a_batch_gives_what_each_prompt_gives_alone(family, tiny_model):
    model, numbers = tiny_model(family), random_numbers(KEYS, 8)
    stop_ids = tuple(range(0, 320, 7))  # many, so that rows end at different steps
    sizes = []
    hook = model.register_forward_pre_hook(
        lambda _, args, features: sizes.append(len(features["input_ids"])), with_kwargs=True
    )
    answers = sample_answers(model, PROMPTS, numbers, Sampling(stop_ids=stop_ids))
    hook.remove()
    assert sizes[0] == 5 and sizes[-1] < 5, "rows that have ended leave the batch"
    for prompt, row, answer in zip(PROMPTS, numbers, answers, strict=True):
        assert answer == spelled_out(model, prompt, row.tolist(), stop_ids)
        assert answer == sample_answers(model, [prompt], row[None], Sampling(stop_ids=stop_ids))[0]
    assert len({len(answer) for answer in answers}) > 1
    assert all(token not in stop_ids for answer in answers for token in answer[:-1])


def test_an_answer_has_at_most_as_many_tokens_as_numbers(tiny_model):
    answers = sample_answers(tiny_model("llama"), PROMPTS, random_numbers(KEYS, 3), Sampling(stop_ids=(EOS_ID,)))
    assert {len(answer) for answer in answers} == {3}


def test_random_numbers_follow_from_the_key():
    numbers = random_numbers([(1, 2, 3), (1, 2, 4), (1, 2, 3)], 5)
    assert numbers.shape == (3, 5) and numbers.dtype == torch.float32
    assert torch.equal(numbers[0], numbers[2]) and not torch.equal(numbers[0], numbers[1])
    assert torch.equal(random_numbers([(1, 2, 4)], 5)[0], numbers[1])


@pytest.mark.parametrize(
    ("sampling", "expected"),
    [
        (Sampling(), [0.15, 0.5, 0.05, 0.3]),
        (Sampling(temperature=0.5), [0.0225 / 0.365, 0.25 / 0.365, 0.0025 / 0.365, 0.09 / 0.365]),
        (Sampling(top_k=3), [0.15 / 0.95, 0.5 / 0.95, 0, 0.3 / 0.95]),
        (Sampling(top_p=0.7), [0, 0.625, 0, 0.375]),
        (Sampling(top_p=0.4), [0, 1, 0, 0]),
        (Sampling(top_k=2, top_p=0.9), [0, 0.625, 0, 0.375]),
    ],
)
def test_probabilities(sampling, expected):
    logits = torch.tensor([[0.15, 0.5, 0.05, 0.3]] * 2).log() + torch.tensor([[0.0], [3.0]])
    torch.testing.assert_close(probabilities(logits, sampling), torch.tensor([expected] * 2, dtype=torch.float32))


def test_draw_finds_the_token_whose_share_holds_the_number():
    shares = torch.tensor([[0.25, 0.0, 0.25, 0.5]] * 6)
    numbers = torch.tensor([0.0, 0.2499, 0.25, 0.4999, 0.5, 1 - 2**-24])
    assert sample_token(shares, numbers).tolist() == [0, 0, 2, 2, 3, 3]
    # a token of no share behind the last one is not drawn, however near to 1 the number is
    assert sample_token(torch.tensor([[1 / 3, 2 / 3, 0.0]]), torch.tensor([1 - 2**-24])).tolist() == [1]


def test_draws_have_the_shares_they_are_drawn_with():
    shares = torch.tensor([[0.1, 0.6, 0.3]]).expand(20000, 3)
    drawn = sample_token(shares, random_numbers([(n,) for n in range(20000)], 1)[:, 0]).bincount() / 20000
    torch.testing.assert_close(drawn, torch.tensor([0.1, 0.6, 0.3]), rtol=0, atol=4 * math.sqrt(0.25 / 20000))


def with_adapter(model, **flags):
    """The model with an adapter that changes what it says."""
    from stagewise.adapters.attach import attach_adapter
    from stagewise.config.arguments import AdapterArguments

    model = attach_adapter(model, AdapterArguments(**flags), "CAUSAL_LM").eval()
    generator = torch.Generator().manual_seed(0)
    for name, value in model.named_parameters():
        if "lora_" in name:
            value.data.normal_(0, 0.3, generator=generator)
    return model


@pytest.mark.parametrize("family", ["llama", "mixtral", "bloom", "qwen3_5"])
def test_a_folded_adapter_says_the_same_and_is_put_back(family, tiny_model):
    model = with_adapter(tiny_model(family))
    ids = torch.tensor([[5, 9, 17, 30]])
    before = {name: (value, value.detach().clone(), value.requires_grad) for name, value in model.named_parameters()}
    expected = model(input_ids=ids).logits
    with model.disable_adapter():
        base = model(input_ids=ids).logits
    assert (expected - base).abs().max() > 1e-2
    with pytest.raises(KeyError), adapters_folded(model):
        torch.testing.assert_close(model.get_base_model()(input_ids=ids).logits, expected, rtol=1e-4, atol=1e-4)
        raise KeyError
    after = dict(model.named_parameters())
    for name, (value, copy, trained) in before.items():
        assert after[name] is value and torch.equal(value, copy) and value.requires_grad == trained
    torch.testing.assert_close(model(input_ids=ids).logits, expected, rtol=0, atol=0)


def test_a_folded_adapter_leaves_modules_trained_in_full_as_they_are(tiny_model):
    model = with_adapter(tiny_model("llama"), modules_to_save="embed_tokens")
    with torch.no_grad():
        model.get_input_embeddings().weight.add_(0.5)
    ids = torch.tensor([[5, 9, 17]])
    expected = model(input_ids=ids).logits
    with adapters_folded(model):
        torch.testing.assert_close(model(input_ids=ids).logits, expected, rtol=1e-4, atol=1e-4)


def test_without_memory_for_copies_the_adapter_is_lowered_instead(tiny_model, monkeypatch):
    model = with_adapter(tiny_model("llama").to(torch.bfloat16))
    before = dict(model.named_parameters())
    copies = {name: value.detach().clone() for name, value in before.items()}
    monkeypatch.setattr(generation, "_fits", lambda weights: False)
    with pytest.raises(KeyError), adapters_folded(model):
        assert {value.dtype for value in model.parameters()} == {torch.bfloat16}
        assert all(before[name] is value for name, value in model.named_parameters() if "base_layer" in name)
        raise KeyError
    after = dict(model.named_parameters())
    assert all(after[name] is before[name] and torch.equal(after[name], copies[name]) for name in before)
    assert {after[name].dtype for name in after if "lora_" in name} == {torch.float32}


def test_a_model_without_a_cache_is_refused(tiny_model, monkeypatch):
    model = tiny_model("llama")
    forward = type(model).forward

    def without(self, input_ids=None, attention_mask=None, position_ids=None, past_key_values=None, use_cache=None):
        return forward(self, input_ids=input_ids, use_cache=False)

    monkeypatch.setattr(type(model), "forward", without)
    with pytest.raises(generation.GenerationError, match="LlamaForCausalLM keeps no keys and values"):
        sample_answers(model, PROMPTS, random_numbers(KEYS, 2), Sampling())


def test_repetition():
    assert repetition([1, 2, 3]) == 0
    assert repetition([1, 2, 3, 4, 5]) == 0
    # 1212 2121 1212 2121: four 4-grams, two of them new
    assert repetition([1, 2, 1, 2, 1, 2, 1]) == pytest.approx(0.5)
    assert repetition([9] * 13) == pytest.approx(0.9)
