"""One process works, the others wait for it; whatever becomes of it, nobody waits for good."""

import errno
import fcntl
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from loguru import logger

from stagewise.artifacts import lock_file
from stagewise.artifacts.lock_file import LockResult, exclusive_lock
from stagewise.errors import ArgumentError, CutError, RecordError

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def said():
    lines = []
    sink = logger.add(lambda message: lines.append(message.record["message"]), level="INFO")
    yield lines
    logger.remove(sink)


class Other(threading.Thread):
    """Someone who comes for a lock while another holds it: `found` is its turn, or the error that it got."""

    def __init__(self, path, said):
        super().__init__(daemon=True)
        self.path, self.found = path, None
        before = len(said)
        self.start()
        while len(said) == before:
            time.sleep(0.01)

    def run(self):
        try:
            with exclusive_lock(self.path, "the thing") as whose:
                self.found = whose
        except ValueError as error:
            self.found = error

    def end(self):
        self.join(10)
        assert not self.is_alive(), "still waiting"
        return self.found


def test_one_works_and_the_others_wait(tmp_path, said):
    path = tmp_path / "a.lock"
    with exclusive_lock(path, "the thing") as mine:
        others = [Other(path, said) for _ in range(3)]
        assert (mine, [other.found for other in others]) == (LockResult.ACQUIRED, [None] * 3)
    assert [other.end() for other in others] == [LockResult.RELEASED] * 3
    assert said == ["waiting for another process, which makes the thing"] * 3
    assert list(tmp_path.iterdir()) == []
    with exclusive_lock(path, "the thing") as whose:
        assert whose is LockResult.ACQUIRED


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (RecordError("a.jsonl:3", "no answer", "no turn is from the assistant: “…”"), RecordError),
        (CutError("a.jsonl:9", "cut", 12), RecordError),
        (ArgumentError("--train_file_dir: no record is left"), ArgumentError),
    ],
)
def test_an_error_in_the_data_ends_those_who_wait_and_no_later_one(error, kind, tmp_path, said):
    path = tmp_path / "a.lock"
    with pytest.raises(type(error)), exclusive_lock(path, "the thing"):
        others = [Other(path, said) for _ in range(2)]
        raise error
    for other in others:
        found = other.end()
        assert (type(found), str(found)) == (kind, str(error))
        if kind is RecordError:
            assert (found.where, found.reason, found.message) == (error.where, error.reason, error.message)
    with exclusive_lock(path, "the thing") as whose:
        assert whose is LockResult.ACQUIRED


def test_another_error_is_left_to_each(tmp_path, said):
    path = tmp_path / "a.lock"
    with pytest.raises(OSError, match="disk"), exclusive_lock(path, "the thing"):
        other = Other(path, said)
        raise OSError("the disk is full")
    assert other.end() is LockResult.RELEASED


def test_a_process_forked_meanwhile_keeps_nobody_waiting(tmp_path):
    """One that encodes may end later than the error that ends the turn."""
    path = tmp_path / "a.lock"
    with exclusive_lock(path, "the thing"):
        file = os.open(path, os.O_RDWR)
        child = os.fork()
        if not child:
            time.sleep(60)
            os._exit(0)
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        os.close(file)


HOLDER = """
import sys, time
from pathlib import Path
from stagewise.artifacts.lock_file import exclusive_lock

with exclusive_lock(Path(sys.argv[1]), ""):
    print(flush=True)
    time.sleep(600)
"""


def test_a_killed_holder_keeps_nobody_waiting(tmp_path, said):
    path = tmp_path / "a.lock"
    holder = subprocess.Popen([sys.executable, "-c", HOLDER, str(path)], cwd=ROOT, stdout=subprocess.PIPE)
    holder.stdout.readline()
    path.write_text('["a:1", "no answer", "said before it was killed"]')
    other = Other(path, said)
    holder.kill()
    holder.wait()
    assert other.end() is LockResult.ACQUIRED
    assert not path.exists()


def test_where_nothing_can_be_locked_nobody_waits(tmp_path, said, monkeypatch):
    def refuse(file, how):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    path = tmp_path / "a.lock"
    why = "every process makes the thing for itself"
    with exclusive_lock(tmp_path / "nowhere" / "a.lock", "the thing") as whose:
        assert whose is LockResult.UNSUPPORTED
    monkeypatch.setattr(fcntl, "flock", refuse)
    with exclusive_lock(path, "the thing") as whose:
        assert whose is LockResult.UNSUPPORTED
    monkeypatch.setattr(lock_file, "fcntl", None)
    with exclusive_lock(path, "the thing") as whose:
        assert whose is LockResult.UNSUPPORTED
    assert said == [
        f"{tmp_path}/nowhere/a.lock can't be locked (No such file or directory): {why}",
        f"{path} can't be locked (No locks available): {why}",
        f"{path} can't be locked (this system has no flock): {why}",
    ]
