"""Does a latent memory help a small decoder that is pretrained on text? At equal steps, and at equal compute.

All arms of a seed start from the same weights and see the text in the same order (`sst_interp.pretraining`),
so that differences are taken within a seed. The unit is a seed. The loss is that of *sequential* evaluation,
the definition; with a memory of zeros stands beside it, as a control.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go

from sst_interp.analyses.plots import Dot, dots, empty_figure
from sst_interp.analyses.result import Result
from sst_interp.analyses.statistics.seeds import OverSeeds, over_seeds, seeds_words

BASELINE, LONGER = "baseline", "baseline, equal compute"
SEQUENTIAL, ZERO, OWN = "sequential", "zero memory", "own"
AGAINST = {BASELINE: "equal steps", LONGER: "equal compute"}
"""Baseline -> what is equal."""


@dataclass(frozen=True, eq=False)
class Pretraining(Result):
    """Held-out losses of decoders with and without a latent memory. Intervals are over seeds."""

    finals: pd.DataFrame = field(default_factory=pd.DataFrame)
    """A row per arm and evaluation: `seeds`; held-out `loss` (nats per token) and `bits` (bits per byte),
    each with `_low` and `_high`; `steps`, `position_passes`, processor `seconds` and `parameters` of the
    training; `gamma` at its end (mean size); `ratio`, median time of a step over one of the baseline."""
    differences: pd.DataFrame = field(default_factory=pd.DataFrame)
    """A row per arm with a memory and what its sequential loss is compared with (`minus`: a baseline, or
    another evaluation of the same weights), over the seeds that have both: `equal`, `seeds`, `difference` in
    nats per token and `difference_bits` in bits per byte with `_low` and `_high`, and `passes`: position
    passes of its training over those of the other."""
    positions: pd.DataFrame = field(default_factory=pd.DataFrame)
    """A row per arm, evaluation and bin of positions (named by its first): `loss`, all seeds together."""
    not_testable: str | None = None
    """Why there is no result; None if there is one."""

    @property
    def title(self) -> str:
        """What was asked."""
        return "Pretraining with a latent memory"

    @property
    def table(self) -> pd.DataFrame:
        """A row per arm and evaluation."""
        return self.finals

    def compared(self, arm: str, minus: str) -> Mapping[Any, Any] | None:
        """The row of `differences` of an arm against a baseline or another evaluation, if there is one."""
        rows = self.differences
        if rows.empty:
            return None
        found = rows[(rows["arm"] == arm) & (rows["minus"] == minus)].to_dict("records")
        return found[0] if found else None

    @property
    def verdict(self) -> str:
        """Arm by arm: against both baselines, and without its memory."""
        if self.not_testable:
            return f"not testable: {self.not_testable}."
        arms = [arm for arm in dict.fromkeys(self.finals["arm"]) if arm not in AGAINST]
        sentences = [self._sentence(arm) for arm in arms]
        return " ".join(sentences) if sentences else "not testable: no training had a memory."

    def _sentence(self, arm: str) -> str:
        row = _row(self.finals, arm, SEQUENTIAL)
        words = (
            f"{arm}, {seeds_words(int(row['seeds']))}, sequential evaluation: {row['loss']:.3f} nats per "
            f"token ({row['bits']:.3f} bits per byte)"
        )
        for minus, equal in AGAINST.items():
            found = self.compared(arm, minus)
            if found is None:
                words += f"; at {equal} not testable: no seed has both trainings"
                continue
            d = _over(found, "difference")
            words += f"; against the baseline at {equal} {d.text('+')} nats ({said(d)})"
        memory = self.compared(arm, ZERO)
        if memory is not None:
            d = _over(memory, "difference")
            words += f"; {d.text('+')} nats against the same weights with a memory of zeros ({used(d)})"
        return words + "."

    def figure(self) -> go.Figure:
        """Held-out loss by arm, sequential evaluation and with a memory of zeros."""
        if self.finals.empty:
            return empty_figure(self.title, f"not testable: {self.not_testable}")
        rows = [
            Dot(row["arm"], row["evaluated"], row["loss"], row["loss_low"], row["loss_high"])
            for row in self.finals.to_dict("records")
            if row["evaluated"] != OWN
        ]
        n = seeds_words(int(self.finals["seeds"].max()))
        return dots("Held-out loss", f"{n}; bars: 95% over seeds", "nats per token", rows)


def pretraining(losses: pd.DataFrame, times: pd.DataFrame | None = None) -> Pretraining:
    """Final held-out losses of every arm, and their differences within seeds.

    Args:
        losses: the table `losses` of a study: seed, arm, evaluated, position, tokens, bytes, loss (sum of
        nats),
            steps, position_passes, seconds, parameters, gamma. Trainings with a loss that is not finite are
            left out.
        times: its table `times`: round, arm, seconds; None or empty leaves `ratio` NaN.

    Returns:
        The result; one whose verdict begins "not testable:" if there is no such training.
    """
    found = Pretraining()
    if losses.empty:
        return replace(found, not_testable="no training is in the table")
    of = ["seed", "arm"]
    bad = losses.loc[~np.isfinite(losses["loss"].to_numpy(dtype=float)), of]
    losses = losses[~pd.MultiIndex.from_frame(losses[of]).isin(pd.MultiIndex.from_frame(bad))]
    if losses.empty:
        return replace(found, not_testable="no training has finite losses")
    by = ["arm", "evaluated", "seed"]
    sums = losses.groupby(by, sort=False)[["tokens", "bytes", "loss"]].sum()
    cost = ["steps", "position_passes", "seconds", "parameters", "gamma"]
    scores = losses.groupby(by, sort=False)[cost].first()
    scores["loss"] = sums["loss"] / sums["tokens"]
    scores["bits"] = sums["loss"] / sums["bytes"] / np.log(2)
    finals, ratios = [], step_ratios(times)
    for (arm, evaluated), own in scores.groupby(["arm", "evaluated"], sort=False):
        record: dict[str, Any] = {"arm": arm, "evaluated": evaluated, "seeds": len(own)}
        for name in ("loss", "bits"):
            record |= over_seeds(own[name].to_numpy()).columns(name)
        finals.append(record | own[cost].mean().to_dict() | {"ratio": ratios.get(str(arm), np.nan)})
    positions = losses.groupby(["arm", "evaluated", "position"], sort=False)[["tokens", "loss"]].sum()
    positions["loss"] /= positions.pop("tokens")
    return replace(
        found,
        finals=pd.DataFrame(finals),
        differences=_differences(scores),
        positions=positions.reset_index(),
    )


def step_ratios(times: pd.DataFrame | None) -> dict[str, float]:
    """Arm -> median over rounds of the time of a step over one of the baseline in the same round."""
    if times is None or times.empty:
        return {}
    table = times.pivot(index="round", columns="arm", values="seconds")
    if BASELINE not in table:
        return {}
    return {str(arm): float((table[arm] / table[BASELINE]).median()) for arm in table}


def said(d: OverSeeds) -> str:
    """What the interval of a difference of losses says: better, worse, or that no difference is shown."""
    if not np.isfinite(d.low):
        return "one seed"
    if d.low <= 0 <= d.high:
        return "no difference is shown"
    return "better" if d.high < 0 else "worse"


def used(d: OverSeeds) -> str:
    """What the loss with the memory minus that without it says."""
    if not np.isfinite(d.low):
        return "one seed"
    if d.low <= 0 <= d.high:
        return "it is not shown that the memory is used"
    return "the memory is used" if d.high < 0 else "the memory does harm"


def _differences(scores: pd.DataFrame) -> pd.DataFrame:
    """Within seeds: sequential evaluation of every arm with a memory minus whatever it is compared with."""
    records = []
    arms = [arm for arm in dict.fromkeys(scores.index.get_level_values("arm")) if arm not in AGAINST]
    scores = scores.sort_index()
    for arm in arms:
        pairs = [(b, (b, SEQUENTIAL), equal) for b, equal in AGAINST.items()]
        pairs += [(name, (arm, name), "weights") for name in (ZERO, OWN)]
        for minus, key, equal in pairs:
            if key not in scores.index.droplevel("seed"):
                continue
            a, b = scores.loc[(arm, SEQUENTIAL)], scores.loc[key]
            both = a.index.intersection(b.index)
            if both.empty:
                continue
            d = a.loc[both, ["loss", "bits"]] - b.loc[both, ["loss", "bits"]]
            passes = float((a["position_passes"] / b["position_passes"])[both].mean())
            record = {"arm": arm, "minus": minus, "equal": equal, "seeds": len(both), "passes": passes}
            record |= over_seeds(d["loss"].to_numpy()).columns("difference")
            records.append(record | over_seeds(d["bits"].to_numpy()).columns("difference_bits"))
    return pd.DataFrame(records)


def _row(finals: pd.DataFrame, arm: str, evaluated: str) -> Mapping[Any, Any]:
    return finals[(finals["arm"] == arm) & (finals["evaluated"] == evaluated)].to_dict("records")[0]


def _over(row: Mapping[Any, Any], name: str) -> OverSeeds:
    low, high = row[f"{name}_low"], row[f"{name}_high"]
    return OverSeeds(row[name], low, high, np.nan, np.nan, int(row["seeds"]))
