"""Instruction and question-answer files → ShareGPT jsonl, through the command line."""

import json

import pytest

import convert_dataset
from stagewise.conversation import parse_conversation
from stagewise.records import load_records


@pytest.fixture
def convert(tmp_path):
    """Writes the input, runs the command, gives back the records it wrote."""

    def run(content, data_type, file_type="jsonl", *more):
        source, target = tmp_path / f"in.{file_type}", tmp_path / "out/sft.jsonl"
        data = content if isinstance(content, (bytes, str)) else "".join(json.dumps(r) + "\n" for r in content)
        source.write_bytes(data if isinstance(data, bytes) else data.encode())
        flags = ["--in_file", source, "--out_file", target, "--data_type", data_type, "--file_type", file_type, *more]
        convert_dataset.main([str(flag) for flag in flags])
        load_records([target], parse_conversation)  # every stage can read it
        return [json.loads(line) for line in target.read_text(encoding="utf-8").splitlines()]

    return run


def sharegpt(*texts, **more):
    turns = [{"from": ("human", "gpt")[n % 2], "value": text} for n, text in enumerate(texts)]
    return {**more, "conversations": turns}


def test_alpaca(convert):
    records = [
        {"instruction": "Translate.", "input": " 感冒 \n", "output": "\ncold "},
        {"instruction": "Say hi.", "input": "", "output": "Hi", "system": "Be kind."},
        {"instruction": "And?", "output": "Ok", "history": [["a", "b"], ["c", "d"]]},
        {"instruction": "And?", "input": None, "output": "Ok", "history": ["a", "b"]},
    ]
    assert convert(records, "alpaca") == [
        sharegpt("Translate.\n 感冒 \n", "\ncold "),
        sharegpt("Say hi.", "Hi", system="Be kind."),
        sharegpt("a", "b", "c", "d", "And?", "Ok"),
        sharegpt("a", "b", "And?", "Ok"),
    ]


@pytest.mark.parametrize("question", ["question", "query", "prompt", "input", "instruction"])
@pytest.mark.parametrize("answer", ["answer", "response", "output"])
def test_qa(convert, question, answer):
    assert convert([{question: "Q?", answer: "A."}], "qa") == [sharegpt("Q?", "A.")]


def test_json_lists(convert):
    content = json.dumps([{"question": "Q?", "answer": "A."}, {"question": "Q2?", "answer": "A2."}], indent=2)
    assert convert(content, "qa", "json") == [sharegpt("Q?", "A."), sharegpt("Q2?", "A2.")]


def test_csv_with_quotes_newlines_and_a_byte_order_mark(convert):
    content = (
        '\ufeffquestion,answer,system\r\n"What, ""exactly""?","Line one\nline two",\r\n发烧？,多喝水。,Be kind.\r\n'
    )
    assert convert(content, "qa", "csv") == [
        sharegpt('What, "exactly"?', "Line one\nline two"),
        sharegpt("发烧？", "多喝水。", system="Be kind."),
    ]


def test_csv_cells_of_any_length(convert):
    long = "x" * 300_000
    assert convert(f"instruction,input,output\nQ?,,{long}\n", "alpaca", "csv") == [sharegpt("Q?", long)]


def test_text_is_written_readably(convert, tmp_path):
    convert([{"question": "发烧？", "answer": "多喝水。"}], "qa")
    assert "发烧？" in (tmp_path / "out/sft.jsonl").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("content", "data_type", "file_type", "says"),
    [
        (
            [{"instruction": "a", "output": "b"}, {"instruction": "a"}],
            "alpaca",
            "jsonl",
            'in.jsonl:2: expected "output"',
        ),
        ([{"instruction": "", "output": "b"}], "alpaca", "jsonl", "in.jsonl:1: turn 1 (user) is empty"),
        ([{"instruction": "a", "output": ["b", "c"]}], "alpaca", "jsonl", 'expected "output" as text'),
        ([{"q": "a", "answer": "b"}], "qa", "jsonl", "in.jsonl:1: expected exactly one of question, query"),
        ([{"question": "a", "input": "x", "answer": "b"}], "qa", "jsonl", "expected exactly one of question, query"),
        ('{"question": NaN, "answer": "b"}\n', "qa", "jsonl", "in.jsonl:1: not JSON: NaN"),
        ('[{"question": "a", "answer": "b"},\n 5]', "qa", "json", "in.json:2#2: a record must be a JSON object"),
        ("question,answer\na,b\nc\n", "qa", "csv", "in.csv:3: the header has 2 columns"),
        ("question,answer\na,b,c\n", "qa", "csv", "in.csv:2: the header has 2 columns"),
        ('question,answer\n"a,b\n', "qa", "csv", "not csv"),
        ("question,answer\n发,b\n".encode("gb18030"), "qa", "csv", "not UTF-8"),
        ("", "qa", "jsonl", "none of the 0 records"),
    ],
)
def test_the_first_bad_record_ends_it_and_leaves_no_output(convert, tmp_path, content, data_type, file_type, says):
    with pytest.raises(SystemExit) as ended:
        convert(content, data_type, file_type)
    assert says in str(ended.value.code)
    assert list((tmp_path / "out").iterdir()) == []


def test_bad_records_are_skipped_on_request_counted_and_written(convert, tmp_path):
    records = [{"question": "Q?", "answer": "A."}, {"question": "Q?"}, {"question": " ", "answer": "A."}]
    assert convert(records, "qa", "jsonl", "--on_bad_record", "skip") == [sharegpt("Q?", "A.")]
    rejected = (tmp_path / "out/sft.jsonl.rejected.jsonl").read_text().splitlines()
    assert [(json.loads(line)["where"], json.loads(line)["reason"]) for line in rejected] == [
        ("in.jsonl:2", "no answer"),
        ("in.jsonl:3", "empty turn"),
    ]
    account = convert_dataset.convert(tmp_path / "in.jsonl", tmp_path / "again.jsonl", "qa", "jsonl", "skip")
    assert (account.read, account.kept, account.left_out) == (3, 1, {"no answer": 1, "empty turn": 1})


def refused(capsys, **flags):
    with pytest.raises(SystemExit) as ended:
        convert_dataset.main([text for name, value in flags.items() for text in (f"--{name}", str(value))])
    assert ended.value.code == 2
    return capsys.readouterr().err


def test_the_input_is_never_overwritten(tmp_path, capsys):
    source = tmp_path / "in.jsonl"
    source.write_text('{"question": "Q?", "answer": "A."}\n')
    link = tmp_path / "link.jsonl"
    link.hardlink_to(source)
    for target in (source, tmp_path / "." / "in.jsonl", link):
        assert "is the input file" in refused(capsys, in_file=source, out_file=target, data_type="qa")
    assert source.read_text() == '{"question": "Q?", "answer": "A."}\n'


def test_a_failed_run_leaves_an_earlier_output_alone(convert, tmp_path):
    convert([{"question": "Q?", "answer": "A."}], "qa")
    before = (tmp_path / "out/sft.jsonl").read_text()
    with pytest.raises(SystemExit):
        convert([{"question": "Q2?", "answer": "A2."}, {"question": "Q?"}], "qa")
    assert (tmp_path / "out/sft.jsonl").read_text() == before


def test_flags_that_are_not_known_or_come_later(tmp_path, capsys):
    source = tmp_path / "in.jsonl"
    source.write_text("{}\n")
    files = {"in_file": source, "out_file": tmp_path / "out.jsonl"}
    assert "--data_type history is not supported yet; today: alpaca, qa" in refused(
        capsys, **files, data_type="history"
    )
    assert "--file_type parquet is not supported yet" in refused(capsys, **files, data_type="qa", file_type="parquet")
    assert "--data_type: unknown value 'alpacca'; expected alpaca, qa" in refused(capsys, **files, data_type="alpacca")
    missing = {**files, "in_file": tmp_path / "no.jsonl"}
    assert "--in_file: there is no file" in refused(capsys, **missing, data_type="qa")
    assert "is a folder" in refused(capsys, **{**files, "out_file": tmp_path}, data_type="qa")
