"""The report of `tools.show_data` on a stage's data: text, and a picture."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from stagewise.config.arguments import ModelArguments
from stagewise.config.stages import STAGES
from stagewise.data.bad_records import too_long_line
from stagewise.data.control_tokens import control_line
from stagewise.data.examples import Example, PreferenceExample
from stagewise.data.packing import pack
from stagewise.data.read_splits import beyond_line
from stagewise.data.splits import Splits
from stagewise.data.statistics import (
    UNITS,
    Measures,
    StepContents,
    StepSize,
    bins,
    counted,
    measure,
    packed_step,
    padded_step,
    percent,
    rollout_contents,
)
from stagewise.models.attention.choose import rows_by_flags
from stagewise.models.config import load_config
from stagewise.reports.results import mark_labels
from stagewise.reports.terminal_text import visible
from stagewise.training.settings import StageArguments

REJECTED = 10  # records that were left out for what is wrong with them, of which is said what that is
BAR = 40  # characters of the longest bar of the histogram
STRETCH = 600  # characters that are shown of a stretch of a sample's text


@dataclass
class Shown:
    """The data to report: a stage's flags, and the result of its `read_data`."""

    stage: str  # pt, sft, rm, dpo or ppo
    script: str
    flags: dict[type, Any]
    splits: Splits
    tokenizer: PreTrainedTokenizerBase
    template: str | None
    rejected: list[str]  # what was wrong with the records that were left out

    @property
    def args(self) -> StageArguments:
        return self.flags[StageArguments]

    def flag(self, name: str) -> Any:
        """The value of one of the stage's flags."""
        return next(getattr(part, name) for part in self.flags.values() if hasattr(part, name))


def account_lines(shown: Shown, split: str) -> list[str]:
    """The account of a split's records."""
    account = shown.splits.accounts[split]
    left_out = sum(account.left_out.values())
    lines = [
        f"{counted(account.read, 'record', 'records')} read, {account.kept:,} kept, {left_out:,} left out, "
        f"{account.cut:,} cut"
    ]
    lines += [f"  left out: {count:,} {reason}" for reason, count in account.left_out.items()]
    if account.blocks_beyond:
        lines.append(beyond_line(account, split))
    lines += filter(None, [too_long_line(account.left_out, account.kept), control_line(account)])
    for source in account.sources:
        asked = "" if source["weight"] is None else f" (weight {source['weight']:.1%})"
        lines.append(
            f"  {source['name']}: {source['used']:,} of {source['read']:,} records are used, {source['share']:.1%} of "
            f"all{asked}, {source['token_share']:.1%} of the tokens"
        )
    if shown.splits.summary[split].streamed:
        lines.append("--streaming: these are the first records, and stand for all")
    return lines


def histogram(lengths: np.ndarray, what: str) -> list[str]:
    """A histogram of (N,) lengths as lines of text."""
    rows = [(f"{first:,}–{last:,}" if first < last else f"{last:,}", count) for first, last, count in bins(lengths)]
    most, wide = max(count for _, count in rows), max(len("tokens"), *(len(name) for name, _ in rows))
    head = f"{'tokens':>{wide}}  {what}"
    bars = ["█" * math.ceil(BAR * count / most) for _, count in rows]
    lines = [f"{name:>{wide}}  {count:>7,}  {bar}" for (name, count), bar in zip(rows, bars, strict=True)]
    return [head, *map(str.rstrip, lines)]


def step_lines(shown: Shown, measures: Measures, processes: int) -> list[str]:
    """The contents of a training step; both cases if only a probe of the weights can tell whether rows are packed."""
    size = StepSize.of(shown.args, processes)
    if measures.kind == "prompts":
        return prompt_lines(shown, measures, processes)
    lines = [
        f"--per_device_train_batch_size {size.batch} × --gradient_accumulation_steps {size.accumulation} × "
        f"{counted(processes, 'process', 'processes')}"
    ]
    streamed = shown.splits.summary["train"].streamed
    padded = step_line(padded_step(measures, size), streamed)
    flag = STAGES[shown.stage].capacity_flag
    if flag is None:
        return [*lines, padded]
    capacity = shown.flag(flag)
    config, how = load_config(shown.flags[ModelArguments]), ("packing", "padded_because", "shift_attn")
    exact, reason = rows_by_flags(config, *map(shown.flag, how))
    rows = len(pack(measures.lengths.tolist(), capacity))
    packed = step_line(packed_step(measures, rows, capacity, size), streamed)
    if exact is None:
        why = f"{reason}: a probe of its weights, when the stage starts, finds whether rows are packed"
        return [*lines, why, f"if packed, {packed}", f"if padded, {padded}"]
    if size.grouped and exact:
        lines.append("--train_sampling_strategy group_by_length: packed rows are full already, their order is random")
    return [*lines, f"rows are {'packed' if exact else 'padded'}: {reason}", packed if exact else padded]


def step_line(step: StepContents, streamed: bool) -> str:
    return (replace(step, steps_per_epoch=None) if streamed else step).line()


def prompt_lines(shown: Shown, measures: Measures, processes: int) -> list[str]:
    """The same for PPO, whose batches are rollouts."""
    args, batch = shown.args, shown.flag("batch_size")
    mini = shown.flag("mini_batch_size") or min(args.per_device_train_batch_size, batch)
    updates = max(1, shown.flag("ppo_epochs") * batch // mini // args.gradient_accumulation_steps)
    an_epoch = math.ceil(len(measures.lengths) / (batch * processes))
    rollouts = shown.flag("rollouts") or math.ceil(args.num_train_epochs * an_epoch)
    if args.max_steps > 0:
        rollouts = math.ceil(args.max_steps / updates)
    return [
        f"--batch_size {batch} × {counted(processes, 'process', 'processes')}",
        rollout_contents(measures, batch, processes, rollouts).line(),
        f"each is used in {counted(updates, 'update', 'updates')}; its answers may have up to "
        f"{shown.flag('max_target_length'):,} tokens each",
    ]


def chosen_samples(items: Sequence[Any], count: int) -> list[Any]:
    """`count` evenly spaced items, including the first and the last."""
    count = min(count, len(items))
    if count < 2:
        return [items[0]] if count else []
    return [items[round(number * (len(items) - 1) / (count - 1))] for number in range(count)]


def sample_lines(shown: Shown, items: Sequence[Any], count: int, color: bool) -> list[str]:
    """Training samples with labels in green, or between «» without color."""
    lines, samples = [], chosen_samples(items, count)
    for number, item in enumerate(samples, 1):
        sides = {"": item}
        if isinstance(item, PreferenceExample):
            sides = {", chosen": item.chosen, ", rejected": item.rejected}
        for side, example in sides.items():
            lines += [f"{number} of {len(samples)}: {visible(item.where)}{side}, {about(example)}", ""]
            lines += [mark_labels(shown.tokenizer, example, color=color, longest=STRETCH), ""]
    return lines


def about(example: Example) -> str:
    """ "312 tokens, 120 with labels (38.5%)"."""
    measures = measure([example])
    tokens, learned = int(measures.tokens[0, 0]), int(measures.learned[0, 0])
    part = f", {learned:,} with labels ({percent(learned, tokens)})" if learned else ""
    return counted(tokens, "token", "tokens") + part


def report(shown: Shown, processes: int, samples: int, color: bool) -> str:
    """The whole report."""
    title = f"{shown.script}.py with {shown.flag('model_name_or_path')}"
    lines = [f"{title}, chat template: {shown.template}" if shown.template else title, ""]
    for split in (name for name in ("train", "validation") if name in shown.splits.summary):
        summary, measures = shown.splits.summary[split], measure(getattr(shown.splits, split))
        what = "blocks" if summary.examples != summary.records else UNITS[summary.kind][1]
        lines += [f"── {split} ──", *shown.splits.accounts[split].files, *account_lines(shown, split)]
        lines += [*summary.lines(), "", *histogram(measures.lengths, what), ""]
        if split == "train":
            lines += ["── a step ──", *step_lines(shown, measures, processes), ""]
    if shown.rejected:
        first = shown.rejected[:REJECTED]
        lines += [f"── left out: {len(first)} of {len(shown.rejected)} ──", *first, ""]
    lines = [visible(line) for line in lines]
    split = "train" if len(shown.splits.train) else "validation"
    how = "labels are green" if color else "labels are between « and »"
    if samples:
        lines += [f"── samples of {split}: {how} ──", ""]
        lines += sample_lines(shown, getattr(shown.splits, split), samples, color)
    return "\n".join(lines)


def draw(shown: Shown, path: Path) -> None:
    """Two panels: the lengths of the records, and their shares of labels."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (lengths, learned) = plt.subplots(1, 2, figsize=(10, 3.6))
    for split, summary in shown.splits.summary.items():
        measures = measure(getattr(shown.splits, split))
        found = bins(measures.lengths, most=32)
        edges = [first - 0.5 for first, _, _ in found] + [found[-1][1] + 0.5]
        lengths.stairs([count for _, _, count in found], edges, label=split, fill=True, alpha=0.6)
        shares = measures.learned.sum(axis=1) / measures.tokens.sum(axis=1)
        learned.hist(100 * shares, bins=np.arange(0, 101, 5), label=split, alpha=0.6)
        unit = "blocks" if summary.examples != summary.records else UNITS[summary.kind][1]
        lengths.set(xlabel="tokens" if summary.kind != "pairs" else "tokens of the longer row", ylabel=unit)
        learned.set(xlabel="% of tokens with labels", ylabel=unit)
    for axis in (lengths, learned):
        axis.grid(alpha=0.3)
        axis.legend()
    figure.suptitle(f"{shown.script}.py, {shown.flag('model_name_or_path')}", fontsize=10)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)
