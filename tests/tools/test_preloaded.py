"""Commands in forks of a process that has the libraries loaded: as python itself runs them."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = """
import json, os, sys
print(json.dumps([__name__, sys.argv[1:], "ppo_training" in sys.modules, os.environ.get("LEFT"), sys.stdin.read()]))
os.environ["LEFT"] = "behind"
if sys.argv[1:] == ["kill"]:
    os.kill(os.getpid(), 15)
if sys.argv[1:] == ["raise"]:
    raise ValueError("told to")
sys.exit(int(sys.argv[1]))
"""


def run(
    commands: list[list[str]], folder: Path, start: tuple = ("-m", "tools.preloaded")
) -> tuple[list[str], str, str]:
    """The statuses, what the commands printed, and their stderr."""
    with open(folder / "printed", "w+b") as printed:
        words = b"".join(b"%d\0" % len(c) + b"".join(os.fsencode(word) + b"\0" for word in c) for c in commands)
        command = [sys.executable, *start]
        under = ["bash", "-c", f'exec 3>"{folder}/printed"; exec "$@"', "bash", *command]
        done = subprocess.run(under, input=words, capture_output=True, cwd=ROOT, timeout=120, check=False)
        return done.stdout.decode().split(), printed.read().decode(), done.stderr.decode()


def test_commands_run_as_python_runs_them(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    odd = ["7", "two words", "", "a\nline", "'\"$x", "感冒"]
    commands = [[str(script), *odd], [str(script), "0"], [str(script), "raise"], [str(script), "kill"], ["none.py"]]
    statuses, printed, errors = run([*commands, ["-m", "tools.report", "--nonsense"]], tmp_path)
    assert statuses == ["7", "0", "1", "143", "1", "2"]
    lines = [json.loads(line) for line in printed.splitlines() if line.startswith("[")]
    assert lines[0] == ["__main__", odd, True, None, ""]
    assert lines[1] == ["__main__", ["0"], True, None, ""], "a command leaves nothing behind for the next"
    assert "ValueError: told to" in errors and "none.py" in errors and "--nonsense" in errors


@pytest.mark.parametrize("cut", [b"2\0one\0", b"2\0one\0two"])
def test_half_a_command_is_an_error(cut, tmp_path):
    code = "import sys; from tools import preloaded; list(preloaded.read_commands(sys.stdin.buffer))"
    done = subprocess.run([sys.executable, "-c", code], input=cut, capture_output=True, cwd=ROOT, check=False)
    assert done.returncode == 1 and b"ends within a command" in done.stderr


def test_where_loading_started_cuda_each_command_is_a_process_of_its_own(tmp_path):
    """bitsandbytes starts CUDA on import; a fork could not use it any more."""
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    started = "import torch; torch.cuda.is_initialized = lambda: True; from tools.preloaded import main; main()"
    statuses, printed, _ = run([[str(script), "7"], [str(script), "kill"]], tmp_path, ("-c", started))
    assert statuses == ["7", "143"]
    assert json.loads(printed.splitlines()[0]) == ["__main__", ["7"], False, None, ""], "nothing is loaded yet"
