"""What a malformed record ends with, and what a record that is only too long is told as."""

import json

import pytest

from stagewise.data import bad_records
from stagewise.data.bad_records import check_share, too_long_line, with_those_behind
from stagewise.data.records import Records
from stagewise.errors import ArgumentError, RecordError, TooLongError
from stagewise.formats.parsers import parse_conversation

WAY_OUT = "--on_bad_record skip leaves such records out and counts them"


def bad(place, reason="empty turn"):
    return RecordError(f"a:{place}", reason, f"turn {place} is empty")


@pytest.mark.parametrize(
    ("behind", "found"),
    [
        ([], "it is the last record"),
        ([1, 2], "none of the next 2 records is bad"),
        ([1, TooLongError("a:3", "prompt too long", "…")], "none of the next 2 records is bad"),
        (
            [bad(2), 1, bad(4, "no answer"), bad(5)],
            "of the next 4 records 3 are bad as well, 2 of them for the same reason",
        ),
    ],
)
def test_a_bad_record_says_how_many_follow_and_the_way_out(behind, found):
    error = with_those_behind(bad(1), behind)
    assert str(error) == f"a:1: turn 1 is empty ({found}; {WAY_OUT})"
    assert (error.where, error.reason) == ("a:1", "empty turn")


def test_only_so_many_records_are_looked_at(monkeypatch):
    monkeypatch.setattr(bad_records, "LOOK_ON", 3)
    rest = iter(range(10))
    assert "none of the next 3 records is bad" in str(with_those_behind(bad(1), rest))
    assert next(rest) == 3


def test_records_of_several_files_are_looked_at_behind_the_first_bad_one(tmp_path):
    good, empty = {"question": "Q", "answer": "A"}, {"question": "", "answer": "A"}
    for name, records in {"a.jsonl": [good, empty, {"question": "Q"}, good], "b.jsonl": [empty, good]}.items():
        (tmp_path / name).write_text("".join(json.dumps(record) + "\n" for record in records))
    with pytest.raises(RecordError) as caught:
        list(Records([tmp_path / "a.jsonl", tmp_path / "b.jsonl"], parse_conversation))
    assert str(caught.value) == (
        "a.jsonl:2: turn 1 (user) is empty (of the next 4 records 2 are bad as well, 1 of them for the same reason; "
        f"{WAY_OUT})"
    )


def test_a_line_tells_the_share_and_the_flag():
    left_out = {"prompt too long": 3, "answers too long": 1, "duplicate": 5}
    limits = {"max_source_length": 64, "max_target_length": 32, "model_max_length": 9}
    assert too_long_line(left_out, 16, limits) == (
        "4 of 20 records (20.0%) are left out because they are too long; a larger --max_source_length or a larger "
        "--max_target_length (now 64 and 32) keeps them"
    )
    assert too_long_line({"duplicate": 5, "no answer": 2}, 16) is None
    check_share(left_out, 4, bad(1), "train")
    with pytest.raises(
        ArgumentError, match=r"^train: 4 of 7 records \(57.1%\) are too long \(3 prompt too long, 1 ans"
    ):
        check_share(left_out, 3, bad(1), "train")
