import json
import math

import numpy as np
import pandas as pd
import pytest
from synthetic import Planted, pairs_table

from sst_interp.analyses.basin_shifts import basin_shifts
from sst_interp.analyses.dwell import dwell
from sst_interp.choices import Choices

FIXED = Choices(threshold=0.9)


def dwell_of(table, comparison="replayed", resamples=300, **options):
    found = basin_shifts(table, comparison, FIXED, resamples=50)
    return dwell(table, found, resamples=resamples, **options)


def table_of(persistence=0.0, seed=0, questions=24, positions=40, layers=3, **planted):
    planted = Planted(share=0.2, persistence=persistence, **planted)
    return pairs_table(questions, positions, layers, planted=planted, seed=seed)


def test_shifts_in_bursts_are_longer_than_chance_by_what_was_planted():
    """A Markov chain that keeps its state with probability h has mean stretches 1 / (1 - h) times as long."""
    found = dwell_of(table_of(persistence=0.6, positions=400, questions=12))
    assert found.ratio.low > 1
    assert found.ratio.estimate == pytest.approx(2.5, rel=0.08)
    assert "longer than chance: shifts come in bursts" in found.verdict
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
    assert "shorter than chance: shifts keep apart" in found.verdict


def test_the_order_of_rows_and_the_numbers_of_questions_change_nothing():
    table = table_of(persistence=0.4)
    found = dwell_of(table)
    mixed = table.sample(frac=1, random_state=1).reset_index(drop=True)
    again = dwell_of(mixed.assign(question=mixed["question"] + 100))
    assert again.ratio == found.ratio
    assert again.median == found.median
    pd.testing.assert_frame_equal(again.by_layer, found.by_layer)
    pd.testing.assert_frame_equal(again.lengths, found.lengths)


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
    assert found.not_testable is None
    assert found.cut.estimate > dwell_of(table_of(persistence=0.5)).cut.estimate


def test_all_shifted_none_shifted_one_question_and_nothing():
    none = dwell_of(table_of().assign(cosine=np.float32(0.999)))
    assert none.verdict.startswith("not testable: no pair shifted below 0.9")
    everywhere = dwell_of(table_of().assign(cosine=np.float32(0.5)))
    assert everywhere.verdict.startswith("not testable: no text has both shifts and stable positions")
    one = dwell_of(table_of(questions=1, persistence=0.5))
    assert not one.ratio.known
    assert "no interval: one question" in one.verdict
    assert "not tested" in one.verdict
    empty = dwell_of(pairs_table(comparisons=()))
    assert empty.verdict == "not testable: no pairs of comparison 'replayed' in this run."
    nan = dwell_of(table_of().assign(cosine=np.nan))
    assert "NaN" in nan.verdict
    for found in (none, everywhere, one, empty, nan):
        json.dumps(found.to_dict(), allow_nan=False)
        assert all(figure.to_dict() for figure in found.figures().values())
        assert "<table>" in found._repr_html_()


def test_one_position_has_no_stretch_between_shifts():
    assert dwell_of(table_of(positions=1)).verdict.startswith("not testable")


def test_a_median_beyond_the_text_is_not_made_up():
    table = table_of()
    table["cosine"] = np.where(table["position"] == 0, 0.5, 0.999).astype("float32")
    found = dwell_of(table)
    assert math.isnan(found.median.estimate)
    assert "outlast" in found.median.reason
    assert "most stable stretches outlast their text" in found.verdict


def test_figures_name_the_comparison_and_the_sample():
    found = dwell_of(pairs_table(24, 30, 3, comparisons=("within",), planted=Planted(share=0.2)), "within")
    assert set(found.figures()) == {"lengths", "ratio_by_layer"}
    for figure in found.figures().values():
        text = str(figure.to_dict()["layout"])
        assert "within one pass" in text
        assert "24 questions" in text
