import json

import numpy as np
import pandas as pd
import pytest
from scipy.stats import spearmanr
from synthetic import Planted, pairs_table

from sst_interp.analyses.content import content
from sst_interp.analyses.statistics.along_texts import (
    association,
    circular_draws,
    circular_products,
    class_share,
    correlations,
    matched,
    p_value,
    position_share,
    ranks,
)
from sst_interp.choices import Choices
from sst_interp.errors import SSTError

N, T = 24, 32


def smooth(rng, *shape):
    """Profiles that change slowly along the text, as real ones do."""
    x = rng.normal(size=shape)
    for i in range(1, shape[-1]):
        x[..., i] = 0.7 * x[..., i - 1] + np.sqrt(1 - 0.49) * x[..., i]
    return x


def pairs_of(x, layers=4, seed=0, comparison="replayed"):
    """Pairs whose mean distance is `x` [question, position]; NaN where the text has ended."""
    rng = np.random.default_rng(seed)
    u = np.exp(-5 + x[..., None] + 0.1 * rng.normal(size=(*x.shape, layers)))
    table = pairs_table(x.shape[0], x.shape[1], layers, comparisons=(comparison,))
    table = table.assign(cosine=(1 - np.minimum(u, 1)).ravel().astype("float32"))
    return table[np.isfinite(np.repeat(x.ravel(), layers))]


def steps_of(entropy, tokens=None, deepest=4):
    """A `steps` table with the given entropy and tokens [question, position]; margin is its opposite."""
    q, p = (i.ravel() for i in np.indices(entropy.shape))
    parts = []
    for text, depth in (("own", 1), ("own", deepest), ("depth1", deepest)):
        for iteration in range(1, depth + 1):
            parts.append(
                pd.DataFrame(
                    {
                        "question": q.astype("int32"),
                        "text": text,
                        "depth": np.int8(depth),
                        "position": p.astype("int16"),
                        "iteration": np.int8(iteration),
                        "token": pd.array(
                            [pd.NA] * len(q) if tokens is None else tokens.ravel(), dtype="Int32"
                        ),
                        "entropy": entropy.ravel().astype("float32"),
                        "margin": -entropy.ravel().astype("float32"),
                    }
                )
            )
    table = pd.concat(parts, ignore_index=True)
    return table[np.isfinite(table["entropy"])]


def uniform(p_values):
    """Whether p-values look uniform: the share below 5%, 20% and 50%."""
    return [float(np.mean(np.array(p_values) <= level)) for level in (0.05, 0.2, 0.5)]


# What the position accounts for


@pytest.mark.parametrize("planted", [0.0, 0.3, 1.0])
def test_the_share_of_a_planted_position_profile_is_found_without_bias(planted):
    rng = np.random.default_rng(0)
    found, inside = [], 0
    for _ in range(40):
        beta = rng.normal(size=T)
        beta = np.sqrt(planted) * (beta - beta.mean()) / beta.std()
        noise = np.sqrt(1 - planted) * rng.normal(size=(N, T)) * np.sqrt(T / (T - 1))
        share = position_share(3 * rng.normal(size=(N, 1)) + beta + noise, resamples=200).share
        found.append(share.estimate)
        inside += share.low - 1e-9 <= planted <= share.high + 1e-9
    assert np.mean(found) == pytest.approx(planted, abs=0.01)
    assert inside >= 33  # 95% nominal, 40 trials


def test_with_three_questions_and_nothing_there_the_share_is_still_0_on_average():
    rng = np.random.default_rng(1)
    shares = [position_share(smooth(rng, 3, 10), 10).share.estimate for _ in range(120)]
    assert np.mean(shares) == pytest.approx(0, abs=0.06)


def test_its_p_value_is_uniform_for_slow_profiles_that_have_nothing_to_do_with_position():
    rng = np.random.default_rng(2)
    shares = uniform([position_share(smooth(rng, 8, 20), resamples=200).p_circular for _ in range(200)])
    assert shares == pytest.approx([0.05, 0.2, 0.5], abs=0.09)
    profile = smooth(rng, 1, 20)
    assert position_share(profile + smooth(rng, 8, 20)).p_circular < 0.01


def test_questions_levels_and_texts_of_different_length_do_not_matter():
    rng = np.random.default_rng(3)
    x = smooth(rng, 1, T) + smooth(rng, N, T)
    plain = position_share(x, 200)
    lifted = position_share(x + 10 * rng.normal(size=(N, 1)), 200)
    assert lifted.share.estimate == pytest.approx(plain.share.estimate)
    assert lifted.p_circular == plain.p_circular
    x[::2, 20:] = np.nan
    x[:, 5] = np.nan
    found = position_share(x, 200)
    assert 0.2 < found.share.estimate < 0.9
    assert found.p_circular < 0.02


def test_a_class_accounts_for_what_was_planted_and_is_not_paid_for_its_number():
    rng = np.random.default_rng(4)
    shares, none = [], []
    for _ in range(30):
        codes = rng.integers(0, 4, size=(N, T))
        noise = rng.normal(size=(N, T))
        effect = np.array([-1.5, -0.5, 0.5, 1.5])[codes]
        shares.append(class_share(effect + noise, codes, 4, 50))
        none.append(class_share(noise, rng.integers(0, 60, size=(N, T)), 60, 50))
    assert np.mean([s.share.estimate for s in shares]) == pytest.approx(1.25 / 2.25, abs=0.02)
    assert np.mean([s.share.estimate for s in none]) == pytest.approx(0, abs=0.01)
    assert np.mean([s.by_position for s in shares]) == pytest.approx(0, abs=0.02)
    assert all(s.p_circular < 0.03 and s.p_other < 0.03 for s in shares)


def test_a_class_that_only_marks_the_position_does_not_survive_other_questions():
    rng = np.random.default_rng(5)
    codes = np.tile((np.arange(T) < 4).astype(int), (N, 1))
    x = smooth(rng, N, T) + 2 * (np.arange(T) < 4)
    found = class_share(x, codes, 2)
    assert found.share.low > 0.1
    assert found.p_circular < 0.01
    assert found.by_position == pytest.approx(found.share.estimate)
    assert found.p_other == 1


def test_a_class_that_says_nothing_has_uniform_p_values():
    rng = np.random.default_rng(6)
    found = [class_share(smooth(rng, 8, 20), (smooth(rng, 8, 20) > 0) * 1, 2, 200) for _ in range(200)]
    assert uniform([f.p_circular for f in found]) == pytest.approx([0.05, 0.2, 0.5], abs=0.09)
    assert uniform([f.p_other for f in found]) == pytest.approx([0.05, 0.2, 0.5], abs=0.09)


# What goes along a text


def test_correlations_are_those_of_the_common_positions():
    rng = np.random.default_rng(7)
    x, y = rng.normal(size=(2, 5, 30))
    x[1, 20:], y[2, :6], y[3] = np.nan, np.nan, 4.0
    x[4, 5:] = np.nan  # too short
    found = correlations(x, y)
    assert np.isnan(found[:, 3]).all()
    assert np.isnan(found[4]).all()
    for i in range(4):
        for j in (0, 1, 2, 4):
            both = np.isfinite(x[i]) & np.isfinite(y[j])
            assert found[i, j] == pytest.approx(np.corrcoef(x[i, both], y[j, both])[0, 1])
    assert np.allclose(correlations(1e6 + x, 3 * y), found, equal_nan=True, atol=1e-6)


def test_circular_products_are_what_rolling_gives_and_gaps_are_closed():
    rng = np.random.default_rng(8)
    x, y = rng.normal(size=(3, 9)), rng.normal(size=(3, 2, 9))
    x[1, 6:], x[2, 3] = np.nan, np.nan
    sums, lengths = circular_products(x, y)
    assert lengths.tolist() == [9, 6, 8]
    for q in range(3):
        there = np.isfinite(x[q])
        for k in range(2):
            for offset in range(lengths[q]):
                rolled = np.roll(y[q, k, there], -offset)
                assert sums[q, k, offset] == pytest.approx(x[q, there] @ rolled)
    totals, squares = circular_draws(sums, lengths, 50)
    assert totals.shape == squares.shape == (50, 2)
    assert (totals**2 <= 3 * squares + 1e-9).all()


def test_the_rank_correlation_is_the_mean_of_spearmans():
    rng = np.random.default_rng(9)
    x, y = smooth(rng, 2, N, T)
    y[3, 20:] = np.nan
    found = association(x, y, resamples=100)
    expected = [spearmanr(x[q], y[q], nan_policy="omit").statistic for q in range(N)]
    assert found.matched.estimate == pytest.approx(np.mean(expected))
    assert found.matched.n_questions == N
    assert association(x, -y, resamples=100).matched.estimate == pytest.approx(-found.matched.estimate)
    monotonic = association(np.exp(x), y**3, resamples=100)
    assert monotonic.matched.estimate == pytest.approx(found.matched.estimate)


def test_unrelated_quantities_have_uniform_p_values():
    rng = np.random.default_rng(10)
    found = [association(smooth(rng, 8, 20), smooth(rng, 8, 20), 200) for _ in range(200)]
    for name in ("p_circular", "p_other"):
        assert uniform([getattr(f, name) for f in found]) == pytest.approx([0.05, 0.2, 0.5], abs=0.09)
    assert np.mean([f.matched.low <= 0 <= f.matched.high for f in found]) > 0.84  # 8 questions, 95% nominal
    assert np.mean([f.beyond.estimate for f in found]) == pytest.approx(0, abs=0.02)


def test_a_tie_by_content_passes_both_nulls():
    rng = np.random.default_rng(11)
    y = smooth(rng, N, T)
    found = association(0.5 * y + smooth(rng, N, T), y)
    assert found.p_circular < 0.01
    assert found.p_other < 0.01
    assert found.beyond.low > 0.2
    assert abs(found.mismatched) < 0.05


def test_a_tie_by_position_alone_passes_the_circular_null_but_not_the_other():
    rng = np.random.default_rng(12)
    trend = np.linspace(3, -3, T)
    found = association(trend + smooth(rng, N, T), trend + smooth(rng, N, T))
    assert found.matched.low > 0.5
    assert found.p_circular < 0.01
    assert found.p_other > 0.05
    assert found.mismatched == pytest.approx(found.matched.estimate, abs=0.1)
    assert abs(found.beyond.estimate) < 0.1


def test_questions_that_are_too_short_or_never_vary_have_no_correlation():
    rng = np.random.default_rng(13)
    x, y = smooth(rng, 2, 6, 20)
    x[0, 7:], x[1], y[2] = np.nan, 1.0, 0.0
    assert association(x, y, 50).matched.n_questions == 3
    none = association(x[:, :7], y[:, :7], 50)
    assert none.matched.text() == "none (no question has 8 positions over which both vary)"
    assert np.isnan([none.p_circular, none.p_other, none.mismatched]).all()
    one = association(x[3:4], y[3:4], 50)
    assert np.isfinite(one.matched.estimate)
    assert np.isfinite(one.p_circular)
    assert np.isnan(one.p_other)


def test_a_p_value_is_never_0_and_counts_ties():
    assert p_value(np.zeros(99), 1.0) == 0.01
    assert p_value(np.zeros(99), 0.0) == 1
    assert p_value(np.arange(100.0), 95.0, sided=1) == pytest.approx(6 / 101)


def test_the_same_texts_in_a_second_run_are_told_from_others():
    rng = np.random.default_rng(14)
    x = smooth(rng, 1, T) + smooth(rng, N, T)
    again = matched(ranks(x), ranks(x + smooth(rng, N, T)))
    assert again.p_other < 0.01
    assert again.beyond.low > 0.1
    assert np.isnan(again.p_circular)
    unrelated = matched(ranks(x), ranks(smooth(rng, 1, T) + smooth(rng, N, T)))
    assert unrelated.p_other > 0.01


# All of it


def planted(rng, by_position=0.0, by_entropy=0.0, by_class=0.0, questions=N):
    """Distance, entropy and token ids; tokens 0 to 9 are digits."""
    entropy, tokens = smooth(rng, questions, T), rng.integers(0, 40, size=(questions, T))
    read = np.roll(tokens, 1, axis=1) < 10
    read[:, 0] = False
    x = (
        smooth(rng, questions, T)
        + by_position * np.linspace(2, -2, T)
        + by_entropy * entropy
        + by_class * read
    )
    return x, entropy, tokens


def kind_of(ids):
    return np.where(ids < 10, "digit", np.where(ids < 20, "punctuation", "word"))


def test_planted_content_is_found_measure_by_measure():
    rng = np.random.default_rng(15)
    x, entropy, tokens = planted(rng, by_position=0.5, by_entropy=0.6, by_class=2.0)
    again = pairs_of(x + 0.5 * smooth(rng, N, T), seed=1)
    found = content(pairs_of(x), "replayed", steps_of(entropy, tokens), kind_of, again, threshold=0.98)
    assert found.content_found is True
    assert found.missing == {}
    position, uncertain = found.row("position index"), found.row("entropy")
    assert 0.05 < position["low"] < position["high"] < 0.6
    assert uncertain["beyond_low"] > 0.1
    assert uncertain["p_holm"] < 0.05
    assert found.row("margin")["estimate"] == pytest.approx(-uncertain["estimate"])
    assert found.row("class of the token read")["low"] > 0.1
    assert found.row("class of the token read")["p_holm"] < 0.05
    assert abs(found.row("class of the token emitted")["estimate"]) < 0.03
    assert found.row("second run")["beyond_low"] > 0.2
    assert found.row("second run", "shifted share")["p_holm"] < 0.05
    assert "depends on content, not on position alone" in found.verdict
    assert f"768 positions of {N} questions" in found.verdict
    rates = found.classes[found.classes["role"] == "read"].set_index("class")
    assert rates["share"]["digit"] > 2 * rates["share"]["word"]
    assert rates["low"]["digit"] > rates["high"]["word"]
    assert (rates["pairs"].sum(), found.classes["questions"].max()) == (N * (T - 1) * 4, N)


def test_position_alone_is_not_called_content():
    alarms = 0
    for seed in range(20):
        rng = np.random.default_rng(100 + seed)
        x, entropy, tokens = planted(rng, by_position=1.0)
        entropy = entropy + np.linspace(2, -2, T)  # high where shifts are, at every question alike
        found = content(
            pairs_of(x), "replayed", steps_of(entropy, tokens), kind_of, threshold=0.98, resamples=200
        )
        assert found.row("position index")["low"] > 0.2
        assert found.row("entropy")["p_circular"] < 0.05
        alarms += bool(found.content_found)
    assert alarms <= 4  # 5% nominal
    assert "No dependence on content beyond position was found" in found.verdict or alarms


def test_a_mapping_and_a_function_are_the_same_and_unknown_ids_are_other():
    rng = np.random.default_rng(16)
    x, entropy, tokens = planted(rng, by_class=2.0)
    steps, pairs = steps_of(entropy, tokens), pairs_of(x)
    how = {"threshold": 0.98, "resamples": 50}
    function = content(pairs, "replayed", steps, kind_of, **how)
    mapping = {i: str(kind_of(np.array(i))) for i in range(40)}
    assert content(pairs, "replayed", steps, mapping, **how).to_dict() == function.to_dict()
    partial = content(pairs, "replayed", steps, {i: "digit" for i in range(10)}, **how)
    assert set(partial.classes["class"]) == {"digit", "other"}


def test_a_run_without_tokens_is_tested_on_the_rest():
    rng = np.random.default_rng(17)
    x, entropy, _ = planted(rng, by_entropy=1.0)
    found = content(pairs_of(x), "replayed", steps_of(entropy), kind_of, threshold=0.98)
    assert found.missing["class of the token read"] == "the run stores no tokens"
    assert found.missing["second run"] == "no second run was given"
    assert found.content_found is True
    assert "class of the token emitted (the run stores no tokens)" in found.verdict
    assert "not testable: the run stores no tokens" in str(found.figures()["classes"].layout.title)
    without = content(pairs_of(x), "replayed", threshold=0.98)
    assert without.missing["entropy"] == "the run has no steps table"
    assert without.content_found is None
    assert "Whether content matters is not testable here" in without.verdict
    assert np.isfinite(without.row("position index")["estimate"])
    unclassed = content(pairs_of(x), "replayed", steps_of(entropy, np.ones((N, T), int)), threshold=0.98)
    assert unclassed.missing["class of the token read"] == "no token classes were given"


def test_a_second_run_is_paired_by_id_and_says_why_it_cannot_be():
    rng = np.random.default_rng(18)
    x, _, _ = planted(rng)
    pairs, order = pairs_of(x), np.arange(N)[::-1]
    second = pairs.assign(question=order[pairs["question"]].astype("int32"))
    names = {
        "questions": pd.DataFrame({"question": range(N), "id": [f"r{q}" for q in range(N)]}),
        "other_questions": pd.DataFrame({"question": range(N), "id": [f"r{q}" for q in order]}),
    }
    how = {"threshold": 0.98, "resamples": 100}
    assert content(pairs, "replayed", other=second, **names, **how).row("second run")["estimate"] > 0.99
    assert content(pairs, "replayed", other=second, **how).row("second run")["estimate"] < 0.5
    short = content(pairs, "replayed", other=second[second["position"] < 20], **names, **how)
    assert short.row("second run")["estimate"] > 0.99
    for other, words in (
        (pairs_of(x, comparison="free"), "in the second run, no pairs of comparison 'replayed'"),
        (pairs.assign(question=pairs["question"] + 99), "the two runs have no question in common"),
    ):
        assert words in content(pairs, "replayed", other=other, **how).missing["second run"]


def test_within_reads_the_steps_of_the_deepest_pass():
    rng = np.random.default_rng(19)
    x, entropy, tokens = planted(rng, by_entropy=1.0)
    steps = steps_of(entropy, tokens)
    shallow = steps["depth"] == 1
    steps.loc[shallow, ["entropy", "margin"]] = 0.0
    found = content(pairs_of(x, comparison="within"), "within", steps, kind_of, threshold=0.98, resamples=100)
    assert found.row("entropy")["low"] > 0.4
    flat = content(pairs_of(x), "replayed", steps, kind_of, threshold=0.98, resamples=100)
    assert "no question has 8 positions" in flat.missing["entropy"]


def test_the_order_of_rows_and_the_numbering_of_questions_change_nothing():
    rng = np.random.default_rng(20)
    x, entropy, tokens = planted(rng, by_entropy=1.0)
    pairs, steps = pairs_of(x), steps_of(entropy, tokens)
    how = {"threshold": 0.98, "resamples": 50}
    found = content(pairs, "replayed", steps, kind_of, pairs, **how).to_dict()
    shuffled, mixed = (t.sample(frac=1, random_state=1) for t in (pairs, steps))
    assert content(shuffled, "replayed", mixed, kind_of, pairs, **how).to_dict() == found
    far = (t.assign(question=t["question"] * 3 + 1) for t in (pairs, steps))
    pairs_far, steps_far = far
    assert content(pairs_far, "replayed", steps_far, kind_of, pairs_far, **how).to_dict() == found


def test_no_shifts_and_all_shifts_leave_the_distance_to_be_tested():
    rng = np.random.default_rng(21)
    x, entropy, tokens = planted(rng, by_entropy=1.0)
    for threshold in (-1.0, 2.0):
        found = content(
            pairs_of(x), "replayed", steps_of(entropy, tokens), kind_of, threshold=threshold, resamples=50
        )
        rows = found.measures[found.measures["of"] == "shifted share"]
        assert rows["estimate"].isna().all()
        assert rows["note"].notna().all()
        assert found.row("entropy")["low"] > 0.4
        json.dumps(found.to_dict(), allow_nan=False)
        found.figures()
    still = content(pairs_of(0 * x, layers=1).assign(cosine=np.float32(0.9)), "replayed", steps_of(entropy))
    assert still.content_found is None
    assert still.missing["position index"] == "nothing varies"


def test_few_questions_one_question_nan_one_depth_and_an_empty_table():
    rng = np.random.default_rng(22)
    x, entropy, tokens = planted(rng, by_entropy=3.0, questions=4)
    steps, how = steps_of(entropy, tokens), {"threshold": 0.98, "resamples": 50}
    few = content(pairs_of(x), "replayed", steps, kind_of, **how)
    assert few.content_found is None  # 4 questions have 24 orders
    one = content(pairs_of(x[:1]), "replayed", steps, kind_of, pairs_of(x[:1]), **how)
    assert one.content_found is None
    assert "no interval: one question" in one.verdict
    table = pairs_of(x)
    table.loc[table["question"] == 1, "cosine"] = np.nan
    assert content(table, "replayed", steps, **how).n_questions == 3
    nan = content(table.assign(cosine=np.nan), "replayed", steps)
    assert nan.verdict.startswith("not testable: all")
    empty = content(pairs_table(comparisons=()), "replayed", steps)
    assert empty.verdict == "not testable: no pairs of comparison 'replayed' in this run."
    short = content(pairs_of(x[:, :1]), "replayed", steps, kind_of, **how)
    assert short.content_found is None
    for found in (few, one, nan, empty, short):
        json.dumps(found.to_dict(), allow_nan=False)
        found.figures()
        assert "<table>" in found._repr_html_()
    with pytest.raises(SSTError, match="unknown comparison"):
        content(table, "fre")
    with pytest.raises(SSTError, match="lens_jaccard"):
        content(table, "replayed", choices=Choices(overlap="lens_jaccard"))


def test_comparisons_are_never_pooled_and_figures_say_which():
    rng = np.random.default_rng(23)
    x, entropy, tokens = planted(rng, by_entropy=1.0)
    both = pd.concat([pairs_of(x), pairs_of(smooth(rng, N, T), comparison="free")])
    how = {"threshold": 0.98, "resamples": 50}
    found = content(both, "replayed", steps_of(entropy, tokens), kind_of, **how)
    alone = content(pairs_of(x), "replayed", steps_of(entropy, tokens), kind_of, **how)
    assert found.to_dict() == alone.to_dict()
    for figure in found.figures().values():
        layout = figure.to_dict()["layout"]
        assert "replayed" in str(layout["title"])
        assert f"{N} questions" in str(layout["title"])
        assert layout["xaxis"]["title"]["text"]
    default = content(pairs_table(planted=Planted(share=0.2)), "replayed", resamples=50)
    assert default.provenance == "antimode of this run"
