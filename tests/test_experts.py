"""Mixtures of experts: LoRA and QLoRA on attention alone and on experts, and ZeRO-3 over two processes."""

import json
from pathlib import Path

import pytest
import torch
from conftest import adapter_weights, build_tiny_model, build_tiny_tokenizer
from launching import run, torchrun
from test_methods import base_of, logits, make, merge, needs_bitsandbytes, trained  # noqa: F401  (fixtures among them)
from test_router import FAMILIES
from transformers import AutoModelForCausalLM

from stagewise.adapter import load_adapter
from stagewise.arguments import AdapterArguments, ModelArguments
from stagewise.model import load_causal_lm
from stagewise.targets import AdapterError, choose_targets, linear_targets

ROOT = Path(__file__).resolve().parent.parent
ATTENTION = "q_proj,k_proj,v_proj,o_proj"
# What an adapter takes -> flags, and what its tensors' names then have.
TAKEN = {
    "attention": (f"--target_modules {ATTENTION}", {"self_attn"}),
    "experts": ("--target_modules gate_up_proj,down_proj", {"experts"}),
    "all": ("", {"self_attn", "experts"}),
}


@pytest.mark.parametrize(
    ("quantised", "taken"),
    [
        ("", "attention"),
        ("", "experts"),
        ("", "all"),
        pytest.param("--qlora True", "attention", marks=needs_bitsandbytes),
        pytest.param("--qlora True --quantize_experts False", "attention", marks=needs_bitsandbytes),
        pytest.param("--qlora True --quantize_experts False", "experts", marks=needs_bitsandbytes),
        pytest.param("--qlora True --quantize_experts False", "all", marks=needs_bitsandbytes),
        pytest.param("--load_in_8bit True", "attention", marks=needs_bitsandbytes),
        pytest.param("--load_in_8bit True", "experts", marks=needs_bitsandbytes),
    ],
)
def test_attention_alone_experts_alone_or_both(quantised, taken, trained, make):  # noqa: F811
    flags, parts = TAKEN[taken]
    words = make("sft", f"{quantised} {flags} --router_aux_loss True", family="mixtral")
    out, model = trained("sft", words)
    saved = adapter_weights(out)
    assert {part for name in saved for part in ("self_attn", "experts", "gate.") if part in name} == parts
    assert all(value.abs().max() > 0 for value in saved.values())  # B begins at 0
    again = load_adapter(base_of("sft", words) if "False" not in quantised else plain_experts(words), out)
    assert torch.allclose(logits(again), logits(model), atol=1e-4)
    merged = AutoModelForCausalLM.from_pretrained(merge(out)).eval()
    on_plain = load_adapter(AutoModelForCausalLM.from_pretrained(words[1]), out)
    assert torch.allclose(logits(merged), logits(on_plain), atol=5e-4)


def plain_experts(words: list[str]):
    """The base in 4 bit but for its experts."""
    return load_causal_lm(ModelArguments(words[1], qlora=True, quantize_experts=False), for_training=False)


def test_a_router_takes_no_adapter():
    """Phi's is a linear layer by its class."""
    model = build_tiny_model("phimoe", **FAMILIES["phimoe"])
    assert linear_targets(model) == ["k_proj", "o_proj", "q_proj", "v_proj"]
    with pytest.raises(AdapterError, match="--target_modules router: chooses experts and takes no adapter"):
        choose_targets(model, AdapterArguments(target_modules="q_proj,router"))


def test_a_router_that_is_trained_in_full_is_saved_with_the_adapter(trained, make):  # noqa: F811
    flags = f"--target_modules {ATTENTION} --modules_to_save gate --router_aux_loss True"
    out, model = trained("sft", make("sft", flags, family="mixtral"))
    saved = adapter_weights(out)
    assert [name for name in saved if name.endswith("gate.weight")]
    merged = AutoModelForCausalLM.from_pretrained(merge(out)).eval()
    assert torch.allclose(logits(merged), logits(model), atol=5e-4)
    base = AutoModelForCausalLM.from_pretrained(json.loads((out / "run.json").read_text())["base_model"])
    before, after = (each.model.layers[0].mlp.gate.weight for each in (base, merged))
    assert not torch.equal(before, after)


# ── DeepSpeed ───────────────────────────────────────────────────────────────────────────────────────────────────────

TRAINED = {
    "attention": f"--target_modules {ATTENTION} --lora_dropout 0",
    "all": "--lora_dropout 0",
    "full": "--use_peft False",
}
MANY = 96


def losses(folder: Path) -> list[float]:
    history = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    return [entry["loss"] for entry in history if "loss" in entry]


def test_two_records_go_to_different_experts():
    """Which is what the test below stands on: no process uses all of them, and not the same ones."""
    model, tokenizer, used = build_tiny_model("mixtral", num_local_experts=MANY), build_tiny_tokenizer(), []
    model.model.layers[0].mlp.gate.register_forward_hook(
        lambda module, args, output: used.append(set(output[2].flatten().tolist()))
    )
    for text in ("fever and water number 0", "fever and water number 1"):
        model(input_ids=torch.tensor([tokenizer.encode(text)]))
    assert used[0] != used[1]
    assert len(used[0] | used[1]) < MANY


@pytest.mark.distributed
@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    ("family", "what", "router"),
    [("mixtral", what, router) for what in TRAINED for router in (False, True)]
    + [(family, "all", False) for family in FAMILIES if family != "mixtral"],
)
def test_zero3_trains_experts_that_only_one_process_uses(
    family,
    what,
    router,
    stage,
    make,  # noqa: F811
    tiny_checkpoint,
    tmp_path,
):
    changes = {k: MANY if k in ("num_local_experts", "num_experts") else v for k, v in FAMILIES[family].items()}
    words = {"model": tiny_checkpoint(family, **changes), "max_steps": 3, "logging_steps": 1, "learning_rate": 1e-3}
    flags = f"{TRAINED[what]} --packing False"  # families are packed by a probe, which ZeRO-3's parts do not allow
    flags += " --router_aux_loss True --router_aux_loss_coef 0.5" if router else ""
    one = stage("pretraining", *make("pt", flags, out="one", **words))
    both = words | {"per_device_train_batch_size": 1, "deepspeed": ROOT / "zero3.json"}
    run(torchrun("pretraining", *make("pt", flags, out="two", **both)), timeout=300)
    # the routers' loss of two halves is not quite that of the whole
    assert losses(tmp_path / "two") == pytest.approx(losses(one), rel=0.05 if router else 1e-4)
    found, expected = adapter_weights(tmp_path / "two"), adapter_weights(one)
    assert found.keys() == expected.keys()
    for name, value in found.items():
        assert value.shape == expected[name].shape, name
