"""--streaming: every record once a pass, whatever deals them out; a stopped run continues at its place."""

import gzip
import itertools
import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from itertools import islice
from types import SimpleNamespace

import pytest
import torch

from stagewise.config.arguments import DataArguments, LanguageModelArguments
from stagewise.data.examples import Example
from stagewise.data.mixture import Source
from stagewise.data.streaming.dataset import stream_of
from stagewise.data.streaming.file_index import PIECE, Files, Position, piece_size
from stagewise.data.streaming.shards import Lane, LaneState, Recipe
from stagewise.errors import ArgumentError, RecordError, TooLongError
from stagewise.training.stream_trainer import check_streaming
from tests.conftest import ROOT, adapter_weights
from tests.encoders import OneByOne
from tests.launching import environment, python, run, torchrun

pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create")


def write(path, numbers, text=lambda number: "x" * (1 + number % 7)):
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps({"number": number, "text": text(number)}) + "\n" for number in numbers]
    data = "".join(lines).encode()
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return path


def parse(record, where):
    if record.get("text") == "bad":
        raise RecordError(where, "bad text", "the text is bad")
    if record.get("text") == "long":
        raise TooLongError(where, "prompt too long", "the prompt is too long")
    return record, where


def encode(parsed):
    """A record as one example: its number, then a token for each letter."""
    record, where = parsed
    ids = [record["number"], *map(ord, record["text"])]
    return Example(ids, ids, where)


def number_of(example):
    return example.input_ids[0]


def recipe(*paths, **changes):
    settings = {"weights": None, "parse": parse, "encode": OneByOne(encode), "skip": False, "buffer": 8, **changes}
    return Recipe((Files(paths),), **settings)


def numbers(rows):
    return [number_of(example) for row in rows for example in row.examples]


def plain(rows):
    """Rows as they compare: errors are equal where they say the same."""
    return [
        (row.examples, row.lane, row.state, [(str(refusal.error), refusal.raw) for refusal in row.refused])
        for row in rows
    ]


def first_pass(one, lane):
    """The rows of a lane's first pass over its files, of which there is one source."""
    own = sum(one.is_mine(lane, 0, 0, place.start.record) for place in one.sources[0].places(Position()))
    rows = list(itertools.takewhile(lambda row: row.state.accounts[0].read <= own, Lane(one, lane))) if own else []
    assert not rows or rows[-1].state.accounts[0].read == own
    return rows


# ── files and places ─────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_walk_goes_on_from_any_place_of_any_kind_of_file(tmp_path):
    paths = [write(tmp_path / "a.jsonl", range(5)), write(tmp_path / "b.jsonl.gz", range(5, 9))]
    paths[0].write_bytes(b"\xef\xbb\xbf" + paths[0].read_bytes().replace(b"}\n", b"}\r\n\n", 2))
    (tmp_path / "c.csv").write_text("number,text\n9,nine\n10,ten\n")
    (tmp_path / "d.json").write_text(json.dumps([{"number": 11}, {"number": 12}]))
    files = Files([*paths, tmp_path / "c.csv", tmp_path / "d.json"])
    places = list(files.places(Position()))
    assert [int(files.read(place).value["number"]) for place in places] == list(range(13))
    assert [place.start.record for place in places] == list(range(13))
    assert [files.read(place).where for place in places[:4]] == ["a.jsonl:1", "a.jsonl:3", "a.jsonl:5", "a.jsonl:6"]
    assert files.read(places[6]).where == "b.jsonl.gz:2"
    for number, place in enumerate(places):
        assert list(files.places(place.after)) == places[number + 1 :], number
    assert not files.seekable and Files(paths[:1]).seekable


def test_a_limit_counts_records_of_all_files(tmp_path):
    files = Files([write(tmp_path / "a.jsonl", range(3)), write(tmp_path / "b.jsonl", range(3, 9))], limit=5)
    assert [files.read(place).value["number"] for place in files.places(Position())] == [0, 1, 2, 3, 4]


def test_what_cannot_be_read_is_a_line_with_its_error(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"number": 1}\n{broken\n[3]\n"\xff"\n{"number": 5}')
    files = Files([path])
    values = [files.read(place).value for place in files.places(Position())]
    reasons = [value.reason if isinstance(value, RecordError) else value["number"] for value in values]
    assert reasons == [1, "broken JSON", "not an object", "wrong encoding", 5]
    wide = tmp_path / "wide.jsonl"
    wide.write_bytes('{"number": 1}\n{"number": 2}\n'.encode("utf-16"))
    files = Files([wide, path])
    first = next(files.places(Position()))
    assert files.read(first).value.reason == "wrong encoding"
    assert len(list(files.places(Position()))) == 6
    assert len(list(files.places(first.after))) == 5
    torn = tmp_path / "torn.jsonl.gz"
    torn.write_bytes(b"no gzip")
    files = Files([torn, path])
    assert [files.read(place).value.reason for place in list(files.places(Position()))[:1]] == ["truncated file"]


def test_a_wide_text_is_one_error_and_no_piece_of_it_is_read(tmp_path):
    path = tmp_path / "wide.txt"
    path.write_bytes(("some words\n" * 20_000).encode("utf-16"))
    files = Files([path])
    (place,) = files.places(Position())
    assert files.read(place).value.reason == "wrong encoding"
    assert not list(files.places(place.after))


def test_of_a_line_that_is_too_long_only_the_beginning_is_held(tmp_path, monkeypatch):
    monkeypatch.setattr("stagewise.data.streaming.file_index.MAX_RECORD", 100)
    monkeypatch.setattr("stagewise.data.streaming.file_index.MAX_KEPT", 10)
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps({"number": "x" * 200}) + "\n" + json.dumps({"number": 2}) + "\n")
    files = Files([path])
    long, other = (files.read(place) for place in files.places(Position()))
    assert (long.value.reason, long.raw, other.value) == ("record too long", '{"number":', {"number": 2})


@pytest.mark.parametrize("name", ["a.txt", "a.txt.gz"])
def test_pieces_of_a_long_text_joined_are_the_text(tmp_path, name):
    paragraphs = [f"paragraph {number} 水 {'word ' * (number % 90)}" for number in range(3000)]
    text = "\n\n".join(paragraphs) + "\n\n\n"
    path = tmp_path / name
    path.write_bytes(gzip.compress(text.encode()) if name.endswith(".gz") else text.encode())
    files = Files([path])
    places = list(files.places(Position()))
    lines = [files.read(place) for place in places]
    pieces = [line.value["text"] for line in lines]
    assert "".join(pieces) == text
    assert len(pieces) > 5 and all(len(piece.encode()) <= 2 * PIECE for piece in pieces)
    assert all(piece.endswith("\n\n") and piece.startswith("paragraph") for piece in pieces)
    assert lines[0].where == name
    second = text[: len(pieces[0])].count("\n") + 1
    assert lines[1].where == f"{name}:{second}"
    for number, place in enumerate(places):
        assert list(files.places(place.after)) == places[number + 1 :]


def test_a_short_text_is_one_document_under_its_own_name(tmp_path):
    (tmp_path / "a.txt").write_bytes("\ufeffone\r\n\r\ntwo\n".encode())
    files = Files([tmp_path / "a.txt"])
    (place,) = files.places(Position())
    assert files.read(place) == ("a.txt", "one\r\n\r\ntwo\n", {"text": "one\n\ntwo\n"})


@pytest.mark.parametrize(
    ("data", "size"),
    [
        (b"a" * PIECE, PIECE),
        (b"a" * 2 * PIECE, PIECE),
        ("é".encode() * PIECE, PIECE),
        (b"x" + "é".encode() * PIECE, PIECE - 1),
        (b"a" * (PIECE - 9) + b" " + b"b" * PIECE, PIECE - 8),
        (b"a" * (PIECE - 9) + b"\n \n" + b"b c" * PIECE, PIECE - 6),
        (b"a" * (PIECE - 9) + b"\n\n" + b"b\n" + b"c" * PIECE, PIECE - 7),
        (b"a\n\n" + b"b" * 2 * PIECE, PIECE),
    ],
)
def test_a_text_is_cut_behind_a_paragraph_a_line_a_word_or_a_character(data, size):
    assert piece_size(data) == size


# ── lanes ────────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("lanes", [1, 2, 3, 7, 40])
@pytest.mark.parametrize("buffer", [1, 10, 1000])
@pytest.mark.parametrize("capacity", [None, 20])
def test_the_lanes_together_read_every_record_once_a_pass(tmp_path, lanes, buffer, capacity):
    paths = [write(tmp_path / "a.jsonl", range(53)), write(tmp_path / "b.jsonl", range(53, 61))]
    one = recipe(*paths, lanes=lanes, buffer=buffer, capacity=capacity)
    assert sorted(n for lane in range(lanes) for n in numbers(first_pass(one, lane))) == list(range(61))


def test_a_pass_is_shuffled_and_the_next_one_otherwise_and_one_record_is_the_order_of_the_files(tmp_path):
    path = write(tmp_path / "a.jsonl", range(100))
    found = numbers(islice(Lane(recipe(path, buffer=100), 0), 200))
    assert sorted(found[:100]) == sorted(found[100:]) == list(range(100))
    assert found[:100] != list(range(100)) and found[:100] != found[100:]
    assert numbers(islice(Lane(recipe(path, buffer=100), 0), 200)) == found
    assert numbers(islice(Lane(recipe(path, buffer=100, seed=1), 0), 100)) != found[:100]
    assert numbers(islice(Lane(recipe(path, buffer=1), 0), 200)) == [*range(100), *range(100)]


def test_records_travel_no_further_than_the_buffer(tmp_path):
    path = write(tmp_path / "a.jsonl", range(400))
    found = numbers(islice(Lane(recipe(path, buffer=50), 0), 400))
    # blocks of 50, and within a window of 32 rows once more
    assert max(abs(place - number) for place, number in enumerate(found)) < 50 + 32


def test_no_lane_gets_the_long_records_alone_where_short_and_long_take_turns(tmp_path):
    path = write(tmp_path / "a.jsonl", range(400), text=lambda number: "x" * (1 + 30 * (number % 2)))
    shares = [Counter(n % 2 for n in numbers(first_pass(recipe(path, lanes=2), lane))) for lane in (0, 1)]
    assert all(70 < share[0] < 130 for share in shares), shares


def test_packed_rows_are_full_and_hold_no_more_than_the_capacity(tmp_path):
    path = write(tmp_path / "a.jsonl", range(1000))
    rows = first_pass(recipe(path, capacity=30, buffer=200), 0)
    lengths = [sum(len(example.input_ids) for example in row.examples) for row in rows]
    assert max(lengths) <= 30
    assert sum(lengths) / (30 * len(lengths)) > 0.93


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz"])
@pytest.mark.parametrize("capacity", [None, 25])
def test_a_lane_goes_on_from_the_state_of_any_of_its_rows(tmp_path, capacity, name):
    path = write(tmp_path / name, range(61), text=lambda number: "bad" if number % 9 == 4 else "x" * (1 + number % 7))
    one = recipe(path, lanes=2, buffer=12, capacity=capacity, skip=True)
    whole = list(islice(Lane(one, 1), 90))
    for number, row in enumerate(whole[:60]):
        state = LaneState.from_json(json.loads(json.dumps(row.state.as_json())))
        assert plain(islice(Lane(one, 1, state), 12)) == plain(whole[number + 1 : number + 13]), number


def test_blocks_of_one_document_are_counted_once_and_resumed_in_the_middle(tmp_path):
    path = write(tmp_path / "a.jsonl", range(9))

    def blocks(parsed):
        whole = encode(parsed)
        return [Example([number_of(whole), part], [number_of(whole), part], whole.where) for part in range(7)]

    one = recipe(path, encode=OneByOne(blocks), capacity=6)
    rows = list(islice(Lane(one, 0), 30))
    # a pass is less than a window: 63 examples of 2 tokens, three in a row
    pieces = Counter(tuple(example.input_ids) for row in rows[:21] for example in row.examples)
    assert pieces == Counter((number, part) for number in range(9) for part in range(7))
    assert rows[20].state.accounts[0].kept == 9
    assert list(islice(Lane(one, 0, rows[4].state), 25)) == rows[5:]


def test_the_account_counts_what_was_taken_kept_and_left_out(tmp_path):
    path = write(tmp_path / "a.jsonl", range(40), text=lambda number: "bad" if number % 10 == 3 else "xyz")
    rows = first_pass(recipe(path, skip=True), 0)
    account = rows[-1].state.accounts[0]
    assert (account.read, account.kept, account.left_out) == (40, 36, {"bad text": 4})
    refused = [(refusal.error.where, json.loads(refusal.raw)["number"]) for row in rows for refusal in row.refused]
    assert sorted(refused) == [(f"a.jsonl:{number + 1}", number) for number in (13, 23, 33, 3)]
    for row in rows:
        account = row.state.accounts[0]
        assert account.read == account.kept + sum(account.left_out.values())
    with pytest.raises(RecordError, match=r"a.jsonl:4: the text is bad \(--on_bad_record skip leaves such"):
        list(islice(Lane(recipe(path), 0), 40))


def test_a_record_that_is_too_long_is_counted_and_no_error(tmp_path):
    path = write(tmp_path / "a.jsonl", range(40), text=lambda number: "long" if number % 10 == 3 else "xyz")
    rows = first_pass(recipe(path), 0)
    account = rows[-1].state.accounts[0]
    assert (account.read, account.kept, account.left_out) == (40, 36, {"prompt too long": 4})
    assert sum(len(row.refused) for row in rows) == 4
    longer = write(tmp_path / "b.jsonl", range(300), text=lambda number: "xyz" if number < 50 else "long")
    with pytest.raises(ArgumentError, match=r"--train_file_dir: .* are too long .*a larger --max_source_length"):
        list(islice(Lane(recipe(longer), 0), 60))
    assert len(list(islice(Lane(recipe(longer, skip=True), 0), 60))) == 60


def test_sources_are_drawn_by_weight_each_with_its_own_passes(tmp_path):
    paths = [write(tmp_path / "a.jsonl", range(100)), write(tmp_path / "b.jsonl", range(1000, 1005))]
    one = Recipe(tuple(Files([path]) for path in paths), (0.75, 0.25), parse, OneByOne(encode), False, 10, None, 4)
    rows = [row for lane in range(4) for row in islice(Lane(one, lane), 500)]
    small = sum(number >= 1000 for number in numbers(rows))
    assert 0.21 < small / len(rows) < 0.29
    assert set(numbers(rows)) == {*range(100), *range(1000, 1005)}
    ends = [list(islice(Lane(one, lane), 500))[-1].state for lane in range(4)]
    assert sum(state.accounts[1].kept for state in ends) == small
    assert all(state.taken[1].passes > state.taken[0].passes for state in ends)
    again = list(islice(Lane(one, 2), 60))
    assert list(islice(Lane(one, 2, again[19].state), 40)) == again[20:]


def test_files_without_a_record_or_without_a_good_one_are_an_error(tmp_path):
    empty = tmp_path / "empty.jsonl"
    empty.write_text("\n \n")
    with pytest.raises(ArgumentError, match="there is no record in .*empty.jsonl"):
        next(iter(Lane(recipe(empty), 0)))
    bad = write(tmp_path / "bad.jsonl", range(150), text=lambda number: "bad")
    with pytest.raises(ArgumentError, match="150 records were left out where 0 were kept.*bad text.*bad.jsonl:"):
        next(iter(Lane(recipe(bad, skip=True), 0)))


# ── processes and workers ────────────────────────────────────────────────────────────────────────────────────────────


def arguments(**changes):
    """What a RecordStream reads of TrainingArguments."""
    return SimpleNamespace(
        **{
            "world_size": 1,
            "process_index": 0,
            "gradient_accumulation_steps": 1,
            "dataloader_num_workers": 0,
            "dataloader_prefetch_factor": None,
            "dataloader_pin_memory": False,
            "dataloader_multiprocessing_context": None,
            "seed": 42,
            "data_seed": None,
            **changes,
        }
    )


def open_stream(tmp_path, paths, **changes):
    settings = {"buffer": 12, "skip": False, "rejected": tmp_path / "out" / "rejected.jsonl", **changes}
    return stream_of([Source("a", str(tmp_path), tuple(paths))], -1, parse, OneByOne(encode), **settings)


def collate(items):
    """Sequences of record numbers; rows of several examples are told apart from single ones."""
    rows = [item if isinstance(item, list) else [item] for item in items]
    return {"rows": [[number_of(example) for example in row] for row in rows]}


def batches(tmp_path, path, count, batch=1, capacity=20, resume=None, **changes):
    stream = open_stream(tmp_path, [path])
    assert number_of(stream[0]) == 0  # read by this process, before workers are forked
    stream.pack_to(capacity)
    stream.resume = resume
    loader = iter(stream.loader(collate, arguments(**changes), batch))
    return [next(loader)["rows"] for _ in range(count)], stream


@pytest.mark.parametrize(
    ("world", "batch", "accumulated", "workers", "lanes"),
    [(1, 1, 1, 2, 2), (2, 2, 1, 3, 12), (3, 1, 2, 0, 6), (2, 1, 3, 2, 12), (1, 3, 1, 0, 3)],
)
def test_ranks_and_workers_together_read_a_pass_once(tmp_path, world, batch, accumulated, workers, lanes):
    path = write(tmp_path / "a.jsonl", range(101))
    rows: dict[int, list[int]] = {lane: [] for lane in range(lanes)}
    for rank in range(world):
        changes = {"world_size": world, "process_index": rank, "gradient_accumulation_steps": accumulated}
        stream = open_stream(tmp_path, [path])
        stream.pack_to(None)
        loader = iter(stream.loader(collate, arguments(**changes, dataloader_num_workers=workers), batch))
        for micro in range(2 * 101 // lanes * lanes // (world * batch)):
            for place, row in enumerate(next(loader)["rows"]):
                rows[(micro * world * batch + rank * batch + place) % lanes] += row
    whole = recipe(path, buffer=12, lanes=lanes, seed=42)
    expected = {lane: numbers(first_pass(whole, lane)) for lane in range(lanes)}
    for lane, found in rows.items():
        assert found[: len(expected[lane])] == expected[lane], lane
        assert len(found) > len(expected[lane])
    assert sorted(number for lane in expected.values() for number in lane) == list(range(101))


def test_two_processes_read_what_one_with_twice_the_batch_does_step_by_step(tmp_path):
    path = write(tmp_path / "a.jsonl", range(101))

    def steps(ranks, batch, accumulated=1):
        world = len(ranks)
        all_ranks = []
        for rank in ranks:
            changes = {"world_size": world, "process_index": rank, "gradient_accumulation_steps": accumulated}
            all_ranks.append(batches(tmp_path, path, 30 * accumulated, batch, **changes)[0])
        return [
            sorted(
                row
                for rank in all_ranks
                for micro in rank[step * accumulated : (step + 1) * accumulated]
                for row in micro
            )
            for step in range(30)
        ]

    one = steps([0], 4)
    assert steps([0, 1], 2) == one
    assert steps([0, 1], 1, accumulated=2) == one
    assert steps([0], 1, accumulated=4) == one
    assert len({number for row in one for part in row for number in part}) == 101


def test_workers_change_nothing_of_the_order_but_how_many_lanes_there_are(tmp_path):
    path = write(tmp_path / "a.jsonl", range(101))
    alone = batches(tmp_path, path, 20, gradient_accumulation_steps=2)[0]
    assert batches(tmp_path, path, 20, gradient_accumulation_steps=2, dataloader_num_workers=2)[0] == alone


@pytest.mark.parametrize("workers", [0, 1, 3])
def test_a_stopped_stream_goes_on_at_the_batch_that_was_not_taken(tmp_path, workers):
    path = write(tmp_path / "a.jsonl", range(101))
    changes = {"batch": 2, "dataloader_num_workers": workers}
    whole, _ = batches(tmp_path, path, 40, **changes)
    for taken in (1, 2, 7, 25):
        _, stream = batches(tmp_path, path, taken, **changes)
        stream.save(tmp_path / f"checkpoint-{taken}")
        rest, _ = batches(tmp_path, path, 12, resume=tmp_path / f"checkpoint-{taken}", **changes)
        assert rest == whole[taken : taken + 12], taken


def test_a_stream_goes_on_with_other_processes_where_a_step_holds_as_many_rows(tmp_path):
    path = write(tmp_path / "a.jsonl", range(101))
    whole, _ = batches(tmp_path, path, 20, batch=2)
    for rank in (0, 1):
        _, stream = batches(tmp_path, path, 5, world_size=2, process_index=rank)
        stream.save(tmp_path / "checkpoint-5")
    assert batches(tmp_path, path, 10, batch=2, resume=tmp_path / "checkpoint-5")[0] == whole[5:15]


def test_what_processes_that_are_no_more_left_out_is_in_the_file_too(tmp_path):
    path = write(tmp_path / "a.jsonl", range(60), text=lambda number: "bad" if number % 6 == 3 else "xyz")

    def go(count, batch, resume=None, **changes):
        stream = open_stream(tmp_path, [path], skip=True)
        stream.resume = resume
        loader = iter(stream.loader(collate, arguments(**changes), batch))
        for _ in range(count):
            next(loader)
        return stream

    for saves, count in ((True, 10), (False, 15)):  # the second time killed after its checkpoint
        for rank in (0, 1):
            stream = go(count, 1, world_size=2, process_index=rank)
            if saves:
                stream.save(tmp_path / "checkpoint-10")
    assert (tmp_path / "out" / "rejected-1.jsonl").is_file()
    stream = go(12, 2, tmp_path / "checkpoint-10")
    stream.settle(finished=True)
    written = [json.loads(line) for line in (tmp_path / "out" / "rejected.jsonl").read_text().splitlines()]
    account = stream.account.as_dict()["left_out"]["bad text"]
    assert len(written) == len({entry["where"] for entry in written}) == account
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["rejected.jsonl"]


def test_a_place_that_means_something_else_now_is_refused(tmp_path):
    path = write(tmp_path / "a.jsonl", range(101))
    folder = tmp_path / "checkpoint-5"
    _, stream = batches(tmp_path, path, 5, world_size=2)
    with pytest.raises(ArgumentError, match="saved without --streaming"):
        batches(tmp_path, path, 1, resume=folder)
    stream.save(folder)
    for changes, message in (
        ({"seed": 1}, "--data_seed .* was 42 and is 1"),
        ({"batch": 2}, "dealt to 2 lanes and would be to 4"),
        ({"capacity": 30}, "the length of a packed row was 20 and is 30"),
        ({"process_index": 1}, "the places of 1 rows are missing"),
    ):
        with pytest.raises(ArgumentError, match=message):
            batches(tmp_path, path, 1, resume=folder, **{"world_size": 2, **changes})
    write(path, range(102))
    with pytest.raises(ArgumentError, match="the files of --train_file_dir"):
        batches(tmp_path, path, 1, resume=folder, world_size=2)


@pytest.mark.parametrize("workers", [0, 2])
def test_an_error_of_a_worker_arrives_in_its_own_words(tmp_path, workers):
    path = write(tmp_path / "a.jsonl", range(40), text=lambda number: "bad" if number == 30 else "xyz")
    with pytest.raises(RecordError, match="a.jsonl:31: the text is bad"):
        batches(tmp_path, path, 60, dataloader_num_workers=workers)


def test_what_is_left_out_is_written_once_also_when_a_run_is_taken_up_again(tmp_path):
    path = write(tmp_path / "a.jsonl", range(60), text=lambda number: "bad" if number % 6 == 3 else "xyz")

    def go(count, resume=None):
        stream = open_stream(tmp_path, [path], skip=True)
        stream.resume = resume
        loader = iter(stream.loader(collate, arguments(), 1))
        for _ in range(count):
            next(loader)
        return stream

    stream = go(20)
    stream.save(tmp_path / "checkpoint-20")
    go(40, tmp_path / "checkpoint-20")  # killed after its checkpoint; what it wrote since comes again
    stream = go(30, tmp_path / "checkpoint-20")
    stream.settle(finished=True)
    written = [json.loads(line) for line in (tmp_path / "out" / "rejected.jsonl").read_text().splitlines()]
    assert sorted(json.loads(entry["raw"])["number"] for entry in written) == list(range(3, 60, 6))
    assert {entry["reason"] for entry in written} == {"bad text"}
    account = stream.account.as_dict()
    assert (account["read"], account["kept"], account["left_out"]) == (60, 50, {"bad text": 10})
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["rejected.jsonl"]


# ── flags ────────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"max_steps": None}, "--max_steps: missing"),
        ({"validation_file_dir": None, "validation_split_percentage": 10}, "give --validation_file_dir"),
        ({"deduplicate": True}, "--deduplicate: not with --streaming"),
        ({"preprocessing_num_workers": 2}, "--dataloader_num_workers"),
        ({"validation_file_dir": None, "overwrite_cache": True}, "--overwrite_cache: not with --streaming"),
        ({"train_sampling_strategy": "group_by_length"}, "--train_sampling_strategy: not with --streaming"),
        ({"save_strategy": "epoch"}, "use --save_steps"),
        ({"shuffle_buffer": 0}, "--shuffle_buffer: expected at least 1"),
        ({"streaming": False, "shuffle_buffer": 5}, "--shuffle_buffer has no effect without --streaming"),
    ],
)
def test_what_cannot_be_streamed_is_named_with_the_way_out(stage, words, capsys, changes, message):
    with pytest.raises(SystemExit):
        stage("supervised_finetuning", *words("sft", **changes))
    assert message in capsys.readouterr().err


def test_a_datasets_set_is_not_streamed():
    args = SimpleNamespace(do_train=True, max_steps=3, accelerator_config=None)
    with pytest.raises(ArgumentError, match="the folder of its parquet or jsonl files"):
        check_streaming(args, DataArguments(dataset_name="x"), LanguageModelArguments(streaming=True))


# ── whole runs ───────────────────────────────────────────────────────────────────────────────────────────────────────

TOPICS = ["fever", "rest", "water", "a cold", "sleep", "diet", "pain", "exercise"]


def line(stage_name, number):
    topic = TOPICS[number % len(TOPICS)]
    if stage_name == "pt":
        return {"text": f"a line about {topic} and number {number} " * (1 + number % 3)}
    answer = f"drink water for {topic} " * (1 + number % 3)
    return {
        "conversations": [{"from": "human", "value": f"what about {topic} {number}"}, {"from": "gpt", "value": answer}]
    }


@pytest.fixture
def words(tmp_path, tiny_checkpoint):
    """words("sft", out="one", max_steps=3): flags of a short streamed run on a tiny llama."""
    model = tiny_checkpoint("llama", max_position_embeddings=1024)

    def make(stage_name, out="out", **changes):
        data, validation = tmp_path / f"{stage_name}.jsonl", tmp_path / f"{stage_name}-validation.jsonl"
        for path, count in ((data, 40), (validation, 3)):
            path.write_text("".join(json.dumps(line(stage_name, n)) + "\n" for n in range(count)))
        flags = {
            "model_name_or_path": model,
            "train_file_dir": data,
            "validation_file_dir": validation,
            "output_dir": tmp_path / out,
            "streaming": True,
            "shuffle_buffer": 16,
            "max_steps": 6,
            "learning_rate": 1e-2,
            "report_to": "none",
            {"pt": "block_size", "sft": "model_max_length"}[stage_name]: 300,
            **changes,
        }
        return [word for name, value in flags.items() if value is not None for word in (f"--{name}", value)]

    return make


SCRIPTS = {"pt": "pretraining", "sft": "supervised_finetuning"}


def manifest(folder):
    return json.loads((folder / "run.json").read_text())


def same_weights(one, other):
    one, other = adapter_weights(one), adapter_weights(other)
    return one.keys() == other.keys() and all(torch.equal(value, other[name]) for name, value in one.items())


@pytest.mark.parametrize("stage_name", SCRIPTS)
@pytest.mark.parametrize("packing", [True, False])
def test_a_streamed_run_trains_and_accounts_for_what_it_read(stage, words, stage_name, packing):
    out = stage(SCRIPTS[stage_name], *words(stage_name, packing=packing, max_steps=12), "--eval_on_start")
    made = manifest(out)
    assert (made["status"], made["steps"]) == ("finished", 12)
    assert (
        made["rows"]
        == ("packed: llama is a tested family" if packing else "padded, one record a row: --packing False")
        + "; read while training runs"
    )
    account = made["data"]["train"]
    assert account["read"] == account["kept"] >= 12
    assert account.keys() == {"streamed", "read", "kept", "cut", "left_out", "files", "passes"}
    assert account["left_out"] == {} and account["passes"] >= 1 and account["files"]
    if not packing:
        assert account["kept"] == 12 * 8
        assert account["passes"] == 3
    assert made["metrics"]["eval"]["eval_loss"] < made["metrics"]["eval_before"]["eval_loss"]


@pytest.mark.parametrize("workers", [0, 2])
def test_a_stopped_and_resumed_run_ends_with_the_same_weights(stage, words, workers):
    changes = {"lora_dropout": 0.1, "dataloader_num_workers": workers, "gradient_accumulation_steps": 2}
    changes |= {"per_device_train_batch_size": 2, "save_steps": 3, "shuffle_buffer": 8}
    whole = stage("supervised_finetuning", *words("sft", "whole", **changes))
    parts = stage("supervised_finetuning", *words("sft", "parts", **changes))
    # what a kill while checkpoint-6 was written leaves
    (parts / "checkpoint-6" / "whole.json").unlink()
    for name in ("run.json", "adapter_model.safetensors", "adapter_config.json"):
        (parts / name).unlink()
    stage("supervised_finetuning", *words("sft", "parts", **changes), "--resume_from_checkpoint", "True")
    assert same_weights(parts, whole)
    logs = [json.loads((folder / "trainer_state.json").read_text())["log_history"] for folder in (parts, whole)]
    assert [entry["epoch"] for entry in logs[0]] == [entry["epoch"] for entry in logs[1]]
    assert manifest(parts)["data"]["train"] == manifest(whole)["data"]["train"]


def test_a_resumed_run_reads_on_and_does_not_encode_again_what_it_had(stage, words, monkeypatch):
    import supervised_finetuning

    read = []
    plain = supervised_finetuning.parse_conversation

    def noted(record, where):
        read.append(where)
        return plain(record, where)

    monkeypatch.setattr(supervised_finetuning, "parse_conversation", noted)
    changes = {"packing": False, "per_device_train_batch_size": 1, "validation_file_dir": None, "save_steps": 32}
    out = stage("supervised_finetuning", *words("sft", max_steps=32, **changes))
    (out / "run.json").unlink()
    looked_at = 40 + 32  # the first thousand for the summary, a window to show one
    assert len(read) == looked_at + 32
    read.clear()
    stage("supervised_finetuning", *words("sft", max_steps=34, **changes), "--resume_from_checkpoint", "True")
    assert len(read) == looked_at + 8  # the window that is left of the pass, and nothing of the 32 before
    assert len({*read[looked_at:]}) == 8


def test_rows_accumulated_are_rows_of_one_batch(stage, words):
    changes = {"lora_dropout": 0, "optim": "sgd", "learning_rate": 0.5}
    one = adapter_weights(
        stage("supervised_finetuning", *words("sft", "one", per_device_train_batch_size=2, **changes))
    )
    flags = words("sft", "two", per_device_train_batch_size=1, gradient_accumulation_steps=2, **changes)
    for name, value in adapter_weights(stage("supervised_finetuning", *flags)).items():
        torch.testing.assert_close(value, one[name], rtol=1e-4, atol=1e-5)


def test_bad_records_are_left_out_counted_and_written(stage, words, capsys):
    flags = words("sft")
    path = flags[flags.index("--train_file_dir") + 1]
    lines = path.read_text().splitlines()
    lines[20] = '{"conversations": []}'
    path.write_text("\n".join(lines))
    with pytest.raises(SystemExit) as ended:
        stage("supervised_finetuning", *flags)
    assert ended.value.code == 1
    assert "sft.jsonl:21" in capsys.readouterr().err
    out = stage("supervised_finetuning", *flags, "--on_bad_record", "skip", "--overwrite_output_dir")
    account = manifest(out)["data"]["train"]
    written = [json.loads(entry)["where"] for entry in (out / "rejected.jsonl").read_text().splitlines()]
    assert set(written) == {"sft.jsonl:21"}
    assert len(written) == sum(account["left_out"].values()) >= 1
    assert account["read"] == account["kept"] + len(written)


def test_sources_of_any_form_are_mixed_by_weight_and_the_mixture_is_in_the_manifest(stage, words, tmp_path):
    records = [line("sft", number) for number in range(30)]
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "one.jsonl.gz").write_bytes(
        gzip.compress("".join(json.dumps(record) + "\n" for record in records[:15]).encode())
    )
    (tmp_path / "a" / "two.json").write_text(json.dumps(records[15:]))
    (tmp_path / "b.csv").write_text("instruction,output\nwhat about rest,rest well\nand water,drink it\n")
    given = f"{tmp_path / 'a'},{tmp_path / 'b.csv'}"
    changes = {"train_file_dir": given, "data_weights": "0.8,0.2", "packing": False, "max_steps": 40}
    made = manifest(stage("supervised_finetuning", *words("sft", **changes)))["data"]["train"]
    first, second = made["sources"]
    assert (first["weight"], second["weight"]) == (0.8, 0.2)
    assert first["kept"] + second["kept"] == made["kept"] == 40 * 8
    assert 0.14 < second["share"] < 0.26
    assert second["share"] == pytest.approx(second["kept"] / 320, abs=1e-4)
    assert second["passes"] > first["passes"] >= 8  # two records, of which each of the 8 lanes gets its share in turn
    assert len(first["files"]) == 2


def test_limits_of_mixtures_that_a_stream_does_not_keep_are_named(stage, words, tmp_path, capsys):
    for name in ("a", "b"):
        (tmp_path / f"{name}.jsonl").write_text(json.dumps(line("sft", 1)) + "\n")
    given = f"{tmp_path / 'a.jsonl'},{tmp_path / 'b.jsonl'}"
    with pytest.raises(SystemExit):
        stage("supervised_finetuning", *words("sft", train_file_dir=given, data_weights="1,1", max_train_samples=1))
    assert "give each source its max_samples in a .yaml list" in capsys.readouterr().err
    sources = tmp_path / "sources.yaml"
    sources.write_text(f"- path: {tmp_path / 'a.jsonl'}\n  max_samples: 1\n- path: {tmp_path / 'b.jsonl'}\n")
    with pytest.raises(SystemExit):
        stage("supervised_finetuning", *words("sft", train_file_dir=sources))
    assert "max_samples of sources without a weight" in capsys.readouterr().err


def test_only_so_many_records_are_read_pass_after_pass(stage, words):
    out = stage("supervised_finetuning", *words("sft", max_train_samples=5, packing=False, max_steps=5))
    account = manifest(out)["data"]["train"]
    assert account["kept"] == 40
    assert account["passes"] >= 8  # of the five, each of the eight lanes gets one in most passes


def test_a_dry_run_of_a_stream_writes_nothing(stage, words, capsys):
    out = stage("supervised_finetuning", *words("sft"), "--dry_run")
    assert not out.exists()
    assert "dry run: 6 steps, about" in capsys.readouterr().err


def test_a_long_text_is_read_in_pieces(stage, words, tmp_path):
    folder = tmp_path / "texts"
    folder.mkdir()
    (folder / "long.txt").write_text("drink water and rest\n\nwhen you have a fever\n\n" * 4000)
    out = stage("pretraining", *words("pt", train_file_dir=folder, max_steps=2, validation_file_dir=None))
    assert manifest(out)["data"]["train"]["kept"] >= 1
    assert manifest(out)["status"] == "finished"


@pytest.mark.distributed
@pytest.mark.timeout(900)
@pytest.mark.parametrize("workers", [0, 2])
def test_two_processes_train_on_what_one_with_twice_the_batch_does(stage, words, tmp_path, workers):
    changes = {"lora_dropout": 0, "optim": "sgd", "learning_rate": 0.5, "dataloader_num_workers": workers}
    one = stage("supervised_finetuning", *words("sft", "one", per_device_train_batch_size=2, **changes))
    run(
        torchrun("supervised_finetuning", *words("sft", "two", per_device_train_batch_size=1, save_steps=3, **changes))
    )
    two = tmp_path / "two"
    expected = adapter_weights(one)
    for name, value in adapter_weights(two).items():
        torch.testing.assert_close(value, expected[name], rtol=1e-4, atol=1e-5)
    assert manifest(two)["data"]["train"] == manifest(one)["data"]["train"]
    states = [json.loads((two / "checkpoint-6" / f"stream-{rank}.json").read_text()) for rank in (0, 1)]
    assert [state["rows_taken"] for state in states] == [12, 12]
    assert not set(states[0]["lanes"]) & set(states[1]["lanes"])
    # killed while it wrote its last checkpoint
    (two / "checkpoint-6" / "whole.json").unlink()
    for name in ("run.json", "adapter_model.safetensors", "adapter_config.json"):
        (two / name).unlink()
    words_again = words("sft", "two", per_device_train_batch_size=1, save_steps=3, **changes)
    run(torchrun("supervised_finetuning", *words_again, "--resume_from_checkpoint", "True"))
    for name, value in adapter_weights(two).items():
        torch.testing.assert_close(value, expected[name], rtol=1e-4, atol=1e-5)


@pytest.mark.distributed
@pytest.mark.timeout(300)
@pytest.mark.parametrize("streaming", [True, False])
def test_a_termination_signal_to_all_processes_saves_and_stops(words, tmp_path, streaming):
    flags = {"dataloader_num_workers": 2, "per_device_train_batch_size": 1, "max_steps": 4000, "save_steps": 5}
    if not streaming:  # many rows, because workers are made anew for each epoch
        flags |= {
            "streaming": None,
            "shuffle_buffer": None,
            "packing": False,
            "train_file_dir": tmp_path / "many.jsonl",
        }
        (tmp_path / "many.jsonl").write_text("".join(json.dumps(line("sft", n)) + "\n" for n in range(4000)))
    flags = words("sft", **flags)
    command = python("supervised_finetuning", *flags)
    process = subprocess.Popen(command, cwd=ROOT, env=environment(), stderr=subprocess.DEVNULL, start_new_session=True)
    deadline = time.time() + 200
    while not (tmp_path / "out" / "checkpoint-5" / "whole.json").exists():
        assert process.poll() is None and time.time() < deadline
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGTERM)
    assert process.wait(timeout=60) == 143
    made = manifest(tmp_path / "out")
    assert made["status"] == "stopped"
    assert made["data"]["train"]["kept"] > 0
    last = max((tmp_path / "out").glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))
    assert ("stream-0.json" in json.loads((last / "whole.json").read_text())) == streaming


# ── memory ───────────────────────────────────────────────────────────────────────────────────────────────────────────

MEMORY = """
import resource, sys
from itertools import islice
sys.path.insert(0, {root!r})
from tests.data.streaming.test_dataset import encode, parse, recipe
from stagewise.data.streaming.shards import Lane
from pathlib import Path

one = recipe(Path({path!r}), buffer=2000, capacity=4096)
begun = None
for row in Lane(one, 0):
    if begun is None:
        begun = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    if row.state.taken[0].passes:
        break
read = row.state.accounts[0].read
print(read, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - begun)
"""


@pytest.mark.timeout(300)
def test_memory_does_not_grow_with_the_file(tmp_path):
    grown = {}
    for name, count in (("small", 5_000), ("large", 50_000)):
        path = write(tmp_path / f"{name}.jsonl", range(count), text=lambda number: "word " * 190 + str(number))
        code = MEMORY.format(root=str(ROOT), path=str(path))
        done = subprocess.run([sys.executable, "-c", code], env=environment(), capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-3000:]
        read, grown[name] = map(int, done.stdout.split())
        assert read == count
    assert (tmp_path / "large.jsonl").stat().st_size > 45_000_000
    assert grown["large"] < grown["small"] + 8 * 1024, grown  # KiB
