import errno
import json
import os
from pathlib import Path

import pytest
import torch
from transformers import Trainer
from xxhash import xxh3_128_hexdigest

from stagewise.artifacts.checkpoints import (
    LEFT,
    MARK,
    checkpoints,
    is_whole,
    last_whole,
    leave_later,
    mark_whole,
    resume_point,
    rotate,
    unmark,
    why_not_whole,
)
from stagewise.artifacts.file_hashes import hash_files
from stagewise.errors import ArgumentError
from stagewise.training import callbacks
from tests.conftest import adapter_weights


def make(folder, step, whole=True):
    path = folder / f"checkpoint-{step}"
    (path / "sub").mkdir(parents=True)
    (path / "adapter.bin").write_bytes(b"12345")
    (path / "sub" / "rng.pth").write_bytes(b"1")
    if whole:
        mark_whole(path)
    return path


MARKED = {
    "adapter.bin": {"size": 5, "xxh3_128": xxh3_128_hexdigest(b"12345")},
    "sub/rng.pth": {"size": 1, "xxh3_128": xxh3_128_hexdigest(b"1")},
}


def test_the_mark_lists_every_file_with_its_size_and_hash(tmp_path):
    path = make(tmp_path, 5)
    assert json.loads((path / MARK).read_text()) == MARKED
    assert is_whole(path)


def test_a_mark_that_a_killed_run_left_unfinished_is_written_anew(tmp_path):
    path = make(tmp_path, 5, whole=False)
    (path / (MARK + ".tmp")).write_text("{")
    mark_whole(path)
    assert json.loads((path / MARK).read_text()) == MARKED
    assert is_whole(path)


def test_a_missing_or_short_file_is_noticed(tmp_path):
    path = make(tmp_path, 5)
    (path / "adapter.bin").write_bytes(b"123")
    assert not is_whole(path)
    path = make(tmp_path, 6)
    (path / "sub" / "rng.pth").unlink()
    assert not is_whole(path)
    assert not is_whole(make(tmp_path, 7, whole=False))


@pytest.mark.parametrize("content", [b"12345"[::-1], bytes(5), b"1234\xb5"])
def test_a_changed_byte_is_noticed_although_the_size_is_right(tmp_path, content):
    path, whole = make(tmp_path, 5), make(tmp_path, 4)
    (path / "adapter.bin").write_bytes(content)
    assert why_not_whole(path) == "is damaged: adapter.bin is not what was saved (its hash differs)"
    assert is_whole(path, contents=False)
    assert resume_point(str(tmp_path), "True") == whole
    with pytest.raises(ArgumentError, match=r"checkpoint-5: this checkpoint is damaged: adapter\.bin"):
        resume_point(str(tmp_path), str(path))


def test_the_log_says_which_checkpoint_is_passed_over_and_why(tmp_path, logged):
    make(tmp_path, 1)
    (make(tmp_path, 2) / "adapter.bin").write_bytes(bytes(5))
    (make(tmp_path, 3) / "adapter.bin").unlink()
    make(tmp_path, 4, whole=False)
    assert last_whole(tmp_path).name == "checkpoint-1"
    assert "checkpoint-2 is damaged: adapter.bin is not what was saved (its hash differs): passed over" in logged[2]
    assert "checkpoint-3 is not whole: adapter.bin is missing: passed over" in logged[1]
    assert "checkpoint-4 is not whole: it has no whole.json (the run ended while it was written)" in logged[0]


BROKEN_MARKS = {
    "half": b'{"adapter.bin": {"si',
    "empty": b"",
    "list": b"[]",
    "null": b"null",
    "not UTF-8": b'{"adapter.bin\xff": 5}',
    "deep": b'{"a":' * 100_000,
    "no files": b"{}",
    "size as text": b'{"adapter.bin": "5"}',
    "hash as number": b'{"adapter.bin": {"size": 5, "xxh3_128": 1}}',
    "outside": b'{"../../etc/passwd": 5}',
    "absolute": b'{"/etc/hostname": 5}',
}


@pytest.mark.parametrize("mark", BROKEN_MARKS.values(), ids=BROKEN_MARKS)
def test_a_broken_mark_stops_neither_a_save_nor_a_resume(tmp_path, logged, mark):
    """Of an older checkpoint at the next save, which removes old ones; of the newest on resuming."""
    _, second, third, broken = (make(tmp_path, step) for step in (1, 2, 3, 9))
    (broken / MARK).write_bytes(mark)
    rotate(tmp_path, 2)
    assert checkpoints(tmp_path) == [second, third, broken]
    assert resume_point(str(tmp_path), "True") == third
    assert f"{broken} is damaged: {broken}/whole.json: " in logged[0]
    with pytest.raises(ArgumentError, match="this checkpoint is damaged: .*whole.json: "):
        resume_point(str(tmp_path), str(broken))


def test_a_mark_of_an_earlier_version_counts_by_sizes(tmp_path, logged):
    path = make(tmp_path, 3)
    (path / MARK).write_text('{"adapter.bin": 5, "sub/rng.pth": 1}')
    assert resume_point(str(tmp_path), "True") == path
    assert "its whole.json has no hashes, as an earlier version wrote it" in logged[0]
    (path / MARK).write_text('{"adapter.bin": 4, "sub/rng.pth": 1}')
    assert why_not_whole(path) == "is not whole: adapter.bin has 5 bytes, not 4"


def test_a_file_that_cannot_be_read_makes_a_checkpoint_not_whole(tmp_path, monkeypatch):
    path, whole = make(tmp_path, 3), make(tmp_path, 2)

    def broken_disk(paths, durable=False):
        for path in paths:
            if path.parent.parent.name == "checkpoint-3":
                raise OSError(errno.EIO, "Input/output error", str(path))
        return hash_files(paths, durable)

    monkeypatch.setattr("stagewise.artifacts.checkpoints.hash_files", broken_disk)
    assert why_not_whole(path) == f"cannot be read: {path}/sub/rng.pth: Input/output error"
    assert last_whole(tmp_path) == whole


@pytest.mark.parametrize("state", ["", "[]", '{"global_step": "3"}', '{"epoch": 1}'])
def test_a_trainer_state_that_says_no_step_makes_a_checkpoint_not_whole(tmp_path, state):
    path = make(tmp_path, 3, whole=False)
    (path / "trainer_state.json").write_text(state)
    mark_whole(path)
    assert "is damaged: " in why_not_whole(path) and "trainer_state.json: " in why_not_whole(path)


def test_files_and_folders_are_on_disk_before_the_mark_is(tmp_path, monkeypatch):
    path = make(tmp_path, 3, whole=False)
    synced, real = [], os.fsync

    def fsync(handle):
        synced.append((Path(f"/proc/self/fd/{handle}").resolve(), (path / MARK).is_file()))
        real(handle)

    monkeypatch.setattr("os.fsync", fsync)
    mark_whole(path)
    before = {name for name, marked in synced if not marked}
    assert before == {
        *(path / name for name in ("adapter.bin", "sub/rng.pth", "whole.json.tmp", "sub")),
        path,
        tmp_path,
    }
    assert synced[-1] == (path, True), "the mark's name in its folder"


def test_last_whole_passes_over_broken_ones_and_counts_steps_as_numbers(tmp_path):
    make(tmp_path, 9)
    make(tmp_path, 10)
    make(tmp_path, 11, whole=False)
    (tmp_path / "checkpoint-x").mkdir()
    assert [p.name for p in checkpoints(tmp_path)] == ["checkpoint-9", "checkpoint-10", "checkpoint-11"]
    assert last_whole(tmp_path).name == "checkpoint-10"


def test_resume_point(tmp_path):
    assert resume_point(str(tmp_path), None) is None
    assert resume_point(str(tmp_path), "True") is None
    whole, broken = make(tmp_path, 2), make(tmp_path, 4, whole=False)
    assert resume_point(str(tmp_path), "True") == whole
    assert resume_point(str(tmp_path), str(whole)) == whole
    assert resume_point(str(tmp_path), "False") is None
    with pytest.raises(ArgumentError, match="not whole"):
        resume_point(str(tmp_path), str(broken))
    with pytest.raises(ArgumentError, match="no such folder"):
        resume_point(str(tmp_path), str(tmp_path / "nothing"))


def test_those_behind_the_one_that_is_gone_on_from_count_by_name_alone(tmp_path):
    first, second, third = (make(tmp_path, step) for step in (1, 2, 3))
    (first / "trainer_state.json").write_text('{"global_step": 1}')
    mark_whole(first)
    leave_later(tmp_path, first)
    assert last_whole(tmp_path) == first
    rotate(tmp_path, 1)
    assert checkpoints(tmp_path) == [first, second, third], "nothing is removed for a run that was left"
    make(tmp_path, 4)
    assert last_whole(tmp_path).name == "checkpoint-4"
    assert resume_point(str(tmp_path), str(third)) == third
    assert is_whole(third)
    unmark(second)
    with pytest.raises(ArgumentError, match="not whole"):
        resume_point(str(tmp_path), str(second))


def test_rotate_keeps_the_newest_the_best_and_what_is_broken(tmp_path):
    for step in (1, 2, 3, 4):
        make(tmp_path, step)
    make(tmp_path, 5, whole=False)
    rotate(tmp_path, 2, best=str(tmp_path / "checkpoint-1"))
    assert [p.name for p in checkpoints(tmp_path)] == ["checkpoint-1", "checkpoint-4", "checkpoint-5"]
    rotate(tmp_path, None)
    assert len(checkpoints(tmp_path)) == 3


def test_a_run_killed_while_it_removes_a_checkpoint_leaves_none_with_half_its_files(tmp_path, monkeypatch):
    for step in (1, 2, 3):
        make(tmp_path, step)

    def killed(folder):
        next(path for path in sorted(folder.rglob("*")) if path.is_file()).unlink()
        raise KeyboardInterrupt

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr("stagewise.artifacts.checkpoints.shutil.rmtree", killed)
        rotate(tmp_path, 2)
    assert [p.name for p in checkpoints(tmp_path)] == ["checkpoint-2", "checkpoint-3"]
    rotate(tmp_path, 2)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["checkpoint-2", "checkpoint-3"]


def test_a_state_is_loaded_to_the_numbered_cpu_of_one_of_several_processes(tmp_path):
    assert callbacks.Resumes  # whose module makes torch.load know it
    torch.save({"step": torch.arange(3)}, tmp_path / "optimizer.pt")
    found = torch.load(tmp_path / "optimizer.pt", map_location=torch.device("cpu", 1), weights_only=True)
    assert found["step"].tolist() == [0, 1, 2]


@pytest.fixture
def words(tiny_checkpoint, tmp_path):
    """words("supervised_finetuning"): two steps of a stage, each with a checkpoint, in tmp_path/out."""

    def make(script):
        data = "data/reward" if script == "reward_modeling" else "data/finetune"
        found = ["--model_name_or_path", tiny_checkpoint("llama"), "--output_dir", tmp_path / "out", "--max_steps", 2]
        found += ["--train_file_dir", f"{data}/train", "--validation_file_dir", f"{data}/validation"]
        found += ["--max_train_samples", 12, "--max_eval_samples", 2, "--save_steps", 1, "--report_to", "none"]
        found += ["--lr_scheduler_type", "constant", "--learning_rate", 0.01]
        if script == "ppo_training":
            found += ["--reward_model_name_or_path", tiny_checkpoint("llama", task="score")]
            found += ["--max_target_length", 8, "--batch_size", 4, "--ppo_epochs", 1]
        return found

    return make


SCRIPTS = ["supervised_finetuning", "reward_modeling", "ppo_training"]


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_run_that_was_stopped_behind_its_last_step_takes_no_other(stage, words, script):
    """It is evaluated and saved: what a kill in the last evaluation left undone."""
    flags = words(script)
    out = stage(script, *flags)
    whole = adapter_weights(out)
    for name in ("run.json", "adapter_model.safetensors", "eval_results.json"):
        (out / name).unlink()
    stage(script, *flags, "--resume_from_checkpoint", "True")
    assert json.loads((out / "run.json").read_text())["steps"] == 2
    assert (out / "eval_results.json").is_file()
    for name, value in adapter_weights(out).items():
        assert torch.equal(value, whole[name]), name


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_checkpoint_that_is_written_over_does_not_count_meanwhile(stage, words, monkeypatch, script):
    """A run that continues from an earlier checkpoint, and is killed while it writes a later one anew."""
    flags = words(script)
    out = stage(script, *flags)
    first, second = checkpoints(out)[-2:]
    assert is_whole(first) and is_whole(second)

    def killed(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(Trainer, "_save_optimizer_and_scheduler", killed)
    with pytest.raises(SystemExit, match="130"):
        stage(script, *flags, "--learning_rate", 0.02, "--overwrite_output_dir", "--resume_from_checkpoint", first)
    assert not {MARK, LEFT} & {path.name for path in second.iterdir()}  # sizes alone may be the same
    assert last_whole(out) == first
