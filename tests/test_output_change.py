from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
from synthetic import Planted, contrast, pairs_table
from synthetic_outputs import outputs_table, steps_table

from sst_interp.analyses.output_change import lens_replacement, rank_table, replaced_of, token_replacement
from sst_interp.analyses.statistics.bootstrap import LEVELS, grouped_medians, level_median, to_levels
from sst_interp.errors import SSTError, Untestable
from sst_interp.models.choices import COMPARISONS, Choices


def run(share=0.05, seed=0, comparisons=("teacher_forced",), **effects):
    pairs = pairs_table(
        questions=30, positions=12, layers=5, planted=Planted(share=share), comparisons=comparisons, seed=seed
    )
    return outputs_table(pairs, seed=seed, **effects), pairs


def asked(outputs, pairs, comparison="teacher_forced", **options):
    return contrast(pairs, comparison, outputs=outputs, **({"threshold": 0.95, "resamples": 300} | options))


def found(outputs, pairs, comparison="teacher_forced", **options):
    return token_replacement(asked(outputs, pairs, comparison, **options))


def test_planted_medians_are_found_at_shifts_and_at_stable_positions():
    result = found(*run(replaced=(54, 4)))
    assert result.shifted.estimate == pytest.approx(54, abs=1)
    assert result.stable.estimate == pytest.approx(4, abs=1)
    assert result.difference.estimate == result.shifted.estimate - result.stable.estimate
    assert result.shifted.low <= result.shifted.estimate <= result.shifted.high
    assert result.difference.low > 40
    assert result.verdict.startswith("A shift replaces more of the output: 54 of 100 tokens against 4. ")
    for words in ("Teacher-forced, depth 1 against depth 4", "30 questions", "360 positions", "rank"):
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
    same = found(*run(seed=1, replaced=(20, 20))).verdict
    assert same.startswith("A shift replaces no more of the output: ")


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
    assert "from beyond rank 50: none (at most" in shallow.verdict


def test_entropies_are_of_the_passes_that_are_compared():
    outputs, pairs = run(comparisons=COMPARISONS)
    planted = {("own", 1, 1): 1.0, ("depth1", 4, 4): 3.0, ("own", 4, 4): 5.0, ("own", 4, 1): 7.0}
    steps = steps_table(outputs, entropy=planted)
    expected = {"teacher_forced": (1, 3), "free_running": (1, 5), "within": (7, 5)}
    for comparison, (a, b) in expected.items():
        row = found(outputs, pairs, comparison, steps=steps).table.iloc[1]
        assert row["entropy_a"] == pytest.approx(a, abs=0.02)
        assert row["entropy_b"] == pytest.approx(b, abs=0.02)
        assert row["entropy_change"] == pytest.approx(b - a, abs=0.02)
    assert found(outputs, pairs).table["entropy_a"].isna().all()


def test_in_free_the_positions_before_the_texts_part_stand_by_themselves():
    outputs, pairs = run(comparisons=("free_running",), share=0.3)
    result = found(outputs, pairs, "free_running")
    rows = result.table.set_index("where")["positions"]
    assert rows["a layer shifted, the same tokens read"] == 0
    assert rows["no layer shifted, the same tokens read"] == 30 * 3
    assert rows.iloc[4:].sum() == rows.iloc[:2].sum() == len(outputs)
    assert "While both depths had read the same tokens: none against" in result.verdict


def test_every_pair_of_depths_has_its_row_and_nothing_is_pooled():
    pairs = pairs_table(questions=10, depths=(2, 4), comparisons=("teacher_forced", "within"), seed=1)
    outputs = outputs_table(pairs)
    result = found(outputs, pairs)
    assert list(zip(result.per_pair["a"], result.per_pair["b"], strict=True)) == [(1, 2), (1, 4)]
    alone = [t[(t["comparison"] == "teacher_forced") & (t["b"] == 4)] for t in (outputs, pairs)]
    assert found(*alone).verdict == result.verdict
    assert result.per_pair["difference"].iloc[1] == result.difference.estimate


def test_all_or_nothing_shifted_leaves_nothing_to_compare_and_says_so():
    outputs, pairs = run()
    everything = found(outputs, pairs.assign(cosine=0.1))
    assert everything.verdict.startswith("Every position has a shift")
    assert np.isfinite(everything.shifted.estimate)
    nothing = found(outputs, pairs.assign(cosine=0.999))
    assert nothing.verdict.startswith("No position has a shift")
    assert np.isfinite(nothing.stable.estimate)
    for result in (everything, nothing):
        assert np.isnan(result.difference.estimate)
        result.figures()


def test_what_cannot_be_tested_says_why():
    outputs, pairs = run()
    for tables in ((outputs[:0], pairs), (outputs, pairs[:0])):
        with pytest.raises(Untestable, match="the run has no"):
            found(*tables)
    with pytest.raises(Untestable, match="'free_running'"):
        found(outputs, pairs, "free_running")
    with pytest.raises(Untestable, match="NaN"):
        found(outputs, pairs.assign(cosine=np.nan))
    with pytest.raises(SSTError, match="lens_jaccard"):
        found(outputs, pairs, choices=Choices(overlap="lens_jaccard"))


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


def test_figures_say_comparison_questions_and_units():
    result = found(*run())
    assert set(result.figures()) == {"replaced", "ranks"}
    assert "did not record lens" in result.no_layers
    for figure in result.figures().values():
        layout = str(figure.to_dict()["layout"])
        for words in ("teacher-forced", "30 questions", "360 positions", "below 0.95"):
            assert words in layout
        assert figure.layout.xaxis.title.text
        assert figure.layout.yaxis.title.text
    assert set(found(*run(changed=(0.0, 0.0))).figures()) == {"replaced"}


def test_the_lens_gives_back_how_many_tokens_were_replaced():
    n = np.arange(101)
    assert np.array_equal(replaced_of((100 - n) / (100 + n)), n)
    assert np.array_equal(replaced_of(((100 - n) / (100 + n)).astype("float32")), n)


def test_tokens_replaced_by_layer_are_the_planted_ones():
    outputs, pairs = run(share=0.2, seed=5)
    expected = np.where(pairs["cosine"] < 0.95, 30 + 5 * pairs["layer"], 2)
    pairs["lens_jaccard"] = ((100 - expected) / (100 + expected)).astype("float32")
    result = found(outputs, pairs)
    table = result.by_layer
    assert "by_layer" in result.figures()
    assert table["shifted"].tolist() == [30, 35, 40, 45, 50]
    assert (table["stable"] == 2).all()
    assert (table["difference"] == table["shifted"] - 2).all()
    assert (table["positions_shifted"] + table["positions_stable"] == 360).all()
    by_lens = found(outputs, pairs, choices=Choices(overlap="lens_jaccard"), threshold=0.5)
    assert by_lens.no_layers == "what shifted is itself read off the lens"
    with pytest.raises(SSTError, match="did not record"):
        lens_replacement(asked(outputs, pairs.assign(lens_jaccard=np.nan)))
    without = pairs.drop(columns="lens_jaccard")
    beside = {"lens": SimpleNamespace(pairs=pairs[pairs["question"] < 9])}
    few = found(outputs, without, beside=beside).by_layer
    assert (few["positions_shifted"] + few["positions_stable"] == 9 * 12).all()


def test_a_position_is_its_layers():
    _, pairs = run(seed=3)
    table = contrast(pairs, threshold=0.95).positions
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
