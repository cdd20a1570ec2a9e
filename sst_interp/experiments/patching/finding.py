"""Is a shift the cause of the changed output? (C16, our own): the rows of `patch_run`, analysed.

    recovered = sum(moved * sign(gap)) / sum(|gap|)

`gap` is the logit difference between base and donor, `moved` is by how much the patch moved it
(`sst_interp.experiments.patching.effects`). The base is at 0 and the donor at 1. A patch with another effect
than the donor's can be below 0 or above 1. All intervals resample questions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import pandas as pd
import plotly.graph_objects as go

from sst_interp.analyses.plots import Dot, Line, dots, lines, matrix
from sst_interp.analyses.result import Result
from sst_interp.analyses.statistics.bootstrap import (
    RESAMPLES,
    Interval,
    bootstrap_ends,
    cluster_bootstrap,
    questions_words,
    ratio,
)
from sst_interp.analyses.statistics.clusters import jackknife_t
from sst_interp.errors import SSTError, Untestable

DIRECTIONS = ("back", "forward")
WORDS = {"back": "depth 1's state in the deep pass", "forward": "the deep state at depth 1"}
SAME_SIZE = ("random", "other")
NEEDED = ("question", "direction", "place", "what", "first", "last", "role", "position", "gap", "moved", "kl")
LAYER = "patched layer (0-based)"
SERIES = {
    "state": "the other depth's state",
    "random": "random, same size",
    "other": "another question's change, same size",
}
"""Vector that is put in -> its name in a figure."""
AXES = {
    "recovered": "recovered share of the logit difference (0: as the base, 1: as the donor)",
    "answer_changed": "share of answers that differ from the base's",
}
"""Measure -> the title of its axis."""


@dataclass(frozen=True, eq=False)
class Patching(Result):
    """The effects of patches. All intervals resample questions."""

    effects: pd.DataFrame
    """A row per direction, place, what and role of the position (`any`: all together): recovered, kl (nats,
    patched against base), token_changed, later_changed (share of the next tokens that differ from the
    base's), answer_changed, answer_followed (the donor's answer, if donor and base differ); each with `_low`
    and `_high`; size (median of |change| / |state|), questions. `layer` leaves out the last layer."""
    recovered: dict[str, Interval]
    """Direction -> recovered share at shifted pairs below the last layer; empty if no pair shifted."""
    beyond: dict[str, dict[str, Interval]]
    """Direction -> control -> share recovered by the donor's state minus share recovered by the control."""
    beyond_size: Interval | None
    """Coefficient of `shifted` in a regression of log KL on log size (`size_regression`): the log effect of a
    shifted pair beyond a stable one of the same size. None without a regression."""
    size_slope: Interval | None
    """Coefficient of log size in the same regression."""
    why_not: str | None
    """Why there is no regression; None if there is one."""
    answers: dict[str, Interval]
    """Direction -> share of answers that turn into the donor's when all layers are patched, of those where
    base and donor differ."""
    effect_map: dict[str, pd.DataFrame]
    """Direction -> recovered share by position (down) and layer (across), the donor's state at one layer."""
    by_layer: pd.DataFrame
    """Recovered share by direction, what and layer, with its interval, at any position."""
    threshold: float
    """The run's: a pair with an overlap below it has shifted."""
    shifted: float
    """Share of the patched pairs below the last layer that have shifted."""
    depth: int
    """The deep pass's depth."""
    name: str
    n_questions: int

    @property
    def title(self) -> str:
        """A short name for a heading."""
        return "Causal patching: does a shift cause the changed output?"

    @property
    def table(self) -> pd.DataFrame:
        """A row per direction, place and what, all positions together."""
        return self.effects[self.effects["role"] == "any"].drop(columns="role").reset_index(drop=True)

    @property
    def causes(self) -> bool:
        """Whether a shifted state carries its output in both directions, beyond both controls (C16)."""
        beyond = [interval for controls in self.beyond.values() for interval in controls.values()]
        there = [*self.recovered.values(), *beyond]
        return len(self.recovered) == len(DIRECTIONS) and all(interval.low > 0 for interval in there)

    @property
    def verdict(self) -> str:
        """Whether a shifted state carries its depth's output, and whether a shift matters beyond its size."""
        words = "It is not shown that a shifted state carries its depth's output"
        if self.causes:
            words = "A shifted state carries its depth's output, in both directions"
        if not self.recovered:
            words = "No patched pair has shifted"
        words += f". {questions_words(self.n_questions)}, depth 1 against depth {self.depth}"
        shares = [f"{part.text(percent=True)} by {WORDS[way]}" for way, part in self.recovered.items()]
        words += f"; recovered of the logit difference: {', '.join(shares)}" if shares else ""
        extra = self.beyond_size
        if extra is None:
            return f"{words}. Whether a shift matters beyond its size is not testable: {self.why_not}."
        than = "more than" if extra.low > 0 else "less than" if extra.high < 0 else "about as much as"
        return f"{words}. At equal size a shifted state does {than} a stable one: {extra.text()} in log KL."

    def figure(self) -> go.Figure:
        """Recovered share by patched layer, `back`, beside the controls of the same size."""
        rows = self.by_layer[self.by_layer["direction"] == "back"]
        series = {name: rows[rows["what"] == what].sort_values("last") for what, name in SERIES.items()}
        columns = ["last", "recovered", "recovered_low", "recovered_high"]
        drawn = [Line(name, *(own[c] for c in columns)) for name, own in series.items() if len(own)]
        return lines(
            "What one layer's state carries (depth 1's state into the deep pass)",
            self._subtitle, LAYER, "recovered share<br>of the logit difference", drawn,
        )  # fmt: skip

    def figures(self) -> dict[str, go.Figure]:
        """by_layer; map_back, map_forward (layer by position); places; answers."""
        drawn = {"by_layer": self.figure()}
        for way, values in self.effect_map.items():
            title = f"Effect map, {way}: recovered share by layer and position"
            drawn[f"map_{way}"] = matrix(values, title, self._subtitle, "recovered share", zmin=0, zmax=1)
        return drawn | {"places": self._places("recovered"), "answers": self._places("answer_changed")}

    def _places(self, measure: str) -> go.Figure:
        """One measure of every place and control, all positions together."""
        rows = self.table[self.table["what"] != "stranger"].dropna(subset=[measure])
        shown = [
            Dot(
                f"{row['place']}, {row['what']}", str(row["direction"]),
                row[measure], row[f"{measure}_low"], row[f"{measure}_high"],
            )
            for row in rows.to_dict("records")
        ]  # fmt: skip
        figure = dots("What follows a patch, by place", self._subtitle, AXES[measure], shown, 0)
        return figure.update_layout(height=640)

    @property
    def _subtitle(self) -> str:
        return f"{self.name}, depth 1 against depth {self.depth}; {questions_words(self.n_questions)}"


def patching(rows: pd.DataFrame, resamples: int = RESAMPLES, seed: int = 0) -> Patching:
    """Shares, differences and the regression from the rows of `patch_run`.

    Args:
        rows: one per question, position, direction and patch; its `attrs` has the plan (threshold, depth).

    Raises:
        Untestable: there are no rows.
        SSTError: a column is missing.
    """
    if rows.empty:
        raise Untestable("nothing was patched")
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
        differ = whole[whole["answers_differ"] == 1].assign(one=1.0)
        if len(differ):
            answers[direction] = share(differ, "answer_donors", "one", resamples, seed)
    slope, extra, why = None, None, None
    try:
        slope, extra = size_regression(pairs)
    except Untestable as error:
        why = error.message
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
    by_what = {what: rows[rows["what"] == what].groupby("question") for what in ("state", control)}
    parts = [grouped[["toward", "apart"]].sum() for grouped in by_what.values()]
    both = pd.concat(parts, axis=1).fillna(0.0).to_numpy(dtype=float)
    return cluster_bootstrap(
        both, lambda totals: ratio(totals[..., :2]) - ratio(totals[..., 2:]), resamples, seed=seed
    )


def size_regression(pairs: pd.DataFrame) -> tuple[Interval, Interval]:
    """Log KL = a(layer, direction) + b log(size) + c shifted, by least squares: (b, c).

    Every (layer, direction) has its own mean, so that a layer that shifts often and matters much does not
    look like an effect of shifting. Changes without effect or size have no logarithm and are left out.

    Raises:
        Untestable: all or no pairs have shifted, or size and shift cannot be told apart.
    """
    used = pairs[(pairs["kl"] > 0) & (pairs["size"] > 0)]
    shifted = used["shifted"] > 0
    if not len(used) or shifted.all() or not shifted.any():
        raise Untestable(f"{'every' if len(used) and shifted.all() else 'no'} patched pair has shifted")
    columns = pd.DataFrame(
        {"size": np.log(used["size"]), "shifted": shifted.astype(float), "effect": np.log(used["kl"])}
    )
    columns = columns - columns.groupby([used["direction"], used["last"]]).transform("mean")
    x, y = columns[["size", "shifted"]].to_numpy(dtype=float), columns["effect"].to_numpy(dtype=float)
    sums = np.stack([x[:, 0] ** 2, x[:, 0] * x[:, 1], x[:, 1] ** 2, x[:, 0] * y, x[:, 1] * y], axis=1)
    per_question = pd.DataFrame(sums).groupby(used["question"].to_numpy()).sum().to_numpy(dtype=float)

    def coefficient(which: int, totals: np.ndarray) -> np.ndarray:
        ss, sx, xx, sy, xy = np.moveaxis(totals, -1, 0)
        determinant = ss * xx - sx**2
        top = (xx * sy - sx * xy) if which == 0 else (ss * xy - sx * sy)
        known = determinant > 1e-9 * ss * xx
        return np.divide(top, determinant, out=np.full(np.shape(top), np.nan), where=known)

    slope, extra = (jackknife_t(per_question, partial(coefficient, which)) for which in (0, 1))
    if not np.isfinite(extra.estimate):
        raise Untestable("size and shift go together without exception")
    return slope, extra


MEASURES = {
    "recovered": ("toward", "apart"),
    "kl": ("kl", "one"),
    "token_changed": ("token_changed", "one"),
    "later_changed": ("later_changed", "written"),
    "answer_changed": ("answer_changed", "answered"),
    "answer_followed": ("followed", "differ"),
}
"""Measure -> the column of its numerator, and of its denominator."""


def _measured(
    rows: pd.DataFrame, by: Sequence[str], measures: Sequence[str], resamples: int, seed: int
) -> pd.DataFrame:
    """A row per group with its measures."""
    written = rows["continued"].astype(float)
    differ = written * (rows["answers_differ"] == 1)
    whole = rows.assign(
        one=1.0, written=written, differ=differ, followed=differ * rows["answer_donors"].fillna(0),
        answered=written * rows["answer_changed"].notna(),
    )  # fmt: skip
    records = []
    for names, own in whole.groupby(list(by), sort=False, observed=True):
        sums = own.groupby("question")[[column for name in measures for column in MEASURES[name]]].sum()
        totals = sums.to_numpy(dtype=float).reshape(len(sums), len(measures), 2)
        ends = bootstrap_ends(totals, resamples=resamples, seed=seed)
        record = dict(zip(by, names, strict=True))
        for name, *three in zip(measures, *ends, strict=True):
            record |= dict(zip((name, f"{name}_low", f"{name}_high"), map(float, three), strict=True))
        records.append(record | {"size": float(own["size"].median()), "questions": len(sums)})
    return pd.DataFrame(records)


def _effects(rows: pd.DataFrame, top: int, resamples: int, seed: int) -> pd.DataFrame:
    keep = rows[(rows["place"] != "layer") | (rows["last"] < top)]
    by = ["direction", "place", "what", "role"]
    whole = pd.concat([keep.assign(role="any"), keep], ignore_index=True)
    return _measured(whole, by, tuple(MEASURES), resamples, seed)


def _map(single: pd.DataFrame, direction: str) -> pd.DataFrame:
    own = single[(single["direction"] == direction) & (single["what"] == "state")]
    sums = own.groupby(["position", "last"])[["toward", "apart"]].sum()
    values = pd.Series(ratio(sums.to_numpy(dtype=float)), index=sums.index).unstack("last")
    values.index.name, values.columns.name = "position", "layer"
    return values
