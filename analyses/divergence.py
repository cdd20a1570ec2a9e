"""Divergence: when two depths' texts part, how much of the `free` shifts is that, and can it be foretold?

In `free` each depth writes its own text. As soon as one token differs the two read different tokens, and
their states differ for that reason alone. This says where that happens, how undecided the output was there,
which share of the shifts lies after it, what is left of them when the same text is replayed, and whether the
state at that position (a `replayed` shift, which sees no later token) is one by which it could be told.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import numpy as np
import pandas as pd
import plotly.graph_objects as go

from sst_interp.analyses.basin_shifts import PAPER_THRESHOLD, UNKNOWN
from sst_interp.analyses.figures import outputs as output_figures
from sst_interp.analyses.overlap import deepest_pair, overlap_of, pair_words, select
from sst_interp.analyses.parts.parting import (
    parted_by,
    parting_positions,
    predictor_table,
    predictors_words,
    reading_table,
    shift_table,
    with_parting,
)
from sst_interp.analyses.parts.positions import at_positions, depth_pairs, position_overlaps, readings
from sst_interp.analyses.result import Result
from sst_interp.analyses.statistics import bootstrap as tallies
from sst_interp.analyses.statistics.bootstrap import (
    RESAMPLES,
    Interval,
    as_columns,
    grouped_medians,
    none_seen_bound,
    percent_text,
    questions_words,
)
from sst_interp.errors import SSTError


@dataclass(frozen=True, eq=False)
class Divergence(Result):
    """Where two depths' texts part, and what that has to do with shifts. All intervals resample questions."""

    a: int
    b: int
    """Depths of the headline: 1 and the deepest."""
    threshold: float
    """Overlap below which a pair counts as shifted."""
    kind: str
    """Which overlap."""
    parted: Interval = UNKNOWN
    """Share of questions whose texts part."""
    position: Interval = UNKNOWN
    """Median position of the first differing token, of those that part."""
    per_pair: pd.DataFrame = field(default_factory=pd.DataFrame)
    """A row per (a, b): questions, parted, position, after, explained, each of the last four with `_low` and
    `_high`."""
    where: pd.DataFrame = field(default_factory=pd.DataFrame)
    """A row per (a, b) and question: `position` of the first differing token (NaN: none), and `positions`,
    how many both texts have."""
    by_position: pd.DataFrame = field(default_factory=pd.DataFrame)
    """Columns position, parted (share of questions by then), parted_low, parted_high."""
    readings: pd.DataFrame = field(default_factory=pd.DataFrame)
    """A row per quantity: median where the texts part, at other positions up to there, and the difference.
    Margins in logits, entropies and KL in nats; `_a` is of depth a."""
    shifts: pd.DataFrame = field(default_factory=pd.DataFrame)
    """A row for before, at and after the parting: share of pairs, share of the shifts of `free`, shift rate
    in `free` and in `replayed` at the same positions (`parting.shift_table`)."""
    after: Interval = UNKNOWN
    """Share of the shifts of `free` that lie after the first differing token."""
    explained: Interval = UNKNOWN
    """Share of the shifts of `free` that are not there when the same text is replayed."""
    predictors: pd.DataFrame = field(default_factory=pd.DataFrame)
    """A row per score: AUC for the position where the texts part (`parting.predictor_table`)."""
    agreement: float = float("nan")
    """Largest difference between lowest overlaps of `replayed` and `free` up to there: 0 but for rounding."""
    n_questions: int = 0
    n_excluded: int = 0
    """Positions left out because an overlap or a value is missing or NaN."""
    no_replay: str | None = None
    """Why nothing is said of `replayed`; None if it is."""
    not_testable: str | None = None
    """Why there is no result; None if there is one."""

    @property
    def title(self) -> str:
        """What was compared."""
        return f"Divergence: {self.words}"

    @property
    def words(self) -> str:
        """The comparison and its pair, in words."""
        return "free" if self.not_testable else pair_words("free", self.a, self.b)

    @property
    def left(self) -> Interval:
        """Shifts on one replayed text as a share of those of `free`: 1 - explained."""
        e = self.explained
        return replace(e, estimate=1 - e.estimate, low=1 - e.high, high=1 - e.low)

    @property
    def table(self) -> pd.DataFrame:
        """A row per (a, b)."""
        return self.per_pair

    @property
    def verdict(self) -> str:
        """Where, how much it explains, and whether it can be foretold."""
        return f"not testable: {self.not_testable}." if self.not_testable else _verdict(self)

    def figure(self) -> go.Figure:
        """Share of questions whose texts have parted, by position."""
        return output_figures.parted(self)

    def figures(self) -> dict[str, go.Figure]:
        """Parted, shifts, predictors; each says so if there is nothing to show."""
        return {
            "parted": self.figure(),
            "shifts": output_figures.shifts_around(self),
            "predictors": output_figures.predictors(self),
        }


def _verdict(found: Divergence) -> str:
    n = questions_words(found.n_questions)
    if not found.parted.estimate:
        bound = percent_text(none_seen_bound(found.n_questions))
        return f"{found.words}: no two texts part in {n}; at most {bound} of such questions do (95%)."
    words = f"{found.words}: the texts part in {found.parted.text(percent=True)} of {n}, at position "
    words += f"{found.position.text()} (median of those)."
    margin = found.readings.set_index("quantity").to_dict("index")["margin_a"]
    if np.isfinite(margin["difference"]):
        words += f" The margin of depth {found.a} there is {margin['parting']:.3g} logits (median), at other"
        words += f" positions up to there {margin['other']:.3g}."
    of_pairs = found.shifts.set_index("when")["of_pairs"].to_dict()["after"]
    if not np.isfinite(found.after.estimate):
        words += f" No pair fell below {found.threshold:.4g}, so there are no shifts to explain."
    else:
        words += f" {found.after.text(percent=True)} of the shifts lie after it, as do "
        words += f"{percent_text(of_pairs)} of all pairs."
    if found.n_excluded:
        words += f" {found.n_excluded:,} positions with a missing overlap or value are left out."
    if found.no_replay:
        return f"{words} What is left on one text is not testable: {found.no_replay}."
    if np.isfinite(found.explained.estimate):
        words += f" Replaying the same text leaves {found.left.text(percent=True)} of the shifts."
    return words + predictors_words(found.predictors)


def divergence(
    outputs: pd.DataFrame,
    pairs: pd.DataFrame,
    steps: pd.DataFrame | None = None,
    threshold: float = PAPER_THRESHOLD,
    kind: str = "cosine",
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> Divergence:
    """Where the texts of two depths part in `free`, for every pair of depths; the deepest is the headline.

    Args:
        outputs: the run's `outputs` table.
        pairs: its `pairs` table, of `free` and `replayed`.
        steps: its `steps` table, for margins and entropies; without it they are NaN.
        threshold: overlap below which a (position, layer) pair has shifted. One for both comparisons, since
            their shifts are subtracted.
        kind: which overlap (`overlap_of`).
        resamples: question resamples, and permutations.
        seed: of both.

    Returns:
        The result; with no usable rows one whose verdict begins "not testable:".

    Raises:
        SSTError: if the chosen overlap is unknown or was not captured.
    """
    found = Divergence(1, 1, threshold, kind)
    for name, table in (("outputs", outputs), ("pairs", pairs)):
        if not len(table):
            return replace(found, not_testable=f"the table {name} of this run is empty")
    overlap_of(pairs.iloc[:0], kind)  # a wrong name is an error
    outputs = outputs[(outputs["comparison"] == "free").to_numpy(dtype=bool)]
    each = []
    try:
        deepest_pair(outputs, "free")
        for a, b in sorted(depth_pairs(outputs)):
            each.append(_pair(outputs, pairs, steps, replace(found, a=a, b=b), resamples, seed))
    except SSTError as error:
        return replace(found, not_testable=error.message)
    names = ("parted", "position", "after", "explained")
    records = [
        {"a": e.a, "b": e.b, "questions": e.n_questions} | as_columns(**{n: getattr(e, n) for n in names})
        for e in each
    ]
    where = pd.concat([one.where for one in each], ignore_index=True)
    return replace(each[-1], per_pair=pd.DataFrame(records), where=where)


def _pair(
    outputs: pd.DataFrame,
    pairs: pd.DataFrame,
    steps: pd.DataFrame | None,
    found: Divergence,
    *resampling: int,
) -> Divergence:
    a, b = found.a, found.b
    rows = select(outputs, "free", a, b)[0]
    known = ~rows[["same_prefix", "argmax_changed"]].isna().any(axis=1).to_numpy()
    rows = rows[known]
    if rows.empty:
        raise SSTError("every position of comparison 'free' has a NaN")
    parting = parting_positions(rows)
    parts = np.isfinite(parting["position"].to_numpy())
    question = parting["question"].to_numpy()
    same = with_parting(rows[rows["same_prefix"].to_numpy(dtype=bool)], parting)
    same = at_positions(same, readings(steps, "free", a, b))
    free = position_overlaps(pairs, "free", a, b, found.threshold, found.kind)
    n_excluded, no_replay = int((~known).sum()), None
    try:
        replayed = position_overlaps(pairs, "replayed", a, b, found.threshold, found.kind)
    except SSTError as error:
        no_replay, replayed = error.message, free[:0]
    theirs = {c: f"{c}_replayed" for c in ("shifted", "lowest", "last")}
    both = at_positions(free, replayed.drop(columns="layers").rename(columns=theirs))
    there = np.isfinite(both["lowest"].to_numpy())
    if no_replay is None:
        there &= np.isfinite(both["lowest_replayed"].to_numpy(dtype=float))
    both = with_parting(both[there], parting)
    shifts, after, explained = shift_table(both, *resampling)
    upto = both[both["when"].to_numpy() < 2]
    upto = at_positions(upto, same[["question", "position", "margin_a", "entropy_a"]])
    return replace(
        found,
        parted=tallies.share(question, parts, *resampling),
        position=grouped_medians(question, parting["position"].to_numpy(), [parts], (), *resampling)[0],
        where=parting.assign(a=a, b=b)[["a", "b", *parting.columns]],
        by_position=parted_by(parting, *resampling),
        readings=reading_table(same, *resampling),
        shifts=shifts,
        after=after,
        explained=explained,
        predictors=predictor_table(upto, *resampling),
        agreement=float((upto["lowest"] - upto["lowest_replayed"]).abs().max()),
        n_questions=len(parting),
        n_excluded=n_excluded + int((~there).sum()),
        no_replay=no_replay,
    )
