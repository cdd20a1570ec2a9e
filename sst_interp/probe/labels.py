"""What the probe is to tell: one true or false per question, from what the depths answered.

`must-halt` is the paper's: right at some depth and broken by iterating deeper; the others may iterate. Where
answers are no better than guesses, right and wrong say little, and `answer-changed` asks what is left:
whether iterating changes the answer at all.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from sst_interp.errors import SSTError, unknown_name

if TYPE_CHECKING:
    from sst_interp.analyses.parts.answers import Answers


class Rule(NamedTuple):
    """How a label is read off the answers."""

    definition: str
    """Which questions are positive ..."""
    others: str
    """... and which negative; questions that are neither are left out."""
    positive: Callable[[np.ndarray, np.ndarray | None], np.ndarray]
    """(correct [question, depth], answer codes [question, depth]) -> bool [question]."""
    counted: Callable[[np.ndarray, np.ndarray | None], np.ndarray]
    """Questions that are positive or negative."""
    needs_answers: bool = False
    halts: bool = True
    """Whether a positive question is one to halt early (otherwise one to iterate)."""


def _broken_deeper(correct: np.ndarray, _: object) -> np.ndarray:
    right_before = np.cumsum(correct, axis=1) > 0
    return np.any(right_before & ~correct, axis=1)


def _everything(correct: np.ndarray, _: object) -> np.ndarray:
    return np.ones(len(correct), dtype=bool)


def _changed(_: object, codes: np.ndarray | None) -> np.ndarray:
    assert codes is not None
    return np.any(codes != codes[:, :1], axis=1)


def _always_answered(_: object, codes: np.ndarray | None) -> np.ndarray:
    from sst_interp.analyses.parts.answers import NO_ANSWER

    assert codes is not None
    return np.all(codes != NO_ANSWER, axis=1)


def _deepest_differs(_: object, codes: np.ndarray | None) -> np.ndarray:
    assert codes is not None
    return codes[:, -1] != codes[:, 0]


RULES: dict[str, Rule] = {
    "must-halt": Rule(
        "right at some depth and wrong at a deeper one",
        "all others (may-iterate)",
        _broken_deeper,
        _everything,
    ),
    "broken": Rule(
        "right at the shallowest depth and wrong at the deepest",
        "right at both",
        lambda correct, _: ~correct[:, -1],
        lambda correct, _: correct[:, 0],
    ),
    "mended": Rule(
        "wrong at the shallowest depth and right at the deepest",
        "wrong at both",
        lambda correct, _: correct[:, -1],
        lambda correct, _: ~correct[:, 0],
        halts=False,
    ),
    "answer-changed": Rule(
        "another answer at some depth than at the shallowest",
        "the same answer at every depth",
        _changed,
        _everything,
        needs_answers=True,
    ),
    "choice-changed": Rule(
        "another answer at some depth than at the shallowest, and an answer at every depth",
        "the same answer, not none, at every depth",
        _changed,
        _always_answered,
        needs_answers=True,
    ),
    "deepest-changed": Rule(
        "another answer at the deepest depth than at the shallowest",
        "the same answer at both",
        _deepest_differs,
        _everything,
        needs_answers=True,
    ),
}


@dataclass(frozen=True, eq=False)
class Labels:
    """One label for every question it is defined for."""

    name: str
    definition: str
    """Which questions are positive, which negative, and at which depths."""
    questions: np.ndarray
    """Index of each question in the run [question]."""
    ids: np.ndarray
    positive: np.ndarray
    """[question] bool."""
    halts: bool
    """Whether a positive question is one to halt early."""
    shallowest: int
    deepest: int
    n_excluded: int
    """Questions of the run that are neither, or have no row at some depth."""

    @property
    def n_positive(self) -> int:
        """How many questions are positive."""
        return int(self.positive.sum())

    @property
    def n_negative(self) -> int:
        """How many are not."""
        return len(self.positive) - self.n_positive


def halting_labels(answers: Answers, name: str = "must-halt") -> Labels:
    """The labels called `name`, from a run's answers (`analyses.parts.answers.answers_of`).

    Raises:
        SSTError: an unknown name, one depth only, no answers recorded where they are needed, labels that are
            all equal, or a class of fewer than two questions.
    """
    if name not in RULES:
        raise unknown_name("label", name, RULES)
    rule, depths = RULES[name], answers.depths
    if not len(answers.questions):
        raise SSTError("no question has a row at every depth", "capture the rest of the run")
    if len(depths) < 2:
        raise SSTError(
            f"the run has one depth, {depths[0]}: iterating cannot break or change anything",
            "capture it with depths = [1, 4], for example",
        )
    if rule.needs_answers and answers.codes is None:
        raise SSTError(f"label {name!r} needs the answers, and the run has none", "try --label must-halt")
    counted = rule.counted(answers.correct, answers.codes)
    positive = rule.positive(answers.correct, answers.codes)[counted]
    found = Labels(
        name,
        f"{name}: {rule.definition} (depths {', '.join(map(str, depths))}); against: {rule.others}",
        answers.questions[counted],
        answers.ids[counted],
        positive,
        rule.halts,
        int(depths[0]),
        int(depths[-1]),
        answers.n_excluded + int((~counted).sum()),
    )
    refuse_few(found.positive, name)
    return found


def refuse_few(positive: np.ndarray, name: str) -> None:
    """Raise if labels [question] are all equal, or if one of the classes has a single question."""
    n, n1 = len(positive), int(positive.sum())
    others = [rule for rule in RULES if rule != name]
    hint = f"try --label {' or '.join(others[:3])}, or capture more questions"
    if n1 in (0, n):
        which = "none" if n1 == 0 else "all"
        raise SSTError(f"labels {name!r} are all equal: {which} of {n} questions are positive", hint)
    if min(n1, n - n1) < 2:
        side = "positive" if n1 == 1 else "negative"
        raise SSTError(
            f"labels {name!r} have 1 {side} question of {n}: each class needs 2, one to learn from", hint
        )
