import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import binomtest, kstest, wilcoxon

from sst_interp.analyses.statistics.permutation import (
    benjamini_hochberg,
    holm,
    paired_tests,
    rank_biserial,
    sign_flip,
    sign_test,
)


def correlated(rng, questions=30, members=12, strength=0.9):
    """Standard normal values [question, member]; neighbouring members nearly agree."""
    values = rng.normal(size=(questions, members))
    for m in range(1, members):
        values[:, m] = strength * values[:, m - 1] + np.sqrt(1 - strength**2) * values[:, m]
    return values


@pytest.mark.parametrize(
    "p_of",
    [
        lambda rng, s: sign_flip(rng.standard_t(3, size=30), 199, s).p_value,
        lambda rng, s: sign_flip(correlated(rng), 199, s).p_family.min(),
    ],
    ids=["sign", "signs of a family"],
)
def test_without_an_effect_p_values_are_uniform(p_of):
    p = np.array([float(p_of(np.random.default_rng(seed), seed)) for seed in range(400)])
    assert kstest(p, "uniform").pvalue > 0.001
    assert np.mean(p <= 0.05) < 0.09  # 5% nominal; 400 trials have a standard error of 1.1 points
    assert p.min() >= 1 / 200


def test_pairs_as_units_would_not_be_uniform():
    """Why signs are flipped by question: 20 pairs of a question share its level."""
    p = []
    for seed in range(60):
        rng = np.random.default_rng(seed)
        pairs = rng.normal(size=(12, 1)) + 0.3 * rng.normal(size=(12, 20))
        p.append(float(sign_flip(pairs.ravel(), 199, seed).p_value))
    assert np.mean(np.array(p) <= 0.05) > 0.5


def test_a_planted_effect_is_found_where_it_is_and_its_size_is_the_estimate():
    rng = np.random.default_rng(11)
    values = rng.normal(size=(60, 12))
    values[:, 7] += 1.0
    found = sign_flip(values, 999)
    assert found.p_family[7] == pytest.approx(1 / 1000)
    assert (np.delete(found.p_family, 7) > 0.05).all()
    assert np.allclose(found.estimate, values.mean(axis=0))


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10_000), st.floats(0.01, 100), st.integers(2, 15))
def test_units_do_not_matter_and_a_family_only_makes_p_values_larger(seed, factor, questions):
    values = np.random.default_rng(seed).normal(size=(questions, 4))
    found, scaled = sign_flip(values, 99), sign_flip(factor * values, 99)
    assert np.array_equal(found.p_value, scaled.p_value)
    assert (found.p_family >= found.p_value - 1e-12).all()
    assert np.array_equal(found.p_value, sign_flip(-values, 99).p_value)
    assert ((found.p_value > 0) & (found.p_family <= 1)).all()


def test_the_family_takes_part_in_the_adjustment_by_its_correlation():
    """Thirty copies of one test are one test; thirty independent ones are thirty."""
    values = np.random.default_rng(3).normal(loc=0.45, size=(30, 1))
    copies = sign_flip(np.repeat(values, 30, axis=1), 999)
    assert np.allclose(copies.p_family, copies.p_value)
    noise = np.random.default_rng(4).normal(size=(30, 29))
    apart = sign_flip(np.hstack([values, noise]), 999)
    assert apart.p_family[0] > 3 * apart.p_value[0]


def test_what_cannot_be_tested_says_so():
    assert "fewer than two" in sign_flip(np.zeros((0, 3))).reason
    assert "fewer than two" in sign_flip(np.ones((1, 3))).reason
    assert np.isnan(sign_flip(np.zeros((9, 3))).p_value).all()  # no difference at all


def test_a_question_without_a_difference_is_left_out_of_that_member_only():
    values = np.random.default_rng(5).normal(loc=2, size=(12, 3))
    values[4:, 1] = np.nan
    values[:, 2] = np.nan
    found = sign_flip(values, 499)
    assert found.estimate[1] == pytest.approx(values[:4, 1].mean())
    assert np.isnan(found.estimate[2])
    assert np.isnan(found.p_value[2])
    assert np.isfinite(found.p_value[:2]).all()
    assert np.isfinite(found.p_family[:2]).all()


def test_shapes_follow_the_family():
    values = np.random.default_rng(6).normal(size=(10, 4, 3))
    found = sign_flip(values, 99)
    assert found.estimate.shape == found.p_value.shape == found.p_family.shape == (4, 3)
    assert sign_flip(values[:, 0, 0], 99).p_value.shape == ()
    assert np.array_equal(sign_flip(values, 99, seed=1).p_value, sign_flip(values, 99, seed=1).p_value)


def test_holm_is_the_step_down_rule():
    found = holm(np.array([0.01, 0.04, np.nan, 0.03, 0.9]))
    assert np.allclose(found, [0.04, 0.09, np.nan, 0.09, 0.9], equal_nan=True)
    assert holm(np.array([])).size == 0
    assert holm(np.array([0.5, 0.6])).max() <= 1
    assert np.isnan(holm(np.array([np.nan]))).all()


# Each column against a reference


def draws(shift=0.0, questions=24, columns=40, seed=0):
    return shift + np.random.default_rng(seed).normal(size=(questions, columns))


def test_each_column_is_scipys_test_of_that_column():
    values = draws(0.3, columns=5)
    values[:4, 1] = np.nan
    found = paired_tests(values, 0.1)
    for i in range(5):
        own = values[np.isfinite(values[:, i]), i] - 0.1
        assert found["wilcoxon_p"][i] == pytest.approx(wilcoxon(own).pvalue)
        assert found["sign_p"][i] == pytest.approx(binomtest(int((own > 0).sum()), len(own)).pvalue)
        assert found["above"][i] == pytest.approx((own > 0).mean())
        assert found["questions"][i] == len(own)


def test_the_sign_test_is_exact_and_has_nothing_to_say_about_nothing():
    for above in range(9):
        assert sign_test(above, 8 - above) == pytest.approx(binomtest(above, 8).pvalue)
    assert np.isnan(sign_test(0, 0))


def test_without_an_effect_five_percent_are_below_five_percent():
    found = paired_tests(draws(columns=2000))
    assert 0.035 < (found["wilcoxon_p"] < 0.05).mean() < 0.065
    assert (found["sign_p"] < 0.05).mean() < 0.05  # discrete, so conservative


def test_with_control_a_family_without_an_effect_rarely_has_a_finding():
    alarms = [
        [
            (paired_tests(draws(columns=30, seed=s))[f"wilcoxon_{name}"] < 0.05).any()
            for name in ("holm", "bh")
        ]
        for s in range(100)
    ]
    assert (np.mean(alarms, axis=0) < 0.12).all()  # 5% nominal, 100 families
    uncontrolled = [(paired_tests(draws(columns=30, seed=s))["wilcoxon_p"] < 0.05).any() for s in range(20)]
    assert np.mean(uncontrolled) > 0.4


def test_a_planted_effect_is_in_its_columns_only():
    values = draws(questions=60)
    values[:, :5] += 2
    found = paired_tests(values)
    assert (found["wilcoxon_holm"][:5] < 1e-6).all()
    assert (found["effect"][:5] > 0.9).all()
    assert (found["wilcoxon_holm"][5:] > 0.05).all()


def test_the_effect_size_is_1_if_all_are_above_and_changes_its_sign_with_the_data():
    values = draws(0.2)
    assert np.allclose(rank_biserial(-values), -rank_biserial(values))
    assert (rank_biserial(np.abs(values)) == 1).all()
    assert rank_biserial(np.array([[1.0], [-1.0], [2.0], [-2.0]]))[0] == 0
    assert np.isnan(rank_biserial(np.zeros((4, 1)))[0])


@settings(max_examples=50, deadline=None)
@given(st.lists(st.one_of(st.floats(0, 1), st.just(float("nan"))), max_size=12))
def test_adjusted_p_values_are_between_the_p_value_and_holms(p_values):
    p = np.array(p_values)
    strict, lenient = holm(p), benjamini_hochberg(p)
    tested = np.isfinite(p)
    assert np.array_equal(np.isfinite(lenient), tested)
    assert (p[tested] <= lenient[tested] + 1e-12).all()
    assert (lenient[tested] <= strict[tested] + 1e-12).all()
    assert (np.diff(lenient[tested][np.argsort(p[tested])]) >= -1e-12).all()


def test_benjamini_and_hochberg_by_hand():
    assert benjamini_hochberg(np.array([0.01, np.nan, 0.04, 0.03])) == pytest.approx(
        [0.03, np.nan, 0.04, 0.04], nan_ok=True
    )


def test_the_order_of_questions_does_not_matter():
    values = draws(0.1, columns=3)
    assert paired_tests(values[::-1]).equals(paired_tests(values))


def test_one_question_ties_nothing_and_no_question_do_not_crash():
    one = paired_tests(draws(questions=1, columns=2))
    assert (one["wilcoxon_p"] == 1).all()
    assert (one["sign_p"] == 1).all()
    values = draws(columns=3)
    values[:, 1], values[:, 2] = 0, np.nan
    found = paired_tests(values)
    assert found["wilcoxon_p"].notna().tolist() == [True, False, False]
    assert found["above"].tolist()[1:] == pytest.approx([0.5, np.nan], nan_ok=True)
    assert found["wilcoxon_holm"][0] == found["wilcoxon_p"][0]
    assert len(paired_tests(np.zeros((0, 2)))) == 2
    assert paired_tests(np.zeros((5, 0))).empty
