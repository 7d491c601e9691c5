"""config.json: its family, its code, and what cannot be read."""

import json

import pytest
from test_model_source import arguments
from transformers import AutoConfig

from stagewise.model_config import check_model_type, load_config
from stagewise.model_source import ModelError


def test_an_unknown_architecture_is_named(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "neverheard"}))
    with pytest.raises(ModelError, match=r"does not know this architecture.*neverheard"):
        load_config(arguments(tmp_path))


def test_remote_code_is_off_unless_asked(tmp_path):
    entries = {"model_type": "own", "auto_map": {"AutoConfig": "configuration.Own"}}
    (tmp_path / "config.json").write_text(json.dumps(entries))
    (tmp_path / "configuration.py").write_text("raise SystemExit('the code ran')")
    with pytest.raises(ModelError, match="--trust_remote_code True"):
        load_config(arguments(tmp_path))


@pytest.mark.parametrize("trusted", [False, True])
def test_families_whose_code_no_longer_runs_are_named(tmp_path, trusted):
    """Trusting the code would not help: it imports what transformers 5 has dropped."""
    entries = {"model_type": "chatglm", "auto_map": {"AutoConfig": "configuration.Own"}}
    (tmp_path / "config.json").write_text(json.dumps(entries))
    (tmp_path / "configuration.py").write_text("from transformers import ThisNameIsGone")
    with pytest.raises(ModelError, match="a chatglm model, whose own Python code") as error:
        load_config(arguments(tmp_path, trust_remote_code=trusted))
    assert "--trust_remote_code" not in str(error.value).partition("(")[0]


@pytest.mark.parametrize(
    ("asked", "found", "fits"),
    [
        ("auto", "bloom", True),
        ("bloom", "bloom", True),
        ("llama", "llama", True),
        ("LLaMA", "llama", True),
        ("qwen", "qwen3", True),
        ("yi", "llama", True),
        ("chatglm", "glm4", True),
        ("bloom", "llama", False),
        ("qwen3", "qwen2", False),
    ],
)
def test_model_type_is_checked_against_the_config(asked, found, fits):
    config = AutoConfig.for_model(found)
    if fits:
        check_model_type(arguments("m", model_type=asked), config)
    else:
        with pytest.raises(ModelError, match=f"--model_type {asked}: .* says '{found}'"):
            check_model_type(arguments("m", model_type=asked), config)
