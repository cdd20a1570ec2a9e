"""One mode or two, within layers and within pairs of iterations as well as pooled (claim C2).

A pool of distributions that each have one mode, at different places, has several. So the count of modes and
the dip test (`statistics.modes`) are made three times:

- *pooled*: all layers and all pairs of depths. It shows what pooling does; no claim rests on it.
- *pair*: all layers of one pair (a, b), as in `overlap_distribution`.
- *layer*: one layer of the deepest pair. Layers are counted at a false discovery rate of 5%.

`between_layers` is the share of the spread that lies between layers: near 1 it is a pool of places.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import plotly.graph_objects as go

from sst_interp.analyses.contrast import PAPER_THRESHOLD, RESOLUTION, Contrast
from sst_interp.analyses.plots import BLUE, GREEN, ORANGE, VERMILLION, Line, canvas, lines
from sst_interp.analyses.result import Compared, analysis
from sst_interp.analyses.statistics.bootstrap import (
    LEVEL,
    Interval,
    Resampling,
    cluster_bootstrap,
    nothing,
    percent_text,
    questions_words,
    ratio,
    share,
)
from sst_interp.analyses.statistics.modes import (
    BINS,
    Modes,
    dip_test,
    find_modes,
    grid,
    question_histograms,
    to_overlap,
    to_v,
    untested,
)
from sst_interp.analyses.statistics.permutation import benjamini_hochberg

QUANTILES = (0.0, 0.001, 0.01, 0.05, 0.1, 0.25, 0.5, 0.75, 0.9, 1.0)
TICKS = (1, 0.999, 0.99, 0.9, 0.5, 0, -1)
"""Overlaps that get a tick on the axis in log(1 - overlap + resolution)."""
MERGED = 4
"""Bins of the count of modes that make one bin of a figure."""


@dataclass(frozen=True, eq=False)
class OverlapDistribution(Compared):
    """How the overlaps of one comparison and one pair are spread over all positions and layers."""

    named = "Overlap"
    shown = "quantiles"
    kind: str
    """Which overlap."""
    n_pairs: int
    """(question, position, layer) pairs with an overlap."""
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
    identical_share: Interval
    """`identical` with its interval."""

    @property
    def left_out(self) -> str:
        """A sentence about pairs without an overlap; empty if there are none."""
        return f" {self.n_excluded:,} pairs without an overlap are left out." if self.n_excluded else ""

    @property
    def verdict(self) -> str:
        """Modes, median and minimum, with the sample size."""
        low, middle = (float(self.quantiles.set_index("quantile")["overlap"][q]) for q in (0.0, 0.5))
        answer = self.modes.reason
        if self.modes.antimode is not None:
            at = " and ".join(f"{m:.3g}" for m in self.modes.at)
            answer = f"{answer}, at {at}, divided at {self.modes.antimode.text()}"
        words = f"{answer[0].upper()}{answer[1:]}. {self.words.capitalize()}: the median overlap is "
        words += f"{middle:.4g}, the lowest {low:.3g}; {percent_text(self.identical)} of {self.n_pairs:,} "
        return f"{words}pairs from {questions_words(self.n_questions)} are bit-identical.{self.left_out}"

    def figure(self, threshold: float | None = None) -> go.Figure:
        """Share of pairs by overlap: log counts, on an axis logarithmic in 1 - overlap, 1 on the right.

        Shows the antimode with its interval, `threshold` where it is another, and the paper's 0.99.
        """
        counts = self.histograms.sum(axis=0).reshape(-1, MERGED).sum(axis=1)
        edges = self.edges[::MERGED]
        left, right = (to_overlap(e, self.resolution) for e in (edges[1:], edges[:-1]))
        figure = canvas(
            "Distribution of overlaps",
            f"{self.subtitle}, {self.n_pairs:,} pairs",
            _axis(self.kind),
            "share of pairs per bin (log scale)",
        )
        figure.add_bar(
            x=-(edges[1:] + edges[:-1]) / 2, y=np.where(counts > 0, counts / counts.sum(), np.nan),
            width=np.diff(edges), marker={"color": BLUE, "line": {"width": 0}}, showlegend=False,
            customdata=np.stack([left, right, counts], axis=1),
            hovertemplate="overlap %{customdata[0]:.5f} to %{customdata[1]:.5f}<br>%{y:.3%} of pairs "
            "(%{customdata[2]:,})<extra></extra>",
        )  # fmt: skip
        lowest, highest = 0.6 / counts.sum(), 1.5 * counts.max() / counts.sum()

        def at(overlap: float) -> float:
            return -float(to_v(np.array(overlap), self.resolution))

        def line(overlap: float, name: str, colour: str, dash: str) -> None:
            figure.add_scatter(
                x=[at(overlap)] * 2, y=[lowest, highest], mode="lines", name=name, hoverinfo="skip",
                line={"color": colour, "dash": dash, "width": 2},
            )  # fmt: skip

        antimode = self.modes.antimode
        if antimode is not None:
            figure.add_vrect(
                x0=at(antimode.low), x1=at(antimode.high), fillcolor=VERMILLION, opacity=0.2, line_width=0
            )
            line(antimode.estimate, f"antimode {antimode.text()}", VERMILLION, "solid")
        named = (PAPER_THRESHOLD, antimode.estimate if antimode else None)
        if threshold is not None and threshold not in named:
            line(threshold, f"threshold {threshold:.4g}", GREEN, "solid")
        line(PAPER_THRESHOLD, f"the paper's {PAPER_THRESHOLD}", ORANGE, "dash")
        used = np.flatnonzero(counts)
        span = [min(-edges[used[-1] + 1], at(0.95)), -edges[0]]
        pad = 0.02 * (span[1] - span[0])
        _ticks(figure, self.resolution, [span[0] - pad, span[1] + pad])
        figure.update_yaxes(type="log", range=np.log10([lowest, highest]), exponentformat="power", dtick=1)
        return figure

    def to_dict(self) -> dict[str, object]:
        """As `Result.to_dict`; the histogram summed over questions."""
        return super().to_dict() | {"histograms": self.histograms.sum(axis=0).tolist()}


def _axis(kind: str) -> str:
    return f"overlap, {kind.replace('_', ' ')}<br>(axis logarithmic in 1 - overlap)"


def _ticks(figure: go.Figure, resolution: float, span: list[float]) -> None:
    """Overlaps at the ticks of an axis in -log(1 - overlap + resolution)."""
    figure.update_xaxes(
        tickvals=-to_v(np.array(TICKS), resolution),
        ticktext=[f"{tick:g}" for tick in TICKS],
        tickangle=0,
        range=span,
    )


def overlap_distribution(c: Contrast) -> OverlapDistribution:
    """The distribution of overlaps of one comparison and one pair, its modes and its antimode.

    Raises:
        Untestable: if there are no such rows, or none has an overlap.
    """
    overlap, rows = c.overlap[c.there], c.rows[c.there]
    question = rows["question"].to_numpy()
    identical = share(question, rows["relative_l2"].to_numpy() == 0, *c.resampling)
    return OverlapDistribution(
        **c.compared,
        kind=c.kind,
        n_pairs=len(overlap),
        n_questions=len(c.histograms),
        n_excluded=int(np.count_nonzero(~c.there)),
        identical=identical.estimate,
        quantiles=pd.DataFrame({"quantile": QUANTILES, "overlap": np.quantile(overlap, QUANTILES)}),
        histograms=c.histograms,
        edges=grid(RESOLUTION[c.kind]),
        resolution=RESOLUTION[c.kind],
        modes=c.modes,
        identical_share=identical,
    )


@dataclass(frozen=True, eq=False)
class Bimodality(Compared):
    """Modes of the overlaps of one comparison: pooled, by pair, and by layer of the headline pair."""

    named = "Modes within layers"
    shown = "scopes"
    kind: str
    """Which overlap."""
    n_pairs: int
    """(question, position, layer) pairs of the headline."""
    scopes: pd.DataFrame
    """A row per distribution: scope (pooled, pair, layer), a, b, layer (NaN where pooled over), pairs,
    questions; modes (one, two, not tested), antimode, depth with low and high, missing, p, p_layers
    (Benjamini and Hochberg's, over the layers of the pair); identical (share of bit-identical pairs), at_one
    (share in the bin of overlap 1); dip, dip_p, dip_p_questions."""
    between_layers: Interval
    """Share of the variance of log(1 - overlap + r) that lies between layers, in the headline pair."""
    identical: Interval
    """Share of bit-identical pairs (relative L2 of 0), in the headline pair."""
    dip_reason: str | None
    """Why no dip test was made; None if one was."""
    layers: np.ndarray
    """Layers of the headline pair."""
    histograms: np.ndarray
    """Pairs of each of these layers per bin of `statistics.modes.grid`, [layer, BINS]."""
    resolution: float

    @property
    def by_layer(self) -> pd.DataFrame:
        """The rows of the headline pair's layers."""
        return self.headline("layer")

    @property
    def pooled_two(self) -> bool | None:
        """Whether the headline pair has two modes over all its layers; None if not tested."""
        modes = self.headline("pair")["modes"].iloc[0]
        return None if modes == "not tested" else modes == "two"

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
        no_layer = self.layers_tested > 0 and not (self.by_layer["modes"] == "two").any()
        return bool(self.pooled_two) and no_layer

    @property
    def answer(self) -> str:
        """Modes over all layers and within layers, in a few words."""
        if self.pooled_two is None:
            return "Too few questions to test for two modes"
        if not self.pooled_two:
            return "One mode over all layers, two within some" if self.layers_two else "One mode"
        if self.made_by_pooling:
            return "Pooling layers makes two modes; no layer has two"
        return "Two modes, within layers too" if self.layers_two else "Two modes, but not within layers"

    @property
    def verdict(self) -> str:
        """Modes pooled and within layers, with the sample size."""
        row = self.headline("pair").iloc[0]
        words = f"{self.answer}. {self.words.capitalize()}: "
        if self.pooled_two is not None:
            words += f"over all layers the deepest valley is {row['depth']:.0%} [{row['depth_low']:.0%}, "
            words += f"{row['depth_high']:.0%}] deep (p = {row['p']:.2g}"
            if math.isfinite(row["dip"]):
                words += f"; dip {row['dip']:.3f}, p = {row['dip_p']:.2g} from one pair per question"
            words += f"); two modes in {self.layers_two} of {self.layers_tested} layers, tested together. "
        between = self.between_layers
        words += f"Layers account for {between.text(percent=True)} of the spread. "
        if self.identical.estimate:
            words += f"{percent_text(self.identical.estimate)} of the pairs are bit-identical. "
        return words + f"{self.n_pairs:,} pairs from {questions_words(self.n_questions)}."

    def figure(self) -> go.Figure:
        """How overlaps are spread in every layer, with the antimodes of those that have two modes."""
        figure = canvas("Overlaps of every layer", self.subtitle, _axis(self.kind), "layer (0-based)")
        counts = self.histograms.reshape(len(self.layers), -1, MERGED).sum(axis=-1)
        edges = grid(self.resolution)[::MERGED]
        used = int(np.flatnonzero(counts.any(axis=0))[-1]) + 1
        figure.add_heatmap(
            x=-(edges[1:] + edges[:-1])[:used] / 2, y=self.layers, zmin=0, colorscale="Cividis",
            z=(counts / counts.sum(axis=1, keepdims=True))[:, :used],
            colorbar={"title": {"text": "share of the layer's pairs per bin", "side": "right"}},
            hovertemplate="layer %{y}: %{z:.1%} of its pairs<extra></extra>",
        )  # fmt: skip
        two = self.by_layer[(self.by_layer["modes"] == "two") & (self.by_layer["p_layers"] < 1 - LEVEL)]
        if len(two):
            figure.add_scatter(
                x=-to_v(two["antimode"].to_numpy(), self.resolution), y=two["layer"], mode="markers",
                name="antimode of a layer with two modes", showlegend=True,
                marker={"color": VERMILLION, "size": 8}, customdata=two["antimode"],
                hovertemplate="layer %{y}: antimode %{customdata:.4g}<extra></extra>",
            )  # fmt: skip
        _ticks(figure, self.resolution, [-edges[used], -edges[0]])
        return figure

    def figures(self) -> dict[str, go.Figure]:
        """by_layer: where each layer's overlaps are. depth: how deep each layer's valley is."""
        rows = self.by_layer
        line = Line("antimode depth", rows["layer"], rows["depth"], rows["depth_low"], rows["depth_high"])
        depth = lines(
            "How deep the valley between two modes is, by layer",
            f"{self.subtitle}; 0: one hump, 1: nothing in between; 95% intervals",
            "layer (0-based)",
            "depth below the lower peak",
            [line],
            percent=True,
        )
        depth.update_yaxes(range=[-0.02, 1.02])
        return {"by_layer": self.figure(), "depth": depth}

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


class Scope(NamedTuple):
    """One distribution; `a`, `b` and `layer` are NaN where they are pooled over."""

    scope: str
    """"pooled", "pair" or "layer"."""
    a: float
    b: float
    layer: float
    histograms: np.ndarray
    """Pairs per question and bin, [question, BINS]; the same questions in every scope."""
    identical: float
    """Share of bit-identical pairs."""


@analysis("Two modes or one", "Are stable and shifted two kinds, or one spread?", claims=("C2",), order=20)
def bimodality(c: Contrast, every_pair: bool = False) -> Bimodality:
    """Count the modes of one comparison, pooled, by pair and by layer.

    Args:
        c: the contrast.
        every_pair: layers of every pair, not only of the one that is compared.

    Raises:
        Untestable: if no pair has an overlap.
    """
    rows = c.rows[c.there]
    question, same = rows["question"].to_numpy(), rows["relative_l2"].to_numpy() == 0
    scopes = _collect(c, every_pair)
    table, dip_reason = _measure(scopes, RESOLUTION[c.kind], c.resampling)
    own = [scope for scope in scopes if scope.scope == "layer" and (scope.a, scope.b) == (c.a, c.b)]
    return Bimodality(
        **c.compared,
        kind=c.kind,
        n_questions=len(c.histograms),
        n_pairs=len(question),
        scopes=table,
        between_layers=_between_layers(own, RESOLUTION[c.kind], c.resampling),
        identical=share(question, same, *c.resampling),
        dip_reason=dip_reason,
        layers=np.array([int(scope.layer) for scope in own]),
        histograms=np.stack([scope.histograms.sum(axis=0) for scope in own]),
        resolution=RESOLUTION[c.kind],
    )


def in_layers(c: Contrast) -> tuple[pd.DataFrame, np.ndarray]:
    """Modes of every layer of the pair that is compared, without the dip test.

    Returns:
        A row per layer with the columns of `Bimodality.scopes` and `weight` (share of its pairs below the
        antimode), and the histograms [layer, question, BINS].
    """
    here, resolution = c.there, RESOLUTION[c.kind]
    question, questions = pd.factorize(c.rows["question"].to_numpy()[here], sort=True)
    layer, layers = pd.factorize(c.rows["layer"].to_numpy()[here], sort=True)
    code, n = layer.astype(np.int64) * len(questions) + question, len(questions)
    cube = question_histograms(code, c.overlap[here], resolution, len(layers) * n).reshape(-1, n, BINS)
    scopes = [Scope("layer", c.a, c.b, *row, math.nan) for row in zip(layers.tolist(), cube, strict=True)]
    table, _ = _measure(scopes, resolution, c.resampling, dip=False)
    v = grid(resolution)[:-1]
    with np.errstate(invalid="ignore"):
        cuts = to_v(table["antimode"].to_numpy(dtype=float), resolution)
    total = cube.sum(axis=1)
    weight = np.where(v[None] >= cuts[:, None], total, 0).sum(axis=1) / total.sum(axis=1)
    return table.assign(weight=np.where(table["modes"] == "two", weight, np.nan)), cube


SPIKE, SPIKE_AT, SPIKE_SPREAD = 0.14, 0.6, 0.24
"""The paper's mode: its share of the pairs, its middle overlap, and the spread of log(1 - overlap), which
together put its 1% quantile at 0.30.
"""


def spiked_layers(cube: np.ndarray, resolution: float, resamples: int, seed: int) -> float:
    """Share of layers in which a mode as the paper's would be seen, were it put into these overlaps.

    Each question gives up a share of its pairs, about `SPIKE`, that differs between questions.
    """
    rng = np.random.default_rng([seed, 7])
    odds = math.log(SPIKE / (1 - SPIKE)) + 0.7 * rng.normal(size=(cube.shape[1], 1))
    part = 1 / (1 + np.exp(-odds))
    part *= SPIKE / part.mean()
    overlap = 1 - (1 - SPIKE_AT) * np.exp(SPIKE_SPREAD * rng.normal(size=4000))
    mode = question_histograms(np.zeros(4000, dtype=int), overlap, resolution, 1)[0] / 4000
    seen = []
    for histograms in cube:
        own = histograms[histograms.sum(axis=1) > 0]
        share = part[: len(own)]
        spiked = (1 - share) * own + share * own.sum(axis=1, keepdims=True) * mode
        seen.append(find_modes(spiked, resolution, resamples=min(resamples, 400), seed=seed).two)
    return float(np.mean(seen))


def _collect(c: Contrast, every_pair: bool) -> list[Scope]:
    """The distributions: pooled first, then every pair, each followed by its layers where they are wanted."""
    questions, resolution = np.unique(c.all_rows["question"].to_numpy()), RESOLUTION[c.kind]
    scopes: list[Scope] = []
    same_of_all = pairs_of_all = 0
    for pair in c.pairs_there:
        other = c if pair == (c.a, c.b) else c.at(*pair)
        here = np.isfinite(other.overlap)
        if not here.any():
            continue
        rows, overlap, n = other.rows[here], other.overlap[here], len(questions)
        same = rows["relative_l2"].to_numpy() == 0
        same_of_all, pairs_of_all = same_of_all + same.sum(), pairs_of_all + len(same)
        question = np.searchsorted(questions, rows["question"].to_numpy())
        if not every_pair and other is not c:
            own = question_histograms(question, overlap, resolution, n)
            scopes.append(Scope("pair", *pair, math.nan, own, float(same.mean())))
            continue
        layer, layers = pd.factorize(rows["layer"].to_numpy(), sort=True)
        code = layer.astype(np.int64) * n + question
        cube = question_histograms(code, overlap, resolution, len(layers) * n).reshape(-1, n, BINS)
        scopes.append(Scope("pair", *pair, math.nan, cube.sum(axis=0), float(same.mean())))
        alike = np.bincount(layer, same) / np.bincount(layer)
        for row in zip(layers.tolist(), cube, alike.tolist(), strict=True):
            scopes.append(Scope("layer", *pair, *row))
    pooled = np.sum([scope.histograms for scope in scopes if scope.scope == "pair"], axis=0)
    identical = float(same_of_all / pairs_of_all)
    return [Scope("pooled", math.nan, math.nan, math.nan, pooled, identical), *scopes]


def _measure(
    scopes: list[Scope], resolution: float, resampling: Resampling, dip: bool = True
) -> tuple[pd.DataFrame, str | None]:
    """A row of numbers per scope, and why the dip test was not made (None if it was, anywhere)."""
    records, reasons = [], []
    for scope in scopes:
        histograms = scope.histograms[scope.histograms.sum(axis=1) > 0]
        modes = find_modes(histograms, resolution, resamples=resampling.resamples, seed=resampling.seed)
        tested = dip_test(histograms, resolution, resampling.seed) if dip else untested("not asked", 0)
        reasons.append(tested.reason)
        depth = modes.depth_interval or nothing("not tested")
        row: dict[str, Any] = {name: value for name, value in scope._asdict().items() if name != "histograms"}
        row |= {"pairs": int(histograms.sum()), "questions": len(histograms), "modes": modes.count}
        row |= {"antimode": (modes.antimode or nothing("one mode")).estimate, "depth": modes.depth}
        row |= {"depth_low": depth.low, "depth_high": depth.high, "missing": modes.missing}
        row |= {"p": modes.p_value, "p_layers": math.nan}
        row |= {"at_one": float(histograms[:, 0].sum() / histograms.sum()), "dip": tested.dip.estimate}
        records.append(row | {"dip_p": tested.p_value, "dip_p_questions": tested.p_questions})
    table = pd.DataFrame(records)
    for _, of_pair in table[table["scope"] == "layer"].groupby(["a", "b"]):
        table.loc[of_pair.index, "p_layers"] = benjamini_hochberg(of_pair["p"].to_numpy())
    return table, None if None in reasons else reasons[0]


def _between_layers(layers: list[Scope], resolution: float, resampling: Resampling) -> Interval:
    """Share of the variance of v = log(1 - overlap + r) that lies between the layers of a pair, 0 to 1."""
    cube = np.stack([scope.histograms for scope in layers], axis=1)
    edges = grid(resolution)
    v = (edges[1:] + edges[:-1]) / 2
    sums = cube @ np.stack([np.ones_like(v), v, v**2], axis=-1)  # [question, layer, 3]

    def between(totals: np.ndarray) -> np.ndarray:
        count, first, second = np.moveaxis(totals, -1, 0)
        n = count.sum(axis=-1)
        mean = first.sum(axis=-1) / n
        whole = second.sum(axis=-1) / n - mean**2
        of_layers = np.divide(first**2, count, out=np.zeros_like(first), where=count > 0).sum(axis=-1)
        part = np.maximum(of_layers / n - mean**2, 0)
        return ratio(np.stack([part, np.where(whole > 1e-9, whole, 0)], axis=-1))

    there = cube.any(axis=(1, 2))
    return cluster_bootstrap(sums[there], between, **resampling._asdict())
