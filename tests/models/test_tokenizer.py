"""The tokenizer that a model is loaded with."""

import pytest

from stagewise.errors import ModelError
from stagewise.models.tokenizer import load_tokenizer
from tests.conftest import build_tiny_tokenizer
from tests.models.test_hub import arguments


@pytest.mark.parametrize(
    ("own", "pads"),
    [({"pad": True}, "<pad>"), ({"pad": False, "unk": True}, "<unk>"), ({"pad": False}, "</s>")],
)
def test_the_pad_token_is_the_own_one_or_a_stated_choice(own, pads, tmp_path):
    build_tiny_tokenizer(**own).save_pretrained(tmp_path)
    assert load_tokenizer(arguments(tmp_path)).pad_token == pads


def test_a_tokenizer_that_names_no_token_to_pad_with_is_refused(tmp_path):
    build_tiny_tokenizer(pad=False, eos=False).save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="no pad, unknown or end token"):
        load_tokenizer(arguments(tmp_path))


def test_a_missing_tokenizer_is_named(tmp_path):
    with pytest.raises(ModelError, match=f"--tokenizer_name_or_path {tmp_path}"):
        load_tokenizer(arguments("x", tokenizer_name_or_path=str(tmp_path)))


def test_an_adapter_may_give_the_tokenizer(tmp_path, tiny_checkpoint):
    (tmp_path / "adapter_config.json").write_text("{}")
    build_tiny_tokenizer().save_pretrained(tmp_path)
    assert len(load_tokenizer(arguments(tiny_checkpoint("llama"), tokenizer_name_or_path=str(tmp_path)))) == 300
