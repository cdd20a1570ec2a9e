"""Position 0 (claim C8, and C9 in part): does every question shift at its first generated token?

Three things make "every question shifts there" mean less than it says, and each is measured beside it: later
positions may shift as often; with many layers some layer nearly always shifts; and where the prompt was read
without the recurrence, position 0 is where the recurrence starts (the start-up transient).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace

import numpy as np
import pandas as pd
import plotly.graph_objects as go

from sst_interp.analyses.figures import controls as control_figures
from sst_interp.analyses.overlap import overlap_of, pair_words
from sst_interp.analyses.parts.alike import Alike, alike
from sst_interp.analyses.parts.question_grid import (
    Grid,
    mean_over_questions,
    question_grid,
    share_of_questions,
    shift_threshold,
)
from sst_interp.analyses.parts.start_up import StartUp, at_zero, start_up
from sst_interp.analyses.result import Result
from sst_interp.analyses.statistics import bootstrap as tallies
from sst_interp.analyses.statistics.bootstrap import RESAMPLES, Interval, questions_words, ratio
from sst_interp.choices import COMPARISONS, Choices
from sst_interp.errors import SSTError, unknown_name

UNKNOWN = Interval(math.nan, math.nan, math.nan, 0, reason="not testable")


@dataclass(frozen=True, eq=False)
class PositionZero(Result):
    """Position 0 against later positions, in one comparison. All intervals resample questions."""

    comparison: str
    kind: str
    """Which overlap."""
    a: int = 1
    b: int = 1
    threshold: float = math.nan
    """Overlap below which a pair counts as shifted."""
    provenance: str = "none"
    """Where the threshold comes from."""
    n_questions: int = 0
    """Questions with a position 0."""
    n_shifted: int = 0
    """Of these, questions with a shift there in some layer (claim C8)."""
    questions: Interval = UNKNOWN
    """n_shifted / n_questions; where that is 0 or 1, the other end is the exact one-sided bound."""
    later: Interval = UNKNOWN
    """Share of the later positions with a shift in some layer, mean over questions."""
    difference: Interval = UNKNOWN
    """Position 0 less later positions of the same question, in `questions` and `later`."""
    layers: Interval = UNKNOWN
    """Share of the layers that shift at position 0, mean over questions."""
    later_layers: Interval = UNKNOWN
    """The same at later positions."""
    layers_difference: Interval = UNKNOWN
    """Their difference, question by question."""
    further: Interval = UNKNOWN
    """Chance that position 0 moved further than a later position of its question (mean over layers of
    log(1 - overlap), no threshold): 0.5 if it is a position like any other."""
    alike: Alike = field(default_factory=Alike)
    """How alike questions are over layers, at position 0 and later."""
    by_position: pd.DataFrame = field(default_factory=pd.DataFrame)
    """Columns position, questions, share (of questions with a shift in some layer), low, high, layers (share
    of the layers), layers_low, layers_high."""
    by_layer: pd.DataFrame = field(default_factory=pd.DataFrame)
    """Columns layer, zero, zero_low, zero_high (shift rate at position 0), later, later_low, later_high."""
    per_pair: pd.DataFrame = field(default_factory=pd.DataFrame)
    """A row per (a, b): never pooled."""
    control: StartUp | None = None
    """The start-up control."""
    not_testable: str | None = None
    """Why there is no result; None if there is one."""

    @property
    def title(self) -> str:
        """What was compared."""
        return f"Position 0: {self.words}"

    @property
    def words(self) -> str:
        """The comparison and its pair, in words."""
        return self.comparison if self.not_testable else pair_words(self.comparison, self.a, self.b)

    @property
    def table(self) -> pd.DataFrame:
        """A row per (a, b)."""
        return self.per_pair

    @property
    def verdict(self) -> str:
        """How many questions shift at position 0, whether that is special, and the control."""
        if self.not_testable is not None:
            return f"not testable: {self.not_testable}."
        return _verdict(self)

    def figure(self) -> go.Figure:
        """Questions with a shift, by position."""
        return self.figures()["by_position"]

    def figures(self) -> dict[str, go.Figure]:
        """by_position, and layers: which layers shift at position 0 and later."""
        return control_figures.position_zero(self)


def _verdict(found: PositionZero) -> str:
    words = f"{found.words}: {found.n_shifted} of {questions_words(found.n_questions)} "
    words += f"({found.questions.text(percent=True)}) shift at position 0 in some layer (overlap below "
    words += f"{found.threshold:.4g}, {found.provenance}), {found.layers.text(percent=True)} of the layers. "
    if math.isfinite(found.difference.estimate):
        words += f"At later positions {found.later.text(percent=True)} do, and "
        words += f"{found.later_layers.text(percent=True)} of the layers: position 0 "
        gap = found.layers_difference
        if not gap.known:
            words += "cannot be told from them with one question. "
        elif gap.low <= 0 <= gap.high:
            words += "does not stand out. "
        else:
            side = "more"
            if gap.high < 0:
                side, gap = "fewer", replace(gap, estimate=-gap.estimate, low=-gap.high, high=-gap.low)
            words += f"shifts {side} of its layers (difference of the shares {gap.text(percent=True)}). "
    else:
        words += "There are no later positions to compare it with. "
    zero, later = found.alike.own_zero, found.alike.own_later
    if math.isfinite(found.alike.difference.estimate):
        words += f"What sets it apart over layers correlates by {zero.text()} between questions, at a later "
        words += f"position by {later.text()}. "
    return words + (found.control or StartUp(0, not_testable="no control")).words()


def position_zero(
    pairs: pd.DataFrame,
    comparison: str,
    choices: Choices | None = None,
    threshold: float | None = None,
    control: pd.DataFrame | None = None,
    questions: pd.DataFrame | None = None,
    control_questions: pd.DataFrame | None = None,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> PositionZero:
    """Shifts at position 0 in one comparison, at the pair (1, deepest).

    Args:
        pairs: the run's `pairs` table.
        comparison: "replayed", "within" or "free".
        choices: which overlap, and the threshold; the defaults if None.
        threshold: overlap below which a pair has shifted; None: the one `basin_shifts` would use.
        control: the `pairs` table of a run of the same recipe with prompt = "blend_off".
        questions: the run's `questions` table and ...
        control_questions: ... the control's, to pair by record id; questions are paired by index without.
        resamples: question resamples.
        seed: of the resampling.

    Returns:
        The result; with no usable rows one whose verdict begins "not testable:".

    Raises:
        SSTError: if the comparison is unknown, or the chosen overlap was not captured.
    """
    choices = choices or Choices()
    kind = choices.overlap
    if comparison not in COMPARISONS:
        raise unknown_name("comparison", comparison, COMPARISONS)
    overlap_of(pairs.iloc[:0], kind)
    try:
        grid = question_grid(pairs, comparison, kind=kind)
        level, provenance = shift_threshold(pairs, comparison, choices, threshold, resamples, seed)
    except SSTError as error:
        return PositionZero(comparison, kind, not_testable=error.message)
    if not grid.there[:, grid.positions == 0].any():
        reason = f"comparison {comparison!r} has no pairs at position 0"
        return PositionZero(comparison, kind, grid.a, grid.b, level, provenance, not_testable=reason)
    own = at_zero(grid, level)

    def mean(values: np.ndarray) -> Interval:
        return mean_over_questions(values, resamples, seed)

    return PositionZero(
        comparison,
        kind,
        grid.a,
        grid.b,
        level,
        provenance,
        n_questions=int(np.isfinite(own.any_zero).sum()),
        n_shifted=int(np.nansum(own.any_zero)),
        questions=share_of_questions(own.any_zero, resamples, seed),
        later=mean(own.any_later),
        difference=mean(own.any_zero - own.any_later),
        layers=mean(own.layers_zero),
        later_layers=mean(own.layers_later),
        layers_difference=mean(own.layers_zero - own.layers_later),
        further=mean(_further(grid)),
        alike=alike(grid, resamples, seed),
        by_position=_by_position(grid, level, resamples, seed),
        by_layer=_by_layer(grid, level, resamples, seed),
        per_pair=_per_pair(pairs, comparison, kind, level, resamples, seed),
        control=start_up(grid, control, comparison, level, questions, control_questions, resamples, seed),
    )


def _further(grid: Grid) -> np.ndarray:
    """Per question, the share of later positions that moved less than position 0; ties count as half."""
    moved = grid.mean_distance()
    zero, later = moved[:, grid.positions == 0], moved[:, grid.positions > 0]
    less = (zero > later) + 0.5 * (zero == later)
    known = np.isfinite(zero) & np.isfinite(later)
    return ratio(np.stack([(less * known).sum(axis=1), known.sum(axis=1)], axis=-1).astype(float))


def _by_position(grid: Grid, threshold: float, resamples: int, seed: int) -> pd.DataFrame:
    """Questions with a shift in some layer, and share of layers, by position."""
    shifted, there = grid.shifted(threshold), grid.there
    some, moved = (np.asarray(part.any(axis=-1)) for part in (there, shifted))
    q, p = np.nonzero(some)
    table = tallies.by("position", grid.positions[p], q, moved[some], resamples, seed)
    q, p, _ = np.nonzero(there)
    layers = tallies.by("position", grid.positions[p], q, shifted[there], resamples, seed)
    return table[["position", "questions", "share", "low", "high"]].assign(
        layers=layers["share"], layers_low=layers["low"], layers_high=layers["high"]
    )


def _by_layer(grid: Grid, threshold: float, resamples: int, seed: int) -> pd.DataFrame:
    """Shift rate of every layer at position 0 and at later positions."""
    shifted, there = grid.shifted(threshold), grid.there
    table = pd.DataFrame({"layer": grid.layers})
    for name, where in (("zero", grid.positions == 0), ("later", grid.positions > 0)):
        q, _, layer = np.nonzero(there[:, where])
        moved = shifted[:, where][there[:, where]]
        rates = tallies.by("layer", grid.layers[layer], q, moved, resamples, seed)
        columns = {"share": name, "low": f"{name}_low", "high": f"{name}_high"}
        table = table.merge(rates[["layer", *columns]].rename(columns=columns), on="layer", how="left")
    return table


def _per_pair(
    pairs: pd.DataFrame, comparison: str, kind: str, threshold: float, resamples: int, seed: int
) -> pd.DataFrame:
    """A row per (a, b): C8, its counterpart at later positions, and their paired difference."""
    rows = pairs[(pairs["comparison"] == comparison).to_numpy(dtype=bool)]
    names = ("questions shifted", "later", "layers", "later layers", "layers difference")
    records = []
    for a, b in sorted(set(zip(rows["a"].tolist(), rows["b"].tolist(), strict=True))):
        try:
            own = at_zero(question_grid(rows, comparison, a, b, kind), threshold)
        except SSTError:  # this pair has no overlap
            continue
        intervals = [share_of_questions(own.any_zero, resamples, seed)]
        for values in (own.any_later, own.layers_zero, own.layers_later, own.layers_zero - own.layers_later):
            intervals.append(mean_over_questions(values, resamples, seed))
        ends = [v for i in intervals for v in (i.estimate, i.low, i.high)]
        records.append((a, b, intervals[0].n_questions, *ends))
    columns = [f"{name}{end}" for name in names for end in ("", " low", " high")]
    return pd.DataFrame(records, columns=["a", "b", "questions", *columns])
