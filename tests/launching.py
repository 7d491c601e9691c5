"""Starts stage scripts as a user does, in processes of their own."""

import os
import socket
import subprocess
import sys
from pathlib import Path

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


def run(command: list[str], timeout: int = 600) -> str:
    """Runs a command from the project's root; its output, or an AssertionError that shows the end of it."""
    done = subprocess.run(
        command,
        cwd=ROOT,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        timeout=timeout,
        text=True,
    )
    assert done.returncode == 0, f"exit code {done.returncode}\n{done.stdout[-6000:]}"
    return done.stdout
