"""The program that measures perplexity at several lengths, on a tiny model."""

import importlib.util
import math
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.conftest import build_tiny_tokenizer

TEXT = "drink water and rest when you have a fever, the user asks and the assistant answers\n"


@pytest.fixture(scope="module")
def program():
    path = Path(__file__).resolve().parents[2] / "benchmarks" / "long_context.py"
    spec = importlib.util.spec_from_file_location("long_context", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def words(tmp_path, tiny_checkpoint):
    (tmp_path / "text.txt").write_text("".join(f"{i} {TEXT}" for i in range(40)))
    model = tiny_checkpoint("llama", max_position_embeddings=64)
    given = ["--model", model, "--text", tmp_path / "text.txt", "--output_dir", tmp_path / "out", "--steps", "0"]
    return [str(word) for word in [*given, "--lengths", "64,128", "--windows", "2", "--torch_dtype", "float32"]], model


@torch.no_grad()
def test_the_table_holds_the_texts_perplexity(program, words, tmp_path, capsys):
    given, folder = words
    program.main(given)
    table = [line.strip("| ").split(" | ") for line in capsys.readouterr().out.splitlines() if line.startswith("| ")]
    assert [row[0] for row in table] == [
        "model",
        "as it is",
        *(f"{kind}, factor 2, no training" for kind in ("dynamic", "yarn", "linear")),
    ]
    model, ids = (
        AutoModelForCausalLM.from_pretrained(folder),
        build_tiny_tokenizer()((tmp_path / "text.txt").read_text()).input_ids[-256:],
    )
    for column, length in ((1, 64), (2, 128)):
        rows = [torch.tensor([ids[start : start + length]]) for start in range(0, 256, length)]
        losses = [model(row, labels=row).loss.item() for row in rows]
        assert float(table[1][column]) == pytest.approx(math.exp(sum(losses) / len(losses)), rel=1e-3)
    assert table[2][1] == table[1][1], "dynamic changes nothing within the own context"
    assert table[2][2] != table[1][2]
    assert table[4][1] != table[1][1]


def test_a_text_that_is_too_short_is_said(program, words, tmp_path):
    (tmp_path / "text.txt").write_text(TEXT)
    with pytest.raises(SystemExit, match="too few for windows of 128"):
        program.main(words[0])
