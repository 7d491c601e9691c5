"""report.html: one run on one page, in one self-contained file: no scripts, no network, light and dark.

The command, the records, the curves, samples of answers, costs, and the model's lineage.
"""

from __future__ import annotations

import json
import shlex
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from stagewise.artifacts.eval_samples import read_samples, sampled_steps
from stagewise.artifacts.json_files import write_durably
from stagewise.artifacts.lineage import first_model, plain_metrics
from stagewise.reports.curves import COSTS, LEARNING, LOSS, STEPS, History, figure, number, panels_with_points
from stagewise.reports.html import anchor, document, duration_text, metric_name, pairs, readable, table, text
from stagewise.reports.model_card import STEP_TITLES

PAGE = "report.html"
WORDS = {
    "finished": "finished",
    "failed": "failed",
    "stopped": "stopped by a signal after a complete checkpoint; --resume_from_checkpoint True continues from it",
    "running": "had not ended when this page was written",
}
SECTIONS = ("result", "curves", "samples", "data", "lineage", "what ran", "cost")
ERROR = "_standard_error"
Samples = list[tuple[int, list[dict[str, Any]]]]


def write_page(output_dir: Path, manifest: dict[str, Any], history: History) -> None:
    """Writes report.html into a run's directory, completely or not at all.

    Args:
        output_dir: the run's directory, which also has the samples.
        manifest: run.json.
        history: the Trainer's log.
    """
    evaluated = {step for step, _ in _evaluations(history)}  # others are from an earlier run in this directory
    samples = [(step, read_samples(output_dir, step)) for step in sampled_steps(output_dir) if step in evaluated]
    output_dir.mkdir(parents=True, exist_ok=True)
    page = page_of(output_dir.resolve().name, manifest, history, samples)
    write_durably(output_dir / PAGE, page.encode("utf-8", "backslashreplace"))  # file names may not be UTF-8


def page_of(name: str, manifest: dict[str, Any], history: History, samples: Samples) -> str:
    """The page of a run called `name`."""
    title = f"{name}: {STEP_TITLES.get(manifest['stage'], manifest['stage'])}"
    bodies = (
        _result(manifest, history),
        _curves(history),
        _samples(samples),
        _data(manifest),
        _lineage(manifest),
        _what_ran(manifest),
        _cost(manifest, history),
    )
    sections = [(section, body) for section, body in zip(SECTIONS, bodies, strict=True) if body]
    links = "".join(f'<a href="#{anchor(section)}">{section}</a>' for section, _ in sections)
    parts = "".join(f'<h2 id="{anchor(section)}">{section.capitalize()}</h2>{body}' for section, body in sections)
    status = manifest.get("status", "running")
    error = f'<p class="error">{text(manifest["error"])}</p>' if manifest.get("error") else ""
    body = (
        f'<p><span class="status {text(status)}">{text(WORDS.get(status, status))}</span>'
        f'<span class="soft"> · began {text(manifest.get("began", "?"))} · this page: '
        f"{time.strftime('%Y-%m-%d %H:%M:%S')}</span></p>{error}{_tiles(manifest, history)}<nav>{links}</nav>{parts}"
    )
    return document(title, body)


# --- sections --------------------------------------------------------------------------------------------------------


def _tiles(manifest: dict[str, Any], history: History) -> str:
    """The main numbers, shown first."""
    evaluations = _evaluations(history)
    found: list[tuple[str, str]] = []
    for name in ("eval_loss", "eval_reward", "eval_accuracy", "eval_perplexity"):
        values = [metrics[name] for _, metrics in evaluations if name in metrics]
        if values:
            was = f"{number(values[0])} → " if len(values) > 1 else ""
            found.append((f"{metric_name(name)}, validation", f"{was}{number(values[-1])}"))
    steps = manifest.get("steps", max((log.get("step", 0) for log in history), default=0))
    found.append(("optimizer steps", f"{steps:,}"))
    if manifest.get("seconds") is not None:
        label = "time since it was resumed" if manifest.get("resumed_from") else "time"
        found.append((label, duration_text(manifest["seconds"])))
    memory = manifest.get("peak_gpu_memory_gib", manifest.get("peak_memory_gib"))
    if memory is not None:
        kind = "GPU memory" if "peak_gpu_memory_gib" in manifest else "memory"
        found.append((f"peak {kind}", f"{memory:.1f} GiB"))
    tiles = "".join(f'<div class="tile"><b>{text(value)}</b>{text(label)}</div>' for label, value in found)
    return f'<div class="tiles">{tiles}</div>'


def _result(manifest: dict[str, Any], history: History) -> str:
    evaluations = _evaluations(history)
    if not evaluations:
        return '<p class="soft">No evaluation was made: there were no validation records, or the run ended before.</p>'
    names = list(dict.fromkeys(name for _, metrics in evaluations for name in metrics if not name.endswith(ERROR)))
    rows = [[step, *(_with_error(metrics, name) for name in names)] for step, metrics in evaluations]
    return table(["step", *map(metric_name, names)], rows, numbers=range(len(names) + 1))


def _with_error(metrics: dict[str, Any], name: str) -> str:
    error = metrics.get(name + ERROR)
    return readable(metrics.get(name)) + (f" ± {error:.2g}" if isinstance(error, float) else "")


def _evaluations(history: History) -> list[tuple[int, dict[str, Any]]]:
    """(step, metrics) of each evaluation; at the same step the later one counts."""
    found = {}
    for log in history:
        metrics = {name: value for name, value in plain_metrics(log).items() if name.startswith("eval_")}
        if metrics:
            found[log["step"]] = metrics
    return sorted(found.items())


def _curves(history: History) -> str:
    found = panels_with_points(history, (LOSS, *LEARNING, *STEPS, *COSTS))
    if not found:
        return '<p class="soft">Nothing was logged before the run ended.</p>'
    averaged = any(line.average for _, lines in found for line in lines)
    note = '<p class="soft">Faint: as logged. Bold: exponential moving average (EMA).</p>' if averaged else ""
    return f'{note}<div class="curves">{"".join(figure(panel, lines) for panel, lines in found)}</div>'


def _samples(samples: Samples) -> str:
    """Each record with the model's answers at the first and the last evaluation; those in between are folded."""
    if not samples:
        return ""
    parts = []
    for sample in samples[-1][1]:
        told = [
            (step, said)
            for step, evaluation in samples
            for other in evaluation
            if (other["where"], other["prompt"])
            == (sample["where"], sample["prompt"])  # a text may have several blocks
            for said in other["texts"]
        ]
        prompt = f'<span class="label">prompt</span><pre>{text(sample["prompt"])}</pre>' if sample["prompt"] else ""
        labels = dict.fromkeys(said["label"] for said in sample["texts"])
        body = "".join(_told([(step, said) for step, said in told if said["label"] == label]) for label in labels)
        parts.append(f'<div class="sample"><h3>{text(sample["where"])}</h3>{prompt}{body}</div>')
    return "".join(parts)


def _told(told: list[tuple[int, dict[str, Any]]]) -> str:
    """The texts with one label over the evaluations: the record's own once, with all of its scores; answers one by
    one.
    """
    label = told[-1][1]["label"]
    if label != "answer":
        scores = [(step, said["score"]) for step, said in told if said.get("score") is not None]
        trace = " → ".join(f"{number(score)} (step {step})" for step, score in scores)
        return _block(f"{label}{': ' if trace else ''}{trace}", told[-1][1]["text"], own=False)
    blocks = []
    for step, said in told:
        score = "" if said.get("score") is None else f", score {number(said['score'])}"
        cut = "" if said.get("ended", True) else ", which continues"
        blocks.append(_block(f"answer at step {step}{score}{cut}", said["text"], own=True))
    between = "".join(blocks[1:-1])
    folded = f"<details><summary>answers in between</summary>{between}</details>" if between else ""
    return "".join([*blocks[:1], folded, *blocks[1:][-1:]])


def _block(label: str, content: str, own: bool) -> str:
    said = ' class="said"' if own else ""
    return f'<span class="label">{text(label)}</span><pre{said}>{text(content)}</pre>'


def _data(manifest: dict[str, Any]) -> str:
    data = manifest.get("data") or {}
    accounts = {name: data[name] for name in ("train", "validation") if name in data}
    if not accounts:
        return ""
    rows = []
    for name, account in accounts.items():
        left_out = account.get("left_out") or {}
        reasons = ", ".join(f"{count:,} {reason}" for reason, count in left_out.items()) or "none"
        counts = [f"{account.get(key, 0):,}" for key in ("read", "kept", "cut")]
        rows.append([name, *counts, reasons, ", ".join(account.get("files", []))])
    parts = [table(["split", "read", "kept", "cut short", "left out", "files"], rows, numbers=(1, 2, 3))]
    if (data.get("train") or {}).get("sources"):
        sources = data["train"]["sources"]
        names = list(dict.fromkeys(name for source in sources for name in source))
        rows = [[readable(source.get(name)) for name in names] for source in sources]
        parts.append(f"<h3>Sources</h3>{table([name.replace('_', ' ') for name in names], rows)}")
    summary = data.get("summary") or {}
    for name in ("train", "validation", "step"):
        if name in summary:
            title = "What a step holds" if name == "step" else f"What the {name} records are"
            parts.append(f"<details><summary>{title}</summary>{pairs(summary[name].items())}</details>")
    return "".join(parts)


def _lineage(manifest: dict[str, Any]) -> str:
    steps = manifest.get("lineage") or []
    base, from_hub = first_model(steps)
    first = f"<li><b>{text(base or '?')}</b><br>the first model{', from the Hub' if from_hub else ''}</li>"
    return f'<ol class="lineage">{first}{_steps(steps, now=True)}</ol>'


def _steps(steps: Sequence[dict[str, Any]], now: bool = False) -> str:
    parts = []
    for place, step in enumerate(steps):
        told = [str(step[name]) for name in ("method", "began") if step.get(name)]
        if step.get("steps") is not None:
            told.append(f"{step['steps']:,} steps")
        if (kept := step.get("data", {}).get("train", {}).get("kept")) is not None:
            told.append(f"{kept:,} records")
        metrics = step.get("metrics", {})
        for name, value in metrics.get("eval", {}).items():
            if name in ("eval_loss", "eval_accuracy", "eval_reward"):
                was = metrics.get("eval_before", {}).get(name)
                told.append(f"{metric_name(name)} {'' if was is None else f'{number(was)} → '}{number(value)}")
        from_where = [f"from {step.get('base_model')}"]
        from_where += [f"adapter {step[name]}" for name in ("adapter", "continued_adapter") if step.get(name)]
        from_where += [f"with {step['merged_adapter']} merged in"] if step.get("merged_adapter") else []
        reward = step.get("reward_model")
        scored = f"<br>scored by {text(reward['path'])}" if reward else ""
        if reward and reward.get("lineage"):
            inner = _steps(reward["lineage"])
            scored += f'<details><summary>its own lineage</summary><ol class="lineage">{inner}</ol></details>'
        mark = ' class="now"' if now and place == len(steps) - 1 else ""
        name = STEP_TITLES.get(step["stage"], step["stage"])
        parts.append(
            f'<li{mark}><b>{text(name)}</b> <span class="soft">{text(" · ".join(told))}</span>'
            f"<br>{text(', '.join(from_where))}{scored}</li>"
        )
    return "".join(parts)


def _what_ran(manifest: dict[str, Any]) -> str:
    names = ("base_model", "method", "template", "rows", "attention", "rope", "device", "processes", "resumed_from")
    about = [(name.replace("_", " "), manifest[name]) for name in names if manifest.get(name) is not None]
    if parameters := manifest.get("parameters"):
        share = parameters["trained"] / max(parameters["all"], 1)
        words = f"{parameters['trained']:,} of {parameters['all']:,} parameters ({share:.2%})"
        about.append(("trained", words))
    typed = manifest.get("command", [])
    used = [*typed[:1], *manifest["effective"]] if "effective" in manifest else typed
    command = f"<pre>{text(_as_command(used, manifest))}</pre>"
    if used != typed:
        command += (
            "<details><summary>As it was typed: with a file of flags, earlier names, or flags that a later one "
            f"replaces</summary><pre>{text(_as_command(typed, manifest))}</pre></details>"
        )
    whole = json.dumps(manifest, indent=2, ensure_ascii=False, default=str)
    return (
        f"{command}{pairs(about)}<h3>Flags that were given</h3>{_flags(manifest)}"
        f"<details><summary>Versions</summary>{pairs((manifest.get('versions') or {}).items())}</details>"
        f"<details><summary>run.json</summary><pre>{text(whole)}</pre></details>"
    )


def _as_command(words: Sequence[str], manifest: dict[str, Any]) -> str:
    """A command line to paste into a shell, a flag a line; of several processes as each machine starts it."""
    processes, nodes = manifest.get("processes", 1), manifest.get("nodes", 1)
    start = ["python"]
    if processes > 1:
        start = ["torchrun", *(["--nnodes", str(nodes)] if nodes > 1 else [])]
        start += ["--nproc_per_node", str(processes // nodes)]
    quoted = [f"\\\n    {word}" if word.startswith("--") else word for word in map(shlex.quote, words)]
    return " ".join([*start, *quoted])


def _flags(manifest: dict[str, Any]) -> str:
    """The flags with the values that held, and what was given in vain: before a later flag, or against another one."""
    replaced, settled = manifest.get("replaced") or {}, manifest.get("settled") or {}
    notes = {name: [f"replaces {', '.join(values)}"] for name, values in replaced.items()}
    for name, value in settled.items():
        notes.setdefault(name, []).append(f"given as {readable(value)}")
    flags = manifest.get("flags") or {}
    if not notes:
        return pairs((f"--{name}", value) for name, value in flags.items())
    rows = [(f"--{name}", readable(value), "; ".join(notes.get(name, ()))) for name, value in flags.items()]
    return table(["flag", "value", ""], rows)


def _cost(manifest: dict[str, Any], history: History) -> str:
    rows: list[tuple[str, str]] = []
    if manifest.get("seconds") is not None:
        rows.append(("time, from the start of the program", duration_text(manifest["seconds"])))
    speeds = [log["tokens_per_second"] for log in history if "tokens_per_second" in log]
    if speeds:
        median = sorted(speeds)[len(speeds) // 2]
        rows.append(("tokens per second of training, all processes, median", f"{median:,.0f}"))
    for log in reversed(history):
        if "train_runtime" in log:
            rows.append(("time of training, evaluations included", duration_text(log["train_runtime"])))
            break
    evaluating = sum(log["eval_runtime"] for log in history if "eval_runtime" in log)
    if evaluating:
        rows.append(("time of evaluations, without their samples", duration_text(evaluating)))
    kinds = (("peak_memory_gib", "peak memory of the main process"),)
    kinds += (("peak_gpu_memory_gib", "peak GPU memory of the main process's tensors"),)
    rows += [(label, f"{manifest[name]:.2f} GiB") for name, label in kinds if manifest.get(name) is not None]
    held = [log["memory_gib"] for log in history if "memory_gib" in log]
    if held and "peak_gpu_memory_gib" in manifest:
        rows.append(("most that it held of the GPU, with what torch keeps for later", f"{max(held):.2f} GiB"))
    return pairs(rows) if rows else ""
