"""Mixtures of experts: LoRA and QLoRA on attention alone and on experts, and ZeRO-3 over two processes."""

import json
import weakref
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

import inference
from stagewise.adapters.attach import attach_adapter, load_adapter
from stagewise.adapters.targets import choose_targets, linear_targets
from stagewise.artifacts.manifest import parameters_of
from stagewise.config.arguments import AdapterArguments, ModelArguments
from stagewise.config.stages import STAGES
from stagewise.errors import AdapterError, ModelError
from stagewise.models.loading import load_causal_lm
from stagewise.models.quantization.bnb import ExpertsConfig, ExpertsQuantizer
from tests.adapters.test_compatibility import base_of, logits, make, merge, needs_bitsandbytes, trained  # noqa: F401  (fixtures among them)
from tests.conftest import adapter_weights, build_tiny_model, build_tiny_tokenizer
from tests.launching import run, torchrun
from tests.models.test_router_loss import FAMILIES

ROOT = Path(__file__).resolve().parents[3]
ATTENTION = "q_proj,k_proj,v_proj,o_proj"
# What an adapter takes -> flags, and what its tensors' names then have.
TAKEN = {
    "attention": (f"--target_modules {ATTENTION}", {"self_attn"}),
    "experts": ("--target_modules gate_up_proj,down_proj", {"experts"}),
    "all": ("", {"self_attn", "experts"}),
}


@pytest.mark.parametrize(
    ("quantized", "taken"),
    [
        ("", "attention"),
        ("", "experts"),
        ("", "all"),
        pytest.param("--qlora True", "attention", marks=needs_bitsandbytes),
        pytest.param("--qlora True", "experts", marks=needs_bitsandbytes),
        pytest.param("--qlora True", "all", marks=needs_bitsandbytes),
        pytest.param("--load_in_4bit True", "all", marks=needs_bitsandbytes),
        pytest.param("--qlora True --quantize_experts False", "attention", marks=needs_bitsandbytes),
        pytest.param("--qlora True --quantize_experts False", "experts", marks=needs_bitsandbytes),
        pytest.param("--qlora True --quantize_experts False", "all", marks=needs_bitsandbytes),
        pytest.param("--load_in_8bit True", "attention", marks=needs_bitsandbytes),
        pytest.param("--load_in_8bit True", "experts", marks=needs_bitsandbytes),
    ],
)
def test_attention_alone_experts_alone_or_both(quantized, taken, trained, make):  # noqa: F811
    flags, parts = TAKEN[taken]
    words = make("sft", f"{quantized} {flags} --router_aux_loss True", family="mixtral")
    out, model = trained("sft", words)
    saved = adapter_weights(out)
    assert {part for name in saved for part in ("self_attn", "experts", "gate.") if part in name} == parts
    assert all(value.abs().max() > 0 for value in saved.values())  # B begins at 0
    again = load_adapter(base_of("sft", words) if "False" not in quantized else plain_experts(words), out)
    assert torch.allclose(logits(again), logits(model), atol=1e-4)
    merged = AutoModelForCausalLM.from_pretrained(merge(out)).eval()
    on_plain = load_adapter(AutoModelForCausalLM.from_pretrained(words[1]), out)
    assert torch.allclose(logits(merged), logits(on_plain), atol=5e-4)


def plain_experts(words: list[str]):
    """The base in 4 bit but for its experts."""
    return load_causal_lm(ModelArguments(words[1], qlora=True, quantize_experts=False), for_training=False)


# ── experts that are themselves in 4 bit ────────────────────────────────────────────────────────────────────────────

IDS = torch.tensor([[11, 12, 13, 14, 15, 16, 17], [18, 19, 20, 21, 22, 23, 24]])


def quantized(folder, **flags):
    return load_causal_lm(ModelArguments(str(folder), qlora=True, **flags), for_training=False)


def in_4_bit(weight: torch.Tensor) -> torch.Tensor:
    """What nf4 with double quantization makes of a weight."""
    from bitsandbytes import functional

    return functional.dequantize_4bit(*functional.quantize_4bit(weight, quant_type="nf4", compress_statistics=True))


def with_random_b(wrapped):
    """B begins at 0, where A has no gradient."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if ".lora_B." in name:
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    return wrapped


def named(wrapped) -> dict[tuple[str, str], torch.nn.Parameter]:
    """(path of the weight that LoRA changes, "A" or "B") -> LoRA's matrix."""
    found = {}
    for name, module in wrapped.base_model.model.named_modules():
        if hasattr(module, "lora_A"):
            path = ".".join(part for part in name.split(".") if part != "base_layer")
            path += f".{getattr(module, 'parameter_name', 'weight')}"
            found |= {(path, "A"): module.lora_A["default"].weight, (path, "B"): module.lora_B["default"].weight}
    return found


def written_out(weight: torch.Tensor, a: torch.Tensor, b: torch.Tensor, rank: int, scale: float, transposed: bool):
    """A weight in 4 bit with B·A·scale added, expert by expert; A: (experts · rank, in), B: (out, rank · experts)."""
    if weight.dim() == 2:
        return in_4_bit(weight) + scale * b @ a
    count, parts = len(weight), []
    for expert in range(count):
        rows, columns = a[expert * rank : (expert + 1) * rank], b[:, expert::count]
        change = scale * columns @ rows  # (out, in)
        parts.append(change.T if transposed else change)
    return in_4_bit(weight) + torch.stack(parts)


@needs_bitsandbytes
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_logits_and_gradients_are_those_of_the_weights_written_out(family, checkpointing, tiny_checkpoint):
    folder = tiny_checkpoint(family, **FAMILIES[family])
    args = AdapterArguments(lora_rank=3, lora_alpha=7, lora_dropout=0.0)
    wrapped = with_random_b(attach_adapter(quantized(folder), args, "CAUSAL_LM"))
    if checkpointing:
        wrapped.train().enable_input_require_grads()
        wrapped.gradient_checkpointing_enable({"use_reentrant": False})
    matrices = named(wrapped)
    assert {path.split(".")[-1] for path, _ in matrices} >= {"gate_up_proj", "down_proj", "weight"}
    found = wrapped(input_ids=IDS, use_cache=False).logits
    found.pow(2).mean().backward()

    plain = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).train(checkpointing)
    leaves = {key: value.detach().clone().requires_grad_() for key, value in matrices.items()}
    weights = {name: value.detach() for name, value in plain.named_parameters()}
    for path in {path for path, _ in leaves}:
        transposed = family == "gpt_oss" and "experts" in path  # its experts are (in, out)
        pair = leaves[path, "A"], leaves[path, "B"]
        weights[path] = written_out(weights[path], *pair, rank=3, scale=7 / 3, transposed=transposed)
    expected = torch.func.functional_call(plain, weights, (), {"input_ids": IDS, "use_cache": False}).logits
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    expected.pow(2).mean().backward()
    for key, leaf in leaves.items():
        assert leaf.grad.abs().max() > 0, key
        torch.testing.assert_close(matrices[key].grad, leaf.grad, rtol=2e-3, atol=1e-4)


@needs_bitsandbytes
@pytest.mark.parametrize("family", FAMILIES)
def test_an_adapter_fits_experts_in_4_bit_and_in_16_alike(family, tiny_checkpoint, tmp_path):
    """The same names, of the same shapes, for the same weights: each reads what the other wrote."""
    folder = tiny_checkpoint(family, **FAMILIES[family])
    args = AdapterArguments(lora_dropout=0.0)
    bases = {"four": quantized, "sixteen": lambda path: quantized(path, quantize_experts=False)}
    for name, base in bases.items():
        with_random_b(attach_adapter(base(folder), args, "CAUSAL_LM")).save_pretrained(tmp_path / name)
    four, sixteen = (adapter_weights(tmp_path / name) for name in bases)
    assert {n: v.shape for n, v in four.items()} == {n: v.shape for n, v in sixteen.items()}
    read = {name: named(load_adapter(base(folder), tmp_path / "four")) for name, base in bases.items()}
    assert read["four"].keys() == read["sixteen"].keys()
    for key, value in read["four"].items():
        assert torch.equal(value, read["sixteen"][key]), key


@needs_bitsandbytes
@pytest.mark.parametrize("stage_name", STAGES)
def test_every_stage_trains_experts_in_4_bit(stage_name, trained, make):  # noqa: F811
    words = make(stage_name, "--qlora True --gradient_checkpointing True", family="mixtral")
    out, model = trained(stage_name, words)
    moved = {n: v for n, v in adapter_weights(out).items() if "experts" in n and "lora_B" in n}
    assert len(moved) == 2 * 2 and all(value.abs().max() > 0 for value in moved.values())
    again = load_adapter(base_of(stage_name, words), out)
    assert torch.allclose(logits(again), logits(model), atol=1e-4)
    if stage_name != "rm":  # whose head is new each time
        with again.disable_adapter():  # DPO's and PPO's reference
            assert torch.allclose(logits(again), logits(base_of(stage_name, words)), atol=1e-5)
    merge(out)  # which compares the logits


@needs_bitsandbytes
def test_an_adapter_on_experts_speaks_in_4_bit_and_merged(trained, make, tmp_path):  # noqa: F811
    words = make("sft", "--qlora True", family="mixtral")
    out, _ = trained("sft", words)
    (tmp_path / "asked.jsonl").write_text('{"prompt": "drink water"}\n{"prompt": "rest"}\n')

    def answers(name: str, *flags) -> list[str]:
        files = ["--data_file", tmp_path / "asked.jsonl", "--output_file", tmp_path / name, "--max_new_tokens", 8]
        inference.main([str(word) for word in (*flags, *files, "--do_sample", "False")])
        return [json.loads(line)["response"] for line in (tmp_path / name).read_text().splitlines()]

    both = ("--base_model", words[1], "--lora_model", out)
    in_16 = answers("16.jsonl", *both)
    assert answers("merged.jsonl", "--base_model", merge(out)) == in_16
    in_4 = answers("4.jsonl", *both, "--load_in_4bit", "True")
    assert in_4 != answers("base.jsonl", "--base_model", words[1], "--load_in_4bit", "True")


@needs_bitsandbytes
def test_experts_in_4_bit_beside_16_bit_numbers(trained, make):  # noqa: F811
    """As on a GPU: weights in bfloat16, products under autocast."""
    words = make("sft", "--qlora True --torch_dtype bfloat16 --bf16 True", family="mixtral")
    out, model = trained("sft", words)
    experts = model.get_base_model().model.layers[0].mlp.experts.get_base_layer()
    assert experts.gate_up_proj.dtype == torch.bfloat16
    assert {value.dtype for value in adapter_weights(out).values()} == {torch.float32}
    args = ModelArguments(words[1], qlora=True, torch_dtype="bfloat16")
    again = load_adapter(load_causal_lm(args, for_training=False), out)
    assert torch.allclose(logits(again), logits(model), atol=0.1)
    merge(out)


@needs_bitsandbytes
def test_a_run_on_experts_in_4_bit_that_was_resumed_ends_with_the_same_weights(stage, make, tiny_checkpoint):  # noqa: F811
    flags = "--qlora True --gradient_checkpointing True"
    words = {"model": tiny_checkpoint("mixtral"), "max_steps": 4, "save_steps": 2}
    whole = stage("supervised_finetuning", *make("sft", flags, out="whole", **words))
    parts = stage("supervised_finetuning", *make("sft", flags, out="parts", **words))
    (parts / "checkpoint-4" / "whole.json").unlink()
    for name in ("run.json", "adapter_model.safetensors", "adapter_config.json"):
        (parts / name).unlink()
    stage("supervised_finetuning", *make("sft", flags, "--resume_from_checkpoint True", out="parts", **words))
    expected = adapter_weights(whole)
    assert [name for name in expected if "experts" in name]
    for name, value in adapter_weights(parts).items():
        torch.testing.assert_close(value, expected[name], rtol=1e-5, atol=1e-6)
    onward = make("sft", flags, f"--peft_path {whole}", out="onward", **words)
    again = adapter_weights(stage("supervised_finetuning", *onward))
    assert {n: v.shape for n, v in again.items()} == {n: v.shape for n, v in expected.items()}
    assert all(not torch.equal(value, expected[name]) for name, value in again.items())


@needs_bitsandbytes
def test_experts_in_4_bit_learn_alike_with_checkpointing_and_without(stage, make, tiny_checkpoint):  # noqa: F811
    words = {"model": tiny_checkpoint("mixtral"), "max_steps": 3, "lora_dropout": 0}
    both = {
        on: make("sft", f"--qlora True --gradient_checkpointing {on}", out=str(on), **words) for on in (True, False)
    }
    outs = [stage("supervised_finetuning", *each) for each in both.values()]
    found, expected = map(adapter_weights, outs)
    for name, value in found.items():
        torch.testing.assert_close(value, expected[name], rtol=1e-4, atol=1e-5)


@needs_bitsandbytes
@pytest.mark.distributed
@pytest.mark.timeout(600)
def test_two_processes_on_experts_in_4_bit_are_one_with_twice_the_batch(stage, make, tiny_checkpoint, tmp_path):  # noqa: F811
    descent = {"optim": "sgd", "learning_rate": 0.05, "lora_dropout": 0, "max_steps": 3}
    words = {"model": tiny_checkpoint("mixtral"), **descent}
    flags = "--qlora True --gradient_checkpointing True --packing False"
    one = stage("supervised_finetuning", *make("sft", flags, out="one", **words))
    both = make("sft", flags, out="two", **words | {"per_device_train_batch_size": 1})
    run(torchrun("supervised_finetuning", *both), timeout=300)
    expected = adapter_weights(one)
    found = adapter_weights(tmp_path / "two")
    assert found.keys() == expected.keys()
    for name, value in found.items():
        torch.testing.assert_close(value, expected[name], rtol=1e-4, atol=1e-5)


@needs_bitsandbytes
def test_experts_leave_16_bit_as_they_are_read(tiny_checkpoint, monkeypatch):
    """Else a model that fits in 4 bit would not load."""
    from stagewise.models.quantization import bnb

    pack, seen = bnb.pack, []

    def watched(weight, **options):
        assert not [each for each in seen if each() is not None]
        seen.append(weakref.ref(weight))
        return pack(weight, **options)

    monkeypatch.setattr(bnb, "pack", watched)
    folder = tiny_checkpoint("mixtral")
    model = quantized(folder)
    assert len(seen) == 2 * 2  # layers, parameters
    plain = AutoModelForCausalLM.from_pretrained(folder)
    for ours, own in zip(model.model.layers, plain.model.layers, strict=True):
        packed = dict(ours.mlp.experts.named_parameters())["gate_up_proj"]
        assert (packed.dtype, packed.shape) == (torch.uint8, (4, 128, 32 // 2))
        assert torch.equal(ours.mlp.experts.gate_up_proj, in_4_bit(own.mlp.experts.gate_up_proj.detach()))


@needs_bitsandbytes
def test_experts_in_4_bit_are_put_together_once_a_forward_pass_and_not_kept(tiny_checkpoint, monkeypatch):
    import bitsandbytes.functional as functional

    wrapped = attach_adapter(quantized(tiny_checkpoint("mixtral")), AdapterArguments(lora_dropout=0.0), "CAUSAL_LM")
    dequantize, seen = functional.dequantize_4bit, []

    def watched(packed, *args, **kwargs):
        weight = dequantize(packed, *args, **kwargs)
        if weight.dim() == 3:
            seen.append(weakref.ref(weight))
        return weight

    monkeypatch.setattr(functional, "dequantize_4bit", watched)
    wrapped.set_experts_implementation("eager")  # it reads a parameter for each expert
    wrapped.train().enable_input_require_grads()
    wrapped.gradient_checkpointing_enable({"use_reentrant": False})
    loss = wrapped(input_ids=IDS, use_cache=False).logits.pow(2).mean()
    assert len(seen) == 2 * 2
    assert not [each for each in seen if each() is not None]
    loss.backward()
    assert len(seen) == 2 * 2 * 2  # once more for the backward pass
    assert not [each for each in seen if each() is not None]


@needs_bitsandbytes
def test_experts_in_4_bit_follow_their_model_into_another_precision_and_place(tiny_checkpoint):
    """DeepSpeed casts it, and so does --bf16_full_eval."""
    wrapped = attach_adapter(quantized(tiny_checkpoint("mixtral")), AdapterArguments(lora_dropout=0.0), "CAUSAL_LM")
    experts = wrapped.get_base_model().model.layers[0].mlp.experts.get_base_layer()
    before = experts.gate_up_proj
    wrapped.to(torch.bfloat16)
    assert experts.gate_up_proj.dtype == torch.bfloat16
    torch.testing.assert_close(experts.gate_up_proj.float(), before, rtol=1e-2, atol=1e-3)
    with torch.no_grad():
        assert wrapped(input_ids=IDS).logits.isfinite().all()
    experts.to("meta")
    assert {state.absmax.device.type for state in experts.states.values()} == {"meta"}


@needs_bitsandbytes
def test_numbers_of_experts_in_4_bit_are_counted_and_not_their_bytes(tiny_checkpoint):
    folder = tiny_checkpoint("mixtral")
    assert parameters_of(quantized(folder))["all"] == AutoModelForCausalLM.from_pretrained(folder).num_parameters()


@needs_bitsandbytes
def test_experts_that_bitsandbytes_cannot_count_are_refused():
    model = torch.nn.Module()
    model.experts = torch.nn.Module()
    model.experts.gate_up_proj = torch.nn.Parameter(torch.empty(160, 3072, 5120, device="meta"))
    quantizer = ExpertsQuantizer(ExpertsConfig(load_in_4bit=True))
    with pytest.raises(ModelError, match="experts.gate_up_proj has 2,516,582,400 numbers, of which bitsandbytes"):
        quantizer._process_model_before_weight_loading(model, device_map=None)


@needs_bitsandbytes
def test_nothing_is_merged_into_experts_in_4_bit(tiny_checkpoint):
    args = AdapterArguments(target_modules="gate_up_proj,down_proj", lora_dropout=0.0)
    wrapped = attach_adapter(quantized(tiny_checkpoint("mixtral")), args, "CAUSAL_LM")
    with pytest.raises(AdapterError, match="is held in 4 bit, into which nothing is merged; load it in 16 bit"):
        wrapped.merge_and_unload()


@needs_bitsandbytes
def test_a_base_with_experts_in_4_bit_is_not_written_without_their_scales(tiny_checkpoint, tmp_path):
    with pytest.raises(ValueError, match="not serializable"):
        quantized(tiny_checkpoint("mixtral")).save_pretrained(tmp_path / "m")
    quantized(tiny_checkpoint("llama")).save_pretrained(tmp_path / "l")  # which has none


# ── routers ─────────────────────────────────────────────────────────────────────────────────────────────────────────


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
