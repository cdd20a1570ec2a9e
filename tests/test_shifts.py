import numpy as np
import pandas as pd
import pytest
from synthetic import Planted, contrast, pairs_table

from sst_interp.analyses.shift_profiles import layer_profile, shifts_per_question
from sst_interp.analyses.shifts import all_comparisons, basin_shifts
from sst_interp.analyses.statistics.bootstrap import share
from sst_interp.errors import SSTError, Untestable
from sst_interp.models.choices import Choices


def shifts_of(table, comparison="teacher_forced", **options):
    return basin_shifts(contrast(table, comparison, **options))


def even(questions=40, positions=10):
    """Two positions in ten shift, in every question and layer."""
    table = pairs_table(questions, positions)
    return table.assign(cosine=np.where(table["position"] < 2, 0.5, 0.999).astype("float32"))


# How much shifts


def test_the_planted_share_is_inside_its_interval_as_often_as_stated():
    inside = 0
    for seed in range(40):
        table = pairs_table(questions=40, positions=6, layers=4, planted=Planted(share=0.14), seed=seed)
        found = share(table["question"].to_numpy(), table["cosine"].to_numpy() < 0.95, resamples=400)
        inside += found.low <= 0.14 <= found.high
    assert inside >= 33  # 95% nominal, 40 trials; 32 or fewer has probability 0.1% at 93%


def test_planted_shifts_are_seen_and_nothing_else():
    table = pairs_table(planted=Planted(share=0.14), seed=3)
    shifts = shifts_of(table)
    assert shifts.provenance == "antimode of this run"
    moved = (table["norm_b"] / table["norm_a"] > 1.15).to_numpy()
    assert np.array_equal(moved, table["cosine"].to_numpy() < shifts.threshold)
    assert shifts.share.estimate == pytest.approx(moved.mean())
    assert shifts.norm_ratio_shifted.estimate == pytest.approx(1.3, abs=0.01)
    assert shifts.norm_ratio_stable.low <= 1.0 <= shifts.norm_ratio_stable.high + 0.005
    assert shifts.verdict.startswith(
        "Shifted pairs are a second mode. Teacher-forced, depth 1 against depth 4"
    )
    assert "3,072 pairs from 24 questions" in shifts.verdict
    assert shifts.share.text(percent=True) in shifts.verdict


def test_a_null_result_is_stated_as_one():
    shifts = shifts_of(pairs_table(planted=Planted(share=0, stable=1e-4)))
    assert shifts.share.estimate == 0
    assert shifts.verdict.startswith("No basin shift.")
    assert "at most 11.7% of such questions" in shifts.verdict
    assert shifts.provenance.startswith("the paper's 0.99: the distribution has one mode")


def test_one_mode_that_crosses_the_threshold_is_not_called_a_second_basin():
    shifts = shifts_of(pairs_table(planted=Planted(share=0, stable=0.01)))
    assert (shifts.threshold, shifts.share.estimate > 0.2) == (0.99, True)
    assert shifts.verdict.startswith("Shifts are a cut through one spread, not a second basin.")


def test_a_fixed_threshold_is_the_users_and_the_papers_stands_beside_it():
    table = pairs_table(seed=1)
    shifts = shifts_of(table, choices=Choices(threshold=0.5))
    assert (shifts.threshold, shifts.provenance) == (0.5, "fixed by the user")
    assert shifts.share.estimate == pytest.approx((table["cosine"] < 0.5).mean())
    assert shifts.share_at_paper.estimate == pytest.approx((table["cosine"] < 0.99).mean())


def test_the_headline_is_the_deepest_pair_and_the_table_has_them_all():
    table = pairs_table(depths=(2, 3, 4), planted=Planted(identical=0.25), seed=1)
    table = pd.concat([table, table[table["b"] == 4].assign(a=3)])
    shifts = shifts_of(table)
    assert (shifts.a, shifts.b, shifts.n_pairs) == (1, 4, 3072)
    assert list(zip(shifts.table["a"], shifts.table["b"], strict=True)) == [(1, 2), (1, 3), (1, 4), (3, 4)]
    row = shifts.table.iloc[2]
    assert row["shifted"] == shifts.share.estimate
    assert (row["low"], row["high"]) == (shifts.share.low, shifts.share.high)
    for own in shifts.table.itertuples():
        part = table[(table["a"] == own.a) & (table["b"] == own.b)]
        assert own.identical == pytest.approx((part["relative_l2"] == 0).mean())
    whole = shifts.distribution.identical_share
    assert whole.estimate == shifts.distribution.identical == row["identical"]
    assert whole.low < whole.estimate < whole.high


def test_a_pair_without_any_overlap_has_no_row():
    table = pairs_table(depths=(2, 4))
    table.loc[table["b"] == 2, "cosine"] = np.nan
    assert shifts_of(table).table["b"].tolist() == [4]


def test_rates_by_position_and_layer_are_the_counts_and_lie_in_their_bands():
    table = pairs_table(planted=Planted(stable_layers=3), seed=1)
    shifts = shifts_of(table)
    shifted = table["cosine"] < shifts.threshold
    assert (shifts.by_layer["share"][:3] == 0).all()
    for name, rates in (("layer", shifts.by_layer), ("position", shifts.by_position)):
        assert np.allclose(rates["share"], shifted.groupby(table[name]).mean())
        for ends in (("low", "high"), ("band_low", "band_high")):
            assert (rates[ends[0]] <= rates["share"]).all()
            assert (rates["share"] <= rates[ends[1]]).all()
        assert (rates["band_high"] - rates["band_low"]).sum() > (rates["high"] - rates["low"]).sum()
    expected = shifted.groupby([table["position"], table["layer"]]).mean().unstack()
    assert np.allclose(shifts.rates, expected)
    at_0 = table[table["position"] == 0].groupby("question")["cosine"].min() < shifts.threshold
    assert shifts.by_position["questions_shifted"][0] == pytest.approx(at_0.mean())


def test_a_shift_that_is_only_a_layer_is_said_to_be_one():
    table = pairs_table(planted=Planted(share=0), seed=1)
    deep = table["layer"] >= 6
    table.loc[deep, "cosine"] = (1 - 100 * (1 - table.loc[deep, "cosine"])).clip(-1, 1)
    shifts = shifts_of(table, threshold=0.95)
    assert shifts.of_layer > 0.9
    assert shifts.of_position < 0.1
    assert "The layer alone accounts for" in shifts.verdict


def test_free_is_split_where_the_texts_part():
    shifts = shifts_of(pairs_table(comparisons=("free_running",), diverge=5, seed=1), "free_running")
    assert shifts.same_prefix.estimate == 0
    assert shifts.other_prefix.estimate > 0.1
    assert shifts.same_prefix_of_pairs == pytest.approx(5 / 16)
    assert "Before the two texts first differ 0.0%" in shifts.verdict
    assert "most of it says only that the texts diverged" in shifts.verdict
    assert shifts_of(pairs_table()).same_prefix is None


def test_short_texts_leave_positions_to_fewer_questions():
    table = pairs_table(seed=1)
    shifts = shifts_of(table[(table["position"] < 8) | (table["question"] == 0)], threshold=0.9)
    assert shifts.by_position["questions"].tolist() == [24] * 8 + [1] * 8
    assert shifts.by_position["pairs"].tolist() == [24 * 8] * 8 + [8] * 8


def test_every_comparison_that_is_there_has_its_result_the_leading_one_first():
    table = pairs_table(comparisons=("teacher_forced", "within"))
    results = all_comparisons(contrast(table, choices=Choices(comparison="within")))
    assert list(results) == ["within", "teacher_forced"]
    assert results["teacher_forced"].to_dict() == shifts_of(table).to_dict()


def test_one_question_has_no_interval_and_nothing_and_nothing_but_nan_is_untestable():
    one = shifts_of(pairs_table(questions=1))
    assert "no interval: one question" in one.verdict
    assert "not tested: too few questions (1" in one.verdict
    for table, words in (
        (pairs_table(comparisons=()), "no pairs"),
        (pairs_table().assign(cosine=np.nan), "NaN"),
    ):
        with pytest.raises(Untestable, match=words):
            shifts_of(table)
    with pytest.raises(SSTError, match="lens_jaccard"):
        shifts_of(pairs_table(), choices=Choices(overlap="lens_jaccard"))


# Which layers


def profile_of(table, **options):
    return layer_profile(contrast(table, "teacher_forced", **{"threshold": 0.9, "resamples": 400} | options))


def test_layers_that_do_not_shift_are_seen():
    profile = profile_of(pairs_table(40, 12, 8, planted=Planted(share=0.2, stable_layers=2), seed=1))
    off = profile.profile["p_layers"].to_numpy() < 0.05
    assert off[:2].all()
    assert (profile.profile["off"][:2] < 0).all()
    assert profile.layers_off == off.sum()
    assert f"{off.sum()} of 8 layers differ from the mean of all" in profile.verdict
    assert "layer 0 (0.0%" in profile.verdict or "layer 1 (0.0%" in profile.verdict


def test_a_flat_profile_is_rarely_called_anything_else():
    tables = (pairs_table(24, 8, 6, planted=Planted(share=0.2), seed=seed) for seed in range(40))
    off = [profile_of(table, resamples=200).layers_off for table in tables]
    assert sum(layers > 0 for layers in off) <= 6  # 5% nominal: 7 or more has 1.4%


def test_the_band_is_wider_than_each_interval_and_holds_the_share():
    rows = profile_of(pairs_table(40, 12, 8, planted=Planted(share=0.2), seed=2)).profile
    assert (rows["band_low"] <= rows["share"]).all()
    assert (rows["share"] <= rows["band_high"]).all()
    assert (rows["band_high"] - rows["band_low"]).mean() > 1.2 * (rows["high"] - rows["low"]).mean()
    assert rows["band_low"].min() >= 0
    assert rows["band_high"].max() <= 1


def test_the_profile_is_that_of_basin_shifts():
    table = pairs_table(planted=Planted(stable_layers=3), seed=1)
    profile, shifts = profile_of(table), shifts_of(table, threshold=0.9, resamples=400)
    pd.testing.assert_frame_equal(profile.profile[shifts.by_layer.columns], shifts.by_layer)
    assert profile.share == shifts.share


def test_one_layer_one_question_no_shift_and_all_shifted():
    for table in (
        pairs_table(layers=1),
        pairs_table(questions=1),
        pairs_table().assign(cosine=np.float32(0.1)),
    ):
        assert profile_of(table).verdict.startswith("Whether layers differ is not tested.")
    assert profile_of(pairs_table(questions=1)).profile["band_low"].isna().all()
    none = profile_of(pairs_table(planted=Planted(share=0, stable=1e-4)))
    assert none.verdict.startswith("No layer shifts below 0.9.")
    holes = pairs_table(seed=1)
    holes.loc[holes["layer"] == 2, "cosine"] = np.nan
    assert profile_of(holes).profile["layer"].tolist() == [0, 1, 3, 4, 5, 6, 7]


# Which questions


def questions_of(table):
    return shifts_per_question(contrast(table, "teacher_forced", threshold=0.9, resamples=300))


def test_the_table_is_the_counts():
    table = pairs_table(planted=Planted(share=0.2), seed=1)
    spread = questions_of(table)
    shifted = table["cosine"] < 0.9
    assert np.array_equal(spread.per_question["shifted"], shifted.groupby(table["question"]).sum())
    positions = table[shifted].groupby("question")["position"].nunique().reindex(range(24), fill_value=0)
    assert np.array_equal(spread.per_question["positions_shifted"], positions)
    assert spread.median.estimate == pytest.approx(spread.per_question["share"].median())
    assert spread.median.low <= spread.median.estimate <= spread.median.high
    assert spread.without.estimate == pytest.approx((positions == 0).mean())


def test_shifts_of_a_few_questions_are_said_to_be_theirs():
    table = pairs_table(questions=40, planted=Planted(share=0, stable=1e-3))
    table.loc[table["question"] < 4, "cosine"] = np.float32(0.5)
    spread = questions_of(table)
    assert spread.without.estimate == pytest.approx(0.9)
    assert spread.without.low < 0.9 < spread.without.high
    assert spread.top_tenth.estimate == pytest.approx(1)
    assert spread.median.estimate == 0
    assert spread.verdict.startswith("A tenth of the questions has most of the shifts.")


@pytest.mark.parametrize("questions", [40, 5])
def test_even_shifts_are_even_also_where_a_tenth_is_no_whole_number_of_questions(questions):
    spread = questions_of(even(questions))
    assert spread.top_tenth.estimate == pytest.approx(0.1)
    assert (spread.top_tenth.low, spread.top_tenth.high) == pytest.approx((0.1, 0.1))
    assert spread.median.estimate == pytest.approx(0.2)
    assert spread.verdict.startswith("Every question shifts.")


def test_one_question_no_shift_and_nothing_but_shifts():
    assert not questions_of(pairs_table(questions=1)).median.known
    none = questions_of(pairs_table(planted=Planted(share=0, stable=1e-4)))
    assert none.verdict.endswith("none of 24 questions has a shift below 0.9.")
    assert questions_of(pairs_table().assign(cosine=np.float32(0.1))).median.estimate == 1
