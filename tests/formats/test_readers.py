"""Files of every form, plain and packed → records; what is broken in them is named by its place."""

import gzip
import json
import random
import tracemalloc
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from stagewise.errors import CutError, RecordError
from stagewise.formats import byte_stream, json_stream, readers, tables
from stagewise.formats.byte_stream import BrokenStream, RawLine, read_blocks, split_lines, suffixes_of
from stagewise.formats.readers import READERS, file_names, read_file

ROWS = [{"text": "a"}, {"text": "发烧？\n“多喝水”"}, {"text": 'c, "d"\tx', "id": "7"}]
JSON = [json.dumps(row, ensure_ascii=False) for row in ROWS]
FILES = {
    ".jsonl": "\n".join(JSON) + "\n",
    ".json": "[" + ",\n ".join(JSON) + "]\n",
    ".csv": 'id,text\n,a\n,"发烧？\n“多喝水”"\n7,"c, ""d""\tx"\n',
    ".tsv": 'id\ttext\n\ta\n\t"发烧？\n“多喝水”"\n7\t"c, ""d""\tx"\n',
}
WHERES = {
    ".jsonl": ["a.jsonl:1", "a.jsonl:2", "a.jsonl:3"],
    ".json": ["a.json:1#1", "a.json:2#2", "a.json:3#3"],
    ".csv": ["a.csv:2", "a.csv:3", "a.csv:5"],
    ".tsv": ["a.tsv:2", "a.tsv:3", "a.tsv:5"],
    ".parquet": ["a.parquet:1", "a.parquet:2", "a.parquet:3"],
}
PACK = {"": bytes, ".gz": gzip.compress, ".zst": lambda data: pyarrow.Codec("zstd").compress(data, asbytes=True)}


def read_files(files, progress=None):
    """The records of several files, in order."""
    for path, name in zip(files, file_names(files), strict=True):
        yield from read_file(path, name, progress)


def parquet(rows):
    columns = dict.fromkeys(key for row in rows for key in row)
    table = pyarrow.table({key: [row.get(key) for row in rows] for key in columns})
    sink = pyarrow.BufferOutputStream()
    pyarrow.parquet.write_table(table, sink)
    return sink.getvalue().to_pybytes()


def write(path, content, packing=""):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(PACK[packing](content if isinstance(content, bytes) else content.encode()))
    return path


def read(path):
    return list(read_files([path]))


def errors(path):
    return [(line.where, line.value.reason) for line in read(path) if isinstance(line.value, RecordError)]


# --- forms -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("packing", PACK)
@pytest.mark.parametrize("suffix", WHERES)
def test_every_form_plain_and_packed_gives_the_same_records(tmp_path, suffix, packing):
    content = parquet(ROWS) if suffix == ".parquet" else None
    path = write(tmp_path / f"a{suffix}{packing}", content or FILES[suffix], packing)
    lines = read(path)
    assert [line.value for line in lines] == ROWS
    assert [line.where for line in lines] == [where.replace(suffix, suffix + packing) for where in WHERES[suffix]]


@pytest.mark.parametrize("packing", PACK)
def test_a_text_file_is_one_document(tmp_path, packing):
    path = write(tmp_path / f"a.txt{packing}", b"\xef\xbb\xbf one\r\n\r\ntwo \n", packing)
    assert [(line.where, line.value) for line in read(path)] == [(f"a.txt{packing}", {"text": " one\n\ntwo \n"})]


def test_what_is_read_is_what_was_written_as_it_was(tmp_path):
    raws = [[line.as_read() for line in read(write(tmp_path / f"a{suffix}", FILES[suffix]))] for suffix in FILES]
    assert raws[0] == raws[1] == JSON
    assert raws[2] == [",a", ',"发烧？\n“多喝水”"', '7,"c, ""d""\tx"']
    path = write(tmp_path / "a.parquet", parquet(ROWS))
    assert [json.loads(line.as_read()) for line in read(path)] == ROWS


def test_suffixes():
    assert suffixes_of(Path("x/a.B.JSONL.GZ")) == (".jsonl", ".gz")
    assert suffixes_of(Path("a.csv")) == (".csv", "")
    assert suffixes_of(Path("a.gz")) == ("", ".gz")
    assert set(READERS) == {*readers.RECORD_FILES, ".txt"} == set(readers.TEXT_FILES)


def test_files_of_one_name_in_two_folders_are_told_apart(tmp_path):
    paths = [write(tmp_path / name / "a.jsonl", '{"text": "x"}') for name in ("en", "zh")]
    assert file_names(paths) == ["en/a.jsonl", "zh/a.jsonl"]
    assert [line.where for line in read_files(paths)] == ["en/a.jsonl:1", "zh/a.jsonl:1"]


def test_a_linked_file_has_its_own_name(tmp_path):
    (tmp_path / "snapshot").mkdir()
    (tmp_path / "snapshot" / "a.jsonl").symlink_to(write(tmp_path / "blobs" / "5f0c", '{"text": "x"}'))
    assert file_names([tmp_path / "snapshot" / "a.jsonl"]) == ["a.jsonl"]


# --- bytes and lines -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1, 2, 3, 7, 1000])
def test_lines_do_not_depend_on_the_blocks(size):
    data = b"\xef\xbb\xbfa\r\n\n b \nlast"
    parts = [data[at : at + size] for at in range(0, len(data), size)]
    if size >= 3:  # a mark cut by the first block is not looked for: blocks are a megabyte
        assert list(split_lines(parts)) == [
            RawLine(1, b"a\r", True),
            RawLine(2, b"", True),
            RawLine(3, b" b ", True),
            RawLine(4, b"last", False),
        ]
    assert b"\n".join(line.data for line in split_lines(parts[3:])) == b"".join(parts[3:])


@pytest.mark.parametrize("packing", [".gz", ".zst"])
def test_a_packed_file_in_two_parts_is_read_whole(tmp_path, packing):
    path = tmp_path / f"a.jsonl{packing}"
    path.write_bytes(PACK[packing](b'{"text": "a"}\n{"te') + PACK[packing](b'xt": "b"}\n'))
    assert [line.value for line in read(path)] == [{"text": "a"}, {"text": "b"}]


@pytest.mark.parametrize("packing", [".gz", ".zst"])
def test_a_packed_file_that_is_cut_gives_what_stands_before(tmp_path, packing):
    letters = random.Random(0).choices("abcdefghijklmnopqrstuvwxyz", k=400_000)
    lines = [json.dumps({"text": "".join(letters[at : at + 400])}) for at in range(0, 400_000, 400)]
    whole = "\n".join(lines) + "\n"
    packed = PACK[packing](whole.encode())
    path = write(tmp_path / f"a.jsonl{packing}", packed[: len(packed) // 2])
    found = read(path)
    assert len(found) > 300
    assert [line.raw for line in found[:-1]] == lines[: len(found) - 1]
    error = found[-1].value
    assert isinstance(error, CutError) and error.reason == "truncated file"
    assert f"{packing} file is cut short or damaged" in error.message
    assert error.where == f"a.jsonl{packing}:{len(found)}"
    before = "\n".join(lines[: len(found) - 1]) + "\n"
    with pytest.raises(BrokenStream):
        unpacked = 0
        for block in read_blocks(path):
            unpacked += len(block)
    assert error.lost == unpacked - len(before) < len(whole) - len(before)


def test_what_is_not_packed_at_all_is_an_error_of_its_first_record(tmp_path):
    assert errors(write(tmp_path / "a.jsonl.gz", "not packed")) == [("a.jsonl.gz:1", "truncated file")]
    assert errors(write(tmp_path / "a.csv.zst", "not packed")) == [("a.csv.zst:1", "truncated file")]
    assert errors(write(tmp_path / "a.json.zst", "not packed")) == [("a.json.zst:1", "truncated file")]


def test_progress_counts_the_bytes_of_the_file_itself(tmp_path):
    for path in (
        write(tmp_path / "a.jsonl.gz", FILES[".jsonl"] * 1000, ".gz"),
        write(tmp_path / "a.csv", FILES[".csv"]),
        write(tmp_path / "a.json", FILES[".json"]),
        write(tmp_path / "a.parquet", parquet(ROWS * 100)),
    ):
        told = []
        assert len(list(read_files([path], progress=told.append))) in (3, 300, 3000)
        assert sum(told) == path.stat().st_size


# --- lines of JSON ---------------------------------------------------------------------------------------------------


def test_byte_order_mark_blank_lines_and_line_ends(tmp_path):
    # U+2028 and a form feed are text, not line ends
    content = '\ufeff{"text": "a\u2028b"}\n\n   \n{"text": "c\x0c"}\r\n{"text": "d"}'
    lines = read(write(tmp_path / "a.jsonl", content))
    assert [line.where for line in lines] == ["a.jsonl:1", "a.jsonl:4", "a.jsonl:5"]
    assert isinstance(lines[1].value, RecordError)  # a bare form feed is not valid in a JSON string
    assert [lines[0].value, lines[2].value] == [{"text": "a\u2028b"}, {"text": "d"}]


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ('{"text": "a"}\n{"text": "b', "truncated file"),
        ('{"text": "a"}\n{"text": ', "truncated file"),
        ('{"text": "a"}\n{"text": tr', "truncated file"),
        ('{"text": "a"}\n{"text": "\\ud8', "truncated file"),
        ('{"text": "a"}\n{"text": "b"', "truncated file"),
        ('{"text": "a"}\n{"text": "发'.encode()[:-1], "truncated file"),
        ('{"text": "a"}\n{"text": b}', "broken JSON"),
        ('{"text": "a"}\n{"text": "b"\n', "broken JSON"),  # a whole line
        ('{"text": "a"}\n{"text": "b"}}', "broken JSON"),
    ],
)
def test_a_last_line_that_is_cut_is_told_from_a_broken_one(tmp_path, content, reason):
    path = write(tmp_path / "a.jsonl", content)
    assert errors(path) == [("a.jsonl:2", reason)]
    (first, last) = read(path)
    if reason == "truncated file":
        assert last.value.lost == path.stat().st_size - len(first.raw) - 1


# --- .json -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "wheres"),
    [
        ('[{"text": "a"},\n {"text": "b"}]', ["a.json:1#1", "a.json:2#2"]),
        ('{\n  "text": "a"\n}', ["a.json:1"]),
        ('{\n  "text": "a"\n}\n{"text":\n"b"}', ["a.json:1", "a.json:4#2"]),
        ('{"text": "a"} {"text": "b"}', ["a.json:1", "a.json:1#2"]),
        ('{"text": "a"}\n{"text": "b"}\n', ["a.json:1", "a.json:2"]),
        ("[]", []),
        (" [\n] ", []),
        ("", []),
    ],
)
def test_json_files_hold_a_list_records_or_lines(tmp_path, content, wheres):
    for mark in ("", "\ufeff"):
        lines = read(write(tmp_path / "a.json", mark + content))
        assert [(line.where, line.value) for line in lines] == [
            (where, {"text": text}) for where, text in zip(wheres, "ab", strict=False)
        ]


@pytest.mark.parametrize("size", [1, 2, 3, 5, 64])
def test_a_list_is_read_in_blocks_of_any_size(tmp_path, monkeypatch, size):
    records = [{"text": "发烧" * n + '\\"', "n": [n, 1.5, None, True], "e": "😀"} for n in range(40)]
    path = write(tmp_path / "a.json", json.dumps(records, indent=1) + "\n")
    monkeypatch.setattr(byte_stream, "BLOCK", size)
    assert [line.value for line in read(path)] == records
    path = write(tmp_path / "b.json", json.dumps([123456, *records], ensure_ascii=False))
    first, *others = read(path)
    assert (first.raw, first.value.reason) == ("123456", "not an object")
    assert [line.value for line in others] == records


@pytest.mark.parametrize(
    ("content", "kept", "where", "reason", "says"),
    [
        ('[{"text": "a"},\n{"text": "b"},\n{"text": "c', "ab", "a.json:3#3", "truncated file", "Unterminated string"),
        ('[{"text": "a"},\n{"text": "b"}', "ab", "a.json:2#3", "truncated file", "the list has no end"),
        ('[{"text": "a"},\n', "a", "a.json:2#2", "truncated file", "the list has no end"),
        ("[", "", "a.json:1#1", "truncated file", "the list has no end"),
        ('[{"text": "a"}, {"text": "b"} {"text": "c"}]', "ab", "a.json:1#3", "broken JSON", "expecting ',' or ']'"),
        ('[{"text": "a"},\n\n]', "a", "a.json:3#2", "broken JSON", "Expecting value"),
        ('[{"text": "a"}]\n[{"text": "b"}]', "a", "a.json:2#2", "broken JSON", "behind the end of the list"),
        ('{\n"text": "a",\n}', "", "a.json:1", "broken JSON", "nothing behind it in this file can be read"),
        ('{\n"text": "a"}\n{\n"te', "a", "a.json:3#2", "truncated file", "Unterminated string"),
    ],
)
def test_what_stands_before_a_break_is_read(tmp_path, content, kept, where, reason, says):
    path = write(tmp_path / "a.json", content)
    lines = read(path)
    assert [line.value for line in lines[:-1]] == [{"text": text} for text in kept]
    error = lines[-1].value
    assert (error.where, error.reason) == (where, reason)
    assert says in error.message


def test_one_bad_record_of_a_list_does_not_hide_the_others(tmp_path):
    content = b'[{"text": "a"}, {"text": NaN}, 5, [], {"text": "caf\xe9"}, {"text": "\xe5\x8f\x91"}]'
    path = write(tmp_path / "a.json", content)
    assert errors(path) == [
        ("a.json:1#2", "broken JSON"),
        ("a.json:1#3", "not an object"),
        ("a.json:1#4", "not an object"),
        ("a.json:1#5", "wrong encoding"),
    ]
    lines = read(path)
    assert "byte 0xe9 at position 14 of the record is not UTF-8" in lines[4].value.message
    assert lines[4].raw == '{"text": "caf\\xe9"}'
    assert (lines[0].value, lines[5].value) == ({"text": "a"}, {"text": "发"})


# --- tables ----------------------------------------------------------------------------------------------------------


def test_cells_that_are_empty_are_missing_and_nan_is_a_number(tmp_path):
    content = "\ufeffid, text ,score,\r\n1,a,NaN,x\r\n\r\n2,,nan,\r\n"
    first, second = read(write(tmp_path / "a.csv", content))
    assert (first.where, second.where) == ("a.csv:2", "a.csv:4")
    assert first.value.keys() == {"id", "text", "score"}
    assert (first.value["text"], first.value["score"] != first.value["score"]) == ("a", True)
    assert second.value.keys() == {"id", "score"}


@pytest.mark.parametrize(
    ("content", "found", "says"),
    [
        ("q,a\nx,y\nz\nv,w\n", [("a.csv:3", "ragged row")], "the header has 2 columns, this row has 1"),
        ("q,a\nx,y,z\n", [("a.csv:2", "ragged row")], "this row has 3"),
        ("q,a\nx,y\nz", [("a.csv:3", "truncated file")], "the file ends in the middle of this row"),
        ("q,a\nx,y\nx,y,z", [("a.csv:3", "ragged row")], "quote cells that hold commas"),
        ("q,q\nx,y\n", [("a.csv:1", "broken header")], "two columns q"),
        ('q,a\n"x"y,z\nv,w\n', [("a.csv:2", "broken csv")], "nothing behind it in this file can be read"),
        ('q,a\nx,y\n"v,w\n', [("a.csv:3", "truncated file")], "within a quoted cell"),
        ("q,a\n发,y\nv,w\n".encode("gb18030"), [("a.csv:2", "wrong encoding")], "byte 0xb7 at position 1"),
        ("q,发\nx,y\n".encode("gb18030"), [("a.csv:1", "wrong encoding")], "byte 0xb7 at position 3"),
        ("q,a\nx,y\n".encode("utf-16"), [("a.csv:1", "wrong encoding")], "UTF-16"),
    ],
)
def test_what_is_wrong_in_a_table_is_named(tmp_path, content, found, says):
    path = write(tmp_path / "a.csv", content)
    assert errors(path) == found
    assert says in next(line.value.message for line in read(path) if isinstance(line.value, RecordError))


def test_cells_of_any_length(tmp_path):
    long = "x" * 300_000
    assert read(write(tmp_path / "a.csv", f"q,a\nQ?,{long}\n"))[0].value == {"q": "Q?", "a": long}


def test_rows_of_parquet_hold_only_what_is_there(tmp_path):
    rows = [
        {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b", "weight": 0}], "n": 1.5},
        {"messages": [{"role": "user", "content": "c"}], "system": "s", "n": float("nan")},
    ]
    path = write(tmp_path / "a.parquet", parquet(rows))
    first, second = (line.value for line in read(path))
    assert first == rows[0]
    assert second.pop("n") != second.get("n")
    assert second == {"messages": [{"role": "user", "content": "c"}], "system": "s"}


def test_a_text_of_parquet_that_is_no_text_is_one_error(tmp_path):
    offsets, texts = (
        pyarrow.array([0, 1, 4, 5], pyarrow.int32()).buffers()[1],
        pyarrow.py_buffer(b"acaf\xe9b"[:4] + b"\xe9"),
    )
    column = pyarrow.StringArray.from_buffers(3, offsets, texts)
    pyarrow.parquet.write_table(pyarrow.table({"text": column}), tmp_path / "a.parquet")
    first, second, third = read(tmp_path / "a.parquet")
    assert (first.value, second.value) == ({"text": "a"}, {"text": "caf"})
    assert (third.where, third.value.reason) == ("a.parquet:3", "wrong encoding")
    assert "byte 0xe9 at position 1 of a text" in third.value.message


def test_a_cut_parquet_file_is_said(tmp_path):
    data = parquet(ROWS)
    path = write(tmp_path / "a.parquet", data[: len(data) // 2])
    assert errors(path) == [("a.parquet:1", "truncated file")]
    assert read(path)[0].value.lost == len(data) // 2
    assert errors(write(tmp_path / "b.parquet.gz", PACK[".gz"](data)[:100])) == [("b.parquet.gz:1", "truncated file")]


# --- text ------------------------------------------------------------------------------------------------------------


def test_a_very_long_text_is_read_in_parts_that_end_with_a_line(tmp_path, monkeypatch):
    monkeypatch.setattr(readers, "MAX_DOCUMENT", 20)
    path = write(tmp_path / "a.txt", "".join(f"line {n}\n" for n in range(1, 8)))
    found = [(line.where, line.value["text"]) for line in read(path)]
    assert found == [
        ("a.txt:1", "line 1\nline 2\n"),
        ("a.txt:3", "line 3\nline 4\n"),
        ("a.txt:5", "line 5\nline 6\n"),
        ("a.txt:7", "line 7\n"),
    ]


def test_a_text_in_another_encoding_is_named_by_line_and_byte(tmp_path):
    (line,) = read(write(tmp_path / "a.txt", b"one\ncaf\xe9\n"))
    assert str(line.value).startswith("a.txt: byte 0xe9 at line 2, position 4, is not UTF-8")
    assert line.raw == "one\ncaf\\xe9\n"


# --- size ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".csv", ".txt"])
def test_a_record_beyond_the_limit_is_refused_in_little_memory(tmp_path, monkeypatch, suffix):
    monkeypatch.setattr(byte_stream, "MAX_RECORD", 4 << 20)
    monkeypatch.setattr(json_stream, "MAX_RECORD", 4 << 20)
    monkeypatch.setattr(tables, "MAX_RECORD", 4 << 20)
    path, long = tmp_path / f"a{suffix}", b"x" * (1 << 20)
    with path.open("wb") as file:
        file.write({".json": b'[{"text": "a"},\n{"text": "', ".csv": b"text\na\n"}.get(suffix, b'{"text": "a"}\n'))
        file.write({".jsonl": b'{"text": "'}.get(suffix, b""))
        for _ in range(100):
            file.write(long)
        file.write({".json": b'"},\n{"text": "b"}]', ".jsonl": b'"}\n{"text": "b"}\n'}.get(suffix, b"\nb\n"))
    list(read_files([write(tmp_path / f"b{suffix}", "")]))  # imports
    tracemalloc.start()
    lines = read(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    wheres = {".jsonl": "a.jsonl:2", ".json": "a.json:2#2", ".csv": "a.csv:3", ".txt": "a.txt:2"}
    assert (lines[1].where, lines[1].value.reason) == (wheres[suffix], "record too long")
    assert "MiB; split it" in lines[1].value.message
    assert len(lines[1].raw) <= byte_stream.MAX_KEPT
    assert peak < 60 << 20  # of a hundred
    if suffix in (".jsonl", ".txt"):  # the lines behind it are still lines
        assert lines[2].value == ({"text": "b"} if suffix == ".jsonl" else {"text": "b\n"})


def test_a_long_record_below_the_limit_is_read(tmp_path):
    long = "发" * (6 << 20)  # 18 MiB
    for suffix, content in ((".jsonl", '{"text": "%s"}\n'), (".json", '[{"text": "%s"}]'), (".csv", 'text\n"%s"\n')):
        (line,) = read(write(tmp_path / f"a{suffix}", content % long))
        assert line.value == {"text": long}


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".csv", ".parquet"])
def test_memory_does_not_grow_with_the_file(tmp_path, suffix):
    def peak(count):
        rows = [{"text": f"{n} " + "x" * 2000} for n in range(count)]
        if suffix == ".parquet":
            path = tmp_path / f"{count}.parquet"
            pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path, row_group_size=500)
        elif suffix == ".csv":
            path = write(tmp_path / f"{count}.csv", "text\n" + "".join(row["text"] + "\n" for row in rows))
        else:
            records = map(json.dumps, rows)
            content = "\n".join(records) if suffix == ".jsonl" else "[" + ",\n".join(records) + "]"
            path = write(tmp_path / f"{count}{suffix}", content)
        del rows
        tracemalloc.start()
        assert sum(1 for _ in read_files([path])) == count
        used = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return used

    small, large = peak(3_000), peak(12_000)  # 6 and 24 MB
    assert large < small + (2 << 20)
