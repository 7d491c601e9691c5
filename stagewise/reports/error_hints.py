"""Hints for common errors that are not this project's own: memory, disk, Ctrl-C."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from stagewise.reports.terminal_text import print_error

NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
UNWRITTEN = ("PytorchStreamWriter failed writing", "inline_container.cc")  # raised by torch.save
UNWRITABLE = (errno.EACCES, errno.EPERM, errno.EROFS)

# for programs that chat or run inference
LESS_MEMORY = (
    "Lower --batch_size or --max_new_tokens, or load the model smaller: --torch_dtype bfloat16, --load_in_8bit, "
    "--load_in_4bit."
)


@contextmanager
def errors_explained(flag: str, place: str | Path | None, less_memory: str, status: int = 1) -> Iterator[None]:
    """Ends a program without training in one line if memory or disk ran out in the block; see `explain_error`.

    Args:
        flag: the flag of the output path.
        place: its value; None if nothing is written.
        less_memory: how a user of this program can save memory.
        status: the exit code.
    """
    try:
        yield
    except Exception as error:
        said = " ".join(str(error).split())[:300]
        if _is_out_of_memory(error):
            advice = f"out of memory. {less_memory} ({said})"
        elif _is_disk_full(error) and place is not None:
            advice = (
                f"--{flag} {place}: no space is left, or a file may not get so large. What stood there is untouched: "
                f"make room, then start the same command again. ({said})"
            )
        else:
            raise
        print_error(advice)
        raise SystemExit(status) from error


def explain_error(error: BaseException, output_dir: Path) -> str | None:
    """One line for an error that a user can fix; None for others, which keep Python's traceback."""
    said = str(error).strip().split("\n")[0]
    if _is_out_of_memory(error):
        return (
            "out of memory. Lower --per_device_train_batch_size (and raise --gradient_accumulation_steps by as much; "
            "in an evaluation --per_device_eval_batch_size), add --gradient_checkpointing, shorten the rows "
            "(--block_size, --model_max_length, --max_source_length, --max_target_length), or use "
            f"--torch_dtype bfloat16. ({said})"
        )
    if isinstance(error, KeyboardInterrupt):
        return "ended by Ctrl-C; --resume_from_checkpoint True continues from the last complete checkpoint, if any"
    if _is_disk_full(error):
        return (
            f"--output_dir {output_dir}: no space is left, or a file may not get so large. Complete checkpoints are "
            "untouched: make room (--save_total_limit 1 keeps the last one alone), then continue with "
            f"--resume_from_checkpoint True. ({said})"
        )
    if isinstance(error, OSError) and error.errno in UNWRITABLE and _within(error.filename, output_dir):
        return f"--output_dir {output_dir}: cannot be written to; give a folder of yours. ({said})"
    return None


def _is_out_of_memory(error: BaseException) -> bool:
    # on a CPU torch's allocator raises a RuntimeError
    texts = ("DefaultCPUAllocator: can't allocate memory", "not enough memory: you tried to allocate")
    texts += ("CUBLAS_STATUS_ALLOC_FAILED", "CUDA error: out of memory")  # allocated outside of torch
    known = isinstance(error, (torch.OutOfMemoryError, MemoryError))
    return known or (isinstance(error, RuntimeError) and any(text in str(error) for text in texts))


def _is_disk_full(error: BaseException) -> bool:
    if isinstance(error, OSError) and error.errno in NO_SPACE:
        return True
    # Rust libraries raise their own errors, tokenizers a bare Exception; torch.save a RuntimeError
    told = isinstance(error, Exception) and any(f"(os error {number})" in str(error) for number in NO_SPACE)
    return told or any(text in str(error) for text in UNWRITTEN)


def _within(path: str | bytes | None, folder: Path) -> bool:
    return path is not None and Path(str(path)).resolve().is_relative_to(folder.resolve())
