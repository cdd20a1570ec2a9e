import json

import numpy as np
import pytest
from synthetic import Planted, pairs_table

from sst_interp.analyses.basin_shifts import basin_shifts
from sst_interp.analyses.layer_profile import layer_profile
from sst_interp.choices import Choices

FIXED = Choices(threshold=0.9)


def profile_of(table, resamples=400, seed=0):
    return layer_profile(table, basin_shifts(table, "replayed", FIXED, 50), resamples, seed)


def test_layers_that_do_not_shift_are_found_and_no_others_are_missed():
    found = profile_of(pairs_table(40, 12, 8, planted=Planted(share=0.2, stable_layers=2), seed=1))
    off = found.profile["p_layers"].to_numpy() < 0.05
    assert off[:2].all()
    assert (found.profile["off"][:2] < 0).all()
    assert found.layers_off == off.sum()
    assert "layer 0 (0.0%" in found.verdict or "layer 1 (0.0%" in found.verdict


def test_a_flat_profile_is_rarely_called_anything_else():
    tables = (pairs_table(24, 8, 6, planted=Planted(share=0.2), seed=seed) for seed in range(40))
    assert sum(profile_of(t, 200).layers_off > 0 for t in tables) <= 6  # 5% nominal: 7 or more has 1.4%


def test_the_band_is_wider_than_each_interval_and_holds_the_share():
    rows = profile_of(pairs_table(40, 12, 8, planted=Planted(share=0.2), seed=2)).profile
    assert (rows["band_low"] <= rows["share"]).all()
    assert (rows["share"] <= rows["band_high"]).all()
    assert (rows["band_high"] - rows["band_low"]).mean() > 1.2 * (rows["high"] - rows["low"]).mean()
    assert (rows["band_low"] >= 0).all()
    assert (rows["band_high"] <= 1).all()


def test_the_shares_are_the_counts():
    table = pairs_table(planted=Planted(stable_layers=3), seed=1)
    found = profile_of(table)
    rate = (table["cosine"] < 0.9).groupby(table["layer"]).mean()
    assert np.allclose(found.profile["share"], rate)
    assert found.share.estimate == pytest.approx((table["cosine"] < 0.9).mean())
    mixed = table.sample(frac=1, random_state=0)
    assert np.allclose(profile_of(mixed).profile.to_numpy(), found.profile.to_numpy(), equal_nan=True)


def test_one_layer_one_question_no_shift_all_shifted_and_nothing():
    one_layer = profile_of(pairs_table(layers=1))
    assert "whether the profile is flat is not tested" in one_layer.verdict
    one_question = profile_of(pairs_table(questions=1))
    assert "not tested" in one_question.verdict
    assert one_question.profile["band_low"].isna().all()
    none = profile_of(pairs_table(planted=Planted(share=0, stable=1e-4)))
    assert "no layer shifts below 0.9" in none.verdict
    everywhere = profile_of(pairs_table().assign(cosine=np.float32(0.1)))
    assert "not tested" in everywhere.verdict
    empty = profile_of(pairs_table(comparisons=()))
    assert empty.verdict.startswith("not testable")
    assert empty.layers_off == 0
    nan = pairs_table(seed=1)
    nan.loc[nan["layer"] == 2, "cosine"] = np.nan
    assert profile_of(nan).profile["layer"].tolist() == [0, 1, 3, 4, 5, 6, 7]
    for found in (one_layer, one_question, none, everywhere, empty):
        json.dumps(found.to_dict(), allow_nan=False)
        assert found.figure().to_dict()
        assert "<table>" in found._repr_html_()


def test_the_figure_names_the_comparison_and_the_sample():
    text = str(profile_of(pairs_table()).figure().to_dict()["layout"])
    assert "replayed, on the same text, depth 1 against depth 4; 24 questions" in text
    assert "all layers at once" in text
