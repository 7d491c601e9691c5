"""Text that cannot command a terminal."""

import json
import os
import sys

import pytest
from loguru import logger

from stagewise.data.examples import Example
from stagewise.reports.logs import set_up_logging
from stagewise.reports.results import mark_labels, show_sample
from stagewise.reports.terminal_text import log_visible_text, print_error, visible


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("plain text\twith tabs\nand lines, 中文, é, 👍🏽, العربية", None),
        ("a\u200db", None),  # the joiner of emoji and of Indian scripts
        ("\x1b[2J\x1b]0;title\x07", "␛[2J␛]0;title␇"),
        ("over\rwritten", "over␍written"),
        ("\x00\x08\x0b\x0c\x1f\x7f", "␀␈␋␌␟␡"),
        ("\x9b31m \x85", "<U+009B>31m <U+0085>"),
        ("one\u2028two\u2029", "one<U+2028>two<U+2029>"),
        ("\u202e\u2066txt.exe\u2069", "<U+202E><U+2066>txt.exe<U+2069>"),
        ("name-\udce9.jsonl", "name-<U+DCE9>.jsonl"),
    ],
)
def test_what_a_terminal_would_obey_is_shown(text, expected):
    assert visible(text) == (text if expected is None else expected)


def test_an_error_is_one_visible_line(capsys):
    print_error(ValueError("--flag \x1b[31mred"))
    assert capsys.readouterr().err == "error: --flag ␛[31mred\n"


@pytest.fixture
def log():
    """The lines of the log; its sinks and its patcher are as before behind the test."""
    lines = []
    logger.remove()
    logger.add(lambda message: lines.append(str(message)), format="{message}", colorize=False)
    log_visible_text()
    yield lines
    logger.configure(handlers=[{"sink": sys.stderr}], patcher=lambda record: None)


def test_the_log_shows_what_records_and_files_hold(log):
    logger.info("b\x1b]0;x\x07.jsonl: {braces} stay")
    assert log == ["b␛]0;x␇.jsonl: {braces} stay\n"]


def test_every_script_logs_visible_text(capsys):
    set_up_logging()
    logger.warning("\x1b[2Jgone")
    assert "␛[2Jgone" in capsys.readouterr().err
    logger.configure(handlers=[{"sink": sys.stderr}], patcher=lambda record: None)


class Letters:
    """A tokenizer whose ids are code points."""

    def decode(self, ids, **options):
        return "".join(map(chr, ids))


def test_a_sample_has_our_colors_and_no_others(log, monkeypatch):
    text = "\x1b[31mq\x9ba"
    example = Example([*map(ord, text)], [*[-100] * 6, *map(ord, text[6:])], "a\x1b.jsonl:1")
    assert mark_labels(Letters(), example, color=True) == "\033[90m␛[31mq\033[0m\033[32m<U+009B>a\033[0m"
    monkeypatch.setattr("stagewise.reports.results.has_color", lambda stream: True)
    show_sample(Letters(), example)
    assert "".join(log) == (
        "one training sample (a␛.jsonl:1), labels marked:\n\033[90m␛[31mq\033[0m\033[32m<U+009B>a\033[0m\n\n"
    )


def test_the_data_report_shows_names_and_records(tmp_path, tiny_checkpoint, capsys):
    """A file name and records, one of them bad, that hold escape sequences."""
    from tools import show_data

    turns = [{"from": "human", "value": "\x1b[2Jq"}, {"from": "gpt", "value": "a\x9b2J\u202e"}]
    records = [{"conversations": turns}, {"conversations": [{"from": "\x1b[8mwho", "value": "x"}]}]
    (tmp_path / "evil\x1b[31m.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    words = ["--model_name_or_path", str(tiny_checkpoint("llama")), "--train_file_dir", str(tmp_path)]
    show_data.main(["sft", *words, "--on_bad_record", "skip", "--template_name", "vicuna"])
    said = capsys.readouterr()
    assert "evil␛[31m.jsonl:1" in said.out and "␛[2Jq" in said.out
    assert not set("\x1b\x9b\u202e") & set(said.out + said.err)


def test_a_file_name_that_is_not_utf8_can_be_printed():
    name = os.fsdecode(b"\xe9.jsonl")
    assert visible(f"{name}:1").encode() == b"<U+DCE9>.jsonl:1"
