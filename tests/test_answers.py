from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
from scipy.stats import binomtest
from synthetic import contrast
from synthetic_outputs import questions_table

from sst_interp.analyses.answers import (
    NO_ANSWER,
    answers_of,
    blind_oracle,
    depths_permutation,
    mcnemar,
    oracle,
    overthinking,
)
from sst_interp.analyses.settling import settling
from sst_interp.errors import Untestable


def asked(questions, resamples=300, **beside):
    """A contrast of a `questions` table, beside runs of which only that table is known."""
    runs = {role: SimpleNamespace(questions=table) for role, table in beside.items()}
    return contrast(questions=questions, resamples=resamples, beside=runs)


def found(questions, **options):
    return overthinking(asked(questions, **options))


def settled(questions, start=None, **options):
    return settling(asked(questions, **options), start)


def answered(rows, depths=None, gold="A"):
    """A `questions` table from answers by depth: strings such as "CBBD", with "-" for none."""
    depths = depths or tuple(range(1, len(rows[0]) + 1))
    table = questions_table(np.zeros((len(rows), len(depths)), dtype=bool), depths)
    answer = pd.Series([None if a == "-" else a for row in rows for a in row], dtype=object)
    return table.assign(answer=answer, gold=gold, correct=(answer == gold).to_numpy())


def test_the_papers_own_numbers_come_out():
    correct = np.zeros((198, 2), dtype=bool)
    correct[:101, 0] = True
    correct[30:115, 1] = True  # 30 of 101 broken, 14 mended, 85 right at the deeper depth
    result = found(questions_table(correct, (1, 4)))
    assert result.accuracy.estimate == 101 / 198
    assert result.deep_accuracy.estimate == 85 / 198
    assert (result.right, result.broken, result.mended) == (101, 30, 14)
    assert result.broken_share.estimate == 30 / 101
    assert result.oracle.estimate == 115 / 198
    assert result.p_value == pytest.approx(binomtest(14, 44).pvalue)
    assert result.difference.low <= -16 / 198 <= result.difference.high
    assert result.verdict.startswith("Thinking longer costs right answers. ")
    for words in ("51.0%", "42.9%", "198 questions", "30 of 101", "14 of 97", "not a policy", "-8.1 points"):
        assert words in result.verdict


def test_intervals_of_accuracy_hold_the_truth_as_often_as_stated():
    inside = 0
    for seed in range(60):
        rng = np.random.default_rng(seed)
        result = found(questions_table(rng.random((100, 2)) < [0.5, 0.4], (1, 4), seed=seed))
        inside += result.difference.low <= -0.1 <= result.difference.high
    assert inside >= 52  # 95% nominal, 60 trials; 51 or fewer has probability 0.4%


def test_mcnemar_is_the_exact_sign_test_and_does_not_find_what_is_not_there():
    for broken, mended in ((0, 0), (1, 0), (5, 5), (30, 14), (2, 9)):
        expected = binomtest(broken, broken + mended).pvalue if broken + mended else 1.0
        assert mcnemar(broken, mended) == pytest.approx(expected)
    assert np.array_equal(mcnemar(np.array([3, 4]), np.array([4, 3])), np.ones(2))
    below = 0
    for seed in range(100):
        first, second = answers_of(coin(seed)).correct.T
        below += mcnemar((first & ~second).sum(), (second & ~first).sum()) <= 0.05
    assert below <= 12  # an exact test: at most 5% nominal; 13 of 100 has probability 0.1%


def coin(seed, depths=2, n=60):
    """Depth makes no difference: questions differ, depths do not."""
    rng = np.random.default_rng(seed)
    easy = rng.random((n, 1))
    return questions_table(rng.random((n, depths)) < easy, tuple(range(1, depths + 1)), seed=seed)


def test_permuting_depths_finds_a_depth_that_is_worse_and_nothing_else():
    p = [depths_permutation(answers_of(coin(seed, 4)).correct, 200, seed) for seed in range(100)]
    assert min(p) > 0
    assert np.mean(np.array(p) <= 0.05) <= 0.12
    assert np.mean(p) == pytest.approx(0.5, abs=0.1)
    rng = np.random.default_rng(0)
    worse = rng.random((100, 4)) < [0.6, 0.6, 0.6, 0.3]
    assert depths_permutation(worse, 500) < 0.01
    assert np.isnan(depths_permutation(np.ones((9, 4), dtype=bool), 100))


def test_every_depth_is_compared_with_the_first():
    rng = np.random.default_rng(1)
    correct = rng.random((50, 4)) < 0.5
    table = found(questions_table(correct)).table.set_index("depth")
    for k, depth in enumerate((1, 2, 3, 4)):
        assert table.loc[depth, "right"] == correct[:, k].sum()
        assert table.loc[depth, "broken"] == (correct[:, 0] & ~correct[:, k]).sum()
        assert table.loc[depth, "mended"] == (~correct[:, 0] & correct[:, k]).sum()
    assert np.isnan(table.loc[1, "p"])
    assert (table["p_holm"][1:] >= table["p"][1:]).all()


def test_guesses_make_an_oracle_and_nothing_beyond_it():
    inside, above = 0, 0
    for seed in range(60):
        rng = np.random.default_rng([seed, 0])
        result = found(questions_table(rng.random((150, 4)) < 0.25, seed=seed), resamples=200)
        assert result.guessing == pytest.approx(1 - 0.75**4)
        inside += result.beyond_blind.low <= 0 <= result.beyond_blind.high
        above += result.unrelated.low <= result.oracle.estimate <= result.unrelated.high
    assert inside >= 52
    assert above >= 50


def test_an_oracle_that_finds_more_than_guesses_is_said_to():
    correct = np.zeros((80, 4), dtype=bool)
    correct[:30] = True
    correct[30:60, 2] = True  # wrong at first, and every change finds the answer
    wrong = questions_table(correct)
    other = wrong["gold"].map({"A": "B", "B": "C", "C": "D", "D": "A"})
    wrong["answer"] = np.where(wrong["correct"], wrong["gold"], other)
    result = found(wrong)
    assert result.oracle.estimate == 60 / 80
    assert result.blind.estimate == pytest.approx((30 + 30 / 3) / 80)
    assert result.beyond_blind.low > 0
    assert result.oracle.estimate >= result.table["accuracy"].max()


def test_a_blind_oracle_by_hand():
    rows = ["AAAA", "AB-C", "CCCC", "CBBD", "CBDA", "-BB-", "----", "-BCD", "C--B"]
    blind = blind_oracle(answers_of(answered(rows)))
    assert np.allclose(blind, [1, 1, 0, 2 / 3, 1, 1 / 4, 0, 3 / 4, 1 / 3])
    numbers = answered(rows).assign(gold="42")
    assert blind_oracle(answers_of(numbers)) is None
    assert np.isnan(found(numbers).guessing)
    assert "blind guess" not in found(numbers).verdict
    assert oracle(answers_of(answered(rows))._replace(choices=10), 20).guessing == pytest.approx(1 - 0.9**4)


def test_answers_that_were_not_found_are_wrong_and_counted():
    result = found(answered(["AA", "A-", "AB", "BB", "--", "-A"], (1, 4)))
    assert (result.right, result.broken, result.mended) == (3, 2, 1)
    deep = result.table.set_index("depth").loc[4]
    assert deep["without_answer"] == 1
    assert deep["unanswered"] == pytest.approx(2 / 6)
    assert deep["changed"] == result.changed.estimate == pytest.approx(3 / 6)  # none to none is no change
    assert result.of_question["kind"].tolist() == ["right", "broken", "broken", "wrong", "wrong", "mended"]
    never = found(answered(["--", "--"]))
    assert never.oracle.estimate == 0
    never.figures()


def test_answers_settle_cycle_or_drift():
    rows = ["ABCC", "ABCA", "ABBA", "ABCD", "ABC-", "CCCC", "--AB"]
    result = settled(answered(rows), resamples=300)
    kinds = ["settles", "cycles", "cycles", "drifts", "no answer", "settles", "drifts"]
    assert result.of_question["kind"].tolist() == kinds
    assert result.table.set_index("kind")["questions"].to_dict() == {
        "settles": 2, "cycles": 2, "drifts": 2, "no answer": 1,
    }  # fmt: skip
    assert result.table["share"].sum() == pytest.approx(1)
    assert result.of_question["changes"].tolist() == [2, 3, 2, 3, 3, 0, 2]
    assert result.steps["changed"].tolist() == pytest.approx([5 / 7, 5 / 7, 5 / 7])
    # A pair of answers out of four is equal in 1 of 6 cases: twice in the second kind.
    assert result.shuffled.estimate == pytest.approx((1 / 6 + 1 / 6 + 2 / 6 + 0 + 0 + 1 + 0) / 7)


def test_the_shuffled_share_is_that_of_shuffled_answers():
    rng = np.random.default_rng(0)
    letters = np.array(list("AABC-"))
    rows = ["".join(letters[rng.integers(0, 5, 5)]) for _ in range(40)]
    expected = settled(answered(rows), resamples=20).shuffled.estimate
    shares = [
        settled(answered(["".join(rng.permutation(list(r))) for r in rows]), resamples=20).settled.estimate
        for _ in range(50)
    ]
    assert np.mean(shares) == pytest.approx(expected, abs=4 * np.std(shares) / np.sqrt(50))


def test_settling_is_found_where_planted_and_not_in_random_answers():
    rng = np.random.default_rng(0)
    letters = np.array(list("ABCD"))
    early, late = letters[rng.integers(0, 4, (80, 3))], letters[rng.integers(0, 4, (80, 1))]
    planted = answered(["".join(r) for r in np.hstack([early, late, late])], (1, 2, 4, 8, 16))
    result = settled(planted, resamples=500)
    assert result.settled.estimate == 1
    assert result.beyond.low > 0
    assert result.steps["per_depth"].iloc[-1] == 0
    assert result.steps["per_depth"].iloc[2] == pytest.approx(result.steps["changed"].iloc[2] / 4)
    missed = 0
    for seed in range(40):
        rng = np.random.default_rng(seed)
        rows = ["".join(r) for r in letters[rng.integers(0, 4, (60, 5))]]
        beyond = settled(answered(rows), resamples=300).beyond
        missed += not beyond.low <= 0 <= beyond.high
    assert missed <= 6  # 5% nominal, 40 trials; 7 or more has probability 0.3%
    assert not settled(answered(rows), resamples=300).verdict.startswith("Answers settle:")


def test_a_run_with_more_depths_is_asked_whether_answers_settle_and_is_not_pooled():
    table, deeper = coin(1, 4), answered(["ABCC", "ABCA"], (1, 4, 8, 16))
    assert found(table, beyond=deeper).to_dict() == found(table).to_dict()
    assert "2 questions, depths 1 to 16" in settled(table, beyond=deeper).verdict
    assert settled(deeper, start=4).depths == (4, 8, 16)
    few = coin(1, 2), pd.DataFrame(), coin(1, 4).drop(columns="answer"), deeper[deeper["depth"] < 8]
    for table, why in zip(few, ("three depths", "no questions", "no answers", "three depths"), strict=True):
        with pytest.raises(Untestable, match=why):
            settled(table)


def test_a_matched_baseline_is_paired_by_record():
    table = coin(2, 4, n=50)
    baseline = coin(3, 1, n=50).assign(question=lambda t: t["question"] + 5)
    baseline["id"] = [f"record-{i}" for i in reversed(range(50))]
    result = found(table, baseline=baseline)
    right = baseline.set_index("id")["correct"].reindex([f"record-{i}" for i in range(50)]).to_numpy()
    assert result.baseline.estimate == right.mean()
    by_depth = table["correct"].to_numpy().reshape(50, 4)
    assert result.over_baseline.estimate == pytest.approx((by_depth.any(1) * 1.0 - right).mean())
    assert result.base_over_baseline.estimate == pytest.approx((by_depth[:, 0] * 1.0 - right).mean())
    assert "matched baseline" in result.verdict
    strangers = found(table, baseline=baseline.assign(id="nobody"))
    assert strangers.baseline.reason == "the baseline has none of these questions"
    assert found(table).baseline.reason == "no run of the matched baseline was given"


def test_nothing_broken_is_said_with_what_it_excludes():
    result = found(questions_table(np.ones((20, 2), dtype=bool), (1, 4)))
    assert (result.broken, result.p_value) == (0, 1.0)
    assert "At most 13.9% of right answers break (95%)" in result.verdict
    nothing = found(questions_table(np.zeros((20, 2), dtype=bool), (1, 4)))
    assert "0 of 0 right answers" in nothing.verdict
    for extreme in (result, nothing):
        extreme.figures()


def test_questions_with_a_gap_are_left_out_and_counted():
    gap = coin(1, 4).drop(index=[5, 6])
    assert found(gap).n_excluded == 1
    assert "1 question without a row at every depth left out" in found(gap).verdict
    unknown = coin(1, 4)
    unknown["correct"] = unknown["correct"].astype(object).mask(unknown["question"] == 3)
    assert found(unknown).n_excluded == 1
    assert found(coin(1, 4)[1:4]).base == 2


def test_what_cannot_be_tested_says_why():
    nobody = pd.concat([coin(1, 2)[0:1], coin(1, 2)[3:4]])
    for table, why in (
        (pd.DataFrame(), "the run has no questions"),
        (coin(1, 1), "the run has one depth, 1; accuracy there is "),
        (nobody, "no question has a row at every depth"),
    ):
        with pytest.raises(Untestable, match=why):
            found(table)


def test_order_of_rows_and_names_of_questions_change_nothing():
    table = coin(4, 4)
    one = found(table)
    assert found(table.sample(frac=1, random_state=0)).to_dict() == one.to_dict()
    assert found(table.assign(question=table["question"] * 7 + 100_000)).verdict == one.verdict


def test_answers_are_read_as_they_stand():
    answers = answers_of(answered(["AB-A", "CCCC"]))
    assert (answers.codes[0] == NO_ANSWER).tolist() == [False, False, True, False]
    assert answers.codes[0, 0] == answers.codes[0, 3] != answers.codes[0, 1]
    assert answers.choices == 3  # A to C were seen
    assert answers.ids.tolist() == ["record-0", "record-1"]


def test_figures_say_questions_and_units():
    result = found(coin(1, 4))
    assert set(result.figures()) == {"accuracy", "broken_and_mended"}
    for figure in (*result.figures().values(), settled(coin(1, 4)).figure()):
        layout = str(figure.to_dict()["layout"])
        assert "60 questions" in layout
        assert figure.layout.xaxis.title.text
        assert figure.layout.yaxis.title.text
    assert any("not a policy" in trace.name for trace in result.figure().data)
