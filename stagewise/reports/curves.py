"""The curves of a run: which numbers of its log share a picture, as PNG files and as SVG for its page.

Numbers of single steps are noisy. A training line with enough points is drawn faint, with its exponential moving
average over it; validation, and numbers that follow a schedule, are drawn unchanged.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from html import escape
from pathlib import Path
from typing import Any

History = Sequence[dict[str, Any]]
Points = list[tuple[int, float]]

FEWEST = 12  # points from which on a line is smoothed; with fewer, an average says little
SPAN = 0.1  # share of a line's points that its average spans
FAINT = 0.3  # the opacity of a line behind its average


@dataclass(frozen=True)
class Panel:
    """One picture: the log's name of each of its lines, with the line's label."""

    title: str
    lines: tuple[tuple[str, str], ...]
    from_zero: bool = False  # a quantity whose axis starts at 0
    noisy: bool = True  # False: a schedule or a level, which an average would only delay


@dataclass(frozen=True)
class Line:
    """A line of a picture: its points by step and, if it has enough of them, their moving average over `span`."""

    label: str
    points: Points
    span: int = 0
    average: Points = field(default_factory=list)

    @property
    def best(self) -> Points:
        """The points that are drawn boldly."""
        return self.average or self.points


def both(title: str, name: str, from_zero: bool = False) -> Panel:
    """A number in training and on the validation records."""
    return Panel(title, ((name, "training"), (f"eval_{name}", "validation")), from_zero)


def _one(title: str, name: str, from_zero: bool = False, noisy: bool = True) -> Panel:
    return Panel(title, ((name, "last"),), from_zero, noisy)


LOSS = both("loss", "loss")
# Of RM and DPO, then of PPO; a panel without points is left out.
LEARNING = (
    both("accuracy: share of pairs in the right order", "accuracy", True),
    both("margin: chosen less rejected", "margin"),
    Panel(
        "rewards",
        (
            ("chosen_reward", "chosen"),
            ("rejected_reward", "rejected"),
            ("eval_chosen_reward", "chosen, validation"),
            ("eval_rejected_reward", "rejected, validation"),
        ),
    ),
    both("reward: mean score of the answers", "reward"),
    both("KL to the reference, nats per response", "kl"),
    both("length of the answers, tokens", "length"),
    both("share of answers that end", "ended", True),
    both("repetition: share of repeated 4-grams", "repetition", True),
    _one("policy loss", "policy_loss"),
    _one("value loss", "value_loss"),
    _one("share of ratios that are clipped", "clip_fraction", True),
    _one("KL coefficient", "kl_coef", noisy=False),
    _one("routers' loss, unweighted", "router_loss"),
    Panel("perplexity", (("eval_perplexity", "validation"), ("eval_reference_perplexity", "under the reference"))),
)
STEPS = (_one("learning rate", "learning_rate", noisy=False), _one("gradient norm", "grad_norm"))
COSTS = (_one("tokens per second", "tokens_per_second", True), _one("memory, GiB", "memory_gib", True, noisy=False))


def points_of(history: History, name: str) -> Points:
    """(step, value) of one number of the log, by step; at the same step the later one counts; non-finite values are
    dropped.
    """
    found = {log["step"]: log[name] for log in history if name in log and isinstance(log[name], int | float)}
    return sorted((step, float(value)) for step, value in found.items() if math.isfinite(value))


def span_of(points: Points) -> int:
    """The number of points that a line is averaged over; 0 if it has too few."""
    return max(3, round(SPAN * len(points))) if len(points) >= FEWEST else 0


def smoothed(points: Points, span: int) -> Points:
    """The exponential moving average of the values, without bias towards the start.

    With a = 2 / (span + 1), point t is the mean of the values up to t, weighted by (1 - a)^age; as TensorBoard's.
    """
    kept, total, weight, found = 1 - 2 / (span + 1), 0.0, 0.0, []
    for step, value in points:
        total, weight = kept * total + value, kept * weight + 1
        found.append((step, total / weight))
    return found


def line_of(history: History, name: str, label: str, noisy: bool = True) -> Line:
    """One number of the log as a line; validation is never averaged."""
    points = points_of(history, name)
    span = span_of(points) if noisy and not name.startswith("eval_") else 0
    return Line(label, points, span, smoothed(points, span) if span else [])


def panels_with_points(history: History, panels: Sequence[Panel]) -> list[tuple[Panel, list[Line]]]:
    """The panels that the log has points for, each with its lines."""
    found = []
    for panel in panels:
        lines = [line for name, label in panel.lines if (line := line_of(history, name, label, panel.noisy)).points]
        if lines:
            found.append((panel, lines))
    return found


# --- pictures --------------------------------------------------------------------------------------------------------


def write_pictures(history: History, folder: Path) -> list[Path]:
    """Writes loss.png, and curves.png if there is more than a loss (RM, DPO, PPO); returns the paths."""
    more = [panel for panel, _ in panels_with_points(history, LEARNING) if panel.title != "perplexity"]
    wanted = {"loss.png": [LOSS], "curves.png": more}
    written = []
    for name, panels in wanted.items():
        if found := panels_with_points(history, panels):
            _picture(found, folder / name)
            written.append(folder / name)
    return written


def plot(axis: Any, line: Line, color: str) -> None:
    """Plots a line on matplotlib's axes: with dots if they are few, faint behind its average."""
    dots = {"marker": "o", "markersize": 3} if len(line.points) <= MOST_DOTS // 2 else {}
    if line.average:
        axis.plot(*zip(*line.points, strict=True), color=color, alpha=FAINT, linewidth=1)
        label = f"{line.label}, EMA over {line.span} points"
        axis.plot(*zip(*line.average, strict=True), color=color, linewidth=1.8, label=label)
    else:
        axis.plot(*zip(*line.points, strict=True), color=color, label=line.label, **dots)


def _picture(found: list[tuple[Panel, list[Line]]], path: Path) -> None:
    from matplotlib.figure import Figure  # without pyplot, which keeps every figure and opens windows
    from matplotlib.ticker import MaxNLocator

    columns = min(len(found), 2)
    rows = math.ceil(len(found) / columns)
    size = (7, 4) if len(found) == 1 else (6 * columns, 3.4 * rows)
    figure = Figure(figsize=size)
    axes = figure.subplots(rows, columns, squeeze=False)
    for axis, (panel, lines) in zip(axes.flat, found, strict=False):
        for place, line in enumerate(lines):
            plot(axis, line, f"C{place}")
        axis.set(xlabel="step", ylabel="loss" if panel is LOSS else "", title="" if panel is LOSS else panel.title)
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
        if panel.from_zero:
            axis.set_ylim(bottom=min(0.0, *(value for line in lines for _, value in line.points)))
        if len(lines) > 1 or lines[0].average:
            axis.legend(fontsize=8)
        axis.grid(alpha=0.3)
    for axis in list(axes.flat)[len(found) :]:
        axis.set_visible(False)
    figure.tight_layout()
    figure.savefig(path, dpi=120)


# --- for the page ----------------------------------------------------------------------------------------------------

WIDTH, HEIGHT = 460, 250
LEFT, RIGHT, TOP, BOTTOM = 58, 14, 14, 34
MOST_DOTS = 120  # points of a line that get a tooltip, each with its number


def ticks(low: float, high: float, most: int = 5) -> list[float]:
    """Round numbers within [low, high]: at most `most` + 1, with a step of 1, 2 or 5 times a power of ten."""
    if not high > low:
        return [low]
    raw = (high - low) / most
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= raw * (1 - 1e-9))
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [number * step for number in range(first, last + 1)]


def number(value: float) -> str:
    """A number with few characters."""
    if value == 0:
        return "0"
    if abs(value) >= 1e7 or abs(value) < 0.001:
        return f"{value:.3g}"
    return f"{value:.4g}" if abs(value) < 1000 else f"{value:,.0f}"


def svg(title: str, lines: Sequence[Line], from_zero: bool = False) -> str:
    """A picture of lines by step, in the page's own colors (`.line0`, `.line1` …) and font."""
    steps = [step for line in lines for step, _ in line.points]
    values = [value for line in lines for _, value in line.points]
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
    for place, line in enumerate(lines):
        for points, faint in ((line.points, " faint"), (line.average, "")) if line.average else ((line.points, ""),):
            path = " ".join(f"{x(step):.1f},{y(value):.1f}" for step, value in points)
            parts.append(f'<polyline class="line{place}{faint}" points="{path}"/>')
        if len(line.points) <= MOST_DOTS:
            faint, radius = (" faint", 1.8) if line.average else ("", 2.6)
            parts += [
                f'<circle class="dot{place}{faint}" cx="{x(step):.1f}" cy="{y(value):.1f}" r="{radius}">'
                f"<title>{escape(line.label)}, step {step}: {value:.6g}</title></circle>"
                for step, value in line.points
            ]
    body = "".join(parts)
    return f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(title)}">{body}</svg>'


def figure(panel: Panel, lines: Sequence[Line]) -> str:
    """A panel as HTML: title, legend and picture; the legend gives the last number of the bold line."""
    legend = "".join(
        f'<span class="key{place}">{escape(line.label)}'
        f"{f', EMA over {line.span} points' if line.average else ''} <b>{number(line.best[-1][1])}</b></span>"
        for place, line in enumerate(lines)
    )
    return (
        f'<figure><figcaption>{escape(panel.title)}<span class="legend">{legend}</span></figcaption>'
        f"{svg(panel.title, lines, panel.from_zero)}</figure>"
    )
