"""C12 and C13 in the ledger: decided by a stated rule, and "not testable" where nothing can decide them."""

from dataclasses import replace

import numpy as np
import pytest
from synthetic_outputs import questions_table
from synthetic_states import states

from sst_interp.analyses.answers import answers_of
from sst_interp.analyses.statistics.bootstrap import Interval
from sst_interp.errors import Untestable
from sst_interp.experiments.probe.finding import at_chance, halting_of
from sst_interp.experiments.probe.fit import Design
from sst_interp.experiments.probe.routing import routing
from sst_interp.experiments.probe.validate import inverted
from sst_interp.findings.answers import folds_grade, probe_rows, routed_grade
from sst_interp.findings.claims import CONTRADICTED, EVERYWHERE, INCOMPARABLE, INCONCLUSIVE, SUPPORTED

QUICK = Design(dims=(2, 4), penalties=(0.03,), blocks=3)


def probed(strength, seed):
    features, own = states(80, 2, 8, 38, strength, dims=2, seed=seed)
    return halting_of(features, own, 1, QUICK, permutations=39, repeats=1, resamples=200)


@pytest.fixture(scope="module")
def planted():
    return probed(4.0, 1)


@pytest.fixture(scope="module")
def nothing():
    return probed(0.0, 5)


def routed(found, broken=None):
    """Depth 2 breaks the questions that must halt and mends the others, which depth 1 has wrong."""
    halt = found.scores["positive"].to_numpy(dtype=bool) if broken is None else broken
    return routing(questions_table(np.stack([halt, ~halt], 1), (1, 4)), probe=found, resamples=200)


def test_a_probe_that_knows_is_supported_in_both_rows(planted):
    sure = np.where(planted.scores["positive"], 1.0, -1.0)
    knowing = replace(planted, scores=planted.scores.assign(score=sure))
    tells, breaks = probe_rows(planted, routed(knowing))
    assert (tells.claim.id, tells.comparison, tells.grade) == ("C12", EVERYWHERE, SUPPORTED)
    assert tells.finding.figure == planted.tested_auc
    assert tells.finding.p == planted.p_tested
    for words in (f"leave-one-out: {planted.hits} of 38 hits", "selection outside the fold"):
        assert words in tells.finding.control
    assert (breaks.claim.id, breaks.grade) == ("C13", SUPPORTED)
    assert "0 of 38 right answers broken" in breaks.finding.control


def test_a_probe_that_knows_nothing_is_supported_in_neither(nothing):
    tells, breaks = probe_rows(nothing, routed(nothing))
    assert {tells.grade, breaks.grade} <= {CONTRADICTED, INCONCLUSIVE}


def test_halting_always_breaks_nothing_and_is_no_probe(nothing):
    always = replace(nothing, scores=nothing.scores.assign(score=1.0))
    breaks = probe_rows(nothing, routed(always))[1]
    assert "0 of 38 right answers broken" in breaks.finding.control
    assert breaks.grade == CONTRADICTED, "the same depths dealt at random break none, either"


def test_the_auc_in_folds_decides_with_its_p():
    def grade(low, at, high, p=0.01, smaller=40, permutations=99, why=None):
        return folds_grade(Interval(at, low, high, 198), p, smaller, permutations, why).grade

    assert grade(0.55, 0.7, 0.8) == SUPPORTED
    assert grade(0.55, 0.62, 0.7) == INCONCLUSIVE, "smaller than the claim needs"
    assert grade(0.49, 0.7, 0.8, p=0.06) == INCONCLUSIVE
    assert grade(0.4, 0.5, 0.59, p=0.5) == CONTRADICTED
    assert grade(0.55, 0.7, 0.8, smaller=34) == grade(0.55, 0.7, 0.8, permutations=19) == INCONCLUSIVE
    assert grade(0.55, 0.7, 0.8, why="at chance") == INCOMPARABLE


def test_routing_is_set_against_the_same_depths_dealt_at_random():
    def grade(low, high, dealt=0.15, smaller=40, why=None):
        return routed_grade(Interval((low + high) / 2, low, high, 198), dealt, smaller, why).grade

    assert grade(-0.12, -0.04) == SUPPORTED
    assert grade(-0.02, 0.03) == CONTRADICTED
    assert grade(-0.08, 0.01) == grade(-0.12, -0.04, smaller=34) == INCONCLUSIVE
    assert grade(-0.12, -0.04, why="at chance") == INCOMPARABLE


def test_the_interval_of_an_auc_is_its_permutation_test_inverted():
    null = 0.5 + 0.1 * np.random.default_rng(0).normal(size=999)
    interval, p = inverted(0.75, null, 100)
    assert interval.low == pytest.approx(0.75 - 1.96 * 0.1, abs=0.02)
    assert (interval.low > 0.5) == (p < 0.05)
    assert inverted(0.75, null[:0], 100)[1] != inverted(0.75, null[:0], 100)[1], "NaN without permutations"


def test_what_decides_nothing_is_said(planted):
    routing_ = routed(planted)
    for changes, words in (
        ({"label": "answer-changed"}, "the claim is about must-halt, this probe tells answer-changed"),
        ({"at_chance": "accuracy is above blind guessing (25%) at no depth"}, "blind guessing"),
        ({"n_positive": 5}, "the smaller class has 5 questions, and 35 are needed"),
        ({"permutations": 19}, "19 permutations cannot reach"),
    ):
        tells, breaks = probe_rows(replace(planted, **changes), routing_)
        assert tells.grade in (INCOMPARABLE, INCONCLUSIVE)
        assert words in tells.finding.verdict
        assert (words in breaks.finding.verdict) == ("permutations" not in changes)
    untested = Untestable("labels 'must-halt' are all equal")
    for row in probe_rows(untested, routing(questions_table(np.ones((8, 2), bool), (1, 4)))):
        assert row.finding.verdict == "not comparable: labels 'must-halt' are all equal"
    one = Untestable("the run has one depth, 1: there is nothing to choose")
    tells, breaks = probe_rows(planted, one)
    assert (tells.grade, breaks.grade) == (SUPPORTED, INCOMPARABLE)
    assert "one depth" in breaks.finding.verdict
    no_probe = routing(questions_table(np.eye(8, 2, dtype=bool), (1, 4)), resamples=50)
    assert probe_rows(planted, no_probe)[1].finding.verdict == "not comparable: none was given"


def test_labels_about_right_and_wrong_are_noise_where_the_model_guesses():
    rng = np.random.default_rng(0)
    guesses = answers_of(questions_table(rng.random((120, 3)) < 0.25, (1, 2, 4)))
    knows = answers_of(questions_table(rng.random((120, 3)) < (0.25, 0.25, 0.6), (1, 2, 4)))
    for label in ("must-halt", "broken", "mended"):
        assert "blind guessing (25.0%)" in at_chance(guesses, label, 200)
        assert at_chance(knows, label, 200) is None
    assert at_chance(guesses, "answer-changed", 200) is None
    open_ended = guesses._replace(choices=None)
    assert at_chance(open_ended, "must-halt", 200) is None


def test_the_verdict_says_that_labels_are_noise(nothing):
    why = "accuracy is above blind guessing (25%) at no depth, so right and wrong are noise"
    assert "Accuracy is above blind guessing" in replace(nothing, at_chance=why).verdict
    assert "blind guessing" not in nothing.verdict
