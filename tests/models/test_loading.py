"""Weights: their precision, their place, what the checkpoint lacks; a reward model's head."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from stagewise.errors import ModelError
from stagewise.models.loading import choose_device_map, load_causal_lm, load_reward_model
from stagewise.models.quantization.bnb import guard_4bit
from stagewise.models.tokenizer import check_vocabulary, load_tokenizer
from tests.adapters.test_compatibility import needs_bitsandbytes
from tests.conftest import PAD_ID, build_tiny_model, build_tiny_tokenizer
from tests.models.test_hub import arguments


@pytest.mark.parametrize(
    ("flag", "stored", "loaded"),
    [
        ("auto", torch.bfloat16, torch.bfloat16),
        ("auto", torch.float32, torch.float32),
        ("float32", torch.bfloat16, torch.float32),
        ("bfloat16", torch.float32, torch.bfloat16),
        ("float16", torch.float32, torch.float16),
    ],
)
def test_torch_dtype(flag, stored, loaded, tiny_checkpoint):
    model = load_causal_lm(arguments(tiny_checkpoint("llama", dtype=stored), torch_dtype=flag))
    assert {parameter.dtype for parameter in model.parameters()} == {loaded}
    assert model.training


def test_a_model_that_is_not_trained_is_in_eval_mode(tiny_checkpoint):
    assert not load_causal_lm(arguments(tiny_checkpoint("llama")), for_training=False).training


def test_weights_that_the_checkpoint_lacks_are_not_made_up(tiny_checkpoint):
    folder = tiny_checkpoint("llama")
    weights = load_file(folder / "model.safetensors")
    del weights["lm_head.weight"], weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"lacks lm_head.weight, model.layers.1.mlp.up_proj.weight"):
        load_causal_lm(arguments(folder))


def test_weights_of_other_shapes_are_named(tiny_checkpoint):
    folder = tiny_checkpoint("llama")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "intermediate_size": 48}))
    with pytest.raises(ModelError, match=r"(?s)--model_name_or_path .*mlp\..*\.weight.*MISMATCH"):
        load_causal_lm(arguments(folder))


@needs_bitsandbytes
def test_memory_that_runs_out_while_weights_are_quantized_is_told_as_that(tiny_checkpoint, monkeypatch):
    """transformers keeps such an error and raises another one, which points to its log."""

    def is_full(*args, **kwargs):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.")

    monkeypatch.setattr("stagewise.models.quantization.bnb.pack", is_full)
    with pytest.raises(torch.OutOfMemoryError, match="^CUDA out of memory. Tried to allocate 2 GiB.$"):
        load_causal_lm(arguments(tiny_checkpoint("mixtral"), qlora=True))


def test_a_reward_model_is_no_language_model(tiny_checkpoint):
    with pytest.raises(ModelError, match="no language-model head"):
        load_causal_lm(arguments(tiny_checkpoint("llama", task="score")))


def test_a_tokenizer_with_ids_beyond_the_embedding_is_refused(tiny_checkpoint):
    args = arguments(tiny_checkpoint("llama", vocab_size=290))
    with pytest.raises(ModelError, match=r"300 entries.*290 rows"):
        load_causal_lm(args, tokenizer=load_tokenizer(args))
    check_vocabulary(build_tiny_model("llama", vocab_size=300), build_tiny_tokenizer())


def test_device_map(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    assert choose_device_map(arguments("m")) is None
    assert choose_device_map(arguments("m", device_map="auto")) == "auto"
    with pytest.raises(ModelError, match="ZeRO-3"):
        choose_device_map(arguments("m", device_map="auto"), deepspeed_zero3=True)
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert choose_device_map(arguments("m", device_map="auto")) is None  # earlier recipes give it with torchrun
    with pytest.raises(ModelError, match="--device_map sequential"):
        choose_device_map(arguments("m", device_map="sequential"))


def test_4_bit_layers_are_kept_from_repacking():
    layer = type("Linear4bit", (torch.nn.Linear,), {"support_avx512bf16_for_cpu": True})(2, 2)
    guard_4bit(torch.nn.Sequential(layer))
    assert layer.support_avx512bf16_for_cpu is False


# ── the reward model ────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma", "mixtral", "bloom", "falcon", "qwen3_5"])
def test_a_base_gets_a_new_scalar_head(family, tiny_checkpoint):
    args = arguments(tiny_checkpoint(family))
    tokenizer = load_tokenizer(args)
    model = load_reward_model(args, tokenizer).eval()
    assert model.score.weight.shape == (1, 32)
    # the score is read at the last token that is not padding
    short, padded = torch.tensor([[5, 6, 7]]), torch.tensor([[5, 6, 7, PAD_ID, PAD_ID]])
    alone = model(input_ids=short).logits
    beside = model(input_ids=padded, attention_mask=(padded != PAD_ID).long()).logits
    assert alone.shape == (1, 1)
    assert torch.allclose(alone, beside, atol=1e-4)


def test_a_reward_models_own_head_is_kept(tiny_checkpoint):
    args = arguments(tiny_checkpoint("llama", task="score"))
    model = load_reward_model(args, load_tokenizer(args))
    assert torch.equal(model.score.weight, build_tiny_model("llama", task="score").score.weight)


def test_the_head_of_a_16_bit_model_is_float32(tiny_checkpoint):
    args = arguments(tiny_checkpoint("llama", task="score", dtype=torch.bfloat16))
    model = load_reward_model(args, load_tokenizer(args))
    assert model.score.weight.dtype == torch.float32
    assert model.model.layers[0].mlp.up_proj.weight.dtype == torch.bfloat16
    assert model(input_ids=torch.tensor([[5, 6, 7]])).logits.dtype == torch.float32


def test_an_architecture_without_a_scalar_head_is_refused_by_name(tiny_checkpoint):
    args = arguments(tiny_checkpoint("cohere"))
    with pytest.raises(ModelError, match="no sequence-classification class for 'cohere'"):
        load_reward_model(args, load_tokenizer(args))
