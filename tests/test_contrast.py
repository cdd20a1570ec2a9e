import numpy as np
import pandas as pd
import pytest
from synthetic import contrast, pairs_table

from sst_interp.analyses.contrast import overlap_of, same_questions
from sst_interp.errors import SSTError, Untestable
from sst_interp.models.choices import Choices


def ids(questions, names=None):
    return pd.DataFrame({"question": questions, "id": names or [f"record-{q}" for q in questions]})


def test_overlap_kinds():
    table = pairs_table(questions=2)
    assert np.array_equal(overlap_of(table), table["cosine"].to_numpy(float))
    assert np.allclose(overlap_of(table, "relative_l2"), 1 - table["relative_l2"])
    with pytest.raises(SSTError, match="did not record lens_jaccard"):
        overlap_of(table, "lens_jaccard")
    jaccard = table.assign(lens_jaccard=np.float32(0.5))
    assert (overlap_of(jaccard, "lens_jaccard") == 0.5).all()
    with pytest.raises(SSTError, match="unknown overlap"):
        overlap_of(table, "cosin")


def test_a_comparison_that_is_not_there_is_named_and_so_is_a_pair():
    with pytest.raises(Untestable, match="'free_running'"):
        contrast(pairs_table(), "free_running").overlap  # noqa: B018
    with pytest.raises(SSTError, match="unknown comparison"):
        contrast(pairs_table(), "fre")
    with pytest.raises(Untestable, match="between 2 and 3"):
        contrast(pairs_table()).at(2, 3).rows  # noqa: B018


def test_the_pairs_that_are_there():
    table = pairs_table(questions=1, positions=1, layers=1)
    pairs = [(2, 3), (1, 4), (1, 2), (1, 4), (2, 3), (127, 127)]
    many = pd.concat([table.assign(a=np.int8(a), b=np.int8(b)) for a, b in pairs])
    assert contrast(many).pairs_there == [(1, 2), (1, 4), (2, 3), (127, 127)]
    assert (contrast(many).a, contrast(many).b) == (1, 4)


def test_a_grid_is_the_table():
    table = pairs_table(questions=5, positions=4, layers=3, depths=(2, 4), seed=1)
    table = table[~((table["question"] == 2) & (table["position"] > 1))]
    grid = contrast(table.sample(frac=1, random_state=0)).grid
    assert (grid.a, grid.b, grid.overlap.shape) == (1, 4, (5, 4, 3))
    rows = table[table["b"] == 4]
    q, p, layer = (rows[c].to_numpy() for c in ("question", "position", "layer"))
    assert np.array_equal(grid.overlap[q, p, layer], rows["cosine"].to_numpy(float))
    assert grid.there.sum() == len(rows)
    assert np.isnan(grid.overlap[2, 2:]).all()
    assert np.isnan(grid.mean_distance()[2, 2:]).all()
    assert np.nanmean(grid.distance()[grid.there]) == pytest.approx(np.log(1 - rows["cosine"] + 1e-3).mean())


def test_questions_of_two_runs_are_paired_by_index_or_by_record_id():
    grid = contrast(pairs_table(questions=6)).grid
    mine, theirs = same_questions(grid, grid)
    assert np.array_equal(mine, theirs)
    known = ids(range(4), ["record-2", "x", "record-2", "record-5"])
    mine, theirs = same_questions(grid, grid, ids(range(6)), known)
    assert (mine.tolist(), theirs.tolist()) == ([5], [3])  # an id that two questions share names neither


def test_a_question_map_is_that_question():
    table = pairs_table(depths=(2, 4), seed=1)
    shown = contrast(table).question_map(5)
    rows = table[(table["question"] == 5) & (table["b"] == 4)].set_index(["position", "layer"])
    assert shown.overlap.shape == (16, 8)
    assert shown.overlap.loc[3, 7] == pytest.approx(rows.loc[(3, 7), "cosine"])
    ratio = rows.loc[(3, 7), "norm_b"] / rows.loc[(3, 7), "norm_a"]
    assert shown.norm_ratio.loc[3, 7] == pytest.approx(ratio, rel=1e-6)
    with pytest.raises(SSTError, match="question 99"):
        contrast(table).question_map(99)


def test_the_threshold_is_given_fixed_the_antimode_or_the_papers():
    two, one = pairs_table(seed=3), pairs_table(planted=None).assign(cosine=np.float32(0.9999))
    assert contrast(two, threshold=0.4).division == (0.4, "given")
    assert contrast(two, choices=Choices(threshold=0.7)).division == (0.7, "fixed by the user")
    own = contrast(two).division
    assert own.provenance == "antimode of this run"
    assert own == contrast(two).at(1, 4).division
    assert contrast(one).division.value == 0.99
    assert "the distribution has one mode" in contrast(one).division.provenance
