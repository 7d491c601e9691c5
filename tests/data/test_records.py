"""Files and sets → records; everything read is kept or counted with its reason."""

import gzip
import json
import random
from collections import Counter
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from stagewise.data.records import (
    Account,
    DatasetLines,
    Records,
    content_key,
    dataset_splits,
    find_files,
    load_records,
    read_dataset,
)
from stagewise.errors import RecordError
from stagewise.formats import byte_stream
from stagewise.formats.parsers import parse_conversation, parse_preference, parse_prompt, parse_text
from stagewise.formats.readers import RECORD_FILES

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
    with pytest.raises(ValueError, match=r"--train_file_dir: no \.jsonl, \.json file under .*only notes\.md"):
        find_files(tmp_path, (".jsonl", ".json"), FLAG)
    with pytest.raises(ValueError, match=r"--train_file_dir: .*notes\.md is not a \.jsonl file"):
        find_files(tmp_path / "notes.md", (".jsonl",), FLAG)


@pytest.mark.parametrize("name", ["a.jsonl.gz", "b.parquet", "c.csv", "d.JSON.ZST", "e.tsv"])
def test_packed_files_and_tables_are_found(tmp_path, name):
    write(tmp_path / "x/f.jsonl", "{}")
    (tmp_path / name).write_bytes(b"x")
    assert find_files(tmp_path, RECORD_FILES, FLAG) == [tmp_path / name, tmp_path / "x/f.jsonl"]
    assert find_files(tmp_path / name, RECORD_FILES, FLAG) == [tmp_path / name]


@pytest.mark.parametrize("name", ["a.zip", "b.tar.gz", "c.arrow", "d.xlsx", "e.jsonl.bz2"])
def test_data_in_a_form_that_is_not_read_is_refused_by_name(tmp_path, name):
    write(tmp_path / "ok.jsonl", "{}")
    (tmp_path / name).write_bytes(b"x")
    with pytest.raises(ValueError, match=f"--train_file_dir: .*{name} is a .* file, which is not read"):
        find_files(tmp_path, RECORD_FILES, FLAG)


# --- load_records: what is wrong in a file ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("line", "slug", "says"),
    [
        ('{"text": NaN}', "broken JSON", "NaN is not a JSON value"),
        ('{"text": "a"', "broken JSON", "not JSON"),
        ("[" * 100_000, "nested too deep", "more than 100 deep"),
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


def test_forms_and_files_may_be_mixed_in_one_folder(tmp_path):
    write(tmp_path / "a.jsonl", json.dumps({"conversations": [{"from": "human", "value": "1"},
                                                              {"from": "gpt", "value": "2"}]}))  # fmt: skip
    write(tmp_path / "b.json", '[{"instruction": "1", "input": "", "output": "2"}, {"question": "1", "answer": "2"}]')
    write(tmp_path / "c.csv", "instruction,input,output,history", '3,,4,"[[""1"", ""2""]]"')
    rows = {"messages": [[{"role": "user", "content": "1"}, {"role": "assistant", "content": "2"}]]}
    pyarrow.parquet.write_table(pyarrow.table(rows), tmp_path / "d.parquet")
    (tmp_path / "e.jsonl.gz").write_bytes(gzip.compress(b'{"question": "1", "answer": "2", "system": "s"}'))
    records, account = load_records(find_files(tmp_path, RECORD_FILES, FLAG), parse_conversation)
    texts = [[message.content for message in record.messages] for record in records]
    assert texts == [["1", "2"], ["1", "2"], ["1", "2"], ["1", "2", "3", "4"], ["1", "2"], ["1", "2"]]
    assert [record.system for record in records] == [None] * 5 + ["s"]
    assert (account.read, account.kept) == (6, 6)


def pack(data, packing):
    zstd = pyarrow.Codec("zstd")
    return {"": data, ".gz": gzip.compress(data), ".zst": zstd.compress(data, asbytes=True)}[packing]


# What is said of each record that a form may hold, in files that can hold it.
BROKEN = {
    "question,answer\nQ,A\nQ,\n ,A\nQ,NaN\nQ\nR,B\n": (
        2,
        {"no answer": 1, "empty turn": 1, "NaN": 1, "ragged row": 1},
    ),
    'question,answer\nQ,A\nx\xe9,A\nR,"B': (1, {"wrong encoding": 1, "truncated file": 1}),
    '[{"question": "Q", "answer": "A"}, {"question": "Q"}, 5, {"chosen": "x"}, {"text"': (
        1,
        {"no answer": 1, "not an object": 1, "preference record": 1, "truncated file": 1},
    ),
    '{"question": "Q", "answer": "A"}\n{}\n{"question": "caf\xe9"}\n{"instruction": "Q", "output": 5}\n{"a': (
        1,
        {"no conversation": 1, "wrong encoding": 1, "not text": 1, "truncated file": 1},
    ),
}


@pytest.mark.parametrize("packing", ["", ".gz", ".zst"])
@pytest.mark.parametrize(("content", "suffix"), zip(BROKEN, (".csv", ".csv", ".json", ".jsonl"), strict=True))
def test_every_record_of_every_form_is_kept_or_counted_and_written(tmp_path, content, suffix, packing):
    data = content.encode("latin-1")
    path = tmp_path / f"a{suffix}{packing}"
    path.write_bytes(pack(data, packing))
    rejected = tmp_path / "rejected.jsonl"
    records, account = load_records([path], parse_conversation, on_bad_record="skip", rejected_path=rejected)
    kept, left_out = BROKEN[content]
    assert (account.kept, account.left_out) == (kept, left_out)
    assert account.read == len(records) + sum(left_out.values())
    entries = [json.loads(line) for line in rejected.read_text().splitlines()]
    counted = Counter(entry["reason"] for entry in entries)
    assert counted == left_out
    # as they were: each stands in the file, byte for byte (bytes that are no text are written \\xe9)
    readable = content.replace("\xe9", "\\xe9")
    assert all(entry["raw"] in readable and entry["raw"] for entry in entries)


def damaged(content, harm, draw):
    """`content` cut off, with some bytes changed, or with some put in."""
    place = draw.randrange(len(content))
    if harm == "cut":
        return content[:place]
    if harm == "changed":
        changed = bytearray(content)
        for _ in range(draw.randrange(1, 4)):
            changed[draw.randrange(len(content))] = draw.randrange(256)
        return bytes(changed)
    return content[:place] + draw.randbytes(3) + content[place:]


@pytest.mark.parametrize("harm", ["cut", "changed", "put in"])
@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".csv", ".parquet"])
def test_whatever_is_damaged_is_counted(tmp_path, suffix, harm, monkeypatch):
    draw = random.Random(f"{suffix} {harm}")
    rows = [{"question": f'Q{n} 发"\\\n', "answer": "A, é😀" * (n % 4 + 1)} for n in range(20)]
    sink = pyarrow.BufferOutputStream()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), sink)
    cells = ['"' + '","'.join(text.replace('"', '""') for text in row.values()) + '"\n' for row in rows]
    content = {
        ".jsonl": "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode(),
        ".json": json.dumps(rows, indent=1).encode(),
        ".csv": ("question,answer\n" + "".join(cells)).encode(),
        ".parquet": sink.getvalue().to_pybytes(),
    }[suffix]
    for number in range(60):
        packing = draw.choice(["", ".gz", ".zst"])
        inside = draw.random() < 0.5
        path = tmp_path / f"{number}{suffix}{packing}"
        path.write_bytes(
            pack(damaged(content, harm, draw), packing) if inside else damaged(pack(content, packing), harm, draw)
        )
        monkeypatch.setattr(byte_stream, "BLOCK", draw.choice([1, 7, 64, 1 << 20]))
        rejected = tmp_path / "rejected.jsonl"
        rejected.unlink(missing_ok=True)
        records = Records([path], parse_conversation, on_bad_record="skip", rejected_path=rejected)
        kept = list(records)
        account = records.account
        assert account.read == len(kept) + sum(account.left_out.values()) <= 100
        written = rejected.read_text().splitlines() if rejected.exists() else []
        assert len(written) == sum(account.left_out.values())
        assert len({json.loads(line)["where"] for line in written} | {one.where for one in kept}) == account.read


# --- load_records: what becomes of records ---------------------------------------------------------------------------


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
    with pytest.raises(RecordError, match=r"^a\.jsonl:2: the text is empty \(of the next 1 records 1 are bad"):
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
    with pytest.raises(ValueError, match=r"no record is left of the 1 read from .*a\.jsonl: 1 empty text"):
        load_records([path], parse_text, on_bad_record="skip")
    with pytest.raises(ValueError, match=r"no record is left of the 0 read .*the files are empty"):
        load_records([write(tmp_path / "b.jsonl", "")], parse_text)


def test_an_unknown_mode_is_refused(tmp_path):
    with pytest.raises(ValueError, match='--on_bad_record: expected "error" or "skip", found \'ignore\''):
        load_records([], parse_text, on_bad_record="ignore")


def test_the_text_of_a_record_is_found_again_by_its_place(tmp_path):
    lines = ['{"text": "a"}', '  {"text":   "b"}', '{"text": "c"}']
    paths = [write(tmp_path / "x/a.jsonl", *lines), write(tmp_path / "y/a.jsonl", *reversed(lines))]
    _, account = load_records(paths, parse_text)
    assert [account.again(f"x/a.jsonl:{n}") for n in (1, 2, 2, 3, 1)] == [*lines[:2], *lines[1:], lines[0]]
    assert account.again("y/a.jsonl:3") == lines[0]
    for missing in ("x/a.jsonl:4", "z.jsonl:1"):
        with pytest.raises(KeyError):
            account.again(missing)
    _, account = load_records(DatasetLines([{"text": "a"}, {"text": "b", "id": None}], "set[train]"), parse_text)
    assert account.again("set[train]:2") == '{"text": "b"}'


def test_duplicates_are_left_out_on_request(tmp_path):
    def talk(question, **more):
        return json.dumps({"question": question, "answer": "A", **more})

    records = [talk("Q"), talk("Q", id=7), talk("Q "), talk("Q", system="s"), talk("R"), talk("Q")]
    first, second = write(tmp_path / "a.jsonl", *records), write(tmp_path / "b.jsonl", records[0], talk("S"))
    seen = set()
    kept, account = load_records([first], parse_conversation, seen=seen)
    assert [record.where for record in kept] == ["a.jsonl:1", "a.jsonl:3", "a.jsonl:4", "a.jsonl:5"]
    assert (account.read, account.kept, account.left_out) == (6, 4, {"duplicate": 2})
    kept, account = load_records([second], parse_conversation, seen=seen)  # also of another source
    assert [record.where for record in kept] == ["b.jsonl:2"]
    assert load_records([first], parse_conversation)[1].kept == 6
    texts = [({"text": "a"}, "x:1"), ({"text": "a"}, "x:2"), ({"text": "b"}, "x:3")]
    assert len({content_key((parse_text(record, where), where)) for record, where in texts}) == 2


def test_what_differs_is_no_duplicate():
    def key(*turns, **more):
        turns = [{"from": ("human", "gpt")[n % 2], "value": value} for n, value in enumerate(turns)]
        return content_key(parse_conversation({"conversations": turns, **more}, "a:1"))

    different = [key("a", "b"), key("ab", "b"), key("a", "bb"), key("a", "b", "c", "d"), key("a", "b", system="c"),
                 key("a", "b", system="None"), key("a", "b", tools=[{"name": "c"}])]  # fmt: skip
    assert len(set(different)) == 7
    assert key("a", "b") == key("a", "b", id=3)


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
    with pytest.raises(ValueError, match=r"--dataset_name: `datasets` can't load '.*nowhere': "):
        dataset_splits(str(tmp_path / "nowhere"), **options)


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
        ("reward/preference_zh.jsonl", parse_prompt, {"read": 250, "kept": 250, "left_out": {}}),
        ("toolcall/toolcall_zh.jsonl", parse_conversation, {"read": 150, "kept": 150, "left_out": {}}),
        ("toolcall/toolcall_preference_zh.jsonl", parse_preference, {"read": 6, "kept": 6, "left_out": {}}),
        ("reward/preference_zh.jsonl", parse_preference, {"read": 250, "kept": 250, "left_out": {}}),
        ("pretrain/fever_zh.txt", parse_text, {"read": 1, "kept": 1, "left_out": {}}),
    ],
)
def test_real_files(name, parse, expected):
    path = Path(__file__).resolve().parents[3] / "shared/data" / name
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
