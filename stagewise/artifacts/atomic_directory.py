"""A directory that appears as a whole or not at all, and replaces an earlier one without a moment when both could be
lost.

                      .NAME.writing-HOST-PID    NAME       .NAME.replaced    .NAME.removing-PID
    while it fills    new                       earlier
    1 rename          new                                  earlier
    2 rename                                    new        earlier
    3 rename                                    new                          earlier
    4 remove                                    new

The next run cleans up after a killed one: an unfinished directory is removed, after 1 the earlier one is put back,
after 3 it is removed. After 2 nobody can tell whether NAME was created by hand since 1, so the next run ends with an
error that names both. A directory is locked while it is written, which distinguishes it from one left behind.
"""

from __future__ import annotations

import glob
import os
import shutil
import socket
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from fnmatch import fnmatchcase
from pathlib import Path

import psutil
from loguru import logger

from stagewise.errors import DirectoryError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None


def check_place(place: Path, overwrite: bool, read: Mapping[str, Path | str | None]) -> None:
    """Cleans up what a killed run left beside --output_dir, then refuses a place that must not be written to.

    Args:
        place: the value of --output_dir.
        overwrite: whether --overwrite_output_dir was given.
        read: flags with the paths that are read from, which must not be replaced.

    Raises:
        DirectoryError: it is a file or a mount point, is read from, or is not empty and may not be replaced.
    """
    clean_up(place)
    for flag, path in read.items():
        if path and Path(path).exists() and Path(path).resolve().is_relative_to(place.resolve()):
            raise DirectoryError(f"--output_dir {place} holds --{flag}: give another directory")
    if place.is_file():
        raise DirectoryError(f"--output_dir {place} is a file: give a directory")
    if place.is_dir() and any(place.iterdir()) and not overwrite:
        raise DirectoryError(f"--output_dir {place} is not empty: add --overwrite_output_dir, or give another")
    if os.path.ismount(place):
        raise DirectoryError(f"--output_dir {place} is a mount point, which cannot be replaced: give a folder in it")


def clean_up(place: Path) -> None:
    """Restores or removes what a killed run left beside `place`, and reports what it leaves alone.

    Raises:
        DirectoryError: both directories exist, and only the user knows which one is wanted.
    """
    place = place.resolve()
    replaced = _beside(place, "replaced")
    if replaced.exists() and place.exists():
        raise DirectoryError(
            f"--output_dir {place}: {replaced} stood there before a run that was killed while it replaced it. Remove "
            "the one that you don't want, or move it elsewhere"
        )
    if replaced.exists():
        os.replace(replaced, place)
        logger.warning(f"{place}: put back as it was before a run that was killed while it replaced it")
    for path in place.parent.glob(f".{glob.escape(place.name)}.removing-*"):
        shutil.rmtree(path, ignore_errors=True)
    for path in place.parent.glob(f".{glob.escape(place.name)}.writing-*"):
        if _was_left(path):
            logger.info(f"{path}: removed; a run that was killed left it")
            shutil.rmtree(path, ignore_errors=True)
        else:
            logger.warning(f"{path}: another run is writing it now, or one on another machine left it; then remove it")


@contextmanager
def atomic_directory(place: Path, overwrite: bool, replaces: Sequence[str] = ("*",)) -> Iterator[Path]:
    """A directory beside `place`, to be filled in the block, that takes that place at its end.

    After an error in the block nothing of it is left. Its files get the usual permissions.

    Args:
        place: the final path; `check_place` has been called.
        overwrite: whether an existing directory may be replaced.
        replaces: patterns of names that are replaced; everything else in the old directory is carried over.

    Raises:
        DirectoryError: it could not be created or moved to its place: then it stays where it is, and the message
            says where that is.
    """
    place = Path(place).resolve()
    folder = _beside(place, f"writing-{_host()}-{os.getpid()}")
    try:
        folder.mkdir(parents=True)
    except OSError as error:
        raise DirectoryError(
            f"--output_dir {place}: {folder} cannot be created beside it: {error.strerror}"
        ) from error
    with _locked(folder):
        yield from _filled(folder, place, overwrite, replaces)


def _filled(folder: Path, place: Path, overwrite: bool, replaces: Sequence[str]) -> Iterator[Path]:
    try:
        yield folder
        for path in folder.rglob("*"):
            if path.is_file():  # safetensors writes files that only their owner can read
                path.chmod(folder.stat().st_mode & 0o666)
        if place.is_dir():
            _bring_along(place, folder, replaces)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    try:
        _take_place(folder, place, overwrite)
    except OSError as error:
        raise DirectoryError(
            f"--output_dir {place}: could not be written ({error.strerror}). What is new is whole in {folder}: "
            "move it by hand"
        ) from error


def _take_place(folder: Path, place: Path, overwrite: bool) -> None:
    """The four steps shown at the top; an error before the second one undoes the first."""
    replaced, removing = _beside(place, "replaced"), _beside(place, f"removing-{os.getpid()}")
    if not (overwrite and place.exists()):
        os.replace(folder, place)  # fails if something has been put there in the meantime
        return
    os.replace(place, replaced)
    try:
        os.replace(folder, place)
    except BaseException:
        if not place.exists():
            os.replace(replaced, place)
        raise
    os.replace(replaced, removing)
    shutil.rmtree(removing, ignore_errors=True)
    if removing.exists():
        logger.warning(f"{removing}: what was replaced could not be removed; remove it by hand")


def _bring_along(place: Path, folder: Path, replaces: Sequence[str]) -> None:
    """Carries over to `folder` what is in `place` and not replaced: as hard links, or as copies."""

    def take(source: str, target: str) -> None:
        try:
            os.link(source, target, follow_symlinks=False)
        except OSError:  # a file system without hard links
            shutil.copy2(source, target, follow_symlinks=False)

    for path in place.iterdir():
        if any(fnmatchcase(path.name, pattern) for pattern in replaces) or (folder / path.name).exists():
            continue
        if path.is_dir() and not path.is_symlink():
            shutil.copytree(path, folder / path.name, symlinks=True, copy_function=take)
        else:
            take(str(path), str(folder / path.name))


def _host() -> str:
    return socket.gethostname() or "localhost"


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Locks a directory while it is written, where the file system allows it; the lock ends with the process."""
    handle = os.open(folder, os.O_RDONLY) if fcntl else None
    try:
        if handle is not None:
            with suppress(OSError):  # NFS cannot lock directories: there the process id decides
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    finally:
        if handle is not None:
            os.close(handle)


def _was_left(folder: Path) -> bool:
    """Whether the process of this machine that was writing a directory has ended."""
    host, _, number = folder.name.rpartition(".writing-")[2].rpartition("-")
    if host != _host() or not number.isdecimal() or folder.is_symlink() or not folder.is_dir():
        return False
    if fcntl:
        handle = os.open(folder, os.O_RDONLY)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except BlockingIOError:
            return False
        except OSError:
            pass  # no locks here
        finally:
            os.close(handle)
    return not psutil.pid_exists(int(number))


def _beside(place: Path, what: str) -> Path:
    return place.parent / f".{place.name}.{what}"
