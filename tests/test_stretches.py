import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sst_interp.analyses.parts.stretches import (
    Segments,
    by_length,
    median_length,
    segments,
    shuffled_lengths,
    stable_stretches,
)


def rows(*texts):
    """`.` stable, `x` shifted, a blank: no pair."""
    width = max(map(len, texts))
    letters = np.array([list(text.ljust(width)) for text in texts])
    return letters == "x", letters != " "


def test_stretches_are_read_off():
    found = stable_stretches(*rows("..x...xx.", "xx", ".....", "x..x."))
    read = list(zip(found.row, found.length, found.opened, found.closed, strict=True))
    assert read == [
        (0, 2, False, True),
        (0, 3, True, True),
        (0, 1, True, False),
        (2, 5, False, False),
        (3, 2, True, True),
        (3, 1, True, False),
    ]


def test_a_missing_position_ends_a_stretch_and_begins_another_piece():
    shifted, there = rows("x.. ..x")
    found = stable_stretches(shifted, there)
    assert found.length.tolist() == [2, 2]
    assert found.closed.tolist() == [False, True]
    assert found.opened.tolist() == [True, False]
    pieces = segments(shifted, there)
    assert (pieces.n.tolist(), pieces.k.tolist(), pieces.row.tolist()) == ([3, 3], [1, 1], [0, 0])


@settings(max_examples=50, deadline=None)
@given(st.lists(st.text(alphabet=".x ", min_size=1, max_size=12), min_size=1, max_size=5))
def test_every_stable_position_is_in_one_stretch(texts):
    shifted, there = rows(*texts)
    found, pieces = stable_stretches(shifted, there), segments(shifted, there)
    stable = (there & ~shifted).sum(axis=1)
    assert np.array_equal(np.bincount(found.row, found.length, len(texts)), stable)
    assert pieces.n.sum() == there.sum()
    assert pieces.k.sum() == (shifted & there).sum()


def shuffles(n, k, draws=20_000, seed=0):
    rng = np.random.default_rng(seed)
    return rng.permuted(np.tile(np.arange(n) < k, (draws, 1)), axis=1)


@pytest.mark.parametrize(("n", "k"), [(10, 3), (7, 1), (12, 11), (9, 6)])
def test_the_shuffle_is_exact(n, k):
    """The formula against twenty thousand shuffles."""
    drawn = shuffles(n, k)
    found = stable_stretches(drawn, np.ones_like(drawn))
    piece = Segments(np.array([0]), np.array([n]), np.array([k]))
    assert len(found.length) / len(drawn) == pytest.approx(float(piece.expected[0]), rel=0.03)
    complete, cut = shuffled_lengths(piece, n)
    for expected, closed in ((complete, True), (cut, False)):
        seen = np.bincount(found.length[found.opened & (found.closed == closed)], minlength=n + 1)[1:]
        assert np.allclose(seen / len(drawn), expected, atol=0.02)
    # Nothing is lost: the expected stable positions after the first shift are those of one gap times k.
    length = np.arange(1, n + 1)
    assert (length * (complete + cut)).sum() == pytest.approx((n - k) * k / (k + 1))


def test_nothing_to_shuffle_is_nothing():
    pieces = Segments(np.arange(2), np.array([5, 5]), np.array([0, 5]))
    assert not pieces.mixed.any()
    assert np.array_equal(np.stack(shuffled_lengths(pieces, 5)), np.zeros((2, 5)))


def test_lengths_are_counted_by_group():
    shifted, there = rows("x.x..x...", "x.x......")
    found = stable_stretches(shifted, there)
    counts = by_length(found, found.row, 2, 9)
    assert counts.shape == (2, 2, 9)
    assert counts[0, 0].tolist() == [1, 1, 0, 0, 0, 0, 0, 0, 0]
    assert counts[0, 1, 2] == 1  # cut at the end
    assert counts[1, 1, 5] == 1


def test_the_median_counts_what_the_end_cuts():
    """Geometric stretches cut at 8: the censored median is right, that of the complete ones too small."""
    rng = np.random.default_rng(0)
    true = rng.geometric(0.1, size=20_000)  # median 7
    seen, cut = np.minimum(true, 8), true > 8
    complete = np.bincount(seen[~cut], minlength=9)[1:]
    censored = np.bincount(seen[cut], minlength=9)[1:]
    assert median_length(complete, censored) == 7
    assert np.median(true[~cut]) <= 4
    assert median_length(complete, np.zeros(8)) == np.median(true[~cut])


def test_a_median_beyond_the_end_is_said_to_be_there():
    assert median_length(np.array([1.0, 0, 0]), np.array([0, 0, 9.0])) == 4
    assert np.isnan(median_length(np.zeros(3), np.zeros(3)))
    both = median_length(np.array([[0, 4.0, 0], [0, 0, 0]]), np.zeros((2, 3)))
    assert np.array_equal(both, [2, np.nan], equal_nan=True)
