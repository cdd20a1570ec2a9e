import numpy as np
import pandas as pd
import pytest
from synthetic import contrast
from synthetic_outputs import parting_run

from sst_interp.analyses.divergence import divergence, divergence_positions
from sst_interp.analyses.statistics.permutation import concordance
from sst_interp.errors import SSTError, Untestable
from sst_interp.models.choices import Choices


def found(run, **options):
    outputs, pairs, steps = run
    options = {"threshold": 0.95, "resamples": 300} | options
    return divergence(contrast(pairs, "teacher_forced", outputs=outputs, steps=steps, **options))


def free(rows):
    """`outputs` of one question from (same_prefix, argmax_changed) by position."""
    same, changed = zip(*rows, strict=True)
    table = {"question": 7, "position": range(len(rows)), "same_prefix": same, "argmax_changed": changed}
    return pd.DataFrame(table)


def test_the_texts_part_where_the_output_first_differs():
    same, differs, after = (True, False), (True, True), (False, True)
    for rows, expected in (
        ([same, same, differs, after], 2),
        ([same, same, differs], 2),  # one text ends there
        ([differs, after, (False, False)], 0),
        ([same, same, (False, False)], 1),  # the flag alone
        ([same, same], None),
    ):
        found = divergence_positions(free(rows)).iloc[0]
        assert (found["question"], found["positions"]) == (7, len(rows))
        assert np.isnan(found["position"]) if expected is None else found["position"] == expected


def test_planted_positions_are_found():
    outputs, pairs, steps = parting_run(seed=1)
    result = found((outputs, pairs, steps))
    rows = outputs[outputs["comparison"] == "free_running"]
    first = rows[rows["argmax_changed"]].groupby("question")["position"].min()
    where = result.where.set_index("question")["position"]
    assert where.dropna().equals(first.astype(float).rename("position"))
    assert result.diverged.estimate == len(first) / 60
    assert result.position.estimate == first.median()
    assert result.by_position["diverged"].iloc[-1] == result.diverged.estimate
    assert (np.diff(result.by_position["diverged"]) >= 0).all()
    share = f"{result.explained.estimate:.1%}"
    assert result.verdict.startswith(f"{share} of the shifts come from the texts, not from the depth. ")
    for words in ("Free-running, depth 1 against depth 4", "60 questions", "median"):
        assert words in result.verdict


def test_what_the_parting_explains_is_what_the_replay_does_not_have():
    outputs, pairs, steps = parting_run(seed=2)
    result = found((outputs, pairs, steps))
    low = pairs["cosine"] < 0.95
    counts = {c: (low & (pairs["comparison"] == c)).sum() for c in ("free_running", "teacher_forced")}
    assert result.explained.estimate == pytest.approx(1 - counts["teacher_forced"] / counts["free_running"])
    after = low & (pairs["comparison"] == "free_running") & ~pairs["same_prefix"]
    assert result.after.estimate == pytest.approx(after.sum() / counts["free_running"])
    table = result.shifts.set_index("when")
    assert table["of_shifts"].sum() == pytest.approx(1)
    assert table["of_pairs"].sum() == pytest.approx(1)
    assert table.loc["after", "rate"] == pytest.approx(0.3, abs=0.03)
    assert table.loc["after", "rate_teacher_forced"] == pytest.approx(0.05, abs=0.015)
    for when in ("before", "at"):  # the same computation up to there
        assert table.loc[when, "rate"] == table.loc[when, "rate_teacher_forced"]
    assert result.agreement == 0
    assert result.explained.low < result.explained.estimate < result.explained.high


def test_nothing_is_explained_if_shifts_do_not_care():
    inside = 0
    for seed in range(30):
        explained = found(parting_run(after=0.05, seed=seed)).explained
        inside += explained.low <= 0 <= explained.high
    assert inside >= 25  # 95% nominal, 30 trials; 24 or fewer has probability 0.3%


def test_an_overlap_that_foretells_is_found_and_one_that_does_not_is_not():
    told = found(parting_run(foretold=1.5, seed=1)).predictors.set_index("score").loc["lowest overlap"]
    assert told["within_low"] > 0.6
    assert told["across_low"] > 0.6
    assert told["p"] < 0.01
    result = found(parting_run(seed=1))
    untold = result.predictors.set_index("score")
    assert (untold["p_holm"] > 0.05).all()
    assert (untold["p_holm"] >= untold["p"]).all()
    assert untold.loc["lowest overlap", "p"] > 0.05
    assert "does not predict where" in result.verdict


def test_without_an_effect_p_is_uniform():
    p = []
    for seed in range(120):
        rng = np.random.default_rng(seed)
        length = rng.integers(2, 9, 30)
        question = np.repeat(np.arange(30), length)
        position = np.concatenate([np.arange(n) for n in length])
        event = position == length[question] - 1
        score = rng.normal(size=len(question)) + 3 * rng.normal(size=30)[question]
        p.append(concordance(question, position, event, score, 200, seed).p_value)
    p = np.array(p)
    assert p.min() > 0
    assert (p <= 0.05).mean() <= 0.12  # 15 of 120 has probability 0.2%
    assert p.mean() == pytest.approx(0.5, abs=0.09)


def test_each_auc_takes_out_what_it_says():
    rng = np.random.default_rng(0)
    length = rng.integers(3, 9, 40)
    question = np.repeat(np.arange(40), length)
    position = np.concatenate([np.arange(n) for n in length])
    event = position == length[question] - 1
    drift = concordance(question, position, event, position.astype(float), 200)
    assert drift.within.estimate == 1.0
    assert drift.across.estimate == 0.5  # all ties
    own = concordance(question, position, event, -length[question].astype(float), 200)
    assert own.within.estimate == 0.5
    assert own.across.estimate == 1.0
    flipped = concordance(question, position, event, length[question] - position.astype(float), 200)
    assert flipped.within.estimate == 0.0


def test_aucs_are_those_of_all_pairs():
    rng = np.random.default_rng(3)
    length = rng.integers(1, 6, 15)
    question = np.repeat(np.arange(15), length)
    position = np.concatenate([np.arange(n) for n in length])
    event = (position == length[question] - 1) & (question % 3 > 0)
    score = rng.integers(0, 4, len(question)).astype(float)
    got = concordance(question, position, event, score, 50)

    def over(x, others):
        return (x > others).sum() + 0.5 * (x == others).sum()

    aucs, top, bottom = [], 0.0, 0
    for i in np.flatnonzero(event):
        own = score[(question == question[i]) & ~event]
        if len(own):
            aucs.append(over(score[i], own) / len(own))
        others = score[(position == position[i]) & ~event]
        top, bottom = top + over(score[i], others), bottom + len(others)
    assert got.within.estimate == pytest.approx(np.mean(aucs))
    assert got.across.estimate == pytest.approx(top / bottom)


def test_readings_where_the_texts_part_are_the_planted_ones():
    outputs, pairs, steps = parting_run(seed=4)
    rows = outputs[
        (outputs["comparison"] == "free_running") & outputs["same_prefix"] & outputs["argmax_changed"]
    ]
    there = steps.set_index(["question", "position"]).index.isin(
        rows.set_index(["question", "position"]).index
    )
    steps.loc[there, "margin"] = 0.1
    steps.loc[there, "entropy"] = 4.0
    table = found((outputs, pairs, steps)).readings.set_index("quantity")
    assert table.loc["margin_a", "divergence"] == pytest.approx(0.1)
    assert table.loc["entropy_b", "divergence"] == pytest.approx(4)
    assert table.loc["entropy_b", "other"] == pytest.approx(2, abs=0.01)
    assert table.loc["margin_a", "difference_high"] < 0
    told = found((outputs, pairs, steps)).predictors.set_index("score").loc["margin of the shallower depth"]
    assert told["within"] > 0.95


def test_texts_that_never_part_leave_nothing_to_explain():
    result = found(parting_run(hazard=0.0))
    assert result.verdict.startswith("No two texts part. ")
    assert result.verdict.endswith("60 questions; at most 4.9% of such do (95%).")
    assert np.isnan(result.position.estimate)
    assert result.explained.estimate == 0
    calm = found(parting_run(base=0, after=0), threshold=0.5)
    assert "nothing to explain" in calm.verdict
    everything = found(parting_run(), threshold=1.0)
    assert everything.explained.estimate == 0
    at_once = found(parting_run(hazard=1.0))
    assert at_once.position.estimate == 0
    assert "not testable: only 0 questions of use" in at_once.verdict
    assert set(at_once.figures()) == {"diverged", "shifts"}
    for one in (result, calm, everything):
        one.figures()


def test_what_cannot_be_tested_says_why():
    outputs, pairs, steps = parting_run(questions=12, seed=1)
    for run in ((outputs, pairs[:0], steps), (outputs[:0], pairs, None)):
        with pytest.raises(Untestable, match="the run has no"):
            found(run)
    only = [t[t["comparison"] == "teacher_forced"] for t in (outputs, pairs)]
    with pytest.raises(Untestable, match="no outputs of comparison 'free_running'"):
        found((*only, steps))
    with pytest.raises(SSTError, match="lens_jaccard"):
        found((outputs, pairs, steps), choices=Choices(overlap="lens_jaccard"))


def test_without_one_text_or_steps_the_rest_is_said():
    outputs, pairs, _ = parting_run(questions=12, seed=1)
    bare = found((outputs, pairs[pairs["comparison"] == "free_running"], None))
    assert "What is left teacher-forced is not known: " in bare.verdict
    assert bare.verdict.startswith("Texts part; how many shifts that makes is not known.")
    assert np.isfinite(bare.after.estimate)
    assert np.isnan(bare.explained.estimate)
    assert bare.readings.set_index("quantity").loc["margin_a"].isna().all()
    bare.figures()


def test_positions_with_a_nan_are_left_out_and_counted():
    outputs, pairs, steps = parting_run(seed=1)
    broken = pairs.assign(cosine=pairs["cosine"].mask((pairs["position"] == 3) & (pairs["layer"] == 0)))
    result = found((outputs, broken, steps.assign(margin=np.nan)))
    assert "60 positions with a missing overlap or value are left out" in result.verdict
    blind = found((outputs, pairs.assign(cosine=np.nan), steps))
    assert np.isnan(blind.after.estimate)
    blind.figures()


def test_every_pair_of_depths_has_its_row():
    deeper, shallower = parting_run(depth=4, seed=1), parting_run(depth=2, seed=2)
    both = [pd.concat(tables) for tables in zip(shallower, deeper, strict=True)]
    both[2] = both[2].drop_duplicates(["question", "text", "depth", "position", "iteration"])
    result = found(both)
    assert (result.a, result.b) == (1, 4)
    assert result.per_pair["b"].tolist() == [2, 4]
    for run, row in ((shallower, 0), (deeper, 1)):
        alone = found(run)
        assert result.per_pair["explained"].iloc[row] == alone.explained.estimate
        assert result.where[result.where["b"] == alone.b].equals(
            alone.where.set_index(result.where.index[result.where["b"] == alone.b])
        )


def test_figures_say_comparison_questions_and_units():
    for name, figure in found(parting_run(seed=1)).figures().items():
        layout = str(figure.to_dict()["layout"])
        assert "free-running" in layout
        assert "questions" in layout
        assert figure.layout.xaxis.title.text, name
