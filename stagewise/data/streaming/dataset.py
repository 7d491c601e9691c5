"""--streaming: training rows from files that are read during training, in constant memory.

The rows of a run are numbered: micro-batch k of N processes with B rows each holds rows k·N·B … (k + 1)·N·B − 1, row g
comes from lane g mod L (shards.py), and L is the number of rows per optimizer step. So two processes with one row each
train on the same rows as one process with two, and no record is read twice or skipped:

    N = 2, B = 1, two accumulated      k = 0: lanes 0 | 1      k = 1: lanes 2 | 3      k = 2: lanes 0 | 1      …

A worker of the DataLoader makes whole batches, every W-th of its process; L is then a multiple of W batches, so each
lane has one worker. Each batch carries the positions of its lanes. A checkpoint keeps the positions of the last batch
that was trained on, however far ahead the workers are.
"""

from __future__ import annotations

import json
import math
import os
from bisect import bisect_left
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from loguru import logger
from torch.utils.data import DataLoader, IterableDataset, get_worker_info
from transformers import TrainingArguments

from stagewise.data.bad_records import too_long_line
from stagewise.data.block_limit import BlockLimit
from stagewise.data.encode_all import Encoder
from stagewise.data.examples import Example, Examples, ExampleWriter
from stagewise.data.mixture import Source
from stagewise.data.records import Account, write_rejected
from stagewise.data.statistics import Measures
from stagewise.data.streaming.account import StreamAccount, sum_accounts
from stagewise.data.streaming.file_index import Files
from stagewise.data.streaming.shards import Lane, LaneRow, LaneState, Recipe, Refusal, counting
from stagewise.data.worker_signals import outlive_termination
from stagewise.errors import ArgumentError, RecordError
from stagewise.formats.readers import file_names

Batch = dict[str, torch.Tensor]


class Failure(NamedTuple):
    """A worker's error, on its way to the training process."""

    error: Exception


class StreamedBatch(NamedTuple):
    """A batch, the positions of its lanes after it, and the records left out on the way."""

    batch: Batch
    states: dict[int, LaneState]
    refused: list[Refusal]


class RecordStream(IterableDataset):
    """The endless training rows of one process.

    Args:
        sources: the sources; those without a weight form one list of files.
        files: the files of each source.
        parse, encode: as in `Encoding`.
        buffer: records that are shuffled among each other.
        skip: leave out malformed records, and write them beside `rejected` (--on_bad_record skip).
        rejected: rejected.jsonl of the run; None: nothing is written.
    """

    def __init__(
        self,
        sources: Sequence[Source],
        files: Sequence[Files],
        parse: Callable[[dict[str, Any], str], Any],
        encode: Encoder,
        *,
        buffer: int,
        skip: bool,
        rejected: Path | None,
    ):
        weights = tuple(source.weight for source in sources) if len(files) > 1 else None
        self.recipe = Recipe(tuple(files), weights, parse, encode, skip, buffer)
        self.account = StreamAccount(sources, files)
        self.folder = rejected and rejected.parent
        self.states: dict[int, LaneState] = {}
        self.rows_taken = 0  # by all processes
        self.resume: Path | None = None
        self.measures: Measures | None = None  # of the first records

    def __getitem__(self, index: int) -> Example:
        """The first example of the files, to be shown before training."""
        if index != 0:
            raise IndexError("a stream shows its first example only")
        recipe = replace(self.recipe, buffer=1, lanes=1, weights=None, sources=self.recipe.sources[:1])
        return next(iter(Lane(recipe, 0))).examples[0]

    def first(self, count: int, tokens: int | None = None) -> tuple[Examples, Account, list[RecordError]]:
        """The first `count` records in file order: examples, their account, and the errors of those left out.

        Fewer, if they have `tokens` in total.
        """
        window = Lane(replace(self.recipe, buffer=1, lanes=1), 0).first(count, tokens)
        writer = ExampleWriter()
        for row in window.rows:
            writer.add("Example", [row])
        none = (Account(),) * len(self.recipe.sources)
        account = sum_accounts(counting(none, window.kept, window.refused))
        return writer.finish(), account, [refusal.error for refusal in window.refused]

    def end_behind(self, limit: BlockLimit) -> None:
        """Limits every pass to the text that makes this many rows; to find its end the text is encoded once."""
        (files,) = self.recipe.sources
        lane, lengths, ends, places = Lane(replace(self.recipe, buffer=1, lanes=1), 0), [], [], []
        record = tokens = 0
        while not limit.reached(len(lengths), tokens):
            window = lane.first(1)
            if not (window.kept or window.refused):
                break  # the end of the files
            if window.kept:
                lengths += [len(row.ids) for row in window.rows]
                ends.append(len(lengths))
                places.append(record)
            record, tokens = record + 1, tokens + window.tokens
        blocks = limit.kept(lengths)
        if blocks:
            last = bisect_left(ends, blocks)
            own = blocks - (ends[last - 1] if last else 0)
            self.recipe = replace(
                self.recipe, sources=(Files(files.paths, places[last] + 1, files.names),), last=(places[last], own)
            )

    def pack_to(self, capacity: int | None) -> None:
        """Packs several examples into a row, up to `capacity` tokens; None: one example per row."""
        self.recipe = replace(self.recipe, capacity=capacity)

    def loader(self, collate: Callable[[Sequence[Any]], Batch], args: TrainingArguments, batch: int) -> StreamLoader:
        """Batches of `batch` rows for this process; continues from the checkpoint `self.resume` if it is set."""
        workers = args.dataloader_num_workers
        self.world, self.rank, self.batch = args.world_size, args.process_index, batch
        # micro-batches until the lanes repeat
        self.cycle = math.lcm(args.gradient_accumulation_steps, max(1, workers))
        seed = args.seed if args.data_seed is None else args.data_seed
        self.recipe = replace(self.recipe, seed=seed, lanes=self.world * batch * self.cycle)
        self.states, self.rows_taken = {}, 0
        if self.resume is not None:
            self._restore(self.resume)
        else:
            for _, path in self._rejected_files():
                path.unlink()
        return StreamLoader(self, collate, args)

    def __iter__(self) -> Iterator[LaneRow | Failure]:
        info = get_worker_info()
        number, step = (info.id, info.num_workers) if info else (0, 1)
        if info:
            os.environ["TOKENIZERS_PARALLELISM"] = "false"  # a tokenizer's threads do not survive a fork
        lanes: dict[int, Iterator[LaneRow]] = {}
        first = self.rows_taken + (number * self.world + self.rank) * self.batch
        try:
            while True:
                for row in range(first, first + self.batch):
                    lane = row % self.recipe.lanes
                    if lane not in lanes:
                        lanes[lane] = iter(Lane(self.recipe, lane, self.states.get(lane)))
                    yield next(lanes[lane])
                first += step * self.world * self.batch
        except (ValueError, OSError) as error:  # the training process raises it with its own message
            yield Failure(error)

    def collate(self, collate: Callable[[Sequence[Any]], Batch], rows: list[LaneRow | Failure]):
        """What a worker returns: a StreamedBatch, or the Failure that stops it."""
        if isinstance(rows[-1], Failure):
            return rows[-1]
        items = [row.examples if self.recipe.capacity else row.examples[0] for row in rows]
        refused = [refusal for row in rows for refusal in row.refused]
        return StreamedBatch(collate(items), {row.lane: row.state for row in rows}, refused)

    def taken(self, batch: StreamedBatch) -> None:
        """Records that a batch is about to be trained on."""
        self.states.update(batch.states)
        self.rows_taken += self.world * self.batch
        for _, error, raw in batch.refused if self.folder else ():
            write_rejected(self.rejected_path, error, raw)

    # ── checkpoints ──────────────────────────────────────────────────────────────────────────────────────────────

    def settle(self, finished: bool) -> None:
        """Combines the accounts of all processes; all of them have to call it."""
        states = list(self.states.values())
        if dist.is_initialized() and self.world > 1:
            others: list[Any] = [None] * self.world
            dist.all_gather_object(others, states)
            states = [state for process in others for state in process]
        self.account.settle(states)
        if line := too_long_line(self.account.entry["left_out"], self.account.entry["kept"]):
            logger.info(f"train: {line}")
        if not finished or self.rank:
            return
        for path in sorted(self.folder.glob("rejected-[0-9]*.jsonl")):
            with (self.folder / "rejected.jsonl").open("a", encoding="utf-8") as whole:
                whole.write(path.read_text(encoding="utf-8"))
            path.unlink()

    @property
    def rejected_path(self) -> Path:
        """The file of this process's rejected records; at the end they are joined to rejected.jsonl."""
        return self.folder / f"rejected-{self.rank}.jsonl"

    def _rejected_files(self) -> list[tuple[str, Path]]:
        """(N, rejected-N.jsonl) of this process; for the first one, also those of processes that no longer exist."""
        found = self.folder.glob("rejected-[0-9]*.jsonl") if self.folder else ()
        named = [(path.stem.removeprefix("rejected-"), path) for path in found]
        gone = {number for number, _ in named if number.isdigit() and int(number) >= self.world and not self.rank}
        return [(number, path) for number, path in named if number == str(self.rank) or number in gone]

    def settings(self) -> dict[str, Any]:
        """The settings that the positions in the files depend on, described for an error message."""
        recipe = self.recipe
        return {
            "the files of --train_file_dir, with their sizes,": [source.fingerprint() for source in recipe.sources],
            "--data_weights": recipe.weights and list(recipe.weights),
            "--max_train_samples": [*(source.limit for source in recipe.sources), *(recipe.last or ())],
            "--shuffle_buffer": recipe.buffer,
            "--data_seed (or --seed)": recipe.seed,
            "the length of a packed row": recipe.capacity,
            "--on_bad_record": "skip" if recipe.skip else "error",
        }

    def save(self, folder: Path) -> None:
        """Writes stream-<rank>.json: the positions of this process's lanes."""
        size = self.rejected_path.stat().st_size if self.rejected_path.is_file() else 0
        state = {
            "settings": self.settings(),
            "lanes_in_all": self.recipe.lanes,
            "rows_taken": self.rows_taken,
            "rejected_bytes": size,
            "lanes": {lane: state.as_json() for lane, state in sorted(self.states.items())},
        }
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"stream-{self.rank}.json").write_text(json.dumps(state), encoding="utf-8")

    def _restore(self, folder: Path) -> None:
        """Restores the lanes that the processes of the stopped run saved in `folder`. Raises ArgumentError."""
        flag = f"--resume_from_checkpoint {folder}"
        saved = {path.name: json.loads(path.read_text()) for path in folder.glob("stream-*.json")}
        if not saved:
            raise ArgumentError(f"{flag}: it was saved without --streaming and holds no place in the files; leave "
                                "--streaming out as then, or give another --output_dir")  # fmt: skip
        states: dict[int, LaneState] = {}
        for state in saved.values():
            for name, now in json.loads(json.dumps(self.settings())).items():
                if (then := state["settings"][name]) != now:
                    was, are = (f"{str(value)[:300]}" for value in (then, now))
                    raise ArgumentError(f"{flag}: {name} was {was} and is {are}: the saved place in the files means "
                                        "nothing then; give what was given before")  # fmt: skip
            if state["lanes_in_all"] != self.recipe.lanes or state["rows_taken"] % (self.world * self.batch):
                raise ArgumentError(
                    f"{flag}: the files were dealt to {state['lanes_in_all']} lanes and would be to "
                    f"{self.recipe.lanes}: processes × --per_device_train_batch_size × --gradient_accumulation_steps, "
                    "and --dataloader_num_workers, have to be as before"
                )
            states |= {int(lane): LaneState.from_json(saved_lane) for lane, saved_lane in state["lanes"].items()}
        self.rows_taken = next(iter(saved.values()))["rows_taken"]
        mine = {lane for lane in range(self.recipe.lanes) if lane // self.batch % self.world == self.rank}
        missing = [lane for lane in mine if lane < self.rows_taken and lane not in states]
        if missing:
            raise ArgumentError(f"{flag}: the places of {len(missing)} rows are missing; every process writes its own "
                                "stream-N.json there: the folder has to be one that all machines share")  # fmt: skip
        self.states = {lane: states[lane] for lane in mine if lane in states}
        for number, path in self._rejected_files():
            with path.open("r+b") as file:  # what is read again is written again
                file.truncate(saved.get(f"stream-{number}.json", {"rejected_bytes": 0})["rejected_bytes"])
        logger.info(f"--streaming continues where {folder.name} stopped: after {self.rows_taken} rows")


def stream_of(
    sources: Sequence[Source],
    limit: int,
    parse: Callable[[dict[str, Any], str], Any],
    encode: Encoder,
    blocks: BlockLimit | None = None,
    **options: Any,
) -> RecordStream:
    """A stream of weighted sources, or of all files in order; `limit` records are read (−1: all).

    With `blocks` that many rows of text are read, and `limit` only says whether there is a limit.

    Raises ArgumentError for limits that a stream does not support.
    """
    names = iter(file_names([path for source in sources for path in source.files]))
    if sources[0].weight is not None:
        if limit >= 0:
            raise ArgumentError("--max_train_samples: not with --streaming and weighted sources: give each source its "
                                "max_samples in a .yaml list")  # fmt: skip
        files = [Files(source.files, source.max_samples, list(islice(names, len(source.files)))) for source in sources]
        return RecordStream(sources, files, parse, encode, **options)
    if len(sources) > 1 and any(source.max_samples >= 0 for source in sources):
        raise ArgumentError("--train_file_dir: max_samples of sources without a weight: not with --streaming, which "
                            "reads them as one; give them weights")  # fmt: skip
    limits = (-1 if blocks else limit, sources[0].max_samples)
    most = min((number for number in limits if number >= 0), default=-1)
    whole = Files([path for source in sources for path in source.files], most, list(names))
    stream = RecordStream(sources, [whole], parse, encode, **options)
    if blocks:
        stream.end_behind(blocks)
    return stream


class StreamLoader:
    """What the Trainer iterates over; hidden from accelerate, which would shard the rows again."""

    def __init__(self, stream: RecordStream, collate: Callable[[Sequence[Any]], Batch], args: TrainingArguments):
        workers = args.dataloader_num_workers
        options = {
            "prefetch_factor": args.dataloader_prefetch_factor,
            "worker_init_fn": outlive_termination,
            # Forked workers start at once and take any `encode`; with other start methods it must be picklable.
            "multiprocessing_context": args.dataloader_multiprocessing_context
            or ("fork" if hasattr(os, "fork") else None),
        }
        self.stream = stream
        self.batches = DataLoader(
            stream,
            batch_size=stream.batch,
            collate_fn=partial(stream.collate, collate),
            num_workers=workers,
            pin_memory=args.dataloader_pin_memory and torch.accelerator.is_available(),
            # Its own generator: drawing worker seeds from the global one would shift all dropout of a resumed run.
            generator=torch.Generator(),
            **(options if workers else {}),
        )

    def __iter__(self) -> Iterator[Batch]:
        for batch in self.batches:
            if isinstance(batch, Failure):
                raise batch.error
            self.stream.taken(batch)
            yield batch.batch
