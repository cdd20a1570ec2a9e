"""Overthinking (claims C10, C11): does thinking longer about every question help or break the answer?

Accuracy at each flat depth; which right answers of the shallowest depth are broken at a deeper one and which
wrong ones mended; and the best of the depths. The last is an *oracle*: it needs the right answer to choose
the depth, so it is no policy, and it cannot fall below the best depth however random the answers are. Its
controls stand beside it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace

import numpy as np
import pandas as pd
import plotly.graph_objects as go

from sst_interp.analyses.basin_shifts import UNKNOWN
from sst_interp.analyses.figures import answers as answer_figures
from sst_interp.analyses.parts.answers import answers_of, depth_table, depths_permutation, mcnemar, mean_of
from sst_interp.analyses.parts.oracle import oracle
from sst_interp.analyses.result import Result
from sst_interp.analyses.settling import Settling, settling
from sst_interp.analyses.statistics.bootstrap import (
    RESAMPLES,
    Interval,
    none_seen_bound,
    percent_text,
    points_text,
    questions_words,
)


@dataclass(frozen=True, eq=False)
class Overthinking(Result):
    """Accuracy by depth, what depth breaks and mends, and the oracle. All intervals resample questions."""

    base: int = 1
    """The shallowest depth."""
    deepest: int = 1
    by_depth: pd.DataFrame = field(default_factory=pd.DataFrame)
    """A row per depth (`answers.depth_table`)."""
    accuracy: Interval = UNKNOWN
    """At the base ..."""
    deep_accuracy: Interval = UNKNOWN
    """... at the deepest depth, for every question ..."""
    difference: Interval = UNKNOWN
    """... and what depth adds."""
    right: int = 0
    """Questions right at the base."""
    broken: int = 0
    """Of those, wrong at the deepest depth."""
    mended: int = 0
    """Questions wrong at the base and right at the deepest depth."""
    broken_share: Interval = UNKNOWN
    """Broken, of those right at the base."""
    p_value: float = math.nan
    """Exact McNemar test of broken against mended."""
    p_depths: float = math.nan
    """Permutation test that accuracy does not depend on depth at all (`answers.depths_permutation`)."""
    changed: Interval = UNKNOWN
    """Share of questions whose answer is another one at some depth."""
    oracle: Interval = UNKNOWN
    """Share of questions that are right at some depth: an oracle over depths, not a policy."""
    guessing: float = math.nan
    """The same for as many blind guesses as there are depths (this and the next three: `oracle.Oracle`)."""
    unrelated: Interval = UNKNOWN
    """The oracle were the depths' right answers unrelated."""
    blind: Interval = UNKNOWN
    """The oracle had each new answer been a blind guess."""
    beyond_blind: Interval = UNKNOWN
    """oracle - blind."""
    baseline: Interval = UNKNOWN
    """Accuracy of the matched baseline on the same questions, at its shallowest depth."""
    over_baseline: Interval = UNKNOWN
    """oracle - baseline, and ..."""
    base_over_baseline: Interval = UNKNOWN
    """... accuracy at the base - baseline: what needs no oracle."""
    of_question: pd.DataFrame = field(default_factory=pd.DataFrame)
    """Columns question, id, kind (right, broken, mended, wrong: base against deepest) and right_at, at how
    many depths it is right."""
    beyond: Settling | None = None
    """What becomes of the answers at more depths, if a run with more was given."""
    n_questions: int = 0
    n_excluded: int = 0
    """Questions left out: a depth is missing."""
    not_testable: str | None = None
    """Why there is no result; None if there is one."""

    @property
    def title(self) -> str:
        """What was asked."""
        return "Overthinking: accuracy by flat depth"

    @property
    def table(self) -> pd.DataFrame:
        """A row per depth."""
        return self.by_depth

    @property
    def verdict(self) -> str:
        """Both accuracies, broken and mended, and the oracle with its controls."""
        return f"not testable: {self.not_testable}." if self.not_testable else _verdict(self)

    def figure(self) -> go.Figure:
        """Accuracy by depth, with the oracle and its controls."""
        return answer_figures.accuracy(self)

    def figures(self) -> dict[str, go.Figure]:
        """Accuracy, broken_and_mended, and changes if there is a run with more depths."""
        figures = {"accuracy": self.figure(), "broken_and_mended": answer_figures.broken_and_mended(self)}
        return figures | ({"changes": self.beyond.figure()} if self.beyond else {})


def _verdict(found: Overthinking) -> str:
    n, wrong = questions_words(found.n_questions), found.n_questions - found.right
    words = f"accuracy is {found.accuracy.text(percent=True)} at depth {found.base} and "
    words += f"{found.deep_accuracy.text(percent=True)} at flat depth {found.deepest} ({n}; "
    words += (
        f"{points_text(found.difference)}). {found.broken} of {found.right} right answers are broken and "
    )
    words += f"{found.mended} of {wrong} wrong ones mended (exact McNemar p = {found.p_value:.2g}"
    words += "; no difference is shown)." if found.p_value >= 0.05 else ")."
    if not found.broken and found.right:
        words += f" At most {percent_text(none_seen_bound(found.right))} of right answers break (95%)."
    words += f" The best of the depths, an oracle and not a policy, is {found.oracle.text(percent=True)}"
    if math.isfinite(found.blind.estimate):
        words += f"; had each new answer been a blind guess it would be {percent_text(found.blind.estimate)}"
        words += f" (difference {points_text(found.beyond_blind)})"
    words += f", were the depths unrelated {percent_text(found.unrelated.estimate)}"
    if math.isfinite(found.guessing):
        words += f", and as many blind guesses have {percent_text(found.guessing)}"
    words += "."
    if math.isfinite(found.baseline.estimate):
        words += f" The matched baseline has {found.baseline.text(percent=True)}: the oracle is "
        words += f"{points_text(found.over_baseline)} from it, depth {found.base} alone "
        words += f"{points_text(found.base_over_baseline)}."
    elif found.baseline.reason == "no questions":
        words += " Against the baseline not testable: it has none of these questions."
    if found.n_excluded:
        words += f" {questions_words(found.n_excluded)} without a row at every depth left out."
    return words + (f" Beyond: {found.beyond.verdict}" if found.beyond else "")


def overthinking(
    questions: pd.DataFrame,
    beyond: pd.DataFrame | None = None,
    baseline: pd.DataFrame | None = None,
    choices: int | None = None,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> Overthinking:
    """What depth does to the answers of a run.

    Args:
        questions: the run's `questions` table.
        beyond: the `questions` table of a run with more depths, for `settling`.
        baseline: that of a matched baseline, joined by record id.
        choices: lettered choices of a question; default: as many as the answers name.
        resamples: question resamples, and permutations.
        seed: of both.

    Returns:
        The result. With one depth there is its accuracy and a verdict that begins "not testable:".
    """
    found = Overthinking(beyond=None if beyond is None else settling(beyond, None, resamples, seed))
    if not len(questions):
        return replace(found, not_testable="the table questions of this run is empty")
    answers = answers_of(questions)
    if choices is not None:
        answers = answers._replace(choices=choices)
    if not len(answers.questions):
        return replace(found, not_testable="no question has a row at every depth")
    correct, first, last = answers.correct, answers.correct[:, 0], answers.correct[:, -1]

    resampling = resamples, seed
    found = replace(
        found,
        base=int(answers.depths[0]),
        deepest=int(answers.depths[-1]),
        by_depth=depth_table(answers, *resampling),
        accuracy=mean_of(first, None, *resampling),
        right=int(first.sum()),
        n_questions=len(correct),
        n_excluded=answers.n_excluded,
    )
    if len(answers.depths) < 2:
        one = (
            f"the run has one depth, {found.base}; accuracy there is {found.accuracy.text(percent=True)} of "
        )
        return replace(found, not_testable=one + questions_words(found.n_questions))
    broken, mended = int((first & ~last).sum()), int((last & ~first).sum())
    kind = np.select([first & last, first, last], ["right", "broken", "mended"], default="wrong")
    of_question = {"question": answers.questions, "id": answers.ids, "kind": kind}
    codes, best = answers.codes, oracle(answers, *resampling)
    found = replace(
        found,
        deep_accuracy=mean_of(last, None, *resampling),
        difference=mean_of(last * 1 - first, None, *resampling),
        broken=broken,
        mended=mended,
        broken_share=mean_of(~last, first, *resampling),
        p_value=float(mcnemar(broken, mended)),
        p_depths=depths_permutation(correct, *resampling),
        oracle=best.share,
        guessing=best.guessing,
        unrelated=best.unrelated,
        blind=best.blind,
        beyond_blind=best.beyond_blind,
        of_question=pd.DataFrame(of_question | {"right_at": correct.sum(axis=1)}),
    )
    if codes is not None:
        found = replace(found, changed=mean_of((codes != codes[:, :1]).any(axis=1), None, *resampling))
    if baseline is None or not len(baseline):
        return found
    theirs = answers_of(baseline[(baseline["depth"] == baseline["depth"].min()).to_numpy(dtype=bool)])
    by_id = pd.Series(theirs.correct[:, 0], index=theirs.ids).groupby(level=0).first().reindex(answers.ids)
    both = by_id.notna().to_numpy()
    other = by_id.to_numpy()[both].astype(float)
    return replace(
        found,
        baseline=mean_of(other, None, *resampling),
        over_baseline=mean_of(correct[both].any(axis=1) - other, None, *resampling),
        base_over_baseline=mean_of(first[both] - other, None, *resampling),
    )
