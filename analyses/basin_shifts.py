"""Basin shifts (claims C1 to C3, C8): where does extra iteration change the model's state, and how often?

A (position, layer) pair has *shifted* if its overlap between two iteration depths is below a threshold.
What a shift is depends on the comparison, so each gets its own result, its own threshold and its own
figures; nothing is pooled over comparisons, and the headline is one pair of depths, (1, deepest).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import numpy as np
import pandas as pd
import plotly.graph_objects as go

from sst_interp.analyses.figures import overlap as figures
from sst_interp.analyses.overlap import OverlapDistribution, overlap_distribution, overlap_of, pair_words
from sst_interp.analyses.parts.question_map import QuestionMap as QuestionMap
from sst_interp.analyses.parts.question_map import question_map as question_map
from sst_interp.analyses.parts.shift_words import shift_verdict
from sst_interp.analyses.result import Result
from sst_interp.analyses.statistics import bootstrap as tallies
from sst_interp.analyses.statistics.bootstrap import RESAMPLES, Interval
from sst_interp.choices import COMPARISONS, Choices, Comparison
from sst_interp.errors import SSTError, unknown_name

PAPER_THRESHOLD = 0.99
"""The paper's division between stable and shifted (arXiv 2605.00206)."""

UNKNOWN = Interval(math.nan, math.nan, math.nan, 0, reason="not testable")


@dataclass(frozen=True, eq=False)
class BasinShifts(Result):
    """How many pairs shifted in one comparison, where, and by how much. All intervals resample questions."""

    comparison: str
    kind: str
    """Which overlap."""
    a: int
    b: int
    """Depths or iterations of the headline: 1 and the deepest."""
    threshold: float
    """Overlap below which a pair counts as shifted."""
    provenance: str
    """Where the threshold comes from."""
    share: Interval
    """Shifted share of the (position, layer) pairs."""
    share_at_paper: Interval
    """The same at the paper's 0.99, whatever the threshold."""
    per_pair: pd.DataFrame
    """A row per (a, b): never pooled."""
    distribution: OverlapDistribution | None = None
    """Overlaps of the headline pair, with their modes; None if not testable."""
    by_position: pd.DataFrame = field(default_factory=pd.DataFrame)
    """Columns position, share, low, high, pairs, questions, questions_shifted (share of questions with a
    shift in any layer at this position: claim C8), band_low, band_high (for all positions at once)."""
    by_layer: pd.DataFrame = field(default_factory=pd.DataFrame)
    """Columns layer, share, low, high, pairs, questions, questions_shifted, band_low, band_high."""
    rates: pd.DataFrame = field(default_factory=pd.DataFrame)
    """Shift rate, positions down, layers across; NaN where there is no pair."""
    norm_ratio_shifted: Interval = UNKNOWN
    """Median of norm_b / norm_a over shifted pairs: a direction can turn without the size changing."""
    norm_ratio_stable: Interval = UNKNOWN
    same_prefix: Interval | None = None
    """`free` only: shifted share while both depths have read the same tokens ..."""
    other_prefix: Interval | None = None
    """... and from the first differing token on."""
    same_prefix_of_pairs: float = math.nan
    """`free` only: share of the pairs before the first differing token."""
    of_layer: float = math.nan
    """Share of the variance of "shifted" that the layer alone accounts for (eta squared)."""
    of_position: float = math.nan
    """The same for the position alone."""
    not_testable: str | None = None
    """Why there is no result; None if there is one."""

    @property
    def title(self) -> str:
        """What was compared."""
        return f"Basin shifts: {self.words}"

    @property
    def words(self) -> str:
        """The comparison and its pair, in words."""
        return self.comparison if self.not_testable else pair_words(self.comparison, self.a, self.b)

    @property
    def n_pairs(self) -> int:
        """(question, position, layer) pairs of the headline."""
        return self.distribution.n_pairs if self.distribution else 0

    @property
    def n_questions(self) -> int:
        """Questions of the headline."""
        return self.distribution.n_questions if self.distribution else 0

    @property
    def table(self) -> pd.DataFrame:
        """A row per (a, b)."""
        return self.per_pair

    @property
    def verdict(self) -> str:
        """What was found, with its sample size; a null result is stated as one."""
        if self.distribution is None:
            return f"not testable: {self.not_testable}."
        return shift_verdict(self, self.distribution)

    def figure(self) -> go.Figure:
        """The distribution of overlaps with the threshold."""
        return self.figures()["overlap"]

    def figures(self) -> dict[str, go.Figure]:
        """Overlap, by_position, by_layer, rates, norm_ratio; each says so if there is nothing to show."""
        return figures.basin_shift_figures(self)


def basin_shifts(
    pairs: pd.DataFrame,
    comparison: str,
    choices: Choices | None = None,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> BasinShifts:
    """Basin shifts of one comparison.

    Args:
        pairs: the run's `pairs` table.
        comparison: "replayed", "within" or "free".
        choices: which overlap, and the threshold; the defaults if None.
        resamples: question resamples.
        seed: of the resampling.

    Returns:
        The result; with no usable rows one whose verdict begins "not testable:".

    Raises:
        SSTError: if the comparison is unknown, or the chosen overlap was not captured.
    """
    choices = choices or Choices()
    if comparison not in COMPARISONS:
        raise unknown_name("comparison", comparison, COMPARISONS)
    rows = pairs[(pairs["comparison"] == comparison).to_numpy(dtype=bool)]
    overlaps = overlap_of(rows, choices.overlap)
    try:
        found = overlap_distribution(rows, comparison, choices.overlap, resamples=resamples, seed=seed)
    except SSTError as error:
        nothing = tallies.per_pair(rows, overlaps, math.nan, PAPER_THRESHOLD, resamples, seed)
        return BasinShifts(
            comparison, choices.overlap, 1, 1, math.nan, "none", UNKNOWN, UNKNOWN, nothing,
            not_testable=error.message,
        )  # fmt: skip
    threshold, provenance = threshold_of(found, choices)
    table = tallies.per_pair(rows, overlaps, threshold, PAPER_THRESHOLD, resamples, seed)
    there = np.isfinite(overlaps) & (rows["a"].to_numpy() == found.a) & (rows["b"].to_numpy() == found.b)
    rows, overlaps = rows[there], overlaps[there]
    shifted = overlaps < threshold
    question = rows["question"].to_numpy()
    layer, position = rows["layer"].to_numpy(), rows["position"].to_numpy()
    split: dict[str, Interval | float] = {}
    if comparison == "free":
        same = rows["same_prefix"].to_numpy(dtype=bool)
        split["same_prefix"] = tallies.share(question[same], shifted[same], resamples, seed)
        split["other_prefix"] = tallies.share(question[~same], shifted[~same], resamples, seed)
        split["same_prefix_of_pairs"] = float(same.mean())
    with np.errstate(divide="ignore", invalid="ignore"):
        norms = rows["norm_b"].to_numpy(dtype=float) / rows["norm_a"].to_numpy(dtype=float)
    return BasinShifts(
        comparison=comparison,
        kind=choices.overlap,
        a=found.a,
        b=found.b,
        threshold=threshold,
        provenance=provenance,
        share=tallies.share(question, shifted, resamples, seed),
        share_at_paper=tallies.share(question, overlaps < PAPER_THRESHOLD, resamples, seed),
        per_pair=table,
        distribution=found,
        by_position=tallies.by("position", position, question, shifted, resamples, seed),
        by_layer=tallies.by("layer", layer, question, shifted, resamples, seed),
        rates=tallies.rate_matrix(position, layer, shifted),
        norm_ratio_shifted=tallies.median_ratio(question[shifted], norms[shifted], resamples, seed),
        norm_ratio_stable=tallies.median_ratio(question[~shifted], norms[~shifted], resamples, seed),
        of_layer=tallies.eta_squared(layer, shifted),
        of_position=tallies.eta_squared(position, shifted),
        **split,  # type: ignore[arg-type]
    )


def threshold_of(distribution: OverlapDistribution, choices: Choices) -> tuple[float, str]:
    """The stable/shift threshold and where it comes from."""
    if choices.threshold != "antimode":
        return float(choices.threshold), "fixed by the user"
    antimode = distribution.modes.antimode
    if antimode is None:
        why = {"one": "the distribution has one mode", "not tested": "modes not tested"}
        return PAPER_THRESHOLD, f"the paper's {PAPER_THRESHOLD}: {why[distribution.modes.count]}"
    return antimode.estimate, "antimode of this run"


def all_comparisons(
    pairs: pd.DataFrame,
    choices: Choices | None = None,
    resamples: int = RESAMPLES,
    seed: int = 0,
    each: Callable[[Iterable[Comparison]], Iterable[Comparison]] = iter,
) -> dict[str, BasinShifts]:
    """One result per comparison, the one the choices lead with first. Never pooled. `each` wraps the loop
    over comparisons (a progress bar).
    """
    choices = choices or Choices()
    order = sorted(COMPARISONS, key=lambda c: c != choices.comparison)
    return {c: basin_shifts(pairs, c, choices, resamples, seed) for c in each(order)}
