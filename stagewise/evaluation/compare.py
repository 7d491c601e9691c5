"""Several evaluations side by side: stages of one lineage, or any models evaluated on the same records.

Differences are computed on the records that two evaluations share, with the same bootstrap samples.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stagewise.artifacts.json_files import read_object
from stagewise.errors import ArgumentError, FileError
from stagewise.evaluation.page import as_markdown, metric_text
from stagewise.evaluation.statistics import (
    BENCHMARK_METRICS,
    LEVEL,
    RM_METRICS,
    SFT_METRICS,
    Difference,
    Metric,
    Row,
    differences,
)
from stagewise.formats.json_lines import json_bytes

METRICS = "metrics.json"
# Part of metrics.json -> its rows, and the metrics computed from them.
PARTS: dict[str, tuple[str, Sequence[Metric]]] = {
    "sft": ("answers.jsonl", SFT_METRICS),
    "rm": ("scores.jsonl", RM_METRICS),
    "benchmarks": ("benchmarks.jsonl", BENCHMARK_METRICS),
}


@dataclass(frozen=True)
class Evaluation:
    """The results of an evaluation: its folder and name, its metrics.json, and its rows by part and location."""

    folder: Path
    name: str
    metrics: dict[str, Any]
    rows: dict[str, dict[str, Row]]


def read_evaluations(folders: Sequence[str]) -> list[Evaluation]:
    """Reads the --output_dir of each evaluation; its name is the part of the path that is unique.

    Raises:
        ArgumentError: for a folder without an evaluation, named twice, or with missing files.
    """
    paths = [Path(folder).resolve().parts for folder in folders]
    if len(paths) < 2:
        raise ArgumentError("--compare: give two folders or more, each the --output_dir of an evaluation")
    if len(set(paths)) < len(paths):
        raise ArgumentError(f"--compare {' '.join(folders)}: names a folder twice")
    depth = next(n for n in range(1, max(map(len, paths)) + 1) if len({path[-n:] for path in paths}) == len(paths))
    return [_read(folder, "/".join(path[-depth:])) for folder, path in zip(folders, paths, strict=True)]


def _read(folder: str, name: str) -> Evaluation:
    """One evaluation, called `name` and, if known, the stage that made the model."""
    path = Path(folder)
    if not (path / METRICS).is_file():
        raise ArgumentError(
            f"--compare {folder}: holds no {METRICS}; give the --output_dir of a run of evaluation.py on a model"
        )
    rows = {}
    try:
        try:
            metrics = read_object(path / METRICS, "evaluate again")
        except FileError as error:
            raise ArgumentError(f"--compare {folder}: {error}") from error
        for part, (file, _) in PARTS.items():
            if part not in metrics:
                continue
            if not (path / file).is_file():
                raise ArgumentError(f"--compare {folder}: {file}, which {METRICS} names, is missing; evaluate again")
            with (path / file).open(encoding="utf-8") as lines:
                rows[part] = {row["where"]: row for row in map(json.loads, lines)}
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError) as error:
        raise ArgumentError(f"--compare {folder}: its files are damaged ({error}); evaluate again") from error
    if not rows:
        raise ArgumentError(
            f"--compare {folder}: {METRICS} is none of evaluation.py's; give the --output_dir of a run"
        )
    stage = metrics.get("model", {}).get("stage")
    return Evaluation(path, f"{name} ({stage})" if stage else name, metrics, rows)


def lines_of(evaluations: Sequence[Evaluation]) -> list[tuple[str, Metric, list[dict[str, float] | None]]]:
    """(title, metric, each evaluation's number or None) of every metric that any of them has."""
    found = []
    for part in ("sft", "rm"):
        for metric in PARTS[part][1]:
            numbers = [each.metrics.get(part, {}).get("all", {}).get(metric.name) for each in evaluations]
            found.append((metric.title, metric, numbers))
    names = sorted({name for each in evaluations for name in each.metrics.get("benchmarks", {})})
    for name in names:
        sets = [each.metrics.get("benchmarks", {}).get(name, {}) for each in evaluations]
        metric = BENCHMARK_METRICS[0]
        title = f"{name}, {next(each['metric'] for each in sets if each)}"
        found.append((title, metric, [each.get("all", {}).get(metric.name) for each in sets]))
    return [line for line in found if any(number is not None for number in line[2])]


def comparison_table(evaluations: Sequence[Evaluation]) -> list[list[str]]:
    """One row per metric, one column per evaluation."""
    rows = [["", *(each.name for each in evaluations)]]
    return rows + [
        [title, *(metric_text(n, metric) for n in numbers)] for title, metric, numbers in lines_of(evaluations)
    ]


def shared_rows(first: Evaluation, other: Evaluation, part: str) -> tuple[dict[str, Row], dict[str, Row]]:
    """The rows of both for the same records: same location, and same texts."""
    one, two = first.rows.get(part, {}), other.rows.get(part, {})
    words = ("system", "prompt", "reference", "chosen_answer", "rejected_answer", "question")
    same = [where for where in one if where in two and all(one[where].get(w) == two[where].get(w) for w in words)]
    return {where: one[where] for where in same}, {where: two[where] for where in same}


def settings_of(one: Evaluation, part: str) -> dict[str, Any]:
    """The settings that the numbers of a part depend on, apart from the model and the records."""
    flags, found = one.metrics.get("flags", {}), {}
    chat = part != "benchmarks" or flags.get("apply_chat_template")
    if part == "sft":
        said = one.metrics["sft"].get("sampling", {})
        drawn = ("temperature", "top_p", "top_k", "min_p", "seed") if said.get("do_sample") else ()
        names = ("max_new_tokens", "do_sample", "num_beams", "repetition_penalty", "no_repeat_ngram_size", *drawn)
        found |= {name: said.get(name) for name in names}
        scorer = flags.get("reward_model_name_or_path")
        found["reward_model_name_or_path"] = scorer and os.path.normpath(scorer)
    elif part == "rm":
        found |= {name: flags.get(name) for name in ("max_source_length", "max_target_length")}
    else:
        found["apply_chat_template"] = bool(flags.get("apply_chat_template"))
        found |= {f"num_fewshot of {name}": each.get("num_fewshot") for name, each in one.metrics[part].items()}
    found |= {name: bool(flags.get(name)) for name in ("load_in_4bit", "load_in_8bit")}
    names = ("rope_scaling", "rope_factor", *(("template_name", "enable_thinking") if chat else ()))
    return found | {name: flags.get(name, "not given") for name in names}


def differing_settings(first: Evaluation, other: Evaluation) -> list[str]:
    """A sentence for each setting in which two evaluations differ: their numbers may differ for that reason alone."""
    found = []
    for part in (part for part in PARTS if part in first.rows and part in other.rows):
        one, two = settings_of(first, part), settings_of(other, part)
        found += [
            f"not asked alike: {name} was {one[name]} for {first.name}, {two[name]} for {other.name}"
            for name in one
            if name in two and one[name] != two[name]
        ]
    return found


def compare_metrics(first: Evaluation, other: Evaluation) -> list[tuple[str, Difference]]:
    """(title, difference) of every metric that both have on shared records; benchmarks separately.

    Perplexity is per token: it is left out if the models split a record into different numbers of tokens. So is the
    reward if it comes from two reward models.
    """
    found = []
    for part, (_, metrics) in PARTS.items():
        one, two = shared_rows(first, other, part)
        if part == "benchmarks":
            for name in sorted({row["benchmark"] for row in one.values()}):
                own = {where: row for where, row in one.items() if row["benchmark"] == name}
                title = f"{name}, {first.metrics[part][name]['metric']}"
                found += [(title, each) for each in differences(own, two, metrics)]
            continue
        odd = set()
        if any(one[where].get("tokens") != two[where].get("tokens") for where in one):
            odd.add("perplexity")
        if one and len({settings_of(each, part).get("reward_model_name_or_path") for each in (first, other)}) > 1:
            odd.add("reward")
        chosen = [metric for metric in metrics if metric.of_model and metric.name not in odd]
        found += [(each.metric.title, each) for each in differences(one, two, chosen)]
    return found


def sentence(title: str, first: Evaluation, other: Evaluation, found: Difference) -> str:
    """One line: "ROUGE-L: sft 0.213 → dpo 0.231, +0.018 [+0.004, +0.031] on 52 records: better"."""
    digits = found.metric.digits
    return (
        f"{title}: {first.name} {found.first:.{digits}f} → {other.name} {found.other:.{digits}f}, "
        f"{found.difference:+.{digits}f} [{found.low:+.{digits}f}, {found.high:+.{digits}f}] "
        f"on {found.records} records: {found.verdict}"
    )


def draw_comparison(evaluations: Sequence[Evaluation], path: Path) -> None:
    """One panel per metric, with intervals; evaluations from left to right in the given order."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    lines = [line for line in lines_of(evaluations) if line[1].of_model]
    columns = max(1, min(3, len(lines)))
    rows = max(1, -(-len(lines) // columns))
    figure, axes = plt.subplots(rows, columns, figsize=(4.2 * columns, 3 * rows), squeeze=False)
    places = range(len(evaluations))
    for axis, (title, _, numbers) in zip(axes.flat, lines, strict=False):
        points = [(place, n) for place, n in zip(places, numbers, strict=True) if n is not None]
        below = [max(0.0, n["value"] - n.get("low", n["value"])) for _, n in points]
        above = [max(0.0, n.get("high", n["value"]) - n["value"]) for _, n in points]
        axis.errorbar(
            [p for p, _ in points], [n["value"] for _, n in points], yerr=[below, above], marker="o", capsize=4
        )
        axis.set_title(title, fontsize=10)
        axis.set_xticks(list(places), [each.name for each in evaluations], rotation=20, ha="right", fontsize=8)
        axis.set_xlim(-0.5, len(evaluations) - 0.5)
        axis.grid(alpha=0.3)
    for axis in axes.flat[len(lines) :]:
        axis.axis("off")
    if not lines:
        axes.flat[0].text(0.5, 0.5, "no number says how good these models are", ha="center")
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)


def write_comparison(folders: Sequence[str], output: Path) -> tuple[list[list[str]], list[str]]:
    """Compares evaluations: comparison.json, comparison.md and comparison.png in `output`.

    Returns:
        the table, and a sentence for every metric that the first one shares with each of the others.

    Raises:
        ArgumentError: for folders without an evaluation.
    """
    evaluations = read_evaluations(folders)
    first, *others = evaluations
    rows, sentences, found = comparison_table(evaluations), [], []
    for other in others:
        for title, each in compare_metrics(first, other):
            sentences.append(sentence(title, first, other, each))
            numbers = {"first": each.first, "other": each.other, "difference": each.difference}
            numbers |= {"low": each.low, "high": each.high, "records": each.records, "verdict": each.verdict}
            found.append({"metric": title, "first_dir": str(first.folder), "other_dir": str(other.folder), **numbers})
        sentences += differing_settings(first, other)
    output.mkdir(parents=True, exist_ok=True)
    result = {
        "directories": [str(each.folder) for each in evaluations],
        "metrics": {title: numbers for title, _, numbers in lines_of(evaluations)},
        "differences": found,
        "level": LEVEL,
    }
    (output / "comparison.json").write_bytes(json_bytes(result, indent=2))
    words = "".join(f"- {line}\n" for line in sentences)
    (output / "comparison.md").write_text(f"{as_markdown(rows)}\n{words}", encoding="utf-8")
    draw_comparison(evaluations, output / "comparison.png")
    return rows, sentences
