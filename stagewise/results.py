"""What a person looks at: result files, the loss curve, a training sample with its learned tokens marked."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from loguru import logger
from transformers import PreTrainedTokenizerBase

from stagewise.encoding import IGNORE_INDEX, Example


def write_results(folder: Path, split: str, metrics: dict[str, Any]) -> None:
    """`train_results` and `eval_results`, as .json and as .txt."""
    (folder / f"{split}_results.json").write_text(json.dumps(metrics, indent=2) + "\n")
    (folder / f"{split}_results.txt").write_text("".join(f"{k} = {v}\n" for k, v in metrics.items()))


def draw_curves(history: list[dict[str, Any]], path: Path) -> None:
    """A picture of the training and validation loss by step."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axis = plt.subplots(figsize=(7, 4))
    for key, label in (("loss", "training"), ("eval_loss", "validation")):
        points = [(log["step"], log[key]) for log in history if key in log]
        if points:
            axis.plot(*zip(*points, strict=True), marker="o", markersize=3, label=label)
    axis.set(xlabel="step", ylabel="loss")
    axis.legend()
    axis.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)


def show_sample(tokenizer: PreTrainedTokenizerBase, example: Example) -> None:
    """Prints one training example, learned tokens green (between «» where there is no colour), context grey."""
    colour = sys.stderr.isatty()
    on, off, grey = ("\033[32m", "\033[0m", "\033[90m") if colour else ("«", "»", "")
    pieces, start = [], 0
    learned = [label != IGNORE_INDEX for label in example.labels]
    for end in range(1, len(learned) + 1):
        if end == len(learned) or learned[end] != learned[start]:
            text = tokenizer.decode(example.input_ids[start:end])
            pieces.append(f"{on}{text}{off}" if learned[start] else f"{grey}{text}{off if colour else ''}")
            start = end
    logger.opt(raw=True).info(f"one training sample ({example.where}), learned tokens marked:\n{''.join(pieces)}\n\n")
