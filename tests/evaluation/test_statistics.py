"""What evaluation.py computes of words and numbers, by hand and against the packages' own corpus scores."""

import importlib.util
import math

import numpy as np
import pytest

from stagewise.errors import ArgumentError
from stagewise.evaluation import statistics, text_metrics
from stagewise.evaluation.statistics import BENCHMARK_METRICS, SFT_METRICS, differences, measure

PACKAGES = ("rouge_chinese", "jieba", "rouge_score", "sacrebleu")
pytestmark = pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in PACKAGES),
    reason="needs packages: pip install -r requirements-evaluation.txt",
)


# ── words ───────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("answer", "reference", "one", "two", "longest"),
    [
        # precision 3/3, recall 3/6; of pairs 2/2 and 2/5
        ("the cat sat", "the cat sat on the mat", 2 / 3, 4 / 7, 2 / 3),
        ("The cat, SAT!", "the cat sat on the mat.", 2 / 3, 4 / 7, 2 / 3),
        ("the the", "the cat", 1 / 2, 0, 1 / 2),  # "the" stands once in the reference: it counts once
        ("mat the on sat cat the", "the cat sat on the mat", 1, 0, 1 / 2),  # three stand in order: "the cat the"
        ("un café noir", "un café", 4 / 5, 2 / 3, 4 / 5),
        ("हिन्दी में", "में हिन्दी", 1, 0, 1 / 2),  # two words, whose marks are no letters
        ("", "anything", 0, 0, 0),
        ("…", "anything", 0, 0, 0),
    ],
)
def test_rouge_of_languages_with_spaces(answer, reference, one, two, longest):
    found = text_metrics.rouge(answer, reference, "other")
    assert found == pytest.approx({"rouge1": one, "rouge2": two, "rougeL": longest})


@pytest.mark.parametrize(
    ("answer", "reference", "one", "two", "longest"),
    [
        # one of one word, one of four
        ("多喝水", "感冒了要多喝水", 2 / 5, 0, 2 / 5),
        # 感冒 了 要 休息 and 感冒 了 要 多喝水: three of four words, two of three pairs
        ("感冒了,要休息。", "感冒了要多喝水", 3 / 4, 2 / 3, 3 / 4),
        ("休息", "多喝水", 0, 0, 0),
    ],
)
def test_rouge_of_chinese(answer, reference, one, two, longest):
    assert text_metrics.words_of("感冒了,要多喝水!", "chinese") == ["感冒", "了", "要", "多喝水"]
    found = text_metrics.rouge(answer, reference, "chinese")
    assert found == pytest.approx({"rouge1": one, "rouge2": two, "rougeL": longest}, abs=1e-6)


def test_rouge_is_that_of_the_packages_called_directly():
    from rouge_chinese import Rouge
    from rouge_score.rouge_scorer import RougeScorer

    random, names = np.random.default_rng(7), ["rouge1", "rouge2", "rougeL"]
    english, chinese = ["the", "cat", "sat", "on", "mat", "red"], ["猫", "坐", "在", "红色", "垫子", "上面"]
    for _ in range(20):
        answer, reference = (" ".join(random.choice(english, random.integers(3, 9))) for _ in range(2))
        expected = RougeScorer(names).score(reference, answer)
        found = text_metrics.rouge(answer, reference, "other")
        assert found == pytest.approx({name: expected[name].fmeasure for name in names})
        answer, reference = ("，".join(random.choice(chinese, random.integers(3, 9))) for _ in range(2))
        (expected,) = Rouge().get_scores(answer.replace("，", " "), reference.replace("，", " "))
        found = text_metrics.rouge(answer, reference, "chinese")
        parts = zip(names, ("rouge-1", "rouge-2", "rouge-l"), strict=True)
        assert found == pytest.approx({name: expected[part]["f"] for name, part in parts}, abs=1e-6)


@pytest.mark.parametrize(
    ("text", "language"),
    [
        ("多喝水。", "chinese"),
        ("吃 aspirin 可以止痛", "chinese"),
        ("Take 阿司匹林 twice a day with water", "other"),
        ("Drink water.", "other"),
        ("42", "other"),
        ("", "other"),
    ],
)
def test_the_language_of_a_record(text, language):
    assert text_metrics.language_of(text) == language


def test_bleu_by_hand():
    counts = text_metrics.bleu_counts("the cat sat on a mat", "the cat sat on the mat", "other")
    assert list(counts.values()) == [5, 3, 2, 1, 6, 5, 4, 3, 6, 6]
    assert text_metrics.bleu(list(counts.values())) == pytest.approx(100 * (5 / 6 * 3 / 5 * 2 / 4 * 1 / 3) ** 0.25)
    # one character is one token in Chinese; two tokens too few: exp(1 - 8 / 6)
    counts = text_metrics.bleu_counts("多喝水，休息", "要多喝水，多休息", "chinese")
    assert list(counts.values()) == [6, 4, 2, 1, 6, 5, 4, 3, 6, 8]
    expected = 100 * math.exp(1 - 8 / 6) * (6 / 6 * 4 / 5 * 2 / 4 * 1 / 3) ** 0.25
    assert text_metrics.bleu(list(counts.values())) == pytest.approx(expected)


@pytest.mark.parametrize(
    "pairs",
    [
        [("the cat sat on a mat", "the cat sat on the mat"), ("drink some water", "drink a lot of water now")],
        [("rest and drink water", "drink some water"), ("see a doctor", "ask a doctor today")],  # no three in a row
        [("yes", "no"), ("one", "two")],
        [("", "no"), ("yes", "yes")],
    ],
)
def test_bleu_of_many_is_that_of_the_corpus(pairs):
    from sacrebleu import corpus_bleu

    rows = [text_metrics.bleu_counts(*pair, "other") for pair in pairs]
    found = measure(rows, [metric for metric in SFT_METRICS if metric.name == "bleu"])["bleu"]["value"]
    assert found == pytest.approx(corpus_bleu([a for a, _ in pairs], [[r for _, r in pairs]]).score)


def test_a_missing_package_is_named_with_its_command(monkeypatch):
    monkeypatch.setattr(text_metrics.importlib.util, "find_spec", lambda name: None if name == "jieba" else name)
    with pytest.raises(ArgumentError, match="needs jieba, which is not installed: pip install -r requirements-eval"):
        text_metrics.check_packages(text_metrics.PACKAGES, "--test_file")


# ── numbers ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_perplexity_is_of_all_tokens_and_a_mean_of_the_records_that_have_it():
    rows = [{"nll": 2.0, "tokens": 1, "rouge1": 0.5}, {"nll": 4.0, "tokens": 5, "rouge1": None}]
    found = measure(rows, SFT_METRICS)
    assert set(found) == {"perplexity", "rouge1"}
    assert found["perplexity"]["value"] == pytest.approx(math.e)  # (2 + 4) / (1 + 5)
    assert found["rouge1"] == {"value": 0.5, "records": 1}  # one record has no interval


def test_the_interval_is_that_of_a_mean():
    values = np.random.default_rng(1).normal(3, 2, size=400)
    found = measure([{"correct": value} for value in values], BENCHMARK_METRICS)["correct"]
    error = values.std(ddof=1) / 20
    assert found["value"] == pytest.approx(values.mean())
    assert found["low"] == pytest.approx(values.mean() - 1.96 * error, abs=0.3 * error)
    assert found["high"] == pytest.approx(values.mean() + 1.96 * error, abs=0.3 * error)


def test_models_are_compared_on_the_same_records():
    generator = np.random.default_rng(0)
    noise = generator.normal(0, 5, size=50)
    first = {str(n): {"rougeL": float(v), "nll": 10.0 + v, "tokens": 5} for n, v in enumerate(noise)}
    other = {key: {"rougeL": row["rougeL"] + 0.1, "nll": row["nll"], "tokens": 5} for key, row in first.items()}
    other["50"] = {"rougeL": 1000.0, "nll": 1.0, "tokens": 1}  # which the first was not asked
    found = {each.metric.name: each for each in differences(first, other, SFT_METRICS)}
    assert set(found) == {"rougeL", "perplexity"}
    # The records differ by far more than the models do: only in pairs can the difference be seen.
    assert (found["rougeL"].difference, found["rougeL"].low) == pytest.approx((0.1, 0.1))
    assert (found["rougeL"].records, found["rougeL"].verdict) == (50, "better")
    assert found["perplexity"].verdict == "no difference that these records show"


def test_less_perplexity_is_better_and_longer_is_neither():
    first = {str(n): {"nll": 10.0 + n, "tokens": 5, "answer_tokens": 10} for n in range(9)}
    other = {key: {**row, "nll": row["nll"] - 1, "answer_tokens": 12} for key, row in first.items()}
    found = {each.metric.name: each.verdict for each in differences(first, other, SFT_METRICS)}
    assert found == {"perplexity": "better", "answer_tokens": "higher"}


@pytest.mark.parametrize(
    ("difference", "group"),
    [
        (-50, "chosen shorter by 50 or more"),
        (-49, "chosen shorter by 10 to 49"),
        (-10, "chosen shorter by 10 to 49"),
        (-9, "within 9"),
        (9, "within 9"),
        (10, "chosen longer by 10 to 49"),
        (50, "chosen longer by 50 or more"),
    ],
)
def test_pairs_are_grouped_by_length(difference, group):
    assert statistics.length_group(difference) == group


def test_accuracy_by_length():
    rows = [
        {"chosen_tokens": 5, "rejected_tokens": 60, "correct": 0.0, "margin": -1.0},
        {"chosen_tokens": 9, "rejected_tokens": 60, "correct": 1.0, "margin": 2.0},
        {"chosen_tokens": 20, "rejected_tokens": 20, "correct": 1.0, "margin": 3.0},
    ]
    found = statistics.by_length(rows)
    assert list(found) == ["chosen shorter by 50 or more", "within 9"]
    assert found["chosen shorter by 50 or more"]["correct"]["value"] == 0.5
    assert found["within 9"] == {"correct": {"value": 1, "records": 1}, "margin": {"value": 3, "records": 1}}
