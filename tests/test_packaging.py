"""pyproject.toml, the requirement files, the `stagewise` command and the Dockerfile agree with each other."""

import importlib.util
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from stagewise.config.console import COMMANDS
from tools.check_environment import requirements

ROOT = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
EXTRAS = {
    name: set(map(str, map(Requirement, lines))) for name, lines in PROJECT["project"]["optional-dependencies"].items()
}
BASE = set(map(str, map(Requirement, PROJECT["project"]["dependencies"])))


def in_file(name: str) -> set[str]:
    return set(map(str, requirements(ROOT / name)))


def test_the_dependencies_are_those_of_requirements_txt():
    assert in_file("requirements.txt") == BASE


@pytest.mark.parametrize("extra", ["web", "evaluation", "docs", "serving", "dev"])
def test_an_extra_is_its_requirements_file(extra):
    assert in_file(f"requirements-{extra}.txt") - BASE == EXTRAS[extra]


def test_the_quantized_extra_is_among_what_is_tested():
    assert EXTRAS["quantized"] < EXTRAS["dev"]


def test_every_script_is_packaged():
    assert set(PROJECT["tool"]["setuptools"]["py-modules"]) == {path.stem for path in ROOT.glob("*.py")}


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_names_a_module_that_runs(command):
    source = Path(importlib.util.find_spec(COMMANDS[command][0]).origin).read_text(encoding="utf-8")
    assert '__name__ == "__main__"' in source


def stagewise(*words: str) -> subprocess.CompletedProcess:
    code = "from stagewise.config.console import main; main()"
    return subprocess.run([sys.executable, "-c", code, *words], cwd=ROOT, capture_output=True, text=True)


def test_a_command_does_what_its_script_does():
    script = subprocess.run(
        [sys.executable, "supervised_finetuning.py", "--help"], cwd=ROOT, capture_output=True, text=True
    )
    command = stagewise("sft", "--help")
    assert (command.returncode, command.stdout) == (0, script.stdout)
    assert stagewise("sft", "--no_such_flg").returncode == 2


def test_a_word_that_is_no_command():
    done = stagewise("mrge")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: mrge: no such command; did you mean merge?\n")
    assert stagewise().stdout.startswith("usage: stagewise COMMAND [FLAGS]")


def test_the_dockerfile_names_only_what_exists():
    text = (ROOT / "Dockerfile").read_text(encoding="utf-8").replace("\\\n", " ")
    for line in re.findall(r"^COPY (.*)$", text, re.MULTILINE):
        for source in line.split()[:-1]:
            assert (ROOT / source).exists(), source
    for file in re.findall(r"-[rc] (\S+)", text):
        assert f"{file} " in text[: text.index(f" {file}") + 200] and (ROOT / file).is_file(), file
    assert re.search(r"^FROM nvidia/cuda:[\d.]+-devel-ubuntu[\d.]+$", text, re.MULTILINE)
