"""Every training method on every stage through the command line: train, save, load, merge; or refused by name."""

import importlib
import importlib.util
import json
import re
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from loguru import logger
from peft import AdaLoraConfig, get_peft_model
from peft.optimizers import create_loraplus_optimizer
from peft.tuners.lora import LoraLayer
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

import merge_peft_adapter
from stagewise.adapters.adalora import add_orthogonality
from stagewise.adapters.attach import attach_adapter, load_adapter, use_loraplus
from stagewise.config.arguments import AdapterArguments, ModelArguments
from stagewise.errors import ArgumentError
from stagewise.inference.sampling import adapters_folded
from stagewise.models.loading import load_causal_lm, load_reward_model
from stagewise.models.tokenizer import load_tokenizer
from stagewise.training.run import Run
from tests.conftest import adapter_weights, build_tiny_model
from tests.pair_runs import both_agree, flags_of
from tests.pair_runs import records as pair_records

ROOT = Path(__file__).resolve().parents[2]
ROW = torch.tensor([[11, 12, 13, 14, 15, 16, 17]])
STAGES = ("pt", "sft", "rm", "dpo", "ppo")  # the columns of docs/methods.md
SCRIPTS = {
    "pt": "pretraining",
    "sft": "supervised_finetuning",
    "rm": "reward_modeling",
    "dpo": "dpo_training",
    "ppo": "ppo_training",
}
needs_bitsandbytes = pytest.mark.skipif(
    importlib.util.find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed"
)
ADALORA = "--fine_tuning_type adalora --init_r 4 --target_r 2"
# What stands in the first column of the table in docs/methods.md -> words that make a two-step run of it.
METHODS = {
    "full": "--fine_tuning_type full",
    "LoRA": "",
    "rsLoRA": "--use_rslora True",
    "DoRA": "--use_dora True",
    "PiSSA": "--init_lora_weights pissa --lora_rank 4",
    "LoRA+": "--loraplus_lr_ratio 16",
    "AdaLoRA": ADALORA,
    "LoRA, 8 bit": "--load_in_8bit True",
    "LoRA, 4 bit": "--load_in_4bit True",
    "QLoRA": "--qlora True",
    "QLoRA with AdaLoRA": f"--qlora True {ADALORA}",
    "prompt tuning": "--fine_tuning_type prompt_tuning --num_virtual_tokens 4",
    "P-tuning": "--fine_tuning_type p_tuning --num_virtual_tokens 4",
    "prefix tuning": "--fine_tuning_type prefix_tuning --num_virtual_tokens 4",
}
VIRTUAL = ("prompt tuning", "P-tuning", "prefix tuning")
QUANTIZED = ("LoRA, 8 bit", "LoRA, 4 bit", "QLoRA", "QLoRA with AdaLoRA")


def works(method: str, stage: str) -> bool:
    """The table, written out once more."""
    if method in VIRTUAL:
        return stage in ("pt", "sft", "dpo")
    return not (method == "PiSSA" and stage in ("dpo", "ppo"))


def cells(wanted: bool):
    return [
        pytest.param(method, stage, marks=needs_bitsandbytes if method in QUANTIZED else ())
        for method in METHODS
        for stage in STAGES
        if works(method, stage) is wanted
    ]


@pytest.fixture
def log():
    """The lines that were logged."""
    lines: list[str] = []
    sink = logger.add(lambda message: lines.append(message.record["message"]))
    yield lines
    if sink in logger._core.handlers:  # a stage's start sets logging up anew
        logger.remove(sink)


@pytest.fixture
def make(tmp_path, tiny_checkpoint):
    """make(stage, out, family, flags …): the words of a two-step run on a tiny model."""

    def words(stage: str, *more: str, family="llama", out="out", model=None, **changes) -> list[str]:
        train = tmp_path / f"train-{stage}"
        train.mkdir(exist_ok=True)
        if stage == "pt":
            lines = [{"text": f"fever and water number {n}"} for n in range(8)]
        elif stage in ("rm", "dpo"):
            lines = pair_records(0, 6)
        else:
            turns = [("human", "what about fever"), ("gpt", "drink water and rest")]
            lines = [
                {"conversations": [{"from": who, "value": f"{text} {n}"} for who, text in turns]} for n in range(8)
            ]
        (train / "a.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        values = {
            "model_name_or_path": model or tiny_checkpoint(family),
            "train_file_dir": train,
            "output_dir": tmp_path / out,
            "per_device_train_batch_size": 2,
            "max_steps": 2,
            "learning_rate": 1e-2,
            "report_to": "none",
            **changes,
        }
        if stage == "pt":
            values["block_size"] = 64
        elif stage == "sft":
            values["model_max_length"] = 400
        else:
            values["max_source_length"] = 400
        if stage == "ppo":
            values |= {"reward_model_name_or_path": tiny_checkpoint("llama", task="score"), "max_target_length": 6}
            values |= {"batch_size": 2, "ppo_epochs": 2}
        flat = [str(word) for name, value in values.items() if value is not None for word in (f"--{name}", value)]
        return [*flat, *(word for words in more for word in words.split())]

    return words


@pytest.fixture
def trained(stage, monkeypatch):
    """trained(name, words) runs a stage and returns its folder and the model as it stood at the end."""
    held = {}
    run_train = Run.train

    def train(self, trainer, stop):
        run_train(self, trainer, stop)
        held["model"] = trainer.accelerator.unwrap_model(trainer.model).eval()

    monkeypatch.setattr(Run, "train", train)

    def run(name: str, words: list[str]):
        return stage(SCRIPTS[name], *words), held["model"]

    return run


@torch.no_grad()
def logits(model) -> torch.Tensor:
    device = model.get_input_embeddings().weight.device
    ids = ROW.to(device)
    found = model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).logits.float()
    return found if found.dim() == 2 else found[:, -ROW.shape[1] :]  # without those of virtual tokens


def base_of(stage: str, words: list[str]):
    """The base again, quantized as the flags say."""
    flags = {name: f"--{name}" in words for name in ("load_in_4bit", "load_in_8bit", "qlora")}
    args = ModelArguments(words[words.index("--model_name_or_path") + 1], **flags)
    if stage == "rm":
        return load_reward_model(args, load_tokenizer(args), for_training=False)
    return load_causal_lm(args, for_training=False)


def merge(out: Path, *words) -> Path:
    target = out.parent / "merged"
    merge_peft_adapter.main(["--lora_model", str(out), "--output_dir", str(target), *map(str, words)])
    return target


# ── every cell ──────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(("method", "stage_name"), cells(True))
def test_two_steps_saved_and_loaded_again_and_merged(method, stage_name, trained, make):
    words = make(stage_name, METHODS[method])
    out, model = trained(stage_name, words)
    found = logits(model)
    auto = AutoModelForSequenceClassification if stage_name == "rm" else AutoModelForCausalLM
    if method == "full":
        assert torch.allclose(logits(auto.from_pretrained(out).eval()), found, atol=1e-5)
        return
    again = load_adapter(base_of(stage_name, words), out)
    assert torch.allclose(logits(again), found, atol=1e-4)
    with again.disable_adapter():
        assert (logits(again) - found).abs().max() > 1e-3
    if method in VIRTUAL:
        with pytest.raises(ArgumentError, match="cannot be merged; load it with PEFT"):
            merge(out)
        return
    merged = auto.from_pretrained(merge(out)).eval()  # it has compared base + adapter with what it wrote
    plain = load_adapter(base_of(stage_name, words[:2]), out) if method in QUANTIZED else again
    assert torch.allclose(logits(merged), logits(plain), atol=5e-4)


@pytest.mark.parametrize(("method", "stage_name"), cells(False))
def test_a_cell_that_cannot_work_is_refused_before_weights_load(method, stage_name, stage, make, monkeypatch, capsys):
    for module in map(importlib.import_module, SCRIPTS.values()):
        for name in ("load_causal_lm", "load_reward_model", "load_tokenizer"):
            monkeypatch.setattr(module, name, None, raising=False)
    with pytest.raises(SystemExit) as ended:
        stage(SCRIPTS[stage_name], *make(stage_name, METHODS[method]))
    assert ended.value.code == 2
    error = capsys.readouterr().err
    assert METHODS[method].split()[1] in error
    assert "--fine_tuning_type lora" in error or "leave it out" in error


def test_the_table_of_the_documents_is_what_the_code_does():
    for name in ("methods.md", "methods_zh.md"):
        rows = [
            [cell.strip() for cell in line.strip("|\n").split("|")]
            for line in (ROOT / "docs" / name).read_text(encoding="utf-8").splitlines()
            if line.startswith("|")
        ]
        header = next(row for row in rows if row[1:6] == ["PT", "SFT", "RM", "DPO", "PPO"])
        table = {row[0]: row[1:] for row in rows[rows.index(header) + 2 :][: len(METHODS)]}
        assert list(table) == list(METHODS), name
        for method, marks in table.items():
            assert [mark == "✓" for mark in marks[:5]] == [works(method, stage) for stage in STAGES], (name, method)
            assert (marks[6] == "✓") is (method not in VIRTUAL and method != "full"), (name, method)
            shown = set(re.findall(r"--(\w+)", marks[5]))
            assert shown == set(re.findall(r"--(\w+)", METHODS[method])) - {"init_r", "target_r", "lora_rank"} - (
                {"num_virtual_tokens"} if method in VIRTUAL else set()
            ), (name, method)


# ── AdaLoRA ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_ranks_fall_to_the_budget_and_stay_there(trained, make):
    words = make(
        "sft", "--fine_tuning_type adalora --init_r 6 --target_r 2 --tinit 2 --tfinal 3 --deltaT 2", max_steps=12
    )
    out, _ = trained("sft", words)
    config = json.loads((out / "adapter_config.json").read_text())
    left = [sum(pattern) for pattern in config["rank_pattern"].values()]
    assert len(left) == 14  # 7 layers in 2 blocks
    assert sum(left) <= 14 * 2 < 14 * 6
    assert max(left) > min(left)  # a budget, not a rank
    assert config["total_step"] == 12
    saved = adapter_weights(out)
    shapes = {name.split(".lora_A")[0]: value.shape[0] for name, value in saved.items() if ".lora_A" in name}
    assert sorted(shapes.values()) == sorted(left)
    # checkpoints hold every rank: one that was taken away may come back
    assert {v.shape[0] for k, v in adapter_weights(out / "checkpoint-12").items() if ".lora_A" in k} == {6}


def test_adalora_without_a_schedule_would_keep_every_rank(make, trained, monkeypatch):
    """What the test above would see if nothing drove the schedule."""
    monkeypatch.setattr("stagewise.adapters.adalora.AdaptiveRanks.on_optimizer_step", lambda *args, **kwargs: None)
    out, _ = trained("sft", make("sft", "--fine_tuning_type adalora --init_r 6 --target_r 2", max_steps=4))
    assert json.loads((out / "adapter_config.json").read_text())["rank_pattern"] is None


def test_the_budget_follows_the_papers_cube():
    """budget = target + (init - target) (1 - (t - tinit) / (T - tinit - tfinal))³, kept at both ends."""
    flags = {"fine_tuning_type": "adalora", "init_r": 6, "target_r": 2, "tinit": 2, "tfinal": 4}
    wrapped = attach_adapter(build_tiny_model("llama"), AdapterArguments(**flags), "CAUSAL_LM")
    wrapped.peft_config["default"].total_step = 14
    schedule = [wrapped.base_model.rankallocator.budget_schedule(step)[0] for step in range(1, 15)]
    middle = [int(28 + 56 * (1 - (t - 2) / 8) ** 3) for t in range(3, 11)]
    assert schedule == [84, 84, *middle, 28, 28, 28, 28]


def test_orthogonality_is_that_of_peft():
    config = AdaLoraConfig(
        task_type="CAUSAL_LM", init_r=4, target_r=2, total_step=9, target_modules=["q_proj"], orth_reg_weight=0.3
    )
    torch.manual_seed(0)
    wrapped = get_peft_model(build_tiny_model("llama"), config)
    output = wrapped(input_ids=ROW, labels=ROW)
    bare = wrapped.base_model.model(input_ids=ROW, labels=ROW)
    (output.loss - bare.loss).backward()
    expected = {name: p.grad.clone() for name, p in wrapped.named_parameters() if p.grad is not None}
    wrapped.zero_grad()
    term = add_orthogonality(wrapped, 0.3)
    assert term.item() == pytest.approx((output.loss - bare.loss).item(), rel=1e-5)
    for name, parameter in wrapped.named_parameters():
        if parameter.grad is not None:
            torch.testing.assert_close(parameter.grad, expected[name], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("words", ["--max_steps 5 --tinit 3 --tfinal 2", "--max_steps 3 --tinit 3"])
def test_a_run_too_short_for_the_schedule_is_refused(words, stage, make, capsys):
    with pytest.raises(SystemExit):
        stage("supervised_finetuning", *make("sft", ADALORA, words, max_steps=None))
    assert "lower them, or train longer" in capsys.readouterr().err


def test_a_run_whose_epochs_are_too_short_is_refused_too(stage, make, capsys):
    words = make("sft", ADALORA, "--num_train_epochs 1 --tinit 40", max_steps=None)
    with pytest.raises(SystemExit):
        stage("supervised_finetuning", *words)
    assert "lower them, or train longer" in capsys.readouterr().err


def test_on_a_16_bit_base_what_adalora_divides_by_stays_the_rank(trained, make):
    """PEFT casts that number with the base's precision, by which it becomes a trained one that is never saved."""
    words = make("sft", ADALORA, torch_dtype="bfloat16", max_steps=4, save_steps=2)
    out, first = trained("sft", words)
    (out / "checkpoint-4" / "whole.json").unlink()
    (out / "run.json").unlink()
    _, resumed = trained("sft", [*words, "--resume_from_checkpoint", "True"])
    going_on = load_causal_lm(ModelArguments(words[1], torch_dtype="bfloat16"))
    going_on = attach_adapter(going_on, AdapterArguments(peft_path=str(out)), "CAUSAL_LM")
    for model in (first, resumed, going_on):
        divisors = [p for name, p in model.named_parameters() if ".ranknum." in name]
        assert len(divisors) == 14
        assert not any(p.requires_grad for p in divisors)
        assert {p.item() for p in divisors} == {4.0}


# ── resume, and continuing from an adapter ───────────────────────────────────────────────────────────────────────────

RESUMED = {
    "AdaLoRA": "--fine_tuning_type adalora --init_r 6 --target_r 2 --tinit 1 --tfinal 1",
    "prompt tuning": METHODS["prompt tuning"],
    "P-tuning": METHODS["P-tuning"],
    "prefix tuning": METHODS["prefix tuning"],
    "prefix tuning, projected": "--fine_tuning_type prefix_tuning --prefix_projection True --num_virtual_tokens 4",
    "LoRA+": METHODS["LoRA+"],
    "DoRA": METHODS["DoRA"],
    "PiSSA": METHODS["PiSSA"],
}


@pytest.mark.parametrize("method", RESUMED)
def test_a_stopped_and_resumed_run_ends_with_the_same_weights(method, stage, make, tiny_checkpoint):
    words = {"model": tiny_checkpoint("llama"), "max_steps": 6, "save_steps": 3}
    whole = stage("supervised_finetuning", *make("sft", RESUMED[method], out="whole", **words))
    parts = stage("supervised_finetuning", *make("sft", RESUMED[method], out="parts", **words))
    (parts / "checkpoint-6" / "whole.json").unlink()
    for name in ("run.json", "adapter_model.safetensors", "adapter_config.json"):
        (parts / name).unlink()
    resumed = make("sft", RESUMED[method], "--resume_from_checkpoint True", out="parts", **words)
    stage("supervised_finetuning", *resumed)
    expected = adapter_weights(whole)
    for name, value in adapter_weights(parts).items():
        torch.testing.assert_close(value, expected[name], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("method", ["LoRA", "rsLoRA", "DoRA", "PiSSA", "AdaLoRA", *VIRTUAL])
def test_peft_path_goes_on_with_what_the_adapter_is(method, trained, make, tiny_checkpoint):
    model = tiny_checkpoint("llama")
    first, live = trained("sft", make("sft", METHODS[method], model=model, out="first", max_steps=4))
    expected = logits(live)
    begun = attach_adapter(
        AutoModelForCausalLM.from_pretrained(model), AdapterArguments(peft_path=str(first)), "CAUSAL_LM"
    )
    assert torch.allclose(logits(begun.eval()), expected, atol=1e-4)
    words = make("sft", f"--peft_path {first}", model=model, out="second", learning_rate=1e-2)
    second, live = trained("sft", words)
    assert (logits(live) - expected).abs().max() > 1e-3
    assert torch.allclose(logits(load_adapter(base_of("sft", words), second)), logits(live), atol=1e-4)
    configs = [json.loads((folder / "adapter_config.json").read_text()) for folder in (first, second)]
    assert configs[0]["peft_type"] == configs[1]["peft_type"]
    if method == "AdaLoRA":  # the ranks that it has, and no others
        before, after = configs[0]["rank_pattern"], configs[1]["rank_pattern"]
        assert all(
            not later or earlier for name in before for earlier, later in zip(before[name], after[name], strict=True)
        )


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--lora_rank 8", "--lora_rank 8: the adapter of --peft_path has 4"),
        ("--fine_tuning_type adalora", "the adapter of --peft_path is of lora"),
        ("--num_virtual_tokens 20", "--num_virtual_tokens has no effect on lora"),
        ("--target_modules all", "--target_modules all: the adapter of --peft_path has"),
    ],
)
def test_a_flag_against_the_adapter_is_an_error_also_with_its_default(words, message, stage, make, capsys):
    out = stage("supervised_finetuning", *make("sft", "--lora_rank 4 --target_modules q_proj,v_proj", out="first"))
    with pytest.raises(SystemExit):
        stage("supervised_finetuning", *make("sft", f"--peft_path {out}", words))
    assert message in capsys.readouterr().err


def test_two_processes_are_one_with_both_batches(stage, tmp_path, tiny_checkpoint):
    """The importance of ranks, the term of orthogonality and the choice itself are those of the whole batch."""
    words = ["--fine_tuning_type", "adalora", "--init_r", "4", "--target_r", "2"]

    def flags(out, **changes):
        return [*flags_of(tmp_path, out=out, **changes), *words]

    both_agree("dpo_training", stage, flags, tiny_checkpoint("llama"))


# ── what else each method promises ──────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("method", VIRTUAL)
def test_virtual_tokens_are_never_packed_and_generate(method, trained, make, log):
    out, _ = trained("sft", make("sft", METHODS[method], family="llama"))
    rows = json.loads((out / "run.json").read_text())["rows"]
    assert rows.startswith("padded") and "virtual tokens" in rows
    model = load_adapter(base_of("sft", make("sft")), out)
    answer = model.generate(input_ids=ROW, attention_mask=torch.ones_like(ROW), max_new_tokens=5, do_sample=False)
    ids = ROW
    for _ in range(5):  # the same, without a cache
        with torch.no_grad():
            step = model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).logits[:, -1:].argmax(-1)
        ids = torch.cat([ids, step], dim=1)
    assert answer.tolist() == ids.tolist()


def test_loraplus_groups_are_those_of_peft():
    class Held:
        """What `use_loraplus` reads of a trainer."""

    wrapped = attach_adapter(build_tiny_model("llama"), AdapterArguments(), "CAUSAL_LM")
    trainer = Held()
    trainer.model, trainer.args = wrapped, Held()
    trainer.args.weight_decay = 0.1
    trainer.get_optimizer_cls_and_kwargs = lambda args, model: (torch.optim.AdamW, {"lr": 1e-3, "eps": 1e-7})
    trainer.get_decay_parameter_names = lambda model: [name for name, p in model.named_parameters() if p.ndim > 1]
    use_loraplus(trainer, 16)
    oracle = create_loraplus_optimizer(
        wrapped, torch.optim.AdamW, lr=1e-3, loraplus_lr_ratio=16, loraplus_weight_decay=0.1, eps=1e-7
    )

    def by_parameter(optimizer):
        return {id(p): (g["lr"], g["weight_decay"], g["eps"]) for g in optimizer.param_groups for p in g["params"]}

    assert by_parameter(trainer.optimizer) == by_parameter(oracle)


@pytest.mark.parametrize("method", ["LoRA", "DoRA", "PiSSA", "AdaLoRA", *VIRTUAL])
def test_on_a_16_bit_base_the_adapter_is_in_float32(method, trained, make):
    words = make("sft", METHODS[method], torch_dtype="bfloat16")
    out, model = trained("sft", words)
    kinds = {p.dtype for p in model.parameters() if p.requires_grad}
    assert kinds == {torch.float32}
    args = ModelArguments(words[1], torch_dtype="bfloat16")
    again = load_adapter(load_causal_lm(args, for_training=False), out)
    assert again.get_input_embeddings().weight.dtype == torch.bfloat16
    assert torch.allclose(logits(again), logits(model), atol=0.05)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    "method", [pytest.param(m, marks=needs_bitsandbytes if m in QUANTIZED else ()) for m in METHODS if m != "full"]
)
def test_mixed_precision_and_gradient_checkpointing(method, dtype, trained, make):
    words = make("sft", METHODS[method], "--bf16 True", torch_dtype=dtype)
    if method != "prefix tuning":
        words += ["--gradient_checkpointing", "True"]
    out, _ = trained("sft", words)
    losses = [entry["loss"] for entry in json.loads((out / "trainer_state.json").read_text())["log_history"][:1]]
    assert losses and 0 < losses[0] < 100


@pytest.mark.parametrize(
    ("method", "folds"),
    [("LoRA", True), ("rsLoRA", True), ("PiSSA", True), ("AdaLoRA", True), ("DoRA", False), ("QLoRA", False)],
)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@needs_bitsandbytes
def test_what_speaks_in_ppo_is_the_adapted_model(method, folds, dtype, make):
    """Folded into the weights where that is exact; and everything is put back as it was."""
    words = make("ppo", METHODS[method])
    args = ModelArguments(words[1], qlora="--qlora" in words, torch_dtype=dtype)
    flags = dict(zip(METHODS[method].split()[::2], METHODS[method].split()[1::2], strict=True))
    known = {"--use_rslora": "use_rslora", "--use_dora": "use_dora"}
    chosen = {known[name]: True for name in flags if name in known}
    if method == "PiSSA":
        chosen["init_lora_weights"] = "pissa"
    if method == "AdaLoRA":
        chosen |= {"fine_tuning_type": "adalora", "init_r": 4, "target_r": 2}
    model = attach_adapter(load_causal_lm(args, for_training=False), AdapterArguments(**chosen), "CAUSAL_LM").eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    before, expected = {name: id(p) for name, p in model.named_parameters()}, logits(model)
    layer = next(module for module in model.modules() if isinstance(module, LoraLayer))
    with adapters_folded(model):
        assert layer.disable_adapters is folds
        tolerance = 1e-4 if dtype == "float32" else 0.05 * float(expected.abs().max())
        assert torch.allclose(logits(model), expected, atol=tolerance)
    assert {name: id(p) for name, p in model.named_parameters()} == before
    assert torch.equal(logits(model), expected)


@pytest.mark.parametrize("method", ["QLoRA", "LoRA, 4 bit", "LoRA, 8 bit"])
@needs_bitsandbytes
def test_what_is_quantized_is_as_the_flag_says(method, make):
    import bitsandbytes

    model = base_of("sft", make("sft", METHODS[method]))
    layer, head = model.model.layers[0].self_attn.q_proj, model.lm_head
    assert type(head) is torch.nn.Linear
    if method == "LoRA, 8 bit":
        assert isinstance(layer, bitsandbytes.nn.Linear8bitLt)
        return
    assert isinstance(layer, bitsandbytes.nn.Linear4bit)
    assert layer.weight.quant_type == "nf4"
    assert layer.weight.quant_state.nested is (method == "QLoRA")
    assert layer.support_avx512bf16_for_cpu is False


@needs_bitsandbytes
def test_dora_on_8_bit_is_dora_on_what_the_8_bits_stand_for(trained, make):
    words = make("sft", "--load_in_8bit True --use_dora True")
    out, model = trained("sft", words)
    plain = load_causal_lm(ModelArguments(words[1]), for_training=False)
    eight = base_of("sft", words)
    for name, layer in eight.named_modules():
        if type(layer).__name__ == "Linear8bitLt":
            scales = layer.weight.SCB[:, None] / 127
            plain.get_submodule(name).weight.data = layer.weight.data.float() * scales
    expected, found = logits(load_adapter(plain, out)), logits(model)
    # outside of training bitsandbytes rounds the inputs to 8 bit, too
    assert (found - expected).abs().mean() < 0.05 * expected.std()
    again = load_adapter(eight, out)
    for _ in range(2):  # the second pass is the one that lost the scales
        assert torch.allclose(logits(again), found, atol=1e-4)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--qlora --fine_tuning_type full", "--qlora: quantized weights cannot be trained"),
        ("--load_in_8bit --use_peft False", "--load_in_8bit: quantized weights cannot be trained"),
        ("--load_in_4bit --load_in_8bit", "a base has 4 bit or 8 bit"),
        ("--qlora --init_lora_weights pissa", "which are quantized; leave one of the two out"),
        ("--fine_tuning_type prefix_tuning --gradient_checkpointing", "--gradient_checkpointing drops the keys"),
        ("--optim paged_adamw_32bit", "paged optimizers need a GPU"),
        ("--fine_tuning_type adalora --lora_rank 4", "--init_r and --target_r are its ranks"),
        ("--fine_tuning_type adalora --init_r 4 --target_r 4", "for a fixed rank take --fine_tuning_type lora"),
        ("--fine_tuning_type adalora --use_dora", "--use_dora has no effect on adalora"),
        ("--init_r 12", "--init_r has no effect on lora"),
        ("--quantize_experts False", "--quantize_experts False has no effect without --qlora"),
        ("--fine_tuning_type p_tuning --modules_to_save lm_head", "--modules_to_save has no effect on p_tuning"),
        ("--fine_tuning_type full --lora_rank 8", "--lora_rank belongs to an adapter"),
        ("--use_peft False --fine_tuning_type adalora", "--use_peft False trains all weights"),
        ("--use_peft True --fine_tuning_type full", "give one of them"),
        ("--loraplus_lr_ratio 0.5", "--loraplus_lr_ratio: expected at least 1"),
        ("--init_lora_weights eva", "--init_lora_weights: expected one of default, gaussian, pissa"),
        ("--fine_tuning_type prefix_tuning --encoder_hidden_size 8", "no effect without --prefix_projection"),
        ("--fine_tuning_type ia3", "expected one of full, lora, adalora"),
        ("--quantization cpm", "by bitsandbytes alone"),
    ],
)
def test_what_cannot_work_is_refused_with_the_way_out(words, message, make, monkeypatch, capsys):
    module = importlib.import_module("supervised_finetuning")
    monkeypatch.setattr(module, "load_tokenizer", None)
    monkeypatch.setattr(sys, "argv", ["supervised_finetuning.py", *make("sft", words)])
    with pytest.raises((SystemExit, ArgumentError)) as ended:
        module.main()
    assert message in capsys.readouterr().err + str(ended.value)


def test_an_adapter_that_began_with_pissa_is_no_start_of_dpo(stage, make, capsys):
    out = stage("dpo_training", *make("dpo", out="first"))
    path = out / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"init_lora_weights": "pissa"}))
    with pytest.raises(SystemExit):
        stage("dpo_training", *make("dpo", f"--peft_path {out}"))
    assert "pissa: takes directions out of the base" in capsys.readouterr().err


def test_a_predecessor_is_not_merged_into_quantized_weights(stage, make, capsys):
    out = stage("supervised_finetuning", *make("sft", out="first"))
    with pytest.raises(SystemExit):
        stage("dpo_training", *make("dpo", f"--qlora True --checkpoint_dir {out}"))
    assert "merge it first: python merge_peft_adapter.py" in capsys.readouterr().err


def test_the_bits_of_earlier_pipelines(stage, make):
    words = make("sft", "--quantization bnb --quantization_bit 4")
    run = json.loads((stage("supervised_finetuning", *words) / "run.json").read_text())
    assert run["flags"]["load_in_4bit"] is True


@pytest.mark.parametrize("family", ["qwen3", "gemma", "bloom", "falcon", "gpt2", "mixtral", "qwen3_5"])
@pytest.mark.parametrize("method", ["AdaLoRA", "DoRA", "PiSSA", "prompt tuning", "P-tuning", "prefix tuning"])
def test_other_families(family, method, trained, make, capsys):
    words = make("sft", METHODS[method], family=family)
    if (family, method) == ("qwen3_5", "prefix tuning"):  # its linear attention has no keys to put a prefix among
        with pytest.raises(SystemExit):
            trained("sft", words)
        assert "--fine_tuning_type prefix_tuning: Qwen3_5ForCausalLM cannot take it" in capsys.readouterr().err
        return
    out, model = trained("sft", words)
    again = load_adapter(base_of("sft", words), out)
    assert torch.allclose(logits(again), logits(model), atol=1e-4)
    if method not in VIRTUAL:
        merge(out)


@pytest.mark.parametrize(("family", "names"), [("gemma", "embed_tokens,lm_head"), ("gpt2", "wte")])
@pytest.mark.parametrize("method", ["AdaLoRA", "DoRA", pytest.param("QLoRA", marks=needs_bitsandbytes)])
def test_tied_embeddings_that_are_trained_stay_tied(family, names, method, trained, make):
    words = make("sft", METHODS[method], family=family, modules_to_save=names)
    out, model = trained("sft", words)
    base = model.get_base_model()
    assert base.get_output_embeddings().weight is base.get_input_embeddings().weight
    again = load_adapter(base_of("sft", words), out)
    assert torch.allclose(logits(again), logits(model), atol=1e-4)
    merged = AutoModelForCausalLM.from_pretrained(merge(out))
    assert merged.get_output_embeddings().weight is merged.get_input_embeddings().weight
    assert merged.config.tie_word_embeddings


@pytest.mark.parametrize("words", ["", "--use_rslora True", "--target_modules gate_up_proj", "--lora_dropout 0"])
def test_experts_held_as_one_parameter_are_trained_and_merged(words, trained, make):
    out, model = trained("sft", make("sft", words, family="mixtral"))
    moved = [v for name, v in adapter_weights(out).items() if "experts" in name and "lora_B" in name]
    assert moved and all(value.abs().max() > 0 for value in moved)
    merged = AutoModelForCausalLM.from_pretrained(merge(out)).eval()
    assert torch.allclose(logits(merged), logits(model), atol=5e-4)
    begun = AutoModelForCausalLM.from_pretrained(json.loads((out / "run.json").read_text())["base_model"])
    begun = attach_adapter(begun, AdapterArguments(peft_path=str(out)), "CAUSAL_LM").eval()
    assert torch.allclose(logits(begun), logits(model), atol=1e-4)


@needs_bitsandbytes
def test_experts_that_stay_in_16_bit_are_adapted(trained, make):
    out, _ = trained("sft", make("sft", "--qlora True --quantize_experts False", family="mixtral"))
    moved = [v for name, v in adapter_weights(out).items() if "experts" in name and "lora_B" in name]
    assert moved and all(value.abs().max() > 0 for value in moved)
    merge(out)


def test_a_reward_model_of_a_quantized_run_is_not_quantized(make, stage):
    """Its scores are what PPO learns from."""
    import stagewise.rl.reward_model as reward

    args = ModelArguments("x", qlora=True)
    seen = []

    def classifier(own, label):
        seen.append(own)
        raise ValueError("enough")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            reward, "_classifier", lambda own, label: seen.append(own) or (_ for _ in ()).throw(ValueError("x"))
        )
        with pytest.raises(reward.RewardError):
            reward.load_scorer(
                "x", args, label=None, tokenizer=None, template=None, device=torch.device("cpu"), longest=1
            )
    assert seen[0].bits is None and replace(args).bits == 4
