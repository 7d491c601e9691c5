"""The GGUF export, with a stand-in for llama.cpp's script; tests/docs/test_serving.py runs the real one."""

import json
import shutil
import tarfile

import pytest
from gguf import GGUFReader

from tools import export_gguf
from tools.export_gguf import SCRIPT, ExportError, end_of, export, main

# Writes what llama.cpp's script writes of a tokenizer; the end token is the tokenizer's, as there.
STAND_IN = """
import sys
from gguf import GGUFWriter
from transformers import AutoTokenizer
model, output, outtype = sys.argv[1], sys.argv[3], sys.argv[5]
tokenizer = AutoTokenizer.from_pretrained(model)
writer = GGUFWriter(output, "llama")
writer.add_string("test.outtype", outtype)
writer.add_token_list(tokenizer.convert_ids_to_tokens(range(len(tokenizer))))
writer.add_eos_token_id(tokenizer.eos_token_id)
writer.add_chat_template(TEMPLATE or tokenizer.chat_template)
writer.write_header_to_file(); writer.write_kv_data_to_file(); writer.write_tensors_to_file(); writer.close()
"""
TEMPLATE = "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '<pad>' }}{% endfor %}"


@pytest.fixture
def converter(tmp_path):
    """Factory: a folder with a script in llama.cpp's place."""

    def make(text=STAND_IN, template=None):
        folder = tmp_path / "converter"
        folder.mkdir(exist_ok=True)
        (folder / SCRIPT).write_text(f"TEMPLATE = {template!r}\n{text}", encoding="utf-8")
        return folder

    return make


@pytest.fixture
def model(tiny_checkpoint, tiny_tokenizer):
    """A tiny model whose answers end at <pad> (id 0), not at the tokenizer's end token </s> (id 2)."""
    folder = tiny_checkpoint("llama", tokenizer=tiny_tokenizer(chat_template=TEMPLATE))
    config = {"eos_token_id": [0, 2], "pad_token_id": 0}
    (folder / "generation_config.json").write_text(json.dumps(config), encoding="utf-8")
    return folder


def value(path, key):
    return GGUFReader(path).get_field(key).contents()


def test_the_file_ends_answers_where_the_model_does(model, converter, tmp_path, capsys):
    output = tmp_path / "made" / "model.gguf"
    export(model, output, "q8_0", converter(), overwrite=False)
    assert value(output, "tokenizer.ggml.eos_token_id") == 0
    assert value(output, "tokenizer.chat_template") == TEMPLATE
    assert value(output, "test.outtype") == "q8_0"
    assert "q8_0; answers end at '<pad>' (id 0)" in capsys.readouterr().err
    assert [path.name for path in output.parent.iterdir()] == ["model.gguf"]


def test_without_a_generation_config_the_tokenizers_end_token_counts(model, tiny_tokenizer):
    (model / "generation_config.json").unlink()
    assert end_of(model, tiny_tokenizer()) == 2
    with pytest.raises(ExportError, match="neither generation_config.json nor the tokenizer has an end"):
        end_of(model, tiny_tokenizer(eos=False))


def test_a_file_with_another_template_is_not_kept(model, converter, tmp_path):
    with pytest.raises(ExportError, match="differs from the model in: chat template"):
        export(model, tmp_path / "x.gguf", "f16", converter(template="{{ messages }}"), overwrite=False)
    assert not list(tmp_path.glob("*.gguf")) + list(tmp_path.glob(".*.gguf"))


def test_what_the_script_says_is_passed_on(model, converter, tmp_path):
    with pytest.raises(ExportError, match="cannot convert .*: NotImplementedError: BPE pre-tokenizer was not recogni"):
        script = "raise NotImplementedError('BPE pre-tokenizer was not recognized')"
        export(model, tmp_path / "x.gguf", "f16", converter(script), overwrite=False)


def test_refused_before_anything_is_converted(model, tiny_checkpoint, converter, tmp_path):
    output = tmp_path / "x.gguf"
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text("{}", encoding="utf-8")
    quantized = tiny_checkpoint("llama")
    config = json.loads((quantized / "config.json").read_text(encoding="utf-8"))
    (quantized / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": "x"}}))
    for folder, words in (
        (adapter, "an adapter; merge it first: python merge_peft_adapter.py --lora_model"),
        (tmp_path / "nothing", "expected a directory with config.json"),
        (tiny_checkpoint("llama", task="score"), "a reward model"),
        (quantized, "is quantized already"),
    ):
        with pytest.raises(ExportError, match=words):
            export(folder, output, "f16", converter("raise SystemExit(3)"), overwrite=False)
    output.write_bytes(b"mine")
    with pytest.raises(ExportError, match="is there already; add --overwrite"):
        export(model, output, "f16", converter(), overwrite=False)
    assert output.read_bytes() == b"mine"
    export(model, output, "f16", converter(), overwrite=True)
    assert output.read_bytes()[:4] == b"GGUF"


def test_sources_that_are_not_the_tested_ones_are_not_opened(monkeypatch, tmp_path):
    def brought(command, **kwargs):
        (tmp_path / "llama_cpp_python-0.3.36.tar.gz").write_bytes(b"something else")
        return export_gguf.subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(export_gguf.subprocess, "run", brought)
    with pytest.raises(ExportError, match="expected 832db069.*it was not opened"):
        export_gguf.download(tmp_path)


def test_errors_are_one_line(tmp_path, capsys):
    with pytest.raises(SystemExit) as ended:
        main(["--model_name_or_path", str(tmp_path), "--output_file", str(tmp_path / "x.gguf")])
    said = capsys.readouterr().err
    assert ended.value.code == 1 and said.startswith(f"error: --model_name_or_path {tmp_path}: expected a directory")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "give --model_name_or_path and --output_file, or --fetch_converter alone"),
        (["--fetch_converter", "--output_file", "x"], "or --fetch_converter alone"),
        (["--output_file", "x"], "--model_name_or_path and --output_file belong together"),
    ],
)
def test_flags_that_do_not_fit_together_are_refused(words, said, capsys):
    with pytest.raises(SystemExit) as ended:
        main(words)
    assert ended.value.code == 2
    assert said in capsys.readouterr().err


def test_a_fetch_that_was_killed_is_done_again(tmp_path, monkeypatch):
    """The script comes last; what is there already is written over."""
    sources, folder = tmp_path / "sources.tar.gz", tmp_path / "converter"
    with tarfile.open(sources, "w:gz") as archive:
        for name in (SCRIPT, "conversion/base.py", "gguf-py/gguf/lazy.py", "conversion/llama.py"):
            (tmp_path / "file").write_text(name)
            archive.add(tmp_path / "file", f"package-1/vendor/llama.cpp/{name}")
    monkeypatch.setattr(export_gguf, "download", lambda temporary: sources)
    calls, copy = iter(range(9)), shutil.copy2

    def killed(*args, **kwargs):
        if next(calls) == 2:
            raise KeyboardInterrupt
        return copy(*args, **kwargs)

    with monkeypatch.context() as patched:
        patched.setattr(shutil.copytree, "__defaults__", (False, None, killed, False, False))
        with pytest.raises(KeyboardInterrupt):
            export_gguf.fetch_converter(folder)
    assert folder.is_dir() and not (folder / SCRIPT).exists()
    assert export_gguf.fetch_converter(folder) == folder / SCRIPT
    found = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    assert found == {SCRIPT, "conversion/base.py", "conversion/llama.py", "gguf-py/gguf/lazy.py"}


def test_the_script_alone_is_fetched(converter, capsys):
    main(["--fetch_converter", "--converter_dir", str(converter())])
    assert SCRIPT in capsys.readouterr().err
