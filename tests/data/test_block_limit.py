"""--max_train_samples of pretraining: rows of --block_size tokens, packed, padded and streamed, all accounted for."""

import json
import random
from types import SimpleNamespace

import pytest

from stagewise.chat.encoding import TextEncoder
from stagewise.config.arguments import DataArguments, ModelArguments
from stagewise.data.block_limit import BlockLimit
from stagewise.data.packing import PackedRows, pack
from stagewise.data.read_splits import read_splits
from stagewise.data.split_loader import SplitLoader
from stagewise.data.splits import Encoding
from stagewise.data.streaming.splits import read_streamed_splits
from stagewise.formats.parsers import parse_text
from stagewise.formats.readers import TEXT_FILES
from tests.conftest import build_tiny_tokenizer

BLOCK = 16


def read(folder, packed=True, stream=None, cache_dir=None, **flags):
    data = DataArguments(train_file_dir=str(folder), **flags)
    args = SimpleNamespace(output_dir=str(folder / "out"), seed=1, data_seed=None, dry_run=True, do_train=True)
    loader = SplitLoader(data, ModelArguments("none", cache_dir=cache_dir), args, TEXT_FILES)
    tokenizer = build_tiny_tokenizer()
    encoding = Encoding(
        lambda record, where: (parse_text(record, where), where),
        TextEncoder(tokenizer, BLOCK),
        tokenizer=tokenizer,
        counts_blocks=True,
        packed_to=BLOCK if packed else None,
    )
    needed = {"train": True, "validation": "validation_split_percentage" in flags or "validation_file_dir" in flags}
    if stream is not None:
        return read_streamed_splits(loader, encoding, **needed, buffer=stream)
    return read_splits(loader, encoding, **needed)


@pytest.fixture
def folder(tmp_path):
    """A text of 901 tokens with its end marker (no letters of it are joined), then 40 short ones."""
    (tmp_path / "a.txt").write_text("z" * 900)
    texts = [{"text": chr(97 + n % 26) * (2 + n % 9)} for n in range(40)]
    (tmp_path / "b.jsonl").write_text("".join(json.dumps(text) + "\n" for text in texts))
    return tmp_path


def adds_up(account):
    return account.read == account.kept + sum(account.left_out.values())


def test_one_text_file_gives_as_many_rows_as_asked(folder):
    whole = read(folder / "a.txt")
    blocks = len(whole.train)
    assert blocks == 60 and whole.accounts["train"].blocks_beyond == 0  # 900 letters and an end marker, 15 new a block
    for packed in (True, False):
        splits = read(folder / "a.txt", packed=packed, max_train_samples=10)
        account = splits.accounts["train"]
        assert len(splits.train) == 10 and len(PackedRows(splits.train, BLOCK)) == 10
        assert (account.read, account.kept, account.left_out, account.blocks_beyond) == (1, 1, {}, blocks - 10)
        assert list(splits.train) == list(whole.train)[:10]
        assert splits.as_dict()["train"]["blocks_beyond"] == blocks - 10
        assert splits.summary["train"].examples == 10


def test_short_texts_share_the_rows_that_are_counted(folder):
    splits = read(folder / "b.jsonl", max_train_samples=5)
    rows = PackedRows(splits.train, BLOCK)
    assert len(rows) == 5 and len(splits.train) > 5 and min(rows.lengths) > BLOCK // 2
    account = splits.accounts["train"]
    assert adds_up(account) and account.kept == len(splits.train)
    assert account.left_out == {"beyond --max_train_samples": 40 - account.kept}
    padded = read(folder / "b.jsonl", packed=False, max_train_samples=5)
    assert len(padded.train) == 5 and padded.accounts["train"].kept == 5


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize(
    "flags",
    [
        {},
        {"validation_split_percentage": 20, "max_eval_samples": 3},
        {"train_file_dir": "a.txt,b.jsonl"},
        {"train_file_dir": "b.jsonl,c.jsonl", "data_weights": "0.5,0.5"},
        {"cache_dir": "cache"},
    ],
)
def test_every_record_read_is_trained_on_or_counted(flags, packed, folder, monkeypatch):
    monkeypatch.chdir(folder)
    (folder / "c.jsonl").write_text("".join(json.dumps({"text": "z" * (1 + n)}) + "\n" for n in range(20)))
    flags = {**flags}
    given, cache = flags.pop("train_file_dir", "."), flags.pop("cache_dir", None)
    for _ in range(2 if cache else 1):
        data = {**flags, "max_train_samples": 7}
        splits = read(folder if given == "." else _Several(given, folder), packed=packed, cache_dir=cache, **data)
        account = splits.accounts["train"]
        assert adds_up(account), account
        assert account.kept == len({example.where for example in splits.train})
        rows = PackedRows(splits.train, BLOCK) if packed else splits.train
        assert len(rows) == 7
        if "validation" in splits.accounts:
            held = splits.accounts["validation"]
            assert adds_up(held) and len(splits.validation) == 3
            assert not {example.where for example in splits.train} & {example.where for example in splits.validation}


class _Several(str):
    """Sources joined by commas, which has a folder to write to as a path has."""

    def __new__(cls, given, folder):
        made = super().__new__(cls, given)
        made.folder = folder
        return made

    def __truediv__(self, name):
        return self.folder / name


@pytest.mark.parametrize("packed", [True, False])
def test_a_stream_ends_each_pass_behind_as_many_blocks(packed, folder):
    expected = read(folder, packed=packed, max_train_samples=7).train
    stream = read(folder, packed=packed, stream=1, max_train_samples=7).train
    examples, account, _ = stream.first(1000)
    assert [example.input_ids for example in examples] == [example.input_ids for example in expected]
    assert account.kept == len({example.where for example in expected})
    assert len(read(folder, stream=1, max_train_samples=500).train.first(1000)[0]) == len(read(folder).train)


def test_the_blocks_kept_are_the_most_that_make_so_many_rows():
    draw = random.Random(0)
    for _ in range(200):
        lengths = [draw.randint(1, BLOCK) for _ in range(draw.randint(1, 60))]
        rows = draw.randint(1, 20)
        kept = BlockLimit(rows, BLOCK, "beyond").kept(lengths)
        made = len(pack(lengths[:kept], BLOCK))
        assert made == min(rows, len(pack(lengths, BLOCK))) or (made < rows < len(pack(lengths[: kept + 1], BLOCK)))
        assert BlockLimit(rows, None, "beyond").kept(lengths) == min(rows, len(lengths))


def test_rows_that_only_the_loaded_model_says_are_padded_are_as_many(folder):
    splits = read(folder / "b.jsonl", max_train_samples=5)
    before = len(splits.train)
    first = [example.where for example in splits.train][:5]
    assert [example.where for example in splits.keep_blocks(5)] == first
    account = splits.accounts["train"]
    assert adds_up(account) and (account.kept, splits.summary["train"].records) == (5, 5)
    assert before > 5 and list(splits.train)[4].where == first[4]
