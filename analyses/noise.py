"""Is a change between depths more than rounding? (claim C7)

Two references. The paper's is one bf16 rounding of the state itself, which is lenient: a state has been
rounded in every layer below. The other is measured: the run's `noise` table has the same tokens at the same
depth computed again, in another batch shape ("batch") and in float32 ("fp32"). The change is set against it
in relative L2, as a ratio of medians.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import pandas as pd
import plotly.graph_objects as go

from sst_interp.analyses.contrast import Contrast, position_key
from sst_interp.analyses.plots import GREY, Line, empty_figure, lines
from sst_interp.analyses.result import Compared, analysis
from sst_interp.analyses.statistics.bootstrap import (
    LEVEL,
    Interval,
    Resampling,
    grouped_medians,
    nothing,
    percent_text,
    questions_words,
    share,
)
from sst_interp.analyses.statistics.permutation import paired_tests
from sst_interp.errors import Untestable

LAYER = "layer (0-based)"
ENDS = ("", "_low", "_high")
KINDS = {"batch": "another batch shape", "fp32": "float32"}
TINY = 1e-30
"""Stands for 0 in logarithms: medians of logarithms are logarithms of medians."""


@dataclass(frozen=True, eq=False)
class Floor:
    """The change between depths over one kind of noise at one depth. Intervals resample questions."""

    kind: str
    """"batch" or "fp32"."""
    depth: int
    """Depth at which the noise was measured."""
    change: Interval
    """Median relative L2 between the depths, all layers, at the questions and positions of the noise."""
    noise: Interval
    """Median relative L2 of the noise."""
    ratio: Interval
    """change / noise, both from the same resample; no estimate where the median noise is 0."""
    deepest: Interval
    """The same ratio in the deepest layer."""
    identical: float
    """Share of the noise pairs that are bit-identical."""
    roundings: float
    """The noise itself in bf16 roundings (median over dimensions, then over pairs)."""
    n_pairs: int
    """Noise pairs."""
    by_layer: pd.DataFrame
    """Columns layer, questions, change, change_low, change_high, noise, noise_low, noise_high, ratio, low,
    high."""


@dataclass(frozen=True, eq=False)
class Bf16Noise(Compared):
    """The change of one comparison and one pair of depths over rounding. All intervals resample questions."""

    named = "Change over rounding"
    shown = "by_layer"
    ratio: Interval
    """Median over pairs, all layers, of the change in bf16 roundings (itself a median over dimensions)."""
    deepest: Interval
    """The same in the deepest layer."""
    deepest_layer: int
    identical: Interval
    """Share of pairs that are bit-identical (relative L2 of 0)."""
    n_pairs: int
    n_excluded: int
    """Pairs left out because their ratio is NaN."""
    by_layer: pd.DataFrame
    """Columns layer, pairs, ratio, low, high, identical (share), and the tests of `paired_tests` of each
    question's median ratio against 1."""
    per_pair: pd.DataFrame
    """A row per (a, b): never pooled."""
    floors: tuple[Floor, ...]
    """The change over measured noise, per kind and depth."""
    no_floor: str | None
    """Why there is no measured floor; None if there is one."""

    def floor(self, kind: str) -> Floor | None:
        """The measured floor of a kind ("batch", "fp32"), at the depth where it is highest."""
        return highest(self.floors, kind)

    @property
    def verdict(self) -> str:
        """The ratio to both references, with its sample size; effect sizes first."""
        words = f"{self._answer}. {self.words.capitalize()}: the median change is {self.ratio.text()} bf16 "
        words += "roundings over all layers"
        for kind, what in KINDS.items():
            floor = self.floor(kind)
            if floor is not None:
                n = questions_words(floor.ratio.n_questions)
                words += f", {floor.ratio.text()} times what {what} changes at depth {floor.depth} ({n})"
        if self.no_floor is not None:
            words += f"; the measured floor is not testable: {self.no_floor}"
        words += f". {self.n_pairs:,} pairs from {questions_words(self.n_questions)}, "
        words += f"{percent_text(self.identical.estimate)} bit-identical. {self._tests}"
        if self.n_excluded:
            words += f" {self.n_excluded:,} pairs without a ratio are left out."
        return words

    @property
    def _answer(self) -> str:
        if not self.ratio.known:
            return "Whether the change is more than rounding is not tested"
        if self.ratio.high < 1:
            return "The change is less than one bf16 rounding"
        if self.ratio.low <= 1:
            return "The change cannot be told from one bf16 rounding"
        ratios = [floor.ratio for kind in KINDS if (floor := self.floor(kind)) is not None]
        if any(ratio.known and ratio.low <= 1 for ratio in ratios):
            return "The change exceeds one bf16 rounding, but not measured noise"
        beyond = any(ratio.known for ratio in ratios)
        return f"The change exceeds one bf16 rounding{', and measured noise' if beyond else ''}"

    @property
    def _tests(self) -> str:
        """How many layers are above and below one rounding."""
        tested = self.by_layer[np.isfinite(self.by_layer["wilcoxon_p"])]
        if tested.empty:
            return "No layer could be tested against one rounding."
        level, side = 1 - LEVEL, np.sign(tested["effect"])
        above, below = ((tested["wilcoxon_holm"] < level) & (side == s) for s in (1, -1))
        words = (
            f"Of {len(self.by_layer)} layers {above.sum()} are above and {below.sum()} below one rounding "
        )
        words += f"(Wilcoxon's test over questions, p < {level:.2g} after Holm)"
        n = int(tested["questions"].max())
        if 2 * 0.5**n * len(tested) >= level:
            words += f", which {questions_words(n)} cannot reach"
        return words + "."

    def figure(self) -> go.Figure:
        """The change in bf16 roundings by layer."""
        t = self.by_layer
        line = Line("median change", t["layer"], t["ratio"], t["low"], t["high"])
        y = "change, in bf16 roundings of the state (log scale)"
        figure = lines("Change over one bf16 rounding", self.subtitle, LAYER, y, [line])
        figure.add_hline(y=1, line={"color": GREY, "dash": "dot"})
        figure.update_yaxes(type="log")
        return figure

    def figures(self) -> dict[str, go.Figure]:
        """by_layer, and floors: the change beside measured noise, in relative L2."""
        floors = [floor for kind in KINDS if (floor := self.floor(kind)) is not None]
        title = "Change and measured noise"
        if not floors:
            why = empty_figure(title, f"not testable: {self.no_floor}")
            return {"by_layer": self.figure(), "floors": why}
        series = [("between depths", "change", floors[0].by_layer)]
        series += [(f"noise: {KINDS[f.kind]}, depth {f.depth}", "noise", f.by_layer) for f in floors]
        drawn = [Line(name, t["layer"], *(t[f"{column}{end}"] for end in ENDS)) for name, column, t in series]
        words = f"{self.words}; {questions_words(max(f.noise.n_questions for f in floors))}"
        figure = lines(title, words, LAYER, "median relative L2 (log scale)", drawn)
        figure.update_yaxes(type="log", exponentformat="power")
        return {"by_layer": self.figure(), "floors": figure}


@analysis("Change and rounding", "Is the change more than arithmetic noise?", claims=("C7",), order=90)
def bf16_noise(c: Contrast) -> Bf16Noise:
    """The change of one comparison over one bf16 rounding, and over measured noise.

    Raises:
        Untestable: if no pair has a ratio.
    """
    values = c.rows["bf16_ratio"].to_numpy(dtype=float)
    there = np.isfinite(values)
    if not there.any():
        raise Untestable(f"all {len(there):,} ratios of comparison {c.comparison!r} are NaN")
    rows, values = c.rows[there], values[there]
    question, layer = rows["question"].to_numpy(), rows["layer"].to_numpy()
    deepest_layer = int(layer.max())
    groups = np.ones(len(rows), dtype=bool), layer == deepest_layer
    ratio, deepest = grouped_medians(question, values, groups, (), *c.resampling)
    same = rows["relative_l2"].to_numpy() == 0
    floors, no_floor = noise_floors(c.rows, c.tables.get("noise"), *c.resampling)
    return Bf16Noise(
        **c.compared,
        ratio=ratio,
        deepest=deepest,
        deepest_layer=deepest_layer,
        identical=share(question, same, *c.resampling),
        n_pairs=len(rows),
        n_questions=ratio.n_questions,
        n_excluded=int(np.count_nonzero(~there)),
        by_layer=_by_layer(question, layer, values, same, c.resampling),
        per_pair=_per_pair(c),
        floors=floors,
        no_floor=no_floor,
    )


def _by_layer(
    question: np.ndarray, layer: np.ndarray, values: np.ndarray, same: np.ndarray, how: Resampling
) -> pd.DataFrame:
    """A row per layer: median ratio, share of bit-identical pairs, and the tests over questions."""
    codes, names = pd.factorize(layer, sort=True)
    order = np.argsort(codes, kind="stable")
    ends = np.cumsum(np.bincount(codes, minlength=len(names)))[:-1]
    records = []
    for name, here in zip(names.tolist(), np.split(order, ends), strict=True):
        every = [np.ones(len(here), dtype=bool)]
        [median] = grouped_medians(question[here], values[here], every, (), *how)
        records.append((name, len(here), median.estimate, median.low, median.high, float(same[here].mean())))
    table = pd.DataFrame(records, columns=["layer", "pairs", "ratio", "low", "high", "identical"])
    own = pd.Series(values).groupby([question, layer]).median().unstack().to_numpy()
    return pd.concat([table, paired_tests(own, 1.0)], axis=1)


def _per_pair(c: Contrast) -> pd.DataFrame:
    """A row per (a, b): never pooled."""
    records = []
    for a, b in c.pairs_there:
        every = c.at(a, b).rows
        rows = every[np.isfinite(every["bf16_ratio"])]
        if rows.empty:
            continue
        question, layer, values = (rows[n].to_numpy() for n in ("question", "layer", "bf16_ratio"))
        groups = np.ones(len(rows), dtype=bool), layer == layer.max()
        medians = grouped_medians(question, values, groups, (), *c.resampling)
        ends = [v for m in medians for v in (m.estimate, m.low, m.high)]
        same = float((rows["relative_l2"] == 0).mean())
        records.append((a, b, medians[0].n_questions, len(rows), *ends, same))
    names = [f"{n}{end}" for n in ("ratio", "deepest") for end in ("", " low", " high")]
    return pd.DataFrame(records, columns=["a", "b", "questions", "pairs", *names, "identical"])


def noise_floors(
    rows: pd.DataFrame, noise: pd.DataFrame | None, resamples: int, seed: int
) -> tuple[tuple[Floor, ...], str | None]:
    """Every floor that was measured, and why there is none.

    Args:
        rows: `pairs` rows of one comparison and one pair of depths.
        noise: the run's `noise` table, or None. It is of depth 1's own text: the same tokens as
            teacher-forced, the same positions as other comparisons.
        resamples: question resamples.
        seed: of the resampling.

    Returns:
        A `Floor` per kind and depth, and None, or () and the reason.
    """
    if noise is None:
        return (), "the run has no noise table"
    own, of_noise = position_key(rows), position_key(noise)
    kinds, depths = noise["kind"].astype(str).to_numpy(), noise["depth"].to_numpy()
    common = np.isin(of_noise, np.unique(own))
    floors = []
    for kind, depth in sorted(set(zip(kinds[common].tolist(), depths[common].tolist(), strict=True))):
        here = common & (kinds == kind) & (depths == depth)
        there = np.isin(own, np.unique(of_noise[here]))
        floor = _floor(kind, depth, rows[there], noise[here], resamples, seed)
        if floor is not None:
            floors.append(floor)
    return tuple(floors), None if floors else "no position has both a change and noise"


def highest(floors: tuple[Floor, ...], kind: str) -> Floor | None:
    """The floor of one kind at the depth where it is highest, the strictest; None if it was not measured."""
    of_kind = [f for f in floors if f.kind == kind]
    return max(of_kind, key=lambda f: f.noise.estimate) if of_kind else None


def _floor(
    kind: str, depth: int, rows: pd.DataFrame, noise: pd.DataFrame, resamples: int, seed: int
) -> Floor | None:
    question, layer, values = (
        np.concatenate([rows[c].to_numpy(), noise[c].to_numpy()]).astype(float)
        for c in ("question", "layer", "relative_l2")
    )
    measured = np.arange(len(values)) >= len(rows)
    finite = np.isfinite(values)
    if not (finite & measured).any() or not (finite & ~measured).any():
        return None
    logs = np.log(np.where(finite, np.maximum(values, TINY), np.nan))

    def against(use: np.ndarray) -> list[Interval]:
        groups = ~measured[use], measured[use]
        medians = grouped_medians(question[use], logs[use], groups, [(0, 1)], resamples, seed)
        return _back(*medians)

    layers = np.unique(layer[finite]).astype(int)
    records = []
    for one in layers:
        change, floor, ratio = against(np.flatnonzero(layer == one))
        ends = [v for i in (change, floor, ratio) for v in (i.estimate, i.low, i.high)]
        records.append((one, ratio.n_questions, *ends))
    names = [f"{n}{end}" for n in ("change", "noise") for end in ("", "_low", "_high")]
    table = pd.DataFrame(records, columns=["layer", "questions", *names, "ratio", "low", "high"])
    change, floor, ratio = against(np.arange(len(values)))
    deepest = against(np.flatnonzero(layer == layers[-1]))[2]
    of_noise = noise["relative_l2"].to_numpy()
    return Floor(
        kind,
        int(depth),
        change,
        floor,
        ratio,
        deepest,
        identical=float(np.mean(of_noise[np.isfinite(of_noise)] == 0)),
        roundings=float(np.nanmedian(noise["bf16_ratio"])) if "bf16_ratio" in noise else math.nan,
        n_pairs=int((finite & measured).sum()),
        by_layer=table,
    )


def _back(change: Interval, noise: Interval, gap: Interval) -> list[Interval]:
    """From logarithms: the median change, the median noise, and their ratio."""
    none = 2 * TINY
    out = []
    for one in (change, noise):
        ends = [math.exp(v) for v in (one.estimate, one.low, one.high)]
        estimate, low, high = (0.0 if v < none else v for v in ends)
        out.append(Interval(estimate, low, high, one.n_questions, reason=one.reason))
    if not out[0].n_questions or not out[1].n_questions:
        return [*out, nothing("not measured in this layer")]
    if out[1].estimate == 0:
        reason = "the median noise is 0: at least half of it is bit-identical"
        return [*out, nothing(reason, gap.n_questions)]
    estimate, low, high = (math.exp(v) for v in (gap.estimate, gap.low, gap.high))
    if out[1].low == 0:
        reason = "in some resamples the median noise is 0"
        return [*out, Interval(estimate, math.nan, math.nan, gap.n_questions, reason=reason)]
    return [*out, Interval(estimate, low, high, gap.n_questions, reason=gap.reason)]
