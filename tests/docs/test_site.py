"""The site of the documents: strict links, no network to build it, nothing from elsewhere to look at it."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]


class Nav(yaml.SafeLoader):
    """Reads mkdocs.yml, whose tags name Python functions."""


Nav.add_multi_constructor("tag:yaml.org,2002:python/", lambda loader, suffix, node: suffix)


def pages(nav) -> list[str]:
    """The pages of a navigation, in order."""
    if isinstance(nav, str):
        return [nav]
    parts = nav.values() if isinstance(nav, dict) else nav
    return [page for part in parts for page in pages(part)]


@pytest.fixture(scope="module")
def settings() -> dict:
    return yaml.load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"), Nav)


def test_both_languages_have_every_page_in_the_same_order(settings):
    english, chinese = (pages(part) for language in settings["nav"] for part in language.values())
    # pages that are written in one language
    translated = [page for page in english if page not in ("samples.md", "benchmarks.md", "contributing.md")]
    assert [page.replace(".md", "_zh.md") for page in translated] == chinese
    documents = {path.name for path in (ROOT / "docs").glob("*.md")}
    assert documents <= {*english, *chinese}


def test_links_lead_to_the_pages_of_the_site():
    from tools.site_hooks import on_page_markdown, site_link

    assert site_link("docs/memory.md", "../benchmarks/README.md") == "benchmarks.md"
    assert site_link("README.md", "docs/data.md") == "data.md"
    assert site_link("README.md", "README_zh.md") == "index_zh.md"
    assert site_link("docs/data.md", "show_data.md") == "show_data.md"
    assert site_link("benchmarks/README.md", "../docs/memory.md") == "memory.md"

    class Page:
        class file:  # noqa: N801
            src_uri = "index.md"

    text = "[a](docs/data.md#text-pt) [b](https://example.org/docs/x.md) [c](#here)"
    assert (
        on_page_markdown(text, Page, None, None)
        == "[a](data.md#text-pt) [b](https://example.org/docs/x.md) [c](#here)"
    )


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    """The folder of the site, built where every connection is refused."""
    pytest.importorskip("material", reason="the site needs requirements-docs.txt")
    made = tmp_path_factory.mktemp("site")
    blocked = (
        "import socket, sys\n"
        "def refuse(*args): raise OSError('no network here')\n"
        "socket.socket.connect = socket.getaddrinfo = refuse\n"
        "from mkdocs.__main__ import cli\n"
        f"cli(['build', '--strict', '--site-dir', {str(made)!r}])\n"
    )
    done = subprocess.run([sys.executable, "-c", blocked], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-4000:]
    return made


# What a browser has to scroll sideways: the page, or one of its blocks of code.
TOO_WIDE = """() => [document.documentElement, ...document.querySelectorAll('pre, pre code')]
    .filter(part => part.scrollWidth > part.clientWidth + 1)
    .map(part => part.innerText.split('\\n').sort((a, b) => b.length - a.length)[0].slice(0, 80))"""
# Blocks whose lines of up to 119 characters are broken nevertheless.
BROKEN = """() => [...document.querySelectorAll('pre code')].filter(code => {
    const style = getComputedStyle(code), lines = code.innerText.replace(/\\n$/, '').split('\\n');
    const height = code.clientHeight - parseFloat(style.paddingTop) - parseFloat(style.paddingBottom);
    const wide = line => [...line].reduce((sum, letter) => sum + (letter > '\\u2e7f' ? 1.7 : 1), 0);
    return Math.round(height / parseFloat(style.lineHeight)) > lines.length && Math.max(...lines.map(wide)) < 120;
}).map(code => code.innerText.slice(0, 80))"""


def test_no_page_is_scrolled_sideways_at_1280_pixels(site, browser):
    context = browser.new_context(viewport={"width": 1280, "height": 900})
    context.route("**/*.js", lambda route: route.abort())
    page = context.new_page()
    found = {}
    for path in sorted(site.glob("*.html")):
        page.goto(path.as_uri(), wait_until="domcontentloaded")
        wrong = page.evaluate(TOO_WIDE) + page.evaluate(BROKEN)
        if wrong:
            found[path.name] = wrong
    context.close()
    assert not found


def test_the_site_is_built_without_a_network_and_needs_none(site):
    made = site
    assert {"index.html", "index_zh.html", "sft.html", "sft_zh.html", "benchmarks.html"} <= {
        p.name for p in made.iterdir()
    }
    for path in made.glob("*.html"):
        text = path.read_text(encoding="utf-8")
        # what a browser fetches by itself; links that a reader may follow are other addresses
        fetched = re.findall(r"<(?:script|img|iframe)[^>]* src=\"?([^\" >]+)", text)
        fetched += re.findall(r"<link[^>]* rel=\"?(?:stylesheet|icon|preconnect)\"?[^>]* href=\"?([^\" >]+)", text)
        assert fetched
        assert not [address for address in fetched if address.startswith(("http:", "https:", "//"))], path.name
