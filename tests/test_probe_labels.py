"""What is to be told, and what it is told from."""

import numpy as np
import pandas as pd
import pytest
import tiny_run
import torch
from synthetic_outputs import questions_table

from sst_interp.analyses.answers import answers_of
from sst_interp.errors import SSTError, Untestable
from sst_interp.experiments.probe import RULES, features_of, halting_labels, position0, usable_layers
from sst_interp.runs.store import open_run, publish

PATTERNS = ["1111", "1000", "0100", "0111", "1011", "0000", "0001", "1110", "0010"]


def run_answers(patterns=PATTERNS, answers=None):
    """Answers from strings of right (1) and wrong (0) by depth; `answers` gives letters instead."""
    correct = np.array([[c == "1" for c in row] for row in patterns])
    table = questions_table(correct, tuple(range(1, correct.shape[1] + 1)))
    if answers is not None:
        table["answer"] = [None if a == "-" else a for row in answers for a in row]
    return answers_of(table)


def test_must_halt_is_right_somewhere_and_broken_deeper():
    found = halting_labels(run_answers(), "must-halt")
    expected = ["10" in pattern for pattern in PATTERNS]
    assert found.positive.tolist() == expected
    assert (found.n_positive, found.n_negative, found.n_excluded) == (5, 4, 0)
    assert (found.shallowest, found.deepest, found.halts) == (1, 4, True)
    for words in ("must-halt", "right at some depth and wrong at a deeper one", "depths 1, 2, 3, 4"):
        assert words in found.definition


def test_broken_and_mended_are_about_those_that_can_be():
    broken = halting_labels(run_answers(), "broken")
    right = [p for p in PATTERNS if p[0] == "1"]
    assert broken.positive.tolist() == [p[-1] == "0" for p in right]
    assert broken.questions.tolist() == [i for i, p in enumerate(PATTERNS) if p[0] == "1"]
    assert broken.n_excluded == len(PATTERNS) - len(right)
    mended = halting_labels(run_answers(), "mended")
    assert mended.positive.tolist() == [p[-1] == "1" for p in PATTERNS if p[0] == "0"]
    assert not mended.halts


def test_changed_answers_need_no_right_one():
    given = ["AAAA", "ABAA", "AAAB", "A-AA", "----", "BBBB", "CCCD", "DDDD", "AAAA"]
    answers = run_answers(["0000"] * 9, given)
    changed = halting_labels(answers, "answer-changed")
    assert changed.positive.tolist() == [len(set(row)) > 1 for row in given]
    choice = halting_labels(answers, "choice-changed")
    answered = [row for row in given if "-" not in row]
    assert choice.positive.tolist() == [len(set(row)) > 1 for row in answered]
    assert choice.n_excluded == len(given) - len(answered)
    deepest = halting_labels(answers, "deepest-changed")
    assert deepest.positive.tolist() == [row[0] != row[-1] for row in given]
    with pytest.raises(SSTError, match="all equal"):
        halting_labels(answers, "must-halt")


def test_labels_that_cannot_be_told_are_said_in_a_line():
    cases = [
        (run_answers(["11", "11", "00"]), "all equal: none of 3"),
        (run_answers(["10", "10"]), "all equal: all of 2"),
        (run_answers(["10", "11", "00"]), "1 positive question of 3"),
        (run_answers(["10", "10", "00"]), "1 negative question of 3"),
        (run_answers(["1", "0"]), "one depth, 1"),
        (
            answers_of(questions_table(np.ones((2, 2), bool), (1, 4))[1:3]),
            "no question has a row at every depth",
        ),
    ]
    for answers, words in cases:
        with pytest.raises(Untestable, match=words) as error:
            halting_labels(answers)
        assert "\n" not in error.value.message
        assert error.value.hint
    with pytest.raises(SSTError, match="unknown label 'must-hlt'"):
        halting_labels(run_answers(), "must-hlt")
    silent = questions_table(np.array([[True, False]] * 3), (1, 4)).drop(columns="answer")
    with pytest.raises(Untestable, match="needs the answers"):
        halting_labels(answers_of(silent), "answer-changed")
    assert set(RULES) == {
        "must-halt",
        "broken",
        "mended",
        "answer-changed",
        "choice-changed",
        "deepest-changed",
    }


@pytest.fixture(scope="module")
def captured(tmp_path_factory):
    return open_run(tiny_run.capture(tmp_path_factory.mktemp("runs") / "tiny"))


def test_features_are_the_states_of_the_run_and_the_numbers_of_its_tables(captured):
    found = position0(captured, [1, 4, 2], iteration=2)
    for place, question in enumerate((1, 4, 2)):
        assert torch.equal(found.states[place], captured.states(question)[:, 1].float())
    steps = captured.steps
    own = steps[(steps["text"] == "own") & (steps["depth"] == 1) & (steps["position"] == 0)]
    of = own.set_index("question").loc[[1, 4, 2]]
    assert np.allclose(found.scalars[:, 1], of["entropy"])
    assert np.allclose(found.scalars[:, 2], of["margin"])
    lengths = captured.questions.drop_duplicates("question").set_index("question")["prompt_tokens"]
    assert found.scalars[:, 0].tolist() == lengths.loc[[1, 4, 2]].tolist()


def test_what_was_not_captured_is_said_in_a_line(captured, tmp_path):
    features = position0(captured, [0, 1])
    with pytest.raises(SSTError, match="layer 2 was not captured: there are layers 0 to 1"):
        usable_layers(features, 2)
    with pytest.raises(SSTError, match="layer -1 was not captured"):
        usable_layers(features, -1)
    with pytest.raises(Untestable, match=r"no states of iteration 3\n.* it has 1, 2"):
        position0(captured, [0], 3)
    with pytest.raises(SSTError, match="iteration = 0 is not a whole number from 1"):
        position0(captured, [0], 0)
    with pytest.raises(Untestable, match="no questions"):
        position0(captured, [])
    nothing = open_run(tiny_run.capture(tmp_path / "none", tiny_run.tiny_recipe("none", keep="none")))
    with pytest.raises(SSTError, match="keeps no states"):
        position0(nothing, [0])


@pytest.mark.parametrize("kept", [(2,), (1, 2)])
def test_a_published_copy_is_read_by_an_iterations_own_number(kept, captured, tmp_path):
    copy = publish(captured, tmp_path / "copy", iterations=kept)
    for iteration in (1, 2):
        if iteration in kept:
            own, there = (position0(run, [0, 3], iteration).states for run in (captured, copy))
            assert torch.equal(own, there)
        else:
            with pytest.raises(Untestable, match=r"run copy keeps no states of iteration 1\n.* it has 2"):
                position0(copy, [0, 3], iteration)


def test_constant_layers_are_left_out_and_refused_by_name():
    states = torch.randn(6, 3, 4)
    states[:, 1] = states[0, 1]
    features = features_of(states)
    assert features.constant == (1,)
    assert usable_layers(features) == (0, 2)
    assert usable_layers(features, 2) == (2,)
    with pytest.raises(Untestable, match="features are constant: layer 1"):
        usable_layers(features, 1)
    with pytest.raises(Untestable, match="features are constant: every layer"):
        usable_layers(features_of(states[:1].repeat(6, 1, 1)))
    states[2, 2, 3] = torch.nan
    with pytest.raises(Untestable, match="states of layer 2 are not finite"):
        features_of(states)


def test_labels_of_a_table_with_gaps_leave_those_questions_out():
    table = questions_table(np.array([[True, False], [True, True]] * 4), (1, 4))
    found = halting_labels(answers_of(table.drop(index=[1])))
    assert found.n_excluded == 1
    assert len(found.positive) == 7
    unknown = table.assign(correct=table["correct"].astype(object).mask(table["question"] == 3))
    assert halting_labels(answers_of(pd.DataFrame(unknown))).n_excluded == 1
