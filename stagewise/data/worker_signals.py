"""Data loader workers survive signals that are sent to every process of a run."""

from __future__ import annotations

import signal
from collections.abc import Callable

# the signals that ask a run to save a checkpoint and stop
SIGNALS = tuple(getattr(signal, name) for name in ("SIGTERM", "SIGUSR1", "SIGUSR2", "SIGHUP") if hasattr(signal, name))


def outlive_termination(worker: int, before: Callable[[int], None] | None = None) -> None:
    """Lets a worker survive such a signal: the training process finishes its step and saves a checkpoint."""
    if before is not None:
        before(worker)
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)
