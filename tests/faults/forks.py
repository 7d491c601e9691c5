"""A stage's run in a fork of this process, where it can be killed, sent a signal or kept from the disk: a second each
in place of the ten that a new Python takes to import everything.
"""

from __future__ import annotations

import importlib
import os
import resource
import signal
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

PATIENCE = 120  # seconds after which a fork that hangs is killed


@dataclass
class Ended:
    """How a fork ended: its exit code, below 0 for the signal that killed it, and all that it wrote."""

    code: int
    said: str
    seconds: float


def run_apart(
    script: str,
    words: Sequence[str],
    log: Path,
    *,
    during: Callable[[int], None] = lambda pid: None,
    largest_file: int | None = None,
) -> Ended:
    """Runs a stage script in a fork.

    Args:
        during: called with the fork's process id while it runs.
        largest_file: bytes beyond which no file can grow, as on a full disk.
    """
    module = importlib.import_module(script)  # in this process, so that each fork has it
    began = time.monotonic()
    pid = os.fork()
    if pid == 0:
        _child(module, script, words, log, largest_file)
    try:
        during(pid)
        status = _wait(pid, began + PATIENCE)
    finally:
        _end(pid)
    return Ended(os.waitstatus_to_exitcode(status), log.read_text(errors="replace"), time.monotonic() - began)


def _child(module, script: str, words: Sequence[str], log: Path, largest_file: int | None) -> None:
    """Never returns: a fork that came back would continue with the tests of its parent."""
    code = 70
    try:
        out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(out, 1)
        os.dup2(out, 2)
        sys.stdout = sys.stderr = os.fdopen(out, "w", buffering=1)
        sys.argv = [f"{script}.py", *words]
        for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2):
            signal.signal(number, signal.SIG_DFL)
        if largest_file is not None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (largest_file, largest_file))
        module.main()
        code = 0
    except SystemExit as ended:
        code = ended.code if isinstance(ended.code, int) else 1
    except BaseException:
        traceback.print_exc()
        code = 1
    finally:
        sys.stderr.flush()
        os._exit(code)


def wait_for(there: Callable[[], bool]) -> None:
    """Returns once something that a fork makes is there; raises TimeoutError where it never comes."""
    until = time.monotonic() + PATIENCE
    while not there():
        if time.monotonic() > until:
            raise TimeoutError(f"not there after {PATIENCE} s")
        time.sleep(0.01)


def _wait(pid: int, until: float) -> int:
    while time.monotonic() < until:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return status
        time.sleep(0.005)
    raise TimeoutError(f"the fork still runs after {PATIENCE} s")


def _end(pid: int) -> None:
    try:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    except (ProcessLookupError, ChildProcessError):
        pass  # it has ended and was waited for
