"""One mode or two, within layers and within pairs of iterations as well as pooled (claim C2).

A pool of distributions that each have one mode, at different places, has several: if layers sit at different
overlaps, "two modes" of all pairs together say only that layers differ. So the count of modes (`modes`), the
mixture fits (`mixture`) and the dip test (`dip`) are made three times:

- *pooled*: all layers and all pairs of depths or iterations of one comparison. Shown for what pooling does;
  no finding rests on it.
- *pair*: all layers of one pair (a, b), as in `overlap`.
- *layer*: one layer of the deepest pair (of every pair, if asked). Layers are counted at a false discovery
  rate of 5% over the layers of the pair: Holm's rule would ask too much of thirty layers that go together.

`between_layers` is how much of the spread lies between layers: a share near 1 is a pool of places.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial

import numpy as np
import pandas as pd
import plotly.graph_objects as go

from sst_interp.analyses.figures import shifts as shift_figures
from sst_interp.analyses.overlap import RESOLUTION, deepest_pair, overlap_of, pair_words
from sst_interp.analyses.parts.scopes import COLUMNS, between_layers, collect, measure
from sst_interp.analyses.parts.shift_words import mode_counts, mode_fits
from sst_interp.analyses.result import Result
from sst_interp.analyses.statistics.bootstrap import LEVEL, RESAMPLES, Interval, questions_words, share
from sst_interp.analyses.statistics.modes import BINS
from sst_interp.choices import COMPARISONS
from sst_interp.errors import SSTError, unknown_name


@dataclass(frozen=True, eq=False)
class Bimodality(Result):
    """Modes of the overlaps of one comparison: pooled, by pair, and by layer of the headline pair."""

    comparison: str
    kind: str
    """Which overlap."""
    a: int
    b: int
    """The headline pair: 1 and the deepest."""
    n_questions: int
    n_pairs: int
    """(question, position, layer) pairs of the headline."""
    scopes: pd.DataFrame
    """A row per distribution. scope (pooled, pair, layer), a, b, layer (NaN where pooled over), pairs,
    questions; modes (one, two, not tested), antimode, depth of the valley with low and high, missing (share
    of the pairs that would fill it), p, p_layers (Benjamini and Hochberg's, over the layers of the pair);
    identical (share of bit-identical pairs), at_one (share that cannot be told from overlap 1); components
    besides it (0: not tested) and their gain with low and high, centre_1, centre_2, weight_2, fit_depth,
    components_angle (of the cosine, layers
    pooled); dip, dip_p, dip_p_questions."""
    between_layers: Interval | None = None
    """Share of the variance of log(1 - overlap + r) that lies between layers, in the headline pair."""
    identical: Interval | None = None
    """Share of bit-identical pairs (relative L2 of 0), in the headline pair."""
    dip_reason: str | None = None
    """Why no dip test was made; None if one was."""
    layers: np.ndarray = field(default_factory=lambda: np.zeros(0, dtype=int))
    """Layers of the headline pair."""
    histograms: np.ndarray = field(default_factory=lambda: np.zeros((0, BINS)))
    """Pairs of each of these layers per bin of `modes.grid`, [layer, BINS]."""
    resolution: float = 1e-3
    not_testable: str | None = None
    """Why there is no result; None if there is one."""

    @property
    def words(self) -> str:
        """The comparison and its pair, in words."""
        return self.comparison if self.not_testable else pair_words(self.comparison, self.a, self.b)

    @property
    def title(self) -> str:
        """What was compared."""
        return f"Modes within layers: {self.words}"

    @property
    def table(self) -> pd.DataFrame:
        """A row per distribution."""
        return self.scopes

    @property
    def by_layer(self) -> pd.DataFrame:
        """The rows of the headline pair's layers."""
        return self.headline("layer")

    @property
    def pooled_two(self) -> bool | None:
        """Whether the headline pair has two modes over all its layers; None if not tested."""
        modes = self.headline("pair")["modes"].tolist()
        return None if modes in ([], ["not tested"]) else modes == ["two"]

    @property
    def layers_tested(self) -> int:
        """Layers of the headline pair in which modes were tested."""
        return int((self.by_layer["modes"] != "not tested").sum())

    @property
    def layers_two(self) -> int:
        """Layers with two modes, at a false discovery rate of 5% over the layers."""
        rows = self.by_layer
        return int(((rows["modes"] == "two") & (rows["p_layers"] < 1 - LEVEL)).sum())

    @property
    def made_by_pooling(self) -> bool:
        """Whether the two modes of the headline pair are in none of its layers, not even unadjusted."""
        return (
            bool(self.pooled_two) and self.layers_tested > 0 and not (self.by_layer["modes"] == "two").any()
        )

    @property
    def verdict(self) -> str:
        """Modes pooled and within layers, with the sample size."""
        if self.not_testable:
            return f"not testable: {self.not_testable}."
        n = f"{self.n_pairs:,} pairs from {questions_words(self.n_questions)}"
        if self.pooled_two is None:
            return f"{self.words}: not testable: too few questions to test for two modes ({n})."
        return f"{self.words}: {mode_counts(self)} {mode_fits(self)} ({n})."

    def figure(self) -> go.Figure:
        """How overlaps are spread in every layer."""
        return self.figures()["by_layer"]

    def figures(self) -> dict[str, go.Figure]:
        """by_layer, depth."""
        return shift_figures.bimodality_figures(self)

    def to_dict(self) -> dict[str, object]:
        """As `Result.to_dict`, without the histograms; with the counts the verdict rests on."""
        out = super().to_dict()
        del out["histograms"]
        counts = {"layers_tested": self.layers_tested, "layers_two": self.layers_two}
        return out | {"pooled_two": self.pooled_two, **counts}

    def headline(self, scope: str) -> pd.DataFrame:
        """The rows of the headline pair: of its layers ("layer"), or of all of them together ("pair")."""
        rows = self.scopes
        return rows[(rows["scope"] == scope) & (rows["a"] == self.a) & (rows["b"] == self.b)]


def bimodality(
    pairs: pd.DataFrame,
    comparison: str,
    kind: str = "cosine",
    every_pair: bool = False,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> Bimodality:
    """Count the modes of one comparison, pooled, by pair and by layer.

    Args:
        pairs: the run's `pairs` table.
        comparison: "replayed", "within" or "free".
        kind: which overlap (`overlap_of`).
        every_pair: layers of every pair, not only of the deepest.
        resamples: question resamples.
        seed: of the resampling.

    Returns:
        The result; with no usable rows one whose verdict begins "not testable:".

    Raises:
        SSTError: if the comparison is unknown, or the overlap was not captured.
    """
    if comparison not in COMPARISONS:
        raise unknown_name("comparison", comparison, COMPARISONS)
    nothing = partial(Bimodality, comparison, kind, 1, 1, 0, 0, pd.DataFrame(columns=COLUMNS))
    rows = pairs[(pairs["comparison"] == comparison).to_numpy(dtype=bool)]
    overlap = overlap_of(rows, kind)
    there = np.isfinite(overlap)
    if len(rows) and not there.any():
        return nothing(not_testable=f"all {len(rows):,} overlaps of comparison {comparison!r} are NaN")
    rows, overlap = rows[there], overlap[there]
    try:
        headline = deepest_pair(rows, comparison)
    except SSTError as error:
        return nothing(not_testable=error.message)
    resolution = RESOLUTION[kind]
    scopes = collect(rows, overlap, resolution, headline, every_pair)
    table, dip_reason = measure(scopes, resolution, kind == "cosine", resamples, seed)
    here = ((rows["a"] == headline[0]) & (rows["b"] == headline[1])).to_numpy(dtype=bool)
    same = rows["relative_l2"].to_numpy()[here] == 0
    question = rows["question"].to_numpy()[here]
    layers = [s for s in scopes if s.name == "layer" and (s.a, s.b) == headline]
    return Bimodality(
        comparison=comparison,
        kind=kind,
        a=headline[0],
        b=headline[1],
        n_questions=len(pd.unique(question)),
        n_pairs=len(question),
        scopes=table,
        between_layers=between_layers(scopes, headline, resolution, resamples, seed),
        identical=share(question, same, resamples, seed),
        dip_reason=dip_reason,
        layers=np.array([s.layer for s in layers]),
        histograms=np.stack([s.histograms.sum(axis=0) for s in layers]),
        resolution=resolution,
    )
