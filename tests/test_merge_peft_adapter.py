"""Merged = base + adapter, whatever the family, the layout and the adapter; and nothing is left where it is not."""

import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from loguru import logger
from peft import (
    AdaLoraConfig,
    LoraConfig,
    PeftModel,
    PrefixTuningConfig,
    PromptEncoderConfig,
    PromptTuningConfig,
    get_peft_model,
)
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BitsAndBytesConfig,
    GenerationConfig,
)

import merge_peft_adapter
from merge_peft_adapter import MergeError, main
from stagewise.adapters import merge_check
from stagewise.adapters.attach import attach_adapter
from stagewise.config.arguments import AdapterArguments
from stagewise.errors import AdapterError, ArgumentError
from stagewise.models.quantization.bnb import guard_4bit
from tests.conftest import FAMILIES, ROOT, build_tiny_model, build_tiny_tokenizer

ROW = torch.tensor([[11, 12, 13, 14, 15, 16, 17]])
AUTO = {"CAUSAL_LM": AutoModelForCausalLM, "SEQ_CLS": AutoModelForSequenceClassification}
SOME = {"task_type": "CAUSAL_LM", "target_modules": ["q_proj", "v_proj"]}


@pytest.fixture
def log():
    lines: list[str] = []
    sink = logger.add(lambda message: lines.append(message.record["message"]))
    yield lines
    logger.remove(sink)


def move(wrapped, folder: Path) -> Path:
    """Gives an adapter weights as after training, and saves it."""
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in wrapped.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    wrapped.save_pretrained(folder)
    return folder


def adapt(base: Path, folder: Path, task_type="CAUSAL_LM", config=None, **flags) -> Path:
    """An adapter on the saved base: the project's own, or of any PEFT config."""
    options = {"num_labels": 1} if task_type == "SEQ_CLS" else {}
    model = AUTO[task_type].from_pretrained(base, **options)
    guard_4bit(model)
    torch.manual_seed(7)  # PEFT draws A from torch's own generator
    wrapped = get_peft_model(model, config) if config else attach_adapter(model, AdapterArguments(**flags), task_type)
    return move(wrapped, folder)


@torch.no_grad()
def logits(model):
    return model.float().eval()(input_ids=ROW, use_cache=False).logits


def adapter_logits(base: Path, adapter: Path, task_type="CAUSAL_LM") -> torch.Tensor:
    """What PEFT itself gives for base + adapter, in float32."""
    options = {"num_labels": 1} if task_type == "SEQ_CLS" else {}
    model = AUTO[task_type].from_pretrained(base, dtype=torch.float32, **options)
    return logits(PeftModel.from_pretrained(model, adapter))


def merged_logits(folder: Path, task_type="CAUSAL_LM") -> torch.Tensor:
    return logits(AUTO[task_type].from_pretrained(folder))


def merge(adapter: Path, output_dir: Path, *words) -> Path:
    main(["--lora_model", str(adapter), "--output_dir", str(output_dir), *map(str, words)])
    return output_dir


def config_of(folder: Path) -> dict:
    return json.loads((folder / "config.json").read_text())


def names_in(folder: Path) -> dict[str, list[str]]:
    """shard → names, read from the files themselves."""
    found = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as shard:
            found[path.name] = sorted(shard.keys())
    return found


# ── merged = base + adapter ─────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("task_type", ["CAUSAL_LM", "SEQ_CLS"])
@pytest.mark.parametrize("family", [*FAMILIES, "gpt2", "phi3"])
def test_merged_logits_are_the_adapters(family, task_type, tiny_checkpoint, tmp_path, log):
    base = tiny_checkpoint(family)
    adapter = adapt(base, tmp_path / "adapter", task_type)
    merged = merge(adapter, tmp_path / "merged")
    expected = adapter_logits(base, adapter, task_type)
    assert torch.allclose(merged_logits(merged, task_type), expected, atol=3e-4)
    # experts held as one parameter are PEFT's to add to
    assert any("target_parameters are merged by PEFT" in line for line in log) is (family == "mixtral")
    assert json.loads((merged / "run.json").read_text())["adapter_effect"] > 0.05
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "merged"]


@pytest.mark.parametrize("family", [*FAMILIES, "gpt2"])
def test_a_16_bit_base_is_merged_in_float32_into_shards_of_the_same_layout(family, tiny_checkpoint, tmp_path):
    base = tiny_checkpoint(family, dtype=torch.bfloat16, max_shard_size="20KB")
    layers = {"target_modules": "q_proj,k_proj,v_proj,o_proj"} if family == "mixtral" else {}
    adapter = adapt(base, tmp_path / "adapter", lora_rank=4, lora_alpha=20, **layers)
    merged = merge(adapter, tmp_path / "merged")
    assert len(names_in(base)) > 2
    assert names_in(merged) == names_in(base)
    index = "model.safetensors.index.json"
    assert (
        json.loads((merged / index).read_text())["weight_map"] == json.loads((base / index).read_text())["weight_map"]
    )
    before, after = ({k: v for p in f.glob("*.safetensors") for k, v in load_file(p).items()} for f in (base, merged))
    saved = load_file(adapter / "adapter_model.safetensors")
    changed = 0
    for name, tensor in before.items():
        path = name.removesuffix(".weight")
        # the inner model's prefix is in the adapter's names, and not in every checkpoint's
        a = next((k for k in saved if k.endswith(f".{path}.lora_A.weight")), None)
        if a is None:
            assert torch.equal(after[name], tensor), name
            continue
        changed += 1
        delta = saved[a.replace("lora_A", "lora_B")] @ saved[a] * (20 / 4)
        delta = delta.T if family == "gpt2" else delta  # Conv1D keeps (in, out)
        assert torch.equal(after[name], (tensor.float() + delta).to(torch.bfloat16)), name
    assert changed == len(saved) // 2


def test_no_model_is_loaded_to_merge_shards(tiny_checkpoint, tmp_path, monkeypatch):
    base = tiny_checkpoint("llama", max_shard_size="20KB")
    adapter = adapt(base, tmp_path / "adapter")
    order = []
    save = merge_peft_adapter.merge_shards

    def merge_shards(*args):
        order.append("shards")
        return save(*args)

    load = AutoModelForCausalLM.from_pretrained
    monkeypatch.setattr(merge_peft_adapter, "merge_shards", merge_shards)
    monkeypatch.setattr(
        AutoModelForCausalLM, "from_pretrained", lambda *a, **k: order.append("model") or load(*a, **k)
    )
    merge(adapter, tmp_path / "merged")
    assert order == ["shards", "model", "model"]  # the check: base + adapter, then merged


def test_a_checkpoint_without_the_inner_models_prefix(tiny_checkpoint, tmp_path, log):
    """As bigscience/bloomz and gpt2 are published: h.0… in place of transformer.h.0…"""
    base = tiny_checkpoint("bloom")
    weights = load_file(base / "model.safetensors")
    short = {name.removeprefix("transformer."): tensor for name, tensor in weights.items()}
    assert short.keys() != weights.keys()
    save_file(short, base / "model.safetensors", metadata={"format": "pt"})
    adapter = adapt(base, tmp_path / "adapter")
    merged = merge(adapter, tmp_path / "merged")
    assert names_in(merged) == names_in(base)
    assert torch.allclose(merged_logits(merged), adapter_logits(base, adapter), atol=3e-4)
    assert not any("in memory" in line for line in log)


def test_names_that_are_converted_while_loading_are_merged_in_memory(tmp_path, log):
    """A Qwen3.5 with images keeps its text layers under other names than the text model that is trained."""
    from transformers import AutoConfig, AutoModelForImageTextToText

    text = build_tiny_model("qwen3_5").config.to_dict()
    vision = {"hidden_size": 16, "depth": 1, "num_heads": 2, "intermediate_size": 16, "out_hidden_size": 32}
    config = AutoConfig.for_model("qwen3_5", text_config=text, vision_config=vision)
    base = tmp_path / "base"
    torch.manual_seed(0)
    AutoModelForImageTextToText.from_config(config).save_pretrained(base)
    build_tiny_tokenizer().save_pretrained(base)
    adapter = adapt(base, tmp_path / "adapter")
    merged = merge(adapter, tmp_path / "merged")
    assert any("merging in memory" in line and "converted while loading" in line for line in log)
    assert torch.allclose(merged_logits(merged), adapter_logits(base, adapter), atol=3e-4)


# ── what comes along ────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_reward_head_comes_along(tiny_checkpoint, tmp_path):
    base = tiny_checkpoint("llama", dtype=torch.bfloat16, max_shard_size="20KB")
    adapter = adapt(base, tmp_path / "adapter", "SEQ_CLS")
    merged = merge(adapter, tmp_path / "merged")
    config = config_of(merged)
    assert config["architectures"] == ["LlamaForSequenceClassification"]
    assert (config["num_labels"], config["id2label"], config["pad_token_id"]) == (1, {"0": "LABEL_0"}, 0)
    model, report = AutoModelForSequenceClassification.from_pretrained(merged, output_loading_info=True)
    assert model.score.weight.shape == (1, 32)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    saved = load_file(adapter / "adapter_model.safetensors")["base_model.model.score.weight"]
    assert torch.equal(model.score.weight, saved.to(torch.bfloat16))


def test_a_reward_model_is_merged_onto_a_reward_model(tiny_checkpoint, tmp_path):
    base = tiny_checkpoint("qwen3", task="score")
    adapter = adapt(base, tmp_path / "adapter", "SEQ_CLS")
    merged = merge(adapter, tmp_path / "merged")
    assert names_in(merged) == names_in(base)
    assert torch.allclose(merged_logits(merged, "SEQ_CLS"), adapter_logits(base, adapter, "SEQ_CLS"), atol=3e-4)


@pytest.mark.parametrize(
    ("family", "names"), [("gemma", "embed_tokens,lm_head"), ("bloom", "word_embeddings"), ("gpt2", "lm_head")]
)
def test_tied_embeddings_that_were_trained_stay_tied(family, names, tiny_checkpoint, tmp_path):
    base = tiny_checkpoint(family, dtype=torch.bfloat16)
    adapter = adapt(base, tmp_path / "adapter", modules_to_save=names)
    merged = merge(adapter, tmp_path / "merged")
    assert names_in(merged) == names_in(base)
    model = AutoModelForCausalLM.from_pretrained(merged)
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    old = AutoModelForCausalLM.from_pretrained(base).get_input_embeddings().weight
    assert (model.get_input_embeddings().weight - old).abs().max() > 0.05
    tokenizer = AutoTokenizer.from_pretrained(merged)
    assert len(tokenizer) == 300


def test_embedding_and_head_that_are_apart_come_along(tiny_checkpoint, tmp_path):
    base = tiny_checkpoint("llama")
    adapter = adapt(base, tmp_path / "adapter", modules_to_save="embed_tokens,lm_head")
    merged = merge(adapter, tmp_path / "merged")
    assert torch.allclose(merged_logits(merged), adapter_logits(base, adapter), atol=3e-4)


@pytest.mark.parametrize("modules", [["embed_tokens", "lm_head"], ["lm_head"], ["embed_tokens"]])
def test_an_adapter_that_untied_them_gives_an_untied_model(modules, tiny_checkpoint, tmp_path):
    """PEFT's own default trains two copies."""
    base = tiny_checkpoint("gemma")
    adapter = adapt(base, tmp_path / "adapter", config=LoraConfig(**SOME, modules_to_save=modules))
    merged = merge(adapter, tmp_path / "merged")
    assert config_of(merged)["tie_word_embeddings"] is False
    assert torch.allclose(merged_logits(merged), adapter_logits(base, adapter), atol=3e-4)


def with_tokens(count: int):
    tokenizer = build_tiny_tokenizer()
    tokenizer.add_tokens([f"<word{i}>" for i in range(count)])
    return tokenizer


@pytest.mark.parametrize("family", ["llama", "gemma"])
def test_added_tokens_that_were_trained_come_along(family, tiny_checkpoint, tmp_path, log):
    base, adapter = tiny_checkpoint(family), tmp_path / "adapter"
    model = AutoModelForCausalLM.from_pretrained(base)
    model.resize_token_embeddings(330)
    names = {"gemma": "embed_tokens", "llama": "embed_tokens,lm_head"}[family]
    move(attach_adapter(model, AdapterArguments(modules_to_save=names), "CAUSAL_LM"), adapter)
    with_tokens(30).save_pretrained(adapter)
    merged = merge(adapter, tmp_path / "merged")
    assert any("in memory: the embedding has more rows" in line for line in log)
    found = AutoModelForCausalLM.from_pretrained(merged)
    assert found.get_input_embeddings().weight.shape == (330, 32)
    saved = load_file(adapter / "adapter_model.safetensors")["base_model.model.model.embed_tokens.weight"]
    assert torch.equal(found.get_input_embeddings().weight, saved)
    ids = AutoTokenizer.from_pretrained(merged)("<word29>").input_ids
    assert ids == [329]
    assert found(input_ids=torch.tensor([ids])).logits.shape == (1, 1, 330)


@pytest.mark.parametrize("family", ["llama", "bloom"])
def test_resize_emb_adds_rows_for_a_longer_tokenizer(family, tiny_checkpoint, tmp_path):
    base, adapter = tiny_checkpoint(family), tmp_path / "adapter"
    adapt(base, adapter)
    with_tokens(30).save_pretrained(adapter)
    with pytest.raises(MergeError, match="needs 330 rows, the embedding has 320: add --resize_emb"):
        merge(adapter, tmp_path / "merged")
    merged = merge(adapter, tmp_path / "merged", "--resize_emb")
    rows = AutoModelForCausalLM.from_pretrained(merged).get_input_embeddings().weight
    assert config_of(merged)["vocab_size"] == 330
    assert torch.allclose(rows[329], rows[:320].mean(dim=0), atol=1e-6)
    assert torch.allclose(merged_logits(merged)[..., :320], adapter_logits(base, adapter), atol=3e-4)


def test_resize_emb_with_nothing_to_add_says_so(tiny_checkpoint, tmp_path, log):
    adapter = adapt(tiny_checkpoint("llama"), tmp_path / "adapter")
    merge(adapter, tmp_path / "merged", "--resize_emb")
    assert "--resize_emb: nothing to add, the tokenizer needs 300 rows and there are 320" in log


def test_tokenizer_template_and_generation_config_of_the_adapter_travel(tiny_checkpoint, tmp_path):
    base = tiny_checkpoint("llama")
    adapter = adapt(base, tmp_path / "adapter")
    template = "{% for message in messages %}{{ message['content'] }}</s>{% endfor %}"
    build_tiny_tokenizer(chat_template=template).save_pretrained(adapter)
    GenerationConfig(eos_token_id=[2, 9], pad_token_id=0).save_pretrained(adapter)
    merged = merge(adapter, tmp_path / "merged")
    assert AutoTokenizer.from_pretrained(merged).chat_template == template
    assert AutoModelForCausalLM.from_pretrained(merged).generation_config.eos_token_id == [2, 9]


def test_the_bases_tokenizer_and_generation_config_are_the_fallback(tiny_checkpoint, tmp_path):
    base = tiny_checkpoint("llama", tokenizer=build_tiny_tokenizer(chat_template="{{ messages }}"))
    merged = merge(adapt(base, tmp_path / "adapter"), tmp_path / "merged")
    assert AutoTokenizer.from_pretrained(merged).chat_template == "{{ messages }}"
    assert (merged / "generation_config.json").read_text() == (base / "generation_config.json").read_text()


def test_tokenizer_path_is_taken(tiny_checkpoint, tmp_path):
    base = tiny_checkpoint("llama")
    build_tiny_tokenizer(chat_template="{{ messages }}").save_pretrained(tmp_path / "tokenizer")
    merged = merge(adapt(base, tmp_path / "a"), tmp_path / "merged", "--tokenizer_path", tmp_path / "tokenizer")
    assert AutoTokenizer.from_pretrained(merged).chat_template == "{{ messages }}"


def test_config_json_keeps_what_this_transformers_does_not_know(tiny_checkpoint, tmp_path):
    base = tiny_checkpoint("llama")
    (base / "config.json").write_text(json.dumps(config_of(base) | {"of_another_version": [1, 2]}))
    merged = merge(adapt(base, tmp_path / "adapter"), tmp_path / "merged")
    assert config_of(merged) == config_of(base)


def test_the_lineage_goes_on(tiny_checkpoint, tmp_path):
    base = tiny_checkpoint("llama")
    adapter = adapt(base, tmp_path / "adapter")
    before = [{"stage": "sft", "base_model": str(base)}]
    (adapter / "run.json").write_text(json.dumps({"stage": "sft", "lineage": before, "template": "vicuna"}))
    merged = merge(adapter, tmp_path / "merged")
    manifest = json.loads((merged / "run.json").read_text())
    step = {"stage": "merge", "base_model": str(base), "adapter": str(adapter)}
    assert manifest["lineage"] == [*before, step]
    assert {key: manifest[key] for key in step} == step
    assert manifest["template"] == "vicuna"
    assert 0 <= manifest["largest_difference"] <= manifest["tolerance"] < manifest["adapter_effect"]


# ── bases and adapters of other kinds ───────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("family", "config", "reason"),
    [
        ("llama", AdaLoraConfig(**SOME, total_step=10), "ADALORA layers are merged by PEFT"),
        ("llama", LoraConfig(**SOME, use_dora=True), "use_dora"),
        ("llama", LoraConfig(**SOME, use_rslora=True, rank_pattern={"q_proj": 4}, alpha_pattern={"v_proj": 3}), None),
        ("llama", LoraConfig(**SOME, modules_to_save=["input_layernorm"]), None),
        ("llama", LoraConfig(**SOME, trainable_token_indices=[11, 12]), "trainable_token_indices"),
        ("llama", LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj", "embed_tokens"]), "embeddings"),
        ("gemma", LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj", "embed_tokens"]), "embeddings"),
        ("bloom", LoraConfig(task_type="CAUSAL_LM", target_modules=["query_key_value"], bias="all"), "biases"),
        ("bloom", LoraConfig(task_type="CAUSAL_LM", target_modules=["query_key_value"], lora_bias=True), "lora_bias"),
        ("mixtral", LoraConfig(**SOME, target_parameters=["experts.gate_up_proj"]), "target_parameters"),
    ],
)
def test_other_adapters(family, config, reason, tiny_checkpoint, tmp_path, log):
    base = tiny_checkpoint(family)
    adapter = adapt(base, tmp_path / "adapter", config=config)
    merged = merge(adapter, tmp_path / "merged")
    assert torch.allclose(merged_logits(merged), adapter_logits(base, adapter), atol=3e-4)
    in_memory = [line for line in log if line.startswith("merging in memory")]
    assert in_memory == [] if reason is None else reason in in_memory[0]


@pytest.mark.parametrize("kind", [PromptTuningConfig, PrefixTuningConfig, PromptEncoderConfig])
def test_virtual_tokens_cannot_be_merged(kind, tiny_checkpoint, tmp_path):
    config = kind(task_type="CAUSAL_LM", num_virtual_tokens=3)
    adapter = adapt(tiny_checkpoint("llama"), tmp_path / "adapter", config=config)
    with pytest.raises(AdapterError, match="cannot be merged; load it with PEFT"):
        merge(adapter, tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


def test_a_base_with_bin_weights(tiny_checkpoint, tmp_path, log):
    base = tiny_checkpoint("llama", dtype=torch.bfloat16)
    adapter = adapt(base, tmp_path / "adapter")
    expected = adapter_logits(base, adapter)
    torch.save(load_file(base / "model.safetensors"), base / "pytorch_model.bin")
    (base / "model.safetensors").unlink()
    merged = merge(adapter, tmp_path / "merged")
    assert "merging in memory: the base has no safetensors files" in log
    assert AutoModelForCausalLM.from_pretrained(merged).dtype == torch.bfloat16
    assert (merged_logits(merged) - expected).abs().max() < 0.5 < expected.abs().max()


def test_a_quantized_base_needs_bitsandbytes_or_its_original(tmp_path, monkeypatch):
    base = tmp_path / "base"
    build_tiny_model("llama").save_pretrained(base)
    build_tiny_tokenizer().save_pretrained(base)
    adapter = adapt(base, tmp_path / "adapter")
    config = json.loads((base / "config.json").read_text())
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    for method, words in (("bitsandbytes", "pip install bitsandbytes"), ("gptq", "not by bitsandbytes")):
        about = {"quant_method": method, "load_in_4bit": True, "bits": 4}
        (base / "config.json").write_text(json.dumps({**config, "quantization_config": about}))
        with pytest.raises(MergeError, match=words):
            merge(adapter, tmp_path / "merged")


@pytest.mark.parametrize("bits", [4, 8])
def test_a_quantized_base_becomes_a_16_bit_model(bits, tmp_path):
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed: quantized bases are not tested here")
    shape = {"hidden_size": 64, "head_dim": 16, "intermediate_size": 128}
    build_tiny_model("llama", **shape).save_pretrained(tmp_path / "full")
    config = BitsAndBytesConfig(load_in_4bit=bits == 4, load_in_8bit=bits == 8)
    base = tmp_path / "base"
    AutoModelForCausalLM.from_pretrained(tmp_path / "full", quantization_config=config).save_pretrained(base)
    build_tiny_tokenizer().save_pretrained(base)
    adapter = adapt(base, tmp_path / "adapter")
    merged = merge(adapter, tmp_path / "merged")
    assert "quantization_config" not in config_of(merged)
    model = AutoModelForCausalLM.from_pretrained(merged)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    quantized = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    guard_4bit(quantized)
    with torch.no_grad():
        expected = PeftModel.from_pretrained(quantized, adapter).eval()(input_ids=ROW, use_cache=False).logits
    # 8-bit layers round their inputs too, which the merged model no longer does
    assert (logits(model) - expected).square().mean().sqrt() < 0.1 * expected.square().mean().sqrt()


# ── the check, and nothing left behind ──────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", ["llama", "mixtral"])
def test_a_merge_that_forgets_one_layer_is_refused(family, dtype, tiny_checkpoint, tmp_path, monkeypatch):
    adapter = adapt(tiny_checkpoint(family, dtype=dtype), tmp_path / "adapter", target_modules="q_proj,v_proj")
    plan_shards = merge_peft_adapter.plan_shards

    def forgetful(*args):
        plan = plan_shards(*args)
        plan.layers.popitem()
        return plan

    monkeypatch.setattr(merge_peft_adapter, "plan_shards", forgetful)
    with pytest.raises(MergeError, match=r"merged is not base \+ adapter: largest difference .* tolerance") as found:
        merge(adapter, tmp_path / "merged")
    number = r"(\d\.\d+e[-+]\d+)"
    difference, tolerance = (float(re.search(f"{w} {number}", str(found.value))[1]) for w in ("logits", "tolerance"))
    assert difference > tolerance
    assert os.listdir(tmp_path) == ["adapter"]


def test_weights_that_are_no_numbers_are_refused(tiny_checkpoint, tmp_path):
    adapter = adapt(tiny_checkpoint("llama"), tmp_path / "adapter")
    weights = load_file(adapter / "adapter_model.safetensors")
    next(iter(weights.values()))[0, 0] = float("nan")
    save_file(weights, adapter / "adapter_model.safetensors")
    with pytest.raises(MergeError, match=r"merged is not base \+ adapter"):
        merge(adapter, tmp_path / "merged")
    assert os.listdir(tmp_path) == ["adapter"]


def test_what_was_there_stays_when_a_merge_fails(tiny_checkpoint, tmp_path, monkeypatch):
    adapter = adapt(tiny_checkpoint("llama"), tmp_path / "adapter")
    merged = merge(adapter, tmp_path / "merged")
    before = {path.name: path.read_bytes() for path in merged.iterdir()}
    monkeypatch.setattr(merge_check, "TOLERANCE", 0.0)
    with pytest.raises(MergeError):
        merge(adapter, merged, "--overwrite_output_dir")
    assert {path.name: path.read_bytes() for path in merged.iterdir()} == before
    assert sorted(os.listdir(tmp_path)) == ["adapter", "merged"]


def test_an_output_dir_is_replaced_only_when_asked_to(tiny_checkpoint, tmp_path):
    adapter = adapt(tiny_checkpoint("llama"), tmp_path / "adapter")
    (tmp_path / "merged").mkdir()
    (tmp_path / "merged" / "old.txt").touch()
    with pytest.raises(ArgumentError, match="not empty: add --overwrite_output_dir"):
        merge(adapter, tmp_path / "merged")
    merged = merge(adapter, tmp_path / "merged", "--overwrite_output_dir")
    assert not (merged / "old.txt").exists()
    assert (merged / "config.json").exists()


def test_neither_base_nor_adapter_can_be_the_output(tiny_checkpoint, tmp_path):
    base = tiny_checkpoint("llama")
    adapter = adapt(base, tmp_path / "adapter")
    for folder, told in ((adapter, "holds --lora_model"), (tmp_path, "holds --lora_model"), (base, "holds the base")):
        with pytest.raises(ArgumentError, match=told):
            merge(adapter, folder, "--overwrite_output_dir")
    assert (adapter / "adapter_config.json").exists() and (base / "config.json").exists()


def test_a_base_of_another_shape_is_refused(tiny_checkpoint, tmp_path):
    adapter = adapt(tiny_checkpoint("llama"), tmp_path / "adapter")
    with pytest.raises(ArgumentError, match="--base_model"):
        merge(adapter, tmp_path / "merged", "--base_model", tiny_checkpoint("llama", intermediate_size=48))
    with pytest.raises(ArgumentError, match=r"no layer for|has no"):
        merge(adapter, tmp_path / "merged", "--base_model", tiny_checkpoint("llama", num_hidden_layers=1))
    assert os.listdir(tmp_path) == ["adapter"]


def test_a_base_that_was_moved_is_given(tiny_checkpoint, tmp_path):
    base = tiny_checkpoint("llama")
    adapter = adapt(base, tmp_path / "adapter")
    expected = adapter_logits(base, adapter)
    moved = base.rename(tmp_path / "moved")
    with pytest.raises(ArgumentError, match=f"--base_model {base}: no such directory"):
        merge(adapter, tmp_path / "merged")
    merged = merge(adapter, tmp_path / "merged", "--base_model", moved)
    assert torch.allclose(merged_logits(merged), expected, atol=3e-4)


def test_an_adapter_as_base_names_the_merge_command(tiny_checkpoint, tmp_path):
    adapter = adapt(tiny_checkpoint("llama"), tmp_path / "adapter")
    with pytest.raises(ArgumentError, match=r"this is an adapter, not a model\. Merge it first"):
        merge(adapter, tmp_path / "merged", "--base_model", adapter)


def test_model_type_is_checked(tiny_checkpoint, tmp_path):
    adapter = adapt(tiny_checkpoint("llama"), tmp_path / "adapter")
    with pytest.raises(ArgumentError, match="--model_type bloom"):
        merge(adapter, tmp_path / "merged", "--model_type", "bloom")


def test_the_command_ends_with_one_line_and_an_exit_code(tmp_path):
    words = [sys.executable, "merge_peft_adapter.py", "--lora_model", tmp_path, "--output_dir", tmp_path / "merged"]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1
    assert (
        done.stderr.splitlines()[-1]
        == f"error: --lora_model {tmp_path}: expected an adapter, found no adapter_config.json"
    )


def test_merged_files_are_as_readable_as_any(tiny_checkpoint, tmp_path):
    adapter = adapt(tiny_checkpoint("llama"), tmp_path / "adapter")
    tokenizer = build_tiny_tokenizer()
    tokenizer.chat_template = {"default": "{{ messages }}", "tool_use": "{{ tools }}"}
    tokenizer.save_pretrained(adapter)
    merged = merge(adapter, tmp_path / "merged")
    assert len({path.stat().st_mode for path in merged.iterdir() if path.is_file()}) == 1
    folder = merged / "additional_chat_templates"  # which can be entered by those who can enter the model's
    assert folder.stat().st_mode == merged.stat().st_mode and [path.name for path in folder.iterdir()]
