"""Runs the project's commands in processes that have the libraries loaded already.

    python -m tools.preloaded 3>&1 <commands >statuses &      # in bash, with two named pipes

Loading torch, transformers and peft takes each process 5 seconds and more; `run_pipeline.sh` starts eleven. This one
loads them once and forks for each command, which then runs as `python script.py flags…` or `python -m module flags…`
would. Where loading them has started CUDA, which no fork could use (bitsandbytes does), each is a fresh process.

Read from stdin, each ended by a zero byte: the number of words, then the words. Written to stdout: the exit status of
each command, a line each. A command's own stdout is fd 3.
"""

from __future__ import annotations

import os
import runpy
import signal
import sys
import warnings
from collections.abc import Iterator
from typing import BinaryIO

# Asking CUDA itself for its devices would start it in this process, and then no fork of it could use them.
os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")


def read_commands(file: BinaryIO) -> Iterator[list[str]]:
    """Each command's words.

    Raises:
        EOFError: the input ends within a command.
    """
    while (count := _word(file)) is not None:
        words = [_word(file) for _ in range(int(count))]
        if None in words:
            raise EOFError("the input ends within a command")
        yield words


def _word(file: BinaryIO) -> str | None:
    """The bytes up to the next zero byte as text, None at the end of the file."""
    found = bytearray()
    while (byte := file.read(1)) not in (b"\0", b""):
        found += byte
    return None if byte == b"" else os.fsdecode(bytes(found))


def become(words: list[str]) -> None:
    """Runs a script or `-m module` with its flags, as the interpreter does for its own command line."""
    is_module = words[0] == "-m"
    sys.argv = words[1:] if is_module else words
    if is_module:
        runpy.run_module(words[1], run_name="__main__", alter_sys=True)
    else:
        runpy.run_path(words[0], run_name="__main__")


def main() -> None:
    # What any stage needs, and what the stages load when they write their logs and curves.
    import matplotlib.pyplot  # noqa: F401
    import torch
    import torch.utils.tensorboard

    import ppo_training  # noqa: F401

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the command
    # Python 3.12 warns of threads at a fork: those of libraries, idle here, start anew in a child that needs them.
    warnings.filterwarnings("ignore", "This process .* is multi-threaded", DeprecationWarning)
    commands = os.fdopen(os.dup(0), "rb", buffering=0)
    can_fork = not torch.cuda.is_initialized()  # bitsandbytes starts CUDA when it is imported
    for words in read_commands(commands):
        child = os.fork()
        if child == 0:
            signal.signal(signal.SIGINT, signal.default_int_handler)
            os.dup2(3, 1)
            os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
            if not can_fork:
                os.execv(sys.executable, [sys.executable, *words])
            become(words)
            return
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        os.write(1, f"{status if status >= 0 else 128 - status}\n".encode())


if __name__ == "__main__":
    main()
