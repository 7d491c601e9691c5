"""Texts → token ids, many at once, each encoded as the middle of a longer text."""

import copy
import functools
import re
import threading
from array import array
from collections.abc import Sequence
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary, proxy

from tokenizers import decoders

from stagewise.tokenizer.word_cache import WordCache, keeps_spaces, word_pattern

# Texts that a tokenizer may treat specially after a special token, and on which its two interfaces might differ.
PROBES = ("a", " a", "  a", "\na", "\n\n a", "\n", " ", "1", ".", "é", "É a", "中", "🍯", "<", "_a")
# A token of a byte-level vocabulary with white space between two words; these characters stand for tab, newline …
# space.
TWO_WORDS = re.compile("[^ĉĊċČčĠ][ĉĊċČčĠ]+[^ĉĊċČčĠ]")


class Piece(NamedTuple):
    """A text and what precedes it: None at the start of a conversation."""

    text: str
    before: str | None


def pieces_of(texts: Sequence[str]) -> list[Piece]:
    """The texts of one conversation, from its start."""
    return [Piece(text, texts[n - 1] if n else None) for n, text in enumerate(texts)]


class PieceEncoder:
    """Encodes pieces of text without added tokens, each separately, but as the middle of a text.

    Tokenizers treat the start of a text specially (SentencePiece puts a space before it), and some special tokens
    swallow the white space after them. So every piece but the first is encoded with a prefix that is removed again:
    the special token that the piece before ends with, or, if only the start is treated specially, a newline. If the
    tokenizer turns out to need no prefix, none is used.
    """

    def __init__(self, tokenizer: Any):
        self._tokenizer = tokenizer
        self._backend = None
        self._backend = self._find_backend()
        self._own = threading.local()
        pattern = word_pattern(self._backend) if self._backend is not None else None
        self._by_words = WordCache(pattern, self._by_backend) if pattern else self._by_backend
        newline, after_newline, alone = (ids.tolist() for ids in self.encode(["\n", "\na", "a"]))
        treated = after_newline != newline + alone and after_newline[: len(newline)] == newline
        self._middle = ("\n", array("i", newline)) if treated else ("", array("i"))
        self._special = tuple(sorted(filter(str.strip, tokenizer.get_added_vocab()), key=len, reverse=True))
        self._last_letters = {token[-1] for token in self._special}
        self._fronts: dict[str, tuple[str, array]] = {}

    def __call__(self, pieces: Sequence[Piece]) -> list[array]:
        """The ids of every piece; call it with many, so the tokenizer works outside of Python for long."""
        fronts = [self._front(piece.before) for piece in pieces]
        texts = [front + piece.text for piece, (front, _) in zip(pieces, fronts, strict=True)]
        encoded = self.encode(texts)
        for number, (front, front_ids) in enumerate(fronts):
            if front:
                ids, size = encoded[number], len(front_ids)
                whole = ids[:size] == front_ids
                encoded[number] = ids[size:] if whole else self.encode([pieces[number].text])[0]
        return encoded

    def row(self, texts: Sequence[str]) -> list[array]:
        """The ids of each text of one conversation, from its start."""
        return self(pieces_of(texts))

    def encode(self, texts: Sequence[str]) -> list[array]:
        """The ids of whole texts, nothing added."""
        if not texts:
            return []
        if self._backend is None:
            return [array("i", ids) for ids in self._by_tokenizer(texts)]
        # Threads run in parallel only outside of Python: the tokenizer does all the work there.
        return self._by_backend(texts) if hasattr(self._own, "backend") else self._by_words(texts)

    def at_least(self, text: str) -> int:
        """A lower bound for the number of tokens of a text; 0 if the tokenizer allows none."""
        return len(text.encode().split()) if self._words_count else 0

    @functools.cached_property
    def _words_count(self) -> bool:
        """Whether each word between white space has at least one token: bytes are kept, no token spans two words."""
        backend = self._backend
        if backend is None or not isinstance(backend.decoder, decoders.ByteLevel) or not keeps_spaces(backend):
            return False
        return not any(map(TWO_WORDS.search, backend.get_vocab(with_added_tokens=False)))

    def in_thread(self) -> None:
        """Gives the calling thread a copy of the tokenizer's Rust object: threads sharing one wait for its cache."""
        if self._backend is not None:
            self._own.backend = copy.deepcopy(self._backend)

    def _by_backend(self, texts: Sequence[str]) -> list[array]:
        backend = getattr(self._own, "backend", self._backend)
        if backend.padding is not None or backend.truncation is not None:
            self._by_tokenizer([""])  # a call that padded or truncated a batch leaves that set; reset it
        return [array("i", found.ids) for found in backend.encode_batch_fast(texts, add_special_tokens=False)]

    def _by_tokenizer(self, texts: Sequence[str]) -> list[list[int]]:
        return self._tokenizer(list(texts), add_special_tokens=False, verbose=False)["input_ids"]

    def _find_backend(self) -> Any:
        """The tokenizer's Rust object, if calling it directly gives the same ids."""
        backend = getattr(self._tokenizer, "backend_tokenizer", None)
        if not hasattr(backend, "encode_batch_fast"):
            return None
        probes = [*PROBES, "".join(PROBES), "".join(self._tokenizer.all_special_tokens)]
        expected = self._by_tokenizer(probes)
        found = [ids.ids for ids in backend.encode_batch_fast(probes, add_special_tokens=False)]
        return backend if found == expected else None

    def _front(self, before: str | None) -> tuple[str, array]:
        if before is None:
            return "", array("i")
        if before[-1:] in self._last_letters and before.endswith(self._special):
            return self._front_of(next(token for token in self._special if before.endswith(token)))
        return self._middle

    def _front_of(self, special: str) -> tuple[str, array]:
        """The special token to use as a prefix and its ids, or nothing if no text is encoded differently after it."""
        if special not in self._fronts:
            alone, *texts = self.encode([special, *PROBES])
            behind = self.encode([special + probe for probe in PROBES])
            same = all(both == alone + text for both, text in zip(behind, texts, strict=True))
            self._fronts[special] = ("", array("i")) if same else (special, alone)
        return self._fronts[special]


def piece_encoder(tokenizer: Any) -> PieceEncoder:
    """The PieceEncoder of a tokenizer in its current state, cached until tokens are added to it.

    The tokenizer must outlive the result.
    """
    size = len(tokenizer.get_added_vocab())
    known = _KNOWN.get(tokenizer)
    if known is None or known[0] != size:
        known = _KNOWN[tokenizer] = size, PieceEncoder(proxy(tokenizer))
    return known[1]


_KNOWN: WeakKeyDictionary[Any, tuple[int, PieceEncoder]] = WeakKeyDictionary()
