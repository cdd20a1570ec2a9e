"""The claims ledger: each claim of the paper, this run's numbers, and a grade by a stated rule.

    ledger = claims(run, baseline=baseline)    # every registered analysis, then every registered claim
    ledger.verdict, ledger.table, ledger.figure()

One comparison is in memory at a time; teacher-forced text decides, the others are checks. A claim that
cannot be compared says why. An analysis that crashes is in `failed`: a crash is not a finding.
"""

from __future__ import annotations

import math
import traceback
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import pandas as pd
import plotly.graph_objects as go

from sst_interp.analyses import load, plots
from sst_interp.analyses.contrast import Contrast
from sst_interp.analyses.result import Analysis, Result, comparison_words, json_ready
from sst_interp.analyses.statistics.bootstrap import RESAMPLES, questions_words
from sst_interp.analyses.statistics.permutation import holm
from sst_interp.errors import SSTError
from sst_interp.findings import answers, state  # noqa: F401 (they register the claims)
from sst_interp.findings.answers import BlendWeights, blend_weights
from sst_interp.findings.calibration import rates_at
from sst_interp.findings.claims import (
    CLAIMS,
    CONTRADICTED,
    DECIDES,
    EVERYWHERE,
    GRADES,
    INCOMPARABLE,
    INCONCLUSIVE,
    LEVEL,
    SATURATED,
    SUPPORTED,
    Evidence,
    Finding,
    Row,
    not_comparable,
    number,
)
from sst_interp.models.choices import COMPARISONS
from sst_interp.plugins import load_plugins
from sst_interp.tables import markdown

Progress = Callable[[int, int, str], Any]
"""Called with (analyses done, of how many, the next one)."""
FAILED = "the analysis failed"
COMPARED = ("pairs", "outputs", "nudges")
"""Tables read one comparison at a time."""
COLOURS = {
    SUPPORTED: plots.BLUE, CONTRADICTED: plots.VERMILLION, INCONCLUSIVE: plots.ORANGE, SATURATED: plots.GREEN,
    INCOMPARABLE: plots.GREY,
}  # fmt: skip
SYMBOLS = dict(zip(GRADES, ("circle", "x", "diamond-open", "square", "circle-open"), strict=True))


@dataclass(frozen=True, eq=False)
class Ledger(Result):
    """The paper's claims beside one run. Intervals resample questions; comparisons are never pooled."""

    name: str
    """The run's name."""
    kind: str
    """The overlap."""
    n_questions: int
    """Questions of the run; a row's figure may rest on fewer."""
    rows: tuple[Row, ...] = ()
    results: dict[str, Result] = field(default_factory=dict)
    """`analysis.comparison`, or `analysis` if it is about the whole run -> its result."""
    missing: dict[str, str] = field(default_factory=dict)
    """Analyses without a result -> why."""
    failed: dict[str, str] = field(default_factory=dict)
    """Analyses and claims that crashed -> the exception and where it was raised."""

    @property
    def title(self) -> str:
        """The run and its size."""
        return f"Claims ledger: {self.name}, {questions_words(self.n_questions)}"

    @property
    def table(self) -> pd.DataFrame:
        """A row per claim; `estimate`, `low` and `high` are to set beside the paper's."""
        records = [
            {
                "claim": row.claim.id,
                "in words": row.claim.words,
                "paper": row.claim.paper,
                "this run": row.finding.here,
                "grade": row.grade,
                "why": row.reason,
                "decides": comparison_words(row.comparison),
                "checks": row.checked,
                "control": row.finding.control,
                "supported if": row.claim.rule,
                "error rates": row.rates,
                "estimate": row.finding.figure.estimate,
                "low": row.finding.figure.low,
                "high": row.finding.figure.high,
                "questions": row.finding.figure.n_questions,
                "p": row.finding.p,
            }
            for row in self.rows
        ]
        return pd.DataFrame(records)

    @property
    def counts(self) -> dict[str, int]:
        """How many claims have each grade."""
        counted = Counter(row.grade for row in self.rows)
        return {str(grade): counted[grade] for grade in GRADES}

    @property
    def by_claim(self) -> list[dict[str, str]]:
        """A row per claim for a table in a document or a terminal."""
        return [
            {
                "claim": row.claim.id, "in words": row.claim.words, "paper": row.claim.paper,
                "this run": row.finding.here, "grade": row.finding.verdict,
            }
            for row in self.rows
        ]  # fmt: skip

    @property
    def verdict(self) -> str:
        """How many claims have each grade, and which analyses failed."""
        parts = [f"{n} {grade}" for grade, n in self.counts.items() if n]
        words = f"{', '.join(parts) or 'no claims'}. {len(self.rows)} claims, "
        words = f"{words}{questions_words(self.n_questions)}; teacher-forced text decides."
        if self.failed:
            n = len(self.failed)
            words += f" {n} {'analysis' if n == 1 else 'analyses'} failed: a fault of the instrument, not a "
            words += "finding."
        return words

    def blocks(self) -> dict[str, str]:
        """Texts for a document: tables `RUN claims` and `RUN by claim`; `RUN verdict`, `RUN ANALYSIS` (with
        `.COMPARISON` unless about the whole run), `RUN CLAIM`.
        """
        shown = ["claim", "paper", "this run", "grade", "why", "checks", "control", "error rates"]
        texts = {
            "claims": markdown(
                [{name: row[name] for name in shown} for row in self.table.to_dict("records")]
            ),
            "by claim": markdown(self.by_claim),
            "verdict": self.verdict,
        } | {name: result.verdict for name, result in self.results.items()}
        for row in self.rows:
            words = f"{row.claim.id} {row.finding.verdict}. This run: {row.finding.here}."
            words += f" Beside it: {row.finding.control}." if row.finding.control else ""
            texts[row.claim.id] = words
        return {f"{self.name} {name}": text for name, text in texts.items()}

    def figure(self) -> go.Figure:
        """Grades by claim (down); the comparison that decides is filled, checks are small."""
        if not self.rows:
            return plots.empty_figure("Grades", "no claims")
        subtitle = f"{self.name}; {questions_words(self.n_questions)}; overlap: {self.kind.replace('_', ' ')}"
        figure = plots.canvas("Grade by claim", subtitle, "comparison", "claim of the paper")
        points = [(row, _column(row.comparison), row.finding, 15) for row in self.rows]
        points += [(row, _column(c), found, 8) for row in self.rows for c, found in row.checks.items()]
        counted, symbols = self.counts, cast(dict[str, str], SYMBOLS)
        for grade, colour in COLOURS.items():
            own = [point for point in points if point[2].grade == grade]
            if not own:
                continue
            figure.add_scatter(
                x=[column for _, column, _, _ in own],
                y=[_label(row) for row, *_ in own],
                mode="markers",
                name=f"{grade} ({counted[grade]})",
                marker={
                    "size": [size for *_, size in own], "color": colour, "symbol": symbols[grade],
                    "line": {"width": 2, "color": colour},
                },
                customdata=[[r.claim.paper, _plain(f.here), _plain(f.verdict)] for r, _, f, _ in own],
                hovertemplate="%{y}<br>paper: %{customdata[0]}<br>this run: %{customdata[1]}"
                "<br>%{customdata[2]}<extra></extra>",
            )  # fmt: skip
        labels = list(dict.fromkeys(_label(row) for row in self.rows))
        columns = list(dict.fromkeys(column for _, column, _, _ in points))
        figure.update_xaxes(categoryorder="array", categoryarray=columns)
        figure.update_yaxes(categoryorder="array", categoryarray=labels[::-1])
        return figure.update_layout(height=170 + 32 * len(labels))

    def figures(self) -> dict[str, go.Figure]:
        """`verdicts` and `beside_paper`."""
        return {"verdicts": self.figure(), "beside_paper": self._beside_paper()}

    def _beside_paper(self) -> go.Figure:
        """Figures of this run divided by the paper's, where both are above 0."""
        dots = []
        for row in self.rows:
            value, figure = row.claim.value, row.finding.figure
            if not (math.isfinite(value) and figure.estimate > 0):
                continue
            low = figure.low / value if figure.low > 0 else math.nan  # the axis is logarithmic
            n = f" (n = {figure.n_questions})" if figure.n_questions else ""
            label, series = row.claim.id + n, _column(row.comparison)
            dots.append(plots.Dot(label, series, figure.estimate / value, low, figure.high / value))
        title, n = "This run's figures beside the paper's", questions_words(self.n_questions)
        if not dots:
            return plots.empty_figure(title, "no claim has a number to set beside the paper's")
        figure = plots.dots(
            title, f"{self.name}; {n}; bars: 95%; n: questions of that figure",
            "this run / paper (log scale, no unit)", dots, reference=1,
        )  # fmt: skip
        ends = np.array([[d.estimate, d.low, d.high, 1.0] for d in dots])
        span = np.log10([0.8 * np.nanmin(ends), 1.25 * np.nanmax(ends)])
        figure.update_xaxes(type="log", range=span.tolist())
        return figure.update_yaxes(title_text="claim")

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready: rows, counts, and the verdict of every analysis."""
        own = {"result": type(self).__name__, "verdict": self.verdict, "table": self.table}
        own |= {"name": self.name, "kind": self.kind, "n_questions": self.n_questions}
        own |= {"counts": self.counts, "missing": self.missing, "failed": self.failed}
        return json_ready(own | {"analyses": {name: result.verdict for name, result in self.results.items()}})


def claims(
    run: Any,
    *,
    alpha: Any = None,
    approximation: Any = None,
    no_blend: str | None = None,
    token_class: Callable[..., list[str]] | None = None,
    more: Sequence[Row] = (),
    resamples: int = RESAMPLES,
    seed: int = 0,
    progress: Progress | None = None,
    **beside: Any,
) -> Ledger:
    """The ledger of a run. A table or companion that is missing costs the rows that need it, no more.

    Args:
        run: a `Run`, or anything with its tables and `recipe`.
        alpha: the learned blend weights [layer, d_model], or their `BlendWeights`, for C14.
        approximation: rows of the study `two-pass` at several alphas, for C15.
        no_blend: why C14 and C15 do not apply to the run's model (None: they do).
        token_class: token id -> class name, for C9.
        more: rows of claims that were measured elsewhere.
        resamples: question resamples, shuffles and permutations.
        seed: of all three.
        progress: called with (analyses done, of how many, the next one).
        **beside: runs by their role (`contrast.BESIDE`): `blend_off`, `reshuffled`, `baseline`, `beyond`,
            `lens` (see `of_run`).

    Raises:
        SSTError: for an unknown role, an impossible number of resamples or seed, or too little memory.
    """
    if resamples < 2 or seed < 0:
        raise SSTError(
            f"{resamples} resamples with seed {seed}", "take 2 resamples or more, and a seed of 0 or more"
        )
    load_plugins()
    lead = Contrast.of(run, resamples=resamples, seed=seed, beside=beside, token_class=token_class)
    if alpha is not None and not isinstance(alpha, BlendWeights):
        alpha = blend_weights(alpha)
    suite = _Suite(load(), {"alpha": alpha, "approximation": approximation, "no_blend": no_blend}, progress)
    order = sorted(COMPARISONS, key=lambda name: name != lead.comparison)
    try:
        suite.ask(lead, "run")  # first: rows of a comparison may need them
        suite.judge(lead, "run")
        for comparison in order:
            contrast = lead.to(comparison)  # the one before is freed
            suite.ask(contrast, "comparison")
            suite.judge(contrast, "comparison")
    except MemoryError:
        raise SSTError(
            f"not enough memory for {suite.asked} with {resamples:,} resamples",
            f"take fewer, for example `--resamples {max(2, min(500, resamples // 10))}`",
        ) from None
    suite.tell("done")
    n = _n_questions(lead)
    return Ledger(
        str(getattr(run, "name", "run")),
        lead.kind,
        n,
        tuple(with_rates(after_holm([*suite.rows(), *more]), n)),
        suite.in_order(suite.results, order),
        suite.in_order(suite.missing, order),
        suite.failed,
    )


class _Suite:
    """Runs every registered analysis and judges every registered claim."""

    def __init__(
        self, analyses: Mapping[str, Analysis], beside: Mapping[str, Any], progress: Progress | None
    ) -> None:
        self.analyses = sorted(analyses.values(), key=lambda analysis: analysis.order)
        self.beside, self.progress = beside, progress
        self.results: dict[str, Result] = {}
        self.missing: dict[str, str] = {}
        self.failed: dict[str, str] = {}
        self.judged: dict[str, dict[str, Finding]] = {}
        """Claim -> comparison -> what is found there."""
        self.asked = ""

    def tell(self, name: str) -> None:
        """Report which analysis is next."""
        self.asked = name
        if self.progress is not None:
            of = sum(len(COMPARISONS) if a.per == "comparison" else 1 for a in self.analyses)
            self.progress(len(self.results) + len(self.missing), of, name)

    def ask(self, c: Contrast, per: str) -> None:
        """Run the analyses of one comparison, or of the whole run."""
        for analysis in self.analyses:
            if analysis.per != per:
                continue
            key = analysis.name if per == "run" else f"{analysis.name}.{c.comparison}"
            self.tell(key)
            result, why = self._attempt(key, _call, analysis, c)
            if why is None:
                self.results[key] = result
            else:
                self.missing[key] = why

    def judge(self, c: Contrast, per: str) -> None:
        """Judge the claims in one comparison, or of the whole run."""
        evidence = Evidence(c, self.results, self.missing, self.beside)
        where = EVERYWHERE if per == "run" else c.comparison
        if where == "free_running":
            evidence = evidence.on_same_tokens()
        for id, entry in CLAIMS.items():
            if entry.per == per and entry.measured is None:
                self.asked = id if where == EVERYWHERE else f"{id}.{where}"
                _, why = self._attempt(self.asked, self._judge, evidence, id)
                found = not_comparable(why) if why is not None else evidence.finding(id)
                self.judged.setdefault(id, {})[where] = found

    @staticmethod
    def _judge(evidence: Evidence, id: str) -> Finding:
        return evidence.finding(id)

    def rows(self) -> list[Row]:
        """A row per claim: the comparison that decides, and the others as checks."""
        rows = []
        for id, found in self.judged.items():
            decides = EVERYWHERE if EVERYWHERE in found else DECIDES
            checks = {where: finding for where, finding in found.items() if where != decides}
            rows.append(Row(CLAIMS[id].claim, decides, found[decides], checks))
        return rows

    def _attempt(self, key: str, call: Callable[..., Any], *given: Any) -> tuple[Any, str | None]:
        """(result, None), or (None, why there is none); a crash is noted in `failed`."""
        try:
            with np.errstate(all="ignore"):
                return call(*given), None
        except SSTError as error:
            return None, error.message
        except MemoryError:
            raise
        except Exception as error:
            self.failed[key] = said(error)
            return None, FAILED

    def in_order(self, of: Mapping[str, Any], order: Sequence[str]) -> dict[str, Any]:
        """The entries comparison by comparison, those of the run last."""
        keys = [f"{a.name}.{where}" for where in order for a in self.analyses if a.per == "comparison"]
        keys += [a.name for a in self.analyses if a.per == "run"]
        return {key: of[key] for key in keys if key in of}


def _call(analysis: Analysis, c: Contrast) -> Result:
    """The result of an analysis, whose tables are read first."""
    for table in analysis.needs:
        if analysis.per == "comparison" or table not in COMPARED:
            c.tables(table, c.comparison if table in COMPARED else None)
    return analysis.call(c)


def said(error: Exception) -> str:
    """`TypeError: what (file.py, line 12)`: an exception and the last line outside libraries."""
    frames = traceback.extract_tb(error.__traceback__)
    frame = [f for f in frames if "site-packages" not in f.filename][-1]
    words = " ".join(str(error).split())[:200]
    return f"{type(error).__name__}: {words} ({Path(frame.filename).name}, line {frame.lineno})"


def _n_questions(c: Contrast) -> int:
    """Questions of the run, from the first table it has."""
    for table, comparison in (("questions", None), ("pairs", c.comparison)):
        try:
            return int(c.tables(table, comparison)["question"].nunique())
        except SSTError:
            continue
    return 0


def after_holm(rows: Sequence[Row]) -> list[Row]:
    """The rows in order; claims that rest on a p-value are supported after Holm's adjustment over all that
    do.
    """
    rows = sorted(rows, key=lambda row: number(row.claim.id))
    asked = [i for i, row in enumerate(rows) if math.isfinite(row.finding.p) and row.grade != INCOMPARABLE]
    adjusted = holm(np.array([rows[i].finding.p for i in asked]))
    for i, p in zip(asked, adjusted, strict=True):
        row, of = rows[i], f"{len(asked)} claims"
        if row.grade == SUPPORTED and p >= LEVEL:
            reason = f"p = {row.finding.p:.2g} is {p:.2g} after Holm over {of}"
            rows[i] = replace(row, finding=replace(row.finding, grade=INCONCLUSIVE, reason=reason))
    return rows


def with_rates(rows: Sequence[Row], n_questions: int) -> list[Row]:
    """The rows with how often each rule errs at this number of questions (`calibration`)."""
    return [replace(row, rates=rates_at(row.claim.id, n_questions)) for row in rows]


def _column(comparison: str) -> str:
    return "whole run" if comparison == EVERYWHERE else comparison_words(comparison)


def _label(row: Row) -> str:
    words = row.claim.words
    return f"{row.claim.id}: {words if len(words) < 52 else words[:49].rsplit(' ', 1)[0] + ' ...'}"


def _plain(words: str) -> str:
    """Text for a hover label, in which angle brackets are tags."""
    return words.replace("&", "&amp;").replace("<", "&lt;")
