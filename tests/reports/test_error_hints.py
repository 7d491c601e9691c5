import errno
import resource

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

import merge_peft_adapter
from stagewise.reports.error_hints import errors_explained, explain_error


class SafetensorError(Exception):
    """As the library's, which cannot be made by hand."""


def full(number):
    return OSError(number, "No space left on device", "out/checkpoint-2/optimizer.pt")


@pytest.mark.parametrize(
    ("error", "says"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB\nmore"), "out of memory. Lower --per_de"),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried …"), "out of memory. Low"),
        (RuntimeError("CUDA error: out of memory\nCUDA kernel errors might be"), "out of memory. Lower --per_device"),
        (MemoryError(), "out of memory. Lower --per_device_train_batch_size"),
        (KeyboardInterrupt(), "ended by Ctrl-C; --resume_from_checkpoint True"),
        (full(errno.ENOSPC), "--output_dir out: no space is left"),
        (full(errno.EDQUOT), "--output_dir out: no space is left"),
        (SafetensorError("Error while serializing: I/O error: … (os error 28)"), "--output_dir out: no space is left"),
        (Exception("File too large (os error 27)"), "--output_dir out: no space is left"),  # tokenizers'
        (RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 704 vs 598"), "no space"),
        (RuntimeError("PytorchStreamWriter failed writing file data/0: file write failed"), "no space"),
        (PermissionError(errno.EACCES, "Permission denied", "out/run.json.tmp"), "out: cannot be written"),
        (OSError(errno.EROFS, "Read-only file system", "out"), "--output_dir out: cannot be written to"),
    ],
)
def test_what_to_do(tmp_path, monkeypatch, error, says):
    monkeypatch.chdir(tmp_path)
    found = explain_error(error, tmp_path.joinpath("out").relative_to(tmp_path))
    assert says in found
    assert "\n" not in found


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("mat1 and mat2 shapes cannot be multiplied"),
        PermissionError(errno.EACCES, "Permission denied", "/etc/shadow"),
        OSError("no file named model.safetensors"),
        KeyError("labels"),
    ],
)
def test_other_errors_keep_their_traceback(tmp_path, error):
    assert explain_error(error, tmp_path) is None


# ── programs that train nothing ─────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("error", "says"),
    [
        (
            full(errno.ENOSPC),
            "error: --output_file answers.jsonl: no space is left, or a file may not get so large. W",
        ),
        (SafetensorError("… I/O error: File too large (os error 27)"), "error: --output_file answers.jsonl: no space"),
        (
            torch.OutOfMemoryError("CUDA out of memory.\nTried"),
            "error: out of memory. Take less. (CUDA out of memory. T",
        ),
        (MemoryError(), "error: out of memory. Take less."),
    ],
)
def test_programs_end_in_one_line(capsys, error, says):
    with pytest.raises(SystemExit) as ended, errors_explained("output_file", "answers.jsonl", "Take less.", status=2):
        raise error
    assert ended.value.code == 2
    said = capsys.readouterr().err
    assert said.startswith(says) and said.count("\n") == 1


def test_errors_without_advice_stay_as_they_are():
    with pytest.raises(KeyError), errors_explained("output_file", "answers.jsonl", "Take less."):
        raise KeyError("labels")
    with pytest.raises(OSError, match="No space"), errors_explained("output_dir", None, "Take less."):
        raise full(errno.ENOSPC)


@pytest.fixture
def small_files():
    """No file may get larger than 20 KB, as under `ulimit -f 20`."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, before[1]))
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_merge_that_the_disk_has_no_room_for_is_one_line(tiny_checkpoint, tmp_path, capsys, small_files):
    base = tiny_checkpoint("llama")
    wrapped = get_peft_model(AutoModelForCausalLM.from_pretrained(base), LoraConfig(target_modules=["q_proj"]))
    wrapped.save_pretrained(tmp_path / "adapter")
    words = ["--base_model", base, "--lora_model", tmp_path / "adapter", "--output_dir", tmp_path / "out"]
    capsys.readouterr()
    small_files()
    with pytest.raises(SystemExit, match="1"):
        merge_peft_adapter.main([str(word) for word in words])
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error:")]
    assert len(errors) == 1
    assert f"--output_dir {tmp_path}/out: no space is left, or a file may not get so large" in errors[0]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter"]


def test_a_stage_that_the_disk_has_no_room_for_is_one_line(stage, tiny_checkpoint, tmp_path, capsys, small_files):
    words = ["--model_name_or_path", tiny_checkpoint("llama"), "--train_file_dir", "data/finetune/train"]
    words += ["--output_dir", tmp_path / "out", "--max_train_samples", 4, "--max_steps", 2, "--report_to", "none"]
    small_files()
    with pytest.raises(SystemExit, match="1"):
        stage("supervised_finetuning", *words, "--save_steps", 1, "--eval_strategy", "no")
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error:")]
    assert len(errors) == 1
    assert f"--output_dir {tmp_path}/out: no space is left, or a file may not get so large" in errors[0]
