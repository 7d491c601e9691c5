"""Two processes of a stage in a second each, in place of the twenty that torchrun and the imports take.

A server process imports the libraries once and runs no training itself. For each request it forks the processes of a
run, which meet over gloo as those of torchrun do. One request and one answer is a line of JSON each.
"""

from __future__ import annotations

import atexit
import json
import os
import runpy
import signal
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
_server: subprocess.Popen | None = None


def launch(
    script: str, words: list[str], environment: dict[str, str], port: int, log: Path, processes: int, timeout: float
) -> int:
    """Runs a script in `processes` forks of the server; 0 if all of them ended with 0, else the first other status.

    Args:
        script: path of the script.
        words: its command line.
        environment: of the processes, beside the variables that torchrun sets.
        port: free on this machine, for the processes to meet at.
        log: file for what all of them write.
        timeout: seconds after which the processes are killed.
    """
    global _server
    if _server is None or _server.poll() is not None:
        command = [sys.executable, "-m", "tests.zygote"]
        _server = subprocess.Popen(
            command, cwd=ROOT, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        atexit.register(_server.kill)
    request = {"script": script, "words": words, "environment": environment, "port": port, "log": str(log)}
    print(json.dumps({**request, "processes": processes, "timeout": timeout}), file=_server.stdin, flush=True)
    return json.loads(_server.stdout.readline())


def _serve() -> None:
    import torch.utils.tensorboard  # noqa: F401

    import ppo_training  # noqa: F401

    for line in sys.stdin:
        request = json.loads(line)
        print(_run(**request), flush=True)


def _run(
    script: str, words: list[str], environment: dict[str, str], port: int, log: str, processes: int, timeout: float
) -> int:
    until = time.monotonic() + timeout
    running = set()
    for rank in range(processes):
        pid = os.fork()
        if pid == 0:
            _become(script, words, {**environment, **_ranks(rank, processes, port)}, log)
        running.add(pid)
    result = 0
    while running:
        pid, status = os.waitpid(-1, os.WNOHANG)
        if pid == 0:
            if time.monotonic() > until:
                _signal(running, signal.SIGKILL)
                until = float("inf")
            time.sleep(0.01)
            continue
        running.discard(pid)
        code = os.waitstatus_to_exitcode(status)
        if code and not result:
            result = code
            _signal(running, signal.SIGTERM)  # as torchrun ends the others
    return result


def _ranks(rank: int, processes: int, port: int) -> dict[str, str]:
    number = {"RANK": rank, "LOCAL_RANK": rank, "GROUP_RANK": 0, "WORLD_SIZE": processes, "MASTER_PORT": port}
    number |= {"LOCAL_WORLD_SIZE": processes}
    return {name: str(value) for name, value in number.items()} | {"MASTER_ADDR": "127.0.0.1"}


def _signal(processes: set[int], number: int) -> None:
    for pid in processes:
        os.kill(pid, number)


def _become(script: str, words: list[str], environment: dict[str, str], log: str) -> None:
    """Never returns: runs the script as the interpreter would, with all that it writes in `log`."""
    code = 1
    try:
        os.environ.clear()
        os.environ.update(environment)
        out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        os.dup2(out, 1)
        os.dup2(out, 2)
        sys.stdout, sys.stderr = os.fdopen(1, "w", buffering=1), os.fdopen(2, "w", buffering=1)
        sys.argv = [script, *words]
        runpy.run_path(script, run_name="__main__")
        code = 0
    except SystemExit as ended:
        code = ended.code if isinstance(ended.code, int) else int(ended.code is not None)
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


if __name__ == "__main__":
    _serve()
