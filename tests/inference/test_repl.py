"""The help of the chat in the terminal."""

import pytest

from stagewise.inference.repl import COMMANDS, chat_help

NARROW = """\
  /save [FILE]      append the conversation
                    to a jsonl file that can
                    be trained on
                    (conversation.jsonl)"""


def test_the_help_breaks_at_words_under_its_own_column():
    assert NARROW in chat_help(44)


@pytest.mark.parametrize("columns", [0, 30, 40, 80, 200])
def test_the_help_fits_the_terminal_and_is_complete(columns):
    text = chat_help(columns)
    assert max(map(len, text.splitlines())) <= max(columns, 44)  # a narrower terminal breaks words
    words = text.split()
    for name, what in COMMANDS.items():
        assert set(name.split()) | set(what.split()) <= set(words)
