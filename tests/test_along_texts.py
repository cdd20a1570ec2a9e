"""Quantities along a text: labels, correlations, profiles over layers, and their nulls."""

import numpy as np
import pandas as pd
import pytest
from scipy.stats import spearmanr
from synthetic import smooth

from sst_interp.analyses.statistics.along_texts import (
    association,
    circular_draws,
    circular_products,
    class_share,
    correlations,
    likeness,
    matched,
    over_questions,
    p_value,
    pair_mean,
    position_share,
    ranks,
)

N, T = 24, 32


def uniform(p_values):
    """Whether p-values look uniform: the share below 5%, 20% and 50%."""
    return [float(np.mean(np.array(p_values) <= level)) for level in (0.05, 0.2, 0.5)]


# What the position accounts for


@pytest.mark.parametrize("planted", [0.0, 0.3, 1.0])
def test_the_share_of_a_planted_position_profile_is_found_without_bias(planted):
    rng = np.random.default_rng(0)
    found, inside = [], 0
    for _ in range(40):
        beta = rng.normal(size=T)
        beta = np.sqrt(planted) * (beta - beta.mean()) / beta.std()
        noise = np.sqrt(1 - planted) * rng.normal(size=(N, T)) * np.sqrt(T / (T - 1))
        share = position_share(3 * rng.normal(size=(N, 1)) + beta + noise, resamples=200).share
        found.append(share.estimate)
        inside += share.low - 1e-9 <= planted <= share.high + 1e-9
    assert np.mean(found) == pytest.approx(planted, abs=0.01)
    assert inside >= 33  # 95% nominal, 40 trials


def test_with_three_questions_and_nothing_there_the_share_is_still_0_on_average():
    rng = np.random.default_rng(1)
    shares = [position_share(smooth(rng, 3, 10), 10).share.estimate for _ in range(120)]
    assert np.mean(shares) == pytest.approx(0, abs=0.06)


def test_its_p_value_is_uniform_for_slow_profiles_that_have_nothing_to_do_with_position():
    rng = np.random.default_rng(2)
    shares = uniform([position_share(smooth(rng, 8, 20), resamples=200).p_circular for _ in range(200)])
    assert shares == pytest.approx([0.05, 0.2, 0.5], abs=0.09)
    profile = smooth(rng, 1, 20)
    assert position_share(profile + smooth(rng, 8, 20)).p_circular < 0.01


def test_questions_levels_and_texts_of_different_length_do_not_matter():
    rng = np.random.default_rng(3)
    x = smooth(rng, 1, T) + smooth(rng, N, T)
    plain = position_share(x, 200)
    lifted = position_share(x + 10 * rng.normal(size=(N, 1)), 200)
    assert lifted.share.estimate == pytest.approx(plain.share.estimate)
    assert lifted.p_circular == plain.p_circular
    x[::2, 20:] = np.nan
    x[:, 5] = np.nan
    found = position_share(x, 200)
    assert 0.2 < found.share.estimate < 0.9
    assert found.p_circular < 0.02


def test_a_class_accounts_for_what_was_planted_and_is_not_paid_for_its_number():
    rng = np.random.default_rng(4)
    shares, none = [], []
    for _ in range(30):
        codes = rng.integers(0, 4, size=(N, T))
        noise = rng.normal(size=(N, T))
        effect = np.array([-1.5, -0.5, 0.5, 1.5])[codes]
        shares.append(class_share(effect + noise, codes, 4, 50))
        none.append(class_share(noise, rng.integers(0, 60, size=(N, T)), 60, 50))
    assert np.mean([s.share.estimate for s in shares]) == pytest.approx(1.25 / 2.25, abs=0.02)
    assert np.mean([s.share.estimate for s in none]) == pytest.approx(0, abs=0.01)
    assert np.mean([s.by_position for s in shares]) == pytest.approx(0, abs=0.02)
    assert all(s.p_circular < 0.03 and s.p_other < 0.03 for s in shares)


def test_a_class_that_only_marks_the_position_does_not_survive_other_questions():
    rng = np.random.default_rng(5)
    codes = np.tile((np.arange(T) < 4).astype(int), (N, 1))
    x = smooth(rng, N, T) + 2 * (np.arange(T) < 4)
    found = class_share(x, codes, 2)
    assert found.share.low > 0.1
    assert found.p_circular < 0.01
    assert found.by_position == pytest.approx(found.share.estimate)
    assert found.p_other == 1


def test_a_class_that_says_nothing_has_uniform_p_values():
    rng = np.random.default_rng(6)
    found = [class_share(smooth(rng, 8, 20), (smooth(rng, 8, 20) > 0) * 1, 2, 200) for _ in range(200)]
    assert uniform([f.p_circular for f in found]) == pytest.approx([0.05, 0.2, 0.5], abs=0.09)
    assert uniform([f.p_other for f in found]) == pytest.approx([0.05, 0.2, 0.5], abs=0.09)


# What goes along a text


def test_correlations_are_those_of_the_common_positions():
    rng = np.random.default_rng(7)
    x, y = rng.normal(size=(2, 5, 30))
    x[1, 20:], y[2, :6], y[3] = np.nan, np.nan, 4.0
    x[4, 5:] = np.nan  # too short
    found = correlations(x, y)
    assert np.isnan(found[:, 3]).all()
    assert np.isnan(found[4]).all()
    for i in range(4):
        for j in (0, 1, 2, 4):
            both = np.isfinite(x[i]) & np.isfinite(y[j])
            assert found[i, j] == pytest.approx(np.corrcoef(x[i, both], y[j, both])[0, 1])
    assert np.allclose(correlations(1e6 + x, 3 * y), found, equal_nan=True, atol=1e-6)


def test_circular_products_are_what_rolling_gives_and_gaps_are_closed():
    rng = np.random.default_rng(8)
    x, y = rng.normal(size=(3, 9)), rng.normal(size=(3, 2, 9))
    x[1, 6:], x[2, 3] = np.nan, np.nan
    sums, lengths = circular_products(x, y)
    assert lengths.tolist() == [9, 6, 8]
    for q in range(3):
        there = np.isfinite(x[q])
        for k in range(2):
            for offset in range(lengths[q]):
                rolled = np.roll(y[q, k, there], -offset)
                assert sums[q, k, offset] == pytest.approx(x[q, there] @ rolled)
    totals, squares = circular_draws(sums, lengths, 50)
    assert totals.shape == squares.shape == (50, 2)
    assert (totals**2 <= 3 * squares + 1e-9).all()


def test_the_rank_correlation_is_the_mean_of_spearmans():
    rng = np.random.default_rng(9)
    x, y = smooth(rng, 2, N, T)
    y[3, 20:] = np.nan
    found = association(x, y, resamples=100)
    expected = [spearmanr(x[q], y[q], nan_policy="omit").statistic for q in range(N)]
    assert found.matched.estimate == pytest.approx(np.mean(expected))
    assert found.matched.n_questions == N
    assert association(x, -y, resamples=100).matched.estimate == pytest.approx(-found.matched.estimate)
    monotonic = association(np.exp(x), y**3, resamples=100)
    assert monotonic.matched.estimate == pytest.approx(found.matched.estimate)


def test_unrelated_quantities_have_uniform_p_values():
    rng = np.random.default_rng(10)
    found = [association(smooth(rng, 8, 20), smooth(rng, 8, 20), 200) for _ in range(200)]
    for name in ("p_circular", "p_other"):
        assert uniform([getattr(f, name) for f in found]) == pytest.approx([0.05, 0.2, 0.5], abs=0.09)
    assert np.mean([f.matched.low <= 0 <= f.matched.high for f in found]) > 0.84  # 8 questions, 95% nominal
    assert np.mean([f.beyond.estimate for f in found]) == pytest.approx(0, abs=0.02)


def test_a_tie_by_content_passes_both_nulls():
    rng = np.random.default_rng(11)
    y = smooth(rng, N, T)
    found = association(0.5 * y + smooth(rng, N, T), y)
    assert found.p_circular < 0.01
    assert found.p_other < 0.01
    assert found.beyond.low > 0.2
    assert abs(found.mismatched) < 0.05


def test_a_tie_by_position_alone_passes_the_circular_null_but_not_the_other():
    rng = np.random.default_rng(12)
    trend = np.linspace(3, -3, T)
    found = association(trend + smooth(rng, N, T), trend + smooth(rng, N, T))
    assert found.matched.low > 0.5
    assert found.p_circular < 0.01
    assert found.p_other > 0.05
    assert found.mismatched == pytest.approx(found.matched.estimate, abs=0.1)
    assert abs(found.beyond.estimate) < 0.1


def test_questions_that_are_too_short_or_never_vary_have_no_correlation():
    rng = np.random.default_rng(13)
    x, y = smooth(rng, 2, 6, 20)
    x[0, 7:], x[1], y[2] = np.nan, 1.0, 0.0
    assert association(x, y, 50).matched.n_questions == 3
    none = association(x[:, :7], y[:, :7], 50)
    assert none.matched.text() == "none (no question has 8 positions over which both vary)"
    assert np.isnan([none.p_circular, none.p_other, none.mismatched]).all()
    one = association(x[3:4], y[3:4], 50)
    assert np.isfinite(one.matched.estimate)
    assert np.isfinite(one.p_circular)
    assert np.isnan(one.p_other)


def test_a_p_value_is_never_0_and_counts_ties():
    assert p_value(np.zeros(99), 1.0) == 0.01
    assert p_value(np.zeros(99), 0.0) == 1
    assert p_value(np.arange(100.0), 95.0, sided=1) == pytest.approx(6 / 101)


def test_the_same_texts_in_a_second_run_are_told_from_others():
    rng = np.random.default_rng(14)
    x = smooth(rng, 1, T) + smooth(rng, N, T)
    again = matched(ranks(x), ranks(x + smooth(rng, N, T)))
    assert again.p_other < 0.01
    assert again.beyond.low > 0.1
    assert np.isnan(again.p_circular)
    unrelated = matched(ranks(x), ranks(smooth(rng, 1, T) + smooth(rng, N, T)))
    assert unrelated.p_other > 0.01


# Profiles over layers


def test_unrelated_profiles_are_unlike_however_few_questions_there_are():
    rng = np.random.default_rng(1)
    values = []
    for _ in range(300):
        products, counts = likeness(rng.normal(size=(4, 1, 10)))
        values.append(pair_mean(np.ones((1, 4)), products, counts)[0])
    assert np.mean(values) == pytest.approx(0, abs=0.03)
    same = np.tile(rng.normal(size=(1, 1, 10)), (4, 3, 1))
    products, counts = likeness(np.exp(same * np.array([1.0, 2, 3])[:, None]))  # only the order counts
    found = over_questions(4, lambda w: pair_mean(w, products, counts))
    assert (found.estimate, found.low, found.high) == pytest.approx((1, 1, 1))


def test_likeness_is_the_mean_of_spearmans_correlation():
    rng = np.random.default_rng(2)
    profiles = rng.normal(size=(5, 3, 9))
    profiles[1, 2, 4] = np.nan  # a profile with a gap
    profiles[3, 0] = 1.0  # one without spread
    products, counts = likeness(profiles)
    expected = []
    for p in range(3):
        rows = [q for q in range(5) if (q, p) not in ((1, 2), (3, 0))]
        table = pd.DataFrame(profiles[rows, p].T).corr("spearman").to_numpy()
        expected += table[np.triu_indices(len(rows), 1)].tolist()
    assert pair_mean(np.ones((1, 5)), products, counts)[0] == pytest.approx(np.mean(expected))


def test_ranks_share_ties_and_skip_gaps():
    found = ranks(np.array([3.0, np.nan, 1.0, 3.0]))
    assert found == pytest.approx([2.5, np.nan, 1, 2.5], nan_ok=True)
