"""Pieces of HTML in which every value is escaped, and the frame and style of pages made of them."""

from __future__ import annotations

import html
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from stagewise.reports.curves import number

STYLE = Path(__file__).with_name("page.css")


def document(title: str, body: str) -> str:
    """A complete page in one file: no scripts, no external resources, light and dark. `body` is HTML."""
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'\">"
        f"<title>{text(title)}</title><style>{STYLE.read_text(encoding='utf-8')}</style></head>"
        f"<body><h1>{text(title)}</h1>{body}</body></html>\n"
    )


def text(value: Any) -> str:
    """Any value as escaped text."""
    return html.escape(str(value), quote=True)


def table(heads: Sequence[str], rows: Iterable[Sequence[Any]], numbers: Iterable[int] = ()) -> str:
    """A table of text; the columns `numbers` are right-aligned."""
    right = set(numbers)

    def cells(row: Sequence[Any], tag: str) -> str:
        kinds = (' class="number"' if place in right else "" for place in range(len(row)))
        return "".join(f"<{tag}{kind}>{text(value)}</{tag}>" for kind, value in zip(kinds, row, strict=True))

    body = "".join(f"<tr>{cells(row, 'td')}</tr>" for row in rows)
    return f'<div class="wide"><table><tr>{cells(heads, "th")}</tr>{body}</table></div>'


def pairs(items: Iterable[tuple[str, Any]]) -> str:
    """A table of names and values."""
    body = "".join(f"<tr><th>{text(name)}</th><td>{text(readable(value))}</td></tr>" for name, value in items)
    return f'<div class="wide"><table>{body}</table></div>' if body else '<p class="soft">none</p>'


def duration_text(seconds: float) -> str:
    """12.3 s, 3 min 4 s, 2 h 5 min."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {seconds} s"


def readable(value: Any) -> str:
    """A value of run.json in readable form."""
    if value is None:
        return ""
    if isinstance(value, dict):
        return ", ".join(f"{name} {readable(each)}" for name, each in value.items())
    if isinstance(value, list):
        return ", ".join(map(readable, value))
    return number(value) if isinstance(value, float) else str(value)


def metric_name(name: str) -> str:
    """A metric's name in words, without the prefix for validation."""
    return name.removeprefix("eval_").replace("_", " ")


def anchor(section: str) -> str:
    return section.replace(" ", "-")
