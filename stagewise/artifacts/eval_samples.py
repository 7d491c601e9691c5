"""The samples of evaluations: eval_samples/step-N.jsonl in the output directory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from stagewise.formats.json_lines import read_json_lines

FOLDER = "eval_samples"


def sample_path(output_dir: str | Path, step: int) -> Path:
    return Path(output_dir) / FOLDER / f"step-{step}.jsonl"


def read_samples(output_dir: str | Path, step: int) -> list[dict[str, Any]]:
    """The samples of an evaluation; empty if it left none."""
    return read_json_lines(sample_path(output_dir, step))


def sampled_steps(output_dir: str | Path) -> list[int]:
    """The steps whose evaluations left samples, ascending."""
    return sorted(int(path.stem.split("-")[1]) for path in (Path(output_dir) / FOLDER).glob("step-*.jsonl"))
