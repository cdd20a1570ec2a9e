import json

import numpy as np
import pytest
from synthetic import Planted, pairs_table

from sst_interp.analyses.basin_shifts import basin_shifts
from sst_interp.analyses.shifts_per_question import shifts_per_question
from sst_interp.choices import Choices

FIXED = Choices(threshold=0.9)


def found_in(table, resamples=300):
    return shifts_per_question(table, basin_shifts(table, "replayed", FIXED, 50), resamples)


def test_the_table_is_the_counts():
    table = pairs_table(planted=Planted(share=0.2), seed=1)
    found = found_in(table)
    shifted = table["cosine"] < 0.9
    assert np.array_equal(found.per_question["shifted"], shifted.groupby(table["question"]).sum())
    positions = table[shifted].groupby("question")["position"].nunique().reindex(range(24), fill_value=0)
    assert np.array_equal(found.per_question["positions_shifted"], positions)
    assert found.median.estimate == pytest.approx(found.per_question["share"].median())
    assert found.median.low <= found.median.estimate <= found.median.high
    assert found.without.estimate == pytest.approx((positions == 0).mean())


def test_shifts_of_a_few_questions_are_said_to_be_theirs():
    table = pairs_table(questions=40, planted=Planted(share=0, stable=1e-3))
    table.loc[table["question"] < 4, "cosine"] = np.float32(0.5)
    found = found_in(table)
    assert found.without.estimate == pytest.approx(0.9)
    assert found.without.low < 0.9 < found.without.high
    assert found.top_tenth.estimate == pytest.approx(1)
    assert found.median.estimate == 0
    assert "90.0% [" in found.verdict


def test_even_shifts_are_even():
    table = pairs_table(questions=40, positions=10)
    table["cosine"] = np.where(table["position"] < 2, 0.5, 0.999).astype("float32")
    found = found_in(table)
    assert found.top_tenth.estimate == pytest.approx(0.1)
    assert (found.top_tenth.low, found.top_tenth.high) == pytest.approx((0.1, 0.1))
    assert found.median.estimate == pytest.approx(0.2)


def test_the_tenth_is_a_tenth_when_it_is_no_whole_number_of_questions():
    table = pairs_table(questions=5, positions=10)
    table["cosine"] = np.where(table["position"] < 2, 0.5, 0.999).astype("float32")
    assert found_in(table).top_tenth.estimate == pytest.approx(0.1)


def test_one_question_no_shift_all_shifted_and_nothing():
    one = found_in(pairs_table(questions=1))
    assert not one.median.known
    none = found_in(pairs_table(planted=Planted(share=0, stable=1e-4)))
    assert none.verdict.endswith("none of 24 questions has a shift below 0.9.")
    everywhere = found_in(pairs_table().assign(cosine=np.float32(0.1)))
    assert everywhere.median.estimate == 1
    empty = found_in(pairs_table(comparisons=()))
    assert empty.verdict.startswith("not testable")
    for found in (one, none, everywhere, empty):
        json.dumps(found.to_dict(), allow_nan=False)
        assert found.figure().to_dict()
        assert "<table>" in found._repr_html_()


def test_the_figure_names_the_comparison_and_the_sample():
    text = str(found_in(pairs_table()).figure().to_dict()["layout"])
    assert "replayed, on the same text, depth 1 against depth 4; 24 questions" in text
