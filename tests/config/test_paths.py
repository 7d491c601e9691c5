"""Paths mean the same in every flag, on the command line and in files."""

import os
from pathlib import Path

import pytest

from stagewise.config.command_line import parse
from stagewise.config.flags import flags_of
from stagewise.config.paths import PATHS, expanded
from stagewise.config.stages import BY_SCRIPT
from stagewise.data.mixture import find_sources
from stagewise.errors import ArgumentError
from stagewise.evaluation.arguments import FLAGS as OF_EVALUATION
from stagewise.formats.readers import RECORD_FILES
from stagewise.web.server import FLAGS as OF_WEB
from tools.stage_scripts import early_flags

# Flags whose help speaks of files or folders, and whose value is none.
NO_PATHS = {"data_weights", "push_to_hub", "hub_model_id", "hub_strategy", "run_name", "streaming", "auth"}
NO_PATHS |= {"overwrite_output_dir", "overwrite_cache", "on_bad_record", "save_only_model", "overwrite_output_file"}


@pytest.fixture
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "user"))
    monkeypatch.setenv("DATA", str(tmp_path / "data"))
    monkeypatch.delenv("NOTSET", raising=False)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_home_and_variables_are_expanded(home):
    assert expanded("~/a", "--x") == f"{home}/user/a"
    assert expanded("$DATA/a", "--x") == f"{home}/data/a"
    assert expanded("${DATA}b/a", "--x") == f"{home}/datab/a"
    assert expanded("a~b/c", "--x") == "a~b/c"
    assert expanded("~/a, $DATA/b,c", "--x", several=True) == f"{home}/user/a,{home}/data/b,c"
    assert expanded('{"a": "$DATA"}', "--x") == '{"a": "$DATA"}'


def test_a_path_that_is_there_as_written_stays(home):
    (home / "$DATA").mkdir()
    assert expanded("$DATA", "--x") == "$DATA"


def test_what_cannot_be_expanded_is_an_error(home):
    with pytest.raises(ArgumentError, match=r"^--x \$NOTSET/a: the environment variable NOTSET is not set$"):
        expanded("$NOTSET/a", "--x")
    with pytest.raises(ArgumentError, match="^--x ~nobodyhere/a: there is no such home directory$"):
        expanded("~nobodyhere/a", "--x")


def every_flag():
    kinds = {kind for script in BY_SCRIPT for kind in early_flags(script)} | {*OF_EVALUATION, *OF_WEB}
    return [flag for kind in sorted(kinds, key=lambda kind: kind.__name__) for flag in flags_of([kind]).values()]


def test_every_flag_that_takes_a_path_expands_it(home):
    """Any flag whose name or help speaks of a file, a folder or a directory is a path, or is listed as none."""
    for flag in every_flag():
        speaks = any(word in f"{flag.name} {flag.help}".lower() for word in ("_file", "_dir", "_path", "folder"))
        assert (flag.name in PATHS) >= (speaks and flag.name not in NO_PATHS), flag.name
        if flag.name in PATHS:
            found = flag.value(["~/a/$DATA"])
            assert (found[0] if flag.several else found) == f"{home}/user/a/{home}/data", flag.name


def test_a_path_in_a_file_of_flags_and_in_a_list_of_sources_is_the_same(home):
    (home / "user").mkdir()
    (home / "user" / "sft.jsonl").write_text("{}\n")
    (home / "flags").mkdir()
    Path("flags/run.yaml").write_text("model_name_or_path: m\ntrain_file_dir: ~/sft.jsonl\n")
    data = parse(early_flags("reward_modeling"), ["flags/run.yaml"])[1]
    assert data.train_file_dir == f"{home}/user/sft.jsonl"
    Path("flags/sources.yaml").write_text("- path: ~/sft.jsonl\n- path: user\n")
    with pytest.raises(ArgumentError, match="belongs to both"):
        find_sources("flags/sources.yaml", None, RECORD_FILES, "--train_file_dir")
    Path("flags/sources.yaml").write_text("- path: $HOME/sft.jsonl\n")  # relative to where the program was started
    assert find_sources("flags/sources.yaml", None, RECORD_FILES, "--train_file_dir")[0].files == (
        Path(os.environ["HOME"], "sft.jsonl"),
    )
