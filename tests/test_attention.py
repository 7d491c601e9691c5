"""The list of families that pack exactly is held against tiny random models; the others leak or are probed."""

import pytest
import torch
from conftest import FAMILIES, OTHER_FAMILIES, build_tiny_model, build_tiny_tokenizer

from stagewise.attention import PACKS_EXACTLY, choose_attention, packs_exactly

MEASURED = {"gemma3_text": "gemma3"}  # what conftest calls a listed family
DOCUMENTS = ([11, 12, 13, 14, 15], [21, 22, 23], [31, 32, 33, 34, 35, 36, 37])
POSITIONS = [0, 1, 2, 3, 4, 0, 1, 2, 0, 1, 2, 3, 4, 5, 6]


def largest_leak(model, **extra) -> float:
    """Largest difference between the logits of a packed row and those of its documents alone."""
    row = torch.tensor([[token for document in DOCUMENTS for token in document]])
    packed = model(input_ids=row, position_ids=torch.tensor([POSITIONS]), **{"use_cache": False, **extra}).logits[0]
    alone = torch.cat([model(input_ids=torch.tensor([d]), use_cache=False).logits[0] for d in DOCUMENTS])
    return (packed - alone).abs().max().item()


@pytest.mark.parametrize("family", sorted(PACKS_EXACTLY))
@torch.no_grad()
def test_listed_families_pack_exactly(family):
    model = build_tiny_model(MEASURED.get(family, family))
    assert model.config.model_type == family
    assert packs_exactly(model, build_tiny_tokenizer()) == (True, f"{family} is a tested family")
    assert largest_leak(model) < 1e-4


@pytest.mark.parametrize("family", ["llama", "mixtral", "gemma3"])
@torch.no_grad()
def test_the_conditions_are_needed(family):
    model = build_tiny_model(family)
    assert largest_leak(model, attention_mask=torch.ones(1, len(POSITIONS), dtype=torch.long)) > 0.1


@pytest.mark.parametrize("family", ["mistral", "gemma3"])
@torch.no_grad()
def test_a_sliding_window_shorter_than_a_document_packs_exactly(family):
    model = build_tiny_model(family, sliding_window=3)
    assert largest_leak(model) < 1e-4
    longest = torch.tensor([DOCUMENTS[2]])
    narrow, wide = (m(longest).logits for m in (model, build_tiny_model(family, sliding_window=64)))
    assert (narrow - wide).abs().max() > 0.1, "the window did nothing here"


@pytest.mark.parametrize("family", ["bloom", "falcon", "falcon_rotary", "qwen3_5"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_families_that_leak_are_found_by_the_probe(family, dtype):
    model = build_tiny_model(family).to(dtype)
    exact, reason = packs_exactly(model, build_tiny_tokenizer())
    assert not exact
    assert "packed and alone differ" in reason
    assert largest_leak(model) > 0.1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_an_unlisted_family_that_packs_exactly_is_found_by_the_probe(dtype):
    model = build_tiny_model("gpt2")
    assert model.config.model_type not in PACKS_EXACTLY
    assert largest_leak(model) < 1e-4
    exact, reason = packs_exactly(model.to(dtype), build_tiny_tokenizer())
    assert exact, reason


def test_the_probe_puts_the_mode_back():
    for mode in (True, False):
        model = build_tiny_model("gpt2").train(mode)
        packs_exactly(model, build_tiny_tokenizer())
        assert model.training is mode


@pytest.mark.parametrize("rope_type", ["dynamic", "longrope"])
def test_scaling_that_depends_on_the_row_is_not_packed(rope_type):
    model = build_tiny_model("llama")
    model.config.rope_parameters = {**model.config.rope_parameters, "rope_type": rope_type}
    assert packs_exactly(model, build_tiny_tokenizer())[0] is False


def test_attention_in_chunks_is_not_packed():
    model = build_tiny_model("llama")
    model.config.attention_chunk_size = 8
    assert packs_exactly(model, build_tiny_tokenizer())[0] is False


def test_partitioned_weights_are_not_probed():
    model = build_tiny_model("gpt2")
    for parameter in model.parameters():
        parameter.ds_id = 0  # what ZeRO-3 leaves on a weight
    exact, reason = packs_exactly(model, build_tiny_tokenizer())
    assert not exact
    assert "ZeRO-3" in reason


@pytest.mark.parametrize("family", [*FAMILIES, *OTHER_FAMILIES])
def test_attention_is_sdpa_where_the_architecture_has_it(family):
    expected = "eager" if family == "bloom" else "sdpa"
    assert choose_attention(build_tiny_model(family).config) == expected
