"""A file of flags means what the same words on the command line mean, for every flag of every stage."""

import dataclasses
import enum
import json
from pathlib import Path

import pytest

from stagewise.config.arguments import RunArguments
from stagewise.config.command_line import parse
from stagewise.config.flags import flags_of
from stagewise.config.paths import PATHS
from stagewise.config.stages import BY_SCRIPT
from stagewise.config.transformers_flags import training_arguments
from stagewise.errors import ArgumentError
from tools.stage_scripts import early_flags

# Values as they stand in YAML, and the words for them in a shell.
SCALARS = {
    "true": ["true"],
    "True": ["True"],
    "FALSE": ["FALSE"],
    "yes": ["yes"],
    "no": ["no"],
    "on": ["on"],
    "off": ["off"],
    "1": ["1"],
    "0": ["0"],
    "-1": ["-1"],
    "7": ["7"],
    "1e-4": ["1e-4"],
    "1.0e-4": ["1.0e-4"],
    ".5": [".5"],
    "1.10": ["1.10"],
    "1_000": ["1_000"],
    "0x10": ["0x10"],
    "1:30": ["1:30"],
    "2026-01-02": ["2026-01-02"],
    ".inf": [".inf"],
    "nan": ["nan"],
    '"7"': ["7"],
    "'1e-4'": ["1e-4"],
    '"true"': ["true"],
    '"null"': ["null"],
    '""': [""],
    "none": ["none"],
    "a word": ["a word"],
    "a: 1": None,  # no value in YAML
    "'--x'": ["--x"],
    "'-x'": ["-x"],
    "steps": ["steps"],
    "[a, b]": ["a,b"],
    "[1, 2]": ["1,2"],
    "'{\"min_lr\": 1e-6}'": ['{"min_lr": 1e-6}'],
    "{min_lr: 1e-6, deep: {on: true}}": ['{"min_lr": 1e-06, "deep": {"on": true}}'],
}
LISTS = {"[a, b]": ["a", "b"], "[1, 2]": ["1", "2"]}


def kinds_of(script: str) -> list[type]:
    run = dataclasses.make_dataclass("StageArguments", [], bases=(RunArguments, training_arguments()))
    return [run, *early_flags(script)]


def outcome(flag, words):
    """What a flag makes of words, or what it says against them."""
    try:
        return flag.value(words)
    except ArgumentError as error:
        return f"error: {error}"


def in_file(kinds, path: Path, text: str):
    """(flag, value) that a file of one flag gives, through the whole parser; None where it gives none."""
    path.write_text(text, encoding="utf-8")
    found = []
    try:
        parse(kinds, [str(path)], before=lambda given: found.extend(given) or required(kinds))
    except ArgumentError as error:
        return f"error: {error}"
    return found[0] if found else None


def required(kinds):
    return [(flag.name, ["x"]) for flag in flags_of(kinds).values() if flag.required]


@pytest.mark.parametrize("script", sorted(BY_SCRIPT))
def test_a_value_in_yaml_is_the_same_words(script, tmp_path):
    kinds = kinds_of(script)
    flags = flags_of(kinds)
    by_shape = {(f.kind, f.choices, f.several, f.or_text, f.name in PATHS): f for f in flags.values()}
    for flag in by_shape.values():
        for text, words in SCALARS.items():
            if words is None:
                continue
            wanted = LISTS.get(text, words) if flag.several else words
            got = in_file(kinds, tmp_path / "run.yaml", f"{flag.name}: {text}\n")
            if text.startswith("{") and flag.kind is not dict:
                assert got == f"error: {tmp_path}/run.yaml:1: {flag.name}: expected one value, found names with values"
                continue
            assert got == (flag.name, wanted), (flag.name, text)
            assert same(outcome(flag, got[1]), outcome(flag, wanted)), (flag.name, text)


def same(one, other) -> bool:
    return one == other or (one != one and other != other)


@pytest.mark.parametrize("script", sorted(BY_SCRIPT))
def test_every_flag_may_stand_in_a_file(script, tmp_path):
    """One value that fits, in YAML, in JSON, with dashes, and as words: equal dataclasses."""
    kinds = kinds_of(script)
    flags = {name: flag for name, flag in flags_of(kinds).items() if flag.kind is not dict}
    words = {name: fitting(flag) for name, flag in flags.items()}
    line = [word for name, values in words.items() for word in (f"--{name}", *values)]
    from_words = parse(kinds, line)
    yaml = tmp_path / "run.yaml"
    yaml.write_text("".join(f"{name.replace('_', '-')}: {in_yaml(v)}\n" for name, v in words.items()))
    assert parse(kinds, [str(yaml)]) == from_words
    as_json = tmp_path / "run.json"
    as_json.write_text(json.dumps({name: v if flags[name].several else v[0] for name, v in words.items()}))
    assert parse(kinds, [str(as_json)]) == from_words


def fitting(flag) -> list[str]:
    if flag.choices:
        return [flag.choices[-1]]
    if issubclass(flag.kind, enum.Enum):
        return [next(iter(flag.kind)).value]
    # 0.25 fits what must be a share, and is a number
    return {bool: ["false"], int: ["3"], float: ["0.25"]}.get(flag.kind, ["word"])


def in_yaml(words: list[str]) -> str:
    return words[0] if len(words) == 1 else f"[{', '.join(words)}]"


def test_nothing_behind_the_colon_is_the_flag_alone_and_null_leaves_it_out(tmp_path):
    kinds, path = kinds_of("supervised_finetuning"), tmp_path / "run.yaml"
    assert in_file(kinds, path, "bf16:\n") == ("bf16", [])
    for null in ("null", "~", "Null"):
        assert in_file(kinds, path, f"bf16: {null}\n") is None
    path.write_text("model_name_or_path: m\noutput_dir: o\nmax_steps:\n")
    with pytest.raises(ArgumentError, match="^--max_steps: a value is missing$"):
        parse(kinds, [str(path)])


@pytest.mark.parametrize("text", ["seed: 1\nbf16: true\nseed: 2\n", "train_file_dir: a\ntrain-file-dir: b\n"])
def test_a_flag_that_a_file_has_twice_is_an_error(text, tmp_path):
    line = text.count("\n")
    got = in_file(kinds_of("supervised_finetuning"), tmp_path / "run.yaml", text)
    name = text.split(":")[0]
    assert got == f"error: {tmp_path}/run.yaml:{line}: {name} is given twice, first in line 1; leave one"


def test_a_flag_that_a_json_file_has_twice_is_an_error(tmp_path):
    got = in_file(kinds_of("supervised_finetuning"), tmp_path / "run.json", '{"seed": 1, "seed": 2}')
    assert got == f"error: {tmp_path}/run.json: seed is given twice; leave one"


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("", "expected flags and their values, found nothing"),
        ("word", "expected flags and their values, found 'word'"),
        ("- a\n", "expected flags and their values, found a list"),
        ("target_modules: [[a], b]\n", ":1: target_modules: expected a list of single values"),
        ("target_modules: [a, null]\n", ":1: target_modules: expected a list of single values"),
        ("a: [\n", "not valid yaml"),
    ],
)
def test_what_is_no_file_of_flags_is_named(text, wanted, tmp_path):
    got = in_file(kinds_of("supervised_finetuning"), tmp_path / "run.yaml", text)
    assert got.startswith(f"error: {tmp_path}/run.yaml")
    assert wanted in got


@pytest.mark.parametrize("spelled", ["1.10", "1e3", "-0", "7.50", "12345678901234567890.5", "1E+2"])
def test_a_number_of_a_json_file_keeps_its_spelling(spelled, tmp_path):
    got = in_file(kinds_of("supervised_finetuning"), tmp_path / "run.json", f'{{"run_name": {spelled}}}')
    assert got == ("run_name", [spelled])


def test_numbers_in_a_dictionary_of_a_json_file_are_numbers(tmp_path):
    text = '{"lr_scheduler_kwargs": {"min_lr": 1e-6, "steps": [1, 2.5]}}'
    got = in_file(kinds_of("supervised_finetuning"), tmp_path / "run.json", text)
    assert got == ("lr_scheduler_kwargs", ['{"min_lr": 1e-06, "steps": [1, 2.5]}'])
