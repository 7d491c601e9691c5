"""Makes a model's Markdown safe: HTML in it is shown as text.

Code is not changed. Elsewhere a backslash is inserted before the start of a tag or an image (whose address would be
fetched on display). In a formula an empty group is inserted after the first character instead: KaTeX draws `<{}b` like
`<b`, and no Markdown parser takes it for a tag. Whether formulas or code are parsed first depends on the version of
gradio, so text is only left alone if it is code either way. Mermaid diagrams are shown as source.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import lru_cache

from markdown_it import MarkdownIt

FORMULAS = (("$$", "$$"), ("\\[", "\\]"), ("\\(", "\\)"))
_FORMULAS = [f"{re.escape(left)}[\\s\\S]+?{re.escape(right)}" for left, right in FORMULAS]
_OPENING = re.compile(r"<(?=[A-Za-z/!?])|!(?=\[)")  # the start of a tag, of an image
_CLOSED = re.compile(r"\\(?=<[A-Za-z/!?]|!\[)|(?<=[<!])\{\}(?=[A-Za-z/!?\[])")  # inserted by `shown`
_PARTS = re.compile("|".join([*_FORMULAS, r"\\[\s\S]", "`+"]))
_MARKDOWN = {html: MarkdownIt("commonmark", {"html": html}).enable("table") for html in (True, False)}
_FILLER = "\ue0f0"  # placeholder for a formula's characters: it belongs to no script
Ranges = list[tuple[int, int]]


@lru_cache(maxsize=512)
def escape_markdown(text: str) -> str:
    """Markdown without HTML, images and diagrams that renders like `text`."""
    text = text.replace("\r\n", "\n").replace("\r", "\n")
    text = re.sub(r"(`{3,}|~{3,})[ \t]*mermaid", r"\1text", text, flags=re.IGNORECASE)
    while (closed := _closed(text)) != text:  # an escaped tag may change where code begins
        text = closed
    return text


def _closed(text: str) -> str:
    """Escapes the start of tags and images, except where it is code in every reading."""
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


def unescape_markdown(text: str) -> str:
    """The inverse of `shown`, for a text edited on the page."""
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
    """The formulas, if they are parsed before anything else, and the text with placeholders instead of them."""
    found: Ranges = []
    for formula in _FORMULAS:
        for match in re.finditer(formula, text):
            found.append(match.span())
            text = text[: match.start()] + _FILLER * len(match[0]) + text[match.end() :]
    return sorted(found), text


def _code(text: str, html: bool) -> Ranges:
    """The ranges of code: blocks by Markdown's lines, and spans within a paragraph."""
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
    """The code spans in the paragraph that begins at `place` and ends with the text."""
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
    """Whether a character is already escaped by a backslash that is not itself escaped."""
    before = text[:place]
    return (len(before) - len(before.rstrip("\\"))) % 2 == 1
