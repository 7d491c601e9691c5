"""tools.quantize_model: what it writes loads as it is, its figures are true, and what cannot be done is refused."""

import importlib.util
import json
import math

import pytest
import torch

from tools.quantize_model import main

TEXT = "the user asks and the assistant answers: drink water and rest when you have a fever. " * 20
needs_bnb = pytest.mark.skipif(not importlib.util.find_spec("bitsandbytes"), reason="bitsandbytes is not installed")


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text(TEXT, encoding="utf-8")
    return path


def run(*words):
    main([str(word) for word in words])


def refused(capsys, *words) -> str:
    with pytest.raises(SystemExit) as stop:
        run(*words)
    assert stop.value.code == 2
    return capsys.readouterr().err


def mean_loss(model, tokenizer, length: int) -> float:
    """Token by token in float64, each window from its own beginning."""
    ids = tokenizer(TEXT, add_special_tokens=False).input_ids
    losses = []
    for start in range(0, len(ids), length):
        window = ids[start : start + length]
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([window])).logits[0].double()
        for place in range(1, len(window)):
            losses.append(-float(logits[place - 1].log_softmax(0)[window[place]]))
    return sum(losses) / len(losses)


@pytest.mark.parametrize("bits", [8, 4])
def test_cpm_writes_what_its_loader_reads(bits, tiny_checkpoint, tiny_tokenizer, text, tmp_path, capsys):
    from transformers import AutoModelForCausalLM

    from stagewise.models.quantization.row_wise import load_row_quantized

    base, out = tiny_checkpoint("llama"), tmp_path / "out"
    words = ["--model_name_or_path", base, "--output_dir", out, "--text_file", text, "--max_length", 48]
    run(*words, "--quantization", "cpm", "--quantization_bit", bits)
    printed = capsys.readouterr().out
    account = json.loads((out / "quantization.json").read_text())
    tokenizer = tiny_tokenizer()
    for model, found in (
        (AutoModelForCausalLM.from_pretrained(base), account["before"]),
        (load_row_quantized(out), account["after"]),
    ):
        wanted = mean_loss(model.eval(), tokenizer, 48)
        assert found["loss"] == pytest.approx(wanted, rel=1e-4)
        assert found["perplexity"] == pytest.approx(math.exp(wanted), rel=1e-3)
        assert f"{found['perplexity']:.3f}" in printed
    # two layers of q 32x32, k and v 16x32, o 32x32, gate, up and down 64x32: 2 * 9216 weights and 2 * 256 rows
    others = 320 * 32 * 2 + 5 * 32
    assert account["before"]["bytes"] == 4 * (18432 + others)
    assert account["after"]["bytes"] == 18432 * bits // 8 + 4 * (512 + others)
    assert (out / "tokenizer.json").is_file()
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


@needs_bnb
@pytest.mark.parametrize(("bits", "kind"), [(4, "Linear4bit"), (8, "Linear8bitLt")])
def test_bnb_loads_as_it_is(bits, kind, tiny_checkpoint, text, tmp_path):
    from transformers import AutoModelForCausalLM

    base, out = tiny_checkpoint("llama", hidden_size=64, intermediate_size=128, dtype=torch.bfloat16), tmp_path / "out"
    run("--model_name_or_path", base, "--output_dir", out, "--text_file", text, "--quantization_bit", bits)
    model = AutoModelForCausalLM.from_pretrained(out, device_map={"": "cpu"})
    layers = [name for name, module in model.named_modules() if type(module).__name__ == kind]
    assert len(layers) == 14
    assert type(model.lm_head).__name__ == "Linear"
    account = json.loads((out / "quantization.json").read_text())
    assert account["after"]["bytes"] < account["before"]["bytes"]
    assert account["after"]["perplexity"] != account["before"]["perplexity"]
    # a random model is as bad after as before; a broken one would be worse by far
    assert abs(account["after"]["loss"] - account["before"]["loss"]) < 0.2 * account["before"]["loss"]


def test_without_a_text_nothing_is_measured(tiny_checkpoint, tmp_path, capsys):
    base = tiny_checkpoint("llama")
    run("--model_name_or_path", base, "--output_dir", tmp_path / "out", "--quantization", "cpm")
    assert capsys.readouterr().out.count("not measured") == 2


def test_lineage_and_license_go_on(tiny_checkpoint, tmp_path):
    base = tiny_checkpoint("llama")
    (base / "run.json").write_text(json.dumps({"stage": "sft", "lineage": [{"stage": "sft", "base_model": "b"}]}))
    (base / "LICENSE.txt").write_text("MIT License\n\nCopyright")
    run("--model_name_or_path", base, "--output_dir", tmp_path / "out", "--quantization", "cpm")
    run_json = json.loads((tmp_path / "out" / "run.json").read_text())
    assert [step["stage"] for step in run_json["lineage"]] == ["sft", "quantize"]
    assert run_json["license"]["id"] == "mit"
    assert (tmp_path / "out" / "LICENSE.txt").read_text().startswith("MIT License")


def test_what_is_there_is_kept_unless_asked(tiny_checkpoint, tmp_path, capsys):
    base, out = tiny_checkpoint("llama"), tmp_path / "out"
    out.mkdir()
    (out / "notes.txt").write_text("mine")
    (out / "LICENSE").write_text("of another base")
    (out / "additional_chat_templates").mkdir()
    (out / "additional_chat_templates/tool_use.jinja").write_text("of another base")
    (out / "model-00009-of-00009.safetensors").write_text("old")
    words = ["--model_name_or_path", base, "--output_dir", out, "--quantization", "cpm"]
    assert "--overwrite_output_dir" in refused(capsys, *words)
    assert sorted(path.name for path in out.iterdir()) == [
        "LICENSE",
        "additional_chat_templates",
        "model-00009-of-00009.safetensors",
        "notes.txt",
    ]
    run(*words, "--overwrite_output_dir")
    names = {path.name for path in out.iterdir()}
    assert {"notes.txt", "model.safetensors", "config.json"} <= names
    assert not {"model-00009-of-00009.safetensors", "LICENSE", "additional_chat_templates"} & names


def test_an_earlier_model_stays_until_the_new_one_has_been_loaded(tiny_checkpoint, tmp_path, monkeypatch):
    base, out = tiny_checkpoint("llama"), tmp_path / "out"
    words = ["--model_name_or_path", base, "--output_dir", out, "--quantization", "cpm"]
    run(*words)
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    monkeypatch.setattr("tools.quantize_model.load_row_quantized", lambda *_, **__: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        run(*words, "--quantization_bit", 8, "--overwrite_output_dir")
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--quantization", "gptq"], "--quantization: expected one of bnb, cpm"),
        (["--quantization_bit", "3"], "--quantization_bit: expected 4 or 8, found 3"),
        (["--text_file", "no-such.txt"], "--text_file no-such.txt: no such file"),
        (["--torch_dtype", "int8"], "--torch_dtype: expected one of auto"),
        (["--max_length", "1"], "--max_length: expected at least 2"),
        (["--bits", "4"], "--bits: no such flag"),
    ],
)
def test_flags_are_refused_before_weights_load(words, message, tiny_checkpoint, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("tools.quantize_model.load_base", lambda args: pytest.fail("weights were read"))
    base = tiny_checkpoint("llama")
    error = refused(capsys, "--model_name_or_path", base, "--output_dir", tmp_path / "out", *words)
    assert message in error
    assert not (tmp_path / "out").exists()


def test_models_are_refused_before_weights_load(tiny_checkpoint, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("tools.quantize_model.load_base", lambda args: pytest.fail("weights were read"))
    out = ["--output_dir", tmp_path / "out"]
    reward = tiny_checkpoint("llama", task="score")
    assert "a reward model" in refused(capsys, "--model_name_or_path", reward, *out)
    base = tiny_checkpoint("llama")
    assert "holds --model_name_or_path" in refused(capsys, "--model_name_or_path", base, "--output_dir", base)
    odd = tiny_checkpoint("llama", intermediate_size=63)
    assert "63 inputs" in refused(capsys, "--model_name_or_path", odd, *out, "--quantization", "cpm")
    empty = tmp_path / "empty.txt"
    empty.write_text("")
    assert "at least two tokens" in refused(capsys, "--model_name_or_path", base, *out, "--text_file", empty)
    config = json.loads((base / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    (base / "config.json").write_text(json.dumps(config))
    assert "is quantized already" in refused(capsys, "--model_name_or_path", base, *out)
