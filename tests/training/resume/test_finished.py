"""The same command after a finished run: nothing is touched, and more steps continue."""

import json

import pytest

SCRIPTS = ["pretraining", "supervised_finetuning", "reward_modeling", "dpo_training", "ppo_training"]


DATA = {"pretraining": "pretrain", "reward_modeling": "reward", "dpo_training": "reward"}


@pytest.fixture
def words(tiny_checkpoint, tmp_path):
    base, judge = tiny_checkpoint("llama"), tiny_checkpoint("llama", task="score")

    def make(script, **changes):
        data = {"pretraining": "pretrain", "reward_modeling": "reward", "dpo_training": "reward"}.get(
            script, "finetune"
        )
        flags = {
            "model_name_or_path": base,
            "output_dir": tmp_path / "out",
            "train_file_dir": f"data/{data}/train",
            "validation_file_dir": f"data/{data}/validation",
            "max_train_samples": 8,
            "max_eval_samples": 2,
            "num_train_epochs": 1,
            "per_device_train_batch_size": 4,
            "save_steps": 1,
            "on_bad_record": "skip",
            "resume_from_checkpoint": True,
        }
        if script == "ppo_training":
            flags |= {"reward_model_name_or_path": judge, "max_target_length": 4, "batch_size": 4, "ppo_epochs": 1}
        flags |= changes
        return [word for name, value in flags.items() if value is not None for word in (f"--{name}", value)]

    return make


def contents(folder):
    return {path: path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.mark.parametrize("script", SCRIPTS)
def test_the_same_command_leaves_a_finished_run_as_it_is(stage, words, capsys, script):
    out = stage(script, *words(script))
    before = contents(out)
    train = json.loads((out / "train_results.json").read_text())
    assert train["train_loss"] != 0
    with pytest.raises(SystemExit) as ended:  # nothing is read
        stage(script, *words(script))
    assert ended.value.code == 0
    assert "this run is finished already, after" in capsys.readouterr().err
    assert contents(out) == before
    stage(script, *words(script, logging_steps=1))  # other flags: what is left is known once the data is read
    assert "this run is finished already, after" in capsys.readouterr().err
    assert contents(out) == before
    steps = json.loads((out / "run.json").read_text())["steps"]
    stage(script, *words(script, num_train_epochs=2))
    assert json.loads((out / "run.json").read_text())["steps"] == 2 * steps
    assert json.loads((out / "train_results.json").read_text())["train_loss"] != train["train_loss"]
    with pytest.raises(SystemExit) as ended:
        stage(script, *words(script))
    assert ended.value.code == 1
    assert "--num_train_epochs 1: " in capsys.readouterr().err.splitlines()[-1]


SFT = "supervised_finetuning"


def test_a_number_of_steps_that_is_done_needs_no_data(stage, words, capsys, tmp_path):
    flags = {"num_train_epochs": None, "packing": False, "streaming": True, "max_train_samples": None}
    stage(SFT, *words(SFT, **flags, max_steps=2))
    with pytest.raises(SystemExit) as ended:
        stage(SFT, *words(SFT, **flags, max_steps=2, logging_steps=1))
    assert ended.value.code == 0
    with pytest.raises(SystemExit) as ended:
        stage(SFT, *words(SFT, **flags, max_steps=1))
    assert ended.value.code == 1
    assert "--max_steps 1: " in capsys.readouterr().err
    stage(SFT, *words(SFT, **flags, max_steps=3))
    assert json.loads((tmp_path / "out" / "run.json").read_text())["steps"] == 3


def test_without_checkpoints_the_same_command_is_as_harmless(stage, words, capsys):
    out = stage(SFT, *words(SFT, save_strategy="no"))
    before = contents(out)
    with pytest.raises(SystemExit) as ended:
        stage(SFT, *words(SFT, save_strategy="no"))
    assert ended.value.code == 0
    with pytest.raises(SystemExit) as ended:
        stage(SFT, *words(SFT, save_strategy="no", num_train_epochs=2))
    assert ended.value.code == 2
    assert "holds a finished sft run" in capsys.readouterr().err
    assert contents(out) == before


def test_a_run_that_was_killed_behind_its_last_step_has_no_loss_of_nothing(stage, words):
    out = stage(SFT, *words(SFT))
    train = (out / "train_results.json").read_text()
    (out / "run.json").unlink()
    stage(SFT, *words(SFT))
    assert (out / "train_results.json").read_text() == train, "its results were written already"
    for name in ("run.json", "train_results.json"):
        (out / name).unlink()
    stage(SFT, *words(SFT))
    assert "train_loss" not in json.loads((out / "train_results.json").read_text())
    assert json.loads((out / "run.json").read_text())["status"] == "finished"


def test_early_stopped_rollouts_are_not_made_again(stage, words):
    flags = {"early_stopping": True, "target_kl": 0.01, "learning_rate": 0.05, "ppo_epochs": 4, "eval_samples": 0}
    out = stage("ppo_training", *words("ppo_training", **flags))
    manifest = json.loads((out / "run.json").read_text())
    (out / "run.json").unlink()
    stage("ppo_training", *words("ppo_training", **flags))
    again = json.loads((out / "run.json").read_text())
    assert (again["status"], again["steps"]) == ("finished", manifest["steps"])
