"""Questions from a terminal, with an editor that supports wide characters and several lines; or from a pipe."""

from __future__ import annotations

import sys
from typing import Protocol


class Lines(Protocol):
    """A source of questions."""

    def read(self, prompt: str) -> str:
        """The next question; EOFError at the end, KeyboardInterrupt if Ctrl-C discarded the input."""


class PipedLines:
    """One question per line; a line that ends with a backslash continues in the next one."""

    def read(self, prompt: str) -> str:
        if sys.stdin.isatty():  # answers go to a pipe, but a person types
            print(prompt, end="", file=sys.stderr, flush=True)
        lines = [self._line()]
        while lines[-1].endswith("\\"):
            lines[-1] = lines[-1][:-1]
            lines.append(self._line(ends=False))
        return "\n".join(lines)

    def _line(self, ends: bool = True) -> str:
        line = sys.stdin.readline()
        if not line and ends:
            raise EOFError
        return line.rstrip("\r\n")


class EditedLines:
    """A terminal: arrow keys, history, pasted text with its lines, wide characters.

    Enter sends; Alt+Enter, or Enter after a backslash, starts a new line.
    """

    def __init__(self) -> None:
        from prompt_toolkit import PromptSession
        from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent

        keys = KeyBindings()

        @keys.add("enter")
        @keys.add("c-j")
        def _send(event: KeyPressEvent) -> None:
            buffer = event.current_buffer
            if buffer.document.text_before_cursor.endswith("\\"):
                buffer.delete_before_cursor()
                buffer.insert_text("\n")
            else:
                buffer.validate_and_handle()

        @keys.add("escape", "enter")
        @keys.add("escape", "c-j")
        def _new_line(event: KeyPressEvent) -> None:
            event.current_buffer.insert_text("\n")

        self.session: PromptSession[str] = PromptSession(multiline=True, key_bindings=keys)

    def read(self, prompt: str) -> str:
        return self.session.prompt(prompt, prompt_continuation=" " * len(prompt))


def open_input() -> Lines:
    """An editor if a person types, plain lines otherwise."""
    return EditedLines() if sys.stdin.isatty() and sys.stdout.isatty() else PipedLines()
