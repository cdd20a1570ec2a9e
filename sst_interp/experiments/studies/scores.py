"""Ways to train against one another: scores over seeds, and differences within a seed.

All arms of a seed start from the same weights and see the same data (`study.TrainingStudy`), so that
differences are taken within a seed. The unit is a seed. The score that counts is that of the definition,
token by token; what the same weights score when states are computed otherwise stands beside it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import cycle
from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go

from sst_interp.analyses.plots import Dot, canvas, dots, error_bars
from sst_interp.analyses.result import Result
from sst_interp.analyses.statistics.bootstrap import over_seeds, seeds_words
from sst_interp.errors import Untestable
from sst_interp.experiments.studies.show import COLOURS, groups_of, spread

ENDS = ("", "_low", "_high")


@dataclass(frozen=True)
class Design:
    """What a study's table of scores holds, and what is compared with what."""

    title: str
    unit: str
    """Of the score that is compared."""
    measures: Mapping[str, tuple[str, str, float]]
    """Name -> (column of sums, column that counts, divisor): sum / count / divisor. The first is compared."""
    arms: tuple[str, ...]
    """The order in which arms are shown."""
    against: Mapping[str, str]
    """Arm that others are compared with -> how it is called."""
    baseline: str
    """Arm whose step the others' steps are timed against."""
    definition: str = "sequential"
    """The evaluation that counts."""
    readings: Mapping[str, str] = field(default_factory=dict)
    """Other evaluations of the same weights that are compared with it -> how they are called."""
    exact: str | None = None
    """One of `against` that is compared with the others of them, too."""
    settings: tuple[str, ...] = ()
    """Columns that are never pooled."""
    x: str | None = None
    """One more of them, along which figures are drawn."""
    setting_words: Callable[..., str] = lambda *_: ""
    """The values of `settings`, in words."""
    along: Mapping[str, str] = field(default_factory=dict)
    """Column of positions or steps -> its axis: the loss is shown along it."""
    cost: tuple[str, ...] = ()
    """Columns that say what a training was and cost."""
    guesses: Mapping[str, Callable[[int], float]] = field(default_factory=dict)
    """Way to guess -> the score that it gets at a value of `x`."""
    percent: bool = False
    """The score is a share of right answers, and higher is better."""

    @property
    def score(self) -> str:
        """The measure that is compared."""
        return next(iter(self.measures))

    @property
    def by(self) -> list[str]:
        """Columns that are never pooled, `x` among them."""
        return [*self.settings, *([self.x] if self.x else [])]


@dataclass(frozen=True, eq=False)
class ArmScores(Result):
    """Scores of every arm. Intervals are over seeds; settings are never pooled."""

    design: Design
    finals: pd.DataFrame
    """A row per setting, arm and evaluation: `seeds`; each measure with `_low` and `_high`; `lowest` and
    `highest` score of a seed; the cost of the training; `ratio`, median time of a step over one of the
    baseline in the same round (NaN where times were not measured)."""
    differences: pd.DataFrame
    """A row per setting, arm, and what its score is compared with (`minus`: another arm, or another
    evaluation of the `same` weights), over the `seeds` that have both: the difference of each measure with
    `_low` and `_high`, and `passes`, position passes of its training over those of the other."""
    seeds: pd.DataFrame
    """A row per setting, seed and arm: the score."""
    curves: dict[str, pd.DataFrame]
    """Column of `Design.along` -> a row per setting, arm and its value: the score, all seeds together."""

    @property
    def title(self) -> str:
        """What was asked."""
        return self.design.title

    @property
    def table(self) -> pd.DataFrame:
        """A row per setting, arm and evaluation."""
        return self.finals

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready; the design is code, and is left out."""
        return {name: value for name, value in super().to_dict().items() if name != "design"}

    @property
    def defined(self) -> pd.DataFrame:
        """The rows of `finals` under the evaluation that counts."""
        return self.finals[self.finals["evaluated"] == self.design.definition]

    def beside(self) -> pd.DataFrame:
        """`defined` with more of its arm: `own_` score as trained, `behind_` difference from exact training,
        each with its ends; NaN where there is none.
        """
        columns, by = [f"{self.design.score}{end}" for end in ENDS], [*self.design.settings, "arm"]
        own = self.finals[self.finals["evaluated"] == "own"]
        behind = self.differences.reindex(columns=[*by, "minus", *columns])
        rows = self.defined
        for name, others in (("own", own), ("behind", behind[behind["minus"] == self.design.exact])):
            renamed = others[[*by, *columns]].rename(columns={c: f"{name}_{c}" for c in columns})
            rows = rows.merge(renamed, how="left", on=by)
        return rows

    def treated(self) -> pd.DataFrame:
        """The differences of all arms but those that others are compared with."""
        if self.differences.empty:
            return self.differences
        return self.differences[~self.differences["arm"].isin(self.design.against)]

    @property
    def verdict(self) -> str:
        """Setting by setting: which arms are worse or better than what they are compared with."""
        if self.differences.empty:
            return "Not testable: there are no two trainings of a seed to compare."
        by = groups_of(self.differences, self.design.settings)
        return " ".join(self._told(rows, setting) for setting, rows in by)

    def _told(self, rows: pd.DataFrame, setting: tuple) -> str:
        design = self.design
        head = [words] if (words := design.setting_words(*setting)) else []
        last = rows[design.x].max() if design.x else 0
        if design.x:
            head.append(f"{last} {design.x}")
            rows = rows[rows[design.x] == last]
        head.append(seeds_words(int(rows["seeds"].max())))
        told = []
        for minus, words in {**design.against, **design.readings}.items():
            own = rows[rows["minus"] == minus]
            told += self._against(own[~own["arm"].isin(design.against) | (own["arm"] == design.exact)], words)
        if design.guesses:
            shares = " or ".join(f"{of(int(last)):.0%}" for of in design.guesses.values())
            told.append(f"A guess is right in {shares}.")
        return f"{', '.join(head)}: " + " ".join(told)

    def _against(self, rows: pd.DataFrame, other: str) -> list[str]:
        """Which arms are worse than, better than, and not known to differ from one other."""
        if rows.empty:
            return [f"No seed has a training to compare with {other}."]
        low, high = (rows[f"{self.design.score}{end}"] for end in ("_low", "_high"))
        known, same = np.isfinite(low), (low <= 0) & (high >= 0)
        worse = (low > 0) != self.design.percent
        kinds = {
            f"Worse than {other}": known & ~same & worse,
            f"Better than {other}": known & ~same & ~worse,
            f"No difference from {other} is shown": same,
        }
        sentences = []
        for kind, which in kinds.items():
            own = rows[which]
            if which is not same:  # the largest difference first
                own = own.sort_values(self.design.score, key=lambda score: -score.abs(), kind="stable")
            if own.empty:
                continue
            first, *others = own.to_dict("records")
            number = f" ({self.text(first)})" if which is not same or not others else ""
            names = "; ".join([f"{first['arm']}{number}", *(row["arm"] for row in others)])
            sentences.append(f"{kind}: {names}.")
        for row in rows[~known].head(1).to_dict("records"):
            sentences.append(f"One seed has no interval: {row['arm']} against {other} {self.text(row)}.")
        return sentences

    def text(self, row: Mapping[Any, Any]) -> str:
        """The difference of a row, in the unit of the score."""
        words = spread(row, self.design.score, "+.0%" if self.design.percent else "+.3g")
        words += "" if np.isfinite(row[f"{self.design.score}_low"]) else " (one seed)"
        return words if self.design.percent else f"{words} {self.design.unit}"

    def figure(self) -> go.Figure:
        """Score by arm; along `x` where there is one, with the most of the other setting."""
        return list(self.figures().values())[-1] if self.design.x else self._dots()

    def figures(self) -> dict[str, go.Figure]:
        """Scores, and for every setting the score along steps, positions or `x`."""
        design, words = self.design, self.design.setting_words
        if design.x:
            by = groups_of(self.defined, design.settings)
            return {words(*names): self._along(rows, design.x, design.x, names) for names, rows in by}
        drawn = {"final": self._dots()}
        for column, axis in design.along.items():
            for names, rows in groups_of(self.curves[column], design.settings):
                name = ", ".join(filter(None, (f"by {column}", words(*names))))
                drawn[name] = self._along(rows, column, axis, names)
        return drawn

    def _dots(self) -> go.Figure:
        design = self.design
        rows = self.defined if design.settings else self.finals  # a colour per setting, else per evaluation
        shown = [
            Dot(
                row["arm"],
                design.setting_words(*(row[name] for name in design.settings)) or row["evaluated"],
                *(row[f"{design.score}{end}"] for end in ENDS),
            )
            for row in rows.to_dict("records")
        ]
        about = f"{seeds_words(int(rows['seeds'].max()))}; bars: 95% over seeds"
        return dots("Final score by arm", about, f"{design.score} ({design.unit})", shown)

    def _along(self, rows: pd.DataFrame, column: str, axis: str, names: tuple) -> go.Figure:
        """A line per arm, with bars for intervals where the rows have them."""
        design, seeds = self.design, seeds_words(int(self.finals["seeds"].max()))
        bars, score = f"{design.score}_low" in rows, design.score
        about = f"{seeds}; bars: 95% over seeds" if bars else f"all labels of {seeds}"
        subtitle = "; ".join(filter(None, (design.setting_words(*names), about)))
        y = f"{score}, {design.definition} evaluation ({design.unit})"
        figure = canvas(f"Score by {column}", subtitle, axis, y)
        for (arm, own), colour in zip(rows.groupby("arm", sort=False), cycle(COLOURS), strict=False):
            value, low, high = (own[f"{score}{end if bars else ''}"].to_numpy(dtype=float) for end in ENDS)
            figure.add_scatter(
                x=own[column], y=own[score], name=str(arm), mode="lines+markers", marker={"size": 5},
                line={"color": colour, "dash": "dot" if arm == design.baseline else "solid"},
                error_y=error_bars(value, low, high, colour) if bars else None,
                hovertemplate=f"{arm}, {column} %{{x}}: %{{y:.4f}}<extra></extra>",
            )  # fmt: skip
        at = np.sort(rows[column].unique())
        for words, of in design.guesses.items():
            figure.add_scatter(x=at, y=[of(int(x)) for x in at], name=words, mode="lines")
        figure.update_yaxes(rangemode="tozero", tickformat=".0%" if design.percent else None)
        return figure


def arm_scores(table: pd.DataFrame, design: Design, times: pd.DataFrame | None = None) -> ArmScores:
    """Scores of every arm over seeds, and their differences within seeds.

    Args:
        table: a row per setting, seed, arm and evaluation, with the sums of `design.measures`. A training
            with a loss that is not finite anywhere is left out.
        design: what the table holds. Where there is a column `step`, the last one counts.
        times: a row per round and arm: `seconds` of a step.

    Raises:
        Untestable: no training has finite losses.
    """
    if table.empty:
        raise Untestable("no training is in the table")
    of = [*design.settings, "seed", "arm"]
    bad = table.loc[~np.isfinite(table["loss"].to_numpy(dtype=float)), of]
    table = table[~pd.MultiIndex.from_frame(table[of]).isin(pd.MultiIndex.from_frame(bad))]
    if table.empty:
        raise Untestable("no training has finite losses")
    last = table
    if "step" in table:
        last = table[table["step"] == table.groupby(of)["step"].transform("max")]
    by = [*design.by, "arm", "evaluated"]
    scores = _means(last, [*by, "seed"], design, design.cost)
    ratios, finals = step_ratios(times, design.baseline), []
    for names, own in groups_of(scores, by, sort=False):
        record = dict[str, Any](zip(by, names, strict=True)) | {"seeds": len(own)}
        for name in design.measures:
            record |= over_seeds(own[name].to_numpy(dtype=float)).columns(name)
        record |= {"lowest": own[design.score].min(), "highest": own[design.score].max()}
        record |= own[list(design.cost)].mean().to_dict()
        finals.append(record | {"ratio": ratios.get(record["arm"], np.nan)})
    rank = {arm: k for k, arm in enumerate(design.arms)}
    finals.sort(key=lambda row: ([row[name] for name in design.settings], rank.get(row["arm"], len(rank))))
    counted = scores.reset_index()
    counted = counted[counted["evaluated"] == design.definition]
    curves = {}
    for column in design.along:
        rows = table if column == "step" else last
        rows = rows[rows["evaluated"] == design.definition]
        curves[column] = _means(rows, [*design.settings, "arm", column], design, ()).reset_index()
    seeds = counted[[*design.by, "seed", "arm", design.score]]
    return ArmScores(design, pd.DataFrame(finals), _differences(scores, design), seeds, curves)


def step_ratios(times: pd.DataFrame | None, baseline: str) -> dict[str, float]:
    """Arm -> median over rounds of the time of a step over one of the baseline in the same round."""
    if times is None or times.empty or baseline not in set(times["arm"]):
        return {}
    wide = times.pivot(index="round", columns="arm", values="seconds")
    return {str(arm): float(v) for arm, v in wide.div(wide[baseline], axis=0).median().items()}


def _means(rows: pd.DataFrame, by: list[str], design: Design, cost: Sequence[str]) -> pd.DataFrame:
    """Every measure, and the costs, of each group of rows; those that count nothing are left out."""
    columns = list(dict.fromkeys(c for top, bottom, _ in design.measures.values() for c in (top, bottom)))
    groups = rows.groupby(by, sort=False)
    sums = groups[columns].sum()
    means = groups[list(cost)].first() if cost else pd.DataFrame(index=sums.index)
    for name, (top, bottom, divisor) in design.measures.items():
        means[name] = sums[top] / sums[bottom] / divisor
    return means[sums[design.measures[design.score][1]] > 0]


def _differences(scores: pd.DataFrame, design: Design) -> pd.DataFrame:
    """Within seeds: the definition's score of an arm minus whatever it is compared with."""
    records, rows = [], scores.reset_index()
    for names, own in groups_of(rows, design.by):
        by_seed = {key: part.set_index("seed") for key, part in own.groupby(["arm", "evaluated"], sort=False)}
        for arm in dict.fromkeys(own["arm"]):
            others = [(other, (other, design.definition)) for other in design.against if other != arm]
            others += [(reading, (arm, reading)) for reading in design.readings]
            for minus, key in others:
                if (arm, design.definition) not in by_seed or key not in by_seed:
                    continue
                a, b = by_seed[arm, design.definition], by_seed[key]
                both = a.index.intersection(b.index)
                if both.empty:
                    continue
                record = dict(zip(design.by, names, strict=True)) | {"arm": arm, "minus": minus}
                record |= {"same": minus in design.readings, "seeds": len(both)}
                for name in design.measures:
                    record |= over_seeds((a[name] - b[name])[both].to_numpy(dtype=float)).columns(name)
                if "position_passes" in design.cost:
                    record["passes"] = float((a["position_passes"] / b["position_passes"])[both].mean())
                records.append(record)
    return pd.DataFrame(records)
