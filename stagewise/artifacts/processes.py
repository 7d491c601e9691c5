"""Helpers for the processes of one run: work on the first one, on all of them, or shared among them.

The process group is set up by `choose_device`. If one process raises an error of this project, all of them raise it
with the same message; the scripts print it on the first process of each machine.
"""

from __future__ import annotations

import atexit
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import torch.distributed as dist
from accelerate import PartialState
from accelerate.utils import broadcast_object_list, gather_object
from tqdm.auto import tqdm

from stagewise.errors import ArgumentError

T = TypeVar("T")


def is_main() -> bool:
    """Whether this is the first process of the run."""
    return int(os.environ.get("RANK", "0")) == 0


def is_distributed() -> bool:
    """Whether this process is in a group of several."""
    return dist.is_initialized() and dist.get_world_size() > 1


def from_first_process(work: Callable[[], T]) -> T:
    """The result of `work`, which only the first process runs while the others wait; it must be picklable.

    Raises:
        ArgumentError: on every process, if the first one raises an error of this project.
    """
    state = PartialState()
    if state.num_processes == 1:
        return work()
    told = _tried(work) if state.is_main_process else [None, None]
    broadcast_object_list(told)
    return _result([told])[0]


def gather_by_index(work: Callable[[], Mapping[int, T]]) -> dict[int, T]:
    """The results of all processes by index: each contributes those it worked on and gets all of them.

    Raises:
        ArgumentError: on every process, with the first error of this project on any of them.
    """
    if PartialState().num_processes == 1:
        return dict(work())
    return {place: found for part in _result(gather_object([_tried(work)])) for place, found in part.items()}


def on_every_process(work: Callable[[], T]) -> T:
    """The result of `work` on this process; each runs it for itself, for example to read a file of its own machine.

    Raises:
        ArgumentError: on every process, with the first error of this project on any of them.
    """
    if PartialState().num_processes == 1:
        return work()
    found, error = _tried(work)
    _result(gather_object([[None, error]]))
    return found


def in_batches(lengths: Sequence[int], size: int, title: str, work: Callable[[list[int]], Sequence[T]]) -> list[T]:
    """Runs `work` on batches of similar lengths, longest first, spread over the processes; returns the results in
    order.

    The batches are the same for any number of processes, so the results are bit-equal. The first process shows a
    progress bar of its own share on a terminal.

    Args:
        lengths: the length of each item.
        size: items per batch.
        title: of the progress bar.
        work: takes the indices of a batch and returns a result for each.
    """
    state = PartialState()
    order = sorted(range(len(lengths)), key=lambda index: -lengths[index])
    batches = [order[start : start + size] for start in range(0, len(order), size)]
    mine = batches[state.process_index :: state.num_processes]
    hidden = not (state.is_main_process and sys.stderr.isatty())

    def work_on_mine() -> dict[int, T]:
        found: dict[int, T] = {}
        with tqdm(total=sum(map(len, mine)), desc=title, unit="record", disable=hidden) as bar:
            for batch in mine:
                found.update(zip(batch, work(batch), strict=True))
                bar.update(len(batch))
        return found

    found = gather_by_index(work_on_mine)
    return [found[index] for index in range(len(lengths))]


def _tried(work: Callable[[], T]) -> list[Any]:
    """[result of `work`, None], or [None, the message of an error of this project]."""
    try:
        return [work(), None]
    except ValueError as error:
        if not type(error).__module__.startswith("stagewise"):
            raise
        return [None, str(error)]


def _result(tried: Sequence[Sequence[Any]]) -> list[Any]:
    for _, error in tried:
        if error is not None:
            raise ArgumentError(error)
    return [found for found, _ in tried]


def leave_processes(status: int) -> None:
    """Leaves the process group once all processes have reached this point, and later exits with `status`.

    gloo threads that are still alive while Python shuts down occasionally abort the process, and a finished run would
    count as failed. Once DistributedDataParallel has been used, they outlive the group and the model (torch 2.13). So
    the process exits in Python's last exit handler and skips the rest of the shutdown.
    """
    if not (dist.is_available() and dist.is_initialized()):
        return
    has_gloo = "gloo" in dist.get_backend()
    dist.destroy_process_group()
    if has_gloo:
        skip_shutdown(status)


def skip_shutdown(status: int) -> None:
    """Lets this process exit with `status` in Python's last exit handler."""
    _exit_status.append(status)


_exit_status: list[int] = []


def _leave() -> None:
    if _exit_status and not hasattr(sys, "last_type"):  # set by an uncaught error
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(_exit_status[0])


atexit.register(_leave)  # handlers registered later, such as a tracker's, run before it
