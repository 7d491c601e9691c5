"""Several sources: what the flags name, the mixture that is drawn, and what is said of it."""

import json
from collections import Counter

import pytest

from stagewise.data.examples import Example, ExampleWriter
from stagewise.data.mixture import count_shares, find_sources, load_sources, mixture
from stagewise.errors import ArgumentError
from stagewise.formats.parsers import parse_text
from stagewise.formats.readers import TEXT_FILES
from tests.encoders import row_of

FLAG = "--train_file_dir"


@pytest.fixture
def folders(tmp_path, monkeypatch):
    """Folders a, b and c with 10, 6 and 40 texts "a 1" …; the working directory holds them."""
    for name, count in (("a", 10), ("b", 6), ("c", 40)):
        (tmp_path / name).mkdir()
        lines = [json.dumps({"text": f"{name} {n}"}) + "\n" for n in range(count)]
        (tmp_path / name / "x.jsonl").write_text("".join(lines))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def found(given, weights=None):
    return find_sources(given, weights, TEXT_FILES, FLAG)


def load(sources, limit=-1, seed=0, **options):
    parse = lambda record, where: (parse_text(record, where), where)  # noqa: E731
    records, account = load_sources(sources, parse, limit, seed, **options)
    return list(records), account


# --- what the flags name ---------------------------------------------------------------------------------------------


def test_one_path_several_paths_and_weights(folders):
    (one,) = found("a")
    assert (one.name, one.path, one.weight, one.max_samples) == ("a", "a", None, -1)
    assert [path.name for path in one.files] == ["x.jsonl"]
    assert [(source.path, source.weight) for source in found("a, b/x.jsonl")] == [("a", None), ("b/x.jsonl", None)]
    assert [source.weight for source in found("a,b", "7,3")] == [0.7, 0.3]
    assert [source.name for source in found("a/x.jsonl,b/x.jsonl,c")] == ["a/x.jsonl", "b/x.jsonl", "c"]


def test_a_path_with_a_comma_that_is_there_is_one_path(folders):
    (folders / "a,b").mkdir()
    (folders / "a,b" / "y.txt").write_text("x")
    (one,) = found("a,b")
    assert [path.name for path in one.files] == ["y.txt"]


def test_a_yaml_list(folders):
    (folders / "s.yaml").write_text(
        "- path: a\n  weight: 3\n  name: first\n- {path: b/x.jsonl, weight: 1, max_samples: 4}\n"
    )
    first, second = found("s.yaml")
    assert (first.name, first.path, first.weight, first.max_samples) == ("first", "a", 0.75, -1)
    assert (second.name, second.weight, second.max_samples) == ("x.jsonl", 0.25, 4)


@pytest.mark.parametrize(
    ("given", "weights", "says"),
    [
        ("a", "1", "--data_weights: weighs several sources, --train_file_dir names one"),
        ("a,b", "1", "--data_weights: 1 weight for the 2 sources"),
        ("a,b", "1,2,3", "--data_weights: 3 weights for the 2 sources"),
        ("a,b", "0.5,x", "--data_weights: expected numbers joined by commas, found '0.5,x'"),
        ("a,b", "1,-1", "--data_weights: weights must be above 0, found [1.0, -1.0]; leave out what"),
        ("a,b", "0,1", "--data_weights: weights must be above 0, found [0.0, 1.0]; leave out what"),
        ("a,b", "nan,1", "--data_weights: weights must be above 0"),
        ("a,no", None, "--train_file_dir: there is no folder or file 'no'"),
        ("a,a/x.jsonl", None, "--train_file_dir: a/x.jsonl belongs to both a and a/x.jsonl; name it once"),
    ],
)
def test_sources_that_do_not_fit_are_refused_by_flag(folders, given, weights, says):
    with pytest.raises(ArgumentError) as caught:
        found(given, weights)
    assert says in str(caught.value)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("path: a", "expected a list of sources"),
        ("[]", "expected a list of sources"),
        ("- a", "source 1: expected path"),
        ("- {path: a}\n- {path: b, wieght: 1}", "source 2: unknown key 'wieght'; known: path, weight, name, max_sam"),
        ("- {path: a, weight: 1}\n- {path: b}", "some sources have a weight and some have none"),
        ("- {path: a, weight: 1}", "a single source needs no weight"),
        ("- {path: a, weight: x}", "weight must be a number, found 'x'"),
        ("- {path: a, max_samples: 0}", "max_samples must be -1 (all) or at least 1, found 0"),
        ("- {path: a, name: 3}", "name must be text, found 3"),
        ("- {path: a, name: m}\n- {path: b, name: m}", "source 2: another source has the name 'm' already"),
        ("- {path: [", "not valid YAML"),
    ],
)
def test_a_broken_list_is_refused_by_what_is_wrong(folders, content, says):
    (folders / "s.yaml").write_text(content)
    with pytest.raises(ArgumentError) as caught:
        found("s.yaml")
    assert says in str(caught.value) and "s.yaml" in str(caught.value)


def test_weights_stand_in_the_list_or_in_the_flag(folders):
    (folders / "s.yaml").write_text("- {path: a, weight: 1}\n- {path: b, weight: 1}")
    with pytest.raises(ArgumentError, match="--data_weights with --train_file_dir s.yaml"):
        found("s.yaml", "1,1")


# --- the mixture -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("counts", "weights", "taken"),
    [
        ((10, 6), (0.5, 0.5), (6, 6)),
        ((10, 6), (0.7, 0.3), (10, 4)),
        ((10, 6, 40), (0.2, 0.2, 0.6), (6, 6, 18)),
        ((3, 1000), (0.001, 0.999), (1, 1000)),
        ((7, 7), (1 / 3, 2 / 3), (3, 7)),
    ],
)
def test_the_mixture_is_the_largest_of_its_proportions_without_repetition(counts, weights, taken):
    drawn = mixture(counts, weights, 1)
    assert len(set(drawn)) == len(drawn)
    assert tuple(Counter(source for source, _ in drawn)[n] for n in range(len(counts))) == taken
    for source in range(len(counts)):  # each in the order of its files
        own = [index for number, index in drawn if number == source]
        assert own == sorted(own) and all(0 <= index < counts[source] for index in own)


def test_every_beginning_of_the_mixture_has_its_proportions():
    drawn = mixture((600, 900), (0.75, 0.25), 1)
    for size in (4, 40, 100, 401, len(drawn)):
        assert abs(sum(source == 0 for source, _ in drawn[:size]) - 0.75 * size) <= 1


def test_the_mixture_follows_from_its_seed():
    draws = [mixture((100, 10), (0.5, 0.5), seed) for seed in (1, 1, 2)]
    assert draws[0] == draws[1] != draws[2]
    assert {index for source, index in draws[0] if source == 0} != {index for s, index in draws[2] if s == 0}


def test_a_source_of_which_nothing_would_be_taken_is_an_error():
    with pytest.raises(ArgumentError, match="source 2 would give none at the weight 0.001; raise it"):
        mixture((10, 1000), (0.999, 0.001), 1)


# --- loading ---------------------------------------------------------------------------------------------------------


def texts(records):
    return Counter(text.split()[0] for text, _ in records)


def test_without_weights_all_records_of_all_sources_are_taken_in_order(folders):
    records, account = load(found("b,a"))
    assert [where for _, where in records] == [*(f"b/x.jsonl:{n}" for n in range(1, 7)),
                                               *(f"a/x.jsonl:{n}" for n in range(1, 11))]  # fmt: skip
    assert (account.read, account.kept, account.left_out) == (16, 16, {})
    assert [(entry["name"], entry["read"], entry["kept"]) for entry in account.sources] == [("b", 6, 6), ("a", 10, 10)]
    records, account = load(found("b,a"), limit=8)
    assert (texts(records), account.read, account.kept) == ({"b": 6, "a": 2}, 8, 8)
    records, account = load(found("b"))
    assert (len(records), account.sources, records[0][1]) == (6, [], "x.jsonl:1")


def test_what_is_beyond_the_mixture_is_counted(folders):
    records, account = load(found("a,b", "0.5,0.5"), seed=3)
    assert texts(records) == {"a": 6, "b": 6}
    assert (account.read, account.kept, account.left_out) == (16, 12, {"beyond --data_weights": 4})
    assert [text for text, _ in records] != [text for text, _ in load(found("a,b", "1,1"), seed=4)[0]]
    assert records == load(found("a,b", "1,1"), seed=3)[0]
    records, account = load(found("a,b", "0.5,0.5"), limit=4)
    assert texts(records) == {"a": 2, "b": 2}
    assert account.left_out == {"beyond --data_weights": 4, "beyond --max_train_samples": 8}
    assert account.read == account.kept + sum(account.left_out.values())


def test_max_samples_of_a_source(folders):
    (folders / "s.yaml").write_text("- {path: c, max_samples: 3}\n- {path: a}")
    records, account = load(found("s.yaml"))
    assert (texts(records), account.read) == ({"c": 3, "a": 10}, 13)
    assert (texts(load(found("s.yaml"), limit=2)[0]), texts(load(found("s.yaml"), limit=5)[0])) == (
        {"c": 2},
        {"c": 3, "a": 2},
    )


def test_duplicates_across_sources_and_texts_again(folders):
    (folders / "b" / "x.jsonl").write_text('{"text": "a 3"}\n {"text": "new"}\n')
    records, account = load(found("a,b"), seen=set())
    assert (len(records), account.left_out) == (11, {"duplicate": 1})
    assert account.again("b/x.jsonl:2") == ' {"text": "new"}'
    assert account.again("a/x.jsonl:1") == '{"text": "a 0"}'


def test_an_empty_source_of_a_mixture_is_an_error(folders):
    (folders / "b" / "x.jsonl").write_text("\n")
    with pytest.raises(ArgumentError, match=r"no record is left of the 0 read from .*b/x\.jsonl: the files are empty"):
        load(found("a,b", "1,1"))
    assert len(load(found("a,b"))[0]) == 10
    with pytest.raises(ArgumentError, match="no record is left"):
        load(found("b"))


def test_records_are_parsed_as_they_are_asked_for(folders):
    parsed = []

    def parse(record, where):
        parsed.append(where)
        return where

    records, account = load_sources(found("a,b"), parse, -1, 0)
    one = iter(records)
    assert (next(one), parsed, account.read) == ("a/x.jsonl:1", ["a/x.jsonl:1"], 0)
    assert (len(list(one)), account.read, account.kept) == (15, 16, 16)
    drawn, _ = load_sources(found("a,b", "1,1"), parse, 6, 0)
    del parsed[:]
    assert list(drawn) == list(drawn) == parsed[:6]  # read again each time, and only what was drawn is parsed
    assert len(parsed) == 12


def test_shares_are_of_what_was_encoded(folders):
    records, account = load(found("a,b", "0.6,0.4"))
    writer = ExampleWriter()
    for number, (text, where) in enumerate(records):
        if number:  # the first is left out while it is encoded
            for _ in range(2 if text.startswith("b") else 1):  # a record may give several examples
                ids = list(range(5 if text.startswith("b") else 20))
                writer.add("Example", [row_of(Example(ids, ids, where))])
    count_shares(account.sources, writer.finish())
    first, second = account.sources
    assert [(s["weight"], s["read"], s["kept"]) for s in (first, second)] == [(0.6, 10, 10), (0.4, 6, 6)]
    assert (first["used"], second["used"]) == (8, 6)
    assert (first["tokens"], second["tokens"]) == (8 * 20, 6 * 2 * 5)
    assert (first["share"], second["share"]) == (0.5714, 0.4286)
    assert (first["token_share"], second["token_share"]) == (0.7273, 0.2727)
