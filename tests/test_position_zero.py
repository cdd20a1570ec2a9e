import json

import numpy as np
import pandas as pd
import pytest
from synthetic import Planted, pairs_table

from sst_interp.analyses.basin_shifts import basin_shifts
from sst_interp.analyses.parts.alike import alike
from sst_interp.analyses.parts.question_grid import question_grid, same_questions, share_of_questions
from sst_interp.analyses.position_zero import position_zero
from sst_interp.analyses.statistics.along_texts import likeness, over_questions, pair_mean, ranks
from sst_interp.analyses.statistics.bootstrap import none_seen_bound
from sst_interp.choices import Choices
from sst_interp.errors import SSTError

QUIET = Planted(share=0)


def shifted_at(table, rows, to=0.5):
    """The table with an overlap of `to` in some rows."""
    return table.assign(cosine=table["cosine"].mask(rows, to).astype("float32"))


def ids(questions, names=None):
    return pd.DataFrame({"question": questions, "id": names or [f"record-{q}" for q in questions]})


def test_a_grid_is_the_table():
    table = pairs_table(questions=5, positions=4, layers=3, depths=(2, 4), seed=1)
    table = table[~((table["question"] == 2) & (table["position"] > 1))]
    grid = question_grid(table.sample(frac=1, random_state=0), "replayed")
    assert (grid.a, grid.b, grid.overlap.shape) == (1, 4, (5, 4, 3))
    rows = table[table["b"] == 4]
    q, p, layer = (rows[c].to_numpy() for c in ("question", "position", "layer"))
    assert np.array_equal(grid.overlap[q, p, layer], rows["cosine"].to_numpy(float))
    assert grid.there.sum() == len(rows)
    assert np.isnan(grid.overlap[2, 2:]).all()
    assert np.isnan(grid.mean_distance()[2, 2:]).all()
    assert np.nanmean(grid.distance()[grid.there]) == pytest.approx(np.log(1 - rows["cosine"] + 1e-3).mean())


def test_every_question_shifts_at_0_and_nowhere_else():
    table = pairs_table(planted=QUIET)
    table = shifted_at(table, (table["position"] == 0) & (table["layer"] == 5))
    found = position_zero(table, "replayed", threshold=0.9)
    assert (found.n_shifted, found.n_questions) == (24, 24)
    assert found.questions.low == pytest.approx(1 - none_seen_bound(24))
    assert found.layers.estimate == pytest.approx(1 / 8)
    assert (found.later.estimate, found.difference.estimate) == (0, 1)
    assert found.layers_difference.estimate == pytest.approx(1 / 8)
    assert found.by_layer["zero"].tolist() == [0, 0, 0, 0, 0, 1, 0, 0]
    assert (found.by_layer["later"] == 0).all()
    assert found.by_position["share"].tolist() == [1] + [0] * 15
    for words in ("24 of 24 questions", "[88.3%, 100.0%]", "depth 1 against depth 4", "more of its layers"):
        assert words in found.verdict


def test_it_agrees_with_basin_shifts_about_threshold_and_share():
    table = pairs_table(seed=3)
    found, basin = position_zero(table, "replayed"), basin_shifts(table, "replayed")
    assert (found.threshold, found.provenance) == (basin.threshold, basin.provenance)
    assert found.questions.estimate == pytest.approx(basin.by_position["questions_shifted"][0])
    assert found.layers.estimate == pytest.approx(basin.by_position["share"][0])
    assert np.allclose(found.by_position["layers"], basin.by_position["share"])
    assert np.allclose(found.by_position["share"], basin.by_position["questions_shifted"])
    fixed = position_zero(table, "replayed", Choices(threshold=0.7))
    assert (fixed.threshold, fixed.provenance) == (0.7, "fixed by the user")


def test_a_position_0_like_any_other_does_not_stand_out():
    out, further = 0, []
    for seed in range(60):
        table = pairs_table(positions=8, layers=4, planted=Planted(share=0.2), seed=seed)
        found = position_zero(table, "replayed", threshold=0.9, resamples=400)
        out += "does not stand out" not in found.verdict
        further.append(found.further.estimate)
    assert out <= 8  # 5% nominal, 60 trials, 24 questions
    assert np.mean(further) == pytest.approx(0.5, abs=0.02)


def test_a_position_0_that_moves_less_is_said_to():
    table = pairs_table(planted=Planted(share=0.3))
    table = shifted_at(table, table["position"] == 0, 0.9999)
    found = position_zero(table, "replayed", threshold=0.9)
    assert found.questions.estimate == 0
    assert found.questions.high == pytest.approx(none_seen_bound(24))
    assert found.layers_difference.high < 0
    assert found.further.estimate < 0.1
    assert "fewer of its layers (difference of the shares" in found.verdict
    assert "-" not in found.verdict.split("difference of the shares")[1].split("%")[0]


def test_any_layer_of_many_nearly_always_shifts_and_later_positions_say_so():
    table = pairs_table(layers=40, planted=Planted(share=0.15, question_spread=0))
    found = position_zero(table, "replayed", threshold=0.9)
    assert found.questions.estimate > 0.9
    assert found.later.estimate > 0.9
    assert "does not stand out" in found.verdict


def test_questions_that_share_a_pattern_at_0_are_alike_there_and_nowhere_else():
    rng = np.random.default_rng(0)
    pattern, by_layer = rng.normal(size=10), 2 * rng.normal(size=10)
    v = -5 + by_layer + 0.3 * rng.normal(size=(12, 8, 10))
    v[:, 0] += pattern
    table = pairs_table(12, 8, 10).assign(cosine=1 - np.exp(v).ravel() + 1e-3)
    found = alike(question_grid(table, "replayed"))
    assert found.own_zero.estimate > 0.7
    assert abs(found.own_later.estimate) < 0.1
    assert found.difference.low > 0.5
    assert found.later.estimate > 0.9  # the layers differ in the same way everywhere


def test_unrelated_profiles_are_unlike_however_few_questions_there_are():
    rng = np.random.default_rng(1)
    values = []
    for _ in range(300):
        products, counts = likeness(rng.normal(size=(4, 1, 10)))
        values.append(pair_mean(np.ones((1, 4)), products, counts)[0])
    assert np.mean(values) == pytest.approx(0, abs=0.03)
    same = np.tile(rng.normal(size=(1, 1, 10)), (4, 3, 1))
    products, counts = likeness(np.exp(same * np.array([1.0, 2, 3])[:, None]))  # only the order counts
    found = over_questions(4, lambda w: pair_mean(w, products, counts))
    assert (found.estimate, found.low, found.high) == pytest.approx((1, 1, 1))


def test_likeness_is_the_mean_of_spearmans_correlation():
    rng = np.random.default_rng(2)
    profiles = rng.normal(size=(5, 3, 9))
    profiles[1, 2, 4] = np.nan  # a profile with a gap
    profiles[3, 0] = 1.0  # one without spread
    products, counts = likeness(profiles)
    expected = []
    for p in range(3):
        rows = [q for q in range(5) if (q, p) not in ((1, 2), (3, 0))]
        table = pd.DataFrame(profiles[rows, p].T).corr("spearman").to_numpy()
        expected += table[np.triu_indices(len(rows), 1)].tolist()
    assert pair_mean(np.ones((1, 5)), products, counts)[0] == pytest.approx(np.mean(expected))


def test_ranks_share_ties_and_skip_gaps():
    found = ranks(np.array([3.0, np.nan, 1.0, 3.0]))
    assert found == pytest.approx([2.5, np.nan, 1, 2.5], nan_ok=True)


def test_the_control_stands_beside_it_question_by_question():
    own = pairs_table(questions=12, planted=QUIET)
    own = shifted_at(own, (own["position"] == 0) & (own["layer"] < 2) & (own["question"] < 6))
    control = pairs_table(questions=12, planted=QUIET, seed=1)
    control = shifted_at(
        control, (control["position"] == 0) & (control["layer"] < 6) & (control["question"] > 3)
    )
    found = position_zero(own, "replayed", threshold=0.9, control=control).control
    assert found.n_questions == 12
    assert found.own.estimate == pytest.approx(0.5)
    assert found.control.estimate == pytest.approx(8 / 12)
    assert found.difference.estimate == pytest.approx(2 / 12)
    assert (found.only_own, found.only_control) == (4, 6)
    assert found.layers_difference.estimate == pytest.approx((8 * 6 - 6 * 2) / 96)
    assert found.later_difference.estimate == 0
    assert "starting there makes more of position 0 shift" in found.words()
    assert found.words() in position_zero(own, "replayed", threshold=0.9, control=control).verdict


def test_a_control_that_shifts_more_everywhere_is_no_start():
    own = pairs_table(planted=Planted(share=0.1), seed=1)
    control = pairs_table(planted=Planted(share=0.5), seed=2)
    found = position_zero(own, "replayed", threshold=0.9, control=control).control
    assert found.layers_difference.low > 0
    assert found.excess.low < 0 < found.excess.high
    assert "no difference is seen that is particular to position 0" in found.words()
    same = position_zero(own, "replayed", threshold=0.9, control=own).control
    assert (same.difference.estimate, same.excess.estimate) == (0, 0)


def test_a_control_with_shorter_texts_is_compared_where_both_have_some():
    own = pairs_table(questions=12, positions=20, planted=QUIET)
    own = shifted_at(own, (own["position"] == 0) | (own["position"] >= 8))  # as in `free`, further on
    short = own[own["position"] < 8]
    found = position_zero(own, "replayed", threshold=0.9, control=short).control
    assert (found.later_difference.estimate, found.excess.estimate) == (0, 0)
    assert "no difference is seen that is particular to position 0" in found.words()


def test_the_control_is_paired_by_record_id_if_it_is_known():
    own = shifted_at(t := pairs_table(questions=6, planted=QUIET), (t["position"] == 0) & (t["question"] < 3))
    order = np.array([5, 4, 3, 2, 1, 0])
    control = own.assign(question=order[own["question"]])
    by_index = position_zero(own, "replayed", threshold=0.9, control=control).control
    assert (by_index.only_own, by_index.only_control) == (3, 3)
    names = [f"record-{5 - q}" for q in range(6)]
    known = {"questions": ids(range(6)), "control_questions": ids(range(6), names)}
    by_id = position_zero(own, "replayed", threshold=0.9, control=control, **known).control
    assert (by_id.n_questions, by_id.only_own, by_id.only_control) == (6, 0, 0)
    grid = question_grid(own, "replayed")
    mine, theirs = same_questions(
        grid, grid, ids(range(6)), ids(range(4), ["record-2", "x", "record-2", "record-5"])
    )
    assert (mine.tolist(), theirs.tolist()) == ([5], [3])  # an id that two questions share names neither


def test_a_control_that_cannot_be_used_says_why():
    own = pairs_table(planted=QUIET)
    without = position_zero(own, "replayed", threshold=0.9)
    assert 'not testable: no run with prompt = "blend_off" was given' in without.verdict
    for control, words in (
        (pairs_table(comparisons=("free",)), "in the control, no pairs of comparison 'replayed'"),
        (pairs_table(depths=(2,)), "in the control, no pairs of comparison 'replayed' between 1 and 4"),
        (own.assign(question=own["question"] + 100), "no question in common at position 0"),
        (own[own["position"] > 0], "no question in common at position 0"),
    ):
        found = position_zero(own, "replayed", threshold=0.9, control=control)
        assert words in found.verdict
        json.dumps(found.to_dict(), allow_nan=False)


def test_pairs_of_depths_and_comparisons_are_never_pooled():
    table = pairs_table(depths=(2, 4), comparisons=("replayed", "free"), seed=1)
    found = position_zero(table, "replayed", threshold=0.9)
    alone = position_zero(table[table["comparison"] == "replayed"], "replayed", threshold=0.9)
    assert found.to_dict() == alone.to_dict()
    assert list(found.table["b"]) == [2, 4]
    row = found.table.iloc[1]
    assert row["questions shifted"] == found.questions.estimate
    assert row["layers difference"] == found.layers_difference.estimate
    two = position_zero(table[table["b"] == 2], "replayed", threshold=0.9)
    assert found.table["questions shifted"][0] == two.questions.estimate


def test_the_order_of_rows_and_the_numbering_of_questions_change_nothing():
    table = pairs_table(seed=2)
    found = position_zero(table, "replayed").to_dict()
    assert position_zero(table.sample(frac=1, random_state=1), "replayed").to_dict() == found
    renumbered = position_zero(table.assign(question=table["question"] * 5 + 2), "replayed").to_dict()
    assert renumbered == found


def test_texts_that_end_early_count_where_they_are():
    table = pairs_table(planted=QUIET, seed=1)
    table = table[(table["position"] < 4) | (table["question"] == 0)]
    table = shifted_at(table, (table["position"] > 0) & (table["question"] == 0))
    found = position_zero(table, "replayed", threshold=0.9)
    assert found.by_position["questions"].tolist() == [24] * 4 + [1] * 12
    assert found.later.estimate == pytest.approx(1 / 24)  # questions weigh the same, not positions


def test_no_shifts_and_all_shifts():
    table = pairs_table(planted=QUIET)
    none, every = (
        position_zero(table.assign(cosine=np.float32(c)), "replayed", threshold=0.9) for c in (1, 0)
    )
    assert (none.questions.estimate, none.layers.estimate, none.difference.estimate) == (0, 0, 0)
    assert (every.questions.estimate, every.later_layers.estimate, every.difference.estimate) == (1, 1, 0)
    for found in (none, every):
        assert "does not stand out" in found.verdict
        assert found.further.estimate == 0.5
        assert np.isnan(found.alike.zero.estimate)
        json.dumps(found.to_dict(), allow_nan=False)
        found.figures()


def test_one_question_one_position_nan_one_depth_and_an_empty_table():
    one = position_zero(pairs_table(questions=1), "replayed", threshold=0.9)
    assert "no interval: one question" in one.verdict
    assert "cannot be told from them with one question" in one.verdict
    short = pairs_table(seed=1)
    short = position_zero(short[short["position"] == 0], "replayed", threshold=0.9)
    assert "no later positions to compare it with" in short.verdict
    late = pairs_table()
    late = position_zero(late[late["position"] > 0], "replayed", threshold=0.9)
    assert late.verdict == "not testable: comparison 'replayed' has no pairs at position 0."
    table = pairs_table()
    table.loc[table["question"] == 3, "cosine"] = np.nan
    assert position_zero(table, "replayed", threshold=0.9).n_questions == 23
    every = position_zero(table.assign(cosine=np.nan), "replayed")
    assert every.verdict.startswith("not testable: all")
    empty = position_zero(pairs_table(comparisons=()), "replayed")
    assert empty.verdict == "not testable: no pairs of comparison 'replayed' in this run."
    for found in (one, short, late, every, empty):
        json.dumps(found.to_dict(), allow_nan=False)
        found.figures()
    with pytest.raises(SSTError, match="unknown comparison"):
        position_zero(table, "fre")
    with pytest.raises(SSTError, match="lens_jaccard"):
        position_zero(table, "replayed", Choices(overlap="lens_jaccard"))


def test_a_share_of_all_or_of_no_questions_has_an_exact_bound():
    assert share_of_questions(np.ones(198)).low == pytest.approx(0.05 ** (1 / 198))
    assert share_of_questions(np.zeros(198)).high == pytest.approx(1 - 0.05 ** (1 / 198))
    some = share_of_questions(np.array([1.0] * 9 + [0.0] + [np.nan] * 5))
    assert (some.estimate, some.n_questions) == (0.9, 10)
    assert 0.6 < some.low < 0.9 < some.high <= 1
    assert share_of_questions(np.array([])).n_questions == 0


def test_figures_say_what_they_show():
    found = position_zero(pairs_table(), "replayed", control=pairs_table(seed=1))
    figures = found.figures()
    assert set(figures) == {"by_position", "layers"}
    for figure in figures.values():
        layout = figure.to_dict()["layout"]
        assert "24 questions" in str(layout["title"])
        assert "replayed" in str(layout["title"])
        assert layout["xaxis"]["title"]["text"]
        assert layout["yaxis"]["title"]["text"]
    assert any("control" in (trace.name or "") for trace in figures["by_position"].data)
    assert "<table>" in found._repr_html_()
