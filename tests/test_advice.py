import errno

import pytest
import torch

from stagewise.advice import advice_on


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
        (RuntimeError("PytorchStreamWriter failed writing file data/0: file write failed"), "no space"),
        (PermissionError(errno.EACCES, "Permission denied", "out/run.json.tmp"), "out: cannot be written"),
        (OSError(errno.EROFS, "Read-only file system", "out"), "--output_dir out: cannot be written to"),
    ],
)
def test_what_to_do(tmp_path, monkeypatch, error, says):
    monkeypatch.chdir(tmp_path)
    found = advice_on(error, tmp_path.joinpath("out").relative_to(tmp_path))
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
    assert advice_on(error, tmp_path) is None
