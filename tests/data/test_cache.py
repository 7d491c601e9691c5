"""A second start reads what the first one encoded; everything that matters changes the entry's name."""

import copy
import json
import shutil
import subprocess
import sys
import threading
import time
from argparse import Namespace
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from loguru import logger

from stagewise.chat.encoding import ConversationEncoder
from stagewise.chat.preference_encoding import PreferenceEncoder
from stagewise.config.arguments import DataArguments, ModelArguments
from stagewise.data import cache as cache_module
from stagewise.data.cache import cache_path, read_cache, write_cache
from stagewise.data.examples import ExampleWriter
from stagewise.data.read_splits import read_splits
from stagewise.data.split_loader import SplitLoader
from stagewise.data.splits import Encoding
from stagewise.errors import RecordError
from stagewise.formats import readers
from stagewise.formats.parsers import parse_conversation, parse_preference
from template import TEMPLATES

PACKAGE = Path(cache_module.__file__).parents[1]


def conversation(number):
    turns = [("human", "the user asks"), ("gpt", "rest " * number)]
    return {"conversations": [{"from": role, "value": text} for role, text in turns]}


def write_lines(path, records):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")


@pytest.fixture
def setting(tmp_path, tiny_tokenizer):
    """A folder with good records, a broken one and one whose question is too long."""
    tokenizer = tiny_tokenizer()
    template = TEMPLATES["vicuna"].bind(tokenizer)
    records = [conversation(n) for n in range(1, 9)]
    records[2] = {"conversations": [{"from": "nobody", "value": "x"}]}
    records[4]["conversations"][0]["value"] = "xyz" * 99
    write_lines(tmp_path / "data/a.jsonl", records)
    return Namespace(folder=tmp_path, tokenizer=tokenizer, template=template)


def read(setting, parse=parse_conversation, encode=None, **flags):
    limit = flags.pop("limit", 150)
    always = flags.pop("parse_always", False)
    data = DataArguments(train_file_dir=str(setting.folder / "data"), **{"on_bad_record": "skip", **flags})
    model = ModelArguments(model_name_or_path="none", cache_dir=str(setting.folder / "cache"))
    args = Namespace(output_dir=str(setting.folder / "out"), seed=42, data_seed=None, dry_run=False, do_train=True)
    own = encode or ConversationEncoder(setting.tokenizer, setting.template, limit)
    validation = data.validation_split_percentage is not None
    encoding = Encoding(
        parse,
        own,
        limits={"limit": limit},
        tokenizer=setting.tokenizer,
        depends_on={"template": setting.template.jinja()},
        parse_always=always,
    )
    return read_splits(SplitLoader(data, model, args, (".jsonl",)), encoding, train=True, validation=validation)


def entries(setting):
    return sorted(path.name for path in (setting.folder / "cache").iterdir())


@pytest.mark.parametrize("share", [None, 30])
def test_a_second_start_parses_and_encodes_nothing(share, setting, monkeypatch):
    first = read(setting, validation_split_percentage=share)
    rejected = setting.folder / "out/rejected.jsonl"
    said = rejected.read_text()
    assert [json.loads(line)["reason"] for line in said.splitlines()] == ["unknown role", "no room for an answer"]
    rejected.unlink()
    parsed, encoded = [], []
    monkeypatch.setattr(readers, "parse_line", lambda *given: parsed.append(given))
    monkeypatch.setattr(ConversationEncoder, "many", lambda *given: encoded.append(given))
    second = read(setting, validation_split_percentage=share)
    assert (parsed, encoded) == ([], [])
    assert list(second.train) == list(first.train)
    assert list(second.validation) == list(first.validation)
    assert [example.where for example in second.train] == [example.where for example in first.train]
    assert second.as_dict() == first.as_dict()
    assert rejected.read_text() == said


def test_overwrite_cache_encodes_again(setting):
    first = read(setting)
    (name,) = entries(setting)
    ids = setting.folder / "cache" / name / "train/ids.npy"
    before = ids.stat().st_mtime_ns, ids.stat().st_ino
    again = read(setting, overwrite_cache=True)
    assert list(again.train) == list(first.train)
    assert entries(setting) == [name]
    assert (ids.stat().st_mtime_ns, ids.stat().st_ino) != before


@pytest.mark.parametrize("damage", ["about.json", "train/ids.npy", "train/wheres_ends.npy"])
@pytest.mark.parametrize("how", ["cut", "gone"])
def test_a_damaged_entry_is_made_again(damage, how, setting):
    first = read(setting)
    (name,) = entries(setting)
    path = setting.folder / "cache" / name / damage
    data = path.read_bytes()
    path.unlink()
    if how == "cut":
        path.write_bytes(data[: len(data) - 9])
    assert list(read(setting).train) == list(first.train)
    assert entries(setting) == [name]
    assert path.read_bytes() == data


def test_a_run_that_fails_leaves_no_entry(setting):
    with pytest.raises(ValueError, match="nobody"):
        read(setting, on_bad_record="error")
    assert entries(setting) == []


def test_what_parses_for_itself_is_called_at_every_start(setting):
    seen = []

    def parse(record, where):
        seen.append(where)
        return parse_conversation(record, where)

    first = read(setting, parse, parse_always=True)
    assert len(seen) == 8
    second = read(setting, parse, parse_always=True)
    assert len(seen) == 16
    assert second.as_dict() == first.as_dict()
    rejected = (setting.folder / "out/rejected.jsonl").read_text().splitlines()
    assert len(rejected) == 2  # not noted twice


def test_pairs_come_back(setting):
    records = [{"question": "the user", "response_chosen": "rest" * n, "response_rejected": "no"} for n in (1, 2, 3)]
    write_lines(setting.folder / "data/a.jsonl", records)

    encode = PreferenceEncoder(setting.tokenizer, setting.template, 150, 50)
    first, second = (read(setting, parse_preference, encode) for _ in range(2))
    assert list(second.train) == list(first.train)
    assert len(entries(setting)) == 1


class Slow(ConversationEncoder):
    """Waits, once it is asked for the first time, until it may continue."""

    def __init__(self, setting):
        super().__init__(setting.tokenizer, setting.template, 150)
        self.asked, self.may = threading.Event(), threading.Event()

    def many(self, conversations):
        self.asked.set()
        assert self.may.wait(20)
        return super().many(conversations)


@pytest.mark.parametrize("flags", [{}, {"overwrite_cache": True}])
def test_of_two_runs_at_once_the_second_waits_and_maps(flags, setting):
    if flags:  # there is something to be written over
        encode = Slow(setting)
        encode.may.set()
        read(setting, encode=encode)
    with ThreadPoolExecutor(2) as pool:
        encode = Slow(setting)
        first = pool.submit(read, setting, encode=encode, **flags)
        assert encode.asked.wait(20)
        said = []
        sink = logger.add(lambda message: said.append(message.record["message"]), level="INFO")
        waiting = Slow(setting)  # of the same name, and never asked
        second = pool.submit(read, setting, encode=waiting, **flags)
        while not any(line.startswith("waiting for another process") for line in said):
            time.sleep(0.01)
        encode.may.set()
        assert second.result(20).as_dict() == first.result(20).as_dict()
        logger.remove(sink)
    assert not waiting.asked.is_set()
    assert list(second.result().train) == list(first.result().train)
    assert len(entries(setting)) == 1


def test_an_error_of_the_one_that_encodes_is_the_error_of_the_one_that_waits(setting):
    """The record that the form refuses is the third; neither parses it twice."""
    with ThreadPoolExecutor(2) as pool:
        encode = Slow(setting)
        parsed = threading.Event()

        def parse(record, where):
            if "xyz" in json.dumps(record):
                parsed.set()
                assert encode.may.wait(20)
                raise RecordError(where, "odd", "an odd record")
            return parse_conversation({**record, "conversations": conversation(1)["conversations"]}, where)

        first = pool.submit(read, setting, parse, encode, on_bad_record="error")
        assert parsed.wait(20)
        said = []
        sink = logger.add(lambda message: said.append(message.record["message"]), level="INFO")
        second = pool.submit(read, setting, parse, encode, on_bad_record="error")
        while not any(line.startswith("waiting for another process") for line in said):
            time.sleep(0.01)
        parsed.clear()
        encode.may.set()
        logger.remove(sink)
        for run in (first, second):
            with pytest.raises(RecordError, match=r"^a\.jsonl:5: an odd record \(none of the next 3 records is bad"):
                run.result(20)
    assert not parsed.is_set()
    assert entries(setting) == []


KILLED = """
import sys, time
from pathlib import Path
from stagewise.data import encode_all
from stagewise.data.cache import write_cache
from stagewise.artifacts.lock_file import exclusive_lock
from stagewise.data.records import Account

class Stuck:
    letters, in_thread = len, None

    def many(self, records):
        Path(sys.argv[2]).touch()
        time.sleep(600)

entry = Path(sys.argv[1])
with exclusive_lock(entry.with_name(entry.name + ".lock"), ""), write_cache(entry, alone=True) as writer:
    encode_all.encode_all(["a"] * 9, Stuck(), account=Account(), num_workers=2, folder=writer.folder("train"))
"""


def test_a_killed_encoder_blocks_nobody_and_leaves_nothing(setting):
    """Its workers would hold the lock as long as they are there."""
    whole = read(setting)
    (name,) = entries(setting)
    cache = setting.folder / "cache"
    shutil.rmtree(cache / name)
    there = setting.folder / "there"
    words = [sys.executable, "-c", KILLED, str(cache / name), str(there)]
    process = subprocess.Popen(words, cwd=PACKAGE.parent)
    while not there.exists():
        assert process.poll() is None
        time.sleep(0.05)
    assert {entry.rpartition(".")[2] for entry in entries(setting)} == {"lock", "part"}
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(read, setting)
        time.sleep(0.5)
        assert not waiting.done()
        process.kill()
        process.wait()
        assert waiting.result(20).as_dict() == whole.as_dict()
    assert entries(setting) == [name]


def test_everything_that_matters_changes_the_name(setting, tiny_tokenizer):
    tokenizer, data = setting.tokenizer, setting.folder / "data/a.jsonl"
    with_token = copy.deepcopy(tokenizer)
    with_token.add_tokens(["<new>"])
    settings = {"files": [data], "code": [parse_conversation], "tokenizer": tokenizer, "template": setting.template}
    settings["limit"] = 50

    def name(**changes):
        return cache_path(setting.folder, **{**settings, **changes})

    first = name()
    assert first.parent == setting.folder
    assert name(tokenizer=copy.deepcopy(tokenizer)) == first
    other = shutil.copy(data, setting.folder / "other.jsonl")
    others = [
        name(limit=51),
        name(max_length=50),
        name(tokenizer=tiny_tokenizer(adds_bos=True)),
        name(tokenizer=with_token),
        name(template=TEMPLATES["llama2"].bind(tokenizer)),
        name(code=[parse_preference]),
        name(files=[]),
        name(files=[Path(other)]),  # the same bytes, but records are named by their file
    ]
    data.write_bytes(data.read_bytes().replace(b"rest", b"best", 1))
    others.append(name())
    assert len({first, *others}) == len(others) + 1
    with pytest.raises(TypeError, match="a cache can't be named by <object"):
        name(anything=object())


def test_the_name_changes_with_the_code(setting, monkeypatch, tmp_path):
    first = cache_path(setting.folder)
    package = tmp_path / "package"
    shutil.copytree(PACKAGE, package)
    monkeypatch.setattr(cache_module, "__file__", str(package / "data" / "cache.py"))
    assert cache_path(setting.folder) == first
    for name in ("formats/readers", "formats/parsers", "chat/template", "chat/encoding", "data/examples"):
        with open(package / f"{name}.py", "a", encoding="utf-8") as file:
            file.write("# changed\n")
        changed = cache_path(setting.folder)
        assert changed != first, name
        first = changed


def test_an_entry_appears_whole_or_not_at_all(tmp_path):
    entry = tmp_path / "encoded-0"
    with pytest.raises(RuntimeError, match="stop"), write_cache(entry) as writer:
        ExampleWriter(writer.folder("train")).finish()
        raise RuntimeError("stop")
    assert list(tmp_path.iterdir()) == []
    assert read_cache(entry) is None


def test_of_two_runs_that_make_an_entry_at_once_one_stays(setting, tmp_path):
    """The other one, whose turn comes later, puts nothing in its place half."""
    path = tmp_path / "cache" / "encoded-0"
    with write_cache(path) as one, write_cache(tmp_path / "cache" / "encoded-1") as other:
        for writer, word in ((one, "one"), (other, "other")):
            (writer.path / "about.json").write_text(word)
        (tmp_path / "cache" / "encoded-0").mkdir()
        (tmp_path / "cache" / "encoded-0" / "about.json").write_text("there")
    assert (path / "about.json").read_text() == "one"
    assert sorted(entry.name for entry in path.parent.iterdir()) == ["encoded-0", "encoded-1"]
