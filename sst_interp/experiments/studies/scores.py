"""Ways to train against one another: scores over seeds, and differences within a seed.

All arms of a seed start from the same weights and see the same data (`study.TrainingStudy`), so that
differences are taken within a seed. The unit is a seed. The score that counts is that of the definition,
token by token; what the same weights score when states are computed otherwise stands beside it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go

from sst_interp.analyses.plots import (
    BLUE,
    GREEN,
    GREY,
    ORANGE,
    SKY,
    VERMILLION,
    Dot,
    Line,
    canvas,
    dots,
    lines,
)
from sst_interp.analyses.result import Result
from sst_interp.analyses.statistics.bootstrap import OverSeeds, over_seeds, seeds_words
from sst_interp.errors import Untestable

NO_DIFFERENCE = "No difference from {} is shown"
COLOURS = (BLUE, VERMILLION, GREEN, ORANGE, SKY, GREY)


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

    def row(self, arm: str, evaluated: str | None = None, **setting: Any) -> dict[Any, Any]:
        """One row of `finals`; evaluated None is the definition."""
        wanted = {"arm": arm, "evaluated": evaluated or self.design.definition} | setting
        return _matching(self.finals, wanted).to_dict("records")[0]

    def difference(self, arm: str, minus: str, **setting: Any) -> OverSeeds | None:
        """Score of an arm minus that of another arm, or of another evaluation of its own weights."""
        rows = _matching(self.differences, {"arm": arm, "minus": minus} | setting).to_dict("records")
        return of_row(rows[0], self.design.score) if rows else None

    @property
    def verdict(self) -> str:
        """Setting by setting: which arms are worse or better than what they are compared with."""
        settings = list(self.design.settings)
        groups = self.differences.groupby(settings) if settings and len(self.differences) else None
        if groups is None:
            return self._told(self.differences, ())
        return " ".join(self._told(rows, names) for names, rows in groups)

    def _told(self, rows: pd.DataFrame, setting: tuple) -> str:
        design = self.design
        if rows.empty:
            return "Not testable: there are no two trainings of a seed to compare."
        head = [words] if (words := design.setting_words(*setting)) else []
        if design.x:
            last = rows[design.x].max()
            head.append(f"{last} {design.x}")
            rows = rows[rows[design.x] == last]
        head.append(seeds_words(int(rows["seeds"].max())))
        told = []
        for minus, words in {**design.against, **design.readings}.items():
            own = rows[rows["minus"] == minus]
            own = own[~own["arm"].isin(design.against) | (own["arm"] == design.exact)]
            told += self._against(own, words)
        if design.guesses and design.x:
            shares = " or ".join(f"{of(int(last)):.0%}" for of in design.guesses.values())
            told.append(f"A guess is right in {shares}.")
        return f"{', '.join(head)}: " + " ".join(told)

    def _against(self, rows: pd.DataFrame, other: str) -> list[str]:
        """Which arms are worse than, better than, and not known to differ from one other."""
        if rows.empty:
            return [f"No seed has a training to compare with {other}."]
        said: dict[str, list[tuple[str, OverSeeds]]] = {"worse": [], "better": [], "no": [], "one": []}
        for row in rows.to_dict("records"):
            d = of_row(row, self.design.score)
            if not np.isfinite(d.low):
                said["one"].append((row["arm"], d))
            elif d.low <= 0 <= d.high:
                said["no"].append((row["arm"], d))
            else:
                said["worse" if (d.low > 0) != self.design.percent else "better"].append((row["arm"], d))
        sentences = []
        for kind, start in (("worse", "Worse than {}"), ("better", "Better than {}"), ("no", NO_DIFFERENCE)):
            arms = said[kind] if kind == "no" else sorted(said[kind], key=lambda one: -abs(one[1].mean))
            if arms:
                number = f" ({self.text(arms[0][1])})" if kind != "no" or len(arms) == 1 else ""
                names = "; ".join([f"{arms[0][0]}{number}", *(arm for arm, _ in arms[1:])])
                sentences.append(f"{start.format(other)}: {names}.")
        for arm, d in said["one"][:1]:
            sentences.append(f"One seed has no interval: {arm} against {other} {self.text(d)}.")
        return sentences

    def text(self, d: OverSeeds) -> str:
        """A difference in the unit of the score."""
        return percent(d) if self.design.percent else f"{d.text('+')} {self.design.unit}"

    def figure(self) -> go.Figure:
        """Score by arm; along `x` where there is one, with the most of the other setting."""
        return list(self.figures().values())[-1] if self.design.x else self._dots()

    def figures(self) -> dict[str, go.Figure]:
        """Scores, and for every setting the score along steps and positions."""
        design = self.design
        if design.x:
            groups = self.finals.groupby(list(design.settings))
            return {design.setting_words(*names): self._along_x(names, rows) for names, rows in groups}
        drawn = {"final": self._dots()}
        for column, axis in design.along.items():
            curves = self.curves[column]
            groups = curves.groupby(list(design.settings)) if design.settings else [((), curves)]
            for names, rows in groups:
                words = design.setting_words(*names)
                drawn[f"by {column}, {words}" if words else f"by {column}"] = self._curve(
                    rows, column, axis, words
                )
        return drawn

    def _dots(self) -> go.Figure:
        design, rows = self.design, self.finals
        if design.settings:  # one colour per setting, else one per evaluation
            rows = rows[rows["evaluated"] == design.definition]
        shown = [
            Dot(
                row["arm"],
                design.setting_words(*(row[name] for name in design.settings)) or row["evaluated"],
                *(row[f"{design.score}{end}"] for end in ("", "_low", "_high")),
            )
            for row in rows.to_dict("records")
        ]
        return dots(
            "Final score by arm",
            f"{self._seeds(rows)}; bars: 95% over seeds",
            f"{design.score} ({design.unit})",
            shown,
        )

    def _along_x(self, names: tuple, rows: pd.DataFrame) -> go.Figure:
        design = self.design
        rows = rows[rows["evaluated"] == design.definition]
        columns = [f"{design.score}{end}" for end in ("", "_low", "_high")]
        series = [
            Line(str(arm), own[design.x], *(own[column] for column in columns))
            for arm, own in rows.groupby("arm", sort=False)
        ]
        at = np.sort(rows[design.x].unique())
        nothing = np.full(len(at), np.nan)
        series += [
            Line(words, at, np.array([of(int(x)) for x in at]), nothing, nothing)
            for words, of in design.guesses.items()
        ]
        subtitle = f"{design.setting_words(*names)}; {self._seeds(rows)}; bands: 95% over seeds"
        return lines(design.title, subtitle, str(design.x), design.unit, series, percent=design.percent)

    def _curve(self, rows: pd.DataFrame, column: str, axis: str, words: str) -> go.Figure:
        subtitle = f"{words}; " * bool(words) + f"all labels of {self._seeds(self.finals)}"
        y = f"{self.design.score}, {self.design.definition} evaluation ({self.design.unit})"
        figure = canvas(f"Score by {column}", subtitle, axis, y)
        for (arm, own), colour in zip(rows.groupby("arm", sort=False), COLOURS + COLOURS, strict=False):
            figure.add_scatter(
                x=own[column], y=own[self.design.score], name=str(arm), mode="lines+markers",
                line={"color": colour, "dash": "dot" if arm == self.design.baseline else "solid"},
                marker={"size": 5}, hovertemplate=f"{arm}, {column} %{{x}}: %{{y:.4f}}<extra></extra>",
            )  # fmt: skip
        figure.update_yaxes(rangemode="tozero")
        return figure

    def _seeds(self, rows: pd.DataFrame) -> str:
        return seeds_words(int(rows["seeds"].max()))


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
    for names, own in scores.groupby(by, sort=False):
        record: dict[str, Any] = dict(zip(by, names, strict=True)) | {"seeds": len(own)}
        for name in design.measures:
            record |= over_seeds(own[name].to_numpy(dtype=float)).columns(name)
        record |= {"lowest": own[design.score].min(), "highest": own[design.score].max()}
        finals.append(
            record | own[list(design.cost)].mean().to_dict() | {"ratio": ratios.get(record["arm"], np.nan)}
        )
    rank = {arm: k for k, arm in enumerate(design.arms)}
    finals.sort(key=lambda row: ([row[name] for name in design.settings], rank.get(row["arm"], len(rank))))
    counted = scores.reset_index()
    counted = counted[counted["evaluated"] == design.definition]
    curves = {}
    for column in design.along:
        rows = table if column == "step" else last
        rows = rows[rows["evaluated"] == design.definition]
        curves[column] = _means(rows, [*design.settings, "arm", column], design, ()).reset_index()
    return ArmScores(
        design,
        pd.DataFrame(finals),
        _differences(scores, design),
        counted[[*design.by, "seed", "arm", design.score]],
        curves,
    )


def step_ratios(times: pd.DataFrame | None, baseline: str) -> dict[str, float]:
    """Arm -> median over rounds of the time of a step over one of the baseline in the same round."""
    if times is None or times.empty or baseline not in set(times["arm"]):
        return {}
    wide = times.pivot(index="round", columns="arm", values="seconds")
    return {str(arm): float(v) for arm, v in wide.div(wide[baseline], axis=0).median().items()}


def of_row(row: Mapping[Any, Any], name: str) -> OverSeeds:
    """A number of a table's row with its interval."""
    low, high = row[f"{name}_low"], row[f"{name}_high"]
    return OverSeeds(row[name], low, high, np.nan, np.nan, int(row["seeds"]))


def percent(d: OverSeeds) -> str:
    """`+31% [+12%, +50%]`."""
    ends = f" [{d.low:+.0%}, {d.high:+.0%}]" if np.isfinite(d.low) else " (one seed)"
    return f"{d.mean:+.0%}{ends}"


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
    records = []
    rows = scores.reset_index()
    groups = rows.groupby(design.by) if design.by else [((), rows)]
    for names, own in groups:
        by_seed = {key: part.set_index("seed") for key, part in own.groupby(["arm", "evaluated"], sort=False)}
        for arm in dict.fromkeys(own["arm"]):
            if (arm, design.definition) not in by_seed:
                continue
            others = [(other, (other, design.definition)) for other in design.against if other != arm]
            others += [(reading, (arm, reading)) for reading in design.readings]
            for minus, key in others:
                if key not in by_seed:
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


def _matching(rows: pd.DataFrame, wanted: Mapping[str, Any]) -> pd.DataFrame:
    for column, value in wanted.items() if len(rows) else ():
        rows = rows[rows[column] == value]
    return rows
