"""A model's words as Markdown that holds no HTML: what looks like a tag is shown as it was written.

Code is left as it is. Elsewhere a backslash goes before what would begin a tag or an image (whose address would be
fetched as soon as it is shown). In a formula an empty group goes behind the first character instead: KaTeX draws
`<{}b` like `<b`, and no Markdown parser takes it for a tag. Whether formulas or code are found first depends on the
version of gradio, so text is left alone only where it is code either way. Mermaid diagrams are shown as their source.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import lru_cache

from markdown_it import MarkdownIt

FORMULAS = (("$$", "$$"), ("\\[", "\\]"), ("\\(", "\\)"))
_FORMULAS = [f"{re.escape(left)}[\\s\\S]+?{re.escape(right)}" for left, right in FORMULAS]
_OPENING = re.compile(r"<(?=[A-Za-z/!?])|!(?=\[)")  # of a tag, of an image
_CLOSED = re.compile(r"\\(?=<[A-Za-z/!?]|!\[)|(?<=[<!])\{\}(?=[A-Za-z/!?\[])")  # what `shown` puts in
_PARTS = re.compile("|".join([*_FORMULAS, r"\\[\s\S]", "`+"]))
_MARKDOWN = {html: MarkdownIt("commonmark", {"html": html}).enable("table") for html in (True, False)}
_FILLER = "\ue0f0"  # stands for a formula's characters: it belongs to no script
Ranges = list[tuple[int, int]]


@lru_cache(maxsize=512)
def shown(text: str) -> str:
    """Markdown without HTML, images and diagrams that reads like `text`."""
    text = text.replace("\r\n", "\n").replace("\r", "\n")
    text = re.sub(r"(`{3,}|~{3,})[ \t]*mermaid", r"\1text", text, flags=re.IGNORECASE)
    while (closed := _closed(text)) != text:  # what is no tag any more may change where code begins
        text = closed
    return text


def _closed(text: str) -> str:
    """The text with what begins a tag or an image kept from it, except where it is code in every reading."""
    if not _OPENING.search(text):
        return text
    formulas, masked = _formulas(text)
    readings = [_code(text, html) for html in (True, False)]
    readings += [_code(masked, html) for html in (True, False)] if formulas else []
    parts, done = [], 0
    for match in _OPENING.finditer(text):
        place = match.start()
        if all(_within(place, code) for code in readings) or _is_escaped(text, place):
            continue
        behind = _within(place, formulas)
        parts += [text[done : place + behind], "{}" if behind else "\\"]
        done = place + behind
    return "".join([*parts, text[done:]])


def written(text: str) -> str:
    """What `shown` made a text from: after a reader edited it on the page."""
    formulas, code = _formulas(text)[0], _code(text, html=False)
    parts, done = [], 0
    for match in _CLOSED.finditer(text):
        place = match.start()
        grouped = match[0] == "{}"
        if _within(place, code) or grouped != _within(place, formulas) or (not grouped and _is_escaped(text, place)):
            continue
        parts.append(text[done:place])
        done = match.end()
    return "".join([*parts, text[done:]])


def _formulas(text: str) -> tuple[Ranges, str]:
    """Where formulas stand if they are looked for before anything else, and the text with fillers in their place."""
    found: Ranges = []
    for formula in _FORMULAS:
        for match in re.finditer(formula, text):
            found.append(match.span())
            text = text[: match.start()] + _FILLER * len(match[0]) + text[match.end() :]
    return sorted(found), text


def _code(text: str, html: bool) -> Ranges:
    """Where code stands: blocks of it by Markdown's lines, and spans within a paragraph."""
    starts = [0]
    for line in text.split("\n"):
        starts.append(starts[-1] + len(line) + 1)
    found: Ranges = []
    for token in _MARKDOWN[html].parse(text):
        if token.map and token.type in ("fence", "code_block", "inline"):
            first, last = starts[token.map[0]], starts[min(token.map[1], len(starts) - 1)]
            found += _spans(text[:last], first) if token.type == "inline" else [(first, last)]
    return found


def _spans(text: str, place: int) -> Iterator[tuple[int, int]]:
    """The spans of code in the paragraph that begins at `place` and ends with the text."""
    while match := _PARTS.search(text, place):
        place = match.end()
        if match[0][0] == "`":
            closing = re.compile(rf"(?<!`){match[0]}(?!`)").search(text, place)
            if closing:
                place = closing.end()
                yield match.start(), place


def _within(place: int, ranges: Ranges) -> bool:
    return any(first <= place < last for first, last in ranges)


def _is_escaped(text: str, place: int) -> bool:
    """Whether a backslash before it, which no other one takes, already keeps a character from meaning anything."""
    before = text[:place]
    return (len(before) - len(before.rstrip("\\"))) % 2 == 1
