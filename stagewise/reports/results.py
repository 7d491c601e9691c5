"""Result files, and a training sample with its labels marked."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any, TextIO

from loguru import logger
from transformers import PreTrainedTokenizerBase

from stagewise.artifacts.json_files import read_object
from stagewise.data.examples import IGNORE_INDEX, Example
from stagewise.reports.terminal_text import visible


def write_results(folder: Path, split: str, metrics: dict[str, Any]) -> None:
    """Writes `train_results` and `eval_results`, as .json and as .txt."""
    (folder / f"{split}_results.json").write_text(json.dumps(metrics, indent=2) + "\n")
    (folder / f"{split}_results.txt").write_text("".join(f"{k} = {v}\n" for k, v in metrics.items()))


def read_results(folder: Path, split: str) -> dict[str, Any] | None:
    """The results that `write_results` wrote, or None."""
    path = folder / f"{split}_results.json"
    return read_object(path, "delete it") if path.is_file() else None


def has_color(stream: TextIO) -> bool:
    """Whether to write colors to a stream: only to a terminal, and not if NO_COLOR is set (no-color.org)."""
    return stream.isatty() and not os.environ.get("NO_COLOR")


def mark_labels(
    tokenizer: PreTrainedTokenizerBase, example: Example, *, color: bool, longest: int | None = None
) -> str:
    """An example's text with labels in green and context gray; without color, text with labels between «».

    `longest`: spans of more characters are shortened in the middle.
    """
    on, off, gray = ("\033[32m", "\033[0m", "\033[90m") if color else ("«", "»", "")
    pieces, start, before = [], 0, ""
    learned = [bool(label != IGNORE_INDEX) for label in example.labels]
    for end in range(1, len(learned) + 1):
        if end < len(learned) and learned[end] == learned[start]:
            continue
        # Decoded as the growth of the whole text, since SentencePiece drops a leading space of text decoded alone.
        whole = tokenizer.decode(example.input_ids[:end])
        alone = not whole.startswith(before)
        piece = tokenizer.decode(example.input_ids[start:end]) if alone else whole[len(before) :]
        if longest and len(piece) > longest + 40:  # the ellipsis takes some room as well
            half = longest // 2
            piece = f"{piece[:half]} [… {len(piece) - 2 * half:,} characters …] {piece[-half:]}"
        piece = visible(piece)
        pieces.append(f"{on}{piece}{off}" if learned[start] else f"{gray}{piece}{off if color else ''}")
        start, before = end, whole
    return "".join(pieces)


def show_sample(tokenizer: PreTrainedTokenizerBase, example: Example) -> None:
    """Logs one training example in the form of `marked`."""
    text = mark_labels(tokenizer, example, color=has_color(sys.stderr))
    where = visible(example.where)
    colored = logger.bind(colored=True)  # control characters have been made visible; the colors must pass
    colored.opt(raw=True).info(f"one training sample ({where}), labels marked:\n{text}\n\n")
