"""One process at a time makes what several would make alike: a lock file beside it, held by the one at work.

    A  takes the lock ─ encodes ─ the entry is there ─ takes the lock file away, lets go
    B        waits ············································ RELEASED: it looks for the entry again

The kernel takes the lock from a process that ends, however it ends, on this machine and, over NFS, on others: a killed
one keeps nobody waiting. A waiting process makes no collective call, so that it may wait for hours.
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
    """Holds the lock file `path` while the block runs, if it is free; otherwise waits until its holder is done.

    An error in the data (RecordError, ArgumentError) that ends the block ends those who wait for it as well: it is
    left in the lock file, which no later process opens, since its name is gone by then.

    Args:
        path: the lock file, in a folder that is there.
        what: is made there, for the line that is logged where this process waits.

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
            os.ftruncate(file, 0)  # left by a process that was killed before it took the file away
        try:
            yield LockResult.ACQUIRED
        except (RecordError, ArgumentError) as error:
            _say(file, error)
            raise
        finally:
            path.unlink(missing_ok=True)
    finally:
        with suppress(OSError):  # to close it is not enough where a process that was forked meanwhile has it, too
            fcntl.flock(file, fcntl.LOCK_UN)
        os.close(file)


# --- pieces ----------------------------------------------------------------------------------------------------------


def _taken(path: Path, what: str) -> int | None:
    """The lock file, open and locked; None, and a line that says why, where there is no locking."""
    file = None
    try:
        if fcntl is None:
            raise OSError(None, "this system has no flock")
        file = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)  # NFS locks only what is open for writing
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
    """Whether the open file still has its name; of one that another machine took away NFS knows nothing more."""
    try:
        return os.path.samestat(os.fstat(file), os.stat(path))
    except OSError:
        return False


def _say(file: int, error: RecordError | ArgumentError) -> None:
    parts = (error.where, error.reason, error.message) if isinstance(error, RecordError) else (str(error),)
    with suppress(OSError):  # a full disk: those who wait find the error themselves
        os.pwrite(file, json.dumps(parts).encode(), 0)


def _raise_said(file: int) -> None:
    """Raises the error that the process before left, if it left one."""
    try:
        parts = json.loads(os.pread(file, MOST_SAID, 0))
    except (OSError, ValueError):
        return
    raise RecordError(*parts) if len(parts) > 1 else ArgumentError(*parts)
