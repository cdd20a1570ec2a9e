import json

import numpy as np
import pandas as pd
import pytest
from synthetic import Planted, pairs_table

from sst_interp.analyses import all_comparisons, basin_shifts
from sst_interp.analyses.parts.question_map import question_map
from sst_interp.analyses.statistics.bootstrap import pairs_there, share
from sst_interp.choices import COMPARISONS, Choices
from sst_interp.errors import SSTError


def test_the_planted_share_is_inside_its_interval_as_often_as_stated():
    inside = 0
    for seed in range(40):
        table = pairs_table(questions=40, positions=6, layers=4, planted=Planted(share=0.14), seed=seed)
        found = share(table["question"].to_numpy(), table["cosine"].to_numpy() < 0.95, resamples=400)
        inside += found.low <= 0.14 <= found.high
    assert inside >= 33  # 95% nominal, 40 trials; 32 or fewer has probability 0.1% at 93%


def test_planted_shifts_are_found_and_nothing_else():
    table = pairs_table(planted=Planted(share=0.14), seed=3)
    found = basin_shifts(table, "replayed")
    assert found.provenance == "antimode of this run"
    moved = (table["norm_b"] / table["norm_a"] > 1.15).to_numpy()
    assert np.array_equal(moved, table["cosine"].to_numpy() < found.threshold)
    assert found.share.estimate == pytest.approx(moved.mean())
    assert found.norm_ratio_shifted.estimate == pytest.approx(1.3, abs=0.01)
    assert found.norm_ratio_stable.low <= 1.0 <= found.norm_ratio_stable.high + 0.005
    for words in (
        "24 questions",
        "3,072 pairs",
        "depth 1 against depth 4",
        "two modes",
        "replayed",
        "valley",
    ):
        assert words in found.verdict
    assert found.distribution.modes.depth_interval.text(percent=True) in found.verdict


def test_a_null_result_is_stated_as_one():
    found = basin_shifts(pairs_table(planted=Planted(share=0, stable=1e-4)), "replayed")
    assert found.share.estimate == 0
    assert "no pair fell below 0.99" in found.verdict
    assert "no basin shift was seen" in found.verdict
    assert "at most 11.7% of such questions" in found.verdict
    assert found.provenance.startswith("the paper's 0.99: the distribution has one mode")


def test_one_mode_that_crosses_the_threshold_is_not_called_a_second_basin():
    found = basin_shifts(pairs_table(planted=Planted(share=0, stable=0.01)), "replayed")
    assert found.threshold == 0.99
    assert found.share.estimate > 0.2
    assert "one mode, so this is a cut through one spread" in found.verdict


def test_a_fixed_threshold_is_the_users_and_the_papers_stands_beside_it():
    table = pairs_table(seed=1)
    found = basin_shifts(table, "replayed", Choices(threshold=0.5))
    assert (found.threshold, found.provenance) == (0.5, "fixed by the user")
    assert found.share.estimate == pytest.approx((table["cosine"] < 0.5).mean())
    assert found.share_at_paper.estimate == pytest.approx((table["cosine"] < 0.99).mean())


def test_the_headline_is_the_deepest_pair_and_the_table_has_them_all():
    table = pairs_table(depths=(2, 3, 4), seed=1)
    table = pd.concat([table, table[table["b"] == 4].assign(a=3)])
    found = basin_shifts(table, "replayed")
    assert (found.a, found.b, found.n_pairs) == (1, 4, 3072)
    assert list(zip(found.table["a"], found.table["b"], strict=True)) == [(1, 2), (1, 3), (1, 4), (3, 4)]
    row = found.table[(found.table["a"] == 1) & (found.table["b"] == 4)].iloc[0]
    assert row["shifted"] == found.share.estimate
    assert (row["low"], row["high"]) == (found.share.low, found.share.high)


def test_rates_by_position_and_layer_are_the_counts():
    table = pairs_table(planted=Planted(stable_layers=3), seed=1)
    found = basin_shifts(table, "replayed")
    shifted = table["cosine"] < found.threshold
    assert np.allclose(found.by_layer["share"], shifted.groupby(table["layer"]).mean())
    assert np.allclose(found.by_position["share"], shifted.groupby(table["position"]).mean())
    assert (found.by_layer["share"][:3] == 0).all()
    assert (found.by_layer["low"] <= found.by_layer["share"]).all()
    assert (found.by_layer["share"] <= found.by_layer["high"]).all()
    expected = shifted.groupby([table["position"], table["layer"]]).mean().unstack()
    assert np.allclose(found.rates, expected)
    at_0 = table[table["position"] == 0].groupby("question")["cosine"].min() < found.threshold
    assert found.by_position["questions_shifted"][0] == pytest.approx(at_0.mean())


def test_a_shift_that_is_only_a_layer_is_said_to_be_one():
    table = pairs_table(planted=Planted(share=0), seed=1)
    deep = table["layer"] >= 6
    table.loc[deep, "cosine"] = (1 - 100 * (1 - table.loc[deep, "cosine"])).clip(-1, 1)
    found = basin_shifts(table, "replayed", Choices(threshold=0.95))
    assert found.of_layer > 0.9
    assert found.of_position < 0.1
    assert "The layer alone accounts for" in found.verdict


def test_free_is_split_where_the_texts_part():
    found = basin_shifts(pairs_table(comparisons=("free",), diverge=5, seed=1), "free")
    assert found.same_prefix.estimate == 0
    assert found.other_prefix.estimate > 0.1
    assert found.same_prefix_of_pairs == pytest.approx(5 / 16)
    assert "Before the two texts first differ 0.0%" in found.verdict
    assert "most of it says only that the texts diverged" in found.verdict
    assert basin_shifts(pairs_table(), "replayed").same_prefix is None


def test_short_texts_leave_positions_to_fewer_questions():
    table = pairs_table(seed=1)
    table = table[(table["position"] < 8) | (table["question"] == 0)]
    found = basin_shifts(table, "replayed", Choices(threshold=0.9))
    assert found.by_position["questions"].tolist() == [24] * 8 + [1] * 8
    assert found.by_position["pairs"].tolist() == [24 * 8] * 8 + [8] * 8


def test_all_three_are_there_and_the_missing_one_says_so():
    found = all_comparisons(pairs_table(comparisons=("replayed", "within")), Choices(comparison="within"))
    assert list(found) == ["within", "replayed", "free"]
    assert set(found) == set(COMPARISONS)
    assert found["free"].verdict == "not testable: no pairs of comparison 'free' in this run."
    for result in found.values():
        json.dumps(result.to_dict(), allow_nan=False)
        assert "<table>" in result._repr_html_()
        for figure in result.figures().values():
            assert result.comparison in str(figure.to_dict()["layout"])
    assert "not testable" in str(found["free"].figure().to_dict()["layout"])


def test_an_empty_table_one_question_and_nothing_but_nan_do_not_crash():
    assert basin_shifts(pairs_table(comparisons=()), "replayed").verdict.startswith("not testable")
    one = basin_shifts(pairs_table(questions=1), "replayed")
    assert "no interval: one question" in one.verdict
    assert "not tested: too few questions (1" in one.verdict
    one.figures()
    assert "NaN" in basin_shifts(pairs_table().assign(cosine=np.nan), "replayed").verdict


def test_an_overlap_that_was_not_captured_is_an_error():
    with pytest.raises(SSTError, match="lens_jaccard"):
        basin_shifts(pairs_table(), "replayed", Choices(overlap="lens_jaccard"))


def test_a_question_map_is_that_question():
    table = pairs_table(depths=(2, 4), seed=1)
    found = question_map(table, 5, "replayed")
    rows = table[(table["question"] == 5) & (table["b"] == 4)].set_index(["position", "layer"])
    assert found.overlap.shape == (16, 8)
    assert found.overlap.loc[3, 7] == pytest.approx(rows.loc[(3, 7), "cosine"])
    assert found.norm_ratio.loc[3, 7] == pytest.approx(
        rows.loc[(3, 7), "norm_b"] / rows.loc[(3, 7), "norm_a"], rel=1e-6
    )
    with pytest.raises(SSTError, match="question 99"):
        question_map(table, 99, "replayed")


def test_results_are_the_same_twice():
    table = pairs_table(seed=1)
    assert basin_shifts(table, "replayed").to_dict() == basin_shifts(table, "replayed").to_dict()


def test_bit_identical_pairs_are_counted_per_pair_of_depths():
    table = pairs_table(depths=(2, 4), planted=Planted(identical=0.25), seed=1)
    found = basin_shifts(table, "replayed")
    for row in found.table.itertuples():
        part = table[table["b"] == row.b]
        assert row.identical == pytest.approx((part["relative_l2"] == 0).mean())
    share_of = found.distribution.identical_share
    assert share_of.estimate == found.distribution.identical == found.table["identical"].iloc[-1]
    assert share_of.low < share_of.estimate < share_of.high


def test_the_bands_are_there_for_positions_and_layers():
    found = basin_shifts(pairs_table(seed=1), "replayed")
    for table in (found.by_position, found.by_layer):
        assert (table["band_low"] <= table["share"]).all()
        assert (table["share"] <= table["band_high"]).all()
        assert (table["band_high"] - table["band_low"]).sum() > (table["high"] - table["low"]).sum()


def test_the_pairs_that_are_there():
    a = np.array([2, 1, 1, 1, 2], dtype=np.int8)
    b = np.array([3, 4, 2, 4, 3], dtype=np.int8)
    assert pairs_there(a, b) == [(1, 2), (1, 4), (2, 3)]
    assert pairs_there(a[:0], b[:0]) == []
    big = np.array([127], dtype=np.int8)
    assert pairs_there(big, big) == [(127, 127)]
