"""Every form of record and of file → ShareGPT jsonl, through the command line."""

import gzip
import json

import pyarrow
import pyarrow.parquet
import pytest

import convert_dataset
from stagewise.data.records import load_records
from stagewise.formats.parsers import form_of, parse_conversation, parse_preference, parse_text

PARSERS = {"preference": parse_preference, "text": parse_text}


@pytest.fixture
def convert(tmp_path):
    """Writes the input, runs the command, gives back the records it wrote."""

    def run(content, *flags, name="in.jsonl"):
        source, target = tmp_path / name, tmp_path / "out/sft.jsonl"
        data = content if isinstance(content, (bytes, str)) else "".join(json.dumps(r) + "\n" for r in content)
        source.write_bytes(data if isinstance(data, bytes) else data.encode())
        convert_dataset.main([str(word) for word in ("--in_file", source, "--out_file", target, *flags)])
        # every stage can read it
        load_records([target], lambda record, where: PARSERS.get(form_of(record), parse_conversation)(record, where))
        return [json.loads(line) for line in target.read_text(encoding="utf-8").splitlines()]

    return run


def sharegpt(*texts, **more):
    turns = [{"from": ("human", "gpt")[n % 2], "value": text} for n, text in enumerate(texts)]
    return {"conversations": turns, **more}


ALPACA = {"instruction": "Translate.", "input": " 感冒 \n", "output": "\ncold "}
QA = {"question": "Q?", "answer": "A."}
CHAT = {"messages": [{"role": "user", "content": "Q?"}, {"role": "assistant", "content": "A.", "weight": 0}]}
PAIR = {"question": "Q?", "response_chosen": "A.", "response_rejected": "B.", "system": "s", "history": ["a", "b"]}


# --- forms of records ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("data_type", ["auto", "alpaca", None])
def test_alpaca(convert, data_type):
    records = [
        ALPACA,
        {"instruction": "Say hi.", "input": "", "output": "Hi", "system": "Be kind.", "topic": "x"},
        {"instruction": "And?", "output": "Ok", "history": [["a", "b"], ["c", "d"]]},
        {"instruction": "And?", "input": None, "output": "Ok", "history": ["a", "b"]},
    ]
    assert convert(records, *(("--data_type", data_type) if data_type else ())) == [
        sharegpt("Translate.\n 感冒 \n", "\ncold "),
        sharegpt("Say hi.", "Hi", system="Be kind."),
        sharegpt("a", "b", "c", "d", "And?", "Ok"),
        sharegpt("a", "b", "And?", "Ok"),
    ]


@pytest.mark.parametrize("question", ["question", "query", "prompt", "input", "instruction"])
@pytest.mark.parametrize("answer", ["answer", "response", "output", "completion"])
def test_qa(convert, question, answer):
    assert convert([{question: "Q?", answer: "A."}], "--data_type", "qa") == [sharegpt("Q?", "A.")]
    record = {question: "Q?", answer: "A.", "history": [["a", "b"]], "system": "s"}
    assert convert([record], "--data_type", "history", "--overwrite") == [sharegpt("a", "b", "Q?", "A.", system="s")]


def test_chats_with_tools_and_unlearned_turns_come_back_as_they_were(convert):
    call = {"name": "get_weather", "arguments": {"city": "北京"}}
    calls = [{"type": "function", "function": {"name": "get_weather", "arguments": '{"city": "北京"}'}}]
    tools = [{"type": "function", "function": {"name": "get_weather"}}]
    messages = [
        {"role": "system", "content": " s "},
        {"role": "user", "content": "Weather? "},
        {"role": "assistant", "content": "I look.", "tool_calls": calls},
        {"role": "tool", "content": "sunny"},
        {"role": "assistant", "content": "Sunny.", "weight": 0},
    ]
    record = {"messages": messages, "tools": tools, "id": 7}
    for data_type in ("auto", "messages", "sharegpt"):
        (found,) = convert([record], "--data_type", data_type, "--overwrite")
        assert found["conversations"] == [
            {"from": "human", "value": "Weather? "},
            {"from": "gpt", "value": "I look."},
            {"from": "function_call", "value": json.dumps(call, ensure_ascii=False)},
            {"from": "observation", "value": "sunny"},
            {"from": "gpt", "value": "Sunny.", "weight": 0},
        ]
        assert (found["system"], json.loads(found["tools"]), found.keys()) == (
            " s ", tools, {"conversations", "system", "tools"})  # fmt: skip
        assert parse_conversation(found, "a:1") == parse_conversation(record, "a:1")
    assert convert([found], "--data_type", "sharegpt", "--overwrite") == [found]


@pytest.mark.parametrize("data_type", ["auto", "preference"])
def test_preferences(convert, data_type):
    talks = [[{"role": ("user", "assistant")[n % 2], "content": text} for n, text in enumerate(texts)]
             for texts in ("abcd", "ab")]  # fmt: skip
    records = [
        PAIR,
        {"instruction": "Q?", "input": "", "output": ["A.", "B."]},
        {"chosen": talks[0], "rejected": [*talks[1][:1], {"role": "assistant", "content": "x", "weight": 1}]},
    ]
    assert convert(records, "--data_type", data_type) == [
        {**sharegpt("a", "b", "Q?", system="s"), "chosen": "A.", "rejected": "B."},
        {**sharegpt("Q?"), "chosen": "A.", "rejected": "B."},
        {
            **sharegpt("a"),
            "chosen": [
                {"from": "gpt", "value": "b"},
                {"from": "human", "value": "c"},
                {"from": "gpt", "value": "d"},
            ],
            "rejected": "x",
        },
    ]


def test_auto_tells_each_record_by_its_keys(convert):
    assert convert([ALPACA, QA, CHAT, PAIR, {"prompt": "Q?", "response": "A."}, {"text": " t\n"}]) == [
        sharegpt("Translate.\n 感冒 \n", "\ncold "),
        sharegpt("Q?", "A."),
        {"conversations": [{"from": "human", "value": "Q?"}, {"from": "gpt", "value": "A.", "weight": 0}]},
        {**sharegpt("a", "b", "Q?", system="s"), "chosen": "A.", "rejected": "B."},
        sharegpt("Q?", "A."),
        {"text": " t\n"},
    ]


def test_text_is_written_readably(convert, tmp_path):
    convert([{"question": "发烧？", "answer": "多喝水。"}])
    assert "发烧？" in (tmp_path / "out/sft.jsonl").read_text(encoding="utf-8")


# --- forms of files --------------------------------------------------------------------------------------------------


def table(rows):
    sink = pyarrow.BufferOutputStream()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), sink)
    return sink.getvalue().to_pybytes()


@pytest.mark.parametrize(
    ("name", "content", "flags"),
    [
        ("in.jsonl", json.dumps(QA) + "\n", ()),
        ("in.json", json.dumps([QA], indent=2), ()),
        ("in.csv", "\ufeffquestion,answer,system\r\nQ?,A.,\r\n", ()),
        ("in.tsv", "question\tanswer\nQ?\tA.\n", ()),
        ("in.parquet", table([{**QA, "history": None}]), ()),
        ("in.jsonl.gz", gzip.compress(json.dumps(QA).encode(), mtime=0), ()),
        ("in.csv.zst", pyarrow.Codec("zstd").compress(b"question,answer\nQ?,A.\n", asbytes=True), ()),
        ("in.data", "question,answer\nQ?,A.\n", ("--file_type", "csv")),
        ("in.txt.gz", gzip.compress(json.dumps([QA]).encode(), mtime=0), ("--file_type", "json")),
    ],
)
def test_files_are_told_by_their_names(convert, name, content, flags):
    assert convert(content, *flags, name=name) == [sharegpt("Q?", "A.")]


def test_a_text_file_is_a_text(convert):
    assert convert("one\ntwo\n", name="in.txt") == [{"text": "one\ntwo\n"}]


def test_csv_with_quotes_and_newlines(convert):
    content = 'question,answer,system\r\n"What, ""exactly""?","Line one\nline two",\r\n发烧？,多喝水。,Be kind.\r\n'
    assert convert(content, name="in.csv") == [
        sharegpt('What, "exactly"?', "Line one\nline two"),
        sharegpt("发烧？", "多喝水。", system="Be kind."),
    ]


# --- what is wrong ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "data_type", "name", "says"),
    [
        ([ALPACA, {"instruction": "a"}], "alpaca", "in.jsonl", "in.jsonl:2: no turn is from the assistant"),
        ([{"instruction": "", "output": "b"}], "alpaca", "in.jsonl", "in.jsonl:1: turn 1 (user) is empty"),
        ([{"instruction": "a", "output": ["b", "c"]}], "alpaca", "in.jsonl", 'expected "instruction" and "output"'),
        ([QA], "alpaca", "in.jsonl", "found the keys question, answer; --data_type auto"),
        ([QA], "messages", "in.jsonl", 'expected "conversations" or "messages"'),
        ([QA], "preference", "in.jsonl", "found a question"),
        ([QA], "history", "in.jsonl", 'expected "history", found the keys question, answer'),
        ([{"q": "a", "answer": "b"}], "qa", "in.jsonl", "in.jsonl:1: expected exactly one of question, query"),
        (
            [{"question": "a", "input": "x", "answer": "b"}],
            "qa",
            "in.jsonl",
            "expected exactly one of question, query",
        ),
        ([{"q": "a"}], "auto", "in.jsonl", "in.jsonl:1: found the keys q: no conversation, instruction, question"),
        ('{"question": NaN, "answer": "b"}\n', "qa", "in.jsonl", "in.jsonl:1: not JSON: NaN"),
        ('[{"question": "a", "answer": "b"},\n 5]', "qa", "in.json", "in.json:2#2: a record must be a JSON object"),
        ("question,answer\na,b\nc\n", "qa", "in.csv", "in.csv:3: the header has 2 columns"),
        ("question,answer\na,NaN\n", "auto", "in.csv", "in.csv:2: answer must be text, found NaN"),
        ('question,answer\n"a"b,c\n', "qa", "in.csv", "in.csv:2: not csv"),
        ("question,answer\n发,b\n".encode("gb18030"), "qa", "in.csv", "is not UTF-8"),
        ('[{"question": "a", "answer": "b"},', "qa", "in.json", "cut short: the list has no end; --recover takes"),
        ("", "qa", "in.jsonl", "none of the 0 records"),
    ],
)
def test_the_first_bad_record_ends_it_and_leaves_no_output(convert, tmp_path, content, data_type, name, says):
    with pytest.raises(SystemExit) as ended:
        convert(content, "--data_type", data_type, name=name)
    assert says in str(ended.value.code)
    assert list((tmp_path / "out").iterdir()) == []


def test_bad_records_are_skipped_on_request_counted_and_written(convert, tmp_path):
    records = [QA, {"question": "Q?"}, {"question": " ", "answer": "A."}]
    assert convert(records, "--on_bad_record", "skip") == [sharegpt("Q?", "A.")]
    rejected = tmp_path / "out/sft.jsonl.rejected.jsonl"
    entries = [json.loads(line) for line in rejected.read_text().splitlines()]
    assert [(entry["where"], entry["reason"], json.loads(entry["raw"])) for entry in entries] == [
        ("in.jsonl:2", "no answer", records[1]),
        ("in.jsonl:3", "empty turn", records[2]),
    ]
    account = convert_dataset.convert(tmp_path / "in.jsonl", tmp_path / "again.jsonl", on_bad_record="skip")
    assert (account.read, account.kept, account.left_out) == (3, 1, {"no answer": 1, "empty turn": 1})
    assert account.lost == 0
    convert([QA], "--overwrite")
    assert not rejected.exists()  # it told of another conversion


# --- files that are cut off ------------------------------------------------------------------------------------------

LINES = [json.dumps({"question": f"Q{n}", "answer": "发" * n}, ensure_ascii=False) for n in range(1, 6)]
CUT = {  # content, records before the cut, bytes behind them
    "in.jsonl": ("\n".join(LINES)[:-2], 4, len(LINES[-1].encode()) - 4),
    "in.json": ("[" + ",\n".join(LINES)[:-2], 4, len(LINES[-1].encode()) - 4),
    "whole.json": ("[" + ",\n".join(LINES), 5, 0),
    "in.csv": ('question,answer\nQ1,A1\nQ2,"A2\n', 1, len('Q2,"A2\n')),
    "cell.csv": ("question,answer\nQ1,A1\nQ2,A", 1, len("Q2,A")),
    "whole.csv": ("question,answer\nQ1,A1\nQ2,A2\n", 2, 0),
    "whole.jsonl": ("\n".join(LINES), 5, 0),
}


@pytest.mark.parametrize("name", CUT)
def test_whole_records_before_a_cut_are_recovered(convert, tmp_path, name):
    content, whole, lost = CUT[name]
    data = content.encode()
    if name in ("in.jsonl", "in.json"):
        data = content[:-1].encode() + "发".encode()[:2]  # in the middle of a character
    if lost and name != "cell.csv":  # such a row could be whole
        with pytest.raises(SystemExit):
            convert(data, name=name)
    found = convert(data, "--recover", "--overwrite", name=name)
    assert len(found) == whole
    assert [record["conversations"][0]["value"] for record in found] == [f"Q{n}" for n in range(1, whole + 1)]
    account = convert_dataset.convert(tmp_path / name, tmp_path / "x.jsonl", recover=True)
    assert (account.read, account.kept, account.left_out) == (whole, whole, {})
    before = {".jsonl": "\n".join(LINES[:whole]) + "\n", ".json": "[" + ",\n".join(LINES[:whole]) + ",\n"}
    if name in ("in.jsonl", "in.json"):
        lost = len(data) - len(before[name[2:]].encode())
    assert account.lost == lost


@pytest.mark.parametrize("recover", [False, True])
def test_a_packed_file_that_is_cut(convert, tmp_path, recover):
    records = [{"question": f"Q{n}", "answer": str(hash((n, "salt")))} for n in range(5000)]
    packed = gzip.compress("".join(json.dumps(record) + "\n" for record in records).encode())
    cut = packed[: len(packed) // 2]
    if not recover:
        with pytest.raises(SystemExit) as ended:
            convert(cut, name="in.jsonl.gz")
        assert "cut short or damaged" in str(ended.value.code) and "--recover" in str(ended.value.code)
        return
    found = convert(cut, "--recover", name="in.jsonl.gz")
    assert found == [sharegpt(record["question"], record["answer"]) for record in records[: len(found)]]
    assert 2000 < len(found) < 3000


def test_a_cut_parquet_file_holds_nothing_to_recover(convert, tmp_path):
    pyarrow.parquet.write_table(pyarrow.table({"question": ["Q?"], "answer": ["A."]}), tmp_path / "x")
    cut = (tmp_path / "x").read_bytes()[:-20]
    with pytest.raises(SystemExit) as ended:
        convert(cut, name="in.parquet")
    assert "cut short or damaged" in str(ended.value.code) and "--recover" not in str(ended.value.code)
    with pytest.raises(SystemExit) as ended:
        convert(cut, "--recover", name="in.parquet")
    assert "cut short or damaged" in str(ended.value.code)
    assert str(ended.value.code).endswith("no whole record stands before")


# --- what is never lost ----------------------------------------------------------------------------------------------


def refused(capsys, *words, **flags):
    with pytest.raises(SystemExit) as ended:
        convert_dataset.main([*words, *(text for name, value in flags.items() for text in (f"--{name}", str(value)))])
    assert ended.value.code == 2
    return capsys.readouterr().err


def test_the_input_is_never_overwritten(tmp_path, capsys):
    source = tmp_path / "in.jsonl"
    source.write_text(json.dumps(QA) + "\n")
    link = tmp_path / "link.jsonl"
    link.hardlink_to(source)
    rejected = tmp_path / "x.jsonl.rejected.jsonl"
    rejected.write_text(source.read_text())
    for target in (source, tmp_path / "." / "in.jsonl", link):
        assert "is the input file" in refused(capsys, "--overwrite", in_file=source, out_file=target)
    assert "is the input file" in refused(capsys, "--overwrite", in_file=rejected, out_file=tmp_path / "x.jsonl")
    assert source.read_text() == rejected.read_text() == json.dumps(QA) + "\n"


def test_what_is_there_is_replaced_only_on_request_and_only_by_something_whole(convert, tmp_path, capsys):
    convert([QA])
    before = (tmp_path / "out/sft.jsonl").read_text()
    with pytest.raises(SystemExit):
        convert([ALPACA])
    assert "sft.jsonl is there already; --overwrite replaces it" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        convert([QA, {"question": "Q?"}], "--overwrite")
    assert (tmp_path / "out/sft.jsonl").read_text() == before
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["sft.jsonl"]
    (tmp_path / "out/sft.jsonl").unlink()
    (tmp_path / "out/sft.jsonl.rejected.jsonl").write_text("mine")
    with pytest.raises(SystemExit):
        convert([QA])
    assert "rejected.jsonl is there already" in capsys.readouterr().err


def test_flags_that_do_not_fit(tmp_path, capsys):
    source = tmp_path / "in.data"
    source.write_text("{}\n")
    files = {"in_file": source, "out_file": tmp_path / "out.jsonl"}
    assert "--file_type: can't be told from the name in.data; give one of jsonl, json, csv" in refused(capsys, **files)
    assert "--file_type: unknown value 'xlsx'; expected jsonl" in refused(capsys, **files, file_type="xlsx")
    files["file_type"] = "jsonl"
    assert "--data_type: unknown value 'alpacca'; expected auto, alpaca, qa" in refused(
        capsys, **files, data_type="alpacca"
    )
    assert "--on_bad_record: unknown value 'no'; expected error, skip" in refused(capsys, **files, on_bad_record="no")
    assert "--in_file: there is no file" in refused(capsys, **{**files, "in_file": tmp_path / "no.jsonl"})
    assert "is a folder" in refused(capsys, **{**files, "out_file": tmp_path})
    assert "is written as plain jsonl" in refused(capsys, **{**files, "out_file": tmp_path / "out.jsonl.gz"})


def test_a_progress_bar_goes_over_the_bytes_of_the_file(convert, monkeypatch):
    bars = []

    class Bar(convert_dataset.tqdm):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            bars.append(self)

    monkeypatch.setattr(convert_dataset, "tqdm", Bar)
    data = gzip.compress(
        "".join(json.dumps({"question": f"Q{n}", "answer": "A"}) + "\n" for n in range(9999)).encode()
    )
    convert(data, name="in.jsonl.gz")
    assert [(bar.n, bar.total, bar.unit) for bar in bars] == [(len(data), len(data), "B")]
