"""Starts stage scripts as a user does, in processes of their own."""

import os
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

from tests import zygote

ROOT = Path(__file__).resolve().parent.parent
ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "HF_HUB_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "CUDA_VISIBLE_DEVICES": "",
}


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def environment() -> dict[str, str]:
    """This process's environment without what an earlier in-process run left in it."""
    ours = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT", "TENSORBOARD_LOGGING_DIR")
    kept = {k: v for k, v in os.environ.items() if k not in ours and not k.startswith(("ACCELERATE_", "DS_"))}
    return {**kept, **ENVIRONMENT}


def python(script: str, *words) -> list[str]:
    return [sys.executable, str(ROOT / f"{script}.py"), *map(str, words)]


def torchrun(script: str, *words, launcher=("--nproc_per_node", "2")) -> list[str]:
    port = () if "--master_port" in launcher else ("--master_addr", "127.0.0.1", "--master_port", free_port())
    command = [sys.executable, "-m", "torch.distributed.run", *launcher, *port, ROOT / f"{script}.py", *words]
    return [str(word) for word in command]


def run(command: list[str], timeout: int = 600, torchrun: bool = False) -> str:
    """Runs a command from the project's root; its output, or an AssertionError that shows the end of it.

    Args:
        command: what `python` or `torchrun` gives.
        timeout: seconds.
        torchrun: True starts a command of `torchrun` by torchrun itself; else its processes are forks, which skip the
            imports (tests/zygote.py).
    """
    if command[1:3] == ["-m", "torch.distributed.run"] and not torchrun:
        code, output = _run_in_forks(command, timeout)
    else:
        done = subprocess.run(
            command,
            cwd=ROOT,
            env=environment(),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            timeout=timeout,
            text=True,
        )
        code, output = done.returncode, done.stdout
    assert code == 0, f"exit code {code}\n{output[-6000:]}"
    return output


def _run_in_forks(command: list[str], timeout: int) -> tuple[int, str]:
    script = next(index for index, word in enumerate(command) if word.endswith(".py"))
    options = dict(zip(command[3:script:2], command[4:script:2], strict=True))
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "log"
        code = zygote.launch(
            command[script],
            command[script + 1 :],
            environment(),
            int(options["--master_port"]),
            log,
            int(options["--nproc_per_node"]),
            timeout,
        )
        return code, log.read_text(encoding="utf-8", errors="replace")
