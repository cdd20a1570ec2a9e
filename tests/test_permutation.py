import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import kstest, rankdata

from sst_interp.analyses.statistics.permutation import holm, label_permutation, sign_flip
from sst_interp.errors import SSTError


def correlated(rng, questions=30, members=12, strength=0.9):
    """Standard normal values [question, member]; neighbouring members nearly agree."""
    values = rng.normal(size=(questions, members))
    for m in range(1, members):
        values[:, m] = strength * values[:, m - 1] + np.sqrt(1 - strength**2) * values[:, m]
    return values


def labels(rng, questions=30):
    return rng.permutation(np.arange(questions) < questions // 3)


@pytest.mark.parametrize(
    "p_of",
    [
        lambda rng, s: label_permutation(rng.exponential(size=30), labels(rng), 199, s).p_value,
        lambda rng, s: label_permutation(correlated(rng), labels(rng), 199, s).p_family.min(),
        lambda rng, s: sign_flip(rng.standard_t(3, size=30), 199, s).p_value,
        lambda rng, s: sign_flip(correlated(rng), 199, s).p_family.min(),
        lambda rng, s: sign_flip(rng.normal(size=30), 199, s, "greater").p_value,
    ],
    ids=["label", "labels of a family", "sign", "signs of a family", "one side"],
)
def test_without_an_effect_p_values_are_uniform(p_of):
    p = np.array([float(p_of(np.random.default_rng(seed), seed)) for seed in range(400)])
    assert kstest(p, "uniform").pvalue > 0.001
    assert np.mean(p <= 0.05) < 0.09  # 5% nominal; 400 trials have a standard error of 1.1 points
    assert p.min() >= 1 / 200


def test_pairs_as_units_would_not_be_uniform():
    """Why whole questions are relabelled: 20 pairs of a question share its level."""
    p = []
    for seed in range(60):
        rng = np.random.default_rng(seed)
        pairs = rng.normal(size=(12, 1)) + 0.3 * rng.normal(size=(12, 20))
        label = np.repeat(labels(rng, 12), 20)
        p.append(float(label_permutation(pairs.ravel(), label, 199, seed).p_value))
    assert np.mean(np.array(p) <= 0.05) > 0.5


def test_a_planted_effect_is_found_where_it_is_and_its_size_is_the_estimate():
    rng = np.random.default_rng(11)
    values = rng.normal(size=(60, 12))
    values[:, 7] += 1.0
    found = sign_flip(values, 999)
    assert found.p_family[7] == pytest.approx(1 / 1000)
    assert (np.delete(found.p_family, 7) > 0.05).all()
    assert np.allclose(found.estimate, values.mean(axis=0))
    assert found.n_questions == 60

    label = labels(rng, 60)
    goes_with = rng.normal(size=(60, 3)) + label[:, None] * np.array([0.0, 2.0, 0.0])
    by_label = label_permutation(goes_with, label, 999)
    assert by_label.p_family[1] == pytest.approx(1 / 1000)
    assert by_label.p_family[0] > 0.05
    assert by_label.estimate[1] == pytest.approx(np.corrcoef(goes_with[:, 1], label)[0, 1])
    ranked = label_permutation(rankdata(goes_with, axis=0), label, 999)
    assert ranked.p_value[1] == pytest.approx(1 / 1000)


def test_an_alternative_looks_at_one_side():
    above = np.random.default_rng(2).normal(loc=1, size=40)
    assert sign_flip(above, 499, alternative="greater").p_value < 0.01
    assert sign_flip(above, 499, alternative="less").p_value > 0.99
    assert sign_flip(-above, 499, alternative="less").p_value < 0.01
    with pytest.raises(SSTError, match="unknown alternative"):
        sign_flip(above, alternative="larger")


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
    assert np.isnan(label_permutation(np.zeros((0, 2)), np.zeros(0)).p_family).all()
    assert "no spread" in label_permutation(np.random.default_rng(0).normal(size=9), np.ones(9)).reason
    with pytest.raises(SSTError, match="NaN"):
        label_permutation(np.array([1.0, np.nan, 2.0]), np.array([0, 1, 1]))
    with pytest.raises(SSTError, match="labels of shape"):
        label_permutation(np.ones(3), np.ones(4))
    with pytest.raises(SSTError, match="question axis"):
        sign_flip(np.float64(1))


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
