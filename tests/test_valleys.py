import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sst_interp.analyses.statistics.modes import largest_valley, missing_mass, water_level


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
