"""Work that the processes of one run share: each does its part, and all of them have the whole, in order.

The group of processes is the one that `choose_device` makes. An error of this project in one of them ends all of them,
with the same words; the scripts print it in the first of each machine.
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
    """What `work` gives, which the first process alone does while the others wait; it must be picklable.

    Raises:
        ArgumentError: in every process, with the words of an error of this project in the first.
    """
    state = PartialState()
    if state.num_processes == 1:
        return work()
    told = _tried(work) if state.is_main_process else [None, None]
    broadcast_object_list(told)
    return _result([told])[0]


def gather_by_index(work: Callable[[], Mapping[int, T]]) -> dict[int, T]:
    """What every process found, by its place: each gives the places that it worked on, and gets all of them.

    Raises:
        ArgumentError: in every process, with the words of the first error of this project in any of them.
    """
    if PartialState().num_processes == 1:
        return dict(work())
    return {place: found for part in _result(gather_object([_tried(work)])) for place, found in part.items()}


def on_every_process(work: Callable[[], T]) -> T:
    """What `work` gives in this process; each does it for itself, such as reading a file of its own machine.

    Raises:
        ArgumentError: in every process, with the words of the first error of this project in any of them.
    """
    if PartialState().num_processes == 1:
        return work()
    found, error = _tried(work)
    _result(gather_object([[None, error]]))
    return found


def in_batches(lengths: Sequence[int], size: int, title: str, work: Callable[[list[int]], Sequence[T]]) -> list[T]:
    """`work` on batches of like lengths, longest first, dealt to the processes; what it gives for each, in order.

    The batches are the same for any number of processes, and so is the last digit of what comes out. The first process
    shows a bar of its own part on a terminal.

    Args:
        lengths: of what is worked on.
        size: of a batch.
        title: what the bar is called.
        work: is given the indices of a batch, and gives something for each.
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
    """[what `work` gives, None], or [None, the words of an error of this project]."""
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
    """Ends the group of processes where all of them have come to their end, and this process with `status`, later.

    Threads of gloo that are still there while Python ends abort the process now and then, and a finished run would
    count as failed. Once DistributedDataParallel was there they outlive the group and the model (torch 2.13). So the
    process leaves with the last of Python's exit handlers and does not wait for what comes after them.
    """
    if not (dist.is_available() and dist.is_initialized()):
        return
    has_gloo = "gloo" in dist.get_backend()
    dist.destroy_process_group()
    if has_gloo:
        leave_with_status.append(status)


leave_with_status: list[int] = []  # the exit status of a process that is to leave early; empty otherwise


def _leave() -> None:
    if leave_with_status and not hasattr(sys, "last_type"):  # which an error that nothing caught has set
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(leave_with_status[0])


atexit.register(_leave)  # handlers that are registered later, a tracker's for instance, run before it
