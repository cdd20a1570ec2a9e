from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
from synthetic import Planted, contrast, pairs_table

from sst_interp.analyses.position_zero import alike, position_zero
from sst_interp.analyses.shifts import basin_shifts
from sst_interp.analyses.statistics.bootstrap import none_seen_bound, share_of_questions
from sst_interp.errors import Untestable
from sst_interp.models.choices import Choices

QUIET = Planted(share=0)


def zero_of(pairs, comparison="teacher_forced", control=None, control_questions=None, **options):
    """Position 0 at a threshold of 0.9, with the pairs of a start-up control."""
    beside = {"blend_off": SimpleNamespace(pairs=control, questions=control_questions)}
    options = {"threshold": 0.9} | options
    beside = {} if control is None else beside
    return position_zero(contrast(pairs, comparison, beside=beside, **options))


def shifted_at(table, rows, to=0.5):
    """The table with an overlap of `to` in some rows."""
    return table.assign(cosine=table["cosine"].mask(rows, to).astype("float32"))


def ids(questions, names=None):
    return pd.DataFrame({"question": questions, "id": names or [f"record-{q}" for q in questions]})


def test_every_question_shifts_at_0_and_nowhere_else():
    table = pairs_table(planted=QUIET)
    table = shifted_at(table, (table["position"] == 0) & (table["layer"] == 5))
    found = zero_of(table)
    assert (found.n_shifted, found.n_questions) == (24, 24)
    assert found.questions.low == pytest.approx(1 - none_seen_bound(24))
    assert found.layers.estimate == pytest.approx(1 / 8)
    assert (found.later.estimate, found.difference.estimate) == (0, 1)
    assert found.layers_difference.estimate == pytest.approx(1 / 8)
    assert found.by_layer["zero"].tolist() == [0, 0, 0, 0, 0, 1, 0, 0]
    assert (found.by_layer["later"] == 0).all()
    assert found.by_position["share"].tolist() == [1] + [0] * 15
    assert found.verdict.startswith(
        "Every question shifts at position 0, more layers than later. Teacher-forced"
    )
    assert "24 of 24 questions (100.0% [88.3%, 100.0%])" in found.verdict


def test_it_agrees_with_basin_shifts_about_shares():
    table = pairs_table(seed=3)
    found, basin = zero_of(table), basin_shifts(contrast(table, threshold=0.9))
    assert found.questions.estimate == pytest.approx(basin.by_position["questions_shifted"][0])
    assert found.layers.estimate == pytest.approx(basin.by_position["share"][0])
    assert np.allclose(found.by_position["layers"], basin.by_position["share"])
    assert np.allclose(found.by_position["share"], basin.by_position["questions_shifted"])


def test_every_comparison_has_one_threshold_given_fixed_or_the_papers():
    table = pairs_table(comparisons=("teacher_forced", "free_running"), seed=3)
    for comparison in ("teacher_forced", "free_running"):
        assert zero_of(table, comparison, threshold=None).threshold == 0.99
        fixed = zero_of(table, comparison, threshold=None, choices=Choices(threshold=0.7))
        assert (fixed.threshold, fixed.provenance) == (0.7, "fixed by the user")
    assert zero_of(table).provenance == "given"
    assert basin_shifts(contrast(table)).threshold != 0.99  # the antimode


def test_a_position_0_like_any_other_does_not_stand_out():
    out, further = 0, []
    for seed in range(60):
        table = pairs_table(positions=8, layers=4, planted=Planted(share=0.2), seed=seed)
        found = zero_of(table, resamples=400)
        out += "as at later positions" not in found.verdict
        further.append(found.further.estimate)
    assert out <= 8  # 5% nominal, 60 trials, 24 questions
    assert np.mean(further) == pytest.approx(0.5, abs=0.02)


def test_a_position_0_that_moves_less_is_said_to():
    table = pairs_table(planted=Planted(share=0.3))
    table = shifted_at(table, table["position"] == 0, 0.9999)
    found = zero_of(table)
    assert found.questions.estimate == 0
    assert found.questions.high == pytest.approx(none_seen_bound(24))
    assert found.layers_difference.high < 0
    assert found.further.estimate < 0.1
    assert found.verdict.startswith("No question shifts at position 0, fewer layers than later.")


def test_any_layer_of_many_nearly_always_shifts_and_later_positions_say_so():
    table = pairs_table(layers=40, planted=Planted(share=0.15, question_spread=0))
    found = zero_of(table)
    assert found.questions.estimate > 0.9
    assert found.later.estimate > 0.9
    assert found.verdict.startswith("Every question shifts at position 0, as at later positions.")


def test_questions_that_share_a_pattern_at_0_are_alike_there_and_nowhere_else():
    rng = np.random.default_rng(0)
    pattern, by_layer = rng.normal(size=10), 2 * rng.normal(size=10)
    v = -5 + by_layer + 0.3 * rng.normal(size=(12, 8, 10))
    v[:, 0] += pattern
    table = pairs_table(12, 8, 10).assign(cosine=1 - np.exp(v).ravel() + 1e-3)
    found = alike(contrast(table).grid, 500, 0)
    assert found.own_zero.estimate > 0.7
    assert abs(found.own_later.estimate) < 0.1
    assert found.difference.low > 0.5
    assert found.later.estimate > 0.9  # the layers differ in the same way everywhere


def test_the_control_stands_beside_it_question_by_question():
    own = pairs_table(questions=12, planted=QUIET)
    own = shifted_at(own, (own["position"] == 0) & (own["layer"] < 2) & (own["question"] < 6))
    control = pairs_table(questions=12, planted=QUIET, seed=1)
    control = shifted_at(
        control, (control["position"] == 0) & (control["layer"] < 6) & (control["question"] > 3)
    )
    found = zero_of(own, control=control).control
    assert found.n_questions == 12
    assert found.own.estimate == pytest.approx(0.5)
    assert found.control.estimate == pytest.approx(8 / 12)
    assert found.difference.estimate == pytest.approx(2 / 12)
    assert (found.only_own, found.only_control) == (4, 6)
    assert found.layers_difference.estimate == pytest.approx((8 * 6 - 6 * 2) / 96)
    assert found.later_difference.estimate == 0
    assert "starting there makes more of position 0 shift" in found.words()
    assert found.words() in zero_of(own, control=control).verdict


def test_a_control_that_shifts_more_everywhere_is_no_start():
    own = pairs_table(planted=Planted(share=0.1), seed=1)
    control = pairs_table(planted=Planted(share=0.5), seed=2)
    found = zero_of(own, control=control).control
    assert found.layers_difference.low > 0
    assert found.excess.low < 0 < found.excess.high
    assert "no difference is seen that is particular to position 0" in found.words()
    same = zero_of(own, control=own).control
    assert (same.difference.estimate, same.excess.estimate) == (0, 0)


def test_a_control_with_shorter_texts_is_compared_where_both_have_some():
    own = pairs_table(questions=12, positions=20, planted=QUIET)
    own = shifted_at(own, (own["position"] == 0) | (own["position"] >= 8))  # as in free-running, further on
    short = own[own["position"] < 8]
    found = zero_of(own, control=short).control
    assert (found.later_difference.estimate, found.excess.estimate) == (0, 0)
    assert "no difference is seen that is particular to position 0" in found.words()


def test_the_control_is_paired_by_record_id_if_it_is_known():
    own = shifted_at(t := pairs_table(questions=6, planted=QUIET), (t["position"] == 0) & (t["question"] < 3))
    control = own.assign(question=5 - own["question"])
    by_index = zero_of(own, control=control).control
    assert (by_index.only_own, by_index.only_control) == (3, 3)
    names = [f"record-{q}" for q in range(6)]
    known = pd.DataFrame({"question": range(6), "id": names})
    theirs = known.assign(id=names[::-1])
    by_id = zero_of(own, control=control, questions=known, control_questions=theirs).control
    assert (by_id.n_questions, by_id.only_own, by_id.only_control) == (6, 0, 0)


def test_a_control_that_cannot_be_used_says_why():
    own = pairs_table(planted=QUIET)
    without = zero_of(own)
    assert 'not testable: no run with prompt = "blend_off" was given' in without.verdict
    for control, words in (
        (
            pairs_table(comparisons=("free_running",)),
            "in the control, the run has no pairs of comparison 'teacher_forced'",
        ),
        (pairs_table(depths=(2,)), "in the control, no pairs of comparison 'teacher_forced' between 1 and 4"),
        (own.assign(question=own["question"] + 100), "no question in common at position 0"),
        (own[own["position"] > 0], "no question in common at position 0"),
    ):
        found = zero_of(own, control=control)
        assert words in found.verdict


def test_pairs_of_depths_have_a_row_each():
    table = pairs_table(depths=(2, 4), seed=1)
    found = zero_of(table)
    assert list(found.table["b"]) == [2, 4]
    row = found.table.iloc[1]
    assert row["questions shifted"] == found.questions.estimate
    assert row["layers difference"] == found.layers_difference.estimate
    assert found.table["questions shifted"][0] == zero_of(table[table["b"] == 2]).questions.estimate


def test_texts_that_end_early_count_where_they_are():
    table = pairs_table(planted=QUIET, seed=1)
    table = table[(table["position"] < 4) | (table["question"] == 0)]
    table = shifted_at(table, (table["position"] > 0) & (table["question"] == 0))
    found = zero_of(table)
    assert found.by_position["questions"].tolist() == [24] * 4 + [1] * 12
    assert found.later.estimate == pytest.approx(1 / 24)  # questions weigh the same, not positions


def test_no_shifts_and_all_shifts():
    table = pairs_table(planted=QUIET)
    none, every = (zero_of(table.assign(cosine=np.float32(c))) for c in (1, 0))
    assert (none.questions.estimate, none.layers.estimate, none.difference.estimate) == (0, 0, 0)
    assert (every.questions.estimate, every.later_layers.estimate, every.difference.estimate) == (1, 1, 0)
    for found in (none, every):
        assert "as at later positions" in found.verdict
        assert found.further.estimate == 0.5
        assert np.isnan(found.alike.zero.estimate)


def test_one_question_one_position_and_some_or_all_missing():
    one = zero_of(pairs_table(questions=1))
    assert "no interval: one question" in one.verdict
    assert "not told from later" in one.verdict
    table = pairs_table(seed=1)
    short = zero_of(table[table["position"] == 0])
    assert "there are no later positions to compare it with" in short.verdict
    with pytest.raises(Untestable, match="comparison 'teacher_forced' has no pairs at position 0"):
        zero_of(table[table["position"] > 0])
    table.loc[table["question"] == 3, "cosine"] = np.nan
    assert zero_of(table).n_questions == 23


def test_a_share_of_all_or_of_no_questions_has_an_exact_bound():
    assert share_of_questions(np.ones(198)).low == pytest.approx(0.05 ** (1 / 198))
    assert share_of_questions(np.zeros(198)).high == pytest.approx(1 - 0.05 ** (1 / 198))
    some = share_of_questions(np.array([1.0] * 9 + [0.0] + [np.nan] * 5))
    assert (some.estimate, some.n_questions) == (0.9, 10)
    assert 0.6 < some.low < 0.9 < some.high <= 1
    assert share_of_questions(np.array([])).n_questions == 0


def test_the_figure_has_the_control():
    figure = zero_of(pairs_table(), control=pairs_table(seed=1)).figure()
    assert any("control" in (trace.name or "") for trace in figure.data)
