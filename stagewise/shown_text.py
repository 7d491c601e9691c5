"""A model's words as Markdown that holds no HTML: what looks like a tag is shown as it was written.

Code and formulas are left as they are; everywhere else a backslash goes before what would begin a tag or an image
(whose address would be fetched as soon as it is shown). Diagrams in mermaid are shown as their source.
"""

from __future__ import annotations

import re
from functools import lru_cache

from markdown_it import MarkdownIt

# As the page finds formulas: one kind after the other, also inside code, where they are escaped like the rest of it.
FORMULAS = (("$$", "$$"), ("\\[", "\\]"), ("\\(", "\\)"))
_FORMULAS = tuple(re.compile(f"{re.escape(left)}[\\s\\S]+?{re.escape(right)}") for left, right in FORMULAS)
_PARTS = re.compile(r"\\[\s\S]|`+|<(?=[A-Za-z/!?])|!(?=\[)")
_BLOCKS = MarkdownIt("commonmark", {"html": False}).enable("table")
# Stands for a formula while the text is cut up: a character that belongs to no script.
_HELD = "\ue0f0{}\ue0f1"


@lru_cache(maxsize=512)
def shown(text: str) -> str:
    """Markdown without HTML, images and diagrams that reads like `text`."""
    held: list[str] = []

    def hold(match: re.Match) -> str:
        held.append(match[0])
        return _HELD.format(len(held) - 1)

    text = re.sub(r"(`{3,}|~{3,})[ \t]*mermaid", r"\1text", text, flags=re.IGNORECASE)
    for formula in _FORMULAS:
        text = formula.sub(hold, text)
    text = "".join(chunk if verbatim else _inline(chunk) for chunk, verbatim in _chunks(text))
    for number in reversed(range(len(held))):  # a later one may hold an earlier one
        text = text.replace(_HELD.format(number), held[number])
    return text


def written(text: str) -> str:
    """What `shown` made a text from: after a reader edited it on the page."""
    return "".join(chunk if verbatim else _inline(chunk, back=True) for chunk, verbatim in _chunks(text))


def _chunks(text: str) -> list[tuple[str, bool]]:
    """The text cut between its paragraphs; True where a chunk is a block of code."""
    lines = text.splitlines(keepends=True)
    place: list[tuple[int, bool]] = [(-1 - number, False) for number in range(len(lines))]
    for token in _BLOCKS.parse(text):
        if token.map and token.type in ("fence", "code_block", "inline"):
            for number in range(*token.map):
                if number < len(place):
                    place[number] = token.map[0], token.type != "inline"
    chunks: list[tuple[str, bool]] = []
    for number, line in enumerate(lines):
        if number and place[number] == place[number - 1]:
            chunks[-1] = chunks[-1][0] + line, place[number][1]
        else:
            chunks.append((line, place[number][1]))
    return chunks


def _inline(chunk: str, *, back: bool = False) -> str:
    """A paragraph with its tags and images escaped outside of `code`; `back` takes the backslashes out again."""
    done, parts = 0, []
    while match := _PARTS.search(chunk, done):
        parts.append(chunk[done : match.start()])
        found, done = match[0], match.end()
        if found[0] == "`":
            closing = re.compile(rf"(?<!`){found}(?!`)").search(chunk, done)
            if closing:
                found, done = chunk[match.start() : closing.end()], closing.end()
        elif found[0] != "\\":
            found = found if back else "\\" + found
        elif back and re.match(r"<[A-Za-z/!?]|!\[", chunk[match.start() + 1 : match.start() + 3]):
            found = found[1:]
        parts.append(found)
    return "".join([*parts, chunk[done:]])
