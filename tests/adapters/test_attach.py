"""Which layers an adapter takes, what it saves, continuing from it, and merging it in memory."""

import copy
import json
import pickle

import pytest
import torch
from loguru import logger
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn

from stagewise.adapters.attach import attach_adapter, fold, load_adapter, merge_in_memory
from stagewise.adapters.compatibility import check_continuation
from stagewise.adapters.files import read_adapter_config
from stagewise.adapters.targets import fused_experts, linear_targets
from stagewise.config.arguments import AdapterArguments
from stagewise.errors import AdapterError
from tests.conftest import FAMILIES, build_tiny_model

LLAMA = ["down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj"]
ROW = torch.tensor([[11, 12, 13, 14, 15, 16, 17]])


@pytest.fixture
def log():
    """The lines that were logged."""
    lines: list[str] = []
    sink = logger.add(lambda message: lines.append(message.record["message"]))
    yield lines
    logger.remove(sink)


def trained(model, task_type="CAUSAL_LM", seed=7, **flags):
    """A model with an adapter whose weights have moved, as after training."""
    torch.manual_seed(seed)  # PEFT draws A from torch's own generator
    wrapped = attach_adapter(model, AdapterArguments(**flags), task_type)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in wrapped.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return wrapped.eval()


@torch.no_grad()
def logits(model):
    return model(input_ids=ROW, use_cache=False).logits


def trainable(model) -> list[str]:
    return sorted(name for name, parameter in model.named_parameters() if parameter.requires_grad)


# ── targets ─────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("task", ["causal", "score"])
@pytest.mark.parametrize(
    ("family", "expected"),
    [
        ("llama", LLAMA),
        ("qwen3", LLAMA),
        ("gemma", LLAMA),
        ("mixtral", ["k_proj", "o_proj", "q_proj", "v_proj"]),
        ("bloom", ["dense", "dense_4h_to_h", "dense_h_to_4h", "query_key_value"]),
        ("falcon", ["dense", "dense_4h_to_h", "dense_h_to_4h", "query_key_value"]),
        ("qwen3_5", sorted([*LLAMA, "in_proj_a", "in_proj_b", "in_proj_qkv", "in_proj_z", "out_proj"])),
        ("gpt2", ["c_attn", "c_fc", "c_proj"]),
        ("phi3", ["down_proj", "gate_up_proj", "o_proj", "qkv_proj"]),
    ],
)
def test_all_linear_layers_but_the_heads(family, task, expected):
    assert linear_targets(build_tiny_model(family, task=task)) == expected


def test_layers_of_pictures_are_left_out_also_where_they_share_a_name():
    model = build_tiny_model("llama")
    model.vision_tower = nn.ModuleDict({"q_proj": nn.Linear(4, 4), "patch": nn.Linear(4, 4)})
    q_projs = ["model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.q_proj"]
    assert linear_targets(model) == ["down_proj", "gate_proj", "k_proj", *q_projs, "o_proj", "up_proj", "v_proj"]
    wrapped = attach_adapter(model, AdapterArguments(), "CAUSAL_LM")
    assert not [name for name in trainable(wrapped) if "vision" in name]


def test_a_model_without_linear_layers_is_an_error():
    model = build_tiny_model("llama")
    model.model.layers = nn.ModuleList()
    with pytest.raises(AdapterError, match="no linear layers"):
        linear_targets(model)


def test_experts_in_one_parameter_are_taken_without_dropout(log):
    model = build_tiny_model("mixtral")
    assert fused_experts(model) == ["experts.down_proj", "experts.gate_up_proj"]
    before = logits(model)
    wrapped = attach_adapter(model, AdapterArguments(), "CAUSAL_LM").eval()
    assert "LoRA on k_proj, o_proj, q_proj, v_proj, experts.down_proj, experts.gate_up_proj" in log[-1]
    assert "no dropout" in log[-2]
    assert torch.equal(logits(wrapped), before)
    assert len([name for name in trainable(wrapped) if "experts" in name]) == 2 * 2 * 2  # layers, parameters, A and B


@pytest.mark.parametrize(
    ("flags", "reason"),
    [
        ({"lora_dropout": 0.1}, "--lora_dropout 0"),
        ({"use_dora": True}, "--use_dora"),
        ({"init_lora_weights": "pissa"}, "--init_lora_weights"),
        ({"fine_tuning_type": "adalora"}, "AdaLoRA takes linear layers alone"),
    ],
)
def test_experts_that_the_method_cannot_take_are_left_out_or_refused_by_name(flags, reason, log):
    attach_adapter(build_tiny_model("mixtral"), AdapterArguments(**flags), "CAUSAL_LM")
    assert "left out" in log[-1] and reason in log[-1]
    assert "experts.down_proj, experts.gate_up_proj" in log[-1]
    with pytest.raises(AdapterError, match=f"--target_modules experts.gate_up_proj: .*{reason}"):
        args = AdapterArguments(target_modules="q_proj,gate_up_proj", **flags)
        attach_adapter(build_tiny_model("mixtral"), args, "CAUSAL_LM")


@pytest.mark.parametrize(
    ("family", "flags", "message"),
    [
        (
            "llama",
            {"target_modules": "q_proj,wq"},
            "--target_modules: LlamaForCausalLM has no wq; there are down_proj",
        ),
        (
            "bloom",
            {"target_modules": "q_proj"},
            "has no q_proj; there are dense, dense_4h_to_h, dense_h_to_4h, lm_head",
        ),
        ("mixtral", {"target_modules": "w1"}, "has no w1; there are .*experts.gate_up_proj"),
        (
            "llama",
            {"modules_to_save": "wte"},
            "--modules_to_save: LlamaForCausalLM has no wte; there are .*embed_tokens",
        ),
        ("llama", {"target_modules": "lm_head", "modules_to_save": "lm_head"}, "both name lm_head"),
        ("gemma", {"target_modules": "q_proj,embed_tokens"}, "embedding and head are tied; use --modules_to_save"),
    ],
)
def test_names_that_cannot_be_taken_are_an_error(family, flags, message):
    with pytest.raises(AdapterError, match=message):
        attach_adapter(build_tiny_model(family), AdapterArguments(**flags), "CAUSAL_LM")


def test_named_layers_alone_are_taken():
    wrapped = attach_adapter(build_tiny_model("llama"), AdapterArguments(target_modules="q_proj, v_proj"), "CAUSAL_LM")
    assert {name.split(".")[-4] for name in trainable(wrapped)} == {"q_proj", "v_proj"}
    assert len(trainable(wrapped)) == 2 * 2 * 2  # layers, targets, A and B


# ── attach ──────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("family", FAMILIES)
def test_the_adapter_is_float32_and_alone_trained_and_changes_nothing_at_first(family):
    model = build_tiny_model(family).to(torch.bfloat16)
    before = logits(model)
    wrapped = attach_adapter(model, AdapterArguments(), "CAUSAL_LM").eval()
    assert torch.equal(logits(wrapped), before)
    weights = dict(wrapped.named_parameters())
    assert all(".lora_" in name for name in trainable(wrapped))
    assert {weights[name].dtype for name in trainable(wrapped)} == {torch.float32}
    assert {p.dtype for name, p in weights.items() if ".lora_" not in name} == {torch.bfloat16}


def test_flags_reach_the_adapter(log):
    flags = {"lora_rank": 4, "lora_alpha": 20, "lora_dropout": 0.25}
    config = attach_adapter(build_tiny_model("llama"), AdapterArguments(**flags), "CAUSAL_LM").peft_config["default"]
    assert (config.r, config.lora_alpha, config.lora_dropout) == (4, 20, 0.25)
    # per layer: q, o 4 * (32 + 32); k, v 4 * (32 + 16); gate, up, down 4 * (32 + 64); two layers
    assert "rank 4, alpha 20; trains 4,096 of " in log[-1]


@pytest.mark.parametrize("family", FAMILIES)
def test_the_reward_head_is_trained_and_saved_in_full(family, tmp_path):
    wrapped = trained(build_tiny_model(family, task="score"), "SEQ_CLS")
    assert [name for name in trainable(wrapped) if ".lora_" not in name] == [
        "base_model.model.score.modules_to_save.default.weight"
    ]
    wrapped.save_pretrained(tmp_path)
    saved = load_file(tmp_path / "adapter_model.safetensors")["base_model.model.score.weight"]
    assert saved.shape == (1, 32)
    assert not torch.equal(saved, build_tiny_model(family, task="score").score.weight)


TIED = [
    ("gemma", "embed_tokens,lm_head"),
    ("gemma", "embed_tokens"),
    ("gemma", "lm_head"),
    ("bloom", "word_embeddings,lm_head"),
    ("falcon", "lm_head"),
    ("gpt2", "wte"),
]


@pytest.mark.parametrize(("family", "names"), TIED)
def test_tied_embeddings_stay_tied(family, names, tmp_path):
    wrapped = trained(build_tiny_model(family), modules_to_save=names)
    assert len([name for name in trainable(wrapped) if ".lora_" not in name]) == 1
    wrapped.save_pretrained(tmp_path)
    base = build_tiny_model(family)
    again = attach_adapter(copy.deepcopy(base), AdapterArguments(peft_path=str(tmp_path)), "CAUSAL_LM").eval()
    assert torch.equal(logits(again), logits(wrapped))
    assert trainable(again) == trainable(wrapped)
    merged = merge_in_memory(base, tmp_path)
    assert merged.get_output_embeddings().weight is merged.get_input_embeddings().weight
    assert merged.config.tie_word_embeddings
    assert torch.allclose(logits(merged), logits(wrapped), atol=1e-4)


def test_untied_embeddings_are_trained_apart():
    wrapped = trained(build_tiny_model("llama"), modules_to_save="embed_tokens,lm_head")
    assert len([name for name in trainable(wrapped) if ".lora_" not in name]) == 2


# ── continuing from an adapter ───────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def adapter(tmp_path):
    """A trained adapter: rank 4, alpha 20, on q_proj and v_proj."""
    flags = {"lora_rank": 4, "lora_alpha": 20, "target_modules": "q_proj,v_proj"}
    trained(build_tiny_model("llama"), **flags).save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


def test_goes_on_with_its_own_rank_and_targets(adapter):
    wrapped = attach_adapter(build_tiny_model("llama"), AdapterArguments(peft_path=str(adapter)), "CAUSAL_LM")
    assert wrapped.peft_config["default"].r == 4
    assert len(trainable(wrapped)) == 8
    saved = load_file(adapter / "adapter_model.safetensors")
    for name, parameter in wrapped.named_parameters():
        if parameter.requires_grad:
            assert torch.equal(parameter, saved[name.replace(".default", "")])
            assert parameter.dtype == torch.float32


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"lora_rank": 16}, "--lora_rank 16: the adapter of --peft_path has 4"),
        ({"lora_alpha": 32.0}, "--lora_alpha 32.0: the adapter of --peft_path has 20"),
        ({"lora_dropout": 0.5}, "--lora_dropout 0.5: the adapter of --peft_path has 0.05"),
        ({"target_modules": "q_proj"}, "--target_modules q_proj: the adapter of --peft_path has q_proj, v_proj"),
        ({"modules_to_save": "embed_tokens"}, "--modules_to_save embed_tokens: the adapter of --peft_path has none"),
    ],
)
def test_flags_that_contradict_the_adapter_are_an_error(flags, message, adapter):
    with pytest.raises(AdapterError, match=message):
        attach_adapter(build_tiny_model("llama"), AdapterArguments(peft_path=str(adapter), **flags), "CAUSAL_LM")


def test_flags_that_agree_with_the_adapter_are_taken(adapter):
    flags = {"lora_rank": 4, "lora_alpha": 20.0, "target_modules": "v_proj,q_proj"}
    check_continuation(AdapterArguments(peft_path=str(adapter), **flags), read_adapter_config(adapter), "CAUSAL_LM")


def test_an_adapter_of_another_task_is_an_error(adapter):
    with pytest.raises(AdapterError, match="its task is CAUSAL_LM, this stage trains SEQ_CLS"):
        args = AdapterArguments(peft_path=str(adapter))
        attach_adapter(build_tiny_model("llama", task="score"), args, "SEQ_CLS")


def test_a_prompt_tuning_adapter_is_not_merged(tmp_path):
    config = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    get_peft_model(build_tiny_model("llama"), config).save_pretrained(tmp_path)
    with pytest.raises(AdapterError, match="cannot be merged; load it with PEFT"):
        merge_in_memory(build_tiny_model("llama"), tmp_path)


def test_a_flag_that_contradicts_the_adapter_with_its_default_value_is_an_error(adapter):
    args = AdapterArguments(peft_path=str(adapter))
    check_continuation(args, read_adapter_config(adapter), "CAUSAL_LM")
    for name, shown in (("lora_rank", "8"), ("lora_alpha", "16.0"), ("target_modules", "all")):
        args.given = frozenset([name])
        with pytest.raises(AdapterError, match=f"--{name} {shown}: the adapter of --peft_path has"):
            attach_adapter(build_tiny_model("llama"), args, "CAUSAL_LM")


@pytest.mark.parametrize("family", ["llama", "mixtral"])
def test_all_agrees_with_an_adapter_on_all(family, tmp_path):
    trained(build_tiny_model(family)).save_pretrained(tmp_path)
    args = AdapterArguments(peft_path=str(tmp_path))
    args.given = frozenset(["target_modules", "lora_rank"])
    attach_adapter(build_tiny_model(family), args, "CAUSAL_LM")


def as_bin(adapter):
    """The same adapter with adapter_model.bin in place of safetensors."""
    torch.save(load_file(adapter / "adapter_model.safetensors"), adapter / "adapter_model.bin")
    (adapter / "adapter_model.safetensors").unlink()
    return adapter


def test_adapter_model_bin_is_read(adapter):
    expected = logits(load_adapter(build_tiny_model("llama"), adapter))
    assert torch.equal(logits(load_adapter(build_tiny_model("llama"), as_bin(adapter))), expected)


class Malicious:
    def __reduce__(self):
        return (open, (f"{__file__}.ran", "w"))


def test_adapter_model_bin_runs_no_code(adapter, monkeypatch, tmp_path):
    monkeypatch.setattr(f"{__name__}.__file__", str(tmp_path / "code"))
    torch.save({"weights": Malicious()}, as_bin(adapter) / "adapter_model.bin")
    with pytest.raises(AdapterError, match=r"adapter_model.bin: refused"):
        load_adapter(build_tiny_model("llama"), adapter)
    assert not (tmp_path / "code.ran").exists()
    torch.load(adapter / "adapter_model.bin", weights_only=False)  # the file would have run it
    assert (tmp_path / "code.ran").exists()


def test_a_bin_that_is_no_pickle_of_torch_is_refused(adapter):
    (as_bin(adapter) / "adapter_model.bin").write_bytes(pickle.dumps([1, 2]))
    with pytest.raises(AdapterError, match=r"adapter_model.bin"):
        load_adapter(build_tiny_model("llama"), adapter)


def test_weights_that_match_no_module_are_an_error(adapter):
    saved = load_file(adapter / "adapter_model.safetensors")
    extra = {name.replace("layers.1", "layers.5"): t.clone() for name, t in saved.items() if "layers.1" in name}
    save_file({**saved, **extra}, adapter / "adapter_model.safetensors")
    with pytest.raises(AdapterError, match=r"no module for .*layers.5"):
        load_adapter(build_tiny_model("llama"), adapter)


@pytest.mark.parametrize(
    "changes", [{"num_hidden_layers": 1}, {"num_hidden_layers": 3}, {"hidden_size": 16, "head_dim": 4}]
)
def test_an_adapter_of_another_base_is_an_error(changes, adapter):
    with pytest.raises(AdapterError, match=r"does not fit LlamaForCausalLM|no module for"):
        load_adapter(build_tiny_model("llama", **changes), adapter)


def test_what_is_missing_is_named(tmp_path, adapter):
    with pytest.raises(AdapterError, match=r"found no adapter_config.json"):
        read_adapter_config(tmp_path)
    (adapter / "adapter_model.safetensors").unlink()
    with pytest.raises(AdapterError, match=r"no adapter_model.safetensors"):
        read_adapter_config(adapter)
    (adapter / "adapter_model.bin").touch()
    with pytest.raises(AdapterError, match=r"adapter_model.bin: is empty"):
        read_adapter_config(adapter)
    torch.save({}, adapter / "adapter_model.bin")
    (adapter / "adapter_config.json").write_text(json.dumps({"peft_type": "NEVERHEARD"}))
    with pytest.raises(AdapterError, match=r"adapter_config.json"):
        read_adapter_config(adapter)


# ── merging in memory ───────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("task", ["causal", "score"])
@pytest.mark.parametrize("family", [*FAMILIES, "gpt2", "phi3"])
def test_merged_logits_are_the_adapters(family, task, tmp_path):
    task_type = {"causal": "CAUSAL_LM", "score": "SEQ_CLS"}[task]
    wrapped = trained(build_tiny_model(family, task=task), task_type)
    wrapped.save_pretrained(tmp_path)
    base = build_tiny_model(family, task=task)
    without = logits(base)
    merged = merge_in_memory(base, tmp_path)
    assert not [name for name, _ in merged.named_modules() if "lora" in name]
    assert torch.allclose(logits(merged), logits(wrapped), atol=2e-4)
    assert (logits(merged) - without).abs().max() > 0.01
    assert not merged.training
    assert all(parameter.requires_grad for parameter in merged.parameters())


def test_a_16_bit_base_is_added_to_in_float32():
    model = build_tiny_model("llama").to(torch.bfloat16)
    before = model.model.layers[0].self_attn.q_proj.weight.detach().clone()
    wrapped = trained(model, lora_rank=4, lora_alpha=20)
    layer = wrapped.base_model.model.model.layers[0].self_attn.q_proj
    a, b = layer.lora_A.default.weight.detach().clone(), layer.lora_B.default.weight.detach().clone()
    merged = fold(wrapped).model.layers[0].self_attn.q_proj.weight
    assert torch.equal(merged, (before.float() + b @ a * (20 / 4)).to(torch.bfloat16))


def test_merging_keeps_train_mode(adapter):
    assert merge_in_memory(build_tiny_model("llama").train(), adapter).training


def test_a_quantized_base_is_not_merged_onto(adapter):
    model = build_tiny_model("llama")
    model.is_quantized = True
    with pytest.raises(AdapterError, match="load the base in 16 bit"):
        merge_in_memory(model, adapter)


def test_an_adapted_embedding_leaves_a_tied_head_alone():
    """Adapters made elsewhere may adapt the embedding of a tied model; the head beside them is the base's."""
    wrapped = get_peft_model(build_tiny_model("gemma"), LoraConfig(target_modules=["embed_tokens"]))
    nn.init.normal_(wrapped.base_model.model.model.embed_tokens.lora_embedding_B.default)
    expected = logits(wrapped.eval())
    merged = fold(wrapped)
    assert torch.allclose(logits(merged), expected, atol=1e-4)
    assert not merged.config.tie_word_embeddings
