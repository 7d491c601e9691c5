"""Records → examples: in chunks, on all cores, with an account of those that are left out."""

import itertools
import os
import sys
import threading
from array import array
from bisect import bisect_left
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Executor, Future, ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_all_start_methods, get_context, parent_process
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any, Protocol

from tqdm import tqdm

from stagewise.data.bad_records import check_share, remedy, with_those_behind
from stagewise.data.examples import Encoded, Examples, ExampleWriter
from stagewise.data.records import Account, check_on_bad_record, write_rejected
from stagewise.errors import ArgumentError, RecordError, TooLongError

CHUNK = 128  # records encoded together: enough to keep the tokenizer outside of Python for long
CHARACTERS = 1 << 21  # characters of a chunk, roughly at most: one document may be as long as a chunk of others
AT_ONCE = 4  # chunks; more threads would wait for each other, more processes for the reader


class Encoder(Protocol):
    """Makes examples of chunks of records: see stagewise/chat/encoding.py."""

    def many(self, records: Sequence[Any]) -> list[Encoded | RecordError]:
        """The result of each record, or its RecordError."""

    def letters(self, record: Any) -> int:
        """The length of a record in characters."""

    def in_thread(self) -> None:
        """Called first in each encoding thread."""


class Limit(Protocol):
    """A limit on the number of blocks: see stagewise/data/block_limit.py."""

    reason: str

    def reached(self, blocks: int, tokens: int) -> bool:
        """Whether this many blocks, with this many tokens in total, are enough."""

    def kept(self, lengths: Sequence[int]) -> int:
        """How many of the first blocks, with this many tokens each, are kept."""


def encode_all(
    records: Iterable[Any],
    encode: Encoder,
    *,
    account: Account,
    on_bad_record: str = "error",
    rejected_path: str | Path | None = None,
    num_workers: int | None = None,
    alone: bool = False,
    folder: str | Path | None = None,
    raw: Callable[[str], str] | None = None,
    description: str = "Encoding",
    quiet: bool = False,
    limit: Limit | None = None,
) -> Examples:
    """Encodes all records, in order, with a progress bar on the main process's terminal.

    `records` may be an iterator: a few hundred records are held at a time. Few examples stay in memory, more go to
    files (ExampleWriter), in `folder` if one is given.

    Args:
        encode: makes the examples, all of one kind.
        account: records with a RecordError are taken off `account.kept`, as in load_records.
        on_bad_record: "error" raises the first RecordError, "skip" counts it and writes it to `rejected_path`; a
            TooLongError is counted and written in either case.
        num_workers: encoding processes; 1 is this one, with threads on its cores; None is one per core, at most four,
            for more than a few hundred records on Linux.
        alone: whether the run's other processes on this machine wait, so that this one may use all cores.
        raw: where → the source text of a record, for `rejected_path`.
        quiet: no progress bar.
        limit: how many blocks of texts are kept; records are read only slightly further than that.

    Raises:
        RecordError; ArgumentError if no record is left, or more are too long than fit and none may be skipped.
    """
    check_on_bad_record(on_bad_record)
    writer, seen, found = ExampleWriter(folder), 0, Account()
    first_too_long: RecordError | None = None
    tokens = 0
    lengths, ends, source = array("i"), [], iter(records)
    total = len(records) if hasattr(records, "__len__") else None
    quiet = quiet or os.environ.get("RANK", "0") != "0" or not sys.stderr.isatty()
    with tqdm(total=total, desc=description, unit=" records", disable=quiet, leave=False) as bar:
        outcomes = _outcomes(source, encode, num_workers, _cores(alone))
        for record, outcome in outcomes:
            seen += 1
            bar.update()
            if isinstance(outcome, RecordError):
                if isinstance(outcome, TooLongError):
                    first_too_long = first_too_long or outcome
                elif on_bad_record == "error":
                    raise with_those_behind(outcome, (other for _, other in outcomes))
                found.leave_out(outcome.reason)
                write_rejected(rejected_path, outcome, raw(outcome.where) if raw else repr(record))
                continue
            found.cut += outcome.cut
            for rows in outcome.items:
                writer.add(outcome.kind, rows)
            if limit is not None:
                lengths.extend(len(row.ids) for (row,) in outcome.items)
                ends.append(len(lengths))
                tokens += sum(lengths[ends[-2] if len(ends) > 1 else 0 :])
                if limit.reached(len(lengths), tokens):
                    break
        outcomes.close()
    if hasattr(source, "close"):  # a generator settles its account when it is closed
        source.close()
    account.cut += found.cut
    account.kept -= sum(found.left_out.values())
    account.leave_out_as(found)
    if limit is not None:
        blocks = limit.kept(lengths)
        writer.truncate(blocks)
        kept = bisect_left(ends, blocks) + 1 if blocks else 0  # records with at least one kept block
        account.leave_out(limit.reason, account.kept - kept)
        account.kept, account.blocks_beyond = kept, len(lengths) - blocks
    if on_bad_record == "error":
        check_share(found.left_out, seen - sum(found.left_out.values()), first_too_long, description)
    examples = writer.finish()
    if not len(examples):
        why = found.reasons() + remedy(found.left_out)
        raise ArgumentError(f"{description}: none of the {seen} records is left: {why}")
    return examples


# --- pieces ----------------------------------------------------------------------------------------------------------


def _outcomes(
    records: Iterator[Any], encode: Encoder, num_workers: int | None, cores: int
) -> Iterator[tuple[Any, Encoded | RecordError]]:
    """Every record with its outcome, in order; a few chunks are in progress at a time."""
    chunks = _chunks(records, encode.letters)
    first = list(itertools.islice(chunks, AT_ONCE))
    # Forked workers start at once and take any `encode`; for few records even they are not worth it.
    forks = len(first) == AT_ONCE and sys.platform == "linux"
    workers = num_workers or (cores if forks else 1)
    work = _encode_in_worker if workers > 1 else encode.many
    try:
        with _pool(workers, cores, encode) as pool:
            waiting: deque[tuple[list[Any], Future]] = deque()
            for chunk in itertools.chain(first, chunks):
                waiting.append((chunk, pool.submit(work, chunk)))
                if len(waiting) > max(workers, AT_ONCE):
                    yield from _results(*waiting.popleft())
            while waiting:
                yield from _results(*waiting.popleft())
    except BrokenProcessPool as error:
        raise ArgumentError(
            f"--preprocessing_num_workers {workers}: one of the processes that encode was killed, most likely because "
            "the memory was full; give a smaller number"
        ) from error


def _chunks(records: Iterable[Any], letters: Callable[[Any], int]) -> Iterator[list[Any]]:
    chunk, held = [], 0
    for record in records:
        chunk.append(record)
        held += letters(record)
        if len(chunk) == CHUNK or held > CHARACTERS:
            yield chunk
            chunk, held = [], 0
    if chunk:
        yield chunk


def _results(chunk: list[Any], future: Future) -> Iterator[tuple[Any, Encoded | RecordError]]:
    return zip(chunk, future.result(), strict=True)


def _pool(workers: int, cores: int, encode: Encoder) -> Executor:
    # The tokenizer's own threads would compete with these threads or processes, and warn when this process is
    # forked, here or by a data loader.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    if workers == 1:
        return ThreadPoolExecutor(cores, initializer=encode.in_thread)
    context = get_context("fork" if "fork" in get_all_start_methods() else "spawn")  # `encode` must be picklable there
    return ProcessPoolExecutor(workers, context, _start_worker, (encode,))


def _cores(alone: bool) -> int:
    """This process's share of the cores, or all of them if the run's other processes wait; at most AT_ONCE."""
    # the cores that a process may use are known on Linux only
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    sharing = 1 if alone else int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return max(1, min(AT_ONCE, cores // sharing))


_WORKER_ENCODE: list[Encoder] = []  # set once per worker: a tokenizer is large to send with each chunk


def _start_worker(encode: Encoder) -> None:
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    _WORKER_ENCODE[:] = [encode]
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """Exits this worker when its parent was killed; otherwise it would wait for work, and hold a lock, forever.

    Of several forked workers the last one notices it first, the one before it when that one has exited.
    """
    wait([parent_process().sentinel])
    os._exit(1)


def _encode_in_worker(chunk: Sequence[Any]) -> list[Encoded | RecordError]:
    return _WORKER_ENCODE[0].many(chunk)
