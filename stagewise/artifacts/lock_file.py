"""A lock file that lets one process do work whose result several processes need.

    A  takes the lock ─ encodes ─ the entry is there ─ takes the lock file away, lets go
    B        waits ············································ RELEASED: it looks for the entry again

The kernel releases the lock when a process ends for any reason, on this machine and, over NFS, on others: a killed
process blocks nobody. A waiting process makes no collective call, so it may wait for hours.
"""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from enum import Enum
from pathlib import Path

from loguru import logger

from stagewise.errors import ArgumentError, RecordError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

MOST_SAID = 1 << 16  # bytes of an error that are read


class LockResult(Enum):
    """The outcome of asking for a lock: held by this process, released by another one, or locks do not work here."""

    ACQUIRED = "acquired"
    RELEASED = "released"
    UNSUPPORTED = "unsupported"


@contextmanager
def exclusive_lock(path: Path, what: str) -> Iterator[LockResult]:
    """Holds the lock file `path` during the block if it is free; otherwise waits until its holder is done.

    A data error (RecordError, ArgumentError) in the block also ends the waiting processes: it is left in the lock
    file, which no later process opens because its name is gone by then.

    Args:
        path: the lock file, in an existing folder.
        what: what is being made, for the log line of a waiting process.

    Raises:
        RecordError, ArgumentError: those of the process that was waited for.
    """
    file = _taken(path, what)
    if file is None:
        yield LockResult.UNSUPPORTED
        return
    try:
        if not _is_at(file, path):
            _raise_said(file)
            yield LockResult.RELEASED
            return
        with suppress(OSError):
            os.ftruncate(file, 0)  # written by a process that was killed before it removed the file
        try:
            yield LockResult.ACQUIRED
        except (RecordError, ArgumentError) as error:
            _say(file, error)
            raise
        finally:
            path.unlink(missing_ok=True)
    finally:
        with suppress(OSError):  # closing is not enough if a process forked in the meantime has it open, too
            fcntl.flock(file, fcntl.LOCK_UN)
        os.close(file)


# --- pieces ----------------------------------------------------------------------------------------------------------


def _taken(path: Path, what: str) -> int | None:
    """The lock file, open and locked; None, with a log line, if locks do not work."""
    file = None
    try:
        if fcntl is None:
            raise OSError(None, "this system has no flock")
        file = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)  # NFS can only lock files open for writing
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            logger.info(f"waiting for another process, which makes {what}")
            fcntl.flock(file, fcntl.LOCK_EX)
    except OSError as error:
        logger.info(f"{path} can't be locked ({error.strerror}): every process makes {what} for itself")
        if file is not None:
            os.close(file)
        return None
    return file


def _is_at(file: int, path: Path) -> bool:
    """Whether the open file still has its name; on NFS another machine may have removed it."""
    try:
        return os.path.samestat(os.fstat(file), os.stat(path))
    except OSError:
        return False


def _say(file: int, error: RecordError | ArgumentError) -> None:
    parts = (error.where, error.reason, error.message) if isinstance(error, RecordError) else (str(error),)
    with suppress(OSError):  # a full disk: the waiting processes will meet the error themselves
        os.pwrite(file, json.dumps(parts).encode(), 0)


def _raise_said(file: int) -> None:
    """Raises the error that the previous process left, if there is one."""
    try:
        parts = json.loads(os.pread(file, MOST_SAID, 0))
    except (OSError, ValueError):
        return
    raise RecordError(*parts) if len(parts) > 1 else ArgumentError(*parts)
