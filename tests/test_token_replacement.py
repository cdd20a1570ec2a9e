import json

import numpy as np
import pandas as pd
import pytest
from synthetic import Planted, pairs_table
from synthetic_outputs import outputs_table, steps_table

from sst_interp.analyses.parts.lens_replacement import lens_replacement, replaced_of
from sst_interp.analyses.parts.output_change import rank_table
from sst_interp.analyses.parts.positions import position_overlaps, readings
from sst_interp.analyses.statistics.bootstrap import LEVELS, grouped_medians, level_median, to_levels
from sst_interp.analyses.token_replacement import token_replacement
from sst_interp.choices import COMPARISONS
from sst_interp.errors import SSTError


def run(share=0.05, seed=0, comparisons=("replayed",), **effects):
    pairs = pairs_table(
        questions=30, positions=12, layers=5, planted=Planted(share=share), comparisons=comparisons, seed=seed
    )
    return outputs_table(pairs, seed=seed, **effects), pairs


def found(outputs, pairs, comparison="replayed", **options):
    options = {"threshold": 0.95, "resamples": 300} | options
    return token_replacement(outputs, pairs, comparison, **options)


def test_planted_medians_are_found_at_shifts_and_at_stable_positions():
    result = found(*run(replaced=(54, 4)))
    assert result.shifted.estimate == pytest.approx(54, abs=1)
    assert result.stable.estimate == pytest.approx(4, abs=1)
    assert result.difference.estimate == result.shifted.estimate - result.stable.estimate
    assert result.shifted.low <= result.shifted.estimate <= result.shifted.high
    assert result.difference.low > 40
    for words in ("replayed", "depth 1 against depth 4", "30 questions", "360 positions", "rank"):
        assert words in result.verdict


def test_the_numbers_are_the_counts():
    outputs, pairs = run(seed=2)
    result = found(outputs, pairs)
    moved = (pairs["cosine"] < 0.95).groupby([pairs["question"], pairs["position"]]).any().to_numpy()
    assert result.shifted.estimate == np.median(outputs["replaced"][moved])
    assert result.stable.estimate == np.median(outputs["replaced"][~moved])
    table = result.table.set_index("where")
    assert table.loc["a layer shifted", "positions"] == moved.sum()
    assert table.loc["a layer shifted", "new_winner"] == pytest.approx(
        outputs["argmax_changed"][moved].mean()
    )
    assert table.loc["no layer shifted", "kl"] == pytest.approx(np.median(outputs["kl"][~moved]), rel=1e-6)
    last = (pairs[pairs["layer"] == 4]["cosine"] < 0.95).to_numpy()
    assert table.loc["last layer shifted", "positions"] == last.sum()
    assert result.last_shifted.estimate == np.median(outputs["replaced"][last])
    assert (result.histogram[["shifted", "stable"]].sum() == [moved.sum(), (~moved).sum()]).all()


def test_no_effect_is_found_at_the_nominal_rate_only():
    missed = 0
    for seed in range(40):
        difference = found(*run(seed=seed, replaced=(20, 20))).difference
        missed += not difference.low <= 0 <= difference.high
    assert missed <= 6  # 5% nominal, 40 trials; 7 or more has probability 0.3%
    assert "no difference is shown" in found(*run(seed=1, replaced=(20, 20))).verdict


def test_winners_are_counted_by_rank():
    outputs, pairs = run(ranks=(80, 3), changed=(0.9, 0.2), seed=1)
    result = found(outputs, pairs)
    ranks = outputs["winner_rank"][outputs["argmax_changed"]]
    assert result.n_winners == len(ranks) == result.ranks[["shifted", "stable"]].to_numpy().sum()
    assert result.deepest_rank == ranks.max()
    assert result.beyond.estimate == pytest.approx((ranks > 50).mean())
    beyond = result.ranks["rank"] >= 51
    assert result.ranks.loc[beyond, ["shifted", "stable"]].to_numpy().sum() == (ranks > 50).sum()
    assert result.ranks.loc[result.ranks["rank"] >= 5, "stable"].sum() == 0
    assert result.table.set_index("where").loc["no layer shifted", "deepest_rank"] <= 3


def test_no_new_winner_is_said_with_what_it_excludes():
    result = found(*run(changed=(0.0, 0.0)))
    assert (result.n_winners, result.deepest_rank) == (0, None)
    assert "never changes; at most 9.5% of such questions" in result.verdict
    shallow = found(*run(ranks=(5, 5)))
    assert "none of them from beyond rank 50 (at most" in shallow.verdict


def test_entropies_are_of_the_passes_that_are_compared():
    outputs, pairs = run(comparisons=COMPARISONS)
    planted = {("own", 1, 1): 1.0, ("depth1", 4, 4): 3.0, ("own", 4, 4): 5.0, ("own", 4, 1): 7.0}
    steps = steps_table(outputs, entropy=planted)
    expected = {"replayed": (1, 3), "free": (1, 5), "within": (7, 5)}
    for comparison, (a, b) in expected.items():
        row = found(outputs, pairs, comparison, steps=steps).table.iloc[1]
        assert row["entropy_a"] == pytest.approx(a, abs=0.02)
        assert row["entropy_b"] == pytest.approx(b, abs=0.02)
        assert row["entropy_change"] == pytest.approx(b - a, abs=0.02)
    assert found(outputs, pairs).table["entropy_a"].isna().all()
    assert len(readings(None, "free", 1, 4)) == len(readings(pd.DataFrame(), "free", 1, 4)) == 0


def test_in_free_the_positions_before_the_texts_part_stand_by_themselves():
    outputs, pairs = run(comparisons=("free",), share=0.3)
    result = found(outputs, pairs, "free")
    rows = result.table.set_index("where")["positions"]
    assert rows["a layer shifted, the same tokens read"] == 0
    assert rows["no layer shifted, the same tokens read"] == 30 * 3
    assert rows.iloc[4:].sum() == rows.iloc[:2].sum() == len(outputs)
    assert "Only while both have read the same tokens: none against" in result.verdict


def test_every_pair_of_depths_has_its_row_and_nothing_is_pooled():
    pairs = pairs_table(questions=10, depths=(2, 4), comparisons=("replayed", "within"), seed=1)
    outputs = outputs_table(pairs)
    result = found(outputs, pairs)
    assert list(zip(result.per_pair["a"], result.per_pair["b"], strict=True)) == [(1, 2), (1, 4)]
    alone = [t[(t["comparison"] == "replayed") & (t["b"] == 4)] for t in (outputs, pairs)]
    assert found(*alone).verdict == result.verdict
    assert result.per_pair["difference"].iloc[1] == result.difference.estimate


def test_order_of_rows_and_names_of_questions_change_nothing():
    outputs, pairs = run(seed=4)
    mixed = outputs.sample(frac=1, random_state=0), pairs.sample(frac=1, random_state=1)
    renamed = [table.assign(question=table["question"] * 7 + 100_000) for table in (outputs, pairs)]
    one = found(outputs, pairs)
    assert found(*renamed).to_dict() == one.to_dict()
    assert found(*mixed).shifted.estimate == one.shifted.estimate
    assert found(*mixed).table["positions"].tolist() == one.table["positions"].tolist()


def test_all_or_nothing_shifted_leaves_nothing_to_compare_and_says_so():
    outputs, pairs = run()
    everything = found(outputs, pairs.assign(cosine=0.1))
    assert "every position of 360" in everything.verdict
    assert "not testable" in everything.verdict
    assert np.isfinite(everything.shifted.estimate)
    nothing = found(outputs, pairs.assign(cosine=0.999))
    assert "no position of 360" in nothing.verdict
    assert np.isfinite(nothing.stable.estimate)
    for result in (everything, nothing):
        assert np.isnan(result.difference.estimate)
        json.dumps(result.to_dict(), allow_nan=False)
        result.figures()


def test_what_cannot_be_tested_says_why_and_nothing_crashes():
    outputs, pairs = run()
    for tables in ((pd.DataFrame(), pairs), (outputs, pd.DataFrame()), (outputs[:0], pairs[:0])):
        assert found(*tables).verdict.startswith("not testable: the table ")
    assert found(outputs, pairs, "free").verdict.startswith("not testable: no pairs of comparison 'free'")
    assert found(outputs, pairs.assign(cosine=np.nan)).verdict.startswith("not testable: every position")
    for result in (found(pd.DataFrame(), pairs), found(outputs, pairs, "within")):
        json.dumps(result.to_dict(), allow_nan=False)
        assert "not testable" in str(result.figure().to_dict()["layout"])
        assert "<h3>" in result._repr_html_()
    with pytest.raises(SSTError, match="comparison"):
        found(outputs, pairs, "freee")
    with pytest.raises(SSTError, match="lens_jaccard"):
        found(outputs, pairs, kind="lens_jaccard")


def test_positions_with_a_nan_overlap_are_left_out_and_counted():
    outputs, pairs = run()
    broken = pairs.assign(cosine=pairs["cosine"].mask((pairs["position"] == 3) & (pairs["layer"] == 1)))
    result = found(outputs, broken)
    assert (result.n_excluded, result.n_positions) == (30, 330)
    assert "30 positions with a missing overlap or value are left out" in result.verdict
    unknown = outputs.assign(replaced=outputs["replaced"].mask(outputs["position"] == 5))
    assert found(unknown, pairs).n_excluded == 30
    halved = found(outputs.assign(kl=outputs["kl"].mask(outputs["position"] < 6)), pairs)
    assert np.isfinite(halved.table["kl"]).all()


def test_one_question_has_estimates_and_no_intervals():
    outputs, pairs = run(share=0.3)
    one = found(outputs[outputs["question"] == 3], pairs[pairs["question"] == 3])
    assert "no interval: one question" in one.verdict
    assert not one.shifted.known
    one.figures()


def test_figures_say_comparison_questions_and_units():
    result = found(*run())
    for figure in (result.figures()["replaced"], result.figures()["ranks"]):
        layout = str(figure.to_dict()["layout"])
        for words in ("replayed", "30 questions", "360 positions", "below 0.95"):
            assert words in layout
        assert figure.layout.xaxis.title.text
        assert figure.layout.yaxis.title.text
    assert "not testable: this run did not record lens" in str(
        result.figures()["by_layer"].to_dict()["layout"]
    )


def test_the_lens_gives_back_how_many_tokens_were_replaced():
    n = np.arange(101)
    assert np.array_equal(replaced_of((100 - n) / (100 + n)), n)
    assert np.array_equal(replaced_of(((100 - n) / (100 + n)).astype("float32")), n)


def test_tokens_replaced_by_layer_are_the_planted_ones():
    outputs, pairs = run(share=0.2, seed=5)
    expected = np.where(pairs["cosine"] < 0.95, 30 + 5 * pairs["layer"], 2)
    pairs["lens_jaccard"] = ((100 - expected) / (100 + expected)).astype("float32")
    table = found(outputs, pairs).by_layer
    assert table["shifted"].tolist() == [30, 35, 40, 45, 50]
    assert (table["stable"] == 2).all()
    assert (table["difference"] == table["shifted"] - 2).all()
    assert (table["positions_shifted"] + table["positions_stable"] == 360).all()
    by_lens = found(outputs, pairs, kind="lens_jaccard", threshold=0.5)
    assert by_lens.no_layers == "what shifted is itself read off the lens"
    with pytest.raises(SSTError, match="did not record"):
        lens_replacement(pairs.assign(lens_jaccard=np.nan), "replayed")


def test_a_position_is_its_layers():
    _, pairs = run(seed=3)
    table = position_overlaps(pairs, "replayed", threshold=0.95)
    by = pairs.groupby(["question", "position"])["cosine"]
    assert np.allclose(table["lowest"], by.min())
    assert np.array_equal(table["shifted"], by.apply(lambda x: (x < 0.95).sum()))
    assert np.allclose(table["last"], pairs[pairs["layer"] == 4]["cosine"])
    assert (table["layers"] == 5).all()


def test_levels_keep_the_order_and_medians_are_medians():
    rng = np.random.default_rng(0)
    for values in (rng.integers(0, 101, 999), rng.normal(size=5000), np.r_[np.zeros(4000), rng.random(900)]):
        level, of_level = to_levels(values)
        assert len(of_level) <= LEVELS
        assert (np.diff(of_level) > 0).all()
        order = np.argsort(values)
        assert (np.diff(level[order]) >= 0).all()
        lowest, highest = (pd.Series(values).groupby(level).agg(f).to_numpy() for f in ("min", "max"))
        assert ((lowest <= of_level) & (of_level <= highest)).all()
        assert (lowest[1:] > highest[:-1]).all()
    counts = np.array([[2, 0, 2], [1, 2, 0], [0, 0, 0], [0, 0, 3]])
    assert np.array_equal(level_median(counts, np.array([1.0, 2, 5])), [3, 2, np.nan, 5], equal_nan=True)


def test_intervals_of_medians_hold_the_truth_as_often_as_stated():
    inside = 0
    for seed in range(60):
        rng = np.random.default_rng(seed)
        question = np.repeat(np.arange(40), 12)
        values = np.exp(rng.normal(size=40)[question] + rng.normal(size=480))
        interval = grouped_medians(question, values, [values > 0], resamples=400)[0]
        inside += interval.low <= 1 <= interval.high
        assert interval.estimate == np.median(values)
    assert inside >= 51  # 95% nominal, 60 trials; 50 or fewer has probability 0.2% at 93%


def test_a_tie_between_winners_counts_as_the_nearest_rank():
    """In bf16 two tokens can be equally likely: a new winner then comes from rank 0."""
    rank = np.array([0, 1, 0, 3])
    table = rank_table(rank, np.array([True, True, False, False]))
    assert table["shifted"].sum() == table["stable"].sum() == 2
    assert table["shifted"].iloc[0] == 2
