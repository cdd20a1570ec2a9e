"""The halting probe: from position 0, before a word is written, tell whether iterating helps or breaks.

Here are the labels (which questions are positive) and the features (states at position 0). `fit` trains many
probes at once, `validate` chooses and scores them without the answer in hand, and `scores` says what the
scores are worth. `finding` and `routing` are the results (C12, C13); `saved` is the probe that is kept.

`must-halt` is the paper's label: right at some depth and broken at a deeper one. Where answers are no better
than guesses, right and wrong say little; `answer-changed` asks whether iterating changes the answer at all.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from sst_interp.analyses.answers import NO_ANSWER, Answers
from sst_interp.errors import SSTError, Untestable, unknown_name

if TYPE_CHECKING:
    from sst_interp.runs.run import Run

SCALARS = ("prompt length", "entropy", "margin")
"""What needs no probe of states: length of the prompt in tokens; entropy (nats) and margin (logits) of the
next-token distribution at depth 1, position 0."""


class Rule(NamedTuple):
    """How the answers decide a label."""

    definition: str
    """The positive questions."""
    others: str
    """The negative ones; questions that are neither are left out."""
    positive: Callable[[np.ndarray, Any], np.ndarray]
    """(correct [question, depth], answer codes [question, depth]) -> bool [question]."""
    counted: Callable[[np.ndarray, Any], np.ndarray]
    """Questions that are positive or negative."""
    needs_answers: bool = False
    halts: bool = True
    """Whether a positive question should halt early (otherwise iterate)."""


def _everything(correct: np.ndarray, _: object) -> np.ndarray:
    return np.ones(len(correct), dtype=bool)


RULES: dict[str, Rule] = {
    "must-halt": Rule(
        "right at some depth and wrong at a deeper one",
        "all others (may-iterate)",
        lambda correct, _: np.any((np.cumsum(correct, axis=1) > 0) & ~correct, axis=1),
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
        lambda _, codes: (codes != codes[:, :1]).any(axis=1),
        _everything,
        needs_answers=True,
    ),
    "choice-changed": Rule(
        "another answer at some depth than at the shallowest, and an answer at every depth",
        "the same answer, not none, at every depth",
        lambda _, codes: (codes != codes[:, :1]).any(axis=1),
        lambda _, codes: (codes != NO_ANSWER).all(axis=1),
        needs_answers=True,
    ),
    "deepest-changed": Rule(
        "another answer at the deepest depth than at the shallowest",
        "the same answer at both",
        lambda _, codes: codes[:, -1] != codes[:, 0],
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
    """Indices in the run [question]."""
    ids: np.ndarray
    positive: np.ndarray
    """[question] bool."""
    halts: bool
    """Whether a positive question should halt early."""
    shallowest: int
    deepest: int
    n_excluded: int
    """Questions of the run that are neither, or have no row at some depth."""

    @property
    def n_positive(self) -> int:
        """Positive questions."""
        return int(self.positive.sum())

    @property
    def n_negative(self) -> int:
        """Negative questions."""
        return len(self.positive) - self.n_positive


def check_depths(answers: Answers, words: str) -> None:
    """Raise Untestable, saying `words`, unless there are questions with several depths."""
    if not len(answers.questions):
        raise Untestable("no question has a row at every depth", "capture the rest of the run")
    if len(answers.depths) < 2:
        one = f"the run has one depth, {answers.depths[0]}: {words}"
        raise Untestable(one, "capture it with depths = [1, 4], for example")


def halting_labels(answers: Answers, name: str = "must-halt") -> Labels:
    """The labels called `name`, from a run's answers (`analyses.answers.answers_of`).

    Raises:
        SSTError: an unknown name.
        Untestable: one depth, no answers where they are needed, equal labels, or a class of one question.
    """
    if name not in RULES:
        raise unknown_name("label", name, RULES)
    check_depths(answers, "iterating cannot break or change anything")
    rule, depths = RULES[name], answers.depths
    if rule.needs_answers and answers.codes is None:
        raise Untestable(f"label {name!r} needs the answers, and the run has none", "try --label must-halt")
    counted = rule.counted(answers.correct, answers.codes)
    positive = rule.positive(answers.correct, answers.codes)[counted]
    n, n1 = len(positive), int(positive.sum())
    others = [other for other in RULES if other != name]
    hint = f"try --label {' or '.join(others[:3])}, or capture more questions"
    if n1 in (0, n):
        which = "none" if n1 == 0 else "all"
        raise Untestable(f"labels {name!r} are all equal: {which} of {n} questions are positive", hint)
    if min(n1, n - n1) < 2:
        side = "positive" if n1 == 1 else "negative"
        raise Untestable(f"labels {name!r} have 1 {side} question of {n}: each class needs 2", hint)
    definition = f"{name}: {rule.definition} (depths {', '.join(map(str, depths))}); against: {rule.others}"
    about = answers.questions[counted], answers.ids[counted], positive
    n_excluded = answers.n_excluded + int((~counted).sum())
    return Labels(name, definition, *about, rule.halts, int(depths[0]), int(depths[-1]), n_excluded)


@dataclass(frozen=True, eq=False)
class Features:
    """What the probe reads of each question at position 0."""

    states: Float[Tensor, "question layer d_model"]
    """Layer outputs, float32."""
    iteration: int
    """After which iteration at position 0."""
    constant: tuple[int, ...]
    """Layers whose state is the same for every question."""
    scalars: Float[Tensor, "question scalar"]
    """`SCALARS`; NaN where the run does not have one."""


def position0(run: Run, questions: Sequence[int] | np.ndarray, iteration: int = 1) -> Features:
    """The features of some questions of a run, in all layers.

    Args:
        run: captured with `keep = "position0"` (the default) or more.
        questions: indices in the run.
        iteration: after which the states are read; a published copy may have kept some only.

    Raises:
        Untestable: the run does not have the states, they are not finite, or there are no questions.
    """
    if run.recipe.keep_layers is not None:
        said = f"run {run.name} keeps the states of layers {', '.join(map(str, run.kept_layers))} only"
        raise Untestable(said, "a probe chooses among all layers: capture without keep_layers")
    try:
        states = [run.state(int(question), iteration).float() for question in questions]
    except SSTError as error:
        raise Untestable(error.message, error.hint) from None
    if not states:
        raise Untestable(f"run {run.name}: no questions to read states of", "capture some first")
    return features_of(torch.stack(states), torch.from_numpy(_scalars(run, questions)).float(), iteration)


def features_of(
    states: Float[Tensor, "question layer d_model"],
    scalars: Float[Tensor, "question scalar"] | None = None,
    iteration: int = 1,
) -> Features:
    """Features from states and scalars in memory. Raises Untestable if the states are not finite."""
    if not bool(torch.isfinite(states).all()):
        layer = int((~torch.isfinite(states)).any(2).any(0).nonzero()[0])
        raise Untestable(f"states of layer {layer} are not finite", "capture the run again, in another dtype")
    same = (states == states[:1]).all(2).all(0)
    if scalars is None:
        scalars = torch.full((len(states), len(SCALARS)), torch.nan)
    return Features(states, iteration, tuple(same.nonzero()[:, 0].tolist()), scalars)


def usable_layers(features: Features, layer: int | None = None) -> tuple[int, ...]:
    """The layers a probe may choose from: all that are not constant, or `layer` alone.

    Raises:
        SSTError: a layer that was not captured.
        Untestable: features that are constant.
    """
    n = features.states.shape[1]
    if layer is not None and not 0 <= layer < n:
        absent = f"layer {layer} was not captured: there are layers 0 to {n - 1}"
        raise SSTError(absent, "--layer auto chooses among all of them")
    asked = range(n) if layer is None else [layer]
    usable = tuple(place for place in asked if place not in features.constant)
    if not usable:
        which, hint = "every layer", "capture more questions"
        if layer is not None:
            which, hint = f"layer {layer}", "--layer auto chooses among the others"
        alike = f"has the same state at position 0 of all {len(features.states)} questions"
        raise Untestable(f"features are constant: {which} {alike}", hint)
    return usable


def _scalars(run: Run, questions: Sequence[int] | np.ndarray) -> np.ndarray:
    """`SCALARS` [question, scalar]; NaN where a table lacks them."""
    lengths = run.questions.drop_duplicates("question").set_index("question")["prompt_tokens"]
    steps = run.table("steps", ["question", "text", "depth", "position", "iteration", "entropy", "margin"])
    first = (steps["position"] == 0) & (steps["depth"] == 1) & (steps["iteration"] == 1)
    own = steps[(first & (steps["text"] == "own")).to_numpy(dtype=bool)].set_index("question")
    columns = [lengths, own["entropy"], own["margin"]]
    order = np.asarray(questions)
    return np.stack([c.reindex(order).to_numpy(dtype=float) for c in columns], axis=1)
