"""C12 and C13 in the ledger: decided by a stated rule, and "not testable" where nothing can decide them."""

from dataclasses import replace

import numpy as np
import pytest
from synthetic_outputs import questions_table
from synthetic_states import states

from sst_interp.analyses.answers import answers_of
from sst_interp.errors import Untestable
from sst_interp.experiments.probe.finding import at_chance, halting_of
from sst_interp.experiments.probe.fit import Design
from sst_interp.experiments.probe.routing import routing
from sst_interp.findings.answers import probe_rows
from sst_interp.findings.claims import EVERYWHERE, FAILS, HOLDS, UNTESTED

QUICK = Design(dims=(2, 4), penalties=(0.03,), blocks=3)


def probed(strength, seed):
    features, own = states(40, 2, 8, 15, strength, dims=2, seed=seed)
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


def test_a_probe_that_knows_holds_in_both_rows(planted):
    sure = np.where(planted.scores["positive"], 1.0, -1.0)
    knowing = replace(planted, scores=planted.scores.assign(score=sure))
    tells, breaks = probe_rows(planted, routed(knowing))
    assert (tells.claim.id, tells.comparison, tells.state) == ("C12", EVERYWHERE, HOLDS)
    assert f"{planted.hits} of 15 must-halt questions" in tells.finding.here
    assert tells.finding.figure == planted.sensitivity
    for words in ("always-halt 0", "by permutation", "selection outside the fold"):
        assert words in tells.finding.control
    assert (breaks.claim.id, breaks.state) == ("C13", HOLDS)
    assert "0 of 15 right answers broken" in breaks.finding.here
    assert "always-halt breaks 0" in breaks.finding.control
    assert "never-halt breaks 15" in breaks.finding.control


def test_a_probe_that_knows_nothing_fails_in_both(nothing):
    tells, breaks = probe_rows(nothing, routed(nothing))
    assert (tells.state, breaks.state) == (FAILS, FAILS)


def test_halting_always_breaks_nothing_and_is_no_probe(nothing):
    always = replace(nothing, scores=nothing.scores.assign(score=1.0))
    breaks = probe_rows(nothing, routed(always))[1]
    assert "0 of 15 right answers broken" in breaks.finding.here
    assert breaks.state == FAILS


def test_a_p_value_alone_is_not_enough(planted):
    low = replace(planted.auc, low=0.49)
    assert probe_rows(replace(planted, auc=low), routed(planted))[0].state == FAILS
    assert probe_rows(replace(planted, p_auc=0.05), routed(planted))[0].state == FAILS


def test_what_decides_nothing_is_said(planted):
    routing_ = routed(planted)
    for changes, words in (
        ({"label": "answer-changed"}, "the claim is about must-halt, this probe tells answer-changed"),
        ({"at_chance": "accuracy is above blind guessing (25%) at no depth"}, "blind guessing"),
        ({"n_positive": 5}, "the smaller class has 5 questions"),
        ({"permutations": 19}, "19 permutations cannot reach"),
    ):
        tells, breaks = probe_rows(replace(planted, **changes), routing_)
        assert tells.state == UNTESTED
        assert words in tells.finding.verdict
        assert (breaks.state == UNTESTED) == ("permutations" not in changes)
    untested = Untestable("labels 'must-halt' are all equal")
    for row in probe_rows(untested, routing(questions_table(np.ones((8, 2), bool), (1, 4)))):
        assert row.finding.verdict == "not testable: labels 'must-halt' are all equal"
    one = Untestable("the run has one depth, 1: there is nothing to choose")
    tells, breaks = probe_rows(planted, one)
    assert (tells.state, breaks.state) == (HOLDS, UNTESTED)
    assert "one depth" in breaks.finding.verdict
    no_probe = routing(questions_table(np.eye(8, 2, dtype=bool), (1, 4)), resamples=50)
    assert probe_rows(planted, no_probe)[1].finding.verdict == "not testable: none was given"
    few = np.arange(40) < 3
    assert "3 questions right at depth 1" in probe_rows(planted, routed(planted, few))[1].finding.verdict


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
