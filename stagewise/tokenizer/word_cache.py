"""Each word encoded once: texts are cut where the tokenizer cuts them anyway, and what stands between is remembered.

    "It rained.\\nIt rained hard."  →  "It" " rained" "." "\\nIt" " rained" " hard" "."      " rained" is encoded once

Byte-level tokenizers cut a text with a regular expression before they look for tokens in it, which takes most of their
time. The expressions known here find a cut at each of these places, whatever stands around it, and what they find
before it and behind it is what they find in the two texts alone:

- before white space that begins with a space and stands behind something else: a space is only ever taken together
  with what follows it
- before a mark or a digit of ASCII that stands behind a letter of ASCII: letters are taken together with letters, and
  with at most one other character, in front of them
- before white space that begins with a newline, for GPT-2's expression: others take a newline with marks before it

White space stays together with what follows, which decides how it is cut.
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
# What Llama 3 and Qwen 2 cut with; GPT-2's is built into the ByteLevel of `tokenizers`.
KNOWN = tuple(
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|" + digits + r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
    for digits in (r"\p{N}{1,3}", r"\p{N}")
)
MOST_WORDS, MOST_LETTERS = 1 << 18, 1 << 22  # that are remembered: some 50 MB
PART = 1 << 14  # letters whose words are held at once; of more the processor's own memory holds too little

Encode = Callable[[Sequence[str]], list[array]]


class Words:
    """The token ids of texts, by way of their words.

    Args:
        cut: a pattern of one word, which every text consists of: see word_pattern.
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
        """The words of the text, and empty ones; those of a long text part by part."""
        start = 0
        while len(text) - start > PART:
            # The last word may continue behind the part; an empty one is found behind it.
            words = self._cut.findall(text, start, start + PART)[:-2] or [self._cut.match(text, start)[0]]
            yield words
            start += sum(map(len, words))
        yield self._cut.findall(text, start)

    def _add(self, held: Sequence[tuple[array, list[str]]]) -> None:
        """Adds the ids of words to each array."""
        known = self._known  # stays whole where another thread begins a new one
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
    """Whether white space stays what it is: only NFC may come before, and no added token holds any."""
    if not isinstance(backend.normalizer, (type(None), normalizers.NFC)):
        return False
    return not any(re.search(r"\s", token.content) for token in backend.get_added_tokens_decoder().values())


def word_pattern(backend: Any) -> re.Pattern[str] | None:
    """The pattern of a word of the tokenizer's; None where it is not known to be encoded alike wherever it stands."""
    if not isinstance(backend.model, models.BPE) or backend.model.dropout or not keeps_spaces(backend):
        return None
    spaces = _spaces(backend.pre_tokenizer)
    added = list(backend.get_added_tokens_decoder().values())
    if spaces is None or any(token.lstrip or token.rstrip or token.single_word for token in added):
        return None
    # Added tokens are found first: no cut goes through one.
    within = {mark for token in added for mark in _behind_letters(token.content)}
    marks = re.escape("".join(mark for mark in MARKS if mark not in within))
    word = r"[^\sA-Za-z]*[A-Za-z]*"
    return re.compile(rf"\s*{word}(?:[^\s{marks}]{word}|[^\S{spaces}]\s*{word})*", re.DOTALL)


# --- pieces ----------------------------------------------------------------------------------------------------------


def _spaces(pre_tokenizer: Any) -> str | None:
    """The white space that a word may begin with, in a pattern; None for a pre-tokenizer that is not known."""
    if not isinstance(pre_tokenizer, (pre_tokenizers.ByteLevel, pre_tokenizers.Sequence)):
        return None
    state = json.loads(pre_tokenizer.__getstate__())
    steps = state["pretokenizers"] if state["type"] == "Sequence" else [state]
    steps = [step for step in steps if step["type"] != "Digits"]  # cuts around digits, and nowhere else
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
    """The marks that stand behind a letter in an added token."""
    return {mark for letter, mark in pairwise(token) if LETTERS.match(letter)}
