"""Records → examples: the account, threads and processes, examples as flat arrays in memory and in files."""

import json
import os
import signal
from array import array

import numpy as np
import pytest

from stagewise.chat.encoding import ConversationEncoder, TextEncoder
from stagewise.chat.preference_encoding import PreferenceEncoder, PromptEncoder, encode_preference, encode_prompt
from stagewise.data import encode_all as preparation
from stagewise.data import examples as examples_module
from stagewise.data.encode_all import encode_all
from stagewise.data.examples import Example, ExampleWriter, PreferenceExample, Row, read_examples
from stagewise.data.records import Account
from stagewise.errors import ArgumentError, RecordError
from stagewise.formats.parsers import Conversation, Message, Preference
from stagewise.tokenizer.encode import PieceEncoder
from template import TEMPLATES
from tests.encoders import OneByOne, row_of


def talk(*texts, where):
    turns = tuple(Message(("user", "assistant")[n % 2], text) for n, text in enumerate(texts))
    return Conversation(turns, where=where)


@pytest.fixture(scope="module")
def tokenizer(tiny_tokenizer):
    from tokenizers import AddedToken

    made = tiny_tokenizer()
    made.add_tokens([AddedToken(marker, special=True) for marker in ("<|im_start|>", "<|im_end|>")])
    return made


@pytest.fixture(scope="module")
def template(tokenizer):
    return TEMPLATES["chatml"].bind(tokenizer)


@pytest.fixture
def encode(tokenizer, template):
    return ConversationEncoder(tokenizer, template, 50)


@pytest.fixture
def records():
    """Forty conversations whose answers grow; the question of one fills the limit, which is no error."""
    made = [talk("a", "b" * n, where=f"a.jsonl:{n + 1}") for n in range(1, 41)]
    made[7] = talk("a" * 99, "b", where="a.jsonl:9")
    return made


def account_of(records):
    return Account(read=len(records), kept=len(records))


# --- encode_all ------------------------------------------------------------------------------------------------------


def test_what_is_cut_and_left_out_is_counted(records, encode, tokenizer, template, tmp_path):
    account, rejected = account_of(records), tmp_path / "rejected.jsonl"
    options = {"on_bad_record": "skip", "rejected_path": rejected}
    examples = encode_all(records, encode, account=account, raw=lambda where: f"read at {where}", **options)
    prompt = len(encode_prompt(tokenizer, template, talk("a", where="?"), 99)[0])
    assert [example.where for example in examples] == [f"a.jsonl:{n}" for n in range(2, 42) if n != 9]
    assert all(isinstance(example, Example) and len(example.input_ids) <= 50 for example in examples)
    cut = sum(prompt + len(tokenizer("b" * n)["input_ids"]) + 1 > 50 for n in range(1, 41) if n != 8)
    assert cut > 3
    assert (account.read, account.kept, account.cut, account.left_out) == (40, 39, cut, {"no room for an answer": 1})
    entry = json.loads(rejected.read_text())
    assert (entry["where"], entry["reason"], entry["raw"]) == (
        "a.jsonl:9",
        "no room for an answer",
        "read at a.jsonl:9",
    )


def test_the_first_bad_record_is_raised(records, encode):
    """The one before it is only too long; behind it stand 29 others, one of them bad for the same reason."""
    records[10] = records[20] = talk("a", where="a.jsonl:11")
    message = (
        r"^a\.jsonl:11: the conversation holds no answer to learn from \(of the next 29 records 1 are bad as well, "
        r"1 of them for the same reason; --on_bad_record skip leaves such records out and counts them\)$"
    )
    with pytest.raises(RecordError, match=message):
        encode_all(records, encode, account=account_of(records))


@pytest.mark.parametrize("workers", [None, 1, 2])
@pytest.mark.parametrize("many", [True, False])
def test_threads_and_processes_give_what_one_call_a_record_gives(workers, many, records, encode, monkeypatch):
    monkeypatch.setattr(preparation, "CHUNK", 3)  # more chunks than may be under way at a time
    account = account_of(records)
    given = encode if many else OneByOne(encode)
    found = encode_all(iter(records), given, account=account, on_bad_record="skip", num_workers=workers)
    assert list(found) == [encode(record)[0] for record in records if record.where != "a.jsonl:9"]
    assert account.left_out == {"no room for an answer": 1}
    account = account_of(records)
    assert encode_all(records, given, account=account, num_workers=workers) == found  # no error without "skip" either
    assert account.left_out == {"no room for an answer": 1}
    records[4] = talk("a", where="a.jsonl:5")
    with pytest.raises(RecordError, match=r"^a\.jsonl:5: .*none of the next 35 records is bad"):
        encode_all(records, given, account=account_of(records), num_workers=workers)


def test_more_records_that_are_too_long_than_fit_are_an_error_unless_skipped(encode, tmp_path):
    fits, long = talk("a", "b", where="a:1"), [talk("a" * 99, "b", where=f"a:{n}") for n in (2, 3)]
    account = account_of([0] * 2)
    assert len(encode_all([fits, long[0]], encode, account=account)) == 1  # a half is not more than a half
    with pytest.raises(ArgumentError) as caught:
        encode_all([fits, *long], encode, account=account_of([0] * 3), description="encode train")
    assert str(caught.value) == (
        "encode train: 2 of 3 records (66.7%) are too long (2 no room for an answer), the first: a:2: the first "
        "question alone fills the limit of 50 tokens, no token of an answer is left; raise --model_max_length. Give a "
        "larger --model_max_length, or --on_bad_record skip to continue with the 1 that fit"
    )
    account = account_of([0] * 3)
    assert len(encode_all([fits, *long], encode, account=account, on_bad_record="skip")) == 1
    assert (account.kept, account.left_out) == (1, {"no room for an answer": 2})
    for how in ("skip", "error"):
        with pytest.raises(ArgumentError, match="a larger --model_max_length"):
            encode_all(long, encode, account=account_of(long), on_bad_record=how)


def test_an_iterator_is_not_read_far_ahead(encode, monkeypatch):
    """The bound on memory: a handful of chunks, however many records there are."""
    monkeypatch.setattr(preparation, "CHUNK", 4)
    ahead, given, done = [], 0, 0

    def records():
        nonlocal given
        for number in range(400):
            given += 1
            yield talk("a", "b", where=f"a.jsonl:{number}")

    def see(where):
        ahead.append(given - done)

    original = ExampleWriter.add

    def add(self, kind, rows):
        nonlocal done
        see(rows[0].where)
        done += 1
        original(self, kind, rows)

    monkeypatch.setattr(ExampleWriter, "add", add)
    assert len(encode_all(records(), encode, account=Account(400, 400))) == 400
    assert max(ahead) <= 4 * (preparation.AT_ONCE + 2)


def test_no_record_left_is_an_error(encode):
    with pytest.raises(ValueError, match=r"none of the 1 records is left: 1 nothing learned"):
        encode_all([talk("a", where="a:1")], encode, account=account_of([0]), on_bad_record="skip")


def test_texts_are_laid_out_flat(tokenizer):
    texts = [("abc", "a:1"), ("d", "a:2")]
    examples = encode_all(texts, TextEncoder(tokenizer, 3), account=Account(2, 2))
    assert [tokenizer.decode(example.input_ids) for example in examples] == ["abc", "c</s>", "d</s>"]
    assert [example.where for example in examples] == ["a:1", "a:1", "a:2"]


def test_prompts_are_examples_of_which_nothing_is_learned(tokenizer, template, tmp_path):
    """The second loses its first exchange, the third alone is too long."""
    asked = [talk("a", where="a:1"), talk("a" * 30, "b", "c", where="a:2"), talk("a" * 99, where="a:3")]
    limit, account = len(encode_prompt(tokenizer, template, asked[0], 999)[0]), Account(3, 3)
    prompts = encode_all(asked, PromptEncoder(tokenizer, template, limit), account=account, on_bad_record="skip")
    alone = [encode_prompt(tokenizer, template, talk(text, where="?"), 999)[0] for text in "ac"]
    assert list(prompts) == [Example(ids, [-100] * limit, f"a:{n}") for n, ids in enumerate(alone, 1)]
    assert (account.kept, account.cut, account.left_out) == (2, 1, {"prompt too long": 1})


def test_a_worker_that_is_killed_is_said(monkeypatch):
    monkeypatch.setattr(preparation, "CHUNK", 1)
    killed = OneByOne(lambda record: os.kill(os.getpid(), signal.SIGKILL))
    with pytest.raises(ArgumentError, match=r"--preprocessing_num_workers 2: one of the processes that encode was ki"):
        encode_all(range(9), killed, account=Account(9, 9), num_workers=2)


def test_a_chunk_of_long_documents_is_short(monkeypatch):
    """The bound on memory where a record is as long as a book."""
    monkeypatch.setattr(preparation, "CHARACTERS", 10)
    chunks = preparation._chunks(["a" * 4, "b" * 7, "c" * 30, *"defg"], len)
    assert [[text[0] for text in chunk] for chunk in chunks] == [["a", "b"], ["c"], ["d", "e", "f", "g"]]
    monkeypatch.setattr(preparation, "CHUNK", 3)
    assert [len(chunk) for chunk in preparation._chunks("abcdefg", len)] == [3, 3, 1]


def test_pairs_stay_pairs(tokenizer, template):
    said = [(Message("assistant", text),) for text in ("yes", "no")]
    records = [Preference(talk("a" * n, where=f"a:{n}"), *said, f"a:{n}") for n in range(1, 5)]

    pairs = encode_all(records, PreferenceEncoder(tokenizer, template, 99, 99), account=Account(4, 4))
    assert list(pairs) == [encode_preference(tokenizer, template, record, 99, 99)[0] for record in records]
    assert isinstance(pairs[0], PreferenceExample)
    sizes = [[len(pair.chosen.input_ids), len(pair.rejected.input_ids)] for pair in pairs]
    assert pairs.tokens.tolist() == sizes


def test_kinds_are_not_mixed(encode, records):
    def sometimes(record):
        example, _ = encode(record)
        return PreferenceExample(example, example) if record.where == "a.jsonl:3" else example

    with pytest.raises(ValueError, match="of one kind, found Example and PreferenceExample"):
        encode_all(records[:3], OneByOne(sometimes), account=Account(3, 3))


# --- examples as flat arrays -----------------------------------------------------------------------------------------

MADE = [
    Example([5, 6, 7, 8], [-100, -100, 7, 8], "a.jsonl:1"),
    Example([9], [9], "b/ü.jsonl:2"),
    Example([1, 2, 3, 4, 5], [-100, 2, -100, 4, 5], "a.jsonl:3"),
    Example([4, 4], [4, 4], "a.jsonl:4"),
]


@pytest.mark.parametrize("place", ["memory", "unnamed file", "folder"])
def test_examples_come_back(place, tmp_path, monkeypatch):
    if place == "unnamed file":
        monkeypatch.setattr(examples_module, "IN_MEMORY", 3)
    writer = ExampleWriter(tmp_path if place == "folder" else None)
    for example in MADE:
        writer.add("Example", [row_of(example)])
    made = writer.finish()
    again = read_examples(tmp_path, "Example") if place == "folder" else made
    assert list(again) == MADE
    assert again[-1] == MADE[-1]
    assert again == made
    assert again.tokens.tolist() == [[4], [1], [5], [2]]
    assert again.learned.tolist() == [[2], [0], [3], [1]]  # nothing predicts a row's first token
    with pytest.raises(IndexError, match="4 examples, none at 4"):
        again[4]
    mapped = [isinstance(column, np.memmap) for name, column in made._columns.items() if name == "ids"]
    assert mapped == [place != "memory"]


def test_no_examples_at_all(tmp_path):
    assert list(ExampleWriter().finish()) == []
    ExampleWriter(tmp_path).finish()
    empty = read_examples(tmp_path, "Example")
    assert (len(empty), empty.tokens.shape, empty.learned.shape) == (0, (0, 1), (0, 1))


def test_files_that_do_not_belong_together(tmp_path):
    writer = ExampleWriter(tmp_path)
    writer.add("Example", [Row(array("i", [1, 2]), array("i", [0, 2]), "a")])
    writer.finish()
    np.save(tmp_path / "ids.npy", np.array([1], np.int32))
    with pytest.raises(ValueError, match=r"ids.npy and ids_ends.npy do not belong together"):
        read_examples(tmp_path, "Example")


# --- the tokenizer's two doors ---------------------------------------------------------------------------------------


def test_a_call_that_pads_or_cuts_leaves_no_trace(tokenizer):
    encoder = PieceEncoder(tokenizer)
    expected = [ids.tolist() for ids in encoder.encode(["the user asks", "a"])]
    tokenizer(["the user asks", "a"], padding=True, truncation=True, max_length=2)
    assert [ids.tolist() for ids in encoder.encode(["the user asks", "a"])] == expected
    assert expected == tokenizer(["the user asks", "a"], add_special_tokens=False)["input_ids"]


def test_a_tokenizer_with_a_door_of_its_own_is_asked_there(tiny_tokenizer):
    """One that changes texts in Python must not be gone round."""
    from transformers import PreTrainedTokenizerFast

    class Loud(PreTrainedTokenizerFast):
        def _encode_plus(self, text, *args, **kwargs):
            text = [each.upper() for each in text] if isinstance(text, list) else text.upper()
            return super()._encode_plus(text, *args, **kwargs)

    tokenizer = Loud(tokenizer_object=tiny_tokenizer().backend_tokenizer, eos_token="</s>")
    (ids,) = PieceEncoder(tokenizer).encode(["the user"])
    assert tokenizer.decode(ids) == "THE USER"
