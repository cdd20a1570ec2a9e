"""Modes within layers, and the distribution of overlaps. How modes are counted: test_modes.py."""

import time

import numpy as np
import pandas as pd
import pytest
from synthetic import Planted, contrast, pairs_table

from sst_interp.analyses.modes import bimodality, overlap_distribution
from sst_interp.analyses.statistics import modes as dip
from sst_interp.errors import Untestable
from sst_interp.models.choices import Choices

PLACES = (2e-4, 2e-4, 2e-4, 2e-4, 0.3, 0.3, 0.3, 0.3)
"""Layers that each have one mode, at two places."""


def modes_in(table, comparison="teacher_forced", every_pair=False, **options):
    return bimodality(contrast(table, comparison, **{"resamples": 200} | options), every_pair)


def spread_of(table, comparison="teacher_forced", **options):
    return overlap_distribution(contrast(table, comparison, **{"resamples": 200} | options))


def test_pooling_layers_makes_two_modes_that_no_layer_has():
    table = pairs_table(planted=Planted(share=0, layer_places=PLACES), seed=1)
    assert spread_of(table).modes.two  # the pool has two, and means it
    found = modes_in(table)
    assert found.pooled_two
    assert found.layers_tested == 8
    assert found.layers_two == 0
    assert found.made_by_pooling
    assert found.between_layers.estimate > 0.9
    assert found.verdict.startswith("Pooling layers makes two modes; no layer has two.")
    assert "two modes in 0 of 8 layers" in found.verdict


def test_two_modes_within_every_layer_are_two_modes_within_every_layer():
    found = modes_in(pairs_table(planted=Planted(share=0.2), seed=1, questions=40))
    assert found.pooled_two
    assert found.layers_two == 8
    assert not found.made_by_pooling
    assert found.between_layers.high < 0.1
    assert found.verdict.startswith("Two modes, within layers too.")
    assert "two modes in 8 of 8 layers" in found.verdict
    assert (found.by_layer["depth_low"] > 0.5).all()


def test_only_the_layers_that_have_two_are_counted():
    found = modes_in(pairs_table(planted=Planted(share=0.25, stable_layers=5), seed=2, questions=40))
    two = (found.by_layer["modes"] == "two").to_numpy()
    assert two.tolist() == [False] * 5 + [True] * 3
    assert found.layers_two == 3


def test_layers_with_one_mode_are_rarely_called_two_moded():
    """Noise below one mode, in eight layers: 0% to 5% of simulated runs had any layer with two modes."""
    tables = (pairs_table(16, 10, 8, planted=Planted(share=0.2, uniform=True), seed=s) for s in range(12))
    assert sum(modes_in(t, resamples=200).layers_two > 0 for t in tables) <= 2


def test_pooling_pairs_of_depths_makes_modes_too():
    near = pairs_table(planted=Planted(share=0, stable=2e-4), depths=(2,), seed=1)
    far = pairs_table(planted=Planted(share=0, stable=0.3), depths=(4,), seed=2)
    found = modes_in(pd.concat([near, far]))
    rows = found.scopes.set_index("scope")["modes"]
    assert rows["pooled"] == "two"
    assert set(rows["pair"]) == {"one"}
    assert (found.a, found.b) == (1, 4)
    assert found.verdict.startswith("One mode.")


def test_every_row_is_that_part_of_the_table():
    some = Planted(identical=0.1)
    table = pairs_table(
        layers=3, depths=(2, 4), comparisons=("teacher_forced", "free_running"), planted=some, seed=3
    )
    table = pd.concat([table, table[table["b"] == 4].assign(a=3)])
    found = modes_in(table, every_pair=True)
    rows = table[table["comparison"] == "teacher_forced"]
    assert found.scopes["scope"].value_counts().to_dict() == {"layer": 9, "pair": 3, "pooled": 1}
    for row in found.scopes.itertuples():
        part = rows
        for name in ("a", "b", "layer"):
            value = getattr(row, name)
            part = part if np.isnan(value) else part[part[name] == value]
        assert row.pairs == len(part)
        assert row.questions == 24
        assert row.identical == pytest.approx((part["relative_l2"] == 0).mean())
    alone = spread_of(table).modes
    headline = found.scopes[(found.scopes["scope"] == "pair") & (found.scopes["b"] == 4)]
    headline = headline[headline["a"] == 1].iloc[0]
    assert (headline["p"], headline["depth"]) == (alone.p_value, alone.depth)
    fewer = modes_in(table)
    assert len(fewer.scopes) == 1 + 3 + 3
    pd.testing.assert_frame_equal(
        fewer.by_layer.reset_index(drop=True), found.by_layer.reset_index(drop=True)
    )


def test_identical_pairs_are_counted():
    table = pairs_table(planted=Planted(share=0, stable=0.05, identical=0.3), seed=1)
    found = modes_in(table)
    assert found.identical.estimate == pytest.approx((table["relative_l2"] == 0).mean())
    assert found.identical.low < 0.3 < found.identical.high
    assert found.scopes["at_one"].to_numpy() == pytest.approx(found.scopes["identical"].to_numpy(), abs=0.01)


def test_without_diptest_everything_else_is_there(monkeypatch):
    def missing(name):
        raise ImportError(name)

    monkeypatch.setattr(dip.importlib, "import_module", missing)
    found = modes_in(pairs_table(planted=Planted(share=0.2), seed=1))
    assert found.dip_reason == "not installed: pip install diptest"
    assert "dip" not in found.verdict
    assert found.scopes["dip"].isna().all()
    assert found.layers_two > 0


def test_one_question_missing_layers_all_nan_and_nothing():
    one = modes_in(pairs_table(questions=1))
    assert one.verdict.startswith("Too few questions to test for two modes.")
    assert one.pooled_two is None
    for table, words in (
        (pairs_table(comparisons=()), "no pairs"),
        (pairs_table().assign(cosine=np.nan), "NaN"),
    ):
        with pytest.raises(Untestable, match=words):
            modes_in(table)
    holes = pairs_table(planted=Planted(share=0.2), seed=1)
    holes.loc[holes["layer"] == 2, "cosine"] = np.nan
    holes.loc[(holes["layer"] == 3) & (holes["question"] > 3), "cosine"] = np.nan
    some = modes_in(holes)
    assert some.by_layer["layer"].tolist() == [0, 1, 3, 4, 5, 6, 7]
    assert some.by_layer["modes"].tolist()[2] == "not tested"
    assert some.layers_tested == 6
    assert (
        modes_in(pairs_table(layers=2, seed=1), choices=Choices(overlap="relative_l2")).pooled_two is not None
    )


# The distribution of overlaps


def test_identical_states_are_one_mode_at_one():
    found = spread_of(pairs_table().assign(cosine=np.float32(1), relative_l2=np.float32(0)))
    assert found.modes.antimode is None
    assert found.modes.at[0] == pytest.approx(1, abs=1e-3)
    assert found.identical == 1
    assert "100.0% of 3,072 pairs from 24 questions are bit-identical" in found.verdict


def test_steps_of_the_jaccard_index_are_not_modes():
    kept = np.random.default_rng(0).binomial(100, 0.93, size=(24, 128))
    table = pairs_table().assign(lens_jaccard=(kept / (200 - kept)).ravel().astype("float32"))
    assert not spread_of(table, choices=Choices(overlap="lens_jaccard"), resamples=400).modes.two


def test_comparisons_and_pairs_are_never_pooled():
    table = pairs_table(depths=(2, 4), comparisons=("teacher_forced", "free_running"))
    found = spread_of(table)
    assert (found.a, found.b, found.n_pairs) == (1, 4, 24 * 16 * 8)
    alone = table[(table["comparison"] == "teacher_forced") & (table["b"] == 4)]
    assert found.quantiles.equals(spread_of(alone).quantiles)


def test_missing_overlaps_are_counted_and_left_out():
    table = pairs_table()
    table.loc[:9, "cosine"] = np.nan
    found = spread_of(table)
    assert (found.n_excluded, found.n_pairs) == (10, len(table) - 10)
    assert "10 pairs without an overlap are left out" in found.verdict


def test_a_million_pairs_take_about_a_second():
    table = pairs_table(questions=200, positions=170, layers=30)
    start = time.perf_counter()
    found = spread_of(table, resamples=2000)
    assert time.perf_counter() - start < 3  # 0.2 s on an idle machine
    assert found.n_pairs > 1_000_000
    assert found.histograms.sum() == found.n_pairs
