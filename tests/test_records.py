"""Files and sets → records; everything read is kept or counted with its reason."""

import gzip
import json
from pathlib import Path

import pytest

from stagewise.conversation import RecordError, parse_conversation, parse_preference, parse_text
from stagewise.records import Account, dataset_splits, find_files, load_records, read_dataset, read_files

FLAG = "--train_file_dir"


def write(path, *lines):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"".join(line if isinstance(line, bytes) else line.encode() + b"\n" for line in lines))
    return path


def text_of(record, where):
    return where, parse_text(record, where)


# --- find_files ------------------------------------------------------------------------------------------------------


def test_files_are_found_in_nested_folders_in_order(tmp_path):
    for name in ("b.jsonl", "a/z.JSONL", "a/b/c.json", ".hidden.jsonl", "README.md"):
        write(tmp_path / name, "{}")
    found = find_files(tmp_path, (".jsonl", ".json"), FLAG)
    assert [str(path.relative_to(tmp_path)) for path in found] == ["a/b/c.json", "a/z.JSONL", "b.jsonl"]


def test_a_single_file_is_accepted(tmp_path):
    path = write(tmp_path / "a.jsonl", "{}")
    assert find_files(str(path), (".jsonl",), FLAG) == [path]


def test_linked_folders_are_followed_once(tmp_path):
    write(tmp_path / "elsewhere/a.jsonl", "{}")
    (tmp_path / "data").mkdir()
    (tmp_path / "data/link").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere/back").symlink_to(tmp_path / "data")
    assert find_files(tmp_path / "data", (".jsonl",), FLAG) == [tmp_path / "data/link/a.jsonl"]


def test_what_is_not_there_names_the_flag(tmp_path):
    with pytest.raises(ValueError, match=r"--train_file_dir: there is no folder or file '.*nothing'"):
        find_files(tmp_path / "nothing", (".jsonl",), FLAG)
    write(tmp_path / "notes.md", "x")
    with pytest.raises(ValueError, match=r"--train_file_dir: no \.jsonl or \.json file under .*only notes\.md"):
        find_files(tmp_path, (".jsonl", ".json"), FLAG)
    with pytest.raises(ValueError, match=r"--train_file_dir: .*notes\.md is not a \.jsonl file"):
        find_files(tmp_path / "notes.md", (".jsonl",), FLAG)


@pytest.mark.parametrize("name", ["a.jsonl.gz", "b.parquet", "c.csv"])
def test_data_in_a_form_that_is_not_read_is_refused_by_name(tmp_path, name):
    write(tmp_path / "ok.jsonl", "{}")
    (tmp_path / name).write_bytes(gzip.compress(b"{}"))
    with pytest.raises(ValueError, match=f"--train_file_dir: .*{name} is a .* file, which is not read"):
        find_files(tmp_path, (".jsonl",), FLAG)


# --- read_files ------------------------------------------------------------------------------------------------------


def test_byte_order_mark_blank_lines_and_line_ends(tmp_path):
    # U+2028 and a form feed are text, not line ends
    path = write(
        tmp_path / "a.jsonl",
        b"\xef\xbb\xbf",
        '{"text": "a\u2028b"}',
        "",
        "   ",
        b'{"text": "c\x0c"}\r\n',
        b'{"text": "d"}',
    )
    lines = list(read_files([path]))
    assert [line.where for line in lines] == ["a.jsonl:1", "a.jsonl:4", "a.jsonl:5"]
    assert isinstance(lines[1].value, RecordError)  # a bare form feed is not valid in a JSON string
    assert [lines[0].value, lines[2].value] == [{"text": "a\u2028b"}, {"text": "d"}]


@pytest.mark.parametrize(
    ("line", "slug", "says"),
    [
        ('{"text": NaN}', "broken JSON", "NaN is not a JSON value"),
        ('{"text": "a"', "broken JSON", "not JSON"),
        ("[" * 100_000, "broken JSON", "not JSON"),
        ("[1]", "not an object", "found list"),
        ("null", "not an object", "found NoneType"),
        ('{"text": "诊断"}'.encode("gb18030") + b"\n", "wrong encoding", "byte 0xd5 at position 11 is not UTF-8"),
        ('{"text": "a"}\n'.encode("utf-16"), "wrong encoding", "UTF-16"),
    ],
)
def test_a_line_that_cannot_be_read_is_named(tmp_path, line, slug, says):
    path = write(tmp_path / "a.jsonl", line)
    with pytest.raises(RecordError, match=says) as caught:
        load_records([path], parse_text)
    assert (caught.value.where, caught.value.reason) == ("a.jsonl:1", slug)


@pytest.mark.parametrize(
    ("content", "wheres"),
    [
        ('[{"text": "a"},\n {"text": "b"}]', ["a.json:1#1", "a.json:2#2"]),
        ('{\n  "text": "a"\n}', ["a.json:1"]),
        ('{"text": "a"}\n{"text": "b"}\n', ["a.json:1", "a.json:2"]),
    ],
)
def test_json_files_hold_a_list_one_record_or_lines(tmp_path, content, wheres):
    path = write(tmp_path / "a.json", b"\xef\xbb\xbf" + content.encode())
    records, account = load_records([path], text_of)
    assert records == list(zip(wheres, "ab", strict=False))
    assert (account.read, account.kept) == (len(wheres), len(wheres))


@pytest.mark.parametrize(
    ("content", "where", "says"),
    [
        ('[{"text": "a"},\n{"text": "b"},\n{"text": "c', "a.json:3#3", "Unterminated string"),
        ('[{"text": "a"},\n{"text": "b"}', "a.json:2#2", "expecting ',' or ']'"),
        ('[{"text": "a"}, {"text": "b"} {"text": "c"}]', "a.json:1#2", "expecting ',' or ']'"),
        ('[{"text": "a"},\n\n]', "a.json:3#2", "Expecting value"),
    ],
)
def test_what_stands_before_a_break_in_a_list_is_read(tmp_path, content, where, says):
    path = write(tmp_path / "a.json", content.encode())
    records, account = load_records([path], parse_text, on_bad_record="skip")
    assert records == list("ab")[: account.kept]
    assert (account.read, account.left_out) == (account.kept + 1, {"broken JSON": 1})
    with pytest.raises(RecordError, match=says) as caught:
        load_records([path], parse_text)
    assert caught.value.where == where


def test_one_bad_record_of_a_list_does_not_hide_the_others(tmp_path):
    path = write(tmp_path / "a.json", b'[{"text": "a"}, {"text": NaN}, 5, [], {"text": "b"}]')
    records, account = load_records([path], parse_text, on_bad_record="skip")
    assert records == ["a", "b"]
    assert (account.read, account.left_out) == (5, {"broken JSON": 1, "not an object": 2})


@pytest.mark.parametrize("content", ["[]", " [\n] "])
def test_an_empty_list_holds_no_record(tmp_path, content):
    assert list(read_files([write(tmp_path / "a.json", content)])) == []


def test_a_broken_record_of_many_lines_is_one_error(tmp_path):
    path = write(tmp_path / "a.json", "{", '"text": "a",', "}")
    lines = list(read_files([path]))
    assert [line.where for line in lines] == ["a.json:1"]
    assert lines[0].value.reason == "broken JSON"


def test_a_text_file_is_one_document_with_its_newlines(tmp_path):
    path = write(tmp_path / "a.txt", b"\xef\xbb\xbf one\r\n\r\ntwo \n")
    assert load_records([path], text_of)[0] == [("a.txt", " one\n\ntwo \n")]
    broken = write(tmp_path / "b.txt", b"caf\xe9")
    with pytest.raises(RecordError, match=r"b\.txt: byte 0xe9 at position 4 is not UTF-8"):
        load_records([broken], text_of)


def test_files_of_one_name_in_two_folders_are_told_apart(tmp_path):
    paths = [write(tmp_path / name / "a.jsonl", '{"text": "x"}') for name in ("en", "zh")]
    assert [line.where for line in read_files(paths)] == ["en/a.jsonl:1", "zh/a.jsonl:1"]


# --- load_records ----------------------------------------------------------------------------------------------------


def test_every_record_is_kept_or_counted_and_written(tmp_path):
    bad = ['{"text": ""}', '{"texts": "x"}', "{", '{"text": ""}']
    path = write(tmp_path / "a.jsonl", '{"text": "a"}', bad[0], bad[1], '{"text": "b"}', bad[2], bad[3])
    rejected = tmp_path / "out/rejected.jsonl"
    records, account = load_records([path], parse_text, on_bad_record="skip", rejected_path=rejected)
    assert records == ["a", "b"]
    assert account.as_dict() == {
        "read": 6,
        "kept": 2,
        "cut": 0,
        "left_out": {"empty text": 2, "no text": 1, "broken JSON": 1},
        "files": [str(path)],
    }
    written = [json.loads(line) for line in rejected.read_text().splitlines()]
    assert [(entry["where"], entry["reason"], entry["raw"]) for entry in written] == [
        ("a.jsonl:2", "empty text", bad[0]),
        ("a.jsonl:3", "no text", bad[1]),
        ("a.jsonl:5", "broken JSON", bad[2]),
        ("a.jsonl:6", "empty text", bad[3]),
    ]


def test_the_first_bad_record_is_the_error_by_default(tmp_path):
    path = write(tmp_path / "a.jsonl", '{"text": "a"}', '{"text": ""}', "{")
    with pytest.raises(RecordError, match=r"^a\.jsonl:2: the text is empty$"):
        load_records([path], parse_text)


def test_a_broken_character_can_be_skipped(tmp_path):
    path = write(tmp_path / "a.jsonl", '{"text": "\\ud83d"}', '{"text": "\\ud83d\\ude00"}')
    rejected = tmp_path / "rejected.jsonl"
    records, account = load_records([path], parse_text, on_bad_record="skip", rejected_path=rejected)
    assert records == ["😀"]
    assert account.left_out == {"broken character": 1}
    assert json.loads(rejected.read_text())["raw"] == '{"text": "\\ud83d"}'


def test_max_samples_counts_kept_records(tmp_path):
    path = write(tmp_path / "a.jsonl", '{"text": ""}', *(f'{{"text": "{n}"}}' for n in range(9)))
    for limit, kept, read in ((2, ["0", "1"], 3), (-1, list("012345678"), 10)):
        records, account = load_records([path], parse_text, on_bad_record="skip", max_samples=limit)
        assert (records, account.kept, account.read) == (kept, len(kept), read)
        assert account.read == account.kept + sum(account.left_out.values())


def test_nothing_left_is_an_error_that_says_why(tmp_path):
    path = write(tmp_path / "a.jsonl", '{"text": ""}')
    with pytest.raises(ValueError, match=r"no record is left of the 1 read from .*a\.jsonl: \{'empty text': 1\}"):
        load_records([path], parse_text, on_bad_record="skip")
    with pytest.raises(ValueError, match=r"no record is left of the 0 read .*the files are empty"):
        load_records([write(tmp_path / "b.jsonl", "")], parse_text)


def test_an_unknown_mode_is_refused(tmp_path):
    with pytest.raises(ValueError, match='--on_bad_record: expected "error" or "skip", found \'ignore\''):
        load_records([], parse_text, on_bad_record="ignore")


def test_only_the_first_process_writes_rejected_records(tmp_path, monkeypatch):
    path = write(tmp_path / "a.jsonl", '{"text": ""}', '{"text": "a"}')
    monkeypatch.setenv("RANK", "1")
    _, account = load_records([path], parse_text, on_bad_record="skip", rejected_path=tmp_path / "r.jsonl")
    assert account.left_out == {"empty text": 1}
    assert not (tmp_path / "r.jsonl").exists()


# --- datasets sets ---------------------------------------------------------------------------------------------------


def test_a_local_set_is_read_like_a_file(tmp_path):
    write(tmp_path / "set/train.jsonl", '{"text": "a", "extra": "x"}', '{"text": "b"}')
    write(tmp_path / "set/validation.jsonl", '{"text": "c"}')
    options = {"cache_dir": str(tmp_path / "cache")}
    name = str(tmp_path / "set")
    assert sorted(dataset_splits(name, **options)) == ["train", "validation"]
    records, account = load_records(read_dataset(name, None, "train", **options), text_of)
    assert records == [(f"{name}[train]:1", "a"), (f"{name}[train]:2", "b")]
    assert (account.read, account.kept) == (2, 2)
    # the set's second row has no "extra", which `datasets` fills with null
    assert [line.value for line in read_dataset(name, None, "train", **options)][1] == {"text": "b"}
    with pytest.raises(ValueError, match=r"--dataset_name: .* has no split 'test', only train, validation"):
        read_dataset(name, None, "test", **options)


def test_a_saved_set_is_read(tmp_path):
    import datasets

    datasets.Dataset.from_list([{"text": "a"}]).save_to_disk(tmp_path / "saved")
    assert load_records(read_dataset(str(tmp_path / "saved")), parse_text)[0] == ["a"]


# --- real data -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "parse", "expected"),
    [
        ("sft/medical_zh.jsonl", parse_conversation, {"read": 500, "kept": 500, "left_out": {}}),
        ("sft/sharegpt_zh.jsonl", parse_conversation, {"read": 250, "kept": 249, "left_out": {"empty turn": 1}}),
        ("toolcall/toolcall_zh.jsonl", parse_conversation, {"read": 150, "kept": 150, "left_out": {}}),
        ("toolcall/toolcall_preference_zh.jsonl", parse_preference, {"read": 6, "kept": 6, "left_out": {}}),
        ("reward/preference_zh.jsonl", parse_preference, {"read": 250, "kept": 250, "left_out": {}}),
        ("pretrain/fever_zh.txt", parse_text, {"read": 1, "kept": 1, "left_out": {}}),
    ],
)
def test_real_files(name, parse, expected):
    path = Path(__file__).resolve().parents[2] / "shared/data" / name
    if not path.is_file():
        pytest.skip(f"{path} is not there")
    _, account = load_records([path], parse, on_bad_record="skip")
    assert {key: account.as_dict()[key] for key in expected} == expected


def test_an_account_adds_up():
    account = Account(read=3, kept=1)
    account.leave_out("a")
    account.leave_out("a")
    assert account.left_out == {"a": 2}
    assert account.read == account.kept + sum(account.left_out.values())
