"""Is a change between depths more than rounding? (claim C7)

Two references. The paper's is one bf16 rounding of the state itself, which is lenient: a state has been
rounded in every layer below. The other is measured: what another batch shape, or float32, does to the same
state (`analyses/parts/noise_floor.py`). A ratio of 1 is the reference itself.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import numpy as np
import pandas as pd
import plotly.graph_objects as go

from sst_interp.analyses.figures import controls as control_figures
from sst_interp.analyses.overlap import pair_words, select
from sst_interp.analyses.parts.noise_floor import KINDS, Floor, highest, noise_floors
from sst_interp.analyses.result import Result
from sst_interp.analyses.statistics import bootstrap as tallies
from sst_interp.analyses.statistics.bootstrap import (
    LEVEL,
    RESAMPLES,
    Interval,
    grouped_medians,
    percent_text,
    questions_words,
)
from sst_interp.analyses.statistics.permutation import paired_tests
from sst_interp.choices import COMPARISONS
from sst_interp.errors import SSTError, unknown_name

UNKNOWN = Interval(math.nan, math.nan, math.nan, 0, reason="not testable")


@dataclass(frozen=True, eq=False)
class Bf16Noise(Result):
    """The change of one comparison and one pair of depths over rounding. All intervals resample questions."""

    comparison: str
    a: int
    b: int
    ratio: Interval = UNKNOWN
    """Median over pairs, all layers, of the change in bf16 roundings (itself a median over dimensions)."""
    deepest: Interval = UNKNOWN
    """The same in the deepest layer."""
    deepest_layer: int = -1
    identical: Interval = UNKNOWN
    """Share of pairs that are bit-identical (relative L2 of 0)."""
    n_pairs: int = 0
    n_questions: int = 0
    n_excluded: int = 0
    """Pairs left out because their ratio is NaN."""
    by_layer: pd.DataFrame = field(default_factory=pd.DataFrame)
    """Columns layer, pairs, ratio, low, high, identical (share), and the tests of `paired_tests` of each
    question's median ratio against 1."""
    per_pair: pd.DataFrame = field(default_factory=pd.DataFrame)
    """A row per (a, b): never pooled."""
    floors: tuple[Floor, ...] = ()
    """The change over measured noise, per kind and depth."""
    no_floor: str | None = None
    """Why there is no measured floor; None if there is one."""
    not_testable: str | None = None
    """Why there is no result; None if there is one."""

    @property
    def title(self) -> str:
        """What was compared."""
        return f"Change over rounding: {self.words}"

    @property
    def words(self) -> str:
        """The comparison and its pair, in words."""
        return self.comparison if self.not_testable else pair_words(self.comparison, self.a, self.b)

    @property
    def table(self) -> pd.DataFrame:
        """A row per layer."""
        return self.by_layer

    def floor(self, kind: str) -> Floor | None:
        """The measured floor of a kind ("batch", "fp32"), at the depth where it is highest."""
        return highest(self.floors, kind)

    @property
    def verdict(self) -> str:
        """The ratio to both references, with its sample size; effect sizes first."""
        if self.not_testable is not None:
            return f"not testable: {self.not_testable}."
        words = f"{self.words}: the median change is {self.ratio.text()} bf16 roundings over all layers and "
        words += f"{self.deepest.text()} in the deepest (layer {self.deepest_layer}); {self.n_pairs:,} pairs "
        words += f"from {questions_words(self.n_questions)}, {percent_text(self.identical.estimate)} "
        words += f"bit-identical. {_tests_words(self.by_layer)} {_floor_words(self)}"
        if self.n_excluded:
            words += f" {self.n_excluded:,} pairs without a ratio are left out."
        return words

    def figure(self) -> go.Figure:
        """The change in bf16 roundings by layer."""
        return self.figures()["by_layer"]

    def figures(self) -> dict[str, go.Figure]:
        """by_layer, and floors: the change beside measured noise, in relative L2."""
        return control_figures.noise(self)


def _tests_words(table: pd.DataFrame) -> str:
    level = 1 - LEVEL
    tested = table[np.isfinite(table["wilcoxon_p"])]
    if tested.empty:
        return "No layer could be tested against one rounding."
    counts = []
    for name in ("wilcoxon_holm", "sign_holm"):
        above, below = ((tested[name] < level) & (side * tested["effect"] > 0) for side in (1, -1))
        counts.append(f"{above.sum()} above and {below.sum()} below")
    shares = dict.fromkeys(f"{v:.0%}" for v in (tested["above"].min(), tested["above"].max()))
    words = f"By layer, {' to '.join(shares)} of the questions change by more than one rounding; of "
    words += f"{len(table)} layers {counts[0]} by Wilcoxon's test over questions, {counts[1]} by the sign "
    words += f"test (p < {level:.2g} after Holm)"
    n = int(tested["questions"].max())
    if 2 * 0.5**n * len(tested) >= level:
        words += f", which {questions_words(n)} cannot reach"
    return words + "."


def _floor_words(result: Bf16Noise) -> str:
    lenient = "One rounding is a lenient reference; "
    if not result.floors:
        return f"{lenient}the measured floor is not testable: {result.no_floor}."
    parts = []
    for kind, what in KINDS.items():
        floor = result.floor(kind)
        if floor is None:
            parts.append(f"against {what}: not measured")
        elif not math.isfinite(floor.ratio.estimate):
            parts.append(f"against {what}: {floor.ratio.text()}")
        else:
            n = questions_words(floor.ratio.n_questions)
            parts.append(f"{floor.ratio.text()} times what {what} changes at depth {floor.depth} ({n})")
    return f"{lenient}the change is " + ", and ".join(parts) + "."


def bf16_noise(
    pairs: pd.DataFrame,
    comparison: str,
    noise: pd.DataFrame | None = None,
    a: int | None = None,
    b: int | None = None,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> Bf16Noise:
    """The change of one comparison over one bf16 rounding, and over measured noise.

    Args:
        pairs: the run's `pairs` table.
        comparison: "replayed", "within" or "free".
        noise: the run's `noise` table; None if it has none.
        a: depth or iteration of the first state; default: the pair (1, deepest).
        b: of the second.
        resamples: question resamples.
        seed: of the resampling.

    Returns:
        The result; with no usable rows one whose verdict begins "not testable:".

    Raises:
        SSTError: if the comparison is unknown.
    """
    if comparison not in COMPARISONS:
        raise unknown_name("comparison", comparison, COMPARISONS)
    of_pair = _per_pair(pairs, comparison, resamples, seed)
    try:
        rows, a, b = select(pairs, comparison, a, b)
    except SSTError as error:
        return Bf16Noise(comparison, a or 1, b or 1, per_pair=of_pair, not_testable=error.message)
    values = rows["bf16_ratio"].to_numpy(dtype=float)
    there = np.isfinite(values)
    if not there.any():
        reason = f"all {len(rows):,} ratios of comparison {comparison!r} are NaN"
        return Bf16Noise(comparison, a, b, per_pair=of_pair, not_testable=reason)
    every = rows
    rows, values = rows[there], values[there]
    question, layer = rows["question"].to_numpy(), rows["layer"].to_numpy()
    deepest_layer = int(layer.max())
    groups = np.ones(len(rows), dtype=bool), layer == deepest_layer
    ratio, deepest = grouped_medians(question, values, groups, resamples=resamples, seed=seed)
    same = rows["relative_l2"].to_numpy() == 0
    floors, no_floor = noise_floors(every, noise, resamples, seed)
    return Bf16Noise(
        comparison=comparison,
        a=a,
        b=b,
        ratio=ratio,
        deepest=deepest,
        deepest_layer=deepest_layer,
        identical=tallies.share(question, same, resamples, seed),
        n_pairs=len(rows),
        n_questions=ratio.n_questions,
        n_excluded=int(np.count_nonzero(~there)),
        by_layer=_by_layer(question, layer, values, same, resamples, seed),
        per_pair=of_pair,
        floors=floors,
        no_floor=no_floor,
    )


def _by_layer(
    question: np.ndarray, layer: np.ndarray, values: np.ndarray, same: np.ndarray, resamples: int, seed: int
) -> pd.DataFrame:
    """A row per layer: median ratio, share of bit-identical pairs, and the tests over questions."""
    codes, names = pd.factorize(layer, sort=True)
    order = np.argsort(codes, kind="stable")
    ends = np.cumsum(np.bincount(codes, minlength=len(names)))[:-1]
    records = []
    for name, here in zip(names.tolist(), np.split(order, ends), strict=True):
        every = [np.ones(len(here), dtype=bool)]
        [median] = grouped_medians(question[here], values[here], every, resamples=resamples, seed=seed)
        records.append((name, len(here), median.estimate, median.low, median.high, float(same[here].mean())))
    table = pd.DataFrame(records, columns=["layer", "pairs", "ratio", "low", "high", "identical"])
    own = pd.Series(values).groupby([question, layer]).median().unstack().to_numpy()
    return pd.concat([table, paired_tests(own, 1.0)], axis=1)


def _per_pair(pairs: pd.DataFrame, comparison: str, resamples: int, seed: int) -> pd.DataFrame:
    """A row per (a, b) of one comparison: median ratio over all layers and in the deepest, bit-identical."""
    columns = ["question", "layer", "a", "b", "relative_l2", "bf16_ratio"]
    rows = pairs.loc[(pairs["comparison"] == comparison).to_numpy(dtype=bool), columns]
    records = []
    for (a, b), own in rows[np.isfinite(rows["bf16_ratio"])].groupby(["a", "b"]):
        layer = own["layer"].to_numpy()
        groups = np.ones(len(own), dtype=bool), layer == layer.max()
        medians = grouped_medians(
            own["question"].to_numpy(), own["bf16_ratio"].to_numpy(), groups, (), resamples, seed
        )
        ends = [v for m in medians for v in (m.estimate, m.low, m.high)]
        same = float((own["relative_l2"] == 0).mean())
        records.append((a, b, medians[0].n_questions, len(own), *ends, same))
    names = [f"{n}{end}" for n in ("ratio", "deepest") for end in ("", " low", " high")]
    return pd.DataFrame(records, columns=["a", "b", "questions", "pairs", *names, "identical"])
