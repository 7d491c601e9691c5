"""From data flags to examples: every record read is trained on or counted, whatever the flags say."""

import errno
import fcntl
import json
from pathlib import Path
from types import SimpleNamespace

import pytest

from stagewise.config.arguments import DataArguments, ModelArguments
from stagewise.data import split_cache
from stagewise.data.examples import Example
from stagewise.data.read_splits import read_splits
from stagewise.data.split_loader import SplitLoader
from stagewise.data.splits import Encoding
from stagewise.errors import ArgumentError, RecordError
from stagewise.formats.parsers import parse_conversation
from stagewise.formats.readers import RECORD_FILES
from tests.encoders import OneByOne


def encode(conversation):
    """An example as long as the words of the conversation; a question "long …" is refused, an answer of 9 is cut."""
    question, answer = (message.content for message in conversation.messages)
    if question.startswith("long"):
        raise RecordError(conversation.where, "prompt too long", "the question is too long")
    ids = list(range(len(question.split()) + len(answer.split())))
    return Example(ids, ids, conversation.where), answer.startswith("nine")


def talk(question, answer="A"):
    return {"question": question, "answer": answer}


@pytest.fixture
def folders(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def write(**files):
        """name=records: a list of them, or text."""
        for name, records in files.items():
            path = tmp_path / name.replace("__", "/").replace("_", ".")
            path.parent.mkdir(exist_ok=True)
            text = records if isinstance(records, str) else "".join(json.dumps(record) + "\n" for record in records)
            path.write_text(text)

    return write


def read(train=True, validation=False, cache_dir=None, dry_run=False, seed=1, data_seed=None, **flags):
    data = DataArguments(train_file_dir=flags.pop("train_file_dir", "train"), **flags)
    model = ModelArguments("none", cache_dir=cache_dir)
    args = SimpleNamespace(output_dir="out", seed=seed, data_seed=data_seed, dry_run=dry_run, do_train=train)
    encoding = Encoding(parse_conversation, OneByOne(encode), limits={"model_max_length": 99})
    return read_splits(SplitLoader(data, model, args, RECORD_FILES), encoding, train=train, validation=validation)


def rejected():
    return [json.loads(line) for line in Path("out/rejected.jsonl").read_text().splitlines()]


def adds_up(account):
    return account.read == account.kept + sum(account.left_out.values())


# --- the account -----------------------------------------------------------------------------------------------------


def test_what_is_refused_while_reading_and_while_encoding_is_written_as_it_was(folders):
    folders(
        train__a_jsonl='{"question": "Q",   "answer": "A"}\n{"question": "long", "answer":  "A"}\n{"question": "Q"}\n',
        train__b_csv="question,answer\nlong ago,A\nQ,nine of them\n",
        train__c_json='[{"question": "Q",\n"answer": "A"}, {"question": "long",\n "answer": "A"}]',
    )
    splits = read(on_bad_record="skip")
    account = splits.accounts["train"]
    assert (account.read, account.kept, account.cut) == (7, 3, 1)
    assert account.left_out == {"no answer": 1, "prompt too long": 3}
    assert [example.where for example in splits.train] == ["a.jsonl:1", "b.csv:3", "c.json:1#1"]
    assert [(entry["where"], entry["reason"], entry["raw"]) for entry in rejected()] == [
        ("a.jsonl:3", "no answer", '{"question": "Q"}'),
        ("a.jsonl:2", "prompt too long", '{"question": "long", "answer":  "A"}'),
        ("b.csv:2", "prompt too long", "long ago,A"),
        ("c.json:2#2", "prompt too long", '{"question": "long",\n "answer": "A"}'),
    ]
    assert splits.as_dict()["train"]["left_out"] == account.left_out
    with pytest.raises(RecordError, match=r"a\.jsonl:3: "):
        read()


@pytest.mark.parametrize(
    "flags",
    [
        {},
        {"max_train_samples": 7},
        {"deduplicate": True},
        {"validation_split_percentage": 20, "validation": True},
        {"validation_split_percentage": 20, "validation": True, "max_train_samples": 5, "max_eval_samples": 1},
        {"train_file_dir": "train,more"},
        {"train_file_dir": "train,more", "data_weights": "1,2"},
        {"train_file_dir": "train,more", "data_weights": "1,2", "max_train_samples": 3, "deduplicate": True},
        {
            "train_file_dir": "train,more",
            "data_weights": "1,2",
            "validation_split_percentage": 30,
            "validation": True,
            "max_train_samples": 4,
        },
    ],
)
def test_every_record_read_is_trained_on_or_counted(folders, flags):
    good = [talk(f"Q{n} " + "w " * n) for n in range(12)]
    folders(
        train__a_jsonl=[*good, good[3], talk("long"), {"question": "Q"}],
        train__b_json=json.dumps([talk("B0"), talk("B1"), 5, talk("long")]),
        more__c_jsonl=[talk(f"C{n}", "A A A") for n in range(9)] + [talk("long"), talk("Q3 w w w ")],
    )
    splits = read(on_bad_record="skip", **flags)
    for name, account in splits.accounts.items():
        assert adds_up(account), name
        assert account.kept == len(getattr(splits, name)) == splits.as_dict()[name]["kept"]
        limit = flags.get("max_train_samples" if name == "train" else "max_eval_samples", 99)
        assert 0 < account.kept <= limit
    account = splits.accounts["train"]
    duplicates = account.left_out.get("duplicate", 0)
    assert bool(duplicates) == bool(flags.get("deduplicate"))
    if "validation" in splits.accounts:
        assert account.left_out["held out for validation"] == splits.accounts["validation"].read
        trained, held = ({example.where for example in split} for split in (splits.train, splits.validation))
        assert not trained & held


def test_duplicates_are_no_errors(folders):
    folders(train__a_jsonl=[talk("Q"), talk("Q"), talk("R")])
    account = read(deduplicate=True).accounts["train"]
    assert (account.kept, account.left_out) == (2, {"duplicate": 1})
    assert not Path("out").exists()


# --- several sources -------------------------------------------------------------------------------------------------


def test_the_mixture_realised_is_in_the_account(folders):
    folders(a__x_jsonl=[talk(f"Q{n}") for n in range(10)], b__x_jsonl=[talk(f"R{n} r r") for n in range(8)])
    flags = {"train_file_dir": "a,b", "data_weights": "0.75,0.25"}
    splits = read(**flags)
    found = splits.as_dict()["train"]
    assert (found["read"], found["kept"], found["left_out"]) == (18, 13, {"beyond --data_weights": 5})
    first, second = found["sources"]
    assert (first["name"], first["path"], first["weight"], first["used"], first["tokens"]) == ("a", "a", 0.75, 10, 20)
    assert (second["name"], second["used"], second["tokens"]) == ("b", 3, 12)
    assert (second["share"], second["token_share"]) == (0.2308, 0.375)
    json.dumps(found)
    # drawn by --data_seed, else by --seed
    wheres = [
        [e.where for e in read(**flags, **seeds).train] for seeds in ({}, {"seed": 2}, {"seed": 2, "data_seed": 1})
    ]
    assert wheres[0] == wheres[2] != wheres[1]


def test_sources_of_validation_records_are_not_weighed(folders):
    folders(a__x_jsonl=[talk("Q")], b__x_jsonl=[talk("R"), talk("S")])
    splits = read(train_file_dir="a", validation_file_dir="a,b", validation=True)
    assert len(splits.validation) == 3
    Path("s.yaml").write_text("- {path: a, weight: 1}\n- {path: b, weight: 2}")
    with pytest.raises(ArgumentError, match="--validation_file_dir s.yaml: all validation records count alike"):
        read(train_file_dir="a", validation_file_dir="s.yaml", validation=True)
    assert len(read(train_file_dir="s.yaml").train) == 3


def test_weights_without_sources_are_refused(folders):
    folders(train__a_jsonl=[talk("Q")])
    with pytest.raises(ArgumentError, match="--data_weights: weighs several sources"):
        read(data_weights="1")
    with pytest.raises(ArgumentError, match="--data_weights: weighs the sources of --train_file_dir, which is not"):
        read(train_file_dir=None, dataset_name="x", data_weights="1,2")


# --- rejected.jsonl and --dry_run ------------------------------------------------------------------------------------


def test_a_dry_run_writes_and_deletes_nothing(folders):
    folders(train__a_jsonl=[talk("Q"), talk("long"), {"question": "Q"}], out__rejected_jsonl="of an earlier run\n")
    before = sorted(Path().rglob("*"))
    splits = read(on_bad_record="skip", dry_run=True, cache_dir="cache")
    assert splits.accounts["train"].left_out == {"no answer": 1, "prompt too long": 1}
    assert sorted(Path().rglob("*")) == before
    assert Path("out/rejected.jsonl").read_text() == "of an earlier run\n"
    read(on_bad_record="skip")
    assert len(rejected()) == 2
    folders(train__a_jsonl=[talk("Q")])
    read(on_bad_record="skip")
    assert not Path("out/rejected.jsonl").exists()  # a run does not show what an earlier one left out


def test_a_second_start_reads_the_cache_and_says_the_same(folders):
    folders(
        a__x_jsonl=[talk(f"Q{n}") for n in range(10)] + [talk("long")], b__x_jsonl=[talk(f"R{n} r") for n in range(8)]
    )
    flags = {"train_file_dir": "a,b", "data_weights": "0.75,0.25", "on_bad_record": "skip", "cache_dir": "cache"}
    first = read(**flags)
    was, left = first.as_dict(), Path("out/rejected.jsonl").read_text()
    Path("out/rejected.jsonl").unlink()
    again = read(**flags)
    assert again.as_dict() == was
    assert [example.where for example in again.train] == [example.where for example in first.train]
    assert Path("out/rejected.jsonl").read_text() == left
    (entry,) = Path("cache").iterdir()
    Path("out/rejected.jsonl").unlink()
    assert read(**flags, dry_run=True).as_dict() == was
    assert not Path("out/rejected.jsonl").exists() and list(Path("cache").iterdir()) == [entry]
    read(**{**flags, "data_weights": "0.5,0.5"})
    assert len(list(Path("cache").iterdir())) == 2


@pytest.mark.parametrize("rank", ["0", "1"])
def test_only_the_first_process_writes_rejected_records(rank, folders, monkeypatch):
    folders(train__a_jsonl=[talk("Q"), talk("long"), {"question": "Q"}])
    monkeypatch.setenv("RANK", rank)
    assert read(on_bad_record="skip").accounts["train"].left_out == {"no answer": 1, "prompt too long": 1}
    assert Path("out/rejected.jsonl").exists() == (rank == "0")


# --- several processes with one cache: see test_cache.py and test_distributed.py as well ----------------------------


def test_another_process_may_encode_for_the_first(folders, monkeypatch):
    """What it refused comes into the first one's rejected.jsonl, with the entry."""
    folders(train__a_jsonl=[talk("Q"), talk("long"), {"question": "Q"}])
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setattr(split_cache, "HEAD_START", 0)
    flags = {"on_bad_record": "skip", "cache_dir": "cache"}
    other = read(**flags)
    assert not Path("out").exists()
    monkeypatch.setenv("RANK", "0")
    assert read(**flags).as_dict() == other.as_dict()
    assert [entry["reason"] for entry in rejected()] == ["no answer", "prompt too long"]


def test_what_was_refused_is_seen_where_nothing_is_left(folders, monkeypatch):
    folders(train__a_jsonl=[talk("long"), {"question": "Q"}])
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setattr(split_cache, "HEAD_START", 0)
    with pytest.raises(ArgumentError, match="none of the 1 records is left"):
        read(on_bad_record="skip", cache_dir="cache")
    assert [entry["reason"] for entry in rejected()] == ["no answer", "prompt too long"]
    assert list(Path("cache").iterdir()) == []


def test_where_nothing_can_be_locked_the_first_process_alone_writes(folders, monkeypatch):
    def refuse(file, how):
        raise OSError(errno.ENOTSUP, "no locks here")

    monkeypatch.setattr(fcntl, "flock", refuse)
    monkeypatch.setattr(split_cache, "HEAD_START", 0)
    folders(train__a_jsonl=[talk("Q"), talk("long")])
    found = []
    for rank in ("1", "0"):
        monkeypatch.setenv("RANK", rank)
        found.append(read(on_bad_record="skip", cache_dir="cache").as_dict())
        entries = [path.name for path in Path("cache").glob("encoded-*") if path.is_dir()]
        assert (len(entries), len(list(Path().glob("out/rejected.jsonl")))) == ((0, 0) if rank == "1" else (1, 1))
    assert found[0] == found[1]


def test_a_cache_folder_that_can_not_be_written_is_named(folders):
    folders(train__a_jsonl=[talk("Q")], cache="a file")
    with pytest.raises(ArgumentError, match=r"--cache_dir cache/deeper: nothing can be written there \(Not a dir"):
        read(cache_dir="cache/deeper")


def test_a_run_that_only_evaluates_leaves_the_training_runs_account_alone(folders):
    """What was left out of training stays known, whatever is evaluated in that folder later."""
    folders(validation__a_jsonl=[talk("Q"), {"text": "no talk"}], out__rejected_jsonl="of the training run\n")
    read(train=False, validation=True, validation_file_dir="validation", on_bad_record="skip")
    assert Path("out/rejected.jsonl").read_text() == "of the training run\n"
    assert len(Path("out/eval_rejected.jsonl").read_text().splitlines()) == 1
