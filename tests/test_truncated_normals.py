import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sst_interp.analyses.statistics.truncated_normals import Axis, fit, likeliest_fit

EDGES = np.linspace(0, 10, 129)
AXIS = Axis((EDGES[1:] + EDGES[:-1]) / 2, np.diff(EDGES))


def counted(values):
    return np.histogram(values, EDGES)[0].astype(float)


def test_a_normal_is_recovered():
    values = np.random.default_rng(0).normal(6, 1, size=20_000)
    found = likeliest_fit(counted(values), AXIS, 1)
    assert found.mean[0] == pytest.approx(6, abs=0.03)
    within = (AXIS.centre > 5) & (AXIS.centre < 7)
    assert found.shares[within].sum() == pytest.approx(0.68, abs=0.02)


def test_a_normal_cut_in_half_keeps_its_mean():
    """Plain EM would put the mean of a half normal at 1.6 instead of 0."""
    values = 2 * np.abs(np.random.default_rng(0).normal(size=50_000))
    found = likeliest_fit(counted(values), AXIS, 1)
    assert abs(found.mean[0]) < 0.6
    assert np.abs(np.cumsum(found.shares) - np.cumsum(counted(values)) / 50_000).max() < 0.01


def test_two_are_recovered_whatever_their_shares():
    rng = np.random.default_rng(1)
    for share in (0.03, 0.3, 0.7):
        far = rng.random(20_000) < share
        values = np.where(far, rng.normal(8, 0.5, 20_000), rng.normal(2, 0.4, 20_000))
        found = likeliest_fit(counted(values), AXIS, 2)
        order = found.mean.argsort()
        assert found.mean[order] == pytest.approx([2, 8], abs=0.1)
        assert found.weights[order] == pytest.approx([1 - share, share], abs=0.01)


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(0, 50), min_size=128, max_size=128), st.integers(1, 2))
def test_a_fit_is_a_distribution(counts, components):
    found = likeliest_fit(np.array(counts, dtype=float), AXIS, components)
    assert found.parts.shape == (components, 128)
    assert np.isfinite(found.parts).all()
    assert (found.parts >= 0).all()
    assert found.shares.sum() == pytest.approx(1)
    assert found.weights.sum() == pytest.approx(1)


def test_two_are_never_less_likely_than_one():
    rng = np.random.default_rng(2)
    counts = np.stack([counted(rng.gamma(k, size=3000)) for k in (1, 2, 5)])
    one, two = (likeliest_fit(counts, AXIS, k).shares for k in (1, 2))
    likelihood = [(counts * np.log(np.maximum(s, 1e-300))).sum(axis=-1) for s in (one, two)]
    assert (likelihood[1] >= likelihood[0] - 1).all()


def test_many_histograms_at_once_are_each_alone():
    rng = np.random.default_rng(3)
    counts = rng.poisson(5, size=(4, 3, 128)).astype(float)
    together = likeliest_fit(counts, AXIS, 2)
    assert together.parts.shape == (4, 3, 2, 128)
    alone = likeliest_fit(counts[2, 1], AXIS, 2)
    assert np.allclose(together.parts[2, 1], alone.parts)
    assert np.allclose(fit(counts, AXIS, np.full((4, 3, 1), 5.0)).shares.sum(axis=-1), 1)
