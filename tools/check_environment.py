"""Checks whether this environment has what the requirement files name, and prints what is missing.

    python -m tools.check_environment requirements.txt

Exit status 0: everything is installed; 1: something is missing that pip can install; 2: torch is installed but too
old, and it is not replaced.
"""

from __future__ import annotations

import argparse
import re
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

try:
    from packaging.requirements import Requirement
except ImportError:  # in a new environment; pip brings its own copy
    from pip._vendor.packaging.requirements import Requirement


def requirements(path: Path) -> list[Requirement]:
    """The requirements of a file and of the files it includes with `-r`, without comments."""
    found = []
    for line in path.read_text(encoding="utf-8").splitlines():
        line = re.sub(r"(^|\s)#.*", "", line).strip()
        if line.startswith("-r "):
            found += requirements(path.parent / line[3:].strip())
        elif line:
            found.append(Requirement(line))
    return found


def unmet(wanted: list[Requirement]) -> list[tuple[Requirement, str | None]]:
    """The unmet requirements, each with the installed version."""
    lacking = []
    for requirement in wanted:
        try:
            there = version(requirement.name)
        except PackageNotFoundError:
            lacking.append((requirement, None))
            continue
        if not requirement.specifier.contains(there, prereleases=True):
            lacking.append((requirement, there))
    return lacking


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="+", type=Path, help="requirement files")
    paths = parser.parse_args(argv).files
    lacking = unmet([requirement for path in paths for requirement in requirements(path)])
    if not lacking:
        return
    print("missing:", ", ".join(f"{r} (found {there})" if there else str(r) for r, there in lacking), file=sys.stderr)
    for requirement, there in lacking:
        if requirement.name == "torch" and there:
            print(
                f"error: this environment has torch {there}, which is too old and is not replaced ({requirement} is "
                "needed). Leave the environment (deactivate), and a .venv is made",
                file=sys.stderr,
            )
            sys.exit(2)
    sys.exit(1)


if __name__ == "__main__":
    main()
