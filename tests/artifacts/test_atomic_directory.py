"""A directory that is replaced: whatever ends the process, and whenever, what was there or what is new is there."""

import errno
import os
import shutil
import signal
import socket
from pathlib import Path

import pytest
from loguru import logger

from stagewise.artifacts import atomic_directory as module
from stagewise.artifacts.atomic_directory import atomic_directory, check_place, clean_up
from stagewise.errors import DirectoryError


def content(folder: Path) -> str | None:
    """What the directory says it is; None where it is not there, or not whole."""
    path = folder / "part" / "text"
    return path.read_text() if path.is_file() and (folder / "last").is_file() else None


def make(folder: Path, text: str) -> Path:
    (folder / "part").mkdir(parents=True)
    (folder / "part" / "text").write_text(text)
    (folder / "last").touch()
    return folder


def replace(place: Path, text: str, overwrite: bool = True, **options) -> None:
    check_place(place, overwrite, {})
    with atomic_directory(place, overwrite, **options) as folder:
        make(folder, text)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def killed(work, step: int) -> bool:
    """Runs `work` in a process that kills itself in place of its `step`th change to a directory (from 0)."""
    pid = os.fork()
    if pid == 0:
        calls = iter(range(100))

        def broken(change):
            def changed(*args, **kwargs):
                if next(calls) == step:
                    os.kill(os.getpid(), signal.SIGKILL)
                return change(*args, **kwargs)

            return changed

        os.replace, os.unlink, os.rmdir = broken(os.replace), broken(os.unlink), broken(os.rmdir)
        os.link, os.chmod = broken(os.link), broken(os.chmod)
        try:
            work()
        finally:
            os._exit(0)
    return os.WIFSIGNALED(os.waitpid(pid, 0)[1])


@pytest.mark.parametrize("step", range(12))
def test_a_kill_between_any_two_steps_loses_nothing(step, tmp_path):
    place = make(tmp_path / "out", "earlier")
    ended = killed(lambda: replace(place, "new"), step)
    # two files made readable, three renames, then the earlier directory goes: two files, two folders
    assert ended is (step < 9)
    found = content(place)
    at_side = content(tmp_path / ".out.replaced")
    assert (found, at_side) == [("earlier", None), (None, "earlier"), ("new", "earlier"), ("new", None)][
        0 if step < 3 else min(step - 2, 3)
    ]
    if (found, at_side) == ("new", "earlier"):
        with pytest.raises(DirectoryError, match=r"\.out\.replaced stood there before a run that was killed"):
            replace(place, "third")
        assert (content(place), content(tmp_path / ".out.replaced")) == ("new", "earlier")
        shutil.rmtree(tmp_path / ".out.replaced")
    else:
        check_place(place, True, {})
        assert content(place) == ("earlier" if step < 4 else "new")
    replace(place, "third")
    assert content(place) == "third"
    left = names(tmp_path)
    assert left == ["out"]


@pytest.mark.parametrize("step", range(2))
def test_a_rename_that_fails_leaves_both(step, tmp_path, monkeypatch):
    place, calls, real = make(tmp_path / "out", "earlier"), iter(range(9)), os.replace

    def fails(*args):
        if next(calls) == step:
            raise OSError(16, "Device or resource busy")
        real(*args)

    monkeypatch.setattr(os, "replace", fails)
    with pytest.raises(DirectoryError, match=r"busy\)\. What is new is whole in .*/\.out\.writing-.*-\d+") as error:
        replace(place, "new")
    assert content(place) == "earlier"
    assert content(Path(str(error.value).split("whole in ")[1].split(":")[0])) == "new"
    assert len(names(tmp_path)) == 2


def test_an_interrupt_between_the_renames_puts_the_earlier_one_back(tmp_path, monkeypatch):
    place, calls, real = make(tmp_path / "out", "earlier"), iter(range(9)), os.replace

    def interrupted(*args):
        if next(calls) == 1:
            raise KeyboardInterrupt
        real(*args)

    monkeypatch.setattr(os, "replace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        replace(place, "new")
    assert content(place) == "earlier"


def test_an_error_in_the_block_leaves_nothing_of_it(tmp_path):
    place = make(tmp_path / "out", "earlier")
    with pytest.raises(ZeroDivisionError), atomic_directory(place, True) as folder:
        make(folder, "new")
        raise ZeroDivisionError
    assert names(tmp_path) == ["out"] and content(place) == "earlier"


def test_what_another_run_has_put_there_meanwhile_is_not_replaced(tmp_path):
    place = tmp_path / "out"
    check_place(place, False, {})
    with pytest.raises(DirectoryError, match="not empty"), atomic_directory(place, False) as folder:
        make(folder, "new")
        make(place, "of another run")
    assert content(place) == "of another run"


def test_an_empty_directory_and_one_behind_a_link_are_filled(tmp_path):
    (tmp_path / "empty").mkdir()
    replace(tmp_path / "empty", "new", overwrite=False)
    assert content(tmp_path / "empty") == "new"
    (tmp_path / "link").symlink_to(make(tmp_path / "real", "earlier"))
    replace(tmp_path / "link", "new")
    assert (tmp_path / "link").is_symlink() and content(tmp_path / "real") == "new"
    assert names(tmp_path) == ["empty", "link", "real"]


def test_what_is_not_replaced_comes_along(tmp_path):
    place = make(tmp_path / "out", "earlier")
    (place / "mine").mkdir()
    (place / "mine" / "a.txt").write_text("mine")
    (place / "notes.txt").write_text("notes")
    (place / "notes.txt").chmod(0o600)
    (place / "old-2").touch()
    replace(place, "new", replaces=("part", "last", "old-*"))
    assert names(place) == ["last", "mine", "notes.txt", "part"] and content(place) == "new"
    assert (place / "mine" / "a.txt").read_text() == "mine"
    assert (place / "notes.txt").stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize("step", range(8))
def test_a_kill_while_other_files_are_brought_along_loses_none_of_them(step, tmp_path):
    place = make(tmp_path / "out", "earlier")
    (place / "notes.txt").write_text("notes")
    killed(lambda: replace(place, "new", replaces=("part", "last")), step)
    folders = [place] if place.exists() else [tmp_path / ".out.replaced"]
    assert content(folders[0]) and (folders[0] / "notes.txt").read_text() == "notes"


def test_files_are_as_readable_as_any_and_folders_can_be_entered(tmp_path):
    with atomic_directory(tmp_path / "out", False) as folder:
        make(folder, "new")
        (folder / "last").chmod(0o600)
    (tmp_path / "any").touch()
    (tmp_path / "folder").mkdir()
    modes = {path.name: path.stat().st_mode for path in [*tmp_path.iterdir(), *(tmp_path / "out").iterdir()]}
    assert modes["last"] == modes["any"] and modes["part"] == modes["out"] == modes["folder"]


def test_places_that_are_refused(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    full = make(tmp_path / "full", "mine")
    with pytest.raises(DirectoryError, match="file is a file: give a directory"):
        check_place(tmp_path / "file", True, {})
    with pytest.raises(DirectoryError, match="not empty: add --overwrite_output_dir"):
        check_place(full, False, {})
    with pytest.raises(DirectoryError, match="holds --text_dir"):
        check_place(full, True, {"other": None, "text_dir": full / "part"})
    with pytest.raises(DirectoryError, match="cannot be created beside it: Not a directory"):
        replace(tmp_path / "file" / "out", "new")
    monkeypatch.setattr(module.os.path, "ismount", lambda path: True)
    with pytest.raises(DirectoryError, match="a mount point, which cannot be replaced: give a folder in it"):
        check_place(full, True, {})


def test_a_directory_that_another_run_may_be_writing_is_named_and_left(tmp_path):
    lines: list[str] = []
    sink = logger.add(lambda message: lines.append(message.record["message"]))
    elsewhere = make(tmp_path / ".out.writing-elsewhere-1", "other")
    with atomic_directory(tmp_path / "out", True) as mine:
        clean_up(tmp_path / "out")
        assert mine.is_dir()
        make(mine, "new")
    logger.remove(sink)
    assert len(lines) == 2
    for path in (mine, elsewhere):
        assert any(line.startswith(f"{path}: another run is writing it now") for line in lines)
    assert (content(elsewhere), content(tmp_path / "out")) == ("other", "new")


@pytest.mark.parametrize("locks", [True, False])
def test_what_a_killed_run_had_begun_to_write_is_removed_by_the_next(tmp_path, monkeypatch, locks):
    def no_locks(*_):
        raise OSError(errno.EBADF, "Bad file descriptor")

    if not locks:  # as on NFS, where the number of the process decides
        monkeypatch.setattr(module.fcntl, "flock", no_locks)
    pid = os.fork()
    if pid == 0:
        with atomic_directory(tmp_path / "out", True) as folder:
            make(folder, "half")
            os.kill(os.getpid(), signal.SIGKILL)
    os.waitpid(pid, 0)
    (left,) = names(tmp_path)
    assert left == f".out.writing-{socket.gethostname()}-{pid}"
    replace(tmp_path / "out", "new")
    assert names(tmp_path) == ["out"] and content(tmp_path / "out") == "new"


def test_without_locks_a_living_writer_is_known_by_its_number(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "fcntl", None)
    living = make(tmp_path / f".out.writing-{socket.gethostname()}-{os.getppid()}", "other")
    clean_up(tmp_path / "out")
    assert content(living) == "other"
