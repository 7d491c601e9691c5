import copy
import json
import shutil

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from dpo_training import DPOTrainer
from stagewise.adapters.attach import attach_adapter, merge_in_memory
from stagewise.config.arguments import AdapterArguments
from stagewise.data.packing import PreferenceCollator
from stagewise.training.settings import StageArguments
from template import TEMPLATES
from tests.conftest import adapter_weights
from tests.pair_runs import (
    batch_of,
    both_agree,
    chat_columns,
    evaluation_rows,
    flags_of,
    history,
    manifest,
    preferences,
)

BETA = 0.3


@pytest.fixture
def words(tmp_path, tiny_checkpoint):
    def make(out="out", model=None, **changes):
        return flags_of(tmp_path, model or tiny_checkpoint("llama"), out, **changes)

    return make


def trainer_of(model, tokenizer, folder, reference=None):
    args = StageArguments(str(folder / "ours"), use_cpu=True, report_to="none")
    collate = PreferenceCollator(tokenizer.pad_token_id)
    options = {"beta": BETA, "reference": reference}
    return DPOTrainer(model=model, args=args, train_dataset=[], data_collator=collate, **options)


def stir(model, only, seed=1):
    """Random values for the parameters whose names hold `only`."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if only in name:
            parameter.data.normal_(0, 0.1, generator=generator)
    return model


def answer_logp(model, row):
    """The log-probability of a row's learned tokens, token by token over all logits."""
    with torch.no_grad():
        logps = model(torch.tensor([row.input_ids])).logits[0].double().log_softmax(-1)
    return sum(logps[n - 1, label].item() for n, label in enumerate(row.labels) if label != -100)


def measured_again(policy, reference, pair, beta=0.1):
    policy, reference = policy.eval(), reference.eval()
    return [beta * (answer_logp(policy, row) - answer_logp(reference, row)) for row in (pair.chosen, pair.rejected)]


@pytest.mark.parametrize("adapter", [True, False])
def test_loss_and_gradients_are_those_of_trl(tiny_model, tiny_tokenizer, tmp_path, adapter):
    from trl import DPOConfig
    from trl import DPOTrainer as Oracle

    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = TEMPLATES["vicuna"].jinja()
    config = DPOConfig(
        str(tmp_path / "trl"),
        use_cpu=True,
        bf16=False,
        beta=BETA,
        max_length=None,
        gradient_checkpointing=False,
        report_to="none",
    )
    model = tiny_model("llama")
    lora = LoraConfig(task_type="CAUSAL_LM", r=8, lora_alpha=16, lora_dropout=0.0, target_modules="all-linear")
    oracle = Oracle(
        model=copy.deepcopy(model),
        ref_model=None if adapter else tiny_model("llama", seed=1),
        args=config,
        train_dataset=Dataset.from_list(chat_columns(0, 4)),
        processing_class=tokenizer,
        peft_config=lora if adapter else None,
    )
    reference = None if adapter else tiny_model("llama", seed=1)
    if adapter:
        model = stir(attach_adapter(model, AdapterArguments(lora_dropout=0.0), "CAUSAL_LM"), "lora_")
        stir(oracle.model, "lora_")
    expected = oracle.compute_loss(oracle.model, oracle.data_collator(list(oracle.train_dataset)))
    expected.backward()
    ours = trainer_of(model, tokenizer, tmp_path, reference)
    loss = ours.compute_loss(model, batch_of(tokenizer, 0, 4), num_items_in_batch=4)
    loss.backward()
    assert abs(loss.item() - 0.6931) > 0.01
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=0)
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    wanted = {name: p.grad for name, p in oracle.model.named_parameters() if p.grad is not None}
    assert found and found.keys() == wanted.keys()
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, wanted[name], rtol=1e-4, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")


def test_the_reference_has_no_dropout_and_leaves_the_model_as_it_was(tiny_model, tiny_tokenizer, tmp_path):
    tokenizer = tiny_tokenizer()
    base = tiny_model("llama", attention_dropout=0.5)
    pairs = preferences(tokenizer, 0, 3)
    expected = [[answer_logp(base, row) for row in (pair.chosen, pair.rejected)] for pair in pairs]
    model = stir(attach_adapter(base, AdapterArguments(lora_dropout=0.5), "CAUSAL_LM"), "lora_").train()
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    ours = trainer_of(model, tokenizer, tmp_path)
    found = torch.stack(ours.reference_logps(batch_of(tokenizer, 0, 3)), dim=1)
    torch.testing.assert_close(found.double(), torch.tensor(expected, dtype=torch.float64), rtol=1e-4, atol=1e-4)
    assert not found.requires_grad
    assert all(module.training for module in model.modules())
    assert {name for name, p in model.named_parameters() if p.requires_grad} == trained
    with torch.no_grad():
        policy = torch.stack(ours.logps(model.eval(), batch_of(tokenizer, 0, 3)), dim=1)
    assert (policy - found).abs().max() > 0.1


def test_before_training_every_reward_is_0_and_accuracy_a_half(stage, words):
    out = stage("dpo_training", *words(max_steps=1), "--eval_on_start", "--save_eval_records")
    assert evaluation_rows(out, 0) == {"b.jsonl:1": (0, 0), "b.jsonl:2": (0, 0)}
    before = manifest(out)["metrics"]["eval_before"]
    assert (before["eval_accuracy"], before["eval_margin"]) == (0.5, 0)
    assert before["eval_loss"] == pytest.approx(0.693147, abs=1e-6)
    first = next(log for log in history(out) if "accuracy" in log)
    assert (first["accuracy"], first["margin"]) == (0.5, 0)
    assert evaluation_rows(out, 1) != evaluation_rows(out, 0)


@pytest.mark.parametrize("full", [False, True])
def test_what_is_saved_gives_the_rewards_that_were_measured(stage, words, full):
    flags = words(use_peft=not full, lora_dropout=None if full else 0)
    out = stage("dpo_training", *flags, "--save_eval_records")
    reference = AutoModelForCausalLM.from_pretrained(flags[1])
    base = AutoModelForCausalLM.from_pretrained(out if full else flags[1])
    policy = base if full else PeftModel.from_pretrained(base, out)
    measured = evaluation_rows(out, 2)
    for number, pair in enumerate(preferences(AutoTokenizer.from_pretrained(out), 6, 8), 1):
        found = measured_again(policy, reference, pair)
        assert found == pytest.approx(measured[f"b.jsonl:{number}"], rel=1e-3, abs=1e-4)
        assert min(map(abs, found)) > 1e-2


def test_a_second_model_can_be_the_reference(stage, words, tiny_checkpoint):
    other = tiny_checkpoint("llama", seed=5)
    flags = words(use_peft=False, lora_dropout=None, ref_model_name_or_path=other, max_steps=1)
    out = stage("dpo_training", *flags, "--eval_on_start", "--save_eval_records")
    policy, reference = (AutoModelForCausalLM.from_pretrained(folder) for folder in (flags[1], other))
    measured = evaluation_rows(out, 0)
    for number, pair in enumerate(preferences(AutoTokenizer.from_pretrained(out), 6, 8), 1):
        found = measured_again(policy, reference, pair)
        assert found == pytest.approx(measured[f"b.jsonl:{number}"], rel=1e-3, abs=1e-4)


def test_a_run_learns_its_pairs_and_logs_accuracy_and_margin(stage, words):
    out = stage("dpo_training", *words(max_steps=12, logging_steps=3, validation_file_dir=None, learning_rate=2e-2))
    logs = [log for log in history(out) if "accuracy" in log]
    assert logs[-1]["accuracy"] == 1.0
    assert logs[-1]["margin"] > 1
    for log in logs:
        assert log["margin"] == pytest.approx(log["chosen_reward"] - log["rejected_reward"], abs=1e-4)


@pytest.fixture
def sft_adapter(tmp_path, tiny_checkpoint):
    """(model, adapter): a base's directory and an adapter on it that changes much, with its run.json."""
    base, adapter = tiny_checkpoint("llama"), tmp_path / "sft"
    model = attach_adapter(AutoModelForCausalLM.from_pretrained(base), AdapterArguments(), "CAUSAL_LM")
    stir(model, "lora_", seed=3).save_pretrained(adapter)
    lineage = [{"stage": "sft", "base_model": str(base)}]
    (adapter / "run.json").write_text(json.dumps({"stage": "sft", "status": "finished", "lineage": lineage}))
    return base, adapter


@pytest.mark.parametrize("full", [False, True])
def test_checkpoint_dir_is_part_of_model_and_reference(stage, words, sft_adapter, full):
    base, adapter = sft_adapter
    flags = words(model=base, checkpoint_dir=adapter, use_peft=not full, lora_dropout=None if full else 0)
    out = stage("dpo_training", *flags, "--eval_on_start", "--save_eval_records")
    assert set(evaluation_rows(out, 0).values()) == {(0, 0)}
    merged = merge_in_memory(AutoModelForCausalLM.from_pretrained(base), adapter)
    other = merge_in_memory(AutoModelForCausalLM.from_pretrained(base), adapter)
    policy = AutoModelForCausalLM.from_pretrained(out) if full else PeftModel.from_pretrained(other, out)
    for number, pair in enumerate(preferences(AutoTokenizer.from_pretrained(out), 6, 8), 1):
        found = measured_again(policy, merged, pair)
        assert found == pytest.approx(evaluation_rows(out, 2)[f"b.jsonl:{number}"], rel=1e-3, abs=1e-4)
    before, own = manifest(out)["lineage"]
    assert before == {"stage": "sft", "base_model": str(base)}
    step = {"stage": "dpo", "base_model": str(base), "merged_adapter": str(adapter)}
    assert {name: own[name] for name in step} == step


def test_peft_path_goes_on_from_an_adapter_against_the_same_reference(stage, words):
    flags = words()
    first = stage("dpo_training", *flags, "--save_eval_records")
    changes = {"model": flags[1], "peft_path": first, "max_steps": 1}
    second = stage("dpo_training", *words("second", **changes), "--eval_on_start", "--save_eval_records")
    for where, rewards in evaluation_rows(first, 2).items():
        assert evaluation_rows(second, 0)[where] == pytest.approx(rewards, rel=1e-4, abs=1e-5)


def test_a_resumed_run_ends_with_the_same_weights(stage, words, tmp_path, tiny_checkpoint):
    changes = {"max_steps": 4, "lora_dropout": 0.1, "model": tiny_checkpoint("llama")}
    whole = stage("dpo_training", *words("whole", save_steps=2, **changes))
    (tmp_path / "resumed").mkdir()
    shutil.copytree(whole / "checkpoint-2", tmp_path / "resumed" / "checkpoint-2")
    resumed = stage("dpo_training", *words("resumed", **changes), "--resume_from_checkpoint", "True")
    expected, found = adapter_weights(whole), adapter_weights(resumed)
    assert all(torch.equal(value, expected[name]) for name, value in found.items())
    assert not torch.equal(found[key := min(found)], adapter_weights(whole / "checkpoint-2")[key])


@pytest.mark.distributed
@pytest.mark.parametrize("full", [False, True])
def test_two_processes_are_one_with_twice_the_batch(stage, words, tiny_checkpoint, full):
    changes = {"use_peft": not full, "lora_dropout": None if full else 0}
    both_agree("dpo_training", stage, words, tiny_checkpoint("llama"), **changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"beta": 0}, "--beta: expected a number above 0, found 0"),
        ({"beta": "nan"}, "--beta: expected a number above 0, found nan"),
        ({"max_source_length": 0}, "--max_source_length: expected at least 1"),
        ({"ref_model_name_or_path": "x"}, "--ref_model_name_or_path has no effect"),
        (
            {"ref_model_name_or_path": "./x", "use_peft": False, "lora_dropout": None},
            "--ref_model_name_or_path ./x: no",
        ),
        ({"checkpoint_dir": "./x"}, "--checkpoint_dir x: expected an adapter, found no adapter_config.json"),
        ({"label_smoothing": 0.1}, "--label_smoothing: no such flag; the nearest known flag is"),
    ],
)
def test_a_flag_that_cannot_be_honoured_ends_before_the_model_is_looked_for(stage, words, capsys, changes, message):
    with pytest.raises(SystemExit) as ended:
        stage("dpo_training", *words(model="nowhere/at/all", **changes))
    assert ended.value.code in (1, 2)
    assert message in capsys.readouterr().err


def test_an_adapter_of_another_stage_is_no_peft_path(stage, words, sft_adapter, capsys):
    with pytest.raises(SystemExit):
        stage("dpo_training", *words(model="nowhere/at/all", peft_path=sft_adapter[1], lora_dropout=None))
    assert "--checkpoint_dir" in (error := capsys.readouterr().err) and "an adapter of stage sft" in error


def test_a_continued_adapter_needs_the_same_checkpoint_dir(stage, words, sft_adapter, capsys):
    base, adapter = sft_adapter
    first = stage("dpo_training", *words("first", model=base, checkpoint_dir=adapter, max_steps=1))
    with pytest.raises(SystemExit):
        stage("dpo_training", *words("second", model=base, peft_path=first, max_steps=1))
    assert f"was trained with --checkpoint_dir {adapter}, found None" in capsys.readouterr().err
