"""How a run ends, whatever ends it; and what is saved."""

import errno
import json
import os
import signal
import subprocess

import pytest
import torch

from stagewise.training.finiteness import NonFiniteGuard
from tests.conftest import adapter_weights
from tests.launching import ROOT, environment, python


@pytest.fixture
def words(tmp_path, tiny_checkpoint):
    def make(**changes):
        (tmp_path / "train").mkdir(exist_ok=True)
        lines = [json.dumps({"text": f"drink water and rest {number}"}) + "\n" for number in range(8)]
        (tmp_path / "train" / "a.jsonl").write_text("".join(lines))
        flags = {
            "model_name_or_path": tiny_checkpoint("llama"),
            "train_file_dir": tmp_path / "train",
            "output_dir": tmp_path / "out",
            "block_size": 64,
            "packing": False,
            "per_device_train_batch_size": 1,
            "max_steps": 4,
            "report_to": "none",
            **changes,
        }
        return [word for name, value in flags.items() if value is not None for word in (f"--{name}", value)]

    return make


def manifest(folder):
    return json.loads((folder / "run.json").read_text())


def history(folder):
    return json.loads((folder / "trainer_state.json").read_text())["log_history"]


def test_ctrl_c_is_one_line(stage, words, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(NonFiniteGuard, "on_step_end", lambda *a, **k: os.kill(os.getpid(), signal.SIGINT))
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a worker of pytest-xdist takes none
    try:
        with pytest.raises(SystemExit) as ended:
            stage("pretraining", *words())
    finally:
        signal.signal(signal.SIGINT, before)
    assert ended.value.code == 130
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("ended by Ctrl-C; --resume_from_checkpoint True continues")
    assert manifest(tmp_path / "out")["status"] == "failed"
    assert manifest(tmp_path / "out")["error"].startswith("KeyboardInterrupt: ended by Ctrl-C")


def test_a_full_disk_is_one_line_though_run_json_cannot_be_written_either(stage, words, monkeypatch, capsys):
    def is_full(*args, **kwargs):
        monkeypatch.setattr("stagewise.training.run.os.replace", is_full)
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("peft.PeftModel.save_pretrained", is_full)
    with pytest.raises(SystemExit) as ended:
        stage("pretraining", *words())
    assert ended.value.code == 1
    found = capsys.readouterr().err
    assert "error: --output_dir" in found.splitlines()[-1]
    assert "no space is left" in found.splitlines()[-1]
    assert "run.json was not written: [Errno 28]" in found


def test_a_folder_that_cannot_be_written_to_is_named_before_anything_is_read(stage, words, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    with pytest.raises(SystemExit) as ended:
        stage("pretraining", *words(model_name_or_path="nowhere", output_dir=tmp_path / "file" / "out"))
    assert ended.value.code == 2
    assert f"{tmp_path / 'file'} is no folder that can be written to" in capsys.readouterr().err


@pytest.mark.parametrize("flag", ["bf16_full_eval", "fp16_full_eval"])
def test_evaluating_in_16_bit_does_not_round_what_is_saved(stage, words, tmp_path, flag):
    out = stage("pretraining", *words(validation_file_dir=tmp_path / "train"), f"--{flag}")
    assert {tensor.dtype for tensor in adapter_weights(out).values()} == {torch.float32}


def test_do_train_false_trains_nothing(stage, words, tmp_path):
    out = stage("pretraining", *words(validation_file_dir=tmp_path / "train", do_train=False, eval_strategy="steps"))
    assert (out / "eval_results.json").is_file()
    assert not (out / "run.json").exists()


# ── going on with other flags ────────────────────────────────────────────────────────────────────────────────────────


def test_a_resumed_run_follows_its_own_flags(stage, words, capsys):
    out = stage("pretraining", *words(learning_rate=1e-2, save_steps=4, logging_steps=4))
    changed = {"learning_rate": 1e-3, "max_steps": 8, "save_steps": 2, "logging_steps": 1, "weight_decay": 0.1}
    capsys.readouterr()
    stage("pretraining", *words(**changed, resume_from_checkpoint=True))
    # after step n of 8 the linear schedule is at 1 - (n - 1) / 8
    rates = [(log["step"], log["learning_rate"]) for log in history(out) if log.get("step", 0) > 4 and "loss" in log]
    assert rates == [(step, pytest.approx(1e-3 * (9 - step) / 8)) for step in (5, 6, 7, 8)]
    assert sorted(path.name for path in out.glob("checkpoint-*")) == ["checkpoint-4", "checkpoint-6", "checkpoint-8"]
    said = capsys.readouterr().err
    assert said.count("continues with learning rate 0.001, the checkpoint had 0.01") == 1
    assert "continues with weight_decay 0.1, the checkpoint had 0.0" in said


BY_STEPS, BY_LOSS = "linear", "reduce_lr_on_plateau"


@pytest.mark.parametrize(
    ("first", "then", "expected"),
    [
        (BY_LOSS, BY_STEPS, [5e-4, 2.5e-4]),  # as if it had been so from the first of four steps
        (BY_STEPS, BY_LOSS, [1e-3, 1e-3]),
        (BY_LOSS, BY_LOSS, [1e-2, 1e-2]),
    ],
)
def test_a_resumed_run_may_have_another_kind_of_schedule(stage, words, tmp_path, capsys, first, then, expected):
    often = {"eval_strategy": "steps", "eval_steps": 2, "save_steps": 2, "logging_steps": 1}
    often["validation_file_dir"] = tmp_path / "train"
    out = stage("pretraining", *words(lr_scheduler_type=first, learning_rate=1e-2, max_steps=2, **often))
    changed = {"lr_scheduler_type": then, "learning_rate": 1e-3, "resume_from_checkpoint": True}
    capsys.readouterr()
    stage("pretraining", *words(**changed, **often))
    rates = [log["learning_rate"] for log in history(out) if log.get("step", 0) > 2 and "loss" in log]
    assert rates == [pytest.approx(rate) for rate in expected]
    kept = "continues with the checkpoint's learning rate 0.01, not 0.001" in capsys.readouterr().err
    assert kept == (first == then)


@pytest.mark.parametrize("word", ["1", "yes", "TRUE"])
def test_yes_to_resuming_in_other_words(stage, words, word):
    out = stage("pretraining", *words(save_steps=2, max_steps=2))
    stage("pretraining", *words(save_steps=2), "--resume_from_checkpoint", word)
    assert manifest(out)["resumed_from"] == "checkpoint-2"


def test_weights_alone_are_not_gone_on_from(stage, words, capsys):
    out = stage("pretraining", *words(save_steps=2, max_steps=2), "--save_only_model")
    with pytest.raises(SystemExit):
        stage("pretraining", *words(resume_from_checkpoint=True))
    assert f"{out / 'checkpoint-2'} was saved with --save_only_model" in capsys.readouterr().err


def test_the_best_weights_keep_the_numbers_of_their_own_step(stage, words, tmp_path):
    best = {"load_best_model_at_end": True, "eval_strategy": "steps", "eval_steps": 1, "save_steps": 1}
    falling = {"metric_for_best_model": "eval_perplexity", "greater_is_better": True}  # the best is the first step
    out = stage("pretraining", *words(validation_file_dir=tmp_path / "train", learning_rate=1e-2, **best, **falling))
    evaluations = {log["step"]: log["eval_loss"] for log in history(out) if "eval_loss" in log}
    assert list(evaluations) == [1, 2, 3, 4]
    assert evaluations[4] < evaluations[1]
    assert [log["step"] for log in history(out) if "eval_loss" in log] == [1, 2, 3, 4]
    assert manifest(out)["metrics"]["eval"]["eval_loss"] == evaluations[1]
    assert json.loads((out / "eval_results.json").read_text())["eval_loss"] == evaluations[1]
    saved, first = adapter_weights(out), adapter_weights(out / "checkpoint-1")
    assert all(torch.equal(value, first[name]) for name, value in saved.items())


def test_nothing_but_the_log_is_said(words):
    """DeepSpeed, where it is installed, has no word for a run that does not ask for it."""
    done = subprocess.run(python("pretraining", *words()), cwd=ROOT, env=environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout == ""
    assert "real_accelerator" not in done.stderr


def test_an_error_is_said_by_the_first_process_of_a_machine_or_by_the_one_that_failed_alone(monkeypatch, capsys):
    from stagewise.training import first_look

    slept = []

    def sleep(seconds):
        assert not capsys.readouterr().err  # it waits before it speaks: its launcher ends it if others failed, too
        slept.append(seconds)

    monkeypatch.setattr(first_look.time, "sleep", sleep)
    for rank, waits in ((None, []), ("0", []), ("3", [first_look.ALONE])):
        slept.clear()
        monkeypatch.setenv("LOCAL_RANK", rank) if rank else monkeypatch.delenv("LOCAL_RANK", raising=False)
        first_look.print_error_once("--data_file no.jsonl: no such file")
        assert (slept, capsys.readouterr().err) == (waits, "error: --data_file no.jsonl: no such file\n")
