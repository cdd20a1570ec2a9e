import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import binomtest, wilcoxon

from sst_interp.analyses.statistics.permutation import (
    benjamini_hochberg,
    holm,
    paired_tests,
    rank_biserial,
    sign_test,
)


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


def test_a_planted_effect_is_found_in_its_columns_only():
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
