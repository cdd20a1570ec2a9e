import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from synthetic import Planted, contrast, pairs_table

from sst_interp.analyses.dwell import (
    Segments,
    by_length,
    dwell,
    median_length,
    segments,
    shuffled_lengths,
    stable_stretches,
)
from sst_interp.errors import Untestable


def dwell_of(table, comparison="teacher_forced", resamples=300):
    return dwell(contrast(table, comparison, threshold=0.9, resamples=resamples))


def table_of(persistence=0.0, seed=0, questions=24, positions=40, layers=3, **planted):
    planted = Planted(share=0.2, persistence=persistence, **planted)
    return pairs_table(questions, positions, layers, planted=planted, seed=seed)


def test_shifts_in_bursts_are_longer_than_chance_by_what_was_planted():
    """A Markov chain that keeps its state with probability h has mean stretches 1 / (1 - h) times as long."""
    found = dwell_of(table_of(persistence=0.6, positions=400, questions=12))
    assert found.ratio.low > 1
    assert found.ratio.estimate == pytest.approx(2.5, rel=0.08)
    assert found.verdict.startswith("Shifts come in bursts")
    assert (found.by_layer["p_layers"] < 0.05).all()
    assert found.median.estimate > found.median_shuffled


def test_independent_shifts_are_not_told_from_chance():
    found = [dwell_of(table_of(seed=seed), resamples=200) for seed in range(40)]
    inside = sum(f.ratio.low <= 1 <= f.ratio.high for f in found)
    assert inside >= 33  # 95% nominal; 32 or fewer has probability 0.1% at 93%
    assert sum((f.by_layer["p_layers"] < 0.05).any() for f in found) <= 6  # 5% nominal: 7 has 1.4%
    assert np.mean([f.ratio.estimate for f in found]) == pytest.approx(1, abs=0.02)


def test_the_rate_of_a_question_is_no_burst():
    """Questions that shift at different rates: a shuffle over questions would call that bursts."""
    found = dwell_of(table_of(question_spread=2.0, questions=60))
    assert found.ratio.low <= 1.02
    assert found.ratio.estimate == pytest.approx(1, abs=0.05)


def test_shifts_that_keep_apart_are_shorter():
    table = table_of()
    every_fifth = (table["position"] % 5 == 2).to_numpy()
    found = dwell_of(table.assign(cosine=np.where(every_fifth, 0.5, 0.999)))
    assert found.ratio.high < 1
    assert found.median.estimate == 4
    assert found.verdict.startswith("Shifts keep apart")


def test_lengths_add_up():
    found = dwell_of(table_of(persistence=0.5))
    assert found.lengths["length"].tolist() == list(range(1, len(found.lengths) + 1))
    assert found.by_layer["stretches"].sum() == found.lengths[["complete", "cut_at_end"]].to_numpy().sum()
    assert 0 < found.cut.estimate < 1


def test_short_texts_are_cut_where_they_end():
    table = table_of(persistence=0.6, questions=40)
    full = dwell_of(table)
    short = dwell_of(table[table["position"] < 8])
    assert short.cut.estimate > full.cut.estimate
    assert short.lengths["length"].max() <= 8
    assert short.ratio.estimate < full.ratio.estimate  # what a text cuts cannot be longer than it


def test_missing_overlaps_end_a_stretch():
    table = table_of(persistence=0.5)
    table.loc[table["position"] == 20, "cosine"] = np.nan
    found = dwell_of(table)
    assert found.cut.estimate > dwell_of(table_of(persistence=0.5)).cut.estimate


@pytest.mark.parametrize(
    ("table", "words"),
    [
        (table_of().assign(cosine=np.float32(0.999)), "no pair shifted below 0.9"),
        (table_of().assign(cosine=np.float32(0.5)), "no text has both shifts and stable positions"),
        (table_of(positions=1), "no text has both"),
        (pairs_table(comparisons=()), "no pairs of comparison 'teacher_forced'"),
        (table_of().assign(cosine=np.nan), "NaN"),
    ],
)
def test_without_a_stretch_between_shifts_it_is_untestable(table, words):
    with pytest.raises(Untestable, match=words):
        dwell_of(table)


def test_one_question_has_a_ratio_and_no_interval():
    one = dwell_of(table_of(questions=1, persistence=0.5))
    assert not one.ratio.known
    assert one.verdict.startswith("Whether shifts come in bursts is not tested.")


def test_a_median_beyond_the_text_is_not_made_up():
    table = table_of()
    table["cosine"] = np.where(table["position"] == 0, 0.5, 0.999).astype("float32")
    found = dwell_of(table)
    assert math.isnan(found.median.estimate)
    assert "outlast" in found.median.reason
    assert "more than half of the stretches outlast their text" in found.verdict


# Stretches


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
