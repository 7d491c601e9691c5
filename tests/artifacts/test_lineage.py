"""Licenses: found where they are said, with their source, else unknown."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest

from stagewise.artifacts.lineage import (
    earlier_steps,
    find_license,
    finish_lineage_step,
    first_model,
    front_matter,
    start_lineage_step,
)

APACHE = """                                 Apache License
                           Version 2.0, January 2004
                        http://www.apache.org/licenses/
"""


@pytest.mark.parametrize(
    ("name", "text", "expected"),
    [
        ("LICENSE", APACHE, "apache-2.0"),
        ("LICENSE.txt", "MIT License\n\nCopyright (c) 2026", "mit"),
        ("LICENSE", "LLAMA 3.1 COMMUNITY LICENSE AGREEMENT\nLlama 3.1 Version", "llama3.1"),
        ("LICENSE", "LLAMA 2 COMMUNITY LICENSE AGREEMENT", "llama2"),
        ("LICENSE.md", "Terms of our own making", "other"),
    ],
)
def test_a_licenses_text_is_known_by_its_beginning(tmp_path, name, text, expected):
    (tmp_path / name).write_text(text)
    found = find_license(tmp_path, "base")
    assert found["id"] == expected and f"base/{name}" in found["source"]
    assert found.get("link") == (name if expected == "other" else None)


def test_the_card_says_it_before_the_file_does(tmp_path):
    (tmp_path / "LICENSE").write_text(APACHE)
    (tmp_path / "README.md").write_text("---\nlicense: other\nlicense_name: own\nlicense_link: LICENSE\n---\n# x\n")
    found = find_license(tmp_path, "base")
    source = "the front matter of base/README.md"
    assert found == {"id": "other", "source": source, "name": "own", "link": "LICENSE"}


def test_a_merged_models_run_says_it_first_with_its_first_source(tmp_path):
    (tmp_path / "run.json").write_text(json.dumps({"license": {"id": "mit", "source": "the card of first"}}))
    (tmp_path / "README.md").write_text("---\nlicense: gemma\n---\n")
    assert find_license(tmp_path) == {"id": "mit", "source": "the card of first"}


def test_what_was_unknown_may_have_been_written_into_the_card(tmp_path):
    unknown = {"id": "unknown", "source": "nothing was said"}
    (tmp_path / "run.json").write_text(json.dumps({"license": unknown}))
    (tmp_path / "README.md").write_text("---\nlicense: unknown\n---\n")
    assert find_license(tmp_path) == unknown
    (tmp_path / "README.md").write_text("---\nlicense: apache-2.0\n---\n")
    assert find_license(tmp_path)["id"] == "apache-2.0"


def test_unknown_says_where_nothing_was_found(tmp_path):
    found = find_license(tmp_path, "models/base")
    assert found["id"] == "unknown" and found["source"].startswith("models/base has no README.md")


@pytest.mark.parametrize("text", ["# no front matter", "---\nlicense: [\n---\n", "---\njust words\n---\n", ""])
def test_a_card_without_front_matter_says_nothing(tmp_path, text):
    (tmp_path / "README.md").write_text(text)
    assert front_matter(tmp_path / "README.md") == {}


def parts(**flags):
    return [SimpleNamespace(**flags)]


def test_a_step_begins_with_where_it_comes_from(tmp_path):
    assert start_lineage_step("sft", parts(model_name_or_path=str(tmp_path), model_revision="main")) == {
        "stage": "sft",
        "base_model": str(tmp_path),
    }
    assert start_lineage_step("sft", parts(model_name_or_path="org/model", model_revision="v2")) == {
        "stage": "sft",
        "base_model": "org/model",
        "from_hub": True,
        "revision": "v2",
    }


def write(folder: Path, **manifest) -> str:
    folder.mkdir()
    (folder / "run.json").write_text(json.dumps(manifest))
    return str(folder)


def test_an_adapter_that_is_gone_on_from_brings_its_lineage(tmp_path):
    base = write(tmp_path / "base", lineage=[{"stage": "pt"}])
    adapter = write(tmp_path / "adapter", lineage=[{"stage": "pt"}, {"stage": "sft"}])
    assert earlier_steps(parts(model_name_or_path=base)) == [{"stage": "pt"}]
    assert earlier_steps(parts(model_name_or_path=base, peft_path=adapter)) == [{"stage": "pt"}, {"stage": "sft"}]
    assert start_lineage_step("sft", parts(model_name_or_path=base, peft_path=adapter))["continued_adapter"] == adapter


def test_a_reward_model_comes_with_its_own_lineage(tmp_path):
    reward = write(tmp_path / "rm", lineage=[{"stage": "rm"}])
    step = start_lineage_step("ppo", parts(model_name_or_path=str(tmp_path), reward_model_name_or_path=reward))
    assert step["reward_model"] == {"path": reward, "lineage": [{"stage": "rm"}]}


def test_a_finished_step_holds_what_is_told_of_it_later():
    data = {
        "train": {"read": 10, "kept": 9, "left_out": {"no answer": 1}, "cut": 0, "files": ["a/b/c.jsonl"]},
        "summary": {"train": {}},
    }
    metrics = {
        "train": {"train_loss": 2.0, "train_runtime": 3.0},
        "eval": {"eval_loss": 1.0, "eval_runtime": 2.0, "eval_samples_per_second": 3.0, "epoch": 1.0},
    }
    manifest = {"lineage": [{"stage": "sft"}], "data": data, "metrics": metrics, "method": "lora", "steps": 4}
    assert finish_lineage_step(manifest, Path("out")) == {
        "stage": "sft",
        "output_dir": "out",
        "method": "lora",
        "steps": 4,
        "data": {"train": {"read": 10, "kept": 9, "left_out": {"no answer": 1}, "files": ["c.jsonl"]}},
        "metrics": {"eval": {"eval_loss": 1.0}, "train": {"train_loss": 2.0}},
    }


def test_the_first_model_is_the_first_steps():
    steps = [{"stage": "pt", "base_model": "org/model", "from_hub": True}, {"stage": "merge", "base_model": "x"}]
    assert first_model(steps) == ("org/model", True) and first_model([]) == (None, False)
