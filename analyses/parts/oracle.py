"""The best of the depths (claim C11): an oracle, and what it would be by chance.

An oracle needs the right answer to choose the depth, so it is no policy. It is never below the best depth,
and it rises with every further depth however random the answers are: four blind guesses at a question with
four choices contain the right one in 68% of cases. So it means nothing without controls.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np

from sst_interp.analyses.basin_shifts import UNKNOWN
from sst_interp.analyses.parts.answers import NO_ANSWER, Answers, mean_of
from sst_interp.analyses.statistics.bootstrap import RESAMPLES, Interval, cluster_bootstrap


class Oracle(NamedTuple):
    """Right at some depth, beside its controls."""

    share: Interval
    """Share of questions that are right at some depth."""
    guessing: float
    """The same for as many independent blind guesses as there are depths; NaN if answers are not lettered."""
    unrelated: Interval
    """... were the depths as accurate as they are, and unrelated: 1 - prod(1 - accuracy)."""
    blind: Interval
    """... had each new answer been a blind guess (`blind_oracle`)."""
    beyond_blind: Interval
    """share - blind: what depth finds beyond merely changing the answer."""


def oracle(found: Answers, resamples: int = RESAMPLES, seed: int = 0) -> Oracle:
    """The oracle over depths and its controls; intervals resample questions."""
    some, blind = np.asarray(found.correct.any(axis=1)), blind_oracle(found)

    def unrelated(totals: np.ndarray) -> np.ndarray:
        return 1 - np.prod(1 - totals[..., :-1] / totals[..., -1:], axis=-1)

    sums = np.column_stack([found.correct, np.ones(len(some))])
    depths = len(found.depths)
    return Oracle(
        share=mean_of(some, None, resamples, seed),
        guessing=1 - (1 - 1 / found.choices) ** depths if found.choices else math.nan,
        unrelated=cluster_bootstrap(sums, unrelated, resamples, seed=seed),
        blind=UNKNOWN if blind is None else mean_of(blind, None, resamples, seed),
        beyond_blind=UNKNOWN if blind is None else mean_of(some - blind, None, resamples, seed),
    )


def blind_oracle(found: Answers) -> np.ndarray | None:
    """Chance per question that some depth would be right had each *new* answer been a blind guess [question].

    The first depth keeps its answer. Every other answer that appears at a deeper depth is replaced by a
    random one of the remaining choices, as many different ones as there were: a question answered C, B, B, D
    gets two guesses out of three. What an oracle gains beyond this is not owed to merely changing the answer.

    Returns:
        None if answers are not lettered or not recorded.
    """
    if found.codes is None or found.choices is None:
        return None
    first = found.codes[:, :1]
    ordered = np.sort(np.where(found.codes == NO_ANSWER, first, found.codes), axis=1)
    different = 1 + (np.diff(ordered, axis=1) != 0).sum(axis=1)  # with the first, answered or not
    without = found.codes[:, 0] == NO_ANSWER
    guesses = different - 1
    left = np.where(without, found.choices, found.choices - 1)
    return np.where(found.correct[:, 0], 1.0, np.minimum(1.0, guesses / left))
