"""Runs that end at a random moment: what continues from there ends bit for bit as if nothing had happened.

`--faults N` is how many moments are tried of each kind; each follows from its number alone.
"""

import os
import random
import shutil
import signal
import time

import pytest

from stagewise.artifacts.checkpoints import checkpoints, is_whole
from tests.faults.forks import run_apart, wait_for
from tests.faults.tiny_runs import is_same, manifest, moments_of, weights_of, words_of

KILLED = ("supervised_finetuning", "dpo_training", "ppo_training")
STEPS = 6


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """undisturbed(script): its words without an output directory, a whole run's weights, optimizer and seconds."""
    from tests.conftest import build_tiny_model, build_tiny_tokenizer

    made = {}

    def checkpoint(family, task="causal", tokenizer=None):
        folder = tmp_path_factory.mktemp(f"{family}-{task}")
        build_tiny_model(family, task=task).save_pretrained(folder)
        (tokenizer or build_tiny_tokenizer()).save_pretrained(folder)
        return folder

    def run(script):
        if script not in made:
            folder = tmp_path_factory.mktemp(script)
            words = words_of(script, folder, checkpoint, lora_dropout=0.1, output_dir=None, save_total_limit=2)
            ended = run_apart(script, [*words, "--output_dir", str(folder / "out")], folder / "log")
            assert ended.code == 0, ended.said
            last = folder / "out" / f"checkpoint-{STEPS}"
            made[script] = words, weights_of(folder / "out"), moments_of(last), ended.seconds
        return made[script]

    return run


def trains(log):
    """Waits until a fork's run has begun its steps."""
    wait_for(lambda: log.is_file() and "step 1/" in log.read_text(errors="replace"))


def goes_on_to_the_same_end(script, words, out, log, expected):
    ended = run_apart(script, [*words, "--output_dir", str(out), "--resume_from_checkpoint", "True"], log)
    assert ended.code == 0, ended.said
    weights, moments = expected
    assert is_same(weights_of(out), weights)
    assert is_same(moments_of(out / f"checkpoint-{STEPS}"), moments)
    assert manifest(out)["status"] == "finished"
    assert all(is_whole(path) for path in checkpoints(out))
    return ended.said


@pytest.mark.parametrize("script", KILLED)
def test_killed_at_a_random_moment(script, undisturbed, tmp_path, fault):
    words, *expected, seconds = undisturbed(script)
    number = random.Random(f"{script} {fault}")
    out, log = tmp_path / "out", tmp_path / "log"
    for again in range(number.choice([1, 1, 2])):  # a run that continues can be killed as well

        def kill(pid):
            time.sleep(number.uniform(0.2, 1.05) * seconds)
            os.kill(pid, signal.SIGKILL)

        more = ["--resume_from_checkpoint", "True"] if again else []
        ended = run_apart(script, [*words, "--output_dir", str(out), *more], log, during=kill)
        assert ended.code in (0, -signal.SIGKILL), ended.said
    goes_on_to_the_same_end(script, words, out, log, expected)


@pytest.mark.parametrize("name", ["SIGTERM", "SIGUSR1", "SIGUSR2", "SIGHUP"])
def test_a_signal_saves_and_the_run_goes_on(name, undisturbed, tmp_path, fault):
    script = "supervised_finetuning"
    words, *expected, seconds = undisturbed(script)
    number = random.Random(f"{name} {fault}")
    out, log = tmp_path / "out", tmp_path / "log"

    def send(pid):
        trains(log)
        time.sleep(number.uniform(0, 0.15) * seconds)
        os.kill(pid, getattr(signal, name))

    ended = run_apart(script, [*words, "--output_dir", str(out)], log, during=send)
    assert ended.code in (0, 143), ended.said  # 0: it had taken its last step
    if ended.code:
        assert manifest(out)["status"] == "stopped"
        assert is_whole(checkpoints(out)[-1])
    goes_on_to_the_same_end(script, words, out, log, expected)


@pytest.fixture(scope="module")
def interrupted(undisturbed, tmp_path_factory):
    """A run that was killed with two complete checkpoints behind it."""
    words, *_ = undisturbed("supervised_finetuning")
    out = tmp_path_factory.mktemp("interrupted") / "out"

    def kill(pid):
        wait_for(lambda: (out / "checkpoint-5" / "whole.json").is_file())
        os.kill(pid, signal.SIGKILL)

    run_apart("supervised_finetuning", [*words, "--output_dir", str(out)], out.parent / "log", during=kill)
    shutil.rmtree(out / "checkpoint-6", ignore_errors=True)
    return out


def flip(path, number):
    content = bytearray(path.read_bytes())
    content[number.randrange(len(content))] ^= 1 << number.randrange(8)
    path.write_bytes(content)


def cut(path, number):
    os.truncate(path, number.randrange(path.stat().st_size))


def blank(path, number):
    path.write_bytes(bytes(path.stat().st_size))


def lose(path, number):
    path.unlink()


DAMAGES = (flip, cut, blank, lose)


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_is_passed_over(damage, interrupted, undisturbed, tmp_path, fault):
    words, *expected, _ = undisturbed("supervised_finetuning")
    number = random.Random(f"{damage.__name__} {fault}")
    out = shutil.copytree(interrupted, tmp_path / "out")
    files = sorted(path for path in (out / "checkpoint-5").rglob("*") if path.is_file() and path.stat().st_size)
    damaged = number.choice(files)
    damage(damaged, number)
    said = goes_on_to_the_same_end("supervised_finetuning", words, out, tmp_path / "log", expected)
    if damaged.name != "whole.json" or damage is not flip:  # a flipped bit there may be one of white space
        assert "checkpoint-5" in said.split("step 5/")[0], f"{damaged.name} is noticed"


def test_a_disk_that_is_full_ends_the_run_in_one_line(undisturbed, tmp_path, fault):
    script = "supervised_finetuning"
    words, *expected, _ = undisturbed(script)
    number = random.Random(f"disk {fault}")
    out, log = tmp_path / "out", tmp_path / "log"
    ended = run_apart(script, [*words, "--output_dir", str(out)], log, largest_file=number.randrange(200, 60_000))
    assert ended.code == 1, ended.said
    assert "Traceback" not in ended.said
    assert "no space is left, or a file may not get so large" in ended.said.splitlines()[-1]
    goes_on_to_the_same_end(script, words, out, log, expected)
