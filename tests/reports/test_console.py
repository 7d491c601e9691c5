"""The line on a terminal, and plain lines elsewhere."""

import fcntl
import io
import os
import pty
import re
import select
import struct
import sys
import termios
import time
from types import SimpleNamespace

import pytest
from loguru import logger

from stagewise.reports import console
from stagewise.reports.console import Progress, clock_text, figures, line_of
from tests.launching import ROOT, environment, python


@pytest.mark.parametrize(("seconds", "expected"), [(4.9, "0:04"), (65, "1:05"), (3 * 3600 + 62, "3:01:02")])
def test_durations(seconds, expected):
    assert clock_text(seconds) == expected


def test_a_training_log_in_a_few_words():
    logs = {"loss": 1.23456, "learning_rate": 0.000087, "tokens_per_second": 2310.4, "memory_gib": 5.21, "epoch": 0.5}
    assert figures(logs) == ["loss 1.235", "lr 8.7e-05", "2,310 tokens/s", "5.2 GiB"]


def test_the_bar_takes_the_room_that_the_words_leave():
    words = ["loss 1.235", "lr 8.7e-05", "0:04 left"]
    assert line_of("train", 5, 10, words, 60) == "train 5/10 ━━━━━━╌╌╌╌╌╌╌  loss 1.235  lr 8.7e-05  0:04 left"
    assert line_of("train", 5, 10, words, 50) == "train 5/10  loss 1.235  lr 8.7e-05  0:04 left"


def test_on_a_narrow_terminal_time_left_is_the_last_to_go():
    words = ["loss 1.235", "lr 8.7e-05", "0:04 left"]
    assert line_of("train", 5, 10, words, 38) == "train 5/10  loss 1.235  0:04 left"
    assert line_of("train", 5, 10, words, 23) == "train 5/10  0:04 left"
    assert line_of("train", 5, 10, words, 12) == "train 5/10"


class Terminal(io.StringIO):
    def isatty(self):
        return True


def told(monkeypatch, stream, quiet):
    """What a run of four steps with one evaluation writes to `stream`."""
    monkeypatch.setattr(sys, "stderr", stream)
    monkeypatch.setattr(console.shutil, "get_terminal_size", lambda: os.terminal_size((90, 24)))
    logger.remove()  # what a run of another test in this process has put there
    logger.add(console.write_log_line, format="{message}", colorize=False)
    try:
        progress = Progress(quiet)
        state = SimpleNamespace(is_world_process_zero=True, global_step=0, max_steps=4)
        progress.on_train_begin(None, state, None)
        progress.on_epoch_begin(None, state, None)
        for step in range(1, 5):
            state.global_step = step
            progress.on_step_end(None, state, None)
            progress.on_log(None, state, None, logs={"loss": 3.0 / step, "learning_rate": 0.1, "epoch": 1.0})
        progress.on_prediction_step(None, state, None, eval_dataloader=[1, 2])
        progress.on_log(None, state, None, logs={"eval_loss": 0.5, "eval_steps_per_second": 9.0})
        progress.on_evaluate(None, state, None)
        progress.on_train_end(None, state, None)
    finally:
        logger.remove()
        logger.add(lambda line: sys.stderr.write(line))
    return stream.getvalue()


def test_a_terminal_has_one_line_that_is_written_over(monkeypatch):
    written = told(monkeypatch, Terminal(), quiet=False)
    assert "train 3/4 ━" in written and "loss 0.750  lr 1.0e-01" in written and "evaluate 1/2" in written
    lines = [line.rpartition("\r")[2].strip() for line in written.split("\n")]
    assert [line.split(" ")[0] for line in lines if line] == ["step", "train"], "the evaluation's, and the last"
    assert "step 4/4 eval_loss 0.5\n" in written


@pytest.mark.parametrize(("stream", "quiet"), [(io.StringIO(), False), (Terminal(), True)])
def test_elsewhere_and_with_quiet_there_are_plain_lines(monkeypatch, stream, quiet):
    written = told(monkeypatch, stream, quiet)
    assert "\r" not in written
    lines = written.splitlines()
    assert [re.sub(r" \(.*\)", "", line) for line in lines] == [
        "step 1/4 loss 3 learning_rate 0.1",
        "step 2/4 loss 1.5 learning_rate 0.1",
        "step 3/4 loss 1 learning_rate 0.1",
        "step 4/4 loss 0.75 learning_rate 0.1",
        "step 4/4 eval_loss 0.5",
    ]
    assert " left) " in lines[0] and " left) " not in lines[3]


def test_the_time_left_counts_the_making_of_the_first_batch(monkeypatch):
    """20 s of a rollout before two steps of 1 s each: a second rollout is still to come."""
    clock = [100.0]
    monkeypatch.setattr(console.time, "time", lambda: clock[0])
    progress = Progress(quiet=True)
    state = SimpleNamespace(is_world_process_zero=True, global_step=0, max_steps=4)
    progress.on_train_begin(None, state, None)
    clock[0] += 50  # --eval_on_start
    for name in ("on_epoch_begin", "on_step_begin", "on_step_begin"):
        getattr(progress, name)(None, state, None)
        clock[0] += 20 if name == "on_epoch_begin" else 1
        state.global_step += name == "on_step_begin"
    assert progress._left(state) == "0:22 left"


def test_other_processes_say_nothing(monkeypatch):
    stream = Terminal()
    monkeypatch.setattr(sys, "stderr", stream)
    progress = Progress()
    state = SimpleNamespace(is_world_process_zero=False, global_step=1, max_steps=4)
    progress.on_train_begin(None, state, None)
    progress.on_log(None, state, None, logs={"loss": 1.0})
    assert stream.getvalue() == ""


def resized(handle, columns):
    fcntl.ioctl(handle, termios.TIOCSWINSZ, struct.pack("HHHH", 40, columns, 0, 0))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="terminals are opened by forking")
def test_the_line_is_as_wide_as_the_terminal_is_now(monkeypatch):
    """Also where the terminal is not stdout's: `… > out.txt`."""
    reader, writer = pty.openpty()
    with os.fdopen(reader, "rb", buffering=0) as outside, os.fdopen(writer, "w") as inside:
        monkeypatch.setattr(sys, "stderr", inside)
        progress = Progress()
        progress.logs = {"loss": 1.0, "learning_rate": 0.1}
        state = SimpleNamespace(is_world_process_zero=True, global_step=1, max_steps=4)
        # a bar of 14, then of the most that it may have, then none
        for columns, expected in ((50, 48), (100, 64), (40, 33)):
            resized(outside, columns)
            progress.on_step_end(None, state, None)
            inside.flush()
            written = b""
            while select.select([outside], [], [], 0.3)[0]:
                written += os.read(outside.fileno(), 1 << 16)
            line = written.decode().rpartition("\r")[2].rstrip()
            assert line.endswith("  loss 1.000  lr 1.0e-01") and len(line) == expected, (columns, line)
        progress.close()


def in_terminal(command, columns=100, timeout=240):
    """Runs a command in a terminal of its own; what it wrote there."""
    pid, handle = pty.fork()
    if pid == 0:
        os.chdir(ROOT)
        os.execvpe(command[0], command, environment())
    resized(handle, columns)
    written, until = b"", time.monotonic() + timeout
    while time.monotonic() < until:
        if not select.select([handle], [], [], 1)[0]:
            continue
        try:
            piece = os.read(handle, 1 << 16)
        except OSError:  # Linux says so when the other side is closed
            piece = b""
        if not piece:
            break
        written += piece
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0, written.decode()[-3000:]
    return written.decode()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="terminals are opened by forking")
def test_a_whole_run_in_a_terminal(tiny_checkpoint, tmp_path):
    words = ["--model_name_or_path", tiny_checkpoint("llama"), "--output_dir", tmp_path / "out", "--max_steps", 6]
    words += ["--train_file_dir", "data/finetune/train", "--validation_file_dir", "data/finetune/validation"]
    words += ["--max_train_samples", 12, "--max_eval_samples", 4, "--logging_steps", 2, "--report_to", "none"]
    written = in_terminal(python("supervised_finetuning", *words))
    lines = written.split("\r\n")
    shown = [re.sub(r"\x1b\[\w*", "", line.rpartition("\r")[2]).rstrip() for line in lines]
    (train,) = [line for line in shown if line.startswith("train 6/6")]
    assert re.search(r"━{5,}  loss \d\.\d{3}  lr \S+  [\d,]+ tokens/s  \d+\.\d GiB$", train), train
    assert len(train) < 100
    assert re.search(r"train 4/6 [━╌]+  loss .* GiB  \d:\d\d left", written)
    assert not any(re.search(r"step \d/6.* loss ", line) for line in shown), "training logs only update the line"
    assert any("eval_loss" in line for line in shown)
