"""Records of files, distributed over lanes, and each lane's own endless sequence of rows.

A step takes one row of every lane, so lanes, not processes, determine the contents of a step:

    records of the files   0 1 2 3 4 5 6 7 8 …         four lanes: in each group of four, one record goes to each
    lane 2                 2 7 8 …                     read in blocks and shuffled: all lanes' are --shuffle_buffer
                           [7 2 8] [13 …]              encoded, collected to a window and packed
                           row row row | row …

A lane resumes from a few numbers: where its block began, how much of it was taken, and how many rows of the window.
The order depends only on the seed and these numbers.
"""

from __future__ import annotations

import hashlib
import random
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache, partial
from itertools import islice
from typing import Any, NamedTuple

from stagewise.data.bad_records import WAY_OUT, check_share
from stagewise.data.encode_all import Encoder
from stagewise.data.examples import Encoded, Example, Row
from stagewise.data.packing import pack
from stagewise.data.records import Account
from stagewise.data.streaming.file_index import Files, Position, RecordLocation
from stagewise.errors import ArgumentError, RecordError, TooLongError

WINDOW_ROWS = 32  # rows packed together: 64 rows save one in a hundred more, for twice the wait
HOPELESS = 10_000  # records left out in one window after which the run gives up
HOPELESS_PASS = 100  # the same, if a pass ends without a kept record


@lru_cache(maxsize=256)
def pseudo_random(*key: Any) -> int:
    """A pseudo-random number below 2**64 that depends only on the key."""
    return int.from_bytes(hashlib.blake2b(repr(key).encode(), digest_size=8).digest(), "little")


class Refusal(NamedTuple):
    """A record that was left out, for rejected.jsonl."""

    source: int
    error: RecordError
    raw: str


class Kept(NamedTuple):
    """A record that was kept: its source, and whether it was cut."""

    source: int
    cut: bool


class Taken(NamedTuple):
    """A lane's position in one source: completed passes, start of its block of records, records taken from it."""

    passes: int = 0
    block: Position = Position()
    index: int = 0


@dataclass(frozen=True)
class LaneState:
    """The state to resume from: sources and number of draws at the start of the window, rows taken from it.

    `accounts` belong to the sources: a record counts once a row of it is taken.
    """

    taken: tuple[Taken, ...]
    accounts: tuple[Account, ...]
    draws: int = 0
    rows: int = 0

    def as_json(self) -> dict[str, Any]:
        taken = [[passes, list(block), index] for passes, block, index in self.taken]
        accounts = [account.as_dict() for account in self.accounts]
        return {"taken": taken, "accounts": accounts, "draws": self.draws, "rows": self.rows}

    @classmethod
    def from_json(cls, state: dict[str, Any]) -> LaneState:
        taken = tuple(Taken(passes, Position(*block), index) for passes, block, index in state["taken"])
        accounts = tuple(Account(**account) for account in state["accounts"])
        return cls(taken, accounts, state["draws"], state["rows"])


class LaneRow(NamedTuple):
    """A row, the lane's state after it, and the records left out on the way to it."""

    examples: list[Example]
    lane: int
    state: LaneState
    refused: list[Refusal]


@dataclass(frozen=True)
class Recipe:
    """Settings that all lanes share.

    Attributes:
        sources: the files of each source.
        weights: each source's share of records; None if there is one source.
        parse: record, where → what `encode` takes; raises RecordError.
        encode: makes examples.
        skip: leave out malformed records (--on_bad_record skip).
        buffer: records that are shuffled among each other, over all lanes.
        capacity: tokens of a packed row; None: every example is a row.
        lanes: the number of lanes.
        seed: of all orders.
        last: (number of the last record of a pass, number of its blocks in use); None: all records.
    """

    sources: tuple[Files, ...]
    weights: tuple[float, ...] | None
    parse: Callable[[dict[str, Any], str], Any]
    encode: Encoder
    skip: bool
    buffer: int
    capacity: int | None = None
    lanes: int = 1
    seed: int = 0
    last: tuple[int, int] | None = None

    def is_mine(self, lane: int, source: int, passes: int, record: int) -> bool:
        """Whether a record belongs to a lane: from each group of as many records as lanes, every lane gets one.

        The assignment is random, unless nothing is shuffled: in files where short and long records alternate, no lane
        should get only the long ones.
        """
        if self.lanes == 1:
            return True
        shift = passes if self.buffer == 1 else pseudo_random(self.seed, "group", source, passes, record // self.lanes)
        return (record + shift) % self.lanes == lane

    def source_of(self, lane: int, number: int) -> int:
        """The source of a lane's record number `number`, drawn by weight."""
        if self.weights is None:
            return 0
        drawn, total = pseudo_random(self.seed, "source", lane, number) / 2**64 * sum(self.weights), 0.0
        for source, weight in enumerate(self.weights):
            total += weight
            if drawn < total:
                return source
        return max(source for source, weight in enumerate(self.weights) if weight)


class Share:
    """The records of one source that belong to one lane, pass after pass, shuffled within blocks."""

    def __init__(self, recipe: Recipe, source: int, lane: int, taken: Taken):
        self.recipe, self.source, self.lane = recipe, source, lane
        self.files = recipe.sources[source]
        self.passes, self.start, self.index = taken
        self.block: list[RecordLocation] = []
        self.walk: Iterator[RecordLocation] | None = None

    @property
    def taken(self) -> Taken:
        return Taken(self.passes, self.start, self.index)

    def upcoming(self) -> int:
        """The pass of the next record; reads the block that holds it."""
        while self.index >= len(self.block):
            if self.block:
                self.start, self.index = self.behind, 0
            self._fill()
        return self.passes

    def take(self) -> RecordLocation:
        """The next record. Raises ArgumentError if the files hold none."""
        self.upcoming()
        self.index += 1
        return self.block[self.index - 1]

    def _fill(self) -> None:
        recipe, passes = self.recipe, self.passes
        if self.walk is None:
            mine = partial(recipe.is_mine, self.lane, self.source, passes)
            self.walk = self.files.places(self.start, mine)
        self.block = list(islice(self.walk, max(1, recipe.buffer // recipe.lanes)))
        if self.files.seekable:
            self.walk = None  # there may be many lanes: none keeps its files open
        if self.block:
            self.behind = self.block[-1].after
            if recipe.buffer > 1:
                key = pseudo_random(recipe.seed, "block", self.source, self.lane, passes, self.start.record)
                random.Random(key).shuffle(self.block)
            return
        if self.start == Position() and next(self.files.places(self.start), None) is None:
            raise ArgumentError(f"--train_file_dir: there is no record in {', '.join(map(str, self.files.paths[:5]))}")
        self.passes, self.start, self.index, self.walk = passes + 1, Position(), 0, None


@dataclass
class Window:
    """Examples that are packed together: `owners` gives the record that each was cut from, `kept` the records."""

    rows: list[Row] = field(default_factory=list)
    owners: list[int] = field(default_factory=list)
    kept: list[Kept] = field(default_factory=list)
    refused: list[Refusal] = field(default_factory=list)
    tokens: int = 0

    def add(self, source: int, encoded: Encoded) -> None:
        rows = [row for (row,) in encoded.items]
        self.rows += rows
        self.owners += [len(self.kept)] * len(rows)
        self.kept.append(Kept(source, encoded.cut))
        self.tokens += sum(len(row.ids) for row in rows)


class Lane:
    """The endless rows of one lane, starting at `state`."""

    def __init__(self, recipe: Recipe, number: int, state: LaneState | None = None):
        self.recipe, self.number = recipe, number
        sources = len(recipe.sources)
        self.state = state or LaneState((Taken(),) * sources, (Account(),) * sources)
        self.shares = [Share(recipe, source, number, taken) for source, taken in enumerate(self.state.taken)]
        self.draws = self.state.draws

    def __iter__(self) -> Iterator[LaneRow]:
        """Raises RecordError for a malformed record that may not be skipped, ArgumentError if nothing is left."""
        while True:
            began = replace(self.state, taken=tuple(share.taken for share in self.shares), draws=self.draws)
            for row in self._rows(self._window(), began):
                self.state = row.state
                yield row

    def first(self, count: int, tokens: int | None = None) -> Window:
        """At most `count` records from here on, unpacked; fewer if a source ends or they have `tokens` in total."""
        window = Window()
        for number in range(count):
            if tokens is not None and window.tokens >= tokens:
                break
            share = self.shares[self.recipe.source_of(self.number, number)]
            if share.upcoming():
                break  # otherwise it would start over
            self._take(share, window)
        return window

    def _window(self) -> Window:
        recipe, window = self.recipe, Window()
        passes: dict[int, int] = {}
        full = WINDOW_ROWS * (recipe.capacity or 1)
        while (window.tokens if recipe.capacity else len(window.rows)) < full:
            source = recipe.source_of(self.number, self.draws)
            share = self.shares[source]
            if passes.setdefault(source, share.upcoming()) != share.passes:
                if window.rows and len(self.shares) == 1:
                    break  # the rest of a pass does not wait for the next one
                if not window.rows:
                    self._check_hope(window, HOPELESS_PASS)
                passes[source] = share.passes
            self._check_hope(window, HOPELESS)
            self.draws += 1
            self._take(share, window)
        return window

    def _take(self, share: Share, window: Window) -> None:
        place = share.take()
        line = share.files.read(place)
        try:
            (encoded,) = self.recipe.encode.many([line.parsed(self.recipe.parse)])
            if isinstance(encoded, RecordError):
                raise encoded
        except RecordError as error:
            if not (self.recipe.skip or isinstance(error, TooLongError)):
                raise error.saying(f"{error.message} ({WAY_OUT})") from error.__cause__
            window.refused.append(Refusal(share.source, error, line.as_read()))
            return
        if self.recipe.last is not None and place.start.record == self.recipe.last[0]:
            encoded = encoded._replace(items=encoded.items[: self.recipe.last[1]])
        window.add(share.source, encoded)

    def _rows(self, window: Window, began: LaneState) -> Iterator[LaneRow]:
        recipe = self.recipe
        rows = [[number] for number in range(len(window.rows))]
        if recipe.capacity:
            rows = pack([len(row.ids) for row in window.rows], recipe.capacity)
        if recipe.buffer > 1:
            random.Random(pseudo_random(recipe.seed, "rows", self.number, began.draws)).shuffle(rows)
        counted: set[int] = set()
        accounts = began.accounts
        for number, row in enumerate(rows):
            new = {window.owners[index] for index in row} - counted
            counted |= new
            if number < began.rows:
                continue
            refused = window.refused if number == 0 else []
            accounts = counting(accounts, [window.kept[owner] for owner in new], refused)
            state = replace(began, rows=number + 1, accounts=accounts)
            if number + 1 == len(rows):
                state = LaneState(tuple(share.taken for share in self.shares), accounts, self.draws)
            yield LaneRow([window.rows[index].example() for index in row], self.number, state, refused)

    def _check_hope(self, window: Window, most: int) -> None:
        if not self.recipe.skip and len(window.refused) >= HOPELESS_PASS:
            reasons = Counter(refusal.error.reason for refusal in window.refused)
            check_share(reasons, len(window.kept), window.refused[0].error, "--train_file_dir")
        if len(window.refused) < most:
            return
        reasons = Counter(refusal.error.reason for refusal in window.refused)
        raise ArgumentError(
            f"--train_file_dir: {len(window.refused):,} records were left out where {len(window.kept)} were kept "
            f"({dict(reasons)}), the last at {window.refused[-1].error}"
        )


def counting(accounts: Sequence[Account], kept: Sequence[Kept], refused: Sequence[Refusal]) -> tuple[Account, ...]:
    """The sources' accounts with these records added."""
    counted = [replace(account, left_out=dict(account.left_out)) for account in accounts]
    for source, cut in kept:
        counted[source].read += 1
        counted[source].kept += 1
        counted[source].cut += cut
    for source, error, _ in refused:
        counted[source].read += 1
        counted[source].leave_out(error.reason)
    return tuple(counted)
