import numpy as np
import pandas as pd
import pytest
from synthetic import contrast, pairs_table

from sst_interp.analyses.noise import bf16_noise, highest, noise_floors
from sst_interp.errors import Untestable

NOISE = [
    "question", "kind", "depth", "position", "layer",
    "cosine", "relative_l2", "norm_a", "norm_b", "bf16_ratio",
]  # fmt: skip


def table(ratio=15.0, spread=0.5, question_spread=0.3, deepest=None, seed=0, **options):
    """Pairs whose bf16 ratio is log-normal around `ratio`, in the last layer around `deepest`."""
    pairs = pairs_table(seed=seed, **options)
    rng = np.random.default_rng(seed + 1000)
    own = question_spread * rng.normal(size=pairs["question"].max() + 1)[pairs["question"]]
    centre = np.where(pairs["layer"] == pairs["layer"].max(), deepest or ratio, ratio)
    values = centre * np.exp(own + spread * rng.normal(size=len(pairs)))
    return pairs.assign(bf16_ratio=values.astype("float32"), relative_l2=(values / 256).astype("float32"))


def noise_of(pairs, kinds=("batch", "fp32"), depths=(1, 4), factor=5.0, questions=10, seed=0):
    """Noise `factor` times smaller than the change, deeper: twice as large as at depth 1."""
    rng = np.random.default_rng(seed)
    rows = pairs[
        (pairs["comparison"] == "teacher_forced") & (pairs["b"] == 4) & (pairs["question"] < questions)
    ]
    parts = []
    for kind in kinds:
        for depth in depths:
            size = rows["relative_l2"] / factor / (2 if depth == 1 else 1)
            size = (size * np.exp(0.2 * rng.normal(size=len(rows)))).astype("float32")
            parts.append(
                rows.assign(kind=kind, depth=np.int8(depth), relative_l2=size, bf16_ratio=256 * size)[NOISE]
            )
    return pd.concat(parts, ignore_index=True)


def change_of(pairs, noise=None, comparison="teacher_forced", **options):
    return bf16_noise(contrast(pairs, comparison, noise=noise, **options))


def test_medians_are_those_of_the_pairs_and_inside_their_intervals():
    pairs = table(deepest=29.0)
    found = change_of(pairs)
    assert found.ratio.estimate == pytest.approx(pairs["bf16_ratio"].median())
    last = pairs[pairs["layer"] == 7]
    assert found.deepest.estimate == pytest.approx(last["bf16_ratio"].median())
    assert found.deepest_layer == 7
    assert np.allclose(found.by_layer["ratio"], pairs.groupby("layer")["bf16_ratio"].median())
    assert (found.by_layer["low"] <= found.by_layer["ratio"]).all()
    assert (found.by_layer["ratio"] <= found.by_layer["high"]).all()
    for words in (
        "The change exceeds one bf16 rounding.",
        f"{found.ratio.text()} bf16 roundings",
        "3,072 pairs from 24 questions",
        "Of 8 layers 8 are above and 0 below one rounding",
    ):
        assert words in found.verdict


def test_the_planted_median_is_inside_its_interval_as_often_as_stated():
    inside = 0
    for seed in range(60):
        found = change_of(table(positions=6, layers=2, seed=seed), resamples=400).ratio
        inside += found.low <= 15.0 <= found.high
    assert inside >= 50  # 95% nominal, 60 trials; with 24 questions it is about 93%


def test_a_change_of_one_rounding_is_not_above_one_rounding():
    alarms = 0
    for seed in range(40):
        found = change_of(table(ratio=1.0, positions=6, seed=seed), resamples=20)
        alarms += (found.by_layer["wilcoxon_holm"] < 0.05).any()
    assert alarms <= 6  # 5% nominal
    assert "Of 8 layers 0 are above and 0 below one rounding" in change_of(table(ratio=1.0, seed=1)).verdict


def test_a_change_below_one_rounding_is_said_to_be_below():
    found = change_of(table(ratio=0.3))
    assert found.ratio.high < 1
    assert (found.by_layer["effect"] < 0).all()
    assert "Of 8 layers 0 are above and 8 below" in found.verdict
    assert found.verdict.startswith("The change is less than one bf16 rounding.")


def test_tests_are_over_questions_however_many_pairs_there_are():
    few = change_of(table(questions=5)).by_layer
    many = change_of(table(questions=5, positions=200)).by_layer
    assert (few["questions"] == 5).all()
    assert many["wilcoxon_p"].min() == pytest.approx(0.0625)  # 2 / 2^5, the smallest there is
    assert "which 5 questions cannot reach" in change_of(table(questions=5)).verdict


def test_bit_identical_pairs_count_as_no_change_and_are_counted():
    pairs = table()
    same = pairs["position"] < 12
    pairs.loc[same, ["bf16_ratio", "relative_l2"]] = 0
    found = change_of(pairs)
    assert found.identical.estimate == pytest.approx(0.75)
    assert found.ratio.estimate == 0
    assert "75.0% bit-identical" in found.verdict
    nothing = change_of(pairs.assign(bf16_ratio=np.float32(0), relative_l2=np.float32(0)))
    assert (nothing.ratio.estimate, nothing.identical.estimate) == (0, 1)
    assert "8 below" in nothing.verdict


def test_the_ratio_to_a_planted_floor_is_found_over_all_layers_and_in_each():
    pairs = table()
    found = change_of(pairs, noise_of(pairs))
    assert found.no_floor is None
    assert [(f.kind, f.depth) for f in found.floors] == [("batch", 1), ("batch", 4), ("fp32", 1), ("fp32", 4)]
    for floor in found.floors:
        planted = 10 if floor.depth == 1 else 5
        assert floor.ratio.low <= planted <= floor.ratio.high
        assert floor.ratio.estimate == pytest.approx(planted, rel=0.1)
        assert floor.ratio.n_questions == 10
        assert floor.ratio.estimate == pytest.approx(floor.change.estimate / floor.noise.estimate)
        assert np.allclose(floor.by_layer["ratio"], planted, rtol=0.3)
        assert (floor.by_layer["low"] <= floor.by_layer["ratio"]).all()
        assert floor.roundings == pytest.approx(256 * floor.noise.estimate, rel=1e-3)
    assert found.floor("batch").depth == 4  # the higher floor is the stricter one
    assert "times what another batch shape changes at depth 4 (10 questions)" in found.verdict
    assert "times what float32 changes" in found.verdict
    assert found.verdict.startswith("The change exceeds one bf16 rounding, and measured noise.")


def test_change_and_noise_are_compared_at_the_same_questions_and_positions():
    pairs = table(question_spread=0)
    noise = noise_of(pairs, questions=5)
    pairs.loc[pairs["question"] >= 5, "relative_l2"] *= 1000  # where no noise was measured
    late = noise["position"] >= 8
    pairs.loc[pairs["position"] >= 8, "relative_l2"] *= 100
    floors, _ = noise_floors(pairs, noise[~late], 200, 0)
    assert highest(floors, "fp32").ratio.estimate == pytest.approx(5, rel=0.1)
    assert highest(floors, "fp32").n_pairs == 5 * 8 * 8


def test_a_change_no_larger_than_noise_has_a_ratio_of_1():
    pairs = table()
    found = change_of(pairs, noise_of(pairs, factor=1.0))
    assert found.floor("fp32").ratio.low <= 1 <= found.floor("fp32").ratio.high
    assert found.verdict.startswith("The change exceeds one bf16 rounding, but not measured noise.")


def test_noise_that_is_0_is_said_and_not_divided_by():
    pairs = table()
    noise = noise_of(pairs, kinds=("batch",))
    none = change_of(pairs, noise.assign(relative_l2=np.float32(0)))
    assert np.isnan(none.floor("batch").ratio.estimate)
    assert none.floor("batch").identical == 1
    assert "the median noise is 0" in none.verdict
    assert "float32" not in none.verdict
    half = noise.assign(relative_l2=noise["relative_l2"].where(noise["question"] >= 4, 0))
    found = change_of(pairs, half).floor("batch")
    assert np.isfinite(found.ratio.estimate)
    assert "in some resamples the median noise is 0" in found.ratio.text()


def test_without_a_noise_table_the_floor_is_not_testable():
    pairs = table()
    for noise in (None, noise_of(pairs).iloc[:0]):
        found = change_of(pairs, noise)
        assert found.floors == ()
        assert "the measured floor is not testable: the run has no noise table" in found.verdict
    elsewhere = change_of(pairs, noise_of(pairs).assign(question=99))
    assert "no position has both a change and noise" in elsewhere.verdict
    lost = change_of(pairs, noise_of(pairs).assign(relative_l2=np.float32(np.nan)))
    assert "no position has both" in lost.verdict


def test_pairs_of_depths_have_a_row_each():
    found = change_of(table(depths=(2, 4)))
    assert list(found.per_pair["b"]) == [2, 4]
    assert found.per_pair["ratio"][1] == pytest.approx(found.ratio.estimate)
    shallow = bf16_noise(contrast(table(depths=(2, 4)), "teacher_forced", a=1, b=2))
    assert shallow.ratio.estimate == pytest.approx(found.per_pair["ratio"][0])


def test_some_all_and_nothing_missing_and_one_question():
    pairs = table()
    pairs.loc[:9, "bf16_ratio"] = np.nan
    found = change_of(pairs)
    assert (found.n_excluded, found.n_pairs) == (10, len(pairs) - 10)
    assert "10 pairs without a ratio are left out" in found.verdict
    with pytest.raises(Untestable, match="all 3,072 ratios of comparison 'teacher_forced' are NaN"):
        change_of(pairs.assign(bf16_ratio=np.nan))
    one = table(questions=1)
    found = change_of(one, noise_of(one))
    assert "no interval: one question" in found.verdict
    assert found.verdict.startswith("Whether the change is more than rounding is not tested.")
    assert np.isfinite(found.floor("fp32").ratio.estimate)


def test_the_figure_of_floors_counts_the_questions_of_the_noise():
    pairs = table()
    figures = change_of(pairs, noise_of(pairs)).figures()
    assert "10 questions" in str(figures["floors"].to_dict()["layout"]["title"])
    assert "24 questions" in str(figures["by_layer"].to_dict()["layout"]["title"])
