import numpy as np
import pytest
from synthetic import Planted, pairs_table

from sst_interp.analyses.statistics.mixture import away_from_1, coordinate, fit_mixtures
from sst_interp.analyses.statistics.modes import BINS, find_modes, question_histograms


def histograms_of(tables):
    if not isinstance(tables, list):
        tables = [tables]
    return np.stack(
        [question_histograms(t["question"].to_numpy(), t["cosine"].to_numpy(float), 1e-3, 24) for t in tables]
    )


def fits_of(tables, scale="log", resamples=400):
    return fit_mixtures(histograms_of(tables), 1e-3, scale, resamples)


def drawn(**planted):
    return [pairs_table(planted=Planted(**planted), seed=seed) for seed in range(12)]


@pytest.mark.parametrize("scale", ["log", "angle"])
def test_two_planted_components_are_found_where_they_are(scale):
    for fit in fits_of(drawn(share=0.14), scale):
        assert fit.components == 2
        assert fit.centres == pytest.approx((0.997, 0.5), abs=0.03)
        assert sum(fit.weights) + fit.at_one == pytest.approx(1)
        assert fit.weights[1] == pytest.approx(0.14, abs=0.08)  # questions differ
        assert fit.gain.low > 0.2
        assert fit.depth > 0.9


@pytest.mark.parametrize("scale", ["log", "angle"])
@pytest.mark.parametrize("stable", [1e-4, 3e-3, 0.3])
def test_one_spread_is_one_component_wherever_it_lies(stable, scale):
    found = fits_of(drawn(share=0, stable=stable), scale)
    assert sum(fit.components == 2 for fit in found) <= 1
    assert all(fit.depth < 0.05 for fit in found)
    one = next(fit for fit in found if fit.components == 1)
    assert one.centres[0] == pytest.approx(1 - stable, abs=0.2 * stable + 1e-3)


def test_a_small_second_component_is_found():
    found = fits_of(drawn(share=0.04, question_spread=0.3))
    assert sum(fit.components == 2 for fit in found) >= 11
    assert np.mean([fit.weights[-1] for fit in found]) == pytest.approx(0.04, abs=0.015)


def test_a_mass_at_1_is_not_a_component():
    """Without a mass of its own, the identical pairs and one spread would be two components."""
    found = fits_of(drawn(share=0, stable=0.05, identical=0.4))
    assert all(fit.components == 1 for fit in found)
    assert np.mean([fit.at_one for fit in found]) == pytest.approx(0.4, abs=0.03)
    three = fits_of(drawn(share=0.3, stable=0.01, identical=0.4))
    assert all(fit.components == 2 for fit in three)
    assert all(fit.at_one > 0.2 for fit in three)


def test_noise_spread_evenly_is_a_component_but_no_mode():
    tables = drawn(share=0.14, uniform=True)
    found = fits_of(tables)
    assert all(fit.components == 2 for fit in found)
    assert sum(find_modes(h, 1e-3, resamples=200).two for h in histograms_of(tables)) <= 2


def test_what_one_question_does_is_no_component():
    """It is 4% of the pairs, and all others are predicted better if it has a component of its own."""
    table = pairs_table(planted=Planted(share=0))
    table.loc[table["question"] == 5, "cosine"] -= np.float32(0.5)
    fit = fits_of(table)[0]
    assert fit.gain.low > 0.05
    assert fit.spread == pytest.approx(1, abs=0.2)
    assert fit.components == 1
    table.loc[table["question"] < 5, "cosine"] -= np.float32(0.5)
    assert fits_of(table)[0].spread == pytest.approx(6, abs=0.5)
    assert fits_of(table)[0].components == 2


def test_distributions_are_fitted_alone_though_together():
    tables = drawn(share=0.14)[:3]
    together, alone = fits_of(tables)[1], fits_of(tables[1])[0]
    assert together.components == alone.components
    assert together.gain.estimate == pytest.approx(alone.gain.estimate)
    assert together.centres == pytest.approx(alone.centres)
    assert together.weights == pytest.approx(alone.weights)


def test_an_empty_one_a_calm_one_and_few_questions_say_so():
    empty = np.zeros((1, 24, BINS))
    calm = np.zeros((1, 24, BINS))
    calm[..., 0] = 9
    few = histograms_of(pairs_table(seed=1))
    few[:, 5:] = 0
    for histograms, reason in (
        (empty, "no pairs"),
        (calm, "told from overlap 1"),
        (few, "too few questions"),
    ):
        fit = fit_mixtures(histograms, 1e-3)[0]
        assert fit.components == 0
        assert reason in fit.reason
        assert fit.centres == ()
        assert np.isnan(fit.gain.estimate)
    assert fit_mixtures(calm, 1e-3)[0].at_one == 1
    assert fit_mixtures(histograms_of(pairs_table(seed=1))[:, :1], 1e-3)[0].components == 0
    assert fit_mixtures(np.zeros((0, 24, BINS)), 1e-3) == []


def test_no_pair_away_from_1_is_lost():
    counts = histograms_of(pairs_table(seed=1)).sum(axis=1)
    assert away_from_1(counts).sum() == counts[:, 1:].sum()
    for scale in ("log", "angle"):
        axis = coordinate(1e-3, scale)
        assert away_from_1(counts).shape[-1] == len(axis.centre)
        assert (axis.width > 0).all()
        assert (np.diff(axis.centre) > 0).all()


def test_a_component_that_the_end_cuts_in_half_is_one():
    """Half a normal, piled up against overlap 1 in the angle: one component, cut off."""
    angle = np.abs(0.3 * np.random.default_rng(0).normal(size=(24, 400)))
    codes = np.repeat(np.arange(24), 400)
    histograms = question_histograms(codes, np.cos(angle).ravel(), 1e-3, 24)
    fit = fit_mixtures(histograms[None], 1e-3, "angle", 400)[0]
    assert fit.components == 1
    assert fit.gain.high < 0.05
