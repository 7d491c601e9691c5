"""Peak memory and tokens per second of training published model shapes on one GPU, next to the estimate.

    python benchmarks/memory.py --shapes 0.5B,1.5B,8B --methods lora,qlora8,qlora4 --output memory.jsonl
    python benchmarks/memory.py --cells 32B:qlora4,8x7B:qlora4_experts --output memory.jsonl
    python benchmarks/memory.py --dry_run --gpu_gib 80         # what would fit, without a GPU
    python benchmarks/memory.py --table memory.jsonl           # the table of what has been measured

Each cell is a process of its own with a time limit: a model of the shape with random weights is made on the GPU, layer
by layer (quantized as it is made), and takes a few steps of supervised finetuning through the stage's own trainer on
one row of --tokens random tokens. Cells that cannot fit by the estimate of stagewise/models/memory/estimate.py are
skipped with a message. Each row is printed and kept as it is finished; the table, in Markdown, is printed last. Peak:
torch.cuda.max_memory_allocated of the steps, without the CUDA context.
methods: full (weights in float32, computed in bfloat16, as the stages do),
full16 (in bfloat16), lora, qlora8, qlora4 (bitsandbytes int8 and nf4 with double quantization), qlora4_experts
(experts in nf4, too), qlora4_all (and the adapter on them).
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from loguru import logger  # noqa: E402

from benchmarks.memory_shapes import EXPERTS_IN_4_BIT, METHODS, PUBLISHED, SHAPES, WARM_UP, Cell, has_experts  # noqa: E402
from benchmarks.memory_table import heading, line, table  # noqa: E402

CONTEXT = 0.6 * 2**30  # the CUDA context, and what the allocator cannot use
MARGIN = 1.03
SHORTEST = 20  # seconds in which a cell can start and take a step


def cells_of(args: argparse.Namespace) -> list[Cell]:
    """Every cell that was asked for, in order; experts in 4 bit only where there are experts."""
    if args.cells:
        pairs = [cell.split(":") for cell in args.cells.split(",")]
    else:
        grid = [(shape, method) for shape in args.shapes.split(",") for method in args.methods.split(",")]
        pairs = [(shape, method) for shape, method in grid if method not in EXPERTS_IN_4_BIT or has_experts(shape)]
    same = {name: getattr(args, name) for name in ("tokens", "steps", "optim", "checkpointing", "flash_attn")}
    return [Cell(shape, method, **same) for shape, method in pairs]


def gpu_room(args: argparse.Namespace) -> tuple[float, str]:
    """Bytes of the GPU and its name; asked in another process, whose CUDA context is gone when a cell begins."""
    if args.gpu_gib:
        return args.gpu_gib * 2**30, f"a GPU of {args.gpu_gib:g} GiB"
    ask = (
        "import torch; there = torch.cuda.is_available(); "
        "print(torch.cuda.mem_get_info()[1] if there else 'inf', torch.cuda.get_device_name() if there else 'CPU')"
    )
    told = subprocess.run([sys.executable, "-c", ask], capture_output=True, text=True, check=True).stdout.split(" ", 1)
    return float(told[0]), told[1].strip()


def plan(cells: list[Cell], room: float) -> list[dict[str, Any]]:
    """A row for each cell with its estimate; "skipped" says which cannot fit into `room` bytes."""
    from benchmarks.memory_cell import predicted  # torch and transformers, which a table alone does not need

    rows = []
    for cell in cells:
        estimate = predicted(cell)
        row = {"shape": cell.shape, "method": cell.method, "weights": estimate.weights, "estimate": estimate.peak}
        row["moment"] = estimate.moment
        if estimate.peak * MARGIN + CONTEXT > room:
            row["skipped"] = f"cannot fit: the GPU has {room / 2**30:.1f} GiB"
        rows.append(row)
    return rows


def start_cell(cell: Cell, seconds: float) -> dict[str, Any]:
    """Measures a cell in its own process; whatever happens to it is a remark in the table."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "cell.json"
        words = [sys.executable, "-m", "benchmarks.memory_cell", json.dumps(asdict(cell)), str(out)]
        try:
            done = subprocess.run(
                words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=seconds, cwd=ROOT
            )
        except subprocess.TimeoutExpired:
            return {"skipped": f"stopped after {seconds:.0f} s"}
        if done.returncode or not out.is_file():
            lines = [line for line in done.stdout.splitlines() if line.strip()] or ["no output"]
            print(done.stdout[-3000:], file=sys.stderr)
            return {"skipped": f"exit code {done.returncode}: {lines[-1][:80]}"}
        return json.loads(out.read_text(encoding="utf-8"))


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", default=",".join(PUBLISHED), help=f"of {', '.join(SHAPES)}")
    parser.add_argument("--methods", default=",".join(METHODS), help=f"of {', '.join(METHODS)}")
    parser.add_argument("--cells", help="in place of both: shape:method, joined by commas, in this order")
    parser.add_argument("--tokens", type=int, default=Cell.tokens)
    parser.add_argument("--steps", type=int, default=Cell.steps, help=f"timed steps, after {WARM_UP} others")
    parser.add_argument("--optim", default=Cell.optim)
    parser.add_argument("--no_gradient_checkpointing", dest="checkpointing", action="store_false")
    parser.add_argument("--flash_attn", action="store_true", help="as the stages' flag")
    parser.add_argument("--seconds", type=float, default=240, help="limit of a cell")
    parser.add_argument("--minutes", type=float, help="limit of the run: no cell continues beyond it")
    parser.add_argument("--output", type=Path, help="every row is added to this file, as jsonl, once it is finished")
    parser.add_argument("--dry_run", action="store_true", help="the estimates and what fits; nothing is measured")
    parser.add_argument("--gpu_gib", type=float, help="take the GPU to have this much; default: ask it")
    parser.add_argument("--table", type=Path, nargs="+", help="print the table of these files of --output, and end")
    args = parser.parse_args(argv)
    asked = [cell.partition(":")[::2] for cell in args.cells.split(",")] if args.cells else []
    shapes, methods = zip(*asked, strict=True) if asked else (args.shapes.split(","), args.methods.split(","))
    flags = ("cells", "cells") if asked else ("shapes", "methods")
    for flag, found, known in zip(flags, (shapes, methods), (SHAPES, METHODS), strict=True):
        if unknown := sorted(set(found) - set(known)):
            parser.error(f"--{flag}: expected some of {', '.join(known)}, found {', '.join(map(repr, unknown))}")
    if lacking := [(s, m) for s, m in asked if m in EXPERTS_IN_4_BIT and not has_experts(s)]:
        parser.error(f"--cells {':'.join(lacking[0])}: the shape has no experts")
    if args.tokens < 2 or args.steps < 1:
        parser.error("--tokens: expected at least 2, and --steps at least 1")
    if not cells_of(args):
        parser.error(f"--methods {args.methods}: none of --shapes {args.shapes} has experts")
    if missing := [path for path in args.table or [] if not path.is_file()]:
        parser.error(f"--table {missing[0]}: no such file")
    return args


def main(argv: list[str] | None = None) -> None:
    args = parse_arguments(argv)
    if args.table:
        lines = [text for path in args.table for text in path.read_text(encoding="utf-8").splitlines()]
        print(table([json.loads(text) for text in lines]))
        return
    logger.remove()  # nothing but the rows
    if args.output:
        args.output.parent.mkdir(parents=True, exist_ok=True)
    began = time.time()
    cells, (room, device) = cells_of(args), gpu_room(args)
    how, rows = heading(cells[0], device), plan(cells, room)
    for number, (cell, row) in enumerate(zip(cells, rows, strict=True), 1):
        row["how"] = how
        left = args.minutes * 60 - (time.time() - began) if args.minutes else math.inf
        if "skipped" not in row and not args.dry_run:
            in_time = left > SHORTEST
            row.update(start_cell(cell, min(args.seconds, left)) if in_time else {"skipped": "the time was up"})
        print(f"{number}/{len(rows)} {line(row)}", file=sys.stderr, flush=True)
        if args.output and not args.dry_run:
            with open(args.output, "a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")
    print(table(rows), flush=True)


if __name__ == "__main__":
    main()
