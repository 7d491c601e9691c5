"""The output of an evaluation for people: tables in the terminal, and a page of the best and the worst answers.

The page is one file without scripts, images or external resources. All text from records or models is escaped, and the
page's policy forbids a browser to run or load anything.
"""

from __future__ import annotations

import re
import shutil
import sys
import unicodedata
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from stagewise.evaluation.statistics import Metric, Row
from stagewise.reports.html import anchor, document, pairs, table

SHOWN = 10  # records on each side
LONGEST = 4000  # characters of a text on the page


# ── numbers ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def metric_text(number: Mapping[str, float] | None, metric: Metric) -> str:
    """A metric with its interval: "0.312 [0.287, 0.338]"; "–" if there is none."""
    if number is None:
        return "–"
    text = f"{number['value']:.{metric.digits}f}"
    if "low" in number:
        text += f" [{number['low']:.{metric.digits}f}, {number['high']:.{metric.digits}f}]"
    return text


def metric_table(
    parts: Mapping[str, Mapping[str, Any]], metrics: Sequence[Metric], first: str = ""
) -> list[list[str]]:
    """One row per metric, one column per part (all, chinese, other …); metrics that no part has are left out."""
    rows = [[first, *parts]]
    for metric in metrics:
        if any(metric.name in part for part in parts.values()):
            rows.append([metric.title, *(metric_text(part.get(metric.name), metric) for part in parts.values())])
    return rows


def width(text: str) -> int:
    """The columns that a text takes in a terminal: a Chinese character takes two."""
    return sum(2 if unicodedata.east_asian_width(letter) in "WF" else 1 for letter in text)


def as_text(rows: Sequence[Sequence[str]], room: int | None = None) -> str:
    """A table for the terminal; its first row is the header, its first column is left-aligned.

    Columns beyond `room` (default: the terminal's width) continue below, after the first column again.
    """
    if room is None and sys.stdout.isatty():
        room = shutil.get_terminal_size().columns
    widths = [max(width(row[column]) for row in rows) for column in range(len(rows[0]))]
    fit = len(widths)
    while room and fit > 2 and sum(widths[:fit]) + 2 * (fit - 1) > room:
        fit -= 1
    if fit < len(widths):
        rest = as_text([[row[0], *row[fit:]] for row in rows], room)
        return f"{as_text([row[:fit] for row in rows], room)}\n\n{rest}"

    def line(row: Sequence[str]) -> str:
        cells = [" " * (room - width(cell)) + cell for cell, room in zip(row, widths, strict=True)]
        cells[0] = row[0] + " " * (widths[0] - width(row[0]))
        return "  ".join(cells).rstrip()

    return "\n".join([line(rows[0]), "  ".join("-" * room for room in widths), *map(line, rows[1:])])


def as_markdown(rows: Sequence[Sequence[str]]) -> str:
    cells = [[cell.replace("|", "\\|") for cell in row] for row in rows]
    head = [cells[0], ["---", *["---:"] * (len(rows[0]) - 1)]]
    return "".join(f"| {' | '.join(row)} |\n" for row in [*head, *cells[1:]])


# ── the page ────────────────────────────────────────────────────────────────────────────────────────────────────────


def page(title: str, about: Mapping[str, str], sections: Sequence[str]) -> str:
    """The complete page; `sections` are HTML, everything else is escaped here."""
    titles = [re.search(r'<h2 id="([^"]+)">([^<]+)', part) for part in sections]
    links = "".join(f'<a href="#{found[1]}">{found[2]}</a>' for found in titles if found)
    return document(title, f"{pairs(about.items())}<nav>{links}</nav>{''.join(sections)}")


def section(title: str, *parts: str) -> str:
    return f'<section><h2 id="{anchor(escape(title))}">{escape(title)}</h2>{"".join(parts)}</section>'


def _numbers(rows: Sequence[Sequence[str]]) -> str:
    return table(rows[0], rows[1:], numbers=range(1, len(rows[0])))


def _asked(question: Mapping[str, Any]) -> dict[str, str]:
    """The readable fields of a question with choices: its texts, and its choices with their letters."""
    found = {name: value for name, value in question.items() if isinstance(value, str)}
    lists = {name: value for name, value in question.items() if isinstance(value, list)}
    for name, choices in lists.items():
        found[name] = "\n".join(f"{chr(ord('A') + number)}. {choice}" for number, choice in enumerate(choices))
    return found


def card(title: str, numbers: str, texts: Mapping[str, str], kind: str) -> str:
    """One record; `kind` is best or worst."""
    words = "".join(
        f'<span class="label">{escape(name)}</span><pre>{escape(clipped(text))}</pre>'
        for name, text in texts.items()
        if text
    )
    about = f'<h3>{escape(title)}</h3><div class="label">{escape(numbers)}</div>'
    return f'<article class="sample {kind}">{about}{words}</article>'


def clipped(text: str) -> str:
    return text if len(text) <= LONGEST else f"{text[:LONGEST]} … ({len(text) - LONGEST:,} characters more)"


def question_text(row: Row) -> str:
    """The conversation up to the question, one paragraph per turn."""
    turns = [("system", row["system"])] if row.get("system") else []
    turns += [(turn["role"], turn["content"]) for turn in row["prompt"]]
    return turns[0][1] if len(turns) == 1 else "\n\n".join(f"{role}: {content}" for role, content in turns)


def best_and_worst(rows: Sequence[Row], key: str) -> tuple[list[Row], list[Row]]:
    """The SHOWN best and worst by a column, best first and worst first; few records are split between the two."""
    ordered = sorted(rows, key=lambda row: -row[key])
    count = min(SHOWN, (len(ordered) + 1) // 2)
    return ordered[:count], ordered[count:][::-1][:count]


def answer_section(rows: Sequence[Row], numbers: Sequence[Sequence[str]]) -> str:
    """The SFT test: best and worst by ROUGE-L."""

    def cards(chosen: Sequence[Row], kind: str) -> str:
        return "".join(
            card(
                row["where"],
                f"ROUGE-L {row['rougeL']:.3f} · perplexity of the reference {row['perplexity']:.2f} · "
                f"{row['answer_tokens']} tokens{'' if row['ended'] else ', not ended'}"
                + (f" · reward {row['reward']:.3f}" if "reward" in row else ""),
                {"question": question_text(row), "answer": row["answer"], "reference": row["reference"]},
                kind,
            )
            for row in chosen
        )

    best, worst = best_and_worst(rows, "rougeL")
    return section("Answers", _numbers(numbers), "<h3>Nearest to the reference</h3>", cards(best, "best"),
                   "<h3>Farthest from it</h3>", cards(worst, "worst"))  # fmt: skip


def pair_section(rows: Sequence[Row], *numbers: Sequence[Sequence[str]]) -> str:
    """The RM test: best and worst by margin."""

    def cards(chosen: Sequence[Row], kind: str) -> str:
        return "".join(
            card(
                row["where"],
                f"margin {row['margin']:.3f} · chosen {row['chosen']:.3f}, rejected {row['rejected']:.3f} · "
                f"{row['chosen_tokens']} and {row['rejected_tokens']} tokens",
                {"question": question_text(row), "chosen": row["chosen_answer"], "rejected": row["rejected_answer"]},
                kind,
            )
            for row in chosen
        )

    best, worst = best_and_worst(rows, "margin")
    return section("Pairs", *map(_numbers, numbers), "<h3>Largest margins</h3>", cards(best, "best"),
                   "<h3>Smallest margins, and wrong ones</h3>", cards(worst, "worst"))  # fmt: skip


def benchmark_section(name: str, rows: Sequence[Row], numbers: Sequence[Sequence[str]]) -> str:
    """A benchmark by subject and, for questions with choices, the most confident correct and wrong answers."""
    chosen = [row for row in rows if "probabilities" in row]

    def cards(correct: float, kind: str) -> str:
        found = sorted((row for row in chosen if row["correct"] == correct),
                       key=lambda row: -row["probabilities"][row["answer"]])  # fmt: skip
        return "".join(
            card(
                row["where"],
                f"answers {row['answer']} with {row['probabilities'][row['answer']]:.0%}, right is {row['target']}",
                _asked(row["question"]),
                kind,
            )
            for row in found[:SHOWN]
        )

    if not chosen:
        return section(name, _numbers(numbers))
    return section(name, _numbers(numbers), "<h3>Surest and right</h3>", cards(1.0, "best"),
                   "<h3>Surest and wrong</h3>", cards(0.0, "worst"))  # fmt: skip
