"""Does a latent memory help in-context recall? Decoders of a few layers trained from scratch, with and
without.

All arms of a seed start from the same weights and see the same sequences (`sst_interp.pretraining`), so that
differences are taken within a seed. The unit is a seed. Accuracy is that of *sequential* evaluation, the
definition. Who cannot recall can still guess among the n values shown, which is right once in n; and who
leaves out those that were the answer to an earlier question is right (1 + 1/2 + ... + 1/n) / n of the time.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go

from sst_interp.analyses.plots import Line, empty_figure, lines
from sst_interp.analyses.pretraining import AGAINST, SEQUENTIAL, ZERO
from sst_interp.analyses.result import Result
from sst_interp.analyses.statistics.seeds import OverSeeds, over_seeds, seeds_words


@dataclass(frozen=True, eq=False)
class RecallAccuracy(Result):
    """Accuracy by number of pairs, layers and arm. Intervals are over seeds; numbers of layers stay apart."""

    scores: pd.DataFrame = field(default_factory=pd.DataFrame)
    """A row per layers, arm, evaluation and number of pairs: `seeds`, `answers` (of a seed), `accuracy` with
    `_low` and `_high`, its `lowest` and `highest` seed, `loss` (nats per answer), `guess` and `excluding`
    (the two ways to guess), and `steps`, `position_passes`, `seconds` and `parameters` of the training."""
    differences: pd.DataFrame = field(default_factory=pd.DataFrame)
    """A row per layers, arm with a memory, what it is compared with (`minus`: a baseline, or `zero memory`)
    and number of pairs: `equal`, `seeds` that have both, and `difference` of accuracies with `_low` and
    `_high`."""
    not_testable: str | None = None
    """Why there is no result; None if there is one."""

    @property
    def title(self) -> str:
        """What was asked."""
        return "In-context recall with a latent memory"

    @property
    def table(self) -> pd.DataFrame:
        """A row per layers, arm, evaluation and number of pairs."""
        return self.scores

    @property
    def verdict(self) -> str:
        """By layers, at the largest number of pairs: every arm's accuracy, and differences within seeds."""
        if self.not_testable:
            return f"not testable: {self.not_testable}."
        return " ".join(self._sentence(int(layers)) for layers in sorted(self.scores["layers"].unique()))

    def _sentence(self, layers: int) -> str:
        rows = self.scores[(self.scores["layers"] == layers) & (self.scores["evaluated"] == SEQUENTIAL)]
        n = int(rows["pairs"].max())
        at = rows[rows["pairs"] == n].to_dict("records")
        seeds = seeds_words(max(int(row["seeds"]) for row in at))
        words = f"{_layers(layers)}, {n} pairs, {seeds} (a guess among the values shown: {1 / n:.0%}, "
        words += f"among those not yet an answer: {excluding(n):.0%}): "
        words += ", ".join(f"{row['arm']} {row['accuracy']:.0%}" for row in at)
        found = self.differences
        found = found[(found["layers"] == layers) & (found["pairs"] == n)] if len(found) else found
        for row in found.to_dict("records"):
            d = OverSeeds(
                *(row[f"difference{end}"] for end in ("", "_low", "_high")), np.nan, np.nan, int(row["seeds"])
            )
            what = (
                f"at {row['equal']}" if row["minus"] != ZERO else "over the same weights without the memory"
            )
            words += f"; {row['arm']} {what} {percent(d)} ({_said(d)})"
        return words + ("." if len(found) else "; not testable: nothing to compare with.")

    def figure(self) -> go.Figure:
        """Accuracy by number of pairs with the most layers."""
        return list(self.figures().values())[-1]

    def figures(self) -> dict[str, go.Figure]:
        """Accuracy by number of pairs, a figure per number of layers."""
        if self.scores.empty:
            return {"figure": empty_figure(self.title, f"not testable: {self.not_testable}")}
        drawn = {}
        for layers, own in self.scores.groupby("layers"):
            own = own[own["evaluated"] == SEQUENTIAL]
            series = [
                Line(str(arm), r["pairs"], r["accuracy"], r["accuracy_low"], r["accuracy_high"])
                for arm, r in own.groupby("arm", sort=False)
            ]
            guess = own.drop_duplicates("pairs").sort_values("pairs")
            nothing = np.full(len(guess), np.nan)
            for name, words in (
                ("guess", "a guess"),
                ("excluding", "a guess among values not yet an answer"),
            ):
                series.append(Line(words, guess["pairs"], guess[name], nothing, nothing))
            n = seeds_words(int(own["seeds"].max()))
            subtitle = f"{_layers(int(str(layers)))}; {n}; bands: 95% over seeds"
            drawn[_layers(int(str(layers)))] = lines(
                "Recall by number of pairs",
                subtitle,
                "pairs in the sequence",
                "right answers",
                series,
                percent=True,
            )
        return drawn


def recall_accuracy(table: pd.DataFrame) -> RecallAccuracy:
    """Accuracy of every arm, and differences within seeds.

    Args:
        table: of a study: layers, seed, arm, evaluated, pairs, answers, right, loss (sums), steps,
            position_passes, seconds, parameters. Trainings with a loss that is not finite are left out.

    Returns:
        The result; one whose verdict begins "not testable:" if there is no such training.
    """
    found = RecallAccuracy()
    if table.empty:
        return replace(found, not_testable="no training is in the table")
    of = ["layers", "seed", "arm"]
    bad = table.loc[~np.isfinite(table["loss"].to_numpy(dtype=float)), of]
    table = table[~pd.MultiIndex.from_frame(table[of]).isin(pd.MultiIndex.from_frame(bad))]
    if table.empty:
        return replace(found, not_testable="no training has finite losses")
    table = table.assign(accuracy=table["right"] / table["answers"], loss=table["loss"] / table["answers"])
    cost = ["loss", "steps", "position_passes", "seconds", "parameters"]
    by = ["layers", "arm", "evaluated", "pairs"]
    records = []
    for names, own in table.groupby(by, sort=False):
        d = over_seeds(own["accuracy"].to_numpy())
        record: dict[str, Any] = dict(zip(by, names, strict=True)) | {"seeds": d.n} | d.columns("accuracy")
        record |= {"lowest": d.lowest, "highest": d.highest, "guess": 1 / record["pairs"]}
        record["excluding"] = excluding(int(record["pairs"]))
        record |= {"answers": int(own["answers"].max())}
        records.append(record | own[cost].mean().to_dict())
    return replace(found, scores=pd.DataFrame(records), differences=_differences(table))


def excluding(pairs: int) -> float:
    """Share of right answers of a guess among the values that were not an answer yet."""
    return sum(1 / left for left in range(1, pairs + 1)) / pairs


def percent(d: OverSeeds) -> str:
    """`+31% [+12%, +50%]`."""
    ends = f" [{d.low:+.0%}, {d.high:+.0%}]" if np.isfinite(d.low) else ""
    return f"{d.mean:+.0%}{ends}"


def _differences(table: pd.DataFrame) -> pd.DataFrame:
    records = []
    for (layers, n), own in table.groupby(["layers", "pairs"]):
        by_seed = own.set_index(["arm", "evaluated", "seed"])["accuracy"].sort_index()
        arms = [arm for arm in dict.fromkeys(own["arm"]) if arm not in AGAINST]
        for arm in arms:
            pairs = [(b, (b, SEQUENTIAL), equal) for b, equal in AGAINST.items()]
            for minus, key, equal in [*pairs, (ZERO, (arm, ZERO), "weights")]:
                if key not in by_seed.index.droplevel("seed"):
                    continue
                d = (by_seed.loc[(arm, SEQUENTIAL)] - by_seed.loc[key]).dropna()
                if len(d):
                    about = {"layers": layers, "arm": arm, "minus": minus, "equal": equal, "pairs": n}
                    records.append(about | {"seeds": len(d)} | over_seeds(d.to_numpy()).columns("difference"))
    return pd.DataFrame(records)


def _said(d: OverSeeds) -> str:
    if not np.isfinite(d.low):
        return "one seed"
    if d.low <= 0 <= d.high:
        return "no difference is shown"
    return "better" if d.low > 0 else "worse"


def _layers(n: int) -> str:
    return f"{n} layer{'s' * (n > 1)}"
