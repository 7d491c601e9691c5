"""A checkpoint knows what it belongs to: a resume that would be another run is refused by name, before it trains."""

import json
import shutil

import pytest
import torch

from stagewise.config.arguments import ModelArguments
from stagewise.training.resume.fingerprints import model_fingerprint, weights_fingerprint
from stagewise.training.resume.identity import RECORD
from tests.conftest import build_tiny_tokenizer

SFT = "supervised_finetuning"


def write_records(folder, count=8, pairs=False, word="what"):
    folder.mkdir(parents=True, exist_ok=True)
    records = []
    for number in range(count):
        record = {"conversations": [{"from": "human", "value": f"{word} about {number} ?"}]}
        if pairs:
            records.append({**record, "chosen": "drink water", "rejected": "no"})
        else:
            record["conversations"].append({"from": "gpt", "value": "rest and drink water"})
            records.append(record)
    (folder / "a.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return folder


@pytest.fixture(scope="module")
def started(tmp_path_factory):
    """started(script, **flags): a run's checkpoint-2 with the words of its command; made once for each of these."""
    import importlib
    import sys

    from tests.conftest import build_tiny_model

    made, root = {}, tmp_path_factory.mktemp("started")
    for name, task, seed in (("base", "causal", 0), ("other", "causal", 1), ("judge", "score", 0)):
        build_tiny_model("llama", task=task, seed=seed).save_pretrained(root / name)
        build_tiny_tokenizer().save_pretrained(root / name)

    def start(script, **flags):
        key = json.dumps([script, flags], default=str)
        if key not in made:
            pairs = script in ("reward_modeling", "dpo_training")
            flags = {
                "model_name_or_path": root / "base",
                "train_file_dir": write_records(root / ("pairs" if pairs else "train"), pairs=pairs),
                "per_device_train_batch_size": 2,
                "save_steps": 2,
                "max_steps": 2,
                "eval_samples": 0,
                "report_to": "none",
                "output_dir": root / f"out-{len(made)}",
                **flags,
            }
            argv, sys.argv = sys.argv, [f"{script}.py", *to_words(flags)]
            try:
                importlib.import_module(script).main()
            finally:
                sys.argv = argv
            made[key] = root, flags
        return made[key]

    return start


def to_words(flags):
    return [str(word) for name, value in flags.items() if value is not None for word in (f"--{name}", value)]


@pytest.fixture
def resumed(started, stage, tmp_path, capsys):
    """resumed(script, flags, **changes): what a resume with other flags says as it ends; its code stands before."""

    def resume(script, first, changes, model_or_data=None):
        root, flags = started(script, **first)
        out = tmp_path / "out"
        if not out.exists():
            shutil.copytree(flags["output_dir"] / "checkpoint-2", out / "checkpoint-2")
        if model_or_data:
            changes = {**changes, **model_or_data(root)}
        flags = {**flags, "max_steps": 4, "output_dir": out, "resume_from_checkpoint": True, **changes}
        with pytest.raises(SystemExit) as ended:
            stage(script, *to_words(flags))
        return ended.value.code, capsys.readouterr().err.splitlines()[-1]

    return resume


PADDED = {"packing": False, "model_max_length": 300}


@pytest.mark.parametrize(
    ("changes", "now", "was"),
    [
        ({"seed": 7}, "--seed 7", "42"),
        ({"data_seed": 7}, "--data_seed 7", "42"),
        ({"packing": True}, "--packing True", "False"),
        ({"streaming": True}, "--streaming True", "False"),
        ({"model_max_length": 200}, "--model_max_length 200", "300"),
        ({"train_on_inputs": True}, "--train_on_inputs True", "False"),
        ({"mask_history": True}, "--mask_history True", "False"),
        ({"truncation_side": "left"}, "--truncation_side left", "right"),
        ({"train_sampling_strategy": "group_by_length"}, "--train_sampling_strategy group_by_length", "random"),
        ({"dataloader_drop_last": True}, "--dataloader_drop_last True", "False"),
        ({"accelerator_config": '{"even_batches": false}'}, "--accelerator_config", "'even_batches': True"),
        ({"lora_rank": 4}, "--lora_rank 4", "8"),
        ({"lora_alpha": 32}, "--lora_alpha 32.0", "16.0"),
        ({"use_dora": True}, "--use_dora True", "False"),
        ({"use_rslora": True}, "--use_rslora True", "False"),
        ({"target_modules": "q_proj"}, "--target_modules q_proj", "all"),
        ({"modules_to_save": "lm_head"}, "--modules_to_save lm_head", "none"),
        ({"init_lora_weights": "pissa"}, "--init_lora_weights pissa", "default"),
        ({"loraplus_lr_ratio": 4}, "--loraplus_lr_ratio 4.0", "none"),
        ({"use_peft": False}, "--fine_tuning_type full", "lora"),
        ({"fine_tuning_type": "p_tuning"}, "--fine_tuning_type p_tuning", "lora"),
        ({"optim": "adafactor"}, "--optim adafactor", "adamw_torch"),
        ({"rope_scaling": "linear", "rope_factor": 2}, "--rope_scaling linear", "none"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_a_flag_that_has_to_stay_is_named_before_anything_is_read(resumed, changes, now, was):
    code, error = resumed(SFT, PADDED, changes)
    assert code == 2
    assert error.startswith(f"error: {now}"), error
    assert f"checkpoint-2 was trained with {was}" in error or was in error.split("was trained with")[1], error
    assert "--peft_path" in error and error.endswith("another --output_dir")


@pytest.mark.parametrize(
    ("changes", "make", "now", "was"),
    [
        ({"template_name": "alpaca"}, None, "--template_name alpaca", "vicuna"),
        ({"max_train_samples": 5}, None, "--max_train_samples 5 (5 records)", "8 records"),
        ({}, lambda root: {"train_file_dir": write_records(root / "more", 9)}, "(9 records)", "8 records"),
        (
            {},
            lambda root: {"train_file_dir": write_records(root / "others", word="how")},
            "others, or these in another order",
            "8 records",
        ),
        ({}, lambda root: {"model_name_or_path": root / "other"}, "/other: ", "/base"),
    ],
    ids=["template", "fewer", "more", "others", "base"],
)
def test_data_template_and_base_are_compared_before_weights_are_read(resumed, monkeypatch, changes, make, now, was):
    import supervised_finetuning

    def loads(*args, **kwargs):
        raise AssertionError("the weights are read")

    resumed(SFT, PADDED, {"seed": 1})  # the checkpoint is made with the true one
    monkeypatch.setattr(supervised_finetuning, "load_causal_lm", loads)
    code, error = resumed(SFT, PADDED, changes, make)
    assert code == 1
    assert now in error and was in error.split("was trained with")[1], error


@pytest.mark.parametrize(
    ("script", "first", "changes", "make", "now", "was"),
    [
        ("reward_modeling", {}, {"max_source_length": 100}, None, "--max_source_length 100", "2048"),
        ("dpo_training", {}, {"max_target_length": 100}, None, "--max_target_length 100", "512"),
        (
            "dpo_training",
            {"use_peft": False},
            {"lora_rank": 4, "use_peft": True},
            None,
            "--fine_tuning_type lora",
            "full",
        ),
        (
            "dpo_training",
            {"use_peft": False},
            {},
            lambda root: {"ref_model_name_or_path": root / "other"},
            "--ref_model_name_or_path",
            "none",
        ),
    ],
)
def test_the_other_stages_compare_as_well(resumed, script, first, changes, make, now, was):
    code, error = resumed(script, first, changes, make)
    assert code in (1, 2) and now in error and f"was trained with {was}" in error, error
    if first.get("use_peft") is False:
        assert "--model_name_or_path" in error.split("these weights")[1]


def test_blocks_of_text_have_no_template(resumed, tmp_path):
    (tmp_path / "text.txt").write_text("drink water and rest. " * 40)
    first = {"train_file_dir": tmp_path / "text.txt", "block_size": 32, "packing": False}
    assert resumed("pretraining", first, {"block_size": 16})[1].startswith("error: --block_size 16")


def test_a_stage_does_not_go_on_from_another(resumed, started):
    root, _ = started(SFT, **PADDED)
    resumed(SFT, PADDED, {"seed": 1})
    data = write_records(root / "pairs", pairs=True)
    code, error = resumed("dpo_training", {}, {"train_file_dir": data})
    assert code == 2 and "made by the stage sft, and this is dpo" in error


PPO = {"max_target_length": 4, "batch_size": 4, "rollouts": 1, "ppo_epochs": 1, "max_steps": None, "save_steps": 1}


def test_rollouts_keep_their_sizes(resumed, started, stage, tmp_path):
    root, _ = started(SFT, **PADDED)
    first = {**PPO, "reward_model_name_or_path": root / "judge", "save_steps": 2}
    changes = {"max_steps": None, "rollouts": 2}
    for name, value, was in (("batch_size", 8, 4), ("gradient_accumulation_steps", 2, 1), ("ppo_epochs", 2, 1)):
        _, error = resumed("ppo_training", first, {**changes, name: value})
        assert f"--{name}" in error and f"was trained with {was}," in error, error
    _, error = resumed("ppo_training", first, {**changes, "max_target_length": 8})
    assert "--max_target_length 8" in error


def test_a_checkpoint_of_an_earlier_version_is_not_compared_but_for_its_shape(started, stage, tmp_path, capsys):
    _root, flags = started(SFT, **PADDED)
    folder = tmp_path / "out" / "checkpoint-2"
    shutil.copytree(flags["output_dir"] / "checkpoint-2", folder)
    (folder / RECORD).unlink()
    mark = json.loads((folder / "whole.json").read_text())
    del mark[RECORD]
    (folder / "whole.json").write_text(json.dumps(mark))
    words = {**flags, "output_dir": tmp_path / "out", "resume_from_checkpoint": True, "max_steps": 3}
    with pytest.raises(SystemExit):
        stage(SFT, *to_words({**words, "lora_rank": 4}))
    assert "--lora_rank 4: " in capsys.readouterr().err.splitlines()[-1]
    stage(SFT, *to_words({**words, "seed": 7}))
    assert f"checkpoint-2 has no {RECORD} (an earlier version made it)" in capsys.readouterr().err


def test_what_changes_neither_order_nor_meaning_may_differ(started, stage, tmp_path):
    root, flags = started(SFT, **PADDED)
    shutil.copytree(flags["output_dir"] / "checkpoint-2", tmp_path / "out" / "checkpoint-2")
    shutil.copytree(root / "base", tmp_path / "moved")
    shutil.copytree(root / "train", tmp_path / "elsewhere")
    free = {"learning_rate": 1e-3, "lora_dropout": 0.2, "warmup_steps": 1, "weight_decay": 0.1, "max_grad_norm": 2}
    free |= {"optim": "adamw_torch", "torch_dtype": "bfloat16", "neft_alpha": 5, "num_train_epochs": 9}
    moved = {"model_name_or_path": tmp_path / "moved", "train_file_dir": tmp_path / "elsewhere"}
    words = {**flags, "output_dir": tmp_path / "out", "resume_from_checkpoint": True, **free, **moved, "max_steps": 4}
    out = stage(SFT, *to_words(words))
    assert json.loads((out / "run.json").read_text())["steps"] == 4


# ── fingerprints ─────────────────────────────────────────────────────────────────────────────────────────────────────


def test_the_same_weights_in_other_shards_have_one_fingerprint(tiny_checkpoint):
    whole, parts = tiny_checkpoint("llama"), tiny_checkpoint("llama", max_shard_size="30KB")
    assert len(list(parts.glob("*.safetensors"))) > 1
    assert weights_fingerprint(whole) == weights_fingerprint(parts)
    assert weights_fingerprint(whole) != weights_fingerprint(tiny_checkpoint("llama", seed=1))
    assert weights_fingerprint(whole) != weights_fingerprint(tiny_checkpoint("llama", dtype=torch.bfloat16))


def test_samples_of_large_weights_tell_another_training_of_them(tmp_path):
    from safetensors.torch import save_file

    weights = {name: torch.randn(600, 1000) for name in ("a", "b", "c")}  # 7.2 MB: not all of it is read
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        save_file(weights, tmp_path / name / "model.safetensors")
    assert weights_fingerprint(tmp_path / "one") == weights_fingerprint(tmp_path / "two")
    weights["b"] = weights["b"] + 1e-4 * torch.outer(torch.randn(600), torch.randn(1000))  # rank 1, as LoRA's
    save_file(weights, tmp_path / "two" / "model.safetensors")
    assert weights_fingerprint(tmp_path / "one") != weights_fingerprint(tmp_path / "two")


def test_weights_in_other_forms_and_damaged_files_have_one_as_well(tmp_path):
    assert weights_fingerprint(tmp_path) is None
    torch.save({"a": torch.ones(3)}, tmp_path / "pytorch_model.bin")
    first = weights_fingerprint(tmp_path)
    torch.save({"a": torch.zeros(3)}, tmp_path / "pytorch_model.bin")
    assert first is not None and weights_fingerprint(tmp_path) != first
    for content in (b"", b"\x10", b"\xff" * 16, (20).to_bytes(8, "little") + b'{"a": {"dtype": 1}}   '):
        (tmp_path / "model.safetensors").write_bytes(content)
        assert weights_fingerprint(tmp_path) is not None


def test_a_hubs_model_is_found_in_its_cache(tmp_path, tiny_checkpoint):
    args = ModelArguments("some/model", cache_dir=str(tmp_path))
    assert model_fingerprint("some/model", args) is None
    repository = tmp_path / "models--some--model"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("0f")
    base = tiny_checkpoint("llama")
    shutil.copytree(base, repository / "snapshots" / "0f")
    assert model_fingerprint("some/model", args) == weights_fingerprint(base)
