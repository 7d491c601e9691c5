"""Similarity of an answer to its reference: ROUGE and BLEU, with word segmentation for the record's language.

Chinese has no spaces: it is segmented by jieba and compared by rouge-chinese; other languages use rouge-score. Both
report the F measure. BLEU is kept as counts, which are added over records, so the BLEU of many records is corpus BLEU
and not a mean of sentence scores.
"""

from __future__ import annotations

import importlib.util
import logging
import re
import unicodedata
from functools import cache
from typing import Any

from stagewise.errors import ArgumentError

# Packages by import name -> install name; requirements-evaluation.txt lists them all.
PACKAGES = {"rouge_chinese": "rouge-chinese", "jieba": "jieba", "rouge_score": "rouge-score", "sacrebleu": "sacrebleu"}
INSTALL = "pip install -r requirements-evaluation.txt"
ROUGES = ("rouge1", "rouge2", "rougeL")
BLEU_COUNTS = (
    *("bleu_match_1", "bleu_match_2", "bleu_match_3", "bleu_match_4"),
    *("bleu_total_1", "bleu_total_2", "bleu_total_3", "bleu_total_4", "bleu_answer", "bleu_reference"),
)

_IDEOGRAPH = re.compile(r"[\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003134f]")
_WORD = re.compile(r"[^\W_]+")


def check_packages(packages: dict[str, str], why: str) -> None:
    """Raises an ArgumentError with the missing packages and the command that installs them."""
    missing = [name for module, name in packages.items() if importlib.util.find_spec(module) is None]
    if missing:
        raise ArgumentError(f"{why}: needs {', '.join(missing)}, which {_is(missing)} not installed: {INSTALL}")


def _is(names: list[str]) -> str:
    return "is" if len(names) == 1 else "are"


def language_of(text: str) -> str:
    """`chinese` if a text has more Chinese characters than words in other scripts, else `other`."""
    ideographs = len(_IDEOGRAPH.findall(text))
    return "chinese" if ideographs > len(_WORD.findall(_IDEOGRAPH.sub(" ", text))) else "other"


def words_of(text: str, language: str) -> list[str]:
    """A text's words for ROUGE: lower case, without punctuation."""
    if language != "chinese":
        # A combining mark belongs to the character before it: without its marks a Hindi word falls apart.
        letters = (letter if letter.isalnum() or unicodedata.category(letter)[0] == "M" else " " for letter in text)
        return "".join(letters).lower().split()
    import jieba

    jieba.setLogLevel(logging.WARNING)  # it logs about its dictionary on the first call
    return [word for word in jieba.lcut(text.lower()) if _WORD.search(word)]


def rouge(answer: str, reference: str, language: str) -> dict[str, float]:
    """ROUGE-1, -2 and -L of an answer: F measure, 0 to 1; 0 if either has no word.

    rouge-chinese counts each n-gram once, rouge-score as often as it occurs (Lin 2004).
    """
    answered, expected = words_of(answer, language), words_of(reference, language)
    if not answered or not expected:
        return dict.fromkeys(ROUGES, 0.0)
    if language == "chinese":
        from rouge_chinese import Rouge

        (found,) = Rouge().get_scores(" ".join(answered), " ".join(expected))
        keys = zip(ROUGES, ("rouge-1", "rouge-2", "rouge-l"), strict=True)
        return {name: round(found[key]["f"], 7) for name, key in keys}  # the package adds 1e-8 to the denominator
    found = _rouge_scorer().score(" ".join(expected), " ".join(answered))
    return {name: found[name].fmeasure for name in ROUGES}


@cache
def _rouge_scorer() -> Any:
    from rouge_score.rouge_scorer import RougeScorer

    return RougeScorer(ROUGES, tokenizer=_Spaces())  # its own tokenizer only knows a to z and 0 to 9


class _Spaces:
    """rouge-score's tokenizer for words joined by spaces."""

    def tokenize(self, text: str) -> list[str]:
        return text.split(" ")


def bleu_counts(answer: str, reference: str, language: str) -> dict[str, int]:
    """The counts for BLEU (BLEU_COUNTS): matching and total 1- to 4-grams of the answer, and both lengths.

    Tokens are sacrebleu's: `zh` for Chinese, one per character, else `13a`.
    """
    score = _bleu(language).sentence_score(answer, [reference])
    return dict(zip(BLEU_COUNTS, (*score.counts, *score.totals, score.sys_len, score.ref_len), strict=True))


def bleu(counts: list[float]) -> float:
    """BLEU from 0 to 100, from counts summed over records, in the order of BLEU_COUNTS (Papineni et al. 2002).

    With sacrebleu's default smoothing: the first n-gram length without a match counts half a match, the next one a
    quarter.
    """
    from sacrebleu.metrics import BLEU

    correct, total = [round(n) for n in counts[:4]], [round(n) for n in counts[4:8]]
    return BLEU.compute_bleu(correct, total, round(counts[8]), round(counts[9]), smooth_method="exp").score


@cache
def _bleu(language: str) -> Any:
    from sacrebleu.metrics import BLEU

    return BLEU(tokenize="zh" if language == "chinese" else "13a", effective_order=True)
