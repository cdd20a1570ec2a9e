"""Overlap: how like itself a hidden state is at another iteration depth, and how those numbers spread.

One comparison and one pair (a, b) at a time: `replayed`, `within` and `free` answer different questions,
and pooling them, or pooling depths, makes modes that are in none of them. The count of modes and the
antimode are in `sst_interp.analyses.statistics.modes`.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import pandas as pd
import plotly.graph_objects as go

from sst_interp.analyses.figures import overlap as figures
from sst_interp.analyses.result import Result
from sst_interp.analyses.statistics.bootstrap import RESAMPLES, Interval, percent_text, questions_words, share
from sst_interp.analyses.statistics.modes import Modes, find_modes, grid, question_histograms
from sst_interp.choices import COMPARISONS
from sst_interp.errors import SSTError, unknown_name

RESOLUTION = {"cosine": 1e-3, "relative_l2": 1e-2, "lens_jaccard": 0.1}
"""Differences of overlap that count as none when modes are counted. Cosine: well above bf16 rounding
through 30 to 60 layers, well below the paper's 0.01. A relative L2 of 0.01 to 0.04 is the same angle.
Jaccard of two top-100 sets moves in steps of about 0.02, which must not be counted as modes."""

QUANTILES = (0.0, 0.001, 0.01, 0.05, 0.1, 0.25, 0.5, 0.75, 0.9, 1.0)


def overlap_of(pairs: pd.DataFrame, kind: str = "cosine") -> np.ndarray:
    """Overlap of every row, float64 [pair]; 1 is the same state.

    Args:
        pairs: rows of the `pairs` table.
        kind: "cosine": cosine similarity, in [-1, 1]. "relative_l2": 1 - |b - a| / |a|, at most 1 and
            without a lower bound. "lens_jaccard": Jaccard index of the logit-lens top-100 sets, in [0, 1].

    Raises:
        SSTError: if `kind` is unknown, or was not captured.
    """
    if kind not in RESOLUTION:
        raise unknown_name("overlap", kind, RESOLUTION)
    if kind not in pairs.columns or (kind == "lens_jaccard" and len(pairs) and pairs[kind].isna().all()):
        raise SSTError(
            f"this run did not record {kind}", f'capture it with overlap = "{kind}", or choose "cosine"'
        )
    values = pairs[kind].to_numpy(dtype=float)
    return 1 - values if kind == "relative_l2" else values


def deepest_pair(pairs: pd.DataFrame, comparison: str) -> tuple[int, int]:
    """The pair (1, largest b) of one comparison.

    Raises:
        SSTError: if the comparison is unknown or has no rows with a = 1.
    """
    if comparison not in COMPARISONS:
        raise unknown_name("comparison", comparison, COMPARISONS)
    rows = (pairs["comparison"] == comparison).to_numpy(dtype=bool) & (pairs["a"] == 1).to_numpy(dtype=bool)
    if not rows.any():
        raise SSTError(f"no pairs of comparison {comparison!r} in this run", "capture at least two depths")
    return 1, int(pairs["b"].to_numpy()[rows].max())


def select(
    pairs: pd.DataFrame, comparison: str, a: int | None = None, b: int | None = None
) -> tuple[pd.DataFrame, int, int]:
    """The rows of one comparison and one pair (default: the deepest), and that pair.

    Raises:
        SSTError: if there are none.
    """
    if a is None or b is None:
        a, b = deepest_pair(pairs, comparison)
    elif comparison not in COMPARISONS:
        raise unknown_name("comparison", comparison, COMPARISONS)
    keep = (pairs["comparison"] == comparison).to_numpy(dtype=bool)
    keep = keep & (pairs["a"].to_numpy() == a) & (pairs["b"].to_numpy() == b)
    if not keep.any():
        raise SSTError(
            f"no pairs of comparison {comparison!r} between {a} and {b}", "see the table for what there is"
        )
    return pairs[keep], a, b


def pair_words(comparison: str, a: int, b: int) -> str:
    """`replayed, depth 1 against depth 4`: what a figure or a sentence says was compared."""
    if comparison == "within":
        return f"within one pass, iteration {a} against iteration {b}"
    how = "replayed, on the same text" if comparison == "replayed" else "free, each depth on its own text"
    return f"{how}, depth {a} against depth {b}"


@dataclass(frozen=True, eq=False)
class OverlapDistribution(Result):
    """How the overlaps of one comparison and one pair are spread over all positions and layers."""

    comparison: str
    kind: str
    a: int
    b: int
    n_pairs: int
    """(question, position, layer) pairs with an overlap."""
    n_questions: int
    n_excluded: int
    """Pairs left out because their overlap is NaN."""
    identical: float
    """Share of pairs that are bit-identical (relative L2 of 0)."""
    quantiles: pd.DataFrame
    """Columns `quantile`, `overlap`; over pairs."""
    histograms: np.ndarray
    """Pairs per question and bin, [question, BINS]."""
    edges: np.ndarray
    """Bin edges in v = log(1 - overlap + resolution), [BINS + 1]."""
    resolution: float
    modes: Modes
    identical_share: Interval | None = None
    """`identical` with its interval."""

    @cached_property
    def sensitivity(self) -> pd.DataFrame:
        """The number of modes in another coordinate and at other bandwidths (`modes.sensitivity`)."""
        return sensitivity(self.histograms, self.resolution)

    @property
    def title(self) -> str:
        """What was compared."""
        return f"Overlap: {pair_words(self.comparison, self.a, self.b)}"

    @property
    def table(self) -> pd.DataFrame:
        """Quantiles of overlap over pairs."""
        return self.quantiles

    @property
    def verdict(self) -> str:
        """Modes, median and minimum, with the sample size."""
        low, middle = (float(self.quantiles.set_index("quantile")["overlap"][q]) for q in (0.0, 0.5))
        left_out = f" ({self.n_excluded:,} without an overlap left out)" if self.n_excluded else ""
        words = f"{pair_words(self.comparison, self.a, self.b)}: {self.n_pairs:,} pairs{left_out} from "
        words += f"{questions_words(self.n_questions)} have median overlap {middle:.4g}, lowest {low:.3g}, "
        words += f"{percent_text(self.identical)} bit-identical; "
        if self.modes.antimode is None:
            return words + self.modes.reason + "."
        at = " and ".join(f"{m:.3g}" for m in self.modes.at)
        return words + f"{self.modes.reason}, at {at}, divided at {self.modes.antimode.text()}."

    def figure(self) -> go.Figure:
        """The histogram, on an axis that resolves both ends."""
        return figures.overlap_histogram(self)

    def to_dict(self) -> dict[str, object]:
        """As `Result.to_dict`; the histogram summed over questions."""
        out = super().to_dict()
        out["histograms"] = self.histograms.sum(axis=0).tolist()
        return out


def overlap_distribution(
    pairs: pd.DataFrame,
    comparison: str,
    kind: str = "cosine",
    a: int | None = None,
    b: int | None = None,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> OverlapDistribution:
    """The distribution of overlaps of one comparison and one pair, its modes and its antimode.

    Args:
        pairs: the run's `pairs` table.
        comparison: "replayed", "within" or "free".
        kind: which overlap (`overlap_of`).
        a: depth or iteration of the first state; default: the pair (1, deepest).
        b: of the second.
        resamples: question resamples.
        seed: of the resampling.

    Raises:
        SSTError: if there are no such rows, or none has an overlap.
    """
    rows, a, b = select(pairs, comparison, a, b)
    values = overlap_of(rows, kind)
    there = np.isfinite(values)
    if not there.any():
        raise SSTError(f"all {len(rows):,} overlaps of comparison {comparison!r} are NaN")
    values = values[there]
    question = rows["question"].to_numpy()[there]
    codes, questions = pd.factorize(question, sort=True)
    identical = share(question, rows["relative_l2"].to_numpy()[there] == 0, resamples, seed)
    resolution = RESOLUTION[kind]
    histograms = question_histograms(codes, values, resolution)
    return OverlapDistribution(
        comparison=comparison,
        kind=kind,
        a=a,
        b=b,
        n_pairs=len(values),
        n_questions=len(questions),
        n_excluded=int(np.count_nonzero(~there)),
        identical=identical.estimate,
        quantiles=pd.DataFrame({"quantile": QUANTILES, "overlap": np.quantile(values, QUANTILES)}),
        histograms=histograms,
        edges=grid(resolution),
        resolution=resolution,
        modes=find_modes(histograms, resolution, resamples=resamples, seed=seed),
        identical_share=identical,
    )
