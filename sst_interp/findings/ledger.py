"""The claims ledger: each claim of the paper, this run's figure, a verdict by a stated rule, and its control.

    ledger = claims(run, baseline=baseline)    # every registered analysis, then every registered claim
    ledger.verdict, ledger.table, ledger.figure()

One comparison of the run is held in memory at a time. What cannot be tested is a row that says why; an
analysis that crashes is in `failed`, so that a fault of ours is not taken for a finding.
"""

from __future__ import annotations

import math
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go

from sst_interp.analyses import load, plots
from sst_interp.analyses.contrast import Contrast
from sst_interp.analyses.result import Analysis, Result, comparison_words, json_ready
from sst_interp.analyses.statistics.bootstrap import RESAMPLES, questions_words
from sst_interp.errors import SSTError
from sst_interp.findings import answers, state  # noqa: F401 (they register the claims)
from sst_interp.findings.answers import BlendWeights, blend_weights
from sst_interp.findings.claims import (
    CLAIMS,
    EVERYWHERE,
    FAILS,
    HOLDS,
    UNTESTED,
    Evidence,
    Finding,
    Registered,
    Row,
    number,
    untestable,
)
from sst_interp.models.choices import COMPARISONS
from sst_interp.plugins import load_plugins
from sst_interp.tables import markdown

Progress = Callable[[int, int, str], Any]
"""Told how many analyses are done, of how many, and which is next."""
FAILED = "the analysis failed"
COMPARED = ("pairs", "outputs", "nudges")
"""Tables that are read one comparison at a time."""
COLOURS = {HOLDS: plots.BLUE, FAILS: plots.VERMILLION, UNTESTED: plots.GREY}
SYMBOLS = {HOLDS: "circle", FAILS: "x", UNTESTED: "circle-open"}
"""Verdicts differ in shape as well as in colour."""


@dataclass(frozen=True, eq=False)
class Ledger(Result):
    """The paper's claims beside one run. All intervals resample questions; comparisons are never pooled."""

    name: str
    """Of the run."""
    kind: str
    """Which overlap."""
    n_questions: int
    """Questions of the run; every row says how many its own figure rests on."""
    rows: tuple[Row, ...] = ()
    results: dict[str, Result] = field(default_factory=dict)
    """`analysis.comparison`, or `analysis` where there is one for the run -> its result."""
    missing: dict[str, str] = field(default_factory=dict)
    """Analyses without a result -> why."""
    failed: dict[str, str] = field(default_factory=dict)
    """Of those, analyses (and claims) that crashed -> the exception and where it was raised."""

    @property
    def title(self) -> str:
        """The run and its size."""
        return f"Claims ledger: {self.name}, {questions_words(self.n_questions)}"

    @property
    def table(self) -> pd.DataFrame:
        """A row per claim and comparison: the paper's figure, this run's, rule, verdict, control. `estimate`,
        `low` and `high` are the one number of `this run` that is set beside the paper's in the figure.
        """
        records = [
            {
                "claim": row.claim.id,
                "in words": row.claim.words,
                "comparison": row.comparison,
                "paper": row.claim.paper,
                "this run": row.finding.here,
                "estimate": row.finding.figure.estimate,
                "low": row.finding.figure.low,
                "high": row.finding.figure.high,
                "questions": row.finding.figure.n_questions,
                "holds if": row.claim.rule,
                "verdict": row.finding.verdict,
                "control": row.finding.control,
            }
            for row in self.rows
        ]
        return pd.DataFrame(records)

    @property
    def counts(self) -> dict[str, int]:
        """How many rows hold, do not hold, are not testable."""
        counted = Counter(row.state for row in self.rows)
        return {verdict: counted[verdict] for verdict in (HOLDS, FAILS, UNTESTED)}

    @property
    def by_claim(self) -> list[dict[str, str]]:
        """A row per claim: the paper's figure and the verdict in each comparison, in one or two words."""
        columns = [*dict.fromkeys(row.comparison for row in self.rows if row.comparison != EVERYWHERE)]
        lines: dict[str, dict[str, str]] = {}
        for row in self.rows:
            start = {"claim": row.claim.id, "in words": row.claim.words, "paper": row.claim.paper}
            line = lines.setdefault(row.claim.id, start | dict.fromkeys(columns, ""))
            for column in columns if row.comparison == EVERYWHERE else [row.comparison]:
                line[column] = row.state
        return list(lines.values())

    @property
    def differ(self) -> dict[str, dict[str, list[str]]]:
        """Claims that hold in one comparison and not in another -> verdict -> comparisons."""
        states: dict[str, dict[str, list[str]]] = {}
        for row in self.rows:
            if row.comparison != EVERYWHERE:
                states.setdefault(row.claim.id, {}).setdefault(row.state, []).append(row.comparison)
        return {claim: found for claim, found in states.items() if {HOLDS, FAILS} <= found.keys()}

    @property
    def verdict(self) -> str:
        """Counts, how many analyses failed, and which claims depend on the comparison."""
        holds, fails, untested = self.counts.values()
        of = f"{len(self.rows)} rows (claim by comparison), {questions_words(self.n_questions)}."
        if holds + fails == 0:
            words = f"{UNTESTED}: no row can be decided. {of}"
        else:
            words = f"{holds} {'holds' if holds == 1 else 'hold'}, {fails} {'does' if fails == 1 else 'do'} "
            words += f"not, {untested} {'is' if untested == 1 else 'are'} not testable. {of}"
        if self.failed:
            n = len(self.failed)
            words += f" {n} {'analysis' if n == 1 else 'analyses'} failed: a fault of the instrument, not a "
            words += "finding."
        parts = [
            f"{claim} ({'; '.join(f'{verdict}: {_listed(where)}' for verdict, where in found.items())})"
            for claim, found in self.differ.items()
        ]
        return f"{words} The comparison decides {', '.join(parts)}." if parts else words

    def blocks(self) -> dict[str, str]:
        """Texts for a document: `RUN claims`, `RUN by claim`, `RUN verdict`, and `RUN ANALYSIS`, verdicts."""
        shown = ["claim", "comparison", "paper", "this run", "verdict", "control"]
        texts = {
            "claims": markdown(
                [{name: row[name] for name in shown} for row in self.table.to_dict("records")]
            ),
            "by claim": markdown(self.by_claim),
            "verdict": self.verdict,
        } | {name: result.verdict for name, result in self.results.items()}
        return {f"{self.name} {name}": text for name, text in texts.items()}

    def figure(self) -> go.Figure:
        """Claims down, comparisons across; colour and shape say the verdict, hovering the figures."""
        if not self.rows:
            return plots.empty_figure("Verdicts", "no claims")
        subtitle = f"{self.name}; {questions_words(self.n_questions)}; overlap: {self.kind.replace('_', ' ')}"
        figure = plots.canvas("Verdict by claim and comparison", subtitle, "comparison", "claim of the paper")
        for verdict, colour in COLOURS.items():
            own = [row for row in self.rows if row.state == verdict]
            if not own:
                continue
            figure.add_scatter(
                x=[_column(row) for row in own],
                y=[_label(row) for row in own],
                mode="markers",
                name=f"{verdict} ({len(own)})",
                marker={
                    "size": 15, "color": colour, "symbol": SYMBOLS[verdict],
                    "line": {"width": 2, "color": colour},
                },
                customdata=[[r.claim.paper, _plain(r.finding.here), _plain(r.finding.verdict)] for r in own],
                hovertemplate="%{y}<br>paper: %{customdata[0]}<br>this run: %{customdata[1]}"
                "<br>%{customdata[2]}<extra></extra>",
            )  # fmt: skip
        labels = list(dict.fromkeys(_label(row) for row in self.rows))
        columns = list(dict.fromkeys(_column(row) for row in self.rows))
        figure.update_xaxes(categoryorder="array", categoryarray=columns)
        figure.update_yaxes(categoryorder="array", categoryarray=labels[::-1])
        return figure.update_layout(height=170 + 32 * len(labels))

    def figures(self) -> dict[str, go.Figure]:
        """`verdicts`, and `beside_paper`: this run's figures over the paper's."""
        return {"verdicts": self.figure(), "beside_paper": self._beside_paper()}

    def _beside_paper(self) -> go.Figure:
        """Figures of this run over the paper's, where both are a number above 0; 1 is the paper's."""
        dots = []
        for row in self.rows:
            value, found = row.claim.value, row.finding.figure
            if not (math.isfinite(value) and found.estimate > 0):
                continue
            # An end at or below 0 has no place on a logarithmic axis: its side of the bar is left out.
            low = found.low / value if found.low > 0 else math.nan
            label = row.claim.id + self._asked(row.claim.id)
            dots.append(plots.Dot(label, _column(row), found.estimate / value, low, found.high / value))
        title, n = "This run's figures beside the paper's", questions_words(self.n_questions)
        if not dots:
            return plots.empty_figure(title, "no claim has a number to set beside the paper's")
        figure = plots.dots(
            title, f"{self.name}; {n}; bars: 95%, questions resampled; n: questions of that figure",
            "this run / paper (log scale, no unit)", dots, reference=1,
        )  # fmt: skip
        ends = np.array([[d.estimate, d.low, d.high, 1.0] for d in dots])
        span = np.log10([0.8 * np.nanmin(ends), 1.25 * np.nanmax(ends)])
        figure.update_xaxes(type="log", range=span.tolist())
        return figure.update_yaxes(title_text="claim")

    def _asked(self, claim: str) -> str:
        """` (n = 18 to 24)`: the questions that a claim's figures rest on, over its comparisons."""
        numbers = {row.finding.figure.n_questions for row in self.rows if row.claim.id == claim} - {0}
        ends = dict.fromkeys(map(str, (min(numbers), max(numbers)))) if numbers else {}
        return f" (n = {' to '.join(ends)})" if ends else ""

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready: the rows, counts, what differs, and the verdict of every analysis (a result's own
        `to_dict` has the rest).
        """
        own = {"result": type(self).__name__, "verdict": self.verdict, "table": self.table}
        own |= {"name": self.name, "kind": self.kind, "n_questions": self.n_questions}
        own |= {"counts": self.counts, "differ": self.differ, "missing": self.missing, "failed": self.failed}
        return json_ready(own | {"analyses": {name: found.verdict for name, found in self.results.items()}})


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
    """The ledger of a run. What a run lacks does not make it fail: that is a row that says so.

    Args:
        run: a `Run`, or anything with its tables and `recipe`.
        alpha: the learned blend weights [layer, d_model], or their `BlendWeights`, for C14.
        approximation: of `approximation_error`, for C15.
        no_blend: why the claims about the blend (C14, C15) do not apply to the run's model; None: they do.
        token_class: token id -> class name, for C9.
        more: rows of claims that were measured elsewhere.
        resamples: question resamples, shuffles and permutations.
        seed: of all three.
        progress: told how many analyses are done, of how many, and which is next.
        **beside: runs by their role (`contrast.BESIDE`). `blend_off`: the same recipe with prompt =
            "blend_off", the start-up control of C8. `reshuffled`: the same questions with reshuffled choices,
            for C9. `baseline`: the matched baseline, for C11. `beyond`: more depths. `lens`: the same
            questions with `lens_jaccard`.

    Raises:
        SSTError: for an unknown role, a number of resamples or a seed that cannot be, or too little memory.
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
        suite.ask(lead, "run")  # first: rows of a comparison may rest on them
        rows = suite.judge(lead, "run")
        for comparison in order:
            contrast = lead.to(comparison)  # the one before goes, with what it has read
            suite.ask(contrast, "comparison")
            rows += suite.judge(contrast, "comparison")
    except MemoryError:
        raise SSTError(
            f"not enough memory for {suite.asked} with {resamples:,} resamples",
            f"take fewer, for example `--resamples {max(2, min(500, resamples // 10))}`",
        ) from None
    suite.tell("done")
    places = {name: place for place, name in enumerate((EVERYWHERE, *order))}
    rows.sort(key=lambda row: (number(row.claim.id), places[row.comparison]))
    return Ledger(
        str(getattr(run, "name", "run")),
        lead.kind,
        _n_questions(lead),
        tuple(sorted([*rows, *more], key=lambda row: number(row.claim.id))),
        suite.in_order(suite.results, order),
        suite.in_order(suite.missing, order),
        suite.failed,
    )


class _Suite:
    """Asks every registered analysis, and reads every registered claim from the answers."""

    def __init__(
        self, analyses: Mapping[str, Analysis], beside: Mapping[str, Any], progress: Progress | None
    ) -> None:
        self.analyses = sorted(analyses.values(), key=lambda analysis: analysis.order)
        self.beside, self.progress = beside, progress
        self.results: dict[str, Result] = {}
        self.missing: dict[str, str] = {}
        self.failed: dict[str, str] = {}
        self.asked = ""

    def tell(self, name: str) -> None:
        """Say which is next."""
        self.asked = name
        if self.progress is not None:
            of = sum(len(COMPARISONS) if a.per == "comparison" else 1 for a in self.analyses)
            self.progress(len(self.results) + len(self.missing), of, name)

    def ask(self, c: Contrast, per: str) -> None:
        """Every analysis of one comparison, or of the run."""
        for analysis in self.analyses:
            if analysis.per != per:
                continue
            key = analysis.name if per == "run" else f"{analysis.name}.{c.comparison}"
            self.tell(key)
            try:
                for table in analysis.needs:
                    if per == "comparison" or table not in COMPARED:
                        c.tables(table, c.comparison if table in COMPARED else None)
                with np.errstate(all="ignore"):
                    self.results[key] = analysis.call(c)
            except SSTError as error:
                self.missing[key] = error.message
            except MemoryError:
                raise
            except Exception as error:
                self.missing[key], self.failed[key] = FAILED, said(error)

    def judge(self, c: Contrast, per: str) -> list[Row]:
        """Every claim of one comparison, or of the run."""
        evidence = Evidence(c, self.results, self.missing, self.beside)
        where = EVERYWHERE if per == "run" else c.comparison
        return [
            Row(entry.claim, where, finding)
            for entry in CLAIMS.values()
            if entry.per == per and entry.measured is None
            for finding in self._read(entry, evidence, where)
        ]

    def _read(self, entry: Registered, evidence: Evidence, where: str) -> Sequence[Finding]:
        key = entry.claim.id if where == EVERYWHERE else f"{entry.claim.id}.{where}"
        self.asked = key
        try:
            with np.errstate(all="ignore"):
                findings = entry.read(evidence)
        except SSTError as error:
            findings = untestable(error.message)
        except MemoryError:
            raise
        except Exception as error:
            self.failed[key] = said(error)
            findings = untestable(FAILED)
        return [findings] if isinstance(findings, Finding) else findings

    def in_order(self, of: Mapping[str, Any], order: Sequence[str]) -> dict[str, Any]:
        """The entries comparison by comparison, those of the run last."""
        return {key: of[key] for key in self._keys(order) if key in of}

    def _keys(self, order: Sequence[str]) -> Iterator[str]:
        for comparison in order:
            yield from (f"{a.name}.{comparison}" for a in self.analyses if a.per == "comparison")
        yield from (a.name for a in self.analyses if a.per == "run")


def said(error: Exception) -> str:
    """`TypeError: what (file.py, line 12)`: an exception in one line, and the last line that is not of a
    library.
    """
    frames = traceback.extract_tb(error.__traceback__)
    frame = [f for f in frames if "site-packages" not in f.filename][-1]
    words = " ".join(str(error).split())[:200]
    return f"{type(error).__name__}: {words} ({Path(frame.filename).name}, line {frame.lineno})"


def _n_questions(c: Contrast) -> int:
    """Questions of the run, from the first table that it has."""
    for table, comparison in (("questions", None), ("pairs", c.comparison)):
        try:
            return int(c.tables(table, comparison)["question"].nunique())
        except SSTError:
            continue
    return 0


def _column(row: Row) -> str:
    return "whole run" if row.comparison == EVERYWHERE else comparison_words(row.comparison)


def _label(row: Row) -> str:
    words = row.claim.words
    return f"{row.claim.id}: {words if len(words) < 52 else words[:49].rsplit(' ', 1)[0] + ' ...'}"


def _listed(comparisons: Sequence[str]) -> str:
    return ", ".join(map(comparison_words, comparisons))


def _plain(words: str) -> str:
    """Text for a hover label, which reads angle brackets as tags."""
    return words.replace("&", "&amp;").replace("<", "&lt;")
