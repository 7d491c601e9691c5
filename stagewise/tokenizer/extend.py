"""New pieces added after a tokenizer's own, so that encoding uses them and everything else stays the same.

A tokenizer is its tokenizer.json, as a dict. Old ids never change; new ones follow the highest id in use.

byte-level BPE       a piece is built by merges after the old ones, from old pieces and new parts
    SentencePiece BPE    the same; a character that was spelled in bytes first becomes a piece of its own
    unigram              a piece gets a score just above the best segmentation into existing pieces

Merges run in the order of their rank, so the old ones are applied completely first, and a new merge only ever makes a
new piece. A text without a new piece is therefore encoded as before; with scores the same holds, since a piece that
does not occur is on no path.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

from tokenizers import Tokenizer

from stagewise.errors import VocabularyError
from stagewise.tokenizer.vocabulary_files import BYTES, Writing

MARGIN = 0.01  # margin by which a unigram piece beats the pieces it replaces
UNKNOWN_PENALTY = 10.0  # score of an unknown character below the lowest score, in SentencePiece and `tokenizers`
HERE, CUT, ADDED, UNREACHED = (
    "is one piece already",
    "is cut by the tokenizer before pieces are looked up",
    "holds one of the tokenizer's added tokens",
    "its parts join to old pieces that the tokenizer does not make here",
)


# ----------------------------------------------------------------------------------------------------------- models


@dataclass
class Extension:
    """A tokenizer with new pieces.

    `new` and `parts` map pieces, in the vocabulary's spelling, to ids; parts are intermediate results of merges to a
    new piece. `replaced[id]` are the old ids that the piece was encoded as before.
    """

    data: dict[str, Any]
    new: dict[str, int]
    parts: dict[str, int]
    left_out: dict[str, list[str]]
    replaced: dict[int, list[int]] = field(default_factory=dict)


class Merges:
    """BPE: vocabulary and merges, which grow."""

    def __init__(self, model: dict[str, Any], first_id: int, byte_level: bool):
        self.vocab: dict[str, int] = model["vocab"]
        self.merges = [tuple(m.split(" ", 1)) if isinstance(m, str) else tuple(m) for m in model["merges"]]
        self.ranks = {pair: rank for rank, pair in enumerate(self.merges)}
        self.made: dict[str, int] = {}
        self.next_id, self.byte_level = first_id, byte_level

    def split(self, piece: str) -> list[str]:
        """The pieces that merging makes of one word: lowest rank first, then leftmost."""
        symbols = list(piece)
        while len(symbols) > 1:
            ranks = [self.ranks.get(pair, math.inf) for pair in pairwise(symbols)]
            if (lowest := min(ranks)) == math.inf:
                break
            place = ranks.index(lowest)
            symbols[place : place + 2] = [symbols[place] + symbols[place + 1]]
        return symbols

    def add(self, piece: str) -> bool:
        """Adds the piece and its merges; False, with nothing changed, if only old pieces could be made."""
        names, pairs = len(self.made), len(self.merges)
        for letter in dict.fromkeys(piece):
            self._name(letter)
        while len(symbols := self.split(piece)) > 1:
            places = [i for i, pair in enumerate(pairwise(symbols)) if not self._is_old("".join(pair))]
            if not places:
                self._undo(names, pairs)
                return False
            at = min(places, key=lambda i: (self._preference(piece, symbols, i), i))
            self._name(symbols[at] + symbols[at + 1])
            self._join(symbols[at], symbols[at + 1])
        return True

    def _undo(self, names: int, pairs: int) -> None:
        for piece in list(self.made)[names:]:
            del self.made[piece], self.vocab[piece]
            self.next_id -= 1
        for pair in self.merges[pairs:]:
            del self.ranks[pair]
        del self.merges[pairs:]

    def _is_old(self, piece: str) -> bool:
        return piece in self.vocab and piece not in self.made

    def _preference(self, piece: str, symbols: Sequence[str], at: int) -> int:
        """Existing pieces before new ones; then characters are combined before words."""
        if symbols[at] + symbols[at + 1] in self.made:
            return 0
        border = piece[sum(map(len, symbols[: at + 1]))]
        inside = self.byte_level and BYTES[border] & 0xC0 == 0x80  # a byte that continues a character
        return 1 if inside else 2

    def _name(self, piece: str) -> None:
        if piece not in self.vocab:
            self.vocab[piece] = self.made[piece] = self.next_id
            self.next_id += 1

    def _join(self, left: str, right: str) -> None:
        if (left, right) not in self.ranks:
            self.ranks[left, right] = len(self.merges)
            self.merges.append((left, right))

    def finish(self) -> dict[str, Any]:
        """Adds every other merge that makes a new piece: a word's context decides how it is merged."""
        for piece in self.made:
            for cut in range(1, len(piece)):
                if piece[:cut] in self.vocab and piece[cut:] in self.vocab:
                    self._join(piece[:cut], piece[cut:])
        return {"vocab": self.vocab, "merges": [list(pair) for pair in self.merges]}


class Scores:
    """Unigram: pieces with log-probabilities, which grow; a piece's id is its index."""

    def __init__(self, model: dict[str, Any], first_id: int, byte_level: bool):
        self.listed: list[tuple[str, float]] = [(piece, score) for piece, score in model["vocab"]]
        self.scores = dict(self.listed)
        # An unknown character's score depends on the lowest one, which therefore has to stay.
        self.lowest = min(self.scores.values())
        self.longest = max(map(len, self.scores))
        self.made: dict[str, int] = {}

    def best(self, piece: str) -> float:
        """The score of the best segmentation into existing pieces."""
        sums = [0.0] + [-math.inf] * len(piece)
        for end in range(1, len(piece) + 1):
            sums[end] = sums[end - 1] + self.lowest - UNKNOWN_PENALTY
            for start in range(max(0, end - self.longest), end):
                score = self.scores.get(piece[start:end])
                if score is not None:
                    sums[end] = max(sums[end], sums[start] + score)
        return sums[-1]

    def add(self, piece: str) -> bool:
        """Gives the piece its score; always True."""
        if piece not in self.scores:
            score = max(self.lowest, self.best(piece) + MARGIN)
            self.made[piece] = len(self.listed)
            self.scores[piece] = score
            self.listed.append((piece, score))
            self.longest = max(self.longest, len(piece))
        return True

    def finish(self) -> dict[str, Any]:
        return {"vocab": [list(pair) for pair in self.listed]}


# --------------------------------------------------------------------------------------------------------- extending


def extend(data: dict[str, Any], texts: Iterable[str], limit: int | None = None) -> Extension:
    """Adds each text as a piece, in order; the same input gives the same ids.

    Args:
        data: a tokenizer.json; it is not changed.
        texts: a text with a leading space is the piece for a word after a space.
        limit: stop after this many new pieces, parts not counted.

    Raises:
        VocabularyError: for a kind of tokenizer that cannot be extended.
    """
    data = deepcopy(data)
    model, writing = data["model"], Writing(data)
    first_id = _fill(data)
    before = _bare(data)
    grown = {"BPE": Merges, "Unigram": Scores}[model["type"]](deepcopy(model), first_id, writing.byte_level)
    added = [token["content"] for token in data["added_tokens"]]
    new: dict[str, int] = {}
    left_out: dict[str, list[str]] = {}
    for text in texts:
        if limit is not None and len(new) >= limit:
            break
        words = writing.words(text)
        reason = ADDED if any(token in text for token in added) else CUT if len(words) != 1 else None
        if reason is None and words[0] in new:
            continue  # another text with the same normalized form
        if reason is None and words[0] not in grown.made and _known(grown, words[0]):
            reason = HERE
        if reason is None and not grown.add(words[0]):
            reason = UNREACHED
        if reason:
            left_out.setdefault(reason, []).append(text)
        else:
            new[words[0]] = grown.made[words[0]]
    model |= grown.finish()
    parts = {piece: number for piece, number in grown.made.items() if piece not in new}
    after = _bare(data)
    for piece, number in new.items():
        if (found := after.encode(piece, add_special_tokens=False).ids) != [number]:
            raise VocabularyError(f"the new piece {piece!r} (id {number}) is encoded as {found}: nothing was written")
    replaced = {n: before.encode(piece, add_special_tokens=False).ids for piece, n in grown.made.items()}
    return Extension(data, new, parts, left_out, replaced)


def _known(grown: Merges | Scores, piece: str) -> bool:
    return piece in (grown.vocab if isinstance(grown, Merges) else grown.scores)


def _fill(data: dict[str, Any]) -> int:
    """Writes the added tokens into the vocabulary at their own ids; returns the first free id.

    An added token that is missing from the vocabulary is numbered after it on reading: with a longer vocabulary it
    would get another id.

    Raises:
        VocabularyError: for a kind of tokenizer that cannot be extended.
    """
    model, kind = data["model"], data["model"]["type"]
    if kind not in ("BPE", "Unigram"):
        raise VocabularyError(f"--model_name_or_path: a {kind} tokenizer; only BPE and unigram can be extended")
    marks = [name for name in ("continuing_subword_prefix", "end_of_word_suffix") if model.get(name)]
    if marks:
        raise VocabularyError(f"--model_name_or_path: its BPE marks words by {marks[0]}, which cannot be extended")
    added = {token["id"]: token["content"] for token in data["added_tokens"]}
    if kind == "BPE":
        for number, content in sorted(added.items()):
            model["vocab"].setdefault(content, number)
        return max(model["vocab"].values()) + 1
    lowest = min(score for _, score in model["vocab"])
    for number in range(len(model["vocab"]), max(added, default=-1) + 1):
        model["vocab"].append([added.get(number, f"<|unused_{number}|>"), lowest])
    return len(model["vocab"])


def _bare(data: dict[str, Any]) -> Tokenizer:
    """The model alone, which takes a word in the vocabulary's spelling."""
    around = ("normalizer", "pre_tokenizer", "post_processor", "decoder", "truncation", "padding")
    return Tokenizer.from_str(json.dumps({**data, **dict.fromkeys(around), "added_tokens": []}))
