import math

import numpy as np
import pytest

from stagewise.training.metrics import language_model_metrics, pair_metrics, perplexity, standard_error


def test_perplexity_is_e_to_the_mean_and_infinite_where_that_overflows():
    assert perplexity(math.log(8)) == pytest.approx(8)
    assert perplexity(0.0) == 1
    assert perplexity(1000.0) == math.inf


def test_standard_error_of_the_mean():
    # deviations ±1.5, ±0.5: variance 5/3, over 4 values
    assert standard_error([1, 2, 3, 4]) == pytest.approx(math.sqrt(5 / 3 / 4))
    assert math.isnan(standard_error([7.0]))


def test_language_model_metrics_weigh_records_by_their_tokens():
    metrics = language_model_metrics(np.array([[6.0, 3.0], [2.0, 1.0], [0.0, 4.0]]))
    assert metrics == {"loss": 1.0, "perplexity": pytest.approx(math.e), "tokens": 8}


def test_pair_metrics_count_a_tie_as_one_half():
    metrics = pair_metrics(np.array([[1.0, 0.0], [2.0, 2.0], [-1.0, 1.0], [3.0, 0.0]]))
    # margins 1, 0, -2, 3
    assert metrics["accuracy"] == pytest.approx(2.5 / 4)
    assert metrics["margin"] == pytest.approx(0.5)
    assert metrics["chosen_reward"] == pytest.approx(1.25)
    assert metrics["rejected_reward"] == pytest.approx(0.75)
    # ln(1 + e^-margin): 0.313262, 0.693147, 2.126928, 0.048587
    assert metrics["loss"] == pytest.approx(0.795481, abs=1e-6)
    # 1, 0.5, 0, 1 around 0.625: squares sum to 0.6875; margins around 0.5: 13
    assert metrics["accuracy_standard_error"] == pytest.approx(math.sqrt(0.6875 / 3 / 4))
    assert metrics["margin_standard_error"] == pytest.approx(math.sqrt(13 / 3 / 4))


def test_pair_metrics_of_an_untrained_dpo_model_are_those_of_chance():
    metrics = pair_metrics(np.zeros((5, 2)))
    assert (metrics["accuracy"], metrics["margin"]) == (0.5, 0)
    assert metrics["loss"] == pytest.approx(math.log(2))


def test_a_very_wrong_pair_does_not_overflow():
    assert pair_metrics(np.array([[0.0, 5000.0], [0.0, 5000.0]]))["loss"] == pytest.approx(5000)
