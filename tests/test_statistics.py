import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import norm

from sst_interp.analyses.statistics.bootstrap import (
    Interval,
    bootstrap_ends,
    cluster_bootstrap,
    histogram_quantile,
    none_seen_bound,
    percent_text,
    ratio,
    resample_weights,
    resampled,
    simultaneous_shares,
)
from sst_interp.errors import SSTError


def clustered(rng, questions=40, pairs=50, mean=0.2, concentration=6.0):
    """Per-question (shifted, pairs): each question has its own rate around `mean`."""
    rates = rng.beta(mean * concentration, (1 - mean) * concentration, size=questions)
    sizes = rng.integers(pairs // 2, pairs * 2, size=questions)
    return np.stack([rng.binomial(sizes, rates), sizes], axis=1).astype(float)


def coverage(draw, trials=300):
    rng = np.random.default_rng(5)
    ends = [draw(clustered(rng)) for _ in range(trials)]
    return np.mean([e.low <= 0.2 <= e.high for e in ends])


def test_the_interval_covers_the_truth_as_often_as_it_says():
    # 2,500 trials gave 93.0%; 300 have a standard error of 1.5 points.
    assert 0.90 <= coverage(lambda s: cluster_bootstrap(s, resamples=500)) <= 0.985


def test_resampling_pairs_instead_of_questions_would_be_far_too_narrow():
    def naive(sums):
        shifted, n = sums.sum(axis=0)
        p = shifted / n
        half = 1.96 * math.sqrt(p * (1 - p) / n)
        return Interval(p, p - half, p + half, len(sums))

    assert coverage(naive) < 0.6
    sums = clustered(np.random.default_rng(0))
    honest, short = cluster_bootstrap(sums), naive(sums)
    assert honest.high - honest.low > 2 * (short.high - short.low)


def test_weights_draw_every_question_once_on_average():
    weights = resample_weights(30, 4000, seed=1)
    assert (weights.sum(axis=1) == 30).all()
    assert np.allclose(weights.mean(axis=0), 1, atol=0.1)
    assert np.array_equal(weights, resample_weights(30, 4000, seed=1))
    assert not np.array_equal(weights, resample_weights(30, 4000, seed=2))


def test_the_matrix_product_is_the_ordinary_bootstrap():
    sums = clustered(np.random.default_rng(2), questions=7)
    for total, row in zip(resampled(sums, 20, seed=3), resample_weights(7, 20, seed=3), strict=True):
        assert np.allclose(total, np.repeat(sums, row, axis=0).sum(axis=0))


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 20), st.integers(20, 40)), min_size=2, max_size=12), st.integers(1, 9)
)
def test_a_share_does_not_depend_on_the_order_of_questions_or_the_size_of_a_unit(rows, factor):
    sums = np.array(rows, dtype=float)
    found, scaled = cluster_bootstrap(sums, resamples=50), cluster_bootstrap(factor * sums, resamples=50)
    assert found.low <= found.high
    assert found.estimate == pytest.approx(cluster_bootstrap(sums[::-1], resamples=50).estimate)
    assert (found.low, found.high) == pytest.approx((scaled.low, scaled.high))


def test_identical_questions_leave_no_uncertainty():
    found = cluster_bootstrap(np.tile([3.0, 10.0], (9, 1)))
    assert (found.low, found.estimate, found.high) == pytest.approx((0.3, 0.3, 0.3))


def test_one_question_has_an_estimate_and_a_reason_but_no_interval():
    found = cluster_bootstrap(np.array([[3.0, 10.0]]))
    assert found.estimate == pytest.approx(0.3)
    assert math.isnan(found.low)
    assert math.isnan(found.high)
    assert not found.known
    assert "one question" in found.text(percent=True)


def test_no_question_or_no_pair_is_no_crash():
    assert "no questions" in cluster_bootstrap(np.zeros((0, 2))).text()
    assert "no such pairs" in cluster_bootstrap(np.zeros((3, 2))).text()
    with pytest.raises(SSTError, match="not \\[question, k\\]"):
        cluster_bootstrap(np.zeros(3))


def test_a_group_that_few_questions_have_uses_the_resamples_that_have_it():
    sums = np.zeros((5, 2, 2))
    sums[:, 0] = [1, 2]
    sums[0, 1] = [1, 1]  # only question 0 reaches this position
    estimate, low, high = bootstrap_ends(sums, ratio, 200)
    assert np.allclose([estimate[1], low[1], high[1]], 1)
    sums[0, 1] = 0
    assert np.isnan(bootstrap_ends(sums, ratio, 200)[1][1])


def test_the_median_of_a_histogram_is_within_a_bin_of_the_median():
    rng = np.random.default_rng(4)
    values, edges = rng.normal(size=5001), np.linspace(-6, 6, 601)
    counts = np.histogram(values, edges)[0]
    for q in (0.1, 0.5, 0.9):
        assert histogram_quantile(counts, edges, q) == pytest.approx(np.quantile(values, q), abs=0.02)
    assert np.isnan(histogram_quantile(np.zeros(600), edges, 0.5))


def test_none_in_n_questions_still_bounds_the_share():
    assert none_seen_bound(59) == pytest.approx(0.05, abs=0.001)
    assert none_seen_bound(0) == 1


def test_a_small_share_is_never_shown_as_none_or_all():
    assert percent_text(0) == "0.0%"
    assert percent_text(2e-5) == "0.002%"
    assert percent_text(0.9999) == "99.99%"
    assert percent_text(0.99999999) != "100%"
    assert percent_text(1.0) == "100.0%"


def test_the_draws_are_made_once_and_nobody_can_change_them():
    weights = resample_weights(12, 100, seed=3)
    assert resample_weights(12, 100, seed=3) is weights
    with pytest.raises(ValueError, match="read-only"):
        weights[0, 0] = 5


def family(rng, questions, members=12, pairs=16):
    """Per-question counts [question, member, 2] of a family whose members are correlated, and its rates."""
    rates = 0.15 * (1 + 0.6 * np.sin(np.arange(members)))
    effect = 0.7 * rng.normal(size=(questions, 1)) + 0.5 * rng.normal(size=(questions, members))
    each = norm.cdf(norm.ppf(rates) * np.sqrt(1 + 0.74) + effect)
    return np.stack([rng.binomial(pairs, each), np.full(each.shape, pairs)], axis=-1), rates


def test_a_simultaneous_band_holds_everywhere_at_once_and_single_intervals_do_not():
    rng = np.random.default_rng(7)
    together = alone = 0
    for _ in range(150):
        counts, rates = family(rng, 60)
        _, low, high = simultaneous_shares(counts, resamples=300)
        together += ((low <= rates) & (rates <= high)).all()
        _, low, high = bootstrap_ends(counts, resamples=300)
        alone += ((low <= rates) & (rates <= high)).all()
    assert 0.87 <= together / 150 <= 0.995  # 95% nominal; the standard error is 1.8 points
    assert alone / 150 < 0.75


def test_a_band_of_one_member_is_close_to_its_interval():
    counts, _ = family(np.random.default_rng(8), 100, members=1)
    share, low, high = simultaneous_shares(counts)
    single = cluster_bootstrap(counts[:, 0])
    assert share[0] == pytest.approx(single.estimate)
    assert (low[0], high[0]) == pytest.approx((single.low, single.high), abs=0.01)


def test_a_band_stays_between_0_and_1_and_where_there_are_pairs():
    counts = np.zeros((20, 4, 2))
    counts[..., 1] = 10
    counts[:, 1, 0] = 10  # all
    counts[0, 2, 0] = 10  # those of one question
    counts[:, 3] = 0  # no pairs
    share, low, high = simultaneous_shares(counts)
    assert np.allclose(share[:3], [0, 1, 0.05])
    assert (low[:2] == share[:2]).all()
    assert (high[:2] == share[:2]).all()
    assert 0 <= low[2] < 0.05 < high[2] <= 1
    assert np.isnan([share[3], low[3], high[3]]).all()
    assert np.isnan(simultaneous_shares(counts[:1])[1]).all()
    assert simultaneous_shares(np.zeros((0, 3, 2)))[0].shape == (3,)
