"""The curves of a run: which numbers of its log belong into one picture, as PNG files and as SVG for its page."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

History = Sequence[dict[str, Any]]
Points = list[tuple[int, float]]


@dataclass(frozen=True)
class Panel:
    """One picture: a name of the log for each of its lines, with what the line is called."""

    title: str
    lines: tuple[tuple[str, str], ...]
    from_zero: bool = False  # an amount, whose axis begins at 0


def _both(title: str, name: str, from_zero: bool = False) -> Panel:
    return Panel(title, ((name, "training"), (f"eval_{name}", "validation")), from_zero)


def _one(title: str, name: str, from_zero: bool = False) -> Panel:
    return Panel(title, ((name, "last"),), from_zero)


LOSS = _both("loss", "loss")
# Of RM and DPO, then of PPO; a panel without points is left out.
LEARNING = (
    _both("accuracy: share of pairs in the right order", "accuracy", True),
    _both("margin: chosen less rejected", "margin"),
    Panel(
        "rewards",
        (
            ("chosen_reward", "chosen"),
            ("rejected_reward", "rejected"),
            ("eval_chosen_reward", "chosen, validation"),
            ("eval_rejected_reward", "rejected, validation"),
        ),
    ),
    _both("reward: mean score of the answers", "reward"),
    _both("KL to the reference, nats an answer", "kl"),
    _both("length of the answers, tokens", "length"),
    _both("share of answers that end", "ended", True),
    _both("repetition: share of repeated 4-grams", "repetition", True),
    _one("policy loss", "policy_loss"),
    _one("value loss", "value_loss"),
    _one("share of ratios that are clipped", "clip_fraction", True),
    _one("KL coefficient", "kl_coef"),
    _one("routers' loss, unweighted", "router_loss"),
    Panel("perplexity", (("eval_perplexity", "validation"), ("eval_reference_perplexity", "under the reference"))),
)
STEPS = (_one("learning rate", "learning_rate"), _one("gradient norm", "grad_norm"))
COSTS = (_one("tokens a second", "tokens_per_second", True), _one("memory, GiB", "memory_gib", True))


def points_of(history: History, name: str) -> Points:
    """(step, value) of one number of the log, by step; of two at one step the later, without what is no number."""
    found = {log["step"]: log[name] for log in history if name in log and isinstance(log[name], int | float)}
    return sorted((step, float(value)) for step, value in found.items() if math.isfinite(value))


def drawn(history: History, panels: Sequence[Panel]) -> list[tuple[Panel, list[tuple[str, Points]]]]:
    """The panels that the log has points for, each with the lines that have."""
    found = []
    for panel in panels:
        lines = [(label, points) for name, label in panel.lines if (points := points_of(history, name))]
        if lines:
            found.append((panel, lines))
    return found


# --- pictures --------------------------------------------------------------------------------------------------------


def write_pictures(history: History, folder: Path) -> list[Path]:
    """loss.png, and curves.png where there is more to see than a loss (RM, DPO, PPO); returns what was written."""
    more = [panel for panel, _ in drawn(history, LEARNING) if panel.title != "perplexity"]
    wanted = {"loss.png": [LOSS], "curves.png": more}
    written = []
    for name, panels in wanted.items():
        if found := drawn(history, panels):
            _picture(found, folder / name)
            written.append(folder / name)
    return written


def _picture(found: list[tuple[Panel, list[tuple[str, Points]]]], path: Path) -> None:
    from matplotlib.figure import Figure  # without pyplot, which keeps every figure and picks a window for it
    from matplotlib.ticker import MaxNLocator

    columns = min(len(found), 2)
    rows = math.ceil(len(found) / columns)
    size = (7, 4) if len(found) == 1 else (6 * columns, 3.4 * rows)
    figure = Figure(figsize=size)
    axes = figure.subplots(rows, columns, squeeze=False)
    for axis, (panel, lines) in zip(axes.flat, found, strict=False):
        for label, points in lines:
            axis.plot(*zip(*points, strict=True), marker="o", markersize=3, label=label)
        axis.set(xlabel="step", ylabel="loss" if panel is LOSS else "", title="" if panel is LOSS else panel.title)
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
        if panel.from_zero:
            axis.set_ylim(bottom=min(0.0, *(value for _, points in lines for _, value in points)))
        if len(lines) > 1:
            axis.legend()
        axis.grid(alpha=0.3)
    for axis in list(axes.flat)[len(found) :]:
        axis.set_visible(False)
    figure.tight_layout()
    figure.savefig(path, dpi=120)


# --- for the page ----------------------------------------------------------------------------------------------------

WIDTH, HEIGHT = 460, 250
LEFT, RIGHT, TOP, BOTTOM = 58, 14, 14, 34
MOST_DOTS = 120  # points of a line that can be pointed at, each with its number


def ticks(low: float, high: float, most: int = 5) -> list[float]:
    """Round numbers within [low, high]: at most `most` + 1, a step of 1, 2 or 5 times a power of ten apart."""
    if not high > low:
        return [low]
    raw = (high - low) / most
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= raw * (1 - 1e-9))
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [number * step for number in range(first, last + 1)]


def number(value: float) -> str:
    """A number in few characters."""
    if value == 0:
        return "0"
    if abs(value) >= 1e7 or abs(value) < 0.001:
        return f"{value:.3g}"
    return f"{value:.4g}" if abs(value) < 1000 else f"{value:,.0f}"


def svg(title: str, lines: Sequence[tuple[str, Points]], from_zero: bool = False) -> str:
    """A picture of lines by step, in the page's own colours (`.line0`, `.line1` …); its text is the page's."""
    steps = [step for _, points in lines for step, _ in points]
    values = [value for _, points in lines for _, value in points]
    x_low, x_high = min(steps), max(steps)
    y_low, y_high = min(values), max(values)
    if x_low == x_high:
        x_low, x_high = x_low - 1, x_high + 1
    y_low = min(y_low, 0.0) if from_zero else y_low
    room = (y_high - y_low) * 0.06 or abs(y_high) * 0.1 or 1.0
    y_low, y_high = 0.0 if from_zero else y_low - room, y_high + room

    def x(step: float) -> float:
        return LEFT + (step - x_low) / (x_high - x_low) * (WIDTH - LEFT - RIGHT)

    def y(value: float) -> float:
        return HEIGHT - BOTTOM - (value - y_low) / (y_high - y_low) * (HEIGHT - TOP - BOTTOM)

    parts = []
    for value in ticks(y_low, y_high):
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y(value):.1f}" y2="{y(value):.1f}"/>')
        parts.append(f'<text x="{LEFT - 7}" y="{y(value) + 4:.1f}" text-anchor="end">{number(value)}</text>')
    whole = [step for step in ticks(x_low, x_high) if step == round(step)] or [x_low]
    parts += [f'<text x="{x(s):.1f}" y="{HEIGHT - BOTTOM + 16}" text-anchor="middle">{s:,.0f}</text>' for s in whole]
    parts.append(f'<text x="{(LEFT + WIDTH - RIGHT) / 2}" y="{HEIGHT - 3}" text-anchor="middle">step</text>')
    for place, (label, points) in enumerate(lines):
        path = " ".join(f"{x(step):.1f},{y(value):.1f}" for step, value in points)
        parts.append(f'<polyline class="line{place}" points="{path}"/>')
        if len(points) <= MOST_DOTS:
            parts += [
                f'<circle class="dot{place}" cx="{x(step):.1f}" cy="{y(value):.1f}" r="2.6">'
                f"<title>{escape(label)}, step {step}: {value:.6g}</title></circle>"
                for step, value in points
            ]
    body = "".join(parts)
    return f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(title)}">{body}</svg>'


def figure(panel: Panel, lines: Sequence[tuple[str, Points]]) -> str:
    """A panel as a piece of HTML: title, legend and picture; the legend gives each line's last number."""
    legend = "".join(
        f'<span class="key{place}">{escape(label)} <b>{number(points[-1][1])}</b></span>'
        for place, (label, points) in enumerate(lines)
    )
    return (
        f'<figure><figcaption>{escape(panel.title)}<span class="legend">{legend}</span></figcaption>'
        f"{svg(panel.title, lines, panel.from_zero)}</figure>"
    )
