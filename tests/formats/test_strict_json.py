"""JSON that Python reads and no record may hold: one error a record from every reader, and reading continues."""

import json

import pytest

from stagewise.data.streaming.file_index import Files, Position
from stagewise.errors import RecordError, RefusedJSON
from stagewise.formats.parsers import parse_conversation, parse_preference
from stagewise.formats.readers import read_file
from stagewise.formats.strict_json import MAX_DEPTH, end_of, parse_json
from stagewise.tokenizer.vocabulary_files import read_texts

DEEP = "[" * 10_000 + "]" * 10_000
ODD = [
    ('{"text": "a", "text": "b"}', "key given twice", "the key 'text' stands twice in one object; leave one out"),
    ('{"text": {"a": [{"b": 1, "c": 2, "b": 3}]}}', "key given twice", "the key 'b' stands twice"),
    (f'{{"text": {DEEP}}}', "nested too deep", "more than 100 deep"),
    ('{"text": ' + '{"a":' * 5_000 + "1" + "}" * 5_001, "nested too deep", "more than 100 deep"),
    ('{"text": ' + "[" * 300 + "]" * 300 + "}", "nested too deep", "more than 100 deep"),
    ('{"text": NaN}', "broken JSON", "NaN is not a JSON value"),
    ('{"text": -Infinity}', "broken JSON", "-Infinity is not a JSON value"),
    ('{"text": ' + "9" * 5_000 + "}", "broken JSON", "Exceeds the limit"),
]
GOOD = '{"text": "good"}'


def streamed(path):
    files = Files([path], names=[path.name])
    return [files.read(place) for place in files.places(Position())]


@pytest.mark.parametrize("read", [lambda path: list(read_file(path, path.name)), streamed], ids=["read", "streamed"])
@pytest.mark.parametrize("form", ["lines.jsonl", "list.json", "lines.json"])
@pytest.mark.parametrize(("record", "reason", "says"), ODD, ids=range(len(ODD)))
def test_an_odd_record_is_one_error_and_the_next_is_read(record, reason, says, form, read, tmp_path):
    path = tmp_path / form
    text = f"[{GOOD},\n{record},\n{GOOD}]" if form == "list.json" else f"{GOOD}\n{record}\n{GOOD}\n"
    path.write_text(text)
    first, second, third = read(path)
    assert first.value == third.value == {"text": "good"}
    assert isinstance(second.value, RecordError) and second.value.reason == reason and says in second.value.message
    assert second.where == f"{form}:2" + "#2" * (form == "list.json")
    path.write_text(record)  # alone in its file
    (only,) = read(path)
    assert isinstance(only.value, RecordError) and only.value.reason == reason


def test_vocabulary_tools_name_the_line_too(tmp_path):
    (tmp_path / "a.jsonl").write_text(f'{GOOD}\n{{"text": {DEEP}}}\n')
    with pytest.raises(RecordError, match=r"a\.jsonl:2: .*more than 100 deep"):
        read_texts(tmp_path, "text_dir")


def test_depth_is_counted_and_not_brackets():
    wide = [[n] for n in range(500)]
    assert parse_json(json.dumps(wide)) == wide
    edge = "[" * MAX_DEPTH + "]" * MAX_DEPTH
    assert parse_json(edge) == json.loads(edge)
    assert parse_json(json.dumps({"text": "[" * 500})) == {"text": "[" * 500}
    with pytest.raises(RefusedJSON, match="more than 100 deep"):
        parse_json(f"[{edge}]")


def test_the_end_of_a_value_is_found_past_brackets_in_texts():
    text = '[{"a": "]}\\"]", "b": []}] {"c": 1}'
    assert text[: end_of(text, 0)] == '[{"a": "]}\\"]", "b": []}]'
    assert end_of('[{"a": "]}"}', 0) is None


def test_a_byte_order_mark_in_the_middle_of_joined_files_is_no_part_of_a_record(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes((b"\xef\xbb\xbf" + GOOD.encode() + b"\n") * 2)
    assert [line.value for line in read_file(path, "a")] == [{"text": "good"}] * 2


@pytest.mark.parametrize("data", [GOOD.encode("utf-16-le"), b"\0" * 200])
@pytest.mark.parametrize("name", ["a.jsonl", "a.txt", "a.json", "a.csv"])
def test_nul_bytes_are_no_text(name, data, tmp_path):
    path = tmp_path / name
    path.write_bytes(data)
    for read in (lambda path: list(read_file(path, name)), streamed):
        (line,) = read(path)
        assert (line.value.reason, line.where) == ("wrong encoding", f"{name}:1")


# --- line ends -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("read", [lambda path: list(read_file(path, path.name)), streamed], ids=["read", "streamed"])
def test_lines_that_end_in_cr_alone_are_read(read, tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"text": "a"}\r\r{"text": "b"}\r{"text": "c"}')
    assert [(line.where, line.value["text"]) for line in read(path)] == [
        ("a.jsonl:1", "a"),
        ("a.jsonl:3", "b"),
        ("a.jsonl:4", "c"),
    ]
    for name, comma in (("a.csv", b","), ("a.tsv", b"\t")):
        (tmp_path / name).write_bytes(b"question,answer\ra,b\rc,d\r".replace(b",", comma))
        assert [line.value for line in read(tmp_path / name)] == [
            {"question": "a", "answer": "b"},
            {"question": "c", "answer": "d"},
        ]
    (tmp_path / "a.txt").write_bytes(b"one\rtwo\r\rthree\r")
    assert [line.value for line in read(tmp_path / "a.txt")] == [{"text": "one\ntwo\n\nthree\n"}]


@pytest.mark.parametrize("read", [lambda path: list(read_file(path, path.name)), streamed], ids=["read", "streamed"])
def test_mixed_line_ends_are_read_or_named(read, tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"text": "a"}\r\n{"text": "b"}\n{"text": "c"}\r{"text": "d"}\n{"text": "e"}\r\n')
    first, second, third, fourth = read(path)
    assert [line.value["text"] for line in (first, second, fourth)] == ["a", "b", "e"]
    assert (third.where, third.value.reason) == ("a.jsonl:3", "broken JSON")
    assert "a CR stands inside this line: the file mixes line ends" in third.value.message
    (tmp_path / "a.csv").write_bytes(b"question,answer\na,b\rc,d\n")
    assert "the file mixes line ends" in read(tmp_path / "a.csv")[-1].value.message
    (tmp_path / "a.txt").write_bytes(b"one\r\ntwo\rthree\nfour")
    assert [line.value for line in read(tmp_path / "a.txt")] == [{"text": "one\ntwo\nthree\nfour"}]


# --- turns -----------------------------------------------------------------------------------------------------------

ASKED, SAID = {"from": "human", "value": "Q"}, {"from": "gpt", "value": "A"}


@pytest.mark.parametrize(
    ("turn", "reason", "says"),
    [
        (
            {**SAID, "content": "B"},
            "two contents",
            'turn 2 has two contents that differ: "value" str "A", "content" str "B"',
        ),
        ({**SAID, "content": [{"type": "text", "text": "B"}]}, "two contents", "turn 2 has two contents"),
        ({**SAID, "role": "user"}, "two roles", "turn 2 has two roles: \"from\" 'gpt', \"role\" 'user'; leave one"),
        ({**SAID, "role": "alien"}, "two roles", "turn 2 has two roles"),
        ({**SAID, "thinking": "x", "reasoning_content": "y"}, "two contents", 'turn 2 has both "reasoning_content"'),
    ],
)
def test_a_turn_that_contradicts_itself_is_a_bad_record(turn, reason, says):
    with pytest.raises(RecordError) as caught:
        parse_conversation({"conversations": [ASKED, turn]}, "a.jsonl:7")
    assert caught.value.reason == reason and says in str(caught.value)
    assert str(caught.value).startswith("a.jsonl:7: ")


def test_the_same_said_twice_is_no_contradiction():
    turns = [
        {"role": "developer", "content": "Be kind."},
        {**ASKED, "role": "user", "content": "Q"},
        {**SAID, "role": "assistant", "content": [{"type": "text", "text": "A"}]},
    ]
    found = parse_conversation({"conversations": turns, "tools": [{"name": "f"}], "functions": [{"name": "f"}]}, "a:1")
    assert found.system == "Be kind."
    assert [(message.role, message.content) for message in found.messages] == [("user", "Q"), ("assistant", "A")]


def test_two_lists_of_tools_or_answers_are_a_bad_record():
    record = {"conversations": [ASKED, SAID], "tools": [{"name": "f"}], "functions": [{"name": "g"}]}
    with pytest.raises(RecordError, match='both "tools" and "functions", and they differ'):
        parse_conversation(record, "a:1")
    pair = {"question": "Q", "response_chosen": "a", "response_rejected": "b"}
    assert parse_preference({**pair, "chosen": "a"}, "a:1").chosen[0].content == "a"
    with pytest.raises(RecordError, match='both "response_chosen" and "chosen", and they differ'):
        parse_preference({**pair, "chosen": "c"}, "a:1")


def test_half_a_character_in_tools_and_calls_is_named():
    half = json.loads('"\\ud83d"')
    with pytest.raises(RecordError, match="half of a surrogate pair") as caught:
        parse_conversation({"conversations": [ASKED, SAID], "tools": [{"name": half}]}, "a:1")
    assert caught.value.reason == "broken character"
    call = {"from": "function_call", "value": '{"name": "f", "arguments": {"a": "\\ud83d"}}'}
    with pytest.raises(RecordError, match="half of a surrogate pair"):
        parse_conversation({"conversations": [ASKED, call], "tools": [{"name": "f"}]}, "a:1")
