"""config.json: its family, its code, and what cannot be read."""

import json
from importlib.metadata import version

import pytest
from transformers import AutoConfig

from stagewise.errors import ModelError
from stagewise.models.config import check_model_type, load_config
from stagewise.models.tokenizer import load_tokenizer
from tests.models.test_hub import arguments


def test_an_unknown_architecture_is_named(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "neverheard"}))
    with pytest.raises(ModelError, match=r"does not know this architecture.*neverheard"):
        load_config(arguments(tmp_path))


def test_remote_code_is_off_unless_asked(tmp_path):
    entries = {"model_type": "own", "auto_map": {"AutoConfig": "configuration.Own"}}
    (tmp_path / "config.json").write_text(json.dumps(entries))
    (tmp_path / "configuration.py").write_text("raise SystemExit('the code ran')")
    with pytest.raises(ModelError, match="if you trust it, add --trust_remote_code True$"):
        load_config(arguments(tmp_path))


@pytest.mark.parametrize("trusted", [False, True])
@pytest.mark.parametrize(
    ("kind", "name"),
    [
        ("chatglm", "ChatGLM"),
        ("baichuan", "Baichuan"),
        ("qwen", "Qwen 1"),
        ("internlm", "InternLM 1"),
        ("internlm2", "InternLM 2"),
        ("moss", "MOSS"),
        ("xverse", "XVERSE"),
        ("aquila", "Aquila"),
        ("orion", "Orion"),
    ],
)
@pytest.mark.parametrize("load", [load_config, load_tokenizer])
def test_families_whose_code_no_longer_runs_are_refused_in_one_sentence(tmp_path, trusted, kind, name, load):
    """Trusting the code would not help: it imports what transformers 5 has dropped. None of it runs."""
    entries = {"model_type": kind, "auto_map": {"AutoConfig": "configuration.Own"}}
    (tmp_path / "config.json").write_text(json.dumps(entries))
    (tmp_path / "configuration.py").write_text("raise SystemExit('the code ran')")
    with pytest.raises(ModelError) as error:
        load(arguments(tmp_path, trust_remote_code=trusted))
    begin = (
        f"--model_name_or_path {tmp_path}: {name} models ship Python code that transformers {version('transformers')}"
    )
    assert str(error.value).startswith(f"{begin} cannot run; take ")
    assert "trust_remote_code" not in str(error.value)
    assert "\n" not in str(error.value)


def test_code_of_an_unknown_family_that_fails_is_said_to_be_the_models_own(tmp_path):
    entries = {"model_type": "own", "auto_map": {"AutoConfig": "configuration.Own"}}
    (tmp_path / "config.json").write_text(json.dumps(entries))
    (tmp_path / "configuration.py").write_text("from transformers import ThisNameIsGone")
    with pytest.raises(ModelError, match="its own Python code does not run with transformers .*; take a model that"):
        load_config(arguments(tmp_path, trust_remote_code=True))


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
