import time

import numpy as np
import pandas as pd
import pytest
from synthetic import Planted, pairs_table

from sst_interp.analyses.overlap import overlap_distribution, overlap_of
from sst_interp.analyses.statistics.modes import find_modes, one_moded, question_histograms, to_overlap, to_v
from sst_interp.errors import SSTError


def modes_of(table, **options):
    histograms = question_histograms(table["question"].to_numpy(), table["cosine"].to_numpy(float), 1e-3)
    return find_modes(histograms, 1e-3, resamples=400, **options)


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


def test_identical_states_are_one_mode_at_one():
    table = pairs_table().assign(cosine=np.float32(1), relative_l2=np.float32(0))
    found = overlap_distribution(table, "replayed")
    assert found.modes.antimode is None
    assert found.modes.at[0] == pytest.approx(1, abs=1e-3)
    assert found.identical == 1
    assert "100.0% bit-identical" in found.verdict


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


def test_overlap_kinds():
    table = pairs_table(questions=2)
    assert np.array_equal(overlap_of(table), table["cosine"].to_numpy(float))
    assert np.allclose(overlap_of(table, "relative_l2"), 1 - table["relative_l2"])
    with pytest.raises(SSTError, match="did not record lens_jaccard"):
        overlap_of(table, "lens_jaccard")
    jaccard = table.assign(lens_jaccard=np.float32(0.5))
    assert (overlap_of(jaccard, "lens_jaccard") == 0.5).all()
    with pytest.raises(SSTError, match="unknown overlap"):
        overlap_of(table, "cosin")


def test_steps_of_the_jaccard_index_are_not_modes():
    kept = np.random.default_rng(0).binomial(100, 0.93, size=(24, 128))
    table = pairs_table().assign(lens_jaccard=(kept / (200 - kept)).ravel().astype("float32"))
    assert not overlap_distribution(table, "replayed", "lens_jaccard", resamples=400).modes.two


def test_comparisons_and_pairs_are_never_pooled():
    table = pairs_table(depths=(2, 4), comparisons=("replayed", "free"))
    found = overlap_distribution(table, "replayed")
    assert (found.a, found.b) == (1, 4)
    assert found.n_pairs == 24 * 16 * 8
    alone = table[(table["comparison"] == "replayed") & (table["b"] == 4)]
    assert found.quantiles.equals(overlap_distribution(alone, "replayed").quantiles)
    categories = table.assign(comparison=pd.Categorical(table["comparison"]))
    assert overlap_distribution(categories, "replayed").n_pairs == found.n_pairs


def test_missing_overlaps_are_counted_and_left_out():
    table = pairs_table()
    table.loc[:9, "cosine"] = np.nan
    found = overlap_distribution(table, "replayed")
    assert found.n_excluded == 10
    assert found.n_pairs == len(table) - 10
    assert "10 without an overlap left out" in found.verdict
    with pytest.raises(SSTError, match="NaN"):
        overlap_distribution(table.assign(cosine=np.nan), "replayed")


def test_a_comparison_without_rows_is_an_error_that_names_it():
    with pytest.raises(SSTError, match="'free'"):
        overlap_distribution(pairs_table(), "free")
    with pytest.raises(SSTError, match="unknown comparison"):
        overlap_distribution(pairs_table(), "fre")


def test_a_million_pairs_take_about_a_second():
    table = pairs_table(questions=200, positions=170, layers=30)
    start = time.perf_counter()
    found = overlap_distribution(table, "replayed")
    assert time.perf_counter() - start < 3  # 0.2 s on an idle machine
    assert found.n_pairs > 1_000_000
    assert found.histograms.sum() == found.n_pairs
