"""Where a model's answers end."""

import pytest
import torch
from transformers import GenerationConfig

from stagewise.errors import ModelError
from stagewise.models.generation_config import finish_generation_config
from tests.conftest import EOS_ID, PAD_ID, build_tiny_model, build_tiny_tokenizer


def generation_config_of(model, folder) -> GenerationConfig:
    model.generation_config.save_pretrained(folder)
    return GenerationConfig.from_pretrained(folder)


def test_generation_ends_at_the_end_marker_and_at_eos(tmp_path):
    tokenizer, model = build_tiny_tokenizer(), build_tiny_model("llama")
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_end|>"]})
    finish_generation_config(model, tokenizer, "<|im_end|>")
    saved = generation_config_of(model, tmp_path)
    assert saved.eos_token_id == [300, EOS_ID]
    assert saved.pad_token_id == PAD_ID


def test_generation_ends_at_eos_where_pad_is_eos(tmp_path):
    tokenizer, model = build_tiny_tokenizer(pad=False), build_tiny_model("llama")
    tokenizer.pad_token = tokenizer.eos_token
    finish_generation_config(model, tokenizer, "</s>")
    saved = generation_config_of(model, tmp_path)
    assert (saved.eos_token_id, saved.pad_token_id) == (EOS_ID, EOS_ID)
    # and it does end there: with every logit but eos's pushed down, one token is generated
    model.lm_head.weight.data.zero_()
    bias = torch.full((320,), -10.0).index_fill(0, torch.tensor(EOS_ID), 10.0)
    model.lm_head.bias = torch.nn.Parameter(bias)
    output = model.generate(torch.tensor([[5, 6]]), attention_mask=torch.ones(1, 2), max_new_tokens=5)
    assert output.tolist() == [[5, 6, EOS_ID]]


def test_a_marker_of_several_tokens_becomes_a_stop_string(tmp_path):
    tokenizer, model = build_tiny_tokenizer(), build_tiny_model("llama")
    finish_generation_config(model, tokenizer, "<|im_end|>")
    saved = generation_config_of(model, tmp_path)
    assert saved.stop_strings == ["<|im_end|>"]
    assert saved.eos_token_id == EOS_ID
    finish_generation_config(model, tokenizer, "</s>")
    assert model.generation_config.stop_strings is None


def test_sampling_values_beside_greedy_search_are_cleared(tmp_path):
    model = build_tiny_model("llama")
    model.generation_config = GenerationConfig(temperature=0.9, top_p=0.6, do_sample=False)
    with pytest.raises(ValueError, match="temperature"):
        model.generation_config.save_pretrained(tmp_path)
    finish_generation_config(model, build_tiny_tokenizer(), None)
    saved = generation_config_of(model, tmp_path)
    assert saved.temperature in (None, 1.0)
    assert saved.top_p in (None, 1.0)


def test_sampling_that_is_on_is_kept():
    model = build_tiny_model("llama")
    model.generation_config = GenerationConfig(temperature=0.9, top_p=0.6, do_sample=True)
    finish_generation_config(model, build_tiny_tokenizer(), None)
    assert (model.generation_config.temperature, model.generation_config.top_p) == (0.9, 0.6)


def test_nothing_to_end_at_is_an_error():
    tokenizer = build_tiny_tokenizer(eos=False)
    with pytest.raises(ModelError, match="never end"):
        finish_generation_config(build_tiny_model("llama"), tokenizer, None)
