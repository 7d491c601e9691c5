"""Files to read records from: anything else in a folder is named and never opened.

Opening a pipe would wait forever for a writer.
"""

import errno
import os
import stat
from pathlib import Path
from typing import BinaryIO

from stagewise.errors import FileError

KINDS = (
    (stat.S_ISDIR, "a folder"),
    (stat.S_ISFIFO, "a pipe (FIFO)"),
    (stat.S_ISSOCK, "a socket"),
    (stat.S_ISCHR, "a device"),
    (stat.S_ISBLK, "a device"),
)


def trouble_with(path: Path) -> str | None:
    """The reason why a path can't be read as a file, None if it can."""
    try:
        mode = os.stat(path).st_mode
    except OSError as error:
        if error.errno == errno.ELOOP:
            return "a link that leads back to itself"
        if isinstance(error, FileNotFoundError):
            return f"a link to nothing ({os.readlink(path)})" if path.is_symlink() else "no such file or folder"
        return f"can't be read: {error.strerror}"
    if not stat.S_ISREG(mode):
        return next((f"{name}, not a file" for is_kind, name in KINDS if is_kind(mode)), "not a file")
    return None if os.access(path, os.R_OK) else "can't be read: Permission denied"


def check_file(path: Path, flag: str) -> None:
    """Raises FileError, naming the flag and the path, if the path can't be read as a file."""
    if trouble := trouble_with(path):
        raise FileError(f"{flag}: {path}: {trouble}")


def open_file(path: Path) -> BinaryIO:
    """Opens a file for reading. Raises FileError, also for problems that listing the folder did not show."""
    if trouble := trouble_with(path):
        raise FileError(f"{path}: {trouble}")
    try:
        return path.open("rb")
    except OSError as error:
        raise FileError(f"{path}: can't be read: {error.strerror}") from error
