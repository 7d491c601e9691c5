"""Records that hold the text of a control token are counted and said, in every stage that reads records."""

import json
import re

import pytest

from stagewise.data.control_tokens import any_of, control_line, count_control_tokens
from stagewise.data.records import Account
from stagewise.formats.parsers import Conversation, Message, Preference
from tests.conftest import build_tiny_tokenizer
from tools import show_data


def talk(question: str, answer: str, where: str, system: str | None = None) -> Conversation:
    return Conversation((Message("user", question), Message("assistant", answer)), system, where=where)


def pair(prompt: str, chosen: str, rejected: str) -> Preference:
    asked = Conversation((Message("user", prompt),), where="p.jsonl:1")
    return Preference(asked, (Message("assistant", chosen),), (Message("assistant", rejected),), "p.jsonl:1")


@pytest.mark.parametrize(
    ("record", "first"),
    [
        (talk("what ends with </s> here", "that", "a.jsonl:7"), "a.jsonl:7 holds '</s>'"),
        (talk("hi", "yes</s>no", "a.jsonl:8"), "a.jsonl:8 holds '</s>'"),
        (talk("hi", "yes", "a.jsonl:9", "<s>be kind"), "a.jsonl:9 holds '<s>'"),
        (pair("hi", "yes", "no <pad>"), "p.jsonl:1 holds '<pad>'"),
        (("one text<s>another", "t.txt:1"), "t.txt:1 holds '<s>'"),
    ],
)
def test_what_a_person_wrote_is_looked_through(record, first):
    account = Account()
    records = [talk("< s > and </S> are none", "nor is <s", "a.jsonl:1"), record, ("plain", "t.txt:2")]
    looked_through = count_control_tokens(records, account, build_tiny_tokenizer())
    assert (len(looked_through), list(looked_through)) == (3, records)
    assert (account.control, account.first_control) == (1, first)
    assert control_line(account) == (
        f"1 record holds the text of a control token and will be read with that token in it; {first} (docs/labels.md)"
    )


@pytest.mark.parametrize(
    ("names", "pattern", "text", "first"),
    [
        (["<s>", "</s>", "<un0>", "<un12>"], r"<(?:/s>|s>|un(?:0>|12>))", "<u> <un12> <s>", "<un12>"),
        (["[INST]", "<s>", "<s"], r"(?:<s(?:>)?|\[INST\])", "a [IN] [INST]", "[INST]"),
        (["<s", "<s>x", "<s>"], r"<s(?:>(?:x)?)?", "<<s>x", "<s>x"),
        (["a", "a"], "a", "ba", "a"),
    ],
)
def test_names_that_begin_alike_are_one_branch_and_the_longest_is_found(names, pattern, text, first):
    assert any_of(names) == pattern
    assert re.search(pattern, text)[0] == first
    assert any_of([]) == ""


def test_without_any_nothing_is_said_or_kept():
    account = Account()
    assert list(count_control_tokens([("plain", "t.txt:1")], account, build_tiny_tokenizer())) == [
        ("plain", "t.txt:1")
    ]
    assert control_line(account) is None
    assert "control" not in account.as_dict()


def test_a_stage_says_it_also_when_it_reads_from_the_cache(tiny_checkpoint, tmp_path, capsys):
    lines = [{"conversations": [{"from": "human", "value": f"{n} </s>"}, {"from": "gpt", "value": "b"}]} for n in "ab"]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    words = ["--model_name_or_path", str(tiny_checkpoint("llama")), "--train_file_dir", str(tmp_path / "a.jsonl")]
    for _ in range(2):
        show_data.main(["sft", *words, "--cache_dir", str(tmp_path / "cache"), "--samples", "0"])
        shown = capsys.readouterr().out
        assert "2 records hold the text of a control token" in shown
        assert "a.jsonl:1 holds '</s>'" in shown
