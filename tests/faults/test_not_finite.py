"""Gradients, losses and weights that are NaN or infinite: no such step is taken, and nothing broken is saved."""

import importlib
import json
import subprocess

import pytest
import torch
from safetensors.torch import load_file, save_file

from stagewise.artifacts.checkpoints import checkpoints, is_whole
from tests.faults.poison import TRAINERS, poisoned
from tests.faults.tiny_runs import STAGES, all_finite, is_same, manifest, moments_of, weights_of, words_of
from tests.launching import ROOT, environment, torchrun


@pytest.fixture
def broken(stage, monkeypatch, tmp_path, tiny_checkpoint):
    """Runs a stage with the steps `at` broken; returns its output directory and its exit code."""

    def run(script, kind, at, **changes):
        module = importlib.import_module(script)
        words = words_of(script, tmp_path, tiny_checkpoint, **changes)
        with monkeypatch.context() as patched:
            patched.setattr(module, TRAINERS[script], poisoned(getattr(module, TRAINERS[script]), at, kind))
            try:
                stage(script, *words)
                code = 0
            except SystemExit as ended:
                code = ended.code
        return tmp_path / changes.get("out", "out"), code

    return run


def whole(folder):
    return [path.name for path in checkpoints(folder) if is_whole(path)]


def assert_only_step_3_is_missing(out, code):
    assert code == 0
    second, third, fourth = (out / f"checkpoint-{step}" for step in (2, 3, 4))
    assert is_same(weights_of(third), weights_of(second)), "the broken step changed no weight"
    assert is_same(moments_of(third), moments_of(second)), "nor what the optimizer remembers"
    assert not is_same(weights_of(fourth), weights_of(third)), "the step behind it is taken"
    assert all_finite(out)
    account = manifest(out)
    assert (account["status"], account["steps"], account["skipped_steps"]) == ("finished", 6, 1)


@pytest.mark.parametrize("kind", ["gradient", "loss"])
@pytest.mark.parametrize("script", STAGES)
def test_a_broken_step_changes_nothing(script, kind, broken, capsys):
    assert_only_step_3_is_missing(*broken(script, kind, {3}, save_total_limit=0))
    assert f"step 3: skipped; its {kind} is NaN or infinite. Its records: a.jsonl:" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        ("infinite", {}),
        ("gradient", {"max_grad_norm": 0}),
        ("infinite", {"use_peft": False, "max_grad_norm": 0, "gradient_accumulation_steps": 2}),
        ("gradient", {"optim": "adamw_torch", "weight_decay": 0.5}),
        ("gradient", {"optim": "adafactor", "use_peft": False}),
    ],
    ids=str,
)
def test_whatever_clips_and_steps(kind, changes, broken):
    changes = {"use_peft": True, "num_train_epochs": 3, **changes}
    assert_only_step_3_is_missing(*broken("supervised_finetuning", kind, {3}, save_total_limit=0, **changes))


def test_adalora_judges_no_rank_by_it(broken):
    flags = {"fine_tuning_type": "adalora", "tinit": 1, "tfinal": 1, "deltaT": 1, "save_total_limit": 0}
    out, code = broken("supervised_finetuning", "gradient", {3}, **flags)
    assert_only_step_3_is_missing(out, code)
    second, third = (torch.load(out / f"checkpoint-{n}" / "rank_importance.pt", weights_only=True) for n in (2, 3))
    for name in ("ipt", "exp_avg_ipt", "exp_avg_unc"):
        assert is_same(third[name], second[name])


@pytest.mark.parametrize("script", ["supervised_finetuning", "ppo_training"])
def test_the_last_step(script, broken):
    out, code = broken(script, "gradient", {6}, save_total_limit=1)
    assert (code, manifest(out)["skipped_steps"], whole(out)) == (0, 1, ["checkpoint-6"])
    assert all_finite(out)


@pytest.mark.parametrize("kind", ["gradient", "loss"])
def test_five_in_a_row_end_the_run_and_their_records_are_named(kind, broken, capsys):
    at = {2, 3, 4, 5, 6, 7, 8}
    out, code = broken("supervised_finetuning", kind, at, max_steps=9, save_steps=1, save_total_limit=1)
    assert code == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith(f"error: the {kind} of step 6 is NaN or infinite, 5 in a row by now; none of these steps")
    assert "Its records: a.jsonl:" in error
    assert "Lower --learning_rate" in error
    account = manifest(out)
    assert (account["status"], account["steps"], account["skipped_steps"]) == ("failed", 6, 5)
    assert whole(out) == ["checkpoint-5"]
    assert all_finite(out)
    assert not (out / "adapter_model.safetensors").exists(), "no result is left"


def test_a_sound_step_in_between_begins_the_count_anew(broken):
    out, code = broken("supervised_finetuning", "gradient", {1, 2, 3, 4, 6, 7, 8, 9}, max_steps=10)
    assert (code, manifest(out)["skipped_steps"]) == (0, 8)


@pytest.mark.parametrize("step", [3, 6])
@pytest.mark.parametrize("script", ["reward_modeling", "ppo_training"])
def test_weights_that_a_step_broke_are_never_saved(script, step, broken, capsys):
    out, code = broken(script, "rate", {step}, save_total_limit=1)
    assert code == 1
    assert f"weights are NaN or infinite after step {step}; they were not saved" in capsys.readouterr().err
    assert whole(out) == [f"checkpoint-{step - 1}"], "the last good one stays"
    assert all_finite(out)
    assert not (out / "adapter_model.safetensors").exists()
    assert manifest(out)["status"] == "failed"


def test_nor_at_the_end_where_no_checkpoint_is_written(broken, capsys):
    out, code = broken("dpo_training", "rate", {6}, save_strategy="no", use_peft=False)
    assert code == 1
    assert "weights are NaN or infinite after step 6" in capsys.readouterr().err
    assert not list(out.rglob("*.safetensors"))


def test_nor_evaluated(broken, capsys):
    evaluated = {"validation_split_percentage": 20, "eval_strategy": "steps", "eval_steps": 3, "save_steps": 6}
    _, code = broken("supervised_finetuning", "rate", {3}, **evaluated)
    assert code == 1
    assert "weights are NaN or infinite after step 3" in capsys.readouterr().err


def test_a_run_without_any_sound_step_is_none(broken, tiny_checkpoint, capsys):
    out, code = broken("supervised_finetuning", "gradient", {1, 2, 3}, max_steps=3)
    assert code == 1
    assert (
        "the loss or the gradient of every step (3) is NaN or infinite: no step was taken" in capsys.readouterr().err
    )
    assert not (out / "adapter_model.safetensors").exists()


def test_a_broken_base_is_named(broken, tiny_checkpoint, capsys):
    base = tiny_checkpoint("llama")
    weights = load_file(base / "model.safetensors")
    weights["model.norm.weight"][3] = float("nan")
    save_file(weights, base / "model.safetensors", metadata={"format": "pt"})
    _, code = broken("supervised_finetuning", "loss", set(), model_name_or_path=base)
    assert code == 1
    assert (
        "model.norm.weight is NaN or infinite: its file is broken, or --torch_dtype too narrow"
        in (capsys.readouterr().err.splitlines()[-1])
    )


def test_a_resumed_run_counts_on(broken):
    out, _ = broken("supervised_finetuning", "gradient", {2}, save_total_limit=0)
    whole_run = weights_of(out)
    for step in (4, 5, 6):
        (out / f"checkpoint-{step}" / "whole.json").unlink()
    for name in ("run.json", "adapter_model.safetensors", "adapter_config.json"):
        (out / name).unlink()
    out, code = broken("supervised_finetuning", "gradient", set(), resume_from_checkpoint=True)
    assert (code, manifest(out)["skipped_steps"]) == (0, 1)
    assert is_same(weights_of(out), whole_run)


def test_the_log_says_nan_unless_it_is_filtered_and_the_mean_stays_a_number(broken):
    found = {}
    for hide in (False, True):
        flags = {"out": f"filter-{hide}", "logging_nan_inf_filter": hide}
        out, _ = broken("supervised_finetuning", "loss", {3}, **flags)
        logs = json.loads((out / "trainer_state.json").read_text())["log_history"]
        found[hide] = {log["step"]: (log["loss"], log.get("skipped_steps")) for log in logs if "loss" in log}
        assert 0 < manifest(out)["metrics"]["train"]["train_loss"] < 100
    assert found[False][3] == (pytest.approx(float("nan"), nan_ok=True), 1)
    assert found[True][3] == (found[True][2][0], 1), "the last loss that was finite"
    assert found[True][2][1] is None
    assert found[True][4] == found[False][4]


# ── several processes ────────────────────────────────────────────────────────────────────────────────────────────────


def launch(kind, at, script, words):
    """Two processes, of which the second alone meets the broken steps; the exit code and what they wrote."""
    command = torchrun("tests/faults/poison", ",".join(map(str, at)), kind, script, *words)
    done = subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=600)
    return done.returncode, done.stdout + done.stderr


@pytest.mark.distributed
@pytest.mark.timeout(900)
def test_two_processes_skip_the_same_steps_and_end_together(tmp_path, tiny_checkpoint):
    words = words_of("supervised_finetuning", tmp_path, tiny_checkpoint, max_steps=9, save_total_limit=0)
    code, said = launch("gradient", (2, 4, 5, 6, 7, 8, 9), "supervised_finetuning", words)
    out = tmp_path / "out"
    assert code == 1, said[-3000:]
    assert "error: the gradient of step 8 is NaN or infinite, 5 in a row by now" in said
    named = said.split("step 2: skipped; its gradient is NaN or infinite. Its records: ")[1].splitlines()[0]
    assert named.count("a.jsonl:") == 4, "two of each process"
    assert is_same(weights_of(out / "checkpoint-2"), weights_of(out / "checkpoint-1"))
    assert is_same(moments_of(out / "checkpoint-2"), moments_of(out / "checkpoint-1"))
    assert not is_same(weights_of(out / "checkpoint-3"), weights_of(out / "checkpoint-2"))
    assert whole(out)[-1] == "checkpoint-7"
    assert all_finite(out)
    assert (manifest(out)["status"], manifest(out)["skipped_steps"]) == ("failed", 6)


@pytest.mark.distributed
@pytest.mark.timeout(900)
def test_a_loss_of_one_process_skips_the_step_of_both(tmp_path, tiny_checkpoint):
    words = words_of("ppo_training", tmp_path, tiny_checkpoint, save_total_limit=0)
    code, said = launch("loss", (3,), "ppo_training", words)
    assert "step 3: skipped; its loss is NaN or infinite. Its records: a.jsonl:" in said, said[-3000:]
    assert_only_step_3_is_missing(tmp_path / "out", code)


@pytest.mark.distributed
@pytest.mark.timeout(900)
@pytest.mark.parametrize(("config", "changes"), [("zero2", {}), ("zero3", {"use_peft": False})])
def test_deepspeed_skips_it_too(config, changes, tmp_path, tiny_checkpoint):
    changes |= {"deepspeed": ROOT / f"{config}.json", "max_steps": 9, "save_total_limit": 0}
    words = words_of("supervised_finetuning", tmp_path, tiny_checkpoint, **changes)
    code, said = launch("gradient", (2, 4, 5, 6, 7, 8, 9), "supervised_finetuning", words)
    out = tmp_path / "out"
    assert code == 1, said[-3000:]
    assert "error: the gradient of step 8 is NaN or infinite, 5 in a row by now" in said
    assert is_same(weights_of(out / "checkpoint-2"), weights_of(out / "checkpoint-1"))
    assert not is_same(weights_of(out / "checkpoint-3"), weights_of(out / "checkpoint-2"))
    assert whole(out)[-1] == "checkpoint-7"
    assert all_finite(out)
    assert manifest(out)["skipped_steps"] == 6
