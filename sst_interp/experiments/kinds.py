"""Kinds of models on the same questions: how much does depth change the state, and the answers?

    compare_runs(["demo-backbone", "demo", "demo-lrt", "demo-looped"]).verdict

A backbone without a stream computes the same at every depth, so its shares are the noise floor of the
arithmetic. Shares are of (position, layer) pairs between depth (or iteration) 1 and the deepest. The three
comparisons are never pooled, and every interval resamples questions.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import plotly.graph_objects as go

from sst_interp.analyses import plots
from sst_interp.analyses.contrast import PAPER_THRESHOLD, RESOLUTION, Contrast
from sst_interp.analyses.result import Result, pair_words
from sst_interp.analyses.settling import state_settling
from sst_interp.analyses.statistics.bootstrap import (
    LEVEL,
    ONE_QUESTION,
    RESAMPLES,
    Interval,
    as_columns,
    cluster_bootstrap,
    histogram_quantile,
    nothing,
    percent_text,
    questions_words,
    ratio,
    share,
)
from sst_interp.analyses.statistics.modes import grid, to_overlap
from sst_interp.errors import SSTError, Untestable
from sst_interp.models.choices import COMPARISONS
from sst_interp.runs.provenance import kind_words
from sst_interp.runs.store import Run, open_run

AGREE = ("dataset", "depths", "max_new_tokens", "reply_prefix", "dtype", "batch_size")
"""Keys that must be the same in all recipes, so that a share can differ by the kind only."""
ENDS = {
    "shifted": ("low", "high"),
    "median overlap": ("median low", "median high"),
    "shifted at antimode": ("antimode low", "antimode high"),
    "difference": ("difference low", "difference high"),
}
"""Column of `Kinds.shares` -> the columns of its interval's ends."""
SHOWN = 3
"""Most numbers that a verdict states; the table has all."""


class Compared(NamedTuple):
    """One run that is compared."""

    name: str
    kind: str
    """In words: `State Stream Transformer`."""
    contrast: Contrast
    """Of the run, in any comparison. All runs have the same choice of overlap and resampling."""
    no_stream: bool = False
    """Whether every depth computes the same, so that all differences are noise."""


@dataclass(frozen=True, eq=False)
class Kinds(Result):
    """Stable and shifted shares of several runs on the same questions."""

    overlap: str
    """The overlap's name."""
    shares: pd.DataFrame
    """A row per comparison and run, of (1, deepest). `shifted` is the share of pairs with an overlap below
    0.99, `stable` the rest, `shifted at antimode` the share below the run's own antimode (NaN with one mode),
    `identical` the share of bit-identical pairs, and `difference` is `shifted` minus the first run's, over
    the questions that both have (NaN for the first run). `ENDS` names the columns of interval ends."""
    reference: str
    """The run that the others are compared with."""
    floor: str | None = None
    """The run without a stream, if there is one."""
    missing: dict[str, str] = field(default_factory=dict)
    """`comparison, run` -> why it cannot be tested."""

    @property
    def title(self) -> str:
        """A short name for a heading."""
        return "Kinds of models on the same questions"

    @property
    def table(self) -> pd.DataFrame:
        """A row per comparison and run; shares and their interval ends are fractions."""
        return self.shares

    @property
    def shown(self) -> list[dict[str, str]]:
        """The table as commands and documents show it: shares in percent with their intervals."""
        return [_printed(row) for row in self.shares.to_dict("records")]

    @property
    def verdict(self) -> str:
        """How many runs shift unlike the first, in the first comparison with pairs."""
        rows = self.shares[self.shares["comparison"] == self.shares["comparison"].iloc[0]]
        lead = rows.iloc[0]
        others = [row for row in rows.to_dict("records") if row["run"] != self.reference]
        gaps = {row["run"]: _interval(row, "difference") for row in others}
        apart = sum(gap.low > 0 or gap.high < 0 for gap in gaps.values())
        n = questions_words(int(rows["questions"].max()))
        words = f"In {apart} of {_runs(len(gaps))} the shifted share differs from {self.reference}'s. "
        words += f"{n}, {pair_words(lead['comparison'], lead['a'], lead['b'])}"
        words += f"; shifted share minus {self.reference}'s: {_largest(gaps)}" if gaps else ""
        if self.floor is not None:
            words += f". {self.floor} has no stream: its shares are the noise floor"
        if self.missing:
            words += ". Not testable: " + "; ".join(f"{k} ({why})" for k, why in self.missing.items())
        return f"{words}."

    def figure(self) -> go.Figure:
        """Shifted share by comparison and run, with intervals."""
        columns = ("comparison", "shifted", "low", "high")
        dots = [
            plots.Dot(f"{row['comparison']}: {row['kind']} ({row['run']})", *(row[c] for c in columns))
            for row in self.shares.to_dict("records")
        ]
        n, deepest = int(self.shares["questions"].max()), self.shares["b"].max()
        figure = plots.dots(
            "How much depth changes the state, by kind of model",
            f"depth (or iteration) 1 against {deepest}; {questions_words(n)}; bars: 95%, questions resampled",
            f"share of (position, layer) pairs with {self.overlap} overlap below {PAPER_THRESHOLD}",
            dots,
        )
        figure.update_xaxes(tickformat=".0%", rangemode="tozero")
        return figure


def compare_runs(names: Sequence[str | Path], resamples: int = RESAMPLES, seed: int = 0) -> Kinds:
    """Stable and shifted shares by kind. The others are compared with the first run.

    Raises:
        SSTError: as `open_together`.
        Untestable: as `kinds`.
    """
    compared = []
    for run in open_together(names):
        contrast = Contrast.of(run, resamples=resamples, seed=seed)
        compared.append(Compared(run.name, kind_words(run.kind), contrast, run.kind == "backbone"))
    return kinds(compared)


def kinds(runs: Sequence[Compared]) -> Kinds:
    """Compare runs on the same questions. The others are compared with the first.

    Args:
        runs: with the same questions, depths and budgets, which `open_together` checks.

    Returns:
        The result. A run without pairs of a comparison is in `missing`.

    Raises:
        Untestable: no run has pairs of any comparison.
    """
    rows, missing = [], {}
    for comparison in COMPARISONS:
        first: pd.DataFrame | None = None
        for k, run in enumerate(runs):
            try:
                c = run.contrast.to(comparison)
                counts = _below(c)
            except Untestable as error:
                missing[f"{comparison}, {run.name}"] = error.message
                continue
            first = counts if k == 0 else first
            difference = None if k == 0 or first is None else _difference(c, counts, first)
            rows.append(_shares(run, c, difference))
    if not rows:
        raise Untestable("; ".join(missing.values()) or "no runs were given")
    floor = next((run.name for run in runs if run.no_stream), None)
    overlap = runs[0].contrast.kind.replace("_", " ")
    return Kinds(overlap, pd.DataFrame(rows), runs[0].name, floor, missing)


def _shares(run: Compared, c: Contrast, difference: Interval | None) -> dict[str, Any]:
    """The row of one run in one comparison, (1, deepest)."""
    question = c.rows["question"].to_numpy()[c.there]
    order = np.argsort(question, kind="stable")  # the resamples do not depend on the order of rows
    question, values = question[order], c.overlap[c.there][order]
    shifted = share(question, values < PAPER_THRESHOLD, *c.resampling)
    antimode, at_own = c.modes.antimode, None
    if antimode is not None:
        at_own = share(question, values < antimode.estimate, *c.resampling)
    return {
        **{"comparison": c.comparison, "run": run.name, "kind": run.kind, "a": c.a, "b": c.b},
        **{"questions": shifted.n_questions, "pairs": len(values), "stable": 1 - shifted.estimate},
        **_columns("shifted", shifted),
        **_columns("median overlap", _median_overlap(c, float(np.median(values)))),
        **{"modes": str(c.modes.count), "antimode": np.nan if antimode is None else antimode.estimate},
        **_columns("shifted at antimode", at_own),
        **{"identical": (c.rows["relative_l2"].to_numpy()[c.there] == 0).mean()},
        **_columns("difference", difference),
    }


def _median_overlap(c: Contrast, exact: float) -> Interval:
    """The median over pairs; the interval's ends are read off histograms that resolve both ends."""
    resolution = RESOLUTION[c.kind]

    def median(totals: np.ndarray) -> np.ndarray:
        return to_overlap(histogram_quantile(totals, grid(resolution), 0.5), resolution)

    resamples, seed = c.resampling
    rough = cluster_bootstrap(c.histograms, median, resamples, seed=seed)
    return replace(rough, estimate=exact, low=min(rough.low, exact), high=max(rough.high, exact))


def _below(c: Contrast) -> pd.DataFrame:
    """By question: pairs below 0.99, and pairs, of (1, deepest)."""
    counted = pd.DataFrame({"below": c.overlap[c.there] < PAPER_THRESHOLD, "pairs": 1.0})
    return counted.groupby(c.rows["question"].to_numpy()[c.there]).sum().astype(float)


def _difference(c: Contrast, own: pd.DataFrame, first: pd.DataFrame) -> Interval:
    """Share of `own` minus share of `first`, both from the same resamples of their common questions."""
    common = own.index.intersection(first.index)
    if not len(common):
        return nothing("no common questions")
    sums = np.stack([own.loc[common].to_numpy(), first.loc[common].to_numpy()], axis=1)

    def between(totals: np.ndarray) -> np.ndarray:
        shares = ratio(totals)
        return shares[..., 0] - shares[..., 1]

    resamples, seed = c.resampling
    return cluster_bootstrap(sums, between, resamples, seed=seed)


def _columns(name: str, interval: Interval | None) -> dict[str, float]:
    """An interval as three columns of `Kinds.shares`; NaN for None."""
    three = (interval.estimate, interval.low, interval.high) if interval else (np.nan,) * 3
    return dict(zip((name, *ENDS[name]), three, strict=True))


def _interval(row: Mapping[Any, Any], name: str) -> Interval:
    """Three columns of a row as the interval that they were."""
    low, high = (float(row[end]) for end in ENDS.get(name, (f"{name}_low", f"{name}_high")))
    reason = None if low == low else ONE_QUESTION
    return Interval(float(row[name]), low, high, int(row["questions"]), LEVEL, reason)


def _largest(intervals: Mapping[str, Interval]) -> str:
    """The `SHOWN` largest numbers in words, each after its run's name."""
    most = sorted(intervals, key=lambda run: -abs(np.nan_to_num(intervals[run].estimate)))[:SHOWN]
    return ", ".join(f"{run} {intervals[run].text(percent=True)}" for run in intervals if run in most)


def _printed(row: Mapping[Any, Any]) -> dict[str, str]:
    """A row as commands and documents show it: shares in percent with their intervals."""
    own = "no antimode"
    if np.isfinite(row["antimode"]):
        own = f"{_interval(row, 'shifted at antimode').text(percent=True)} at {row['antimode']:.4g}"
    known = np.isfinite(row["difference"])
    return {
        "comparison": row["comparison"],
        "run": row["run"],
        "kind": row["kind"],
        "questions": str(row["questions"]),
        "stable": percent_text(row["stable"]),
        "shifted (below 0.99)": _interval(row, "shifted").text(percent=True),
        "modes": row["modes"],
        "shifted (below the antimode)": own,
        "median overlap": _interval(row, "median overlap").text(digits=4),
        "minus the first": _interval(row, "difference").text(percent=True) if known else "",
    }


@dataclass(frozen=True, eq=False)
class KindsAnswers(Result):
    """Answers by run and depth; intervals resample questions."""

    answers: pd.DataFrame
    """A row per run and depth: run, depth, questions, `read` (share of replies with an answer in them),
    `right` with its ends (share of all questions), and `change` with its ends: right minus right at depth 1,
    on the same questions (NaN at depth 1)."""

    @property
    def title(self) -> str:
        """A short name for a heading."""
        return "Answers by kind and depth"

    @property
    def table(self) -> pd.DataFrame:
        """A row per run and depth."""
        return self.answers

    @property
    def shown(self) -> list[dict[str, str]]:
        """The table as commands and documents show it."""
        return [
            {
                "run": row["run"],
                "depth": str(row["depth"]),
                "questions": str(row["questions"]),
                "an answer can be read": f"{row['read']:.0%}",
                "right": _interval(row, "right").text(percent=True),
                "minus depth 1": "" if row["depth"] == 1 else _interval(row, "change").text(percent=True),
            }
            for row in self.answers.to_dict("records")
        ]

    @property
    def verdict(self) -> str:
        """In how many runs depth changes accuracy, and in which most replies lose their answer."""
        last = self.answers.groupby("run", sort=False).tail(1)
        rows = {row["run"]: row for row in last[last["depth"] > 1].to_dict("records")}
        changes = {run: _interval(row, "change") for run, row in rows.items()}
        told = sum(change.low > 0 or change.high < 0 for change in changes.values())
        words = f"The deepest depth changes accuracy in {told} of {_runs(len(rows))}. "
        words += questions_words(int(last["questions"].max()))
        words += f"; right answers minus those at depth 1: {_largest(changes)}."
        if silent := [run for run, row in rows.items() if row["read"] < 0.5]:
            words += f" Most replies of {', '.join(silent)} have no answer to read."
        return words

    def figure(self) -> go.Figure:
        """Accuracy by depth, a line per run."""
        series = [
            plots.Line(str(run), own["depth"], own["right"], own["right_low"], own["right_high"])
            for run, own in self.answers.groupby("run", sort=False)
        ]
        n = questions_words(int(self.answers["questions"].max()))
        return plots.lines(
            "Right answers by depth", f"{n}; bands: 95%, questions resampled", "iteration depth",
            "share of questions answered rightly", series, percent=True,
        )  # fmt: skip


def answers_of(names: Sequence[str | Path], resamples: int = RESAMPLES, seed: int = 0) -> KindsAnswers:
    """Accuracy by depth of each run.

    Raises:
        SSTError: as `open_together`.
        Untestable: as `kinds_answers`.
    """
    return kinds_answers({run.name: run.questions for run in open_together(names)}, resamples, seed)


def kinds_answers(
    questions: Mapping[str, pd.DataFrame], resamples: int = RESAMPLES, seed: int = 0
) -> KindsAnswers:
    """Answers of several runs.

    Args:
        questions: by run, its `questions` table.

    Raises:
        Untestable: no run has answers at a depth beyond 1.
    """
    records = []
    for run, table in questions.items():
        right = table.pivot(index="question", columns="depth", values="correct").astype(float)
        for depth in right.columns:
            own = table[table["depth"] == depth]
            correct = right[depth].to_numpy()
            change = np.stack([correct - right[1].to_numpy(), np.ones(len(correct))], axis=1)
            moved = cluster_bootstrap(change, resamples=resamples, seed=seed)
            record = {"run": run, "depth": int(depth), "questions": len(right)}
            record["read"] = float(own["answer"].notna().mean())
            records.append(
                record
                | as_columns(
                    right=share(right.index.to_numpy(), correct, resamples, seed),
                    change=nothing("depth 1") if depth == 1 else moved,
                )
            )
    if not any(record["depth"] > 1 for record in records):
        raise Untestable("there are answers at one depth only" if records else "there are no answers")
    return KindsAnswers(pd.DataFrame(records))


@dataclass(frozen=True, eq=False)
class KindsSettling(Result):
    """Whether the state of each run's deepest pass settles; intervals resample questions."""

    paces: pd.DataFrame
    """A row per run: `questions`, median relative change in the `first` step and in the `last`, `pace`
    (factor from one step to the next over the later half) with its ends, and `said`: what it makes of it."""
    missing: dict[str, str] = field(default_factory=dict)
    """Run -> why it cannot be tested."""

    @property
    def title(self) -> str:
        """A short name for a heading."""
        return "Settling by kind"

    @property
    def table(self) -> pd.DataFrame:
        """A row per run."""
        return self.paces

    @property
    def shown(self) -> list[dict[str, str]]:
        """The table as commands and documents show it."""
        return [
            {
                "run": row["run"],
                "questions": str(row["questions"]),
                "iteration 2 changes a state by": f"{row['first']:.2g}",
                "the last one by": f"{row['last']:.2g}",
                "a step over the one before": _interval(row, "pace").text(),
                "the state": row["said"],
            }
            for row in self.paces.to_dict("records")
        ]

    @property
    def verdict(self) -> str:
        """What each run's state does."""
        said = "; ".join(f"{row['run']}: {row['said']}" for row in self.paces.to_dict("records"))
        missing = "; ".join(f"{run} ({why})" for run, why in self.missing.items())
        return f"{said}." + (f" Not testable: {missing}." if missing else "")

    def figure(self) -> go.Figure:
        """The pace by run."""
        rows = self.paces.to_dict("records")
        seen = [plots.Dot(row["run"], "pace", row["pace"], row["pace_low"], row["pace_high"]) for row in rows]
        about = f"{questions_words(int(self.paces['questions'].max()))}; bars: 95%, questions resampled"
        return plots.dots("Does the state settle?", about, "a step over the one before", seen)


def settling_of(names: Sequence[str | Path], resamples: int = RESAMPLES, seed: int = 0) -> KindsSettling:
    """`analyses.settling.state_settling` of each run.

    Raises:
        SSTError: as `open_together`.
        Untestable: of every run.
    """
    rows, missing = [], {}
    for run in open_together(names):
        try:
            own = state_settling(Contrast.of(run, resamples=resamples, seed=seed))
        except Untestable as error:
            missing[run.name] = error.message
            continue
        ends = {"first": own.steps["step"].iloc[0], "last": own.steps["step"].iloc[-1], "said": own.kind}
        rows.append({"run": run.name, "questions": own.n_questions} | ends | as_columns(pace=own.pace))
    if not rows:
        raise Untestable("; ".join(f"{run}: {why}" for run, why in missing.items()))
    return KindsSettling(pd.DataFrame(rows), missing)


def open_together(names: Sequence[str | Path]) -> list[Run]:
    """The runs of these names, complete and comparable.

    Raises:
        SSTError: fewer than two runs, a run that is named twice, unknown or incomplete, or runs of different
            questions or with recipes that differ in `AGREE`.
    """
    if len(names) < 2:
        raise SSTError("a comparison needs two runs or more", "for example --runs demo-backbone,demo")
    runs = [open_run(name) for name in names]
    for k, run in enumerate(runs):
        if run.name in [other.name for other in runs[:k]]:
            raise SSTError(f"run {run.name} is named twice", "name each run once")
        if not run.complete:
            raise SSTError(
                f"run {run.name} is not complete", f"`sst-interp capture --run {run.name}` finishes it"
            )
        _refuse_other(runs[0], run)
    return runs


def _refuse_other(first: Run, other: Run) -> None:
    """Raise if two runs cannot be compared."""
    both = f"runs {first.name} and {other.name}"
    for key in AGREE:
        ours, theirs = getattr(first.recipe, key), getattr(other.recipe, key)
        if ours != theirs:
            hint = "compare runs whose recipes differ in the model alone"
            raise SSTError(f"{both} differ in {key}: {ours!r} and {theirs!r}", hint)
    if first.recipe.choices.overlap != other.recipe.choices.overlap:
        raise SSTError(f"{both} measured other overlaps", "set the same `overlap` in both")
    hashes = [run.manifest["provenance"].get("dataset_hash") for run in (first, other)]
    asked = [
        run.questions[["question", "id", "gold"]].drop_duplicates().to_dict("list") for run in (first, other)
    ]
    if asked[0] != asked[1] or (all(hashes) and hashes[0] != hashes[1]):
        hint = "capture both with the same questions, split, seed and instruction"
        raise SSTError(f"{both} are of different questions", hint)


def _runs(n: int) -> str:
    return f"{n} run" + ("" if n == 1 else "s")
