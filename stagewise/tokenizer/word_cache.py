"""Encodes each word once: texts are split where the tokenizer splits them anyway, and the ids of the words are cached.

    "It rained.\\nIt rained hard."  →  "It" " rained" "." "\\nIt" " rained" " hard" "."      " rained" is encoded once

Byte-level tokenizers split a text with a regular expression before they look for tokens, which takes most of their
time. The expressions known here always split at each of these places, in any context, and the text before and after it
is split as it would be alone:

- before white space that begins with a space and follows something else: a space is only ever matched together
  with what follows it
- before an ASCII punctuation mark or digit that follows an ASCII letter: letters are matched together with letters,
  and with at most one other character before them
- before white space that begins with a newline, for GPT-2's expression: others match a newline with marks before it

White space stays together with what follows, which decides how it is split.
"""

import json
import re
import string
from array import array
from collections.abc import Callable, Iterator, Sequence
from itertools import filterfalse, pairwise
from typing import Any

from tokenizers import models, normalizers, pre_tokenizers

MARKS = string.punctuation + string.digits
LETTERS = re.compile("[A-Za-z]")
# The expressions of Llama 3 and Qwen 2; GPT-2's is built into the ByteLevel of `tokenizers`.
KNOWN = tuple(
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|" + digits + r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
    for digits in (r"\p{N}{1,3}", r"\p{N}")
)
MOST_WORDS, MOST_LETTERS = 1 << 18, 1 << 22  # cached words: some 50 MB
PART = 1 << 14  # characters whose words are processed at a time; more would not fit the processor's cache

Encode = Callable[[Sequence[str]], list[array]]


class WordCache:
    """Maps texts to token ids through a cache of their words.

    Args:
        cut: a pattern of one word; every text is a sequence of words: see word_pattern.
        encode: texts → the ids of each, by the tokenizer.
    """

    def __init__(self, cut: re.Pattern[str], encode: Encode):
        self._cut, self._encode = cut, encode
        self._known: dict[str, bytes] = {}
        self._letters = 0

    def __call__(self, texts: Sequence[str]) -> list[array]:
        """The ids of each text. Threads may call it at the same time."""
        found, held, letters = [array("i") for _ in texts], [], 0
        for ids, text in zip(found, texts, strict=True):
            for words in self._words(text):
                held.append((ids, words))
                letters += min(len(text), PART)
                if letters > PART:
                    self._add(held)
                    held, letters = [], 0
        self._add(held)
        return found

    def _words(self, text: str) -> Iterator[list[str]]:
        """The words of the text, and empty ones; a long text is processed in parts."""
        start = 0
        while len(text) - start > PART:
            # The last word may continue after the part; an empty one follows it.
            words = self._cut.findall(text, start, start + PART)[:-2] or [self._cut.match(text, start)[0]]
            yield words
            start += sum(map(len, words))
        yield self._cut.findall(text, start)

    def _add(self, held: Sequence[tuple[array, list[str]]]) -> None:
        """Appends the ids of words to each array."""
        known = self._known  # stays valid when another thread starts a new one
        new: set[str] = set()
        for _, words in held:
            new.update(filterfalse(known.__contains__, words))
        if new:
            words = list(new)
            known.update(zip(words, map(array.tobytes, self._encode(words)), strict=True))
            self._letters += sum(map(len, words))
        for ids, words in held:
            ids.frombytes(b"".join(map(known.__getitem__, words)))
        if len(known) > MOST_WORDS or self._letters > MOST_LETTERS:
            self._known, self._letters = {}, 0


def keeps_spaces(backend: Any) -> bool:
    """Whether white space is kept: the only normalizer is NFC, and no added token contains white space."""
    if not isinstance(backend.normalizer, (type(None), normalizers.NFC)):
        return False
    return not any(re.search(r"\s", token.content) for token in backend.get_added_tokens_decoder().values())


def word_pattern(backend: Any) -> re.Pattern[str] | None:
    """The pattern of one of the tokenizer's words; None if it is not known that a word is encoded alike in any
    context.
    """
    if not isinstance(backend.model, models.BPE) or backend.model.dropout or not keeps_spaces(backend):
        return None
    spaces = _spaces(backend.pre_tokenizer)
    added = list(backend.get_added_tokens_decoder().values())
    if spaces is None or any(token.lstrip or token.rstrip or token.single_word for token in added):
        return None
    # added tokens are matched first: no split may go through one
    within = {mark for token in added for mark in _behind_letters(token.content)}
    marks = re.escape("".join(mark for mark in MARKS if mark not in within))
    word = r"[^\sA-Za-z]*[A-Za-z]*"
    return re.compile(rf"\s*{word}(?:[^\s{marks}]{word}|[^\S{spaces}]\s*{word})*", re.DOTALL)


# --- pieces ----------------------------------------------------------------------------------------------------------


def _spaces(pre_tokenizer: Any) -> str | None:
    """The white space that a word may begin with, as a pattern; None for an unknown pre-tokenizer."""
    if not isinstance(pre_tokenizer, (pre_tokenizers.ByteLevel, pre_tokenizers.Sequence)):
        return None
    state = json.loads(pre_tokenizer.__getstate__())
    steps = state["pretokenizers"] if state["type"] == "Sequence" else [state]
    steps = [step for step in steps if step["type"] != "Digits"]  # splits around digits, and nowhere else
    if not steps or steps[-1]["type"] != "ByteLevel" or steps[-1]["add_prefix_space"]:
        return None
    *before, last = steps
    if not before and last["use_regex"]:
        return r" \n"
    if len(before) == 1 and not last["use_regex"] and _is_known(before[0]):
        return " "
    return None


def _is_known(step: dict[str, Any]) -> bool:
    return (
        step["type"] == "Split"
        and step["pattern"].get("Regex") in KNOWN
        and step["behavior"] == "Isolated"
        and not step["invert"]
    )


def _behind_letters(token: str) -> set[str]:
    """The marks that follow a letter in an added token."""
    return {mark for letter, mark in pairwise(token) if LETTERS.match(letter)}
