"""The claims of the paper and our own: what each says, the rule it is judged by, and how a rule grades.

A claim is one place, a function from `Evidence` to its `Finding`:

    @claim("C8", "every question shifts at position 0", "198 of 198", "position 0 shifts in more layers
    ...", 1.0) def shift_at_zero(e: Evidence) -> Finding:
        ...
        return graded(Part("layers at 0 less later", difference, low=0), least=59)

A rule names numbers, each with its interval, and for each the region that supports the claim. An interval
inside all regions supports it, one outside any region contradicts it, and one that straddles an end is
inconclusive: so fewer questions can only make a claim undecided. One comparison decides (`DECIDES`); the
others are checks. How often each rule errs is simulated (`sst-interp study run calibration`,
docs/claims.md).
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal, NamedTuple, TypeVar

from sst_interp.analyses.contrast import Contrast, Tables
from sst_interp.analyses.result import Result
from sst_interp.analyses.statistics.bootstrap import (
    ONE_QUESTION,
    Interval,
    nothing,
    percent_text,
    points_text,
    questions_words,
)
from sst_interp.errors import SSTError, Untestable

SUPPORTED, CONTRADICTED, INCONCLUSIVE = "supported", "contradicted", "inconclusive"
SATURATED, INCOMPARABLE = "saturated", "not comparable"
GRADES = (SUPPORTED, CONTRADICTED, INCONCLUSIVE, SATURATED, INCOMPARABLE)
DECIDES = "teacher_forced"
"""The comparison that decides: both depths read the same text."""
LEAST = 24
"""Questions a grade needs; some claims need more."""
LEVEL = 0.05
SATURATES = 0.9
"""A placebo that passes a rule this often takes its meaning away."""
EVERYWHERE = "-"
"""Stands for the comparison in the row of a claim about the whole run."""


@dataclass(frozen=True)
class Claim:
    """One claim of the paper (SST V2, Gemma-3-27B, GPQA-Diamond)."""

    id: str
    words: str
    paper: str
    """The paper's figure."""
    rule: str
    """When it is supported."""
    value: float = math.nan
    """The paper's figure as one number, to set `Finding.figure` beside."""


class Part(NamedTuple):
    """A number of a rule, and where it must lie."""

    words: str
    interval: Interval
    low: float = -math.inf
    """The claim is supported by numbers between `low` ..."""
    high: float = math.inf
    """... and `high`: by an interval that lies between them."""
    above: float = math.nan
    """Contradicted by an interval above this; NaN: above `high`."""
    below: float = math.nan
    """Contradicted by an interval below this; NaN: below `low`."""
    form: Literal["number", "percent", "points", "factor"] = "number"
    shown: bool = True
    """Whether a reader sees it: at most three are."""

    @property
    def inside(self) -> bool:
        """Whether the whole interval lies in the region."""
        return self.low < self.interval.low and self.interval.high < self.high

    @property
    def outside(self) -> bool:
        """Whether the whole interval lies where it contradicts the claim."""
        above = self.high if math.isnan(self.above) else self.above
        below = self.low if math.isnan(self.below) else self.below
        return self.interval.low >= above or self.interval.high <= below

    def needed(self) -> float:
        """Questions with which this estimate would decide, if intervals shrink as the root of n."""
        at, low, high = self.interval.estimate, self.interval.low, self.interval.high
        if self.low < at < self.high:
            room = [(at - self.low) / (at - low) if at > low else math.inf,
                    (self.high - at) / (high - at) if high > at else math.inf]  # fmt: skip
        else:
            above = self.high if math.isnan(self.above) else self.above
            below = self.low if math.isnan(self.below) else self.below
            room = [
                (at - above) / (at - low) if at > above else (below - at) / (high - at) if at < below else 0
            ]
        scale = min(room)
        return self.interval.n_questions / scale**2 if scale > 0 else math.inf

    def text(self) -> str:
        """The number with its interval, and what it is."""
        i = self.interval
        if self.form == "points":
            said = points_text(i)
        else:
            said = i.text(percent=self.form == "percent") + ("x" if self.form == "factor" else "")
        if i.reason and not i.known and math.isfinite(i.estimate):
            said = percent_text(i.estimate) if self.form == "percent" else f"{i.estimate:.3g}"
        return f"{self.words} {said}"


@dataclass(frozen=True)
class Finding:
    """What a run says about a claim in one comparison."""

    grade: str
    """One of `GRADES`."""
    here: str = "none"
    """This run's numbers with their intervals, at most three."""
    reason: str = ""
    """Why it has this grade, where the numbers do not say."""
    figure: Interval = field(default_factory=lambda: nothing("no figure"))
    """The one number beside `Claim.value`, and the questions it rests on."""
    control: str = ""
    """What a sceptic would ask for besides."""
    p: float = math.nan
    """The p-value that Holm's procedure adjusts over claims; NaN without one."""

    @property
    def verdict(self) -> str:
        """The grade, and why."""
        return f"{self.grade}: {self.reason}" if self.reason else self.grade


@dataclass(frozen=True)
class Row:
    """One row of the ledger: one claim."""

    claim: Claim
    comparison: str
    """The one that decides, or `EVERYWHERE`."""
    finding: Finding
    checks: Mapping[str, Finding] = field(default_factory=dict)
    """Other comparison -> what the same rule says there. It decides nothing."""
    rates: str = ""
    """How often the rule errs at this run's number of questions, by simulation."""

    @property
    def grade(self) -> str:
        """One of `GRADES`."""
        return self.finding.grade

    @property
    def reason(self) -> str:
        """Why, where the numbers do not say."""
        return self.finding.reason

    @property
    def checked(self) -> str:
        """The checks in words: `within contradicted; free-running not comparable`."""
        return "; ".join(f"{name.replace('_', '-')} {finding.grade}" for name, finding in self.checks.items())


class SameTokens:
    """The tables of a run while both depths have read the same tokens (free-running)."""

    def __init__(self, tables: Tables) -> None:
        self.tables = tables

    def __call__(self, name: str, comparison: str | None = None) -> Any:
        """As `Tables`, without the rows from the first differing token on."""
        table = self.tables(name, comparison)
        if "same_prefix" in table.columns:
            table = table[table["same_prefix"].to_numpy(dtype=bool)]
        if not len(table):
            raise Untestable("the texts differ from the first token on")
        return table

    def get(self, name: str, comparison: str | None = None) -> Any:
        """The same, or None where there is none."""
        try:
            return self(name, comparison)
        except Untestable:
            return None


@dataclass(frozen=True, eq=False)
class Evidence:
    """What a claim is judged by: the comparison, the results of the analyses, and what stands beside the
    run.
    """

    contrast: Contrast
    """The comparison of the row; for a claim about the whole run, the leading one."""
    results: Mapping[str, Result] = field(default_factory=dict)
    """`analysis.comparison`, or `analysis` if it is about the whole run -> its result."""
    missing: Mapping[str, str] = field(default_factory=dict)
    """The same names -> why there is no result."""
    beside: Mapping[str, Any] = field(default_factory=dict)
    """`alpha`, `approximation`, `no_blend` (see `ledger.claims`)."""
    _judged: dict[str, Finding] = field(default_factory=dict, repr=False)

    @property
    def comparison(self) -> str:
        """The comparison of the row."""
        return self.contrast.comparison

    def __call__(self, analysis: str) -> Any:
        """The result of an analysis in this comparison, or for the run; raises `Untestable` without one."""
        for key in (f"{analysis}.{self.comparison}", analysis):
            if key in self.results:
                return self.results[key]
            if key in self.missing:
                raise Untestable(self.missing[key])
        raise Untestable(f"{analysis} was not analysed")

    def finding(self, id: str) -> Finding:
        """What a claim is found to be, judged once."""
        if id not in self._judged:
            try:
                self._judged[id] = CLAIMS[id].judge(self)
            except Untestable as error:
                self._judged[id] = not_comparable(error.message)
        return self._judged[id]

    def on_same_tokens(self) -> Evidence:
        """The same, while both depths have read the same tokens."""
        tables: Any = SameTokens(self.contrast.tables)
        return replace(self, contrast=replace(self.contrast, tables=tables, _deepest_modes={}), results={},
                       _judged={})  # fmt: skip


class Registered(NamedTuple):
    """A claim and the function that judges it."""

    claim: Claim
    judge: Callable[..., Finding]
    per: Literal["comparison", "run"]
    """Whether other comparisons check it, or it is about the whole run."""
    measured: str | None
    """The command that measures it and keeps its row with the run; None: it is judged from the tables."""


CLAIMS: dict[str, Registered] = {}
"""Id -> registered claim."""

R = TypeVar("R", bound=Callable[..., Finding])


def claim(
    id: str,
    words: str,
    paper: str,
    rule: str,
    value: float = math.nan,
    *,
    per: Literal["comparison", "run"] = "comparison",
    measured: str | None = None,
) -> Callable[[R], R]:
    """Register a function of `Evidence` that judges a claim.

    The arguments are fields of `Claim` and `Registered`. The function returns a `Finding`, and raises
    `Untestable` where the run cannot be compared. Raises SSTError if another module has registered the
    id.
    """

    def register(judge: R) -> R:
        known = CLAIMS.get(id)
        if known is not None and known.judge.__module__ != judge.__module__:
            raise SSTError(
                f"two claims are called {id!r}: {known.judge.__module__} and {judge.__module__}",
                "give one of them another id",
            )
        CLAIMS[id] = Registered(Claim(id, words, paper, rule, value), judge, per, measured)
        return judge

    return register


def number(id: str) -> tuple[int, str]:
    """What orders the ledger: the number in a claim's id, then the id; ids without a number come last."""
    digits = re.search(r"\d+", id)
    return int(digits[0]) if digits else 10**6, id


def not_comparable(reason: str, here: str = "none", control: str = "") -> Finding:
    """A finding that says why there is no comparison with the paper."""
    return Finding(INCOMPARABLE, here, reason, control=control)


def graded(
    *parts: Part,
    control: Part | None = None,
    least: int = LEAST,
    why: str | None = None,
    too_few: str | None = None,
    saturated: str | None = None,
    p: float = math.nan,
    note: str = "",
) -> Finding:
    """The grade of a claim by its numbers; the first part is the figure beside the paper's.

    Args:
        parts: what the rule asks about.
        control: the contrast with the control. Without it a claim may be contradicted, never supported.
        least: questions that each part needs.
        why: why the run is not comparable, or None.
        too_few: why it is inconclusive whatever the numbers, or None.
        saturated: why a placebo passes the rule, too, or None.
        p: where the rule has a p-value; it supports below 0.05.
        note: what a sceptic would ask for besides.
    """
    every = [*parts, *([control] if control is not None else [])]
    here = "; ".join(part.text() for part in every if part.shown)

    def told(grade: str, reason: str = "") -> Finding:
        return Finding(grade, here, reason, parts[0].interval, note, p)

    if why is not None:
        return told(INCOMPARABLE, why)
    if too_few is not None:
        return told(INCONCLUSIVE, too_few)
    if saturated is not None:
        return told(SATURATED, saturated)
    known = [part for part in every if part.interval.known]
    lacking = [part for part in every if not part.interval.known]
    for part in lacking:
        if part.interval.reason != ONE_QUESTION and part is not control and not known:
            return told(INCOMPARABLE, f"{part.words}: {part.interval.reason or 'no interval'}")
    asked = [part for part in known if part.interval.n_questions >= least or part is control]
    if len([part for part in asked if part is not control]) == 0:
        n = max((part.interval.n_questions for part in every), default=0)
        return told(INCONCLUSIVE, f"{questions_words(n)}, and {least} are needed")
    if len(asked) == len(every) and all(part.inside for part in asked) and not p >= LEVEL:
        return told(SUPPORTED)
    against = [part.words for part in asked if part.outside]
    if against:
        return told(CONTRADICTED, f"by {' and '.join(against)}" if len(parts) > 1 or control else "")
    for part in lacking:
        return told(INCOMPARABLE, f"{part.words}: {part.interval.reason or 'no interval'}")
    few = [part for part in known if part not in asked]
    if few:
        n = few[0].interval.n_questions
        return told(INCONCLUSIVE, f"{few[0].words} rests on {questions_words(n)}, and {least} are needed")
    needed = max((part.needed() for part in asked if not part.inside), default=math.inf)
    return told(INCONCLUSIVE, undecided(max(needed, least)))


def undecided(needed: float) -> str:
    """How many questions would decide it."""
    if not needed < 1e5:
        return "the estimate lies where more questions would hardly decide"
    digits = max(len(str(math.ceil(needed))) - 2, 0)
    return f"about {math.ceil(round(needed / 10**digits, 6)) * 10**digits:,} questions would decide"


def if_measured(what: str, words: Callable[[Evidence], str], e: Evidence) -> str:
    """`words(e)`, or that `what` was not measured and why."""
    try:
        return words(e)
    except SSTError as error:
        return f"{what} not measured: {error.message}"
