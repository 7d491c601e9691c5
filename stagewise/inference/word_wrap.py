"""Wraps a text that arrives in pieces at words, at the right edge of the terminal.

A word is held until it is known to be complete, so nothing printed has to move. A Chinese, Japanese or Korean
character is a word of its own and two columns wide; closing punctuation stays with the word before it.
"""

from __future__ import annotations

from collections.abc import Callable

from prompt_toolkit.utils import get_cwidth

TAB = 8
# Characters that may not start or end a line (the part of the rules of CLREQ and JIS X 4051 that answers need).
CLOSING = set("、。，．！？：；）】》〉」』〕’”…—～·%,.!?:;)]}")
OPENING = set("（【《〈「『〔‘“([{")


class WordWrap:
    """Turns pieces of text into the text to print.

    Args:
        columns: returns the current width of the terminal; called for each word.
        column: the initial column of the cursor, counted from 0.
    """

    def __init__(self, columns: Callable[[], int], column: int = 0):
        self.columns, self.column = columns, column
        self.space, self.word = "", ""  # not printed yet: the blanks before a word, and the word
        self.too_long = False  # the word is wider than a line and is printed as it arrives

    def add(self, piece: str) -> str:
        """The text that can be printed after `piece`."""
        return "".join(map(self._add, piece))

    def rest(self) -> str:
        """The text that is still held at the end."""
        return self._flush()

    def _add(self, letter: str) -> str:
        if letter == "\n":
            printed = self._flush() + "\n"
            self.column, self.space = 0, ""
            return printed
        if letter in " \t":
            printed = self._flush()
            self.space += letter
            return printed
        printed = self._flush() if self._may_break(letter) else ""
        self.word += letter
        if self.too_long or get_cwidth(self.word) > self.columns():
            printed += self._overflow()
        return printed

    def _may_break(self, letter: str) -> bool:
        """Whether a line may end between the held word and `letter`."""
        if not self.word or letter in CLOSING or self.word[-1] in OPENING or get_cwidth(letter) == 0:
            return False
        return get_cwidth(self.word[-1]) == 2 or get_cwidth(letter) == 2 or self.word[-1] == "-"

    def _overflow(self) -> str:
        """The word so far, on a line of its own: the terminal wraps it, and copying keeps it whole."""
        printed = "" if self.too_long or not self.column else "\n"
        if printed:
            self.column, self.space = 0, ""
        printed += self.space + self.word
        self.column = (self.column + self._width(self.space + self.word)) % self.columns()
        self.space, self.word, self.too_long = "", "", True
        return printed

    def _flush(self) -> str:
        """The held word, on this line if it fits, else on the next."""
        if not self.word:
            self.too_long = False
            return ""
        self.column = min(self.column, self.columns())  # a terminal that became narrower has wrapped the line itself
        if self.column and self.column + self._width(self.space + self.word) > self.columns():
            printed = "\n" + self.word
            self.column = get_cwidth(self.word)
        else:
            printed = self.space + self.word
            self.column += self._width(printed)
        self.space, self.word, self.too_long = "", "", False
        return printed

    def _width(self, text: str) -> int:
        """The columns that a text takes from the cursor on; a tab goes to the next tab stop."""
        column = self.column
        for letter in text:
            column += TAB - column % TAB if letter == "\t" else get_cwidth(letter)
        return column - self.column
