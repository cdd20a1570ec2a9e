"""Position 0 (claim C8, and C9 in part): does every question shift at its first generated token?

Three things make "every question shifts there" mean less than it says, and each is measured:

- later positions may shift as often, and with many layers some layer nearly always shifts;
- overlaps differ by layer in much the same way everywhere, so any two questions' profiles correlate:
  `ProfileSimilarity` takes each question's usual profile off;
- with `prompt = "blend_off"` position 0 is the first position that is blended at all: `StartUp` compares with
  a run of the same recipe with that one choice changed, question for question.

Up to position 0 every comparison reads the same text, so all are judged at one threshold: the user's, or the
paper's.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import pandas as pd
import plotly.graph_objects as go

from sst_interp.analyses.contrast import (
    PAPER_THRESHOLD,
    Contrast,
    Grid,
    Threshold,
    same_questions,
)
from sst_interp.analyses.plots import Line, lines
from sst_interp.analyses.result import Shifts, analysis
from sst_interp.analyses.statistics.along_texts import likeness, over_questions, pair_mean
from sst_interp.analyses.statistics.bootstrap import (
    Interval,
    Resampling,
    by,
    mean_over_questions,
    nothing,
    percent_text,
    points_text,
    questions_words,
    ratio,
    share_of_questions,
)
from sst_interp.errors import SSTError, Untestable

ENDS = ("", "_low", "_high")
NO_CONTROL = nothing("no control")


@dataclass(frozen=True, eq=False)
class ProfileSimilarity:
    """Mean rank correlations over layers between different questions at one position, by log(1 - overlap)."""

    zero: Interval
    """Of the profiles at position 0."""
    later: Interval
    """Of the profiles at the same later position."""
    own_zero: Interval
    """As `zero`, with each question's mean profile over its later positions taken off."""
    own_later: Interval
    """As `later`, with the same taken off."""
    difference: Interval
    """own_zero - own_later: above 0, position 0 has a pattern of its own that questions share."""


@dataclass(frozen=True, eq=False)
class StartUp:
    """The same questions with the prompt read without the recurrence. All intervals resample questions."""

    n_questions: int
    """Questions that both runs have at position 0."""
    own: Interval = NO_CONTROL
    """Share of these questions with a shift at position 0 in this run."""
    control: Interval = NO_CONTROL
    """The same in the control, at the same threshold."""
    difference: Interval = NO_CONTROL
    """control - own, question by question."""
    only_own: int = 0
    """Questions with a shift at position 0 in this run only."""
    only_control: int = 0
    """Questions with one in the control only."""
    own_layers: Interval = NO_CONTROL
    """Share of the layers that shifted at position 0, mean over questions."""
    control_layers: Interval = NO_CONTROL
    layers_difference: Interval = NO_CONTROL
    """control - own."""
    later_difference: Interval = NO_CONTROL
    """control - own of the same share at later positions: what the control changes everywhere."""
    excess: Interval = NO_CONTROL
    """layers_difference - later_difference: what it changes at position 0 alone."""
    not_testable: str | None = None
    """Why there is no control; None if there is one."""

    def words(self) -> str:
        """What the control says, in a sentence."""
        if self.not_testable is not None:
            return f"The start-up control is not testable: {self.not_testable}."
        words = "With the prompt read without the recurrence, position 0 shifts in "
        words += f"{percent_text(self.control_layers.estimate)} of the layers (here "
        words += f"{percent_text(self.own_layers.estimate)}; {questions_words(self.n_questions)}): "
        gap = self.excess if self.excess.known else self.layers_difference
        if not gap.known:
            return words + "whether that differs was not tested."
        if gap.low <= 0 <= gap.high:
            return words + "no difference is seen that is particular to position 0."
        return words + f"starting there makes {'more' if gap.low > 0 else 'less'} of position 0 shift."


@dataclass(frozen=True, eq=False)
class PositionZero(Shifts):
    """Position 0 against later positions, in one comparison. All intervals resample questions."""

    named = "Position 0"
    shown = "per_pair"
    provenance: str
    """Where the threshold comes from."""
    n_shifted: int
    """Of these, questions with a shift there in some layer (claim C8)."""
    questions: Interval
    """n_shifted / n_questions; where that is 0 or 1, the other end is the exact one-sided bound."""
    later: Interval
    """Share of the later positions with a shift in some layer, mean over questions."""
    difference: Interval
    """questions - later, question by question."""
    layers: Interval
    """Share of the layers that shift at position 0, mean over questions."""
    later_layers: Interval
    """The same at later positions."""
    layers_difference: Interval
    """Their difference, question by question."""
    further: Interval
    """Chance that position 0 moved further (mean over layers of log(1 - overlap)) than a later position of
    its question: 0.5 if it is like any other."""
    alike: ProfileSimilarity
    """How alike questions are over layers, at position 0 and later."""
    by_position: pd.DataFrame
    """Columns position, questions, share (of questions with a shift in some layer), low, high, layers (share
    of the layers), layers_low, layers_high."""
    by_layer: pd.DataFrame
    """Columns layer, zero, zero_low, zero_high (shift rate at position 0), later, later_low, later_high."""
    per_pair: pd.DataFrame
    """A row per (a, b): never pooled."""
    control: StartUp
    """The start-up control."""

    @property
    def verdict(self) -> str:
        """How many questions shift at position 0, whether that is special, and the control."""
        n = questions_words(self.n_questions)
        who = {self.n_questions: "Every question shifts", 0: "No question shifts"}.get(
            self.n_shifted, f"{self.n_shifted} of {n} shift"
        )
        gap, words = self.layers_difference, self.words.capitalize()
        if not math.isfinite(gap.estimate):
            special, said = "", "there are no later positions to compare it with"
        else:
            special = ", as at later positions"
            if not gap.known:
                special = ", not told from later"
            elif gap.low > 0 or gap.high < 0:
                special = f", {'more' if gap.low > 0 else 'fewer'} layers than later"
            said = f"{self.later.text(percent=True)} of later positions do. Position 0 shifts "
            said += f"{percent_text(self.layers.estimate)} of its layers, later ones "
            said += f"{percent_text(self.later_layers.estimate)} (difference {points_text(gap)})"
        counted = f"{self.n_shifted} of {n} ({self.questions.text(percent=True)}) shift at position 0 in "
        counted += f"some layer (overlap below {self.threshold:.4g}, {self.provenance})"
        return f"{who} at position 0{special}. {words}: {counted}; {said}. {self.control.words()}"

    def figure(self) -> go.Figure:
        """Questions and layers that shift, by position, and the control at 0."""
        t = self.by_position
        series = [
            Line("questions with a shift in some layer", t["position"], t["share"], t["low"], t["high"]),
            Line("layers that shift", t["position"], *(t[f"layers{end}"] for end in ENDS)),
        ]
        if self.control.not_testable is None:
            both = {"questions": self.control.control, "layers": self.control.control_layers}
            series += [
                Line(f"{name}, control at 0", [0], [i.estimate], [i.low], [i.high])
                for name, i in both.items()
            ]
        x, y = "generated position (0 emits the first token)", "share of questions, share of layers"
        return lines("Position 0 and later", self.subtitle, x, y, series, percent=True)

    def figures(self) -> dict[str, go.Figure]:
        """by_position, and layers: which layers shift at position 0 and later."""
        t, pairs = self.by_layer, (("position 0", "zero"), ("later positions", "later"))
        series = [Line(name, t["layer"], *(t[f"{c}{end}"] for end in ENDS)) for name, c in pairs]
        title, axis = "Layers at position 0 and later", "layer (0-based)"
        layers = lines(title, self.subtitle, axis, "shifted share of pairs", series, percent=True)
        return {"by_position": self.figure(), "layers": layers}


@analysis("Position 0", "Is a shift at the first position more than a start-up?", claims=("C8",), order=30)
def position_zero(c: Contrast) -> PositionZero:
    """Shifts at position 0. The run that stands beside it as `blend_off` is the start-up control.

    Raises:
        Untestable: if no pair at position 0 has an overlap.
    """
    grid, how = c.grid, c.resampling
    level, provenance = threshold_at_zero(c)
    if not grid.there[:, grid.positions == 0].any():
        raise Untestable(f"comparison {c.comparison!r} has no pairs at position 0")
    own = at_zero(grid, level)
    return PositionZero(
        **{**c.judged, "threshold": level},
        provenance=provenance,
        n_questions=int(np.isfinite(own.any_zero).sum()),
        n_shifted=int(np.nansum(own.any_zero)),
        questions=share_of_questions(own.any_zero, *how),
        later=mean_over_questions(own.any_later, *how),
        difference=mean_over_questions(own.any_zero - own.any_later, *how),
        layers=mean_over_questions(own.layers_zero, *how),
        later_layers=mean_over_questions(own.layers_later, *how),
        layers_difference=mean_over_questions(own.layers_zero - own.layers_later, *how),
        further=mean_over_questions(_further(grid), *how),
        alike=alike(grid, *how),
        by_position=_by_position(grid, level, how),
        by_layer=_by_layer(grid, level, how),
        per_pair=_per_pair(c, level),
        control=start_up(c, level),
    )


def threshold_at_zero(c: Contrast) -> Threshold:
    """One threshold for every comparison: what is given or fixed, else the paper's."""
    if c.fixed is None and c.choices.threshold == "antimode":
        return Threshold(PAPER_THRESHOLD, f"the paper's {PAPER_THRESHOLD}, in every comparison")
    return c.division


class AtZero(NamedTuple):
    """Shifts of each question, all [question]; NaN without such pairs."""

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
    shares = []
    some = tuple(np.asarray(part.any(axis=-1)) for part in (shifted, there))
    for moved, known in (some, (shifted, there)):
        for where in (grid.positions == 0, grid.positions > 0):
            axes = tuple(range(1, moved.ndim))
            counts = [part[:, where].sum(axis=axes).astype(float) for part in (moved, known)]
            shares.append(ratio(np.stack(counts, axis=-1)))
    return AtZero(*shares)


def as_any_position(grid: Grid, threshold: float, resamples: int, seed: int) -> float:
    """Two-sided p of the layers at position 0, were 0 any position of its question (one is drawn from each).

    Where nearly every layer shifts, one question more or less decides the mean, and no t interval covers.
    """
    share = grid.shifted_share(threshold)[:, np.argsort(grid.positions != 0, kind="stable")]  # 0 comes first
    there = np.isfinite(share)
    used = there[:, 0] & (there.sum(axis=1) > 1)
    share, there = share[used], there[used]
    if not len(share):
        return math.nan
    n, total = there.sum(axis=1), np.where(there, share, 0).sum(axis=1)
    gap = np.where(there, share - (total[:, None] - share) / (n - 1)[:, None], 0)
    packed = np.take_along_axis(gap, np.argsort(~there, axis=1, kind="stable"), axis=1)
    at = (np.random.default_rng(seed).random((resamples, len(n))) * n).astype(int)
    drawn = packed[np.arange(len(n)), at].sum(axis=1)
    own = gap[:, 0].sum()
    beyond = min((drawn >= own - 1e-9).sum(), (drawn <= own + 1e-9).sum())
    return float(min(1.0, 2 * (1 + beyond) / (1 + resamples)))


def start_up(c: Contrast, threshold: float) -> StartUp:
    """The control beside this run: same comparison, pair of depths and threshold, positions that both have.

    Questions are paired by the dataset's record ids, and by their index where a run has no `questions`.
    """
    other = c.of_companion("blend_off")
    if other is None:
        return StartUp(0, not_testable='no run with prompt = "blend_off" was given')
    try:
        theirs = other.at(c.a, c.b).grid
    except SSTError as error:
        return StartUp(0, not_testable=f"in the control, {error.message}")
    own_rows, its_rows = same_questions(
        c.grid, theirs, c.tables.get("questions"), other.tables.get("questions")
    )
    mine, theirs = c.grid.of_questions(own_rows), theirs.of_questions(its_rows)
    # Positions that both have: later ones shift more in free-running, and one run's texts may be longer.
    own, its = (at_zero(a.where_also(b), threshold) for a, b in ((mine, theirs), (theirs, mine)))
    both = np.isfinite(own.any_zero) & np.isfinite(its.any_zero)
    if not both.any():
        return StartUp(0, not_testable="the two runs have no question in common at position 0")
    own, its, how = AtZero(*(v[both] for v in own)), AtZero(*(v[both] for v in its)), c.resampling
    return StartUp(
        n_questions=int(both.sum()),
        own=share_of_questions(own.any_zero, *how),
        control=share_of_questions(its.any_zero, *how),
        difference=mean_over_questions(its.any_zero - own.any_zero, *how),
        only_own=int((own.any_zero > its.any_zero).sum()),
        only_control=int((its.any_zero > own.any_zero).sum()),
        own_layers=mean_over_questions(own.layers_zero, *how),
        control_layers=mean_over_questions(its.layers_zero, *how),
        layers_difference=mean_over_questions(its.layers_zero - own.layers_zero, *how),
        later_difference=mean_over_questions(its.layers_later - own.layers_later, *how),
        excess=mean_over_questions(
            its.layers_zero - own.layers_zero - its.layers_later + own.layers_later, *how
        ),
    )


def alike(grid: Grid, resamples: int, seed: int) -> ProfileSimilarity:
    """How alike questions are at position 0 and at later positions; intervals resample questions."""
    v, zero, later = grid.distance(), grid.positions == 0, grid.positions > 0
    there = np.isfinite(v[:, later])
    counts = there.sum(axis=1)
    usual = np.where(there, v[:, later], 0).sum(axis=1) / np.where(counts, counts, np.nan)
    parts = [likeness(v[:, where]) for where in (zero, later)]
    v -= usual[:, None]
    parts += [likeness(v[:, where]) for where in (zero, later)]

    def one(i: int) -> Interval:
        return over_questions(len(v), lambda w: pair_mean(w, *parts[i]), resamples, seed)

    def difference(weights: np.ndarray) -> np.ndarray:
        return pair_mean(weights, *parts[2]) - pair_mean(weights, *parts[3])

    return ProfileSimilarity(
        *map(one, range(4)), difference=over_questions(len(v), difference, resamples, seed)
    )


def _further(grid: Grid) -> np.ndarray:
    """Per question, the share of later positions that moved less than position 0; ties count as half."""
    moved = grid.mean_distance()
    zero, later = moved[:, grid.positions == 0], moved[:, grid.positions > 0]
    less = (zero > later) + 0.5 * (zero == later)
    known = np.isfinite(zero) & np.isfinite(later)
    return ratio(np.stack([(less * known).sum(axis=1), known.sum(axis=1)], axis=-1).astype(float))


def _by_position(grid: Grid, threshold: float, how: Resampling) -> pd.DataFrame:
    """Questions with a shift in some layer, and share of layers, by position."""
    shifted, there = grid.shifted(threshold), grid.there
    some, moved = (np.asarray(part.any(axis=-1)) for part in (there, shifted))
    q, p = np.nonzero(some)
    table = by("position", grid.positions[p], q, moved[some], *how)
    q, p, _ = np.nonzero(there)
    layers = by("position", grid.positions[p], q, shifted[there], *how)
    return table[["position", "questions", "share", "low", "high"]].assign(
        layers=layers["share"], layers_low=layers["low"], layers_high=layers["high"]
    )


def _by_layer(grid: Grid, threshold: float, how: Resampling) -> pd.DataFrame:
    """Shift rate of every layer at position 0 and at later positions."""
    shifted, there = grid.shifted(threshold), grid.there
    table = pd.DataFrame({"layer": grid.layers})
    for name, where in (("zero", grid.positions == 0), ("later", grid.positions > 0)):
        q, _, layer = np.nonzero(there[:, where])
        moved = shifted[:, where][there[:, where]]
        rates = by("layer", grid.layers[layer], q, moved, *how)
        columns = {"share": name, "low": f"{name}_low", "high": f"{name}_high"}
        table = table.merge(rates[["layer", *columns]].rename(columns=columns), on="layer", how="left")
    return table


def _per_pair(c: Contrast, threshold: float) -> pd.DataFrame:
    """A row per (a, b): C8, its counterpart at later positions, and their paired difference."""
    names = ("questions shifted", "later", "layers", "later layers", "layers difference")
    records = []
    for a, b in c.pairs_there:
        try:
            own = at_zero(c.at(a, b).grid, threshold)
        except Untestable:  # this pair has no overlap
            continue
        means = (own.any_later, own.layers_zero, own.layers_later, own.layers_zero - own.layers_later)
        intervals = [mean_over_questions(values, *c.resampling) for values in means]
        intervals = [share_of_questions(own.any_zero, *c.resampling), *intervals]
        ends = [v for i in intervals for v in (i.estimate, i.low, i.high)]
        records.append((a, b, intervals[0].n_questions, *ends))
    columns = [f"{name}{end}" for name in names for end in ("", " low", " high")]
    return pd.DataFrame(records, columns=["a", "b", "questions", *columns])
