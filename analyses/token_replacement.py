"""Token replacement (claims C4, C5): does the output move where the state does?

At every position: how many of the 100 most likely tokens are replaced from one depth to another, from which
rank the new most likely token came, how far apart the two distributions are, and how sharp each is. A
position counts as shifted if any of its layers shifted; beside it stands the last layer alone. The output is
a function of the last layer's state, so *that* it moves there with the state is true by construction; how
much, and whether a shift further down reaches the output, is not.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace

import numpy as np
import pandas as pd
import plotly.graph_objects as go

from sst_interp.analyses.basin_shifts import PAPER_THRESHOLD, UNKNOWN
from sst_interp.analyses.figures import outputs as output_figures
from sst_interp.analyses.overlap import deepest_pair, overlap_of, pair_words
from sst_interp.analyses.parts.lens_replacement import lens_replacement
from sst_interp.analyses.parts.output_change import (
    NONE,
    PAPER_RANK,
    SAME,
    SOME,
    group_table,
    output_changes,
    per_pair_table,
    position_groups,
    rank_table,
)
from sst_interp.analyses.parts.positions import at_positions, readings
from sst_interp.analyses.result import Result
from sst_interp.analyses.statistics import bootstrap as tallies
from sst_interp.analyses.statistics.bootstrap import (
    RESAMPLES,
    Interval,
    grouped_medians,
    none_seen_bound,
    percent_text,
    questions_words,
)
from sst_interp.choices import COMPARISONS
from sst_interp.errors import SSTError, unknown_name
from sst_interp.measures import TOP

HEADLINES = ("shifted", "stable", "last_shifted", "last_stable", "difference", "last_difference")


@dataclass(frozen=True, eq=False)
class TokenReplacement(Result):
    """What happens to the output at shifts and at stable positions, in one comparison and one pair of depths.

    Medians are over positions; all intervals resample questions.
    """

    comparison: str
    a: int
    b: int
    """Depths or iterations of the headline: 1 and the deepest."""
    threshold: float
    """Overlap below which a pair counts as shifted."""
    kind: str
    """Which overlap."""
    groups: pd.DataFrame = field(default_factory=pd.DataFrame)
    """A row per group of positions (`where`): positions, questions, share with a new winner (`new_winner`),
    medians of `output_change.MEASURED` (tokens of 100, nats, 0-based rank), each with `_low` and `_high`."""
    per_pair: pd.DataFrame = field(default_factory=pd.DataFrame)
    """A row per (a, b): medians of tokens replaced where some layer shifted, where none did, and their
    difference; share of positions with a shift, and with a new winner. Never pooled."""
    shifted: Interval = UNKNOWN
    """Median of tokens replaced, of 100, at positions where some layer shifted ..."""
    stable: Interval = UNKNOWN
    """... where none did ..."""
    difference: Interval = UNKNOWN
    """... and the difference."""
    last_shifted: Interval = UNKNOWN
    """The same by the last layer alone."""
    last_stable: Interval = UNKNOWN
    last_difference: Interval = UNKNOWN
    ranks: pd.DataFrame = field(default_factory=pd.DataFrame)
    """Columns rank (0-based, in a, of b's most likely token; lower end of a bin), to, shifted, stable:
    positions."""
    n_winners: int = 0
    """Positions with a new winner."""
    deepest_rank: int | None = None
    """The deepest rank a new winner came from. A maximum grows with the number of positions, so it has no
    interval; `beyond` has one."""
    beyond: Interval = UNKNOWN
    """Share of the new winners that came from beyond the paper's rank."""
    by_layer: pd.DataFrame = field(default_factory=pd.DataFrame)
    """Tokens replaced in the logit lens by layer (`lens_replacement`); empty if not testable."""
    no_layers: str | None = None
    """Why there is no `by_layer`."""
    histogram: pd.DataFrame = field(default_factory=pd.DataFrame)
    """Columns replaced (0 to 100), shifted, stable: positions."""
    n_positions: int = 0
    n_questions: int = 0
    n_excluded: int = 0
    """Positions left out because an overlap or a value is missing or NaN."""
    not_testable: str | None = None
    """Why there is no result; None if there is one."""

    @property
    def title(self) -> str:
        """What was compared."""
        return f"Token replacement: {self.words}"

    @property
    def words(self) -> str:
        """The comparison and its pair, in words."""
        return self.comparison if self.not_testable else pair_words(self.comparison, self.a, self.b)

    @property
    def table(self) -> pd.DataFrame:
        """A row per group of positions."""
        return self.groups

    @property
    def verdict(self) -> str:
        """Shifted against stable, where the winners came from, and the sample size."""
        return f"not testable: {self.not_testable}." if self.not_testable else _verdict(self)

    def figure(self) -> go.Figure:
        """How many positions replace how many tokens, shifted and stable."""
        return output_figures.replaced(self)

    def figures(self) -> dict[str, go.Figure]:
        """Replaced, ranks, by_layer; each says so if there is nothing to show."""
        layers = output_figures.replaced_by_layer(self)
        return {"replaced": self.figure(), "ranks": output_figures.ranks(self), "by_layer": layers}


def _verdict(found: TokenReplacement) -> str:
    n = f"{found.n_positions:,} positions of {questions_words(found.n_questions)}"
    words = f"{found.words}: "
    if math.isfinite(found.difference.estimate):
        words += f"of the top 100 tokens {found.shifted.text()} (median) are replaced where a layer shifted, "
        words += f"{found.stable.text()} where none did, a difference of {found.difference.text()}, in {n}"
        if found.difference.known and found.difference.low <= 0 <= found.difference.high:
            words += "; no difference is shown"
    else:
        some = math.isfinite(found.shifted.estimate)
        words += f"{'every' if some else 'no'} position of {n} has a layer below {found.threshold:.4g}, so "
        words += (
            f"shifted against stable is not testable: {(found.shifted if some else found.stable).text()} "
        )
        words += "of the top 100 tokens (median) are replaced"
    words += ". "
    if math.isfinite(found.last_difference.estimate):
        words += f"By the last layer alone: {found.last_shifted.text()} against {found.last_stable.text()}. "
    if not found.n_winners:
        bound = percent_text(none_seen_bound(found.n_questions))
        words += (
            f"The most likely token never changes; at most {bound} of such questions have a change (95%)."
        )
    else:
        words += f"{found.n_winners:,} new winners come from as deep as rank {found.deepest_rank} (0-based), "
        bound = percent_text(none_seen_bound(found.beyond.n_questions))
        none = (
            f"none of them from beyond rank {PAPER_RANK} (at most {bound} of such questions have one, 95%)."
        )
        some = f"{found.beyond.text(percent=True)} of them from beyond rank {PAPER_RANK}."
        words += some if found.beyond.estimate else none
    words += _same_tokens(found)
    if found.n_excluded:
        words += f" {found.n_excluded:,} positions with a missing overlap or value are left out."
    return words


def _same_tokens(found: TokenReplacement) -> str:
    """In `free`: how much of it is left while both depths have read the same tokens."""
    if found.comparison != "free":
        return ""
    rows = found.groups.set_index("where").to_dict("index")
    some, none = rows[f"{SOME}, {SAME}"], rows[f"{NONE}, {SAME}"]
    shown = [f"{row['replaced']:.3g}" if row["positions"] else "none" for row in (some, none)]
    words = f" Only while both have read the same tokens: {shown[0]} against {shown[1]} replaced"
    deepest = np.nanmax([float(some["deepest_rank"]), float(none["deepest_rank"]), 0.0])
    return words + (f", new winners from as deep as rank {deepest:.0f}." if deepest else ", no new winner.")


def token_replacement(
    outputs: pd.DataFrame,
    pairs: pd.DataFrame,
    comparison: str,
    steps: pd.DataFrame | None = None,
    threshold: float = PAPER_THRESHOLD,
    kind: str = "cosine",
    resamples: int = RESAMPLES,
    seed: int = 0,
    lens: pd.DataFrame | None = None,
) -> TokenReplacement:
    """Token replacement at shifts and at stable positions of one comparison.

    Args:
        outputs: the run's `outputs` table.
        pairs: its `pairs` table, which says where the state shifted.
        comparison: "replayed", "within" or "free".
        steps: its `steps` table, for the entropies; without it they are NaN.
        threshold: overlap below which a (position, layer) pair has shifted (`BasinShifts.threshold`).
        kind: which overlap (`overlap_of`).
        resamples: question resamples.
        seed: of the resampling.
        lens: the `pairs` table with `lens_jaccard`, for the layers; `pairs` if None.

    Returns:
        The result; with no usable rows one whose verdict begins "not testable:".

    Raises:
        SSTError: if the comparison is unknown, or the chosen overlap was not captured.
    """
    if comparison not in COMPARISONS:
        raise unknown_name("comparison", comparison, COMPARISONS)
    found = TokenReplacement(comparison, 1, 1, threshold, kind)
    for name, table in (("outputs", outputs), ("pairs", pairs)):
        if not len(table):
            return replace(found, not_testable=f"the table {name} of this run is empty")
    overlap_of(pairs.iloc[:0], kind)  # a wrong name is an error
    try:
        a, b = deepest_pair(outputs, comparison)
        rows, n_excluded = output_changes(outputs, pairs, comparison, a, b, threshold, kind)
    except SSTError as error:
        return replace(found, not_testable=error.message)
    if rows.empty:
        return replace(found, not_testable=f"every position of comparison {comparison!r} has a NaN")
    rows = at_positions(rows, readings(steps, comparison, a, b))
    question, replaced = rows["question"].to_numpy(), rows["replaced"].to_numpy(dtype=float)
    groups = position_groups(rows, comparison, threshold)
    contrasts = [(0, 1), (2, 3)]
    first = list(groups.values())[:4]
    medians = grouped_medians(question, replaced, first, contrasts, resamples, seed)
    changed = rows["argmax_changed"].to_numpy(dtype=bool)
    rank = rows["winner_rank"].to_numpy()[changed]
    by_layer, no_layers = pd.DataFrame(), None
    try:
        read = pairs if lens is None else lens
        by_layer = lens_replacement(read, comparison, a, b, threshold, kind, resamples, seed)
    except SSTError as error:
        no_layers = error.message
    counts = [np.bincount(replaced[mask].astype(int), minlength=TOP + 1) for mask in first[:2]]
    return replace(
        found,
        a=a,
        b=b,
        groups=group_table(rows, groups, resamples, seed),
        per_pair=per_pair_table(outputs, pairs, comparison, threshold, kind, resamples, seed),
        **dict(zip(HEADLINES, medians, strict=True)),
        ranks=rank_table(rank, first[0][changed]),
        n_winners=int(changed.sum()),
        deepest_rank=int(rank.max()) if len(rank) else None,
        beyond=tallies.share(question[changed], rank > PAPER_RANK, resamples, seed),
        by_layer=by_layer,
        no_layers=no_layers,
        histogram=pd.DataFrame({"replaced": range(TOP + 1), "shifted": counts[0], "stable": counts[1]}),
        n_positions=len(rows),
        n_questions=rows["question"].nunique(),
        n_excluded=n_excluded,
    )
