import json

import numpy as np
import pandas as pd
import pytest
from synthetic import Planted, pairs_table

from sst_interp.analyses.bf16_noise import bf16_noise
from sst_interp.analyses.parts.noise_floor import highest, noise_floors
from sst_interp.errors import SSTError

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
    rows = pairs[(pairs["comparison"] == "replayed") & (pairs["b"] == 4) & (pairs["question"] < questions)]
    parts = []
    for kind in kinds:
        for depth in depths:
            size = rows["relative_l2"] / factor / (2 if depth == 1 else 1)
            size = (size * np.exp(0.2 * rng.normal(size=len(rows)))).astype("float32")
            parts.append(
                rows.assign(kind=kind, depth=np.int8(depth), relative_l2=size, bf16_ratio=256 * size)[NOISE]
            )
    return pd.concat(parts, ignore_index=True)


def test_medians_are_those_of_the_pairs_and_inside_their_intervals():
    pairs = table(deepest=29.0)
    found = bf16_noise(pairs, "replayed")
    assert found.ratio.estimate == pytest.approx(pairs["bf16_ratio"].median())
    last = pairs[pairs["layer"] == 7]
    assert found.deepest.estimate == pytest.approx(last["bf16_ratio"].median())
    assert found.deepest_layer == 7
    assert np.allclose(found.by_layer["ratio"], pairs.groupby("layer")["bf16_ratio"].median())
    assert (found.by_layer["low"] <= found.by_layer["ratio"]).all()
    assert (found.by_layer["ratio"] <= found.by_layer["high"]).all()
    for words in (
        "bf16 roundings",
        "deepest (layer 7)",
        "3,072 pairs from 24 questions",
        "8 above and 0 below",
    ):
        assert words in found.verdict


def test_the_planted_median_is_inside_its_interval_as_often_as_stated():
    inside = 0
    for seed in range(60):
        found = bf16_noise(table(positions=6, layers=2, seed=seed), "replayed", resamples=400).ratio
        inside += found.low <= 15.0 <= found.high
    assert inside >= 50  # 95% nominal, 60 trials; with 24 questions it is about 93%


def test_a_change_of_one_rounding_is_not_above_one_rounding():
    alarms = 0
    for seed in range(40):
        found = bf16_noise(table(ratio=1.0, positions=6, seed=seed), "replayed", resamples=20)
        alarms += (found.by_layer["wilcoxon_holm"] < 0.05).any()
    assert alarms <= 6  # 5% nominal
    assert "0 above and 0 below by Wilcoxon" in bf16_noise(table(ratio=1.0, seed=1), "replayed").verdict


def test_a_change_below_one_rounding_is_said_to_be_below():
    found = bf16_noise(table(ratio=0.3), "replayed")
    assert found.ratio.high < 1
    assert (found.by_layer["effect"] < 0).all()
    assert "0 above and 8 below" in found.verdict


def test_tests_are_over_questions_however_many_pairs_there_are():
    few = bf16_noise(table(questions=5), "replayed").by_layer
    many = bf16_noise(table(questions=5, positions=200), "replayed").by_layer
    assert (few["questions"] == 5).all()
    assert many["wilcoxon_p"].min() == pytest.approx(0.0625)  # 2 / 2^5, the smallest there is
    assert "which 5 questions cannot reach" in bf16_noise(table(questions=5), "replayed").verdict


def test_bit_identical_pairs_count_as_no_change_and_are_counted():
    pairs = table()
    same = pairs["position"] < 12
    pairs.loc[same, ["bf16_ratio", "relative_l2"]] = 0
    found = bf16_noise(pairs, "replayed")
    assert found.identical.estimate == pytest.approx(0.75)
    assert found.ratio.estimate == 0
    assert "75.0% bit-identical" in found.verdict
    nothing = bf16_noise(pairs.assign(bf16_ratio=np.float32(0), relative_l2=np.float32(0)), "replayed")
    assert (nothing.ratio.estimate, nothing.identical.estimate) == (0, 1)
    assert "8 below" in nothing.verdict


def test_the_ratio_to_a_planted_floor_is_found_over_all_layers_and_in_each():
    pairs = table()
    found = bf16_noise(pairs, "replayed", noise_of(pairs))
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


def test_change_and_noise_are_compared_at_the_same_questions_and_positions():
    pairs = table(question_spread=0)
    noise = noise_of(pairs, questions=5)
    pairs.loc[pairs["question"] >= 5, "relative_l2"] *= 1000  # where no noise was measured
    late = noise["position"] >= 8
    pairs.loc[pairs["position"] >= 8, "relative_l2"] *= 100
    floors, _ = noise_floors(pairs, noise[~late])
    assert highest(floors, "fp32").ratio.estimate == pytest.approx(5, rel=0.1)
    assert highest(floors, "fp32").n_pairs == 5 * 8 * 8


def test_a_change_no_larger_than_noise_has_a_ratio_of_1():
    pairs = table()
    floor = bf16_noise(pairs, "replayed", noise_of(pairs, factor=1.0)).floor("fp32")
    assert floor.ratio.low <= 1 <= floor.ratio.high


def test_noise_that_is_0_is_said_and_not_divided_by():
    pairs = table()
    noise = noise_of(pairs, kinds=("batch",))
    none = bf16_noise(pairs, "replayed", noise.assign(relative_l2=np.float32(0)))
    assert np.isnan(none.floor("batch").ratio.estimate)
    assert none.floor("batch").identical == 1
    assert "the median noise is 0" in none.verdict
    assert "against float32: not measured" in none.verdict
    half = noise.assign(relative_l2=noise["relative_l2"].where(noise["question"] >= 4, 0))
    found = bf16_noise(pairs, "replayed", half).floor("batch")
    assert np.isfinite(found.ratio.estimate)
    assert "in some resamples the median noise is 0" in found.ratio.text()


def test_without_a_noise_table_the_floor_is_not_testable():
    pairs = table()
    for noise in (None, noise_of(pairs).iloc[:0]):
        found = bf16_noise(pairs, "replayed", noise)
        assert found.floors == ()
        assert "the measured floor is not testable: the run has no noise table" in found.verdict
    elsewhere = bf16_noise(pairs, "replayed", noise_of(pairs).assign(question=99))
    assert "no position has both a change and noise" in elsewhere.verdict
    lost = bf16_noise(pairs, "replayed", noise_of(pairs).assign(relative_l2=np.float32(np.nan)))
    assert "no position has both" in lost.verdict


def test_comparisons_and_pairs_are_never_pooled():
    pairs = pd.concat([table(depths=(2, 4)), table(ratio=1e4, comparisons=("free",))])
    alone = table(depths=(2, 4))
    found = bf16_noise(pairs, "replayed")
    assert found.to_dict() == bf16_noise(alone, "replayed").to_dict()
    assert list(found.per_pair["b"]) == [2, 4]
    assert found.per_pair["ratio"][1] == pytest.approx(found.ratio.estimate)
    assert bf16_noise(pairs, "replayed", a=1, b=2).ratio.estimate == pytest.approx(found.per_pair["ratio"][0])
    assert bf16_noise(pairs, "free").ratio.estimate > 1000
    categories = pairs.assign(comparison=pd.Categorical(pairs["comparison"]))
    assert bf16_noise(categories, "free").ratio == bf16_noise(pairs, "free").ratio


def test_the_order_of_rows_and_the_numbering_of_questions_change_nothing():
    pairs = table()
    noise = noise_of(pairs)
    found = bf16_noise(pairs, "replayed", noise)
    shuffled = bf16_noise(pairs.sample(frac=1, random_state=1), "replayed", noise[::-1])
    assert shuffled.ratio.estimate == found.ratio.estimate
    assert shuffled.floor("fp32").ratio.estimate == pytest.approx(found.floor("fp32").ratio.estimate)
    assert np.allclose(shuffled.by_layer["wilcoxon_p"], found.by_layer["wilcoxon_p"])
    renumbered = bf16_noise(
        pairs.assign(question=pairs["question"] * 7 + 3),
        "replayed",
        noise.assign(question=noise["question"] * 7 + 3),
    )
    assert renumbered.ratio == found.ratio
    assert renumbered.floor("batch").ratio == found.floor("batch").ratio


def test_nan_one_question_one_depth_and_an_empty_table():
    pairs = table()
    pairs.loc[:9, "bf16_ratio"] = np.nan
    found = bf16_noise(pairs, "replayed")
    assert (found.n_excluded, found.n_pairs) == (10, len(pairs) - 10)
    assert "10 pairs without a ratio are left out" in found.verdict
    all_nan = bf16_noise(pairs.assign(bf16_ratio=np.nan), "replayed")
    assert all_nan.verdict == "not testable: all 3,072 ratios of comparison 'replayed' are NaN."
    one = table(questions=1)
    found = bf16_noise(one, "replayed", noise_of(one))
    assert "no interval: one question" in found.verdict
    assert np.isfinite(found.floor("fp32").ratio.estimate)
    empty = bf16_noise(pairs_table(comparisons=()), "replayed")
    assert empty.verdict == "not testable: no pairs of comparison 'replayed' in this run."
    assert bf16_noise(table(), "within").verdict.startswith("not testable")
    with pytest.raises(SSTError, match="unknown comparison"):
        bf16_noise(table(), "fre")


def test_every_result_has_json_html_and_figures_that_say_what_they_show():
    pairs = table(planted=Planted(share=0))
    for noise in (noise_of(pairs), None):
        found = bf16_noise(pairs, "replayed", noise)
        json.dumps(found.to_dict(), allow_nan=False)
        assert "<table>" in found._repr_html_()
        assert set(found.figures()) == {"by_layer", "floors"}
        layout = found.figure().to_dict()["layout"]
        assert "24 questions" in str(layout["title"])
        assert "replayed" in str(layout["title"])
        assert layout["xaxis"]["title"]["text"] == "layer (0-based)"
    assert "10 questions" in str(
        bf16_noise(pairs, "replayed", noise_of(pairs)).figures()["floors"].layout.title
    )
    assert "not testable" in str(bf16_noise(pairs, "free").figure().to_dict()["layout"])
