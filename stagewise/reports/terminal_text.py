"""Text that comes from records, files and models, made safe to write to a terminal.

A terminal obeys control characters: they move the cursor, clear the screen, set the window's title. Bidirectional
overrides make a line read as another one. All of them are written as visible characters instead.
"""

from __future__ import annotations

import re
import sys

from loguru import logger

# C0 without newline and tab, DEL, C1, the separators U+2028 and U+2029, bidirectional embeddings, overrides and
# isolates, and lone surrogates (bytes of a file name that are not UTF-8), which no stream can encode.
_UNSAFE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


def visible(text: str) -> str:
    """The text with each character that a terminal would obey replaced by one that can be seen.

    C0 controls and DEL become their pictures (ESC is ␛), others their code (<U+202E>). Newlines and tabs stay.
    """
    return _UNSAFE.sub(_picture, text)


def _picture(match: re.Match[str]) -> str:
    code = ord(match[0])
    if code < 0x20:
        return chr(0x2400 + code)
    return "\u2421" if code == 0x7F else f"<U+{code:04X}>"


def print_error(text: object) -> None:
    """Writes `error: …` to stderr."""
    print(f"error: {visible(str(text))}", file=sys.stderr, flush=True)


def log_visible_text() -> None:
    """From now on every message of the log goes through `visible`; one that is bound with colored=True does not."""

    def clean(record) -> None:
        if not record["extra"].get("colored"):
            record["message"] = visible(record["message"])

    logger.configure(patcher=clean)
