import numpy as np
import pytest
from synthetic import Planted, pairs_table

from sst_interp.analyses.statistics import modes as dip
from sst_interp.analyses.statistics.modes import (
    NOT_INSTALLED,
    dip_test,
    one_per_question,
    question_histograms,
    to_v,
)


def histograms_of(table):
    return question_histograms(table["question"].to_numpy(), table["cosine"].to_numpy(float), 1e-3)


def test_without_the_package_the_result_says_what_to_install(monkeypatch):
    def missing(name):
        raise ImportError(name)

    monkeypatch.setattr(dip.importlib, "import_module", missing)
    found = dip_test(histograms_of(pairs_table()), 1e-3)
    assert found.reason == NOT_INSTALLED == "not installed: pip install diptest"
    assert np.isnan([found.dip.estimate, found.p_value, found.p_questions]).all()


def test_one_pair_is_drawn_from_every_question_and_is_one_of_its_own():
    overlap = np.linspace(0.1, 0.9, 24)
    histograms = question_histograms(np.repeat(np.arange(24), 10), np.repeat(overlap, 10), 1e-3)
    drawn = one_per_question(histograms / 10, 1e-3, seed=0)
    assert drawn.shape[1] == 24
    off = to_v(drawn, 1e-3) - to_v(overlap, 1e-3)
    assert abs(off).max() < 6 * 0.2  # within the smoothing kernel
    assert abs(off.mean()) < 0.05
    assert (drawn <= 1).all()


class TestWithThePackage:
    @pytest.fixture(autouse=True)
    def _needs_diptest(self):
        pytest.importorskip("diptest")

    def test_two_separate_modes_dip_and_one_does_not(self):
        two = dip_test(histograms_of(pairs_table(198, 8, 4, planted=Planted(share=0.3), seed=1)), 1e-3)
        assert two.p_value < 0.05
        assert two.p_questions < 0.05
        assert two.dip.low > 0.02
        one = dip_test(histograms_of(pairs_table(198, 8, 4, planted=Planted(share=0), seed=1)), 1e-3)
        assert one.p_value > 0.5
        assert one.dip.estimate < 0.005
        assert one.reason is None

    def test_the_dip_grows_with_the_smaller_mode_and_stays_below_half_of_it(self):
        dips = []
        for share in (0.1, 0.25, 0.5):
            table = pairs_table(40, 16, 8, planted=Planted(share=share, question_spread=0.2), seed=1)
            dips.append(dip_test(histograms_of(table), 1e-3).dip.estimate)
            assert 0.05 * share < dips[-1] < share / 2
        assert dips == sorted(dips)

    def test_a_small_second_mode_needs_all_pairs(self):
        """One pair per question is valid but weak: 14% of 24 questions are three."""
        found = dip_test(histograms_of(pairs_table(planted=Planted(share=0.14), seed=1)), 1e-3)
        assert found.p_questions < 0.05
        assert found.p_value > 0.05

    def test_one_mode_is_rarely_called_anything_else(self):
        """Noise below one mode, the same at every layer of a position: clumps, but no second mode."""
        alone = together = 0
        for seed in range(60):
            rng = np.random.default_rng(seed)
            far = rng.random((24, 16, 1)) + 0.03 * rng.normal(size=(24, 16, 8))
            calm = 0.003 * np.exp(0.5 * rng.normal(size=(24, 16, 8)))
            u = np.where(rng.random((24, 16, 1)) < 0.2, np.clip(far, 0, 1), calm)
            codes = np.repeat(np.arange(24), 128)
            found = dip_test(question_histograms(codes, 1 - u.ravel(), 1e-3), 1e-3)
            alone += found.p_value < 0.05
            together += found.p_questions < 0.05
        assert alone == 0
        assert together <= 9  # 7% measured; 10 or more has probability 1%

    def test_pairs_as_observations_would_call_clumps_modes(self):
        """What the table says of all pairs at once, as if they were independent."""
        import diptest

        rng = np.random.default_rng(0)
        places = rng.normal(size=24)  # every question at a place of its own
        pairs = places[:, None] + 0.05 * rng.normal(size=(24, 100))
        assert diptest.diptest(pairs.ravel())[1] < 0.01
        histograms = question_histograms(
            np.repeat(np.arange(24), 100), 1 - 0.1 * np.exp(0.5 * pairs.ravel()), 1e-3
        )
        assert dip_test(histograms, 1e-3).p_value > 0.05

    def test_every_question_weighs_the_same(self):
        histograms = histograms_of(pairs_table(planted=Planted(share=0.3), seed=1))
        heavier = histograms * np.arange(1, 25)[:, None]
        assert dip_test(histograms, 1e-3) == dip_test(heavier, 1e-3)
        padded = np.vstack([histograms, np.zeros((3, histograms.shape[1]))])
        assert dip_test(padded, 1e-3) == dip_test(histograms, 1e-3)

    def test_few_questions_are_not_tested(self):
        found = dip_test(histograms_of(pairs_table(questions=5)), 1e-3)
        assert "too few questions (5" in found.reason
        assert np.isnan(found.p_value)
