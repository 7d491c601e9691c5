"""Display code never ends a run."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from loguru import logger


@contextmanager
def errors_logged(what: str) -> Iterator[None]:
    """Logs errors of a block, or a decorated function, as warnings: training continues without its output.

    Not for code in which other processes take part: they would wait for the one that left it.

    Args:
        what: the name of the output, at the beginning of the warning.
    """
    try:
        yield
    except Exception as error:
        logger.warning(f"{what}: {type(error).__name__}: {error}; training continues without it")
