"""The table of `benchmarks/memory.py`, in Markdown."""

from __future__ import annotations

import importlib.metadata
import importlib.util
from collections.abc import Sequence
from typing import Any

from benchmarks.memory_shapes import Cell

COLUMNS = ("shape", "method", "weights GiB", "peak GiB", "estimate GiB", "estimate / peak", "tokens/s", "remark")


def line(found: dict[str, Any]) -> str:
    """A line of the table."""

    def gib(name: str) -> str:
        return f"{found[name] / 2**30:.1f}" if name in found else ""

    ratio = f"{found['estimate'] / found['peak']:.2f}" if found.get("peak") else ""
    speed = f"{found['tokens_per_second']:,.0f}" if "tokens_per_second" in found else ""
    cells = (found["shape"], found["method"], gib("weights"), gib("peak"), gib("estimate"), ratio, speed)
    return "| " + " | ".join((*cells, found.get("skipped", ""))) + " |"


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Rows as Markdown, those that were measured in one way under one heading; of a cell measured twice the last."""
    parts: dict[str, dict[tuple[str, str], dict]] = {}
    for row in rows:
        parts.setdefault(row["how"], {})[row["shape"], row["method"]] = row
    head = "| " + " | ".join(COLUMNS) + " |\n" + "|---|---|" + "---:|" * 5 + "---|"
    return "\n\n".join("\n".join([how, "", head, *map(line, cells.values())]) for how, cells in parts.items())


def heading(cell: Cell, device: str) -> str:
    """How the rows of a run are measured."""
    names = [name for name in ("torch", "transformers", "peft", "bitsandbytes") if importlib.util.find_spec(name)]
    used = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in names)
    how = "with" if cell.checkpointing else "without"
    flash = ", --flash_attn" if cell.flash_attn else ""
    return f"{device}: one row of {cell.tokens} tokens, {how} gradient checkpointing, {cell.optim}{flash}; {used}"
