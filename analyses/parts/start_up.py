"""The start-up transient: is a shift at position 0 only the recurrence starting there?

With `prompt = "blend_off"` the prompt is read without the recurrence, so position 0 is the first position
that is blended at all, and a change between depths there is what a start looks like. The control is a run of
the same recipe with that one choice changed, question for question.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import pandas as pd

from sst_interp.analyses.parts.question_grid import (
    Grid,
    mean_over_questions,
    question_grid,
    same_questions,
    share_of_questions,
)
from sst_interp.analyses.statistics.bootstrap import RESAMPLES, Interval, questions_words, ratio
from sst_interp.errors import SSTError

UNKNOWN = Interval(math.nan, math.nan, math.nan, 0, reason="not testable")


class AtZero(NamedTuple):
    """Shifts of each question at position 0 and at later ones, all [question]; NaN without such pairs."""

    any_zero: np.ndarray
    """1 if some layer shifted at position 0, else 0."""
    any_later: np.ndarray
    """Share of the later positions at which some layer shifted."""
    layers_zero: np.ndarray
    """Share of the layers that shifted at position 0."""
    layers_later: np.ndarray
    """Share of the (later position, layer) pairs that shifted."""


def at_zero(grid: Grid, threshold: float) -> AtZero:
    """Position 0 against later positions, per question."""
    shifted, there = grid.shifted(threshold), grid.there
    found = []
    some = tuple(np.asarray(part.any(axis=-1)) for part in (shifted, there))
    for moved, known in (some, (shifted, there)):
        for where in (grid.positions == 0, grid.positions > 0):
            axes = tuple(range(1, moved.ndim))
            counts = [part[:, where].sum(axis=axes).astype(float) for part in (moved, known)]
            found.append(ratio(np.stack(counts, axis=-1)))
    return AtZero(*found)


@dataclass(frozen=True, eq=False)
class StartUp:
    """The same questions with the prompt read without the recurrence. All intervals resample questions."""

    n_questions: int
    """Questions that both runs have at position 0."""
    own: Interval = UNKNOWN
    """Share of these questions with a shift at position 0 in this run."""
    control: Interval = UNKNOWN
    """The same in the control, at the same threshold."""
    difference: Interval = UNKNOWN
    """control - own, question by question."""
    only_own: int = 0
    """Questions with a shift at position 0 in this run only."""
    only_control: int = 0
    """Questions with one in the control only."""
    own_layers: Interval = UNKNOWN
    """Share of the layers that shifted at position 0, mean over questions."""
    control_layers: Interval = UNKNOWN
    layers_difference: Interval = UNKNOWN
    """control - own."""
    later_difference: Interval = UNKNOWN
    """control - own of the same share at later positions: what the control changes everywhere."""
    excess: Interval = UNKNOWN
    """layers_difference - later_difference: what it changes at position 0 alone."""
    not_testable: str | None = None
    """Why there is no control; None if there is one."""

    def words(self) -> str:
        """What the control says, in a sentence."""
        if self.not_testable is not None:
            return f"The start-up control is not testable: {self.not_testable}."
        words = f"With the prompt read without the recurrence {self.control.text(percent=True)} of the same "
        words += f"{questions_words(self.n_questions)} shift there (here {self.own.text(percent=True)}), in "
        words += f"{self.control_layers.text(percent=True)} of the layers (here "
        words += f"{self.own_layers.text(percent=True)}): "
        gap = self.excess if self.excess.known else self.layers_difference
        if not gap.known:
            return words + "whether that differs was not tested."
        if gap.low <= 0 <= gap.high:
            return words + "no difference is seen that is particular to position 0."
        return words + f"starting there makes {'more' if gap.low > 0 else 'less'} of position 0 shift."


def start_up(
    grid: Grid,
    control: pd.DataFrame | None,
    comparison: str,
    threshold: float,
    ids: pd.DataFrame | None = None,
    control_ids: pd.DataFrame | None = None,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> StartUp:
    """The control beside this run: same comparison, pair of depths and threshold, positions that both have.

    Args:
        grid: of this run.
        control: the `pairs` table of the control run; None if there is none.
        comparison: of the grid.
        threshold: of shifts.
        ids: this run's `questions` table, to pair questions by record id; by index in the run if None.
        control_ids: of the control run.
        resamples: question resamples.
        seed: of the resampling.
    """
    if control is None:
        return StartUp(0, not_testable='no run with prompt = "blend_off" was given')
    try:
        other = question_grid(control, comparison, grid.a, grid.b, grid.kind)
    except SSTError as error:
        return StartUp(0, not_testable=f"in the control, {error.message}")
    mine, theirs = same_questions(grid, other, ids, control_ids)
    grid, other = grid.of_questions(mine), other.of_questions(theirs)
    # Positions that both have: further on more has shifted in `free`, and one run's texts may be longer.
    own, its = (at_zero(a.where_also(b), threshold) for a, b in ((grid, other), (other, grid)))
    both = np.isfinite(own.any_zero) & np.isfinite(its.any_zero)
    if not both.any():
        return StartUp(0, not_testable="the two runs have no question in common at position 0")
    own, its = AtZero(*(v[both] for v in own)), AtZero(*(v[both] for v in its))

    def mean(values: np.ndarray) -> Interval:
        return mean_over_questions(values, resamples, seed)

    return StartUp(
        n_questions=int(both.sum()),
        own=share_of_questions(own.any_zero, resamples, seed),
        control=share_of_questions(its.any_zero, resamples, seed),
        difference=mean(its.any_zero - own.any_zero),
        only_own=int((own.any_zero > its.any_zero).sum()),
        only_control=int((its.any_zero > own.any_zero).sum()),
        own_layers=mean(own.layers_zero),
        control_layers=mean(its.layers_zero),
        layers_difference=mean(its.layers_zero - own.layers_zero),
        later_difference=mean(its.layers_later - own.layers_later),
        excess=mean(its.layers_zero - own.layers_zero - its.layers_later + own.layers_later),
    )
