"""What is only for looking at never ends a run."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from loguru import logger


@contextmanager
def only_shown(what: str) -> Iterator[None]:
    """A block, or a decorated function, whose errors are logged as warnings: training continues without what it shows.

    Not for code that other processes take part in: they would wait for the one that left it.

    Args:
        what: the name of what is shown, with which the warning begins.
    """
    try:
        yield
    except Exception as error:
        logger.warning(f"{what}: {type(error).__name__}: {error}; training continues without it")
