"""Is a shift the cause of the changed output? (C16, our own): what patches of one depth's state do.

`sst_interp.patching` puts the state of one depth in the place of the other's at one position and writes on.
Here its rows become shares and differences with intervals that resample questions:

    recovered = sum(moved * sign(gap)) / sum(|gap|)

`gap` is how far base and donor are apart in the logit difference of their two most likely tokens, `moved` how
far the patch moved it (docs/patching.md). The base is at 0 and the donor at 1; a patch that does something
else than the donor does can be below 0 or above 1.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import pandas as pd
import plotly.graph_objects as go

from sst_interp.analyses.figures import patching as patching_figures
from sst_interp.analyses.ledger.rules import C16, C16B, EVERYWHERE, Finding, Row, judged, untestable
from sst_interp.analyses.result import Result
from sst_interp.analyses.statistics.bootstrap import (
    RESAMPLES,
    Interval,
    bootstrap_ends,
    cluster_bootstrap,
    questions_words,
    ratio,
)
from sst_interp.errors import SSTError

DIRECTIONS = ("back", "forward")
WORDS = {"back": "depth 1's state into the deep pass", "forward": "the deep pass's state into depth 1"}
SAME_SIZE = ("random", "other")
NEEDED = ("question", "direction", "place", "what", "first", "last", "role", "position", "gap", "moved", "kl")


@dataclass(frozen=True, eq=False)
class Patching(Result):
    """What follows a patch, and what does not. All intervals resample questions."""

    effects: pd.DataFrame = field(default_factory=pd.DataFrame)
    """A row per direction, place, what and role of the position (`any`: all of them together): recovered, kl
    (nats, patched against base), token_changed, later_changed (share of the next tokens that differ from
    the base's), answer_changed, answer_followed (the donor's answer, where donor and base differ); each with
    `_low` and `_high`; size (median of |change| / |state|), questions. `layer`: layers below the last."""
    recovered: dict[str, Interval] = field(default_factory=dict)
    """Direction -> recovered share at shifted pairs below the last layer."""
    beyond: dict[str, dict[str, Interval]] = field(default_factory=dict)
    """Direction -> control of the same size -> recovered by the donor's state minus by the control."""
    beyond_size: Interval | None = None
    """Coefficient of `shifted` in a regression of log KL on log size over pairs below the last layer: the log
    effect of a shifted pair beyond a stable one of the same size. None if not testable."""
    size_slope: Interval | None = None
    """Coefficient of log size in the same regression."""
    why_not: str | None = None
    """Why there is no regression."""
    answers: dict[str, Interval] = field(default_factory=dict)
    """Direction -> share of answers that turn into the donor's, patched in all layers at any position, where
    base and donor answer differently."""
    effect_map: dict[str, pd.DataFrame] = field(default_factory=dict)
    """Direction -> recovered share by position (down) and layer (across), the donor's state at one layer."""
    by_layer: pd.DataFrame = field(default_factory=pd.DataFrame)
    """Recovered share by direction, what and layer, with its interval, at any position."""
    threshold: float = float("nan")
    """Overlap below which a pair has shifted: the run's."""
    shifted: float = float("nan")
    """Share of the patched pairs that have."""
    depth: int = 0
    """The deep pass's depth."""
    name: str = "run"
    n_questions: int = 0
    not_testable: str | None = None
    """Why there is no result; None if there is one."""

    @property
    def title(self) -> str:
        """What was asked."""
        return "Causal patching: does a shift cause the changed output?"

    @property
    def table(self) -> pd.DataFrame:
        """A row per direction, place and what, all positions together."""
        if self.effects.empty:
            return self.effects
        return self.effects[self.effects["role"] == "any"].drop(columns="role").reset_index(drop=True)

    @property
    def verdict(self) -> str:
        """What follows the state, against the controls of the same size, and whether shifts are special."""
        if self.not_testable:
            return f"not testable: {self.not_testable}."
        words = (
            f"{questions_words(self.n_questions)}, depth 1 against depth {self.depth}, one layer below the "
        )
        words += f"last at a time, at shifted pairs ({self.shifted:.0%} of those patched): "
        there = [direction for direction in DIRECTIONS if direction in self.recovered]
        found = [f"{WORDS[way]} recovers {self.recovered[way].text(percent=True)}" for way in there]
        words += (" and ".join(found) or "nothing") + " of the logit difference. "
        beside = [f"{way} by {' and '.join(_named(self.beyond[way]))}" for way in there]
        words += f"Beyond a change of the same size: {'; '.join(beside)}. " if beside else ""
        for direction, share in self.answers.items():
            words += f"Patched in all layers ({direction}), the answer turns into the donor's in "
            words += f"{share.text(percent=True)} of the cases where they differ. "
        if self.beyond_size is None:
            return f"{words}Whether a shift matters more than its size is not testable: {self.why_not}."
        extra = self.beyond_size
        found = "as far as these questions can tell, its size is all that matters"
        if extra.low > 0 or extra.high < 0:
            found = f"a shift matters {'more' if extra.low > 0 else 'less'} than its size says"
        words += f"With size held equal, shifted pairs' log KL is {extra.text()} above stable ones': "
        return f"{words}{found}."

    def figure(self) -> go.Figure:
        """Recovered share by layer, beside the controls."""
        return patching_figures.by_layer(self)

    def figures(self) -> dict[str, go.Figure]:
        """by_layer; map_back, map_forward (layer by position); places; answers."""
        drawn = {"by_layer": self.figure()}
        drawn |= {
            f"map_{direction}": patching_figures.effect_map(self, direction) for direction in DIRECTIONS
        }
        return drawn | {
            "places": patching_figures.places(self, "recovered"),
            "answers": patching_figures.places(self, "answer_changed"),
        }


def patching(rows: pd.DataFrame, resamples: int = RESAMPLES, seed: int = 0) -> Patching:
    """What the rows of `sst_interp.patching.study` say.

    Args:
        rows: one per question, position, direction and patch; its `attrs` has the plan (threshold, depth).
        resamples: question resamples.
        seed: of the resampling.

    Returns:
        The result; one whose verdict begins "not testable:" if there are no rows.

    Raises:
        SSTError: a column is missing.
    """
    if rows.empty:
        return Patching(not_testable="nothing was patched")
    if missing := [name for name in NEEDED if name not in rows]:
        raise SSTError(f"rows of patches have no column {missing[0]}", "`read_patching` reads them")
    top = int(rows["last"].max())
    rows = rows[np.isfinite(rows[["gap", "moved", "kl"]]).all(axis=1)].assign(
        toward=lambda r: r["moved"] * np.sign(r["gap"]), apart=lambda r: r["gap"].abs()
    )
    single = rows[rows["place"] == "layer"]
    below = single[single["last"] < top]
    pairs = below[below["what"] == "state"]
    shifted = pairs["shifted"] > 0
    recovered, beyond, answers = {}, {}, {}
    for direction in DIRECTIONS:
        own = below[(below["direction"] == direction) & (below["shifted"] > 0)]
        if own.empty:
            continue
        recovered[direction] = share(own[own["what"] == "state"], "toward", "apart", resamples, seed)
        beyond[direction] = {what: difference(own, what, resamples, seed) for what in SAME_SIZE}
        whole = rows[(rows["direction"] == direction) & (rows["place"] == "all") & (rows["what"] == "state")]
        differ = whole[whole["answers_differ"] == 1]
        if len(differ):
            followed = differ.assign(one=1.0)
            answers[direction] = share(followed, "answer_donors", "one", resamples, seed)
    slope, extra, why = size_regression(pairs, resamples, seed)
    return Patching(
        effects=_effects(rows, top, resamples, seed),
        recovered=recovered,
        beyond=beyond,
        beyond_size=extra,
        size_slope=slope,
        why_not=why,
        answers=answers,
        effect_map={direction: _map(single, direction) for direction in DIRECTIONS},
        by_layer=_measured(single, ["direction", "what", "last"], ("recovered",), resamples, seed),
        threshold=float(rows.attrs.get("threshold", np.nan)),
        shifted=float(shifted.mean()) if len(pairs) else float("nan"),
        depth=int(rows.attrs.get("depth", 0)),
        name=str(rows.attrs.get("run", "run")),
        n_questions=int(rows["question"].nunique()),
    )


def share(rows: pd.DataFrame, top: str, bottom: str, resamples: int, seed: int) -> Interval:
    """Sum of one column over the sum of another, questions resampled."""
    sums = rows.groupby("question")[[top, bottom]].sum().to_numpy(dtype=float)
    return cluster_bootstrap(sums, resamples=resamples, seed=seed)


def difference(rows: pd.DataFrame, control: str, resamples: int, seed: int) -> Interval:
    """Recovered share of the donor's state minus that of a control, at the same pairs."""
    parts = []
    for what in ("state", control):
        parts.append(rows[rows["what"] == what].groupby("question")[["toward", "apart"]].sum())
    both = pd.concat(parts, axis=1).fillna(0.0).to_numpy(dtype=float)
    return cluster_bootstrap(
        both, lambda totals: ratio(totals[..., :2]) - ratio(totals[..., 2:]), resamples, seed=seed
    )


def size_regression(
    pairs: pd.DataFrame, resamples: int = RESAMPLES, seed: int = 0
) -> tuple[Interval | None, Interval | None, str | None]:
    """Log KL = a(layer, direction) + b log(size) + c shifted, by least squares: (b, c, why there is none).

    Layers and directions each have a mean of their own, so that a layer that shifts often and matters much
    is not taken for an effect of shifting. Changes without any effect or size have no logarithm and are left
    out.
    """
    used = pairs[(pairs["kl"] > 0) & (pairs["size"] > 0)]
    shifted = used["shifted"] > 0
    if not len(used) or shifted.all() or not shifted.any():
        return None, None, f"{'every' if shifted.all() else 'no'} patched pair has shifted"
    columns = pd.DataFrame(
        {"size": np.log(used["size"]), "shifted": shifted.astype(float), "effect": np.log(used["kl"])}
    )
    columns = columns - columns.groupby([used["direction"], used["last"]]).transform("mean")
    x, y = columns[["size", "shifted"]].to_numpy(dtype=float), columns["effect"].to_numpy(dtype=float)
    sums = np.stack([x[:, 0] ** 2, x[:, 0] * x[:, 1], x[:, 1] ** 2, x[:, 0] * y, x[:, 1] * y], axis=1)
    per_question = pd.DataFrame(sums).groupby(used["question"].to_numpy()).sum().to_numpy(dtype=float)

    def coefficient(which: int):
        def solve(totals: np.ndarray) -> np.ndarray:
            ss, sx, xx, sy, xy = np.moveaxis(totals, -1, 0)
            determinant = ss * xx - sx**2
            top = (xx * sy - sx * xy) if which == 0 else (ss * xy - sx * sy)
            there = determinant > 1e-9 * ss * xx
            return np.divide(top, determinant, out=np.full(np.shape(top), np.nan), where=there)

        return cluster_bootstrap(per_question, solve, resamples, seed=seed)

    slope, extra = coefficient(0), coefficient(1)
    if not np.isfinite(extra.estimate):
        return None, None, "size and shift go together without exception"
    return slope, extra, None


def patching_rows(result: Patching) -> list[Row]:
    """The rows of C16 for the claims ledger."""
    if result.not_testable or not result.recovered:
        nothing = untestable(result.not_testable or "no patched pair has shifted")
        return [Row(claim, EVERYWHERE, nothing) for claim in (C16, C16B)]
    recovered = list(result.recovered.values())
    beyond = [interval for controls in result.beyond.values() for interval in controls.values()]
    both = len(recovered) == len(DIRECTIONS)
    holds = both and all(interval.low > 0 for interval in (*recovered, *beyond))
    here = "; ".join(f"{way} {i.text(percent=True)} recovered" for way, i in result.recovered.items())
    control = "beyond controls of the same size: "
    control += "; ".join(f"{way}, {', '.join(_named(found))}" for way, found in result.beyond.items())
    verdict = judged(holds, *recovered, *beyond)
    first = Row(C16, EVERYWHERE, Finding(here, verdict, recovered[0], control))
    if result.beyond_size is None or result.size_slope is None:
        return [first, Row(C16B, EVERYWHERE, untestable(str(result.why_not)))]
    extra = result.beyond_size
    words = f"{extra.text()} (log KL, shifted against stable, size held equal)"
    size = f"coefficient of log size {result.size_slope.text()}; {result.shifted:.0%} of the pairs shifted"
    return [first, Row(C16B, EVERYWHERE, Finding(words, judged(extra.low > 0, extra), extra, size))]


def _named(intervals: dict[str, Interval]) -> list[str]:
    return [f"{interval.text(percent=True)} ({what})" for what, interval in intervals.items()]


MEASURES = {
    "recovered": ("toward", "apart"),
    "kl": ("kl", "one"),
    "token_changed": ("token_changed", "one"),
    "later_changed": ("later_changed", "written"),
    "answer_changed": ("answer_changed", "written"),
    "answer_followed": ("followed", "differ"),
}
"""Measure -> what is summed, over what."""


def _measured(
    rows: pd.DataFrame, by: Sequence[str], measures: Sequence[str], resamples: int, seed: int
) -> pd.DataFrame:
    """A row per group with its measures."""
    written = rows["continued"].astype(float)
    differ = written * (rows["answers_differ"] == 1)
    whole = rows.assign(
        one=1.0, written=written, differ=differ, followed=differ * rows["answer_donors"].fillna(0)
    )
    records = []
    for names, own in whole.groupby(list(by), sort=False, observed=True):
        sums = own.groupby("question")[[column for name in measures for column in MEASURES[name]]].sum()
        totals = sums.to_numpy(dtype=float).reshape(len(sums), len(measures), 2)
        ends = bootstrap_ends(totals, resamples=resamples, seed=seed)
        found = dict(zip(by, names, strict=True))
        for name, *three in zip(measures, *ends, strict=True):
            found |= dict(zip((name, f"{name}_low", f"{name}_high"), map(float, three), strict=True))
        records.append(found | {"size": float(own["size"].median()), "questions": len(sums)})
    return pd.DataFrame(records)


def _effects(rows: pd.DataFrame, top: int, resamples: int, seed: int) -> pd.DataFrame:
    keep = rows[(rows["place"] != "layer") | (rows["last"] < top)]
    by = ["direction", "place", "what", "role"]
    whole = pd.concat([keep.assign(role="any"), keep], ignore_index=True)
    return _measured(whole, by, tuple(MEASURES), resamples, seed)


def _map(single: pd.DataFrame, direction: str) -> pd.DataFrame:
    own = single[(single["direction"] == direction) & (single["what"] == "state")]
    sums = own.groupby(["position", "last"])[["toward", "apart"]].sum()
    values = pd.Series(ratio(sums.to_numpy(dtype=float)), index=sums.index)
    found = values.unstack("last")
    found.index.name, found.columns.name = "position", "layer"
    return found
