"""One mode or two: valleys of a density, the antimode's depth, and the level of the test."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from synthetic import Planted, pairs_table

from sst_interp.analyses.statistics.modes import (
    BINS,
    find_modes,
    grid,
    largest_valley,
    missing_mass,
    one_moded,
    question_histograms,
    smoothing,
    to_overlap,
    to_v,
    water_level,
)


def modes_of(table, **options):
    return find_modes(histograms_of(table), 1e-3, resamples=400, **options)


def with_distance(u, questions=24):
    """A table whose 1 - overlap is `u` [question, ...]."""
    table = pairs_table(questions, 16, 8)
    return table.assign(cosine=(1 - u.ravel()).astype("float32"))


def test_two_planted_modes_are_found_with_the_antimode_between_them():
    for seed in range(3):
        modes = modes_of(pairs_table(planted=Planted(share=0.14, stable=0.003, shifted=0.5), seed=seed))
        assert modes.two
        assert 0.7 < modes.antimode.low <= modes.antimode.estimate <= modes.antimode.high < 0.98
        high, low = modes.at
        assert high > 0.99
        assert low == pytest.approx(0.53, abs=0.1)
        assert modes.p_value < 0.05


def heavy_tail(rng):
    """Weibull distances with shape 0.5: one mode at 1 and a tail down to overlap 0, by question."""
    scale = 0.02 * np.exp(0.4 * rng.normal(size=(24, 1)))
    return np.minimum(scale * rng.exponential(size=(24, 128)) ** 2, 2)


def power_tail(rng):
    return np.minimum(0.01 * np.exp(1.2 * rng.normal(size=(24, 128)) + 0.5 * rng.normal(size=(24, 1))), 2)


def beta_like(rng):
    return 1 - rng.beta(12 * np.exp(0.4 * rng.normal(size=(24, 1))), 0.6, size=(24, 128))


@pytest.mark.parametrize("draw", [heavy_tail, power_tail, beta_like])
def test_one_skewed_mode_is_one_mode(draw):
    found = [modes_of(with_distance(draw(np.random.default_rng(seed)))) for seed in range(10)]
    assert sum(m.two for m in found) == 0
    assert all(m.antimode is None and len(m.at) == 1 for m in found)
    assert all(m.at[0] > 0.98 for m in found)


def test_uniform_noise_below_one_mode_is_not_a_second_mode_though_it_looks_like_one_on_the_log_axis():
    tables = [pairs_table(planted=Planted(share=0.14, uniform=True), seed=s) for s in range(20)]
    assert sum(modes_of(t).two for t in tables) <= 3  # 5% false alarms: 4 or more has probability 1.6%
    assert sum(modes_of(t, coordinate="log").two for t in tables) >= 15


def test_bootstrap_share_alone_would_call_noise_two_modes():
    """Why there is a null: clumps of a few questions persist in resamples of themselves."""
    planted = Planted(share=0.2, uniform=True)
    found = [modes_of(pairs_table(layers=1, planted=planted, seed=s)) for s in range(20)]
    assert sum(m.share_of_resamples >= 0.95 for m in found) >= 15
    assert sum(m.two for m in found) <= 3


def test_mass_at_exactly_one_and_a_mode_below_are_two():
    table = pairs_table(planted=Planted(share=0.2))
    table.loc[table["cosine"] > 0.9, "cosine"] = 1
    modes = modes_of(table)
    assert modes.two
    assert modes.at[0] == pytest.approx(1, abs=1e-3)
    assert 0.6 < modes.antimode.estimate < 1


def test_rounding_near_one_makes_no_modes():
    steps = np.random.default_rng(0).integers(-2, 6, size=(24, 128)) * 2.0**-24
    assert not modes_of(with_distance(steps)).two


def test_too_few_questions_are_not_tested():
    modes = modes_of(pairs_table(questions=4))
    assert modes.antimode is None
    assert "too few questions (4" in modes.reason
    assert np.isnan(modes.p_value)


def test_the_coordinate_and_its_inverse():
    overlap = np.array([1.0, 0.999, 0.5, 0.0, -1.0])
    assert np.allclose(to_overlap(to_v(overlap, 1e-3), 1e-3), overlap)
    assert to_v(np.array(1.0000001), 1e-3) == to_v(np.array(1.0), 1e-3)


def test_the_nearest_one_moded_density_keeps_the_mass_and_has_no_dip():
    rng = np.random.default_rng(1)
    density, width = rng.random(100), rng.random(100)
    flat = one_moded(density, width)
    top = density.argmax()
    assert (np.diff(flat[: top + 1]) >= -1e-12).all()
    assert (np.diff(flat[top:]) <= 1e-12).all()
    assert (flat * width).sum() == pytest.approx((density * width).sum(), rel=0.02)


# How deep the valley is


def histograms_of(table):
    return question_histograms(table["question"].to_numpy(), table["cosine"].to_numpy(float), 1e-3)


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
    assert smoothing(1e-2) is not kernel


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


# Valleys


def test_a_one_moded_density_holds_no_water():
    density = np.array([1.0, 3, 5, 5, 4, 2])
    assert np.array_equal(water_level(density), density)
    found = largest_valley(density, np.ones(6))
    assert (found.depth, found.missing) == (0, 0)


def test_a_valley_by_hand():
    density = np.array([4.0, 1.0, 2.0])
    assert water_level(density).tolist() == [4, 2, 2]
    found = largest_valley(density, np.ones(3))
    assert (found.place, found.depth) == (1, 0.5)
    assert found.missing == pytest.approx(1 / 7)
    wide = largest_valley(density, np.array([1.0, 3.0, 1.0]))
    assert wide.missing == pytest.approx(3 / 9)


def test_the_largest_valley_is_the_one_that_lacks_most_not_the_deepest():
    density = np.array([0.0, 9, 1e-9, 9, 5, 5, 5, 5, 8, 0])
    found = largest_valley(density, np.array([1, 1, 0.1, 1, 1, 1, 1, 1, 1, 1.0]))
    assert found.place in (4, 5, 6, 7)
    assert found.depth == pytest.approx(3 / 8)


def test_two_valleys_are_not_added_up():
    density = np.array([0.0, 5, 2, 5, 3, 5, 0])
    found = largest_valley(density, np.ones(7))
    assert found.place == 2
    assert found.missing == pytest.approx(3 / 20)


def test_a_valley_beyond_one_percent_of_the_pairs_is_none():
    density = np.array([0.004, 0.0, 0.0, 5, 6, 5])
    assert largest_valley(density, np.ones(6)).missing == 0
    assert largest_valley(density + np.array([1, 0, 0, 0, 0, 0]), np.ones(6)).missing > 0


@settings(max_examples=60, deadline=None)
@given(st.lists(st.floats(0, 100), min_size=3, max_size=40), st.floats(0.1, 50))
def test_filling_leaves_one_mode_and_units_do_not_matter(values, factor):
    density = np.array(values)
    level = water_level(density)
    assert (level >= density).all()
    top = level.argmax()
    assert (np.diff(level[: top + 1]) >= 0).all()
    assert (np.diff(level[top:]) <= 0).all()
    width = np.ones(len(density))
    found, scaled = largest_valley(density, width), largest_valley(factor * density, factor * width)
    assert 0 <= found.depth <= 1
    assert scaled.missing == pytest.approx(found.missing)
    mirrored = largest_valley(density[::-1].copy(), width)
    assert mirrored.missing == pytest.approx(found.missing)


def test_many_densities_at_once_are_each_alone():
    densities = np.random.default_rng(0).random((20, 50))
    width = np.random.default_rng(1).random(50)
    together = largest_valley(densities, width)
    for i, density in enumerate(densities):
        alone = largest_valley(density, width)
        assert [float(v) for v in alone] == pytest.approx([float(part[i]) for part in together])
    assert np.allclose(missing_mass(densities, width), together.missing)


def test_small_numbers_survive_single_precision():
    density = np.array([1.0, 1e-9, 1e-12, 1e-9, 2.0], dtype=np.float32)
    found = largest_valley(density, np.ones(5, dtype=np.float32))
    assert found.place == 2


def test_an_empty_density_is_no_crash():
    found = largest_valley(np.zeros((2, 5)), np.ones(5))
    assert np.array_equal(found.missing, [0, 0])
    assert np.array_equal(found.depth, [0, 0])
