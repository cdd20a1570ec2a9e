import json

import numpy as np
import pandas as pd
import pytest
from synthetic import Planted, pairs_table

from sst_interp.analyses.bimodality import bimodality
from sst_interp.analyses.overlap import overlap_distribution
from sst_interp.analyses.statistics import dip
from sst_interp.errors import SSTError

PLACES = (2e-4, 2e-4, 2e-4, 2e-4, 0.3, 0.3, 0.3, 0.3)
"""Layers that each have one mode, at two places."""


def found_in(table, comparison="replayed", resamples=200, **options):
    return bimodality(table, comparison, resamples=resamples, **options)


def test_pooling_layers_makes_two_modes_that_no_layer_has():
    table = pairs_table(planted=Planted(share=0, layer_places=PLACES), seed=1)
    assert overlap_distribution(table, "replayed", resamples=200).modes.two  # the pool has two, and means it
    found = found_in(table)
    assert found.pooled_two
    assert found.layers_tested == 8
    assert found.layers_two == 0
    assert found.made_by_pooling
    assert found.between_layers.estimate > 0.9
    assert (found.by_layer["components"] == 1).all()
    assert "two modes are in 0 of 8 layers: it is pooling layers that makes the two modes" in found.verdict


def test_two_modes_within_every_layer_are_two_modes_within_every_layer():
    found = found_in(pairs_table(planted=Planted(share=0.2), seed=1, questions=40))
    assert found.pooled_two
    assert found.layers_two == 8
    assert not found.made_by_pooling
    assert found.between_layers.high < 0.1
    assert (found.by_layer["components"] == 2).all()
    assert "two modes are in 8 of 8 layers" in found.verdict
    assert (found.by_layer["depth_low"] > 0.5).all()


def test_only_the_layers_that_have_two_are_counted():
    found = found_in(pairs_table(planted=Planted(share=0.25, stable_layers=5), seed=2, questions=40))
    two = (found.by_layer["modes"] == "two").to_numpy()
    assert two.tolist() == [False] * 5 + [True] * 3
    assert found.layers_two == 3


def test_layers_with_one_mode_are_rarely_called_two_moded():
    """Noise below one mode, in eight layers: 0% to 5% of simulated runs had any layer with two modes."""
    tables = (pairs_table(16, 10, 8, planted=Planted(share=0.2, uniform=True), seed=s) for s in range(12))
    assert sum(found_in(t, resamples=200).layers_two > 0 for t in tables) <= 2


def test_pooling_pairs_of_depths_makes_modes_too():
    near = pairs_table(planted=Planted(share=0, stable=2e-4), depths=(2,), seed=1)
    far = pairs_table(planted=Planted(share=0, stable=0.3), depths=(4,), seed=2)
    found = found_in(pd.concat([near, far]))
    rows = found.scopes.set_index("scope")["modes"]
    assert rows["pooled"] == "two"
    assert set(rows["pair"]) == {"one"}
    assert (found.a, found.b) == (1, 4)
    assert "Of its 2 pairs 0 have two modes over all layers; all pairs pooled have two" in found.verdict


def test_every_row_is_that_part_of_the_table():
    some = Planted(identical=0.1)
    table = pairs_table(layers=3, depths=(2, 4), comparisons=("replayed", "free"), planted=some, seed=3)
    table = pd.concat([table, table[table["b"] == 4].assign(a=3)])
    found = found_in(table, every_pair=True)
    rows = table[table["comparison"] == "replayed"]
    assert found.scopes["scope"].value_counts().to_dict() == {"layer": 9, "pair": 3, "pooled": 1}
    for row in found.scopes.itertuples():
        part = rows
        for name in ("a", "b", "layer"):
            value = getattr(row, name)
            part = part if np.isnan(value) else part[part[name] == value]
        assert row.pairs == len(part)
        assert row.questions == 24
        assert row.identical == pytest.approx((part["relative_l2"] == 0).mean())
    alone = overlap_distribution(table, "replayed", resamples=200).modes
    headline = found.scopes[(found.scopes["scope"] == "pair") & (found.scopes["b"] == 4)]
    headline = headline[headline["a"] == 1].iloc[0]
    assert (headline["p"], headline["depth"]) == (alone.p_value, alone.depth)
    fewer = found_in(table)
    assert len(fewer.scopes) == 1 + 3 + 3
    pd.testing.assert_frame_equal(
        fewer.by_layer.reset_index(drop=True), found.by_layer.reset_index(drop=True)
    )


def test_identical_pairs_are_counted_and_no_component():
    table = pairs_table(planted=Planted(share=0, stable=0.05, identical=0.3), seed=1)
    found = found_in(table)
    assert found.identical.estimate == pytest.approx((table["relative_l2"] == 0).mean())
    assert found.identical.low < 0.3 < found.identical.high
    assert found.scopes["at_one"].to_numpy() == pytest.approx(found.scopes["identical"].to_numpy(), abs=0.01)
    assert (found.scopes["components"] == 1).all()


def test_the_order_of_rows_and_the_numbers_of_questions_change_nothing():
    table = pairs_table(layers=3, depths=(2, 4), planted=Planted(share=0.2), seed=1)
    mixed = table.sample(frac=1, random_state=0).reset_index(drop=True)
    mixed["comparison"] = pd.Categorical(mixed["comparison"])
    found, again = found_in(table), found_in(mixed.assign(question=mixed["question"] * 3 + 7))
    pd.testing.assert_frame_equal(found.scopes, again.scopes)
    assert found.verdict == again.verdict


def test_without_diptest_everything_else_is_there(monkeypatch):
    def missing(name):
        raise ImportError(name)

    monkeypatch.setattr(dip.importlib, "import_module", missing)
    found = found_in(pairs_table(planted=Planted(share=0.2), seed=1))
    assert found.dip_reason == "not installed: pip install diptest"
    assert "dip test not installed: pip install diptest" in found.verdict
    assert found.scopes["dip"].isna().all()
    assert found.layers_two > 0


def test_one_question_missing_layers_all_nan_and_nothing():
    one = found_in(pairs_table(questions=1))
    assert "not testable: too few questions to test for two modes" in one.verdict
    assert one.pooled_two is None
    empty = found_in(pairs_table(comparisons=()))
    assert empty.verdict == "not testable: no pairs of comparison 'replayed' in this run."
    nan = found_in(pairs_table().assign(cosine=np.nan))
    assert nan.verdict.startswith("not testable: all 3,072 overlaps")
    holes = pairs_table(planted=Planted(share=0.2), seed=1)
    holes.loc[holes["layer"] == 2, "cosine"] = np.nan
    holes.loc[(holes["layer"] == 3) & (holes["question"] > 3), "cosine"] = np.nan
    some = found_in(holes)
    assert some.by_layer["layer"].tolist() == [0, 1, 3, 4, 5, 6, 7]
    assert some.by_layer["modes"].tolist()[2] == "not tested"
    assert some.layers_tested == 6
    calm = found_in(pairs_table().assign(cosine=np.float32(1), relative_l2=np.float32(0)))
    assert calm.identical.estimate == 1
    assert "too few to choose" in calm.verdict
    for found in (one, empty, nan, some, calm):
        json.dumps(found.to_dict(), allow_nan=False)
        assert all(figure.to_dict() for figure in found.figures().values())
        assert "<table>" in found._repr_html_()
    with pytest.raises(SSTError, match="unknown comparison"):
        found_in(pairs_table(), "fre")
    with pytest.raises(SSTError, match="lens_jaccard"):
        found_in(pairs_table(), kind="lens_jaccard")


def test_other_overlaps_have_no_angle():
    found = found_in(pairs_table(layers=2, seed=1), kind="relative_l2")
    assert found.scopes["components_angle"].isna().all()
    assert found.pooled_two is not None


def test_figures_name_the_comparison_and_the_sample():
    found = found_in(pairs_table(layers=2, comparisons=("free",)), "free")
    assert set(found.figures()) == {"by_layer", "depth"}
    for figure in found.figures().values():
        text = str(figure.to_dict()["layout"])
        assert "free, each depth on its own text, depth 1 against depth 4; 24 questions" in text
