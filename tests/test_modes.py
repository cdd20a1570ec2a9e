"""The antimode's depth, and the level of the test. More on the count of modes: test_overlap.py."""

import numpy as np
import pytest
from synthetic import Planted, pairs_table

from sst_interp.analyses.statistics.modes import (
    BINS,
    find_modes,
    grid,
    question_histograms,
    smoothing,
    to_overlap,
)


def histograms_of(table, n=None):
    return question_histograms(
        table["question"].to_numpy(), table["cosine"].to_numpy(float), 1e-3, n or table["question"].max() + 1
    )


def valley(between, questions=60, pairs=200, seed=0):
    """Overlaps with two modes and a share of the pairs spread evenly between and around them."""
    rng = np.random.default_rng(seed)
    overlap = np.where(
        rng.random((questions, pairs)) < 0.5,
        0.9 + 0.02 * rng.normal(size=(questions, pairs)),
        0.3 + 0.06 * rng.normal(size=(questions, pairs)),
    )
    even = rng.uniform(0, 1, size=(questions, pairs))
    # Questions differ in how much of theirs lies in between.
    part = np.clip(between * np.exp(0.4 * rng.normal(size=(questions, 1))), 0, 1)
    overlap = np.where(rng.random((questions, pairs)) < part, even, overlap)
    codes = np.repeat(np.arange(questions), pairs)
    return question_histograms(codes, overlap.ravel(), 1e-3, questions)


def test_the_depth_falls_as_the_valley_is_filled():
    found = [find_modes(valley(between), 1e-3, resamples=300) for between in (0.0, 0.2, 0.5, 0.8)]
    depths = [modes.depth for modes in found]
    assert depths == sorted(depths, reverse=True)
    assert depths[0] > 0.99
    for modes in found:
        assert modes.depth_interval.estimate == modes.depth
        assert 0 <= modes.depth_interval.low <= modes.depth <= modes.depth_interval.high <= 1
    assert found[1].depth_interval.low > found[3].depth_interval.high


def test_the_interval_of_the_depth_holds_the_depth_of_very_many_questions():
    truth = find_modes(valley(0.3, questions=2000, seed=99), 1e-3, resamples=10).depth
    inside = 0
    for seed in range(40):
        interval = find_modes(valley(0.3, questions=40, seed=seed), 1e-3, resamples=300).depth_interval
        inside += interval.low <= truth <= interval.high
    assert inside >= 33  # 95% nominal


def test_one_hump_has_no_depth_and_few_questions_no_interval():
    one = find_modes(histograms_of(pairs_table(planted=Planted(share=0))), 1e-3, resamples=200)
    assert one.depth == 0
    assert one.depth_interval.high == 0
    assert find_modes(histograms_of(pairs_table(questions=4)), 1e-3).depth_interval is None


def test_questions_without_a_pair_change_nothing_but_the_draws():
    histograms = histograms_of(pairs_table(seed=3))
    padded = np.vstack([histograms, np.zeros((6, BINS))])
    one, more = find_modes(histograms, 1e-3, resamples=300), find_modes(padded, 1e-3, resamples=300)
    assert one.depth == pytest.approx(more.depth)
    assert one.two == more.two


def test_smoothing_keeps_the_pairs_and_is_made_once():
    kernel = smoothing(1e-3)
    assert kernel is smoothing(1e-3)
    assert np.allclose(kernel.sum(axis=1), 1)
    assert not kernel.flags.writeable
    assert smoothing(1e-3, 0.1) is not kernel


def test_the_grid_runs_from_one_to_minus_one():
    edges = to_overlap(grid(1e-3), 1e-3)
    assert edges[0] == pytest.approx(1)
    assert edges[-1] == pytest.approx(-1)
    assert (np.diff(edges) < 0).all()


def shared_noise(seed, questions):
    """One mode, and at a fifth of the positions noise that all eight layers share: clumps of eight pairs."""
    rng = np.random.default_rng(seed)
    shape = questions, 16, 8
    calm = 0.003 * np.exp(0.5 * rng.normal(size=shape))
    far = np.clip(rng.random((questions, 16, 1)) + 0.03 * rng.normal(size=shape), 0, 1)
    u = np.where(rng.random((questions, 16, 1)) < 0.2, far, calm)
    return question_histograms(np.repeat(np.arange(questions), 128), 1 - u.ravel(), 1e-3, questions)


def test_clumps_of_layers_are_rarely_a_second_mode():
    """The depth of the deepest dip as the statistic called 17% to 27% of these two-moded."""
    found = [find_modes(shared_noise(seed, 40), 1e-3, resamples=300) for seed in range(60)]
    assert sum(modes.two for modes in found) <= 7  # 5% nominal; 8 or more has probability 1.2%
    assert np.median([modes.depth for modes in found]) > 0.3  # deep, but hardly anything is missing
    assert np.median([modes.missing for modes in found]) < 0.02


def test_what_is_missing_is_about_the_smaller_mode():
    for share in (0.05, 0.14, 0.3):
        table = pairs_table(60, 16, 8, planted=Planted(share=share, question_spread=0.3), seed=1)
        modes = find_modes(histograms_of(table), 1e-3, resamples=300)
        assert modes.two
        assert 0.5 * share < modes.missing < share
