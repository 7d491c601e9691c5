import json
import os
import signal
import subprocess
import time
from types import SimpleNamespace

import pytest

from stagewise.data.worker_signals import SIGNALS
from stagewise.training.preemption import PREEMPTED, Preemption
from tests.launching import ENVIRONMENT, ROOT, environment, python

NAMES = [number.name for number in SIGNALS]


@pytest.fixture(autouse=True)
def handlers():
    before = {number: signal.getsignal(number) for number in SIGNALS}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def control():
    return SimpleNamespace(should_save=False, should_training_stop=False)


def test_the_signals_are_those_of_schedulers_and_of_terminals():
    assert NAMES == ["SIGTERM", "SIGUSR1", "SIGUSR2", "SIGHUP"]


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_ends_training_behind_the_step_with_a_checkpoint(number):
    preemption = Preemption()
    preemption.on_train_begin(None, None, None)
    found = control()
    preemption.on_step_end(SimpleNamespace(device="cpu"), None, found)
    assert not found.should_save and not preemption.stopped
    os.kill(os.getpid(), number)
    preemption.on_step_end(SimpleNamespace(device="cpu"), None, found)
    assert found.should_save and found.should_training_stop and preemption.stopped
    assert preemption.asked == number.name


@pytest.mark.parametrize("number", SIGNALS)
def test_before_training_there_is_nothing_to_save(number, capfd):
    Preemption()
    with pytest.raises(SystemExit) as ended:
        os.kill(os.getpid(), number)
        time.sleep(5)
    assert ended.value.code == PREEMPTED == 143
    assert f"stopped by {number.name} before training began; start the same command again" in capfd.readouterr().err


def test_behind_the_last_step_the_run_finishes():
    preemption = Preemption()
    preemption.on_train_begin(None, None, None)
    preemption.on_train_end(None, None, None)
    os.kill(os.getpid(), signal.SIGTERM)
    assert preemption.asked == "SIGTERM" and not preemption.stopped


def test_what_nohup_ignores_stays_ignored():
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    preemption = Preemption()
    preemption.on_train_begin(None, None, None)
    os.kill(os.getpid(), signal.SIGHUP)
    assert preemption.asked is None
    os.kill(os.getpid(), signal.SIGUSR1)
    assert preemption.asked == "SIGUSR1"


def test_a_forked_worker_that_is_terminated_does_not_speak_for_the_run(capfd):
    Preemption()
    child = os.fork()
    if child == 0:
        os.kill(os.getpid(), signal.SIGUSR1)  # passed over
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(5)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 143
    assert capfd.readouterr().err == ""


def test_an_evaluation_alone_is_ended_by_a_signal(stage, tiny_checkpoint, tmp_path, monkeypatch):
    from transformers import Trainer

    def signalled(*_, **__):
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(5)

    monkeypatch.setattr(Trainer, "evaluate", signalled)
    words = ["--model_name_or_path", tiny_checkpoint("llama"), "--validation_file_dir", "data/finetune/validation"]
    words += ["--do_eval", "--output_dir", tmp_path / "out", "--report_to", "none", "--max_eval_samples", 2]
    with pytest.raises(SystemExit) as ended:
        stage("supervised_finetuning", *words)
    assert ended.value.code == 143


@pytest.mark.distributed
@pytest.mark.parametrize("name", ["SIGUSR1", "SIGHUP"])
def test_a_recipe_passes_on_that_a_signal_stopped_the_run(tiny_checkpoint, tmp_path, name):
    """Two processes: the recipe is told alone, as Slurm's --signal=B:USR1 and Kubernetes do."""
    words = ["--max_steps", "4000", "--save_steps", "5", "--eval_strategy", "no", "--report_to", "none", "--use_cpu"]
    process = subprocess.Popen(
        ["bash", "run_sft.sh", *words],
        cwd=ROOT,
        env={
            **environment(),
            **ENVIRONMENT,
            "MODEL": str(tiny_checkpoint("llama")),
            "OUTPUTS": str(tmp_path),
            "NPROC": "2",
            "GPUS": "0",
        },
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        for line in process.stderr:
            if "step 10/4000" in line:
                break
        process.send_signal(getattr(signal, name))
        rest = process.stderr.read()
        assert process.wait(timeout=120) == 143, rest[-3000:]
    finally:
        process.kill()
    manifest = json.loads((tmp_path / "sft" / "run.json").read_text())
    assert manifest["status"] == "stopped"
    assert manifest["stopped_by"] == name
    assert f"stopped by {name} after a complete checkpoint; --resume_from_checkpoint True continues from it" in rest
    assert (tmp_path / "sft" / f"checkpoint-{manifest['steps']}" / "whole.json").is_file()


def test_one_process_saves_on_a_scheduler_s_warning(tiny_checkpoint, tmp_path):
    words = ["--model_name_or_path", tiny_checkpoint("llama"), "--train_file_dir", "data/finetune/train"]
    words += ["--output_dir", tmp_path / "out", "--max_steps", 4000, "--logging_steps", 1, "--report_to", "none"]
    words += ["--max_train_samples", 8, "--eval_strategy", "no"]
    command = python("supervised_finetuning", *words)
    process = subprocess.Popen(command, cwd=ROOT, env=environment(), stderr=subprocess.PIPE, text=True)
    try:
        for line in process.stderr:
            if "step 2/4000" in line:
                break
        process.send_signal(signal.SIGUSR2)
        rest = process.stderr.read()
        assert process.wait(timeout=120) == 143, rest[-3000:]
    finally:
        process.kill()
    manifest = json.loads((tmp_path / "out" / "run.json").read_text())
    assert (manifest["status"], manifest["stopped_by"]) == ("stopped", "SIGUSR2")
