"""Estimates, intervals and divergences against numbers worked out by hand."""

import math

import numpy as np
import pytest

from accuracy.metrics import (
    NextToken,
    estimate,
    kl_divergence,
    paired_difference,
    same_words,
    token_f1,
    wilson_interval,
)


def next_token(probabilities, ids=None):
    ids = range(len(probabilities)) if ids is None else ids
    return NextToken(np.array(list(ids), dtype=np.int32), np.log(np.array(probabilities, dtype=np.float32)))


def test_estimate_is_the_mean_and_its_standard_error():
    found = estimate([1, 0, 1, 1])
    assert (found.mean, found.n) == (0.75, 4)
    assert found.se == pytest.approx(math.sqrt(0.75 * 0.25 / 3))


def test_repeating_each_number_within_its_cluster_adds_no_certainty():
    numbers = [1.0, 0.0, 1.0, 1.0, 0.0]
    twice = [number for number in numbers for _ in range(2)]
    clusters = [index for index in range(5) for _ in range(2)]
    assert estimate(twice, clusters).se == pytest.approx(estimate(numbers).se)
    assert estimate(twice).se < 0.8 * estimate(numbers).se


def test_estimate_refuses_no_numbers_and_missing_clusters():
    with pytest.raises(ValueError, match="at least one"):
        estimate([])
    with pytest.raises(ValueError):
        estimate([1.0, 2.0], [0])


def test_pairing_removes_what_both_share():
    hard = [0, 1] * 20
    assert paired_difference(hard, hard).se == 0
    found = paired_difference([1, *hard[1:]], hard)
    assert found.mean == pytest.approx(1 / 40) and found.low < 0 < found.high


def test_wilson_interval_is_not_empty_where_all_agree():
    low, high = wilson_interval(1.0, 40)
    assert low == pytest.approx(0.912, abs=1e-3) and high == 1.0


def test_kl_of_the_whole_vocabulary():
    p, q = [0.7, 0.2, 0.1], [0.5, 0.25, 0.25]
    expected = sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))
    assert kl_divergence(next_token(p), next_token(q)) == pytest.approx(expected, rel=1e-5)
    assert kl_divergence(next_token(p), next_token(p)) == 0
    shuffled = next_token([0.25, 0.5, 0.25], ids=[2, 0, 1])
    assert kl_divergence(next_token(p), shuffled) == pytest.approx(expected, rel=1e-5)


def test_kl_of_a_part_of_the_vocabulary_puts_the_rest_in_one_bucket():
    p, q = [0.7, 0.2, 0.06, 0.04], [0.5, 0.25, 0.05, 0.2]
    bucket = 0.7 * math.log(0.7 / 0.5) + 0.2 * math.log(0.2 / 0.25) + 0.1 * math.log(0.1 / 0.25)
    found = kl_divergence(next_token(p[:2]), next_token(q[:3]))
    assert found == pytest.approx(bucket, rel=1e-5)
    assert found < kl_divergence(next_token(p), next_token(q))


def test_the_lowest_of_equally_likely_tokens_is_the_top():
    assert next_token([0.2, 0.4, 0.4], ids=[1, 9, 5]).top == 5


def test_words_are_compared_without_case_articles_and_punctuation():
    assert same_words("The Eiffel Tower.", "eiffel tower") and not same_words("Eiffel", "eiffel tower")
    assert token_f1("the tall eiffel tower", "Eiffel Tower") == pytest.approx(0.8)
    assert token_f1("nothing", "Eiffel Tower") == 0
