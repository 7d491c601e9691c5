"""The page of error texts: each text stands in the code, word for word."""

import ast
import re
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PAGES = ("docs/troubleshooting.md", "docs/troubleshooting_zh.md")


@cache
def texts_of_the_code() -> tuple[str, ...]:
    """Every string of the code, joined as Python joins it; what is filled in is `…`."""
    found = []
    for path in [*ROOT.glob("*.py"), *ROOT.glob("stagewise/**/*.py"), *ROOT.glob("tools/*.py")]:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.JoinedStr):
                found.append("".join(p.value if isinstance(p, ast.Constant) else "…" for p in node.values))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(node.value)
    return tuple(found)


def texts_of(page: str) -> list[str]:
    return re.findall(r"^```text\n(.+)\n```$", (ROOT / page).read_text(encoding="utf-8"), re.MULTILINE)


def in_the_code(text: str) -> bool:
    return any(text in found for found in texts_of_the_code())


@pytest.mark.parametrize("text", texts_of(PAGES[0]))
def test_an_error_text_of_the_page_is_one_of_the_code(text):
    assert in_the_code(text)


def test_both_pages_have_the_same_texts():
    assert texts_of(PAGES[0]) == texts_of(PAGES[1])
    assert len(texts_of(PAGES[0])) >= 20


def test_a_text_that_the_code_does_not_say_is_found():
    assert not in_the_code("--output_dir …: holds an unfinished … run; …")
    assert in_the_code("--fp16: needs a GPU; on a CPU use --bf16 or neither")
