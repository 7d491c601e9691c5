"""What is only for looking at does not end a run."""

import json
import os
import sys

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from stagewise.artifacts.eval_samples import read_samples
from stagewise.reports.console import Progress
from stagewise.reports.only_shown import errors_logged
from stagewise.reports.tensorboard import Board, SummaryWriter

ODD = "\u2028 \u2029 \x85 \x0b \x0c \x1c \x1e \r # \x1b[31m \x9b2J \u202e"


@pytest.fixture
def train(stage, tmp_path, tiny_checkpoint):
    """Runs PT with its evaluations on tiny records; returns the output directory."""

    def run(*words, name=b"a.jsonl", text="drink water"):
        for split in ("train", "validation"):
            (tmp_path / split).mkdir()
            lines = [json.dumps({"text": f"{text} and rest {number}"}, ensure_ascii=False) for number in range(4)]
            path = os.path.join(os.fsencode(tmp_path / split), name)
            with open(path, "w", encoding="utf-8") as file:
                file.write("\n".join(lines) + "\n")
        flags = {
            "model_name_or_path": tiny_checkpoint("llama"),
            "train_file_dir": tmp_path / "train",
            "validation_file_dir": tmp_path / "validation",
            "output_dir": tmp_path / "out",
            "block_size": 64,
            "packing": False,
            "per_device_train_batch_size": 1,
            "max_steps": 2,
            "eval_strategy": "steps",
            "eval_steps": 1,
        }
        stage("pretraining", *(word for flag, value in flags.items() for word in (f"--{flag}", value)), *words)
        return tmp_path / "out"

    return run


def texts(folder):
    events = EventAccumulator(str(folder / "logs")).Reload()
    return {
        tag: events.Tensors(tag)[-1].tensor_proto.string_val[0].decode()
        for tag in events.Tags()["tensors"]
        if tag.startswith("samples/")
    }


def finished(folder):
    manifest = json.loads((folder / "run.json").read_text(encoding="utf-8"))
    return manifest["status"] == "finished" and manifest["steps"] == 2


def test_records_with_every_kind_of_line_end_are_shown(train):
    folder = train("--save_eval_records", text=ODD)
    assert finished(folder)
    samples = read_samples(folder, 2)
    assert len(samples) == 3 and all(ODD[:10] in sample["prompt"] for sample in samples)
    shown = texts(folder)
    assert len(shown) == 3 and "    <U+2028> <U+2029> <U+0085> ␋ ␌ ␜ ␞ ␍ \n" in shown["samples/1/text_summary"]
    assert ODD[:10] in (folder / "report.html").read_text(encoding="utf-8")


def test_a_file_name_that_is_not_utf8(train):
    folder = train("--save_eval_records", name=b"caf\xe9.jsonl")
    assert finished(folder)
    name = os.fsdecode(b"caf\xe9.jsonl")
    assert {sample["where"] for sample in read_samples(folder, 2)} <= {f"{name}:{n}" for n in range(1, 5)}
    assert "caf<U+DCE9>.jsonl:" in texts(folder)["samples/1/text_summary"]
    assert "caf\\udce9.jsonl" in (folder / "report.html").read_text(encoding="utf-8")


def test_what_cannot_be_shown_is_logged(train, monkeypatch, capsys):
    """TensorBoard's files, the line of progress, the samples and the page fail, each in its own way."""

    def fails(*args, **kwargs):
        raise OSError(5, "no such terminal")

    monkeypatch.setattr(SummaryWriter, "add_scalar", fails)
    monkeypatch.setattr(Progress, "_show", fails)
    monkeypatch.setattr("stagewise.training.sample_generations.write_json_lines", fails)
    monkeypatch.setattr("stagewise.training.run.write_page", fails)
    folder = train()
    assert finished(folder) and not (folder / "eval_samples").exists()
    said = capsys.readouterr().err
    for what in ("TensorBoard", "progress", "--eval_samples"):
        assert f"{what}: OSError: [Errno 5] no such terminal; training continues without it" in said
    assert "report.html" in said


def test_a_board_whose_files_cannot_be_made(tmp_path):
    (tmp_path / "logs").write_text("")

    class State:
        is_world_process_zero, global_step = True, 1

    class Arguments:
        logging_dir = str(tmp_path / "logs")

    Board({}).on_log(Arguments(), State(), None, logs={"loss": 1.0})


def test_ctrl_c_is_no_error_of_what_is_shown():
    with pytest.raises(KeyboardInterrupt), errors_logged("samples"):
        raise KeyboardInterrupt


def test_a_logging_dir_that_is_a_file_is_refused_at_once(train, tmp_path, capsys):
    (tmp_path / "board").write_text("")
    with pytest.raises(SystemExit, match="2"):
        train("--logging_dir", tmp_path / "board")
    assert f"error: --logging_dir {tmp_path / 'board'}: is a file; give a folder" in capsys.readouterr().err


assert sys.getfilesystemencoding() == "utf-8"  # the names above
