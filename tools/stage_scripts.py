"""The stage scripts and their flags, read without importing training libraries."""

from __future__ import annotations

import ast
import importlib
import sys
import types
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


@cache
def early_flags(script: str) -> list[type]:
    """FLAGS of a stage script, from the lines above its `if __name__ == "__main__"`; the lines below need torch."""
    source = ROOT / f"{script}.py"
    tree = ast.parse(source.read_text(encoding="utf-8"))
    end = next(place for place, node in enumerate(tree.body) if isinstance(node, ast.If))
    module = types.ModuleType(f"{script} (flags)")
    sys.modules[module.__name__] = module  # where dataclasses look their types up
    exec(compile(ast.Module(tree.body[:end], []), source, "exec"), vars(module))
    return module.FLAGS


def dataclasses_of(script: str) -> list[type]:
    """The dataclasses whose fields are the flags of a stage script, StageArguments first."""
    from stagewise.training.settings import StageArguments

    return [StageArguments, *importlib.import_module(script).FLAGS]
