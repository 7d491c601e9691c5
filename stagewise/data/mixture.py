"""Several sources of records: those named by --train_file_dir and --data_weights, and the mixture drawn from them."""

import itertools
import math
import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

import yaml

from stagewise.config.paths import expanded
from stagewise.data.records import Account, Records, SourceText, file_of, find_files, nothing_left
from stagewise.errors import ArgumentError
from stagewise.formats.readers import file_names

T = TypeVar("T")
KEYS = ("path", "weight", "name", "max_samples")


@dataclass(frozen=True)
class Source:
    """The files of one source. `weight` is its share of the mixture, None if all records of all sources are used."""

    name: str
    path: str
    files: tuple[Path, ...]
    weight: float | None = None
    max_samples: int = -1


def find_sources(given: str, weights: str | None, suffixes: Sequence[str], flag: str) -> list[Source]:
    """The sources that a flag names: a file, a folder, several joined by commas, or a .yaml list.

    A name with commas that exists is one path. The weights of the result sum to 1, or all are None. Raises an
    ArgumentError that names the flag.
    """
    listed = Path(given).suffix.lower() in (".yaml", ".yml") and Path(given).is_file()
    if listed:
        if weights is not None:
            raise ArgumentError(f"--data_weights with {flag} {given}: write the weights into that file")
        entries = _entries(given, flag)
        for number, entry in enumerate(entries, 1):
            entry["path"] = expanded(entry["path"], f"{flag} {given}: source {number}")
    else:
        paths = [given] if Path(given).exists() else [path for path in map(str.strip, given.split(",")) if path]
        entries = [{"path": path} for path in paths]
        for entry, weight in zip(entries, _weights(weights, len(paths)), strict=True):
            entry["weight"] = weight
    shares = _shares([entry.get("weight") for entry in entries], given if listed else "--data_weights")
    names = _names(entries)
    sources = [
        Source(name, entry["path"], tuple(find_files(entry["path"], suffixes, flag)), share,
               entry.get("max_samples", -1))
        for name, entry, share in zip(names, entries, shares, strict=True)
    ]  # fmt: skip
    seen: dict[Path, str] = {}
    for source in sources:
        for path in source.files:
            if other := seen.get(path.resolve()):
                raise ArgumentError(f"{flag}: {path} belongs to both {other} and {source.path}; name it once")
            seen[path.resolve()] = source.path
    return sources


class InOrder(Generic[T]):
    """All records of several sources, source after source, at most `limit` of them (−1: all).

    The first iteration fills `account`. Raises ArgumentError if there is no record.
    """

    def __init__(self, parts: Sequence[Records[T]], account: Account, limit: int = -1):
        self.parts, self.account, self.limit = parts, account, limit

    def __iter__(self) -> Iterator[T]:
        taken = 0
        try:
            for part in self.parts:
                left = [most for most in (part.max_samples, self.limit - taken) if most >= 0 and self.limit >= 0]
                part.max_samples = min(left, default=part.max_samples)
                yield from part
                taken += len(part.places)
        finally:  # also if no more records are needed
            _settle(self.account, self.parts)
        if not taken:
            raise nothing_left(self.account)

    def counted(self) -> "Drawn[T]":
        """The same, after one iteration has counted them."""
        for _ in self:
            pass
        return Drawn(
            self.parts, [(n, index) for n, part in enumerate(self.parts) for index in range(len(part.places))]
        )


class Drawn(Generic[T]):
    """Records of several sources in the order of `pairs`, (source, record); read again on each iteration."""

    def __init__(self, parts: Sequence[Records[T]], pairs: Sequence[tuple[int, int]]):
        self.parts, self.pairs = parts, pairs

    def __len__(self) -> int:
        return len(self.pairs)

    def __iter__(self) -> Iterator[T]:
        own: list[list[int]] = [[] for _ in self.parts]
        for source, index in self.pairs:
            own[source].append(index)
        picked = [part.pick(indices) for part, indices in zip(self.parts, own, strict=True)]
        return (next(picked[source]) for source, _ in self.pairs)

    def only(self, chosen: Iterable[int]) -> "Drawn[T]":
        """The records with these numbers."""
        return Drawn(self.parts, [self.pairs[number] for number in chosen])

    def counted(self) -> "Drawn[T]":
        return self


def load_sources(
    sources: Sequence[Source],
    parse: Callable[[dict[str, Any], str], T],
    limit: int,
    seed: int,
    **options: Any,
) -> tuple[InOrder[T] | Drawn[T], Account]:
    """The records of one source, of all sources in order, or of the mixture with their weights.

    Args:
        limit: the maximum of kept records, −1 for all; a mixture keeps its proportions.
        seed: of the mixture's draw.
        options: on_bad_record, rejected_path and seen of Records.

    Returns:
        the records, and their account, which is complete after one iteration.
    """
    names = iter(file_names([path for source in sources for path in source.files]))
    parts = []
    for source in sources:
        own = list(itertools.islice(names, len(source.files)))
        parts.append(Records(source.files, parse, names=own, max_samples=source.max_samples, **options))
        about = {"name": source.name, "path": source.path, "weight": source.weight, "files": own}
        parts[-1].account.sources = [about] if len(sources) > 1 else []
    total = parts[0].account
    if len(parts) > 1:
        total = Account(files=[file for part in parts for file in part.account.files])
        total.again = SourceText({name: lines for part in parts for name, lines in part.account.again.lines.items()})
    if sources[0].weight is None:
        return InOrder(parts, total, limit), total
    for part in parts:
        if not sum(1 for _ in part):
            raise nothing_left(part.account)
    _settle(total, parts)
    drawn = mixture([len(part.places) for part in parts], [source.weight for source in sources], seed)
    total.leave_out("beyond --data_weights", total.kept - len(drawn))
    if 0 <= limit < len(drawn):
        total.leave_out("beyond --max_train_samples", len(drawn) - limit)
        drawn = drawn[:limit]
    total.kept = len(drawn)
    return Drawn(parts, drawn), total


def count_shares(entries: Sequence[dict[str, Any]], examples: Any) -> None:
    """Records what each of several sources contributed: records `used`, their `share`, `tokens` and `token_share`.

    `entries` are Account.sources, `examples` the encoded records (stagewise.data.examples.Examples).
    """
    owners = {name: entry for entry in entries for name in entry["files"]}
    used: dict[str, set[str]] = {entry["name"]: set() for entry in entries}
    tokens = dict.fromkeys(used, 0)
    for index, length in enumerate(examples.tokens.sum(axis=1).tolist() if entries else ()):
        where = examples.where(index)
        name = owners[file_of(where, owners)]["name"]
        used[name].add(where)
        tokens[name] += length
    for entry in entries:
        records = len(used[entry["name"]])
        entry |= {
            "used": records,
            "share": round(records / max(1, sum(map(len, used.values()))), 4),
            "tokens": tokens[entry["name"]],
            "token_share": round(tokens[entry["name"]] / max(1, sum(tokens.values())), 4),
        }


def mixture(counts: Sequence[int], weights: Sequence[float], seed: int) -> list[tuple[int, int]]:
    """The largest mixture with the proportions `weights` that repeats no record, as (source, record) pairs.

    All records of the scarcest source are used; from the others a share is drawn by `seed`. They are interleaved
    evenly, so every prefix of the mixture has the same proportions, and each source's records stay in order:

        counts 6, 9, weights 0.75, 0.25  →  6 of the first and 2 of the second:  A A B A A A B A

    Raises ArgumentError if a source would contribute no record.
    """
    total = min(count / weight for count, weight in zip(counts, weights, strict=True))
    taken = [min(count, math.floor(total * weight + 1e-9)) for count, weight in zip(counts, weights, strict=True)]
    for number, (size, weight) in enumerate(zip(taken, weights, strict=True), 1):
        if not size:
            raise ArgumentError(
                f"--data_weights: of {total:.0f} records, all that the scarcest source allows, source {number} would "
                f"give none at the weight {weight:.3g}; raise it"
            )
    draws = [
        sorted(random.Random(f"{seed} {number}").sample(range(count), size))
        for number, (count, size) in enumerate(zip(counts, taken, strict=True))
    ]
    places = [
        ((rank + 0.5) / len(drawn), source, index)
        for source, drawn in enumerate(draws)
        for rank, index in enumerate(drawn)
    ]
    return [(source, index) for _, source, index in sorted(places)]


# --- pieces ----------------------------------------------------------------------------------------------------------


def _settle(total: Account, parts: Sequence[Records[Any]]) -> None:
    """Adds up the accounts of several sources in `total`."""
    for account in (part.account for part in parts if part.account is not total):
        total.read, total.kept = total.read + account.read, total.kept + account.kept
        total.sources += [{**about, "read": account.read, "kept": account.kept} for about in account.sources]
        total.leave_out_as(account)


def _entries(given: str, flag: str) -> list[dict[str, Any]]:
    try:
        entries = yaml.safe_load(Path(given).read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ArgumentError(f"{flag} {given}: not valid YAML: {error}") from error
    if not isinstance(entries, list) or not entries:
        raise ArgumentError(f"{flag} {given}: expected a list of sources, each with path, weight, name, max_samples")
    for number, entry in enumerate(entries, 1):
        place = f"{flag} {given}: source {number}"
        if not isinstance(entry, dict) or not isinstance(entry.get("path"), str):
            raise ArgumentError(f"{place}: expected path: …, found {entry!r:.80}")
        if unknown := [key for key in entry if key not in KEYS]:
            raise ArgumentError(f"{place}: unknown key {unknown[0]!r}; known: {', '.join(KEYS)}")
        if not isinstance(entry.get("name", ""), str):
            raise ArgumentError(f"{place}: name must be text, found {entry['name']!r}")
        limit = entry.get("max_samples", -1)
        if not isinstance(limit, int) or isinstance(limit, bool) or (limit < 1 and limit != -1):
            raise ArgumentError(f"{place}: max_samples must be -1 (all) or at least 1, found {limit!r}")
        weight = entry.get("weight")
        if weight is not None and (isinstance(weight, bool) or not isinstance(weight, (int, float))):
            raise ArgumentError(f"{place}: weight must be a number, found {weight!r}")
        if "name" in entry and entry["name"] in (other.get("name") for other in entries[: number - 1]):
            raise ArgumentError(f"{place}: another source has the name {entry['name']!r} already; rename one")
    return entries


def _weights(given: str | None, sources: int) -> Iterator[float | None]:
    if given is None:
        return iter([None] * sources)
    try:
        weights = [float(word) for word in given.split(",")]
    except ValueError:
        raise ArgumentError(f"--data_weights: expected numbers joined by commas, found {given!r}") from None
    if sources < 2:
        raise ArgumentError("--data_weights: weighs several sources, --train_file_dir names one; join them by commas")
    if len(weights) != sources:
        given = f"{len(weights)} weight{'s' * (len(weights) != 1)}"
        raise ArgumentError(f"--data_weights: {given} for the {sources} sources of --train_file_dir")
    return iter(weights)


def _shares(weights: list[float | None], place: str) -> list[float | None]:
    if all(weight is None for weight in weights):
        return weights
    if any(weight is None for weight in weights):
        raise ArgumentError(f"{place}: some sources have a weight and some have none; give all or none of them one")
    if len(weights) < 2:
        raise ArgumentError(f"{place}: a single source needs no weight; leave it out")
    if not all(math.isfinite(weight) and weight > 0 for weight in weights):
        raise ArgumentError(f"{place}: weights must be above 0, found {weights}; leave out what is not wanted")
    return [weight / sum(weights) for weight in weights]


def _names(entries: list[dict[str, Any]]) -> list[str]:
    """Each source's own name, else its last folder's or file's name if that is unique, else its path."""
    short = [entry.get("name") or Path(entry["path"]).name or entry["path"] for entry in entries]
    long = [entry.get("name") or entry["path"] for entry in entries]
    return short if len(set(short)) == len(short) else long
