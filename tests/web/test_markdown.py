"""What a model wrote, as Markdown without HTML."""

import pytest

from stagewise.web.markdown import escape_markdown, unescape_markdown

CASES = {
    # what is no tag stays
    "a < b and b > c": "a < b and b > c",
    "1<2": "1<2",
    "**bold**, `x < y`": "**bold**, `x < y`",
    # tags
    "<script>alert(1)</script>": "\\<script>alert(1)\\</script>",
    "a <b>b</b> <!-- c --> <?d?>": "a \\<b>b\\</b> \\<!-- c --> \\<?d?>",
    "<img src=x onerror=alert(1)>": "\\<img src=x onerror=alert(1)>",
    # a backslash of the model's own already keeps a tag from being one; two of them do not
    "\\<b>": "\\<b>",
    "\\\\<b>": "\\\\\\<b>",
    # images would be fetched
    "![x](http://a/b.png)": "\\![x](http://a/b.png)",
    "[x](http://a/b)": "[x](http://a/b)",
    # code
    "`<b>` <b>": "`<b>` \\<b>",
    "``a ` <b>`` <b>": "``a ` <b>`` \\<b>",
    "` <b>": "` \\<b>",
    "` one\n\n<b> two `": "` one\n\n\\<b> two `",  # a paragraph ends every span
    "```html\n<b>\n```\n<b>": "```html\n<b>\n```\n\\<b>",
    "~~~\n<b>\n~~~\n": "~~~\n<b>\n~~~\n",
    "```\n<b>": "```\n<b>",  # still being written
    "1. do\n\n   ```\n   <b>\n   ```\n2. <b>": "1. do\n\n   ```\n   <b>\n   ```\n2. \\<b>",
    "    <b>\n\n<i>": "    <b>\n\n\\<i>",
    "> ```\n> <b>\n> ```\n> <b>": "> ```\n> <b>\n> ```\n> \\<b>",
    # a fence in a paragraph's line is none
    "text ``` <b>\n<i> ": "text ``` \\<b>\n\\<i> ",
    # tables
    "| a | b |\n|---|---|\n| <i> | `<i>` |": "| a | b |\n|---|---|\n| \\<i> | `<i>` |",
    # formulas are drawn alike with an empty group in them
    "$$a<b$$ <b>": "$$a<{}b$$ \\<b>",
    "$$a < b$$": "$$a < b$$",
    "\\(a<b\\) and \\[\n![c]<d\n\\]": "\\(a<{}b\\) and \\[\n!{}[c]<{}d\n\\]",
    "$$\n\\frac{1}{2}\n\n<img src=x>\n$$": "$$\n\\frac{1}{2}\n\n<{}img src=x>\n$$",
    "$$ never closed <b>": "$$ never closed \\<b>",
    "`$$a<b$$` and `\\(a<b\\)`": "`$$a<b$$` and `\\(a<b\\)`",  # code
    "```\n$$a<b$$\n```": "```\n$$a<b$$\n```",
    # code in one reading only: formulas first, or code first
    "$$ ` $$ <b> `": "$$ ` $$ \\<b> `",
    "$$\n```\n$$\n```\n<b>\n```\n": "$$\n```\n$$\n```\n\\<b>\n```\n",
    # a line ends where Markdown's does, not where Python's does
    "\u2028\x85\x0c\n\n<b>\n\n```\n<i>\n```\n<u>": "\u2028\x85\x0c\n\n\\<b>\n\n```\n<i>\n```\n\\<u>",
    # diagrams are shown, not drawn
    "```mermaid\ngraph TD; A-->B\n```": "```text\ngraph TD; A-->B\n```",
    "": "",
    "多喝水,<b>早睡</b>": "多喝水,\\<b>早睡\\</b>",
}


@pytest.mark.parametrize("text", CASES)
def test_text_is_shown_without_tags(text):
    assert escape_markdown(text) == CASES[text]


@pytest.mark.parametrize("text", [text for text in CASES if "mermaid" not in text and "\\<" not in text])
def test_what_a_reader_edits_is_what_was_written(text):
    assert unescape_markdown(escape_markdown(text)) == text


@pytest.mark.parametrize("text", CASES)
def test_an_independent_renderer_finds_no_html_in_it(text):
    """markdown-it with HTML allowed, and without formulas: no token carries raw HTML or an image."""
    from markdown_it import MarkdownIt

    tokens = MarkdownIt("commonmark", {"html": True}).enable("table").parse(escape_markdown(text))
    kinds = {part.type for token in tokens for part in (token, *(token.children or ()))}
    assert not kinds & {"html_block", "html_inline", "image"}


def test_the_renderer_would_find_it():
    from markdown_it import MarkdownIt

    tokens = MarkdownIt("commonmark", {"html": True}).parse("a <b>b</b>\n\n<div>\n")
    assert {"html_block", "html_inline"} <= {part.type for t in tokens for part in (t, *(t.children or ()))}


def test_pieces_of_markdown_in_any_order_hold_no_html():
    """Seeded: 3,000 texts of pieces that open and close code, formulas, lists and lines, around a tag."""
    import random

    from markdown_it import MarkdownIt

    pieces = ["<b>", "<img src=x>", "![a](b)", "`", "``", "```", "~~~", "$$", "\\(", "\\)", "\\[", "\\]", "\\", "\n",
              "\n\n", "    ", "- ", "> ", "1. ", "| a |\n|---|\n", "x", "\u2028", "\x0b", "\r\n", "<!--",
              "-->"]  # fmt: skip
    draw, reader = random.Random(7), MarkdownIt("commonmark", {"html": True}).enable("table")
    for _ in range(3000):
        text = "".join(draw.choices(pieces, k=draw.randint(2, 14)))
        tokens = reader.parse(escape_markdown(text))
        kinds = {part.type for token in tokens for part in (token, *(token.children or ()))}
        assert not kinds & {"html_block", "html_inline", "image"}, repr(text)
