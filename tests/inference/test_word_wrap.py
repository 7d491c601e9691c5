"""Words that arrive in pieces, on lines of a terminal."""

import random
import textwrap

import pytest

from stagewise.inference.word_wrap import WordWrap


def wrapped(text: str, columns: int, column: int = 0, piece: int = 1) -> list[str]:
    wrap = WordWrap(lambda: columns, column)
    parts = [wrap.add(text[start : start + piece]) for start in range(0, len(text), piece)]
    return "".join([*parts, wrap.rest()]).split("\n")


@pytest.mark.parametrize("piece", [1, 2, 5, 100])
@pytest.mark.parametrize(
    ("text", "columns", "column", "lines"),
    [
        ("boil the eggs for seven minutes", 12, 0, ["boil the", "eggs for", "seven", "minutes"]),
        ("boil the eggs", 12, 7, ["boil", "the eggs"]),  # behind "model: "
        ("twelve chars", 12, 0, ["twelve chars"]),  # up to the very edge
        ("one\n\n  - two\n", 20, 0, ["one", "", "  - two", ""]),  # lines and indents of the text stay
        ("鸡蛋煮七分钟", 8, 0, ["鸡蛋煮七", "分钟"]),  # two columns each
        ("鸡蛋煮七,分钟", 8, 0, ["鸡蛋煮", "七,分钟"]),  # a comma does not begin a line
        ("鸡蛋煮七。", 8, 0, ["鸡蛋煮", "七。"]),
        ("煮《鸡蛋》吧", 8, 0, ["煮《鸡", "蛋》吧"]),
        ("在GPU上run很快", 8, 0, ["在GPU上", "run很快"]),
        ("a-b-c well-known", 10, 0, ["a-b-c", "well-known"]),
        ("see http://example.org/a/long/one now", 10, 0, ["see", "http://example.org/a/long/one", "now"]),
        ("e\u0301tude e\u0301tude", 6, 0, ["e\u0301tude", "e\u0301tude"]),  # a combining accent has no width
        ("a\tb", 10, 0, ["a\tb"]),
        ("a\tb", 8, 0, ["a", "b"]),
        ("", 8, 0, [""]),
    ],
)
def test_lines(text, columns, column, lines, piece):
    assert wrapped(text, columns, column, piece) == lines


def test_english_is_broken_as_textwrap_breaks_it():
    """Oracle: the standard library's wrapping of random words, none of which is wider than a line."""
    draw = random.Random(3)
    for _ in range(200):
        words = ["".join(draw.choices("abcdefg", k=draw.randint(1, 9))) for _ in range(draw.randint(1, 40))]
        columns = draw.randint(10, 40)
        assert wrapped(" ".join(words), columns, piece=draw.randint(1, 7)) == textwrap.wrap(" ".join(words), columns)


def test_a_whole_word_is_printed_before_the_next_one_is():
    wrap = WordWrap(lambda: 80)
    assert [wrap.add(piece) for piece in ("Bo", "il", " ", "th", "e\n", "鸡", "蛋")] == [
        "", "", "Boil", "", " the\n", "", "鸡"]  # fmt: skip
    assert wrap.rest() == "蛋"


def test_a_word_without_an_end_is_printed_as_it_comes():
    wrap = WordWrap(lambda: 6)
    printed = "".join(wrap.add("a" * 20))
    assert printed == "a" * 20
    assert wrap.add(" b") + wrap.rest() == " b"  # 20 % 6 leaves room for it


def test_the_width_is_that_of_the_terminal_now():
    widths = [20]
    wrap = WordWrap(lambda: widths[0])
    first = wrap.add("one two three ")
    widths[0] = 10
    assert (first + wrap.add("four five six ") + wrap.rest()).split("\n") == ["one two three", "four five", "six"]


def test_nothing_is_lost_but_blanks_at_line_ends():
    draw = random.Random(5)
    for _ in range(300):
        text = "".join(draw.choices("ab ,。(《鸡\n\t-", k=draw.randint(0, 60)))
        found = "".join(wrapped(text, draw.randint(2, 12), piece=draw.randint(1, 5)))
        assert "".join(found.split()) == "".join(text.split())
