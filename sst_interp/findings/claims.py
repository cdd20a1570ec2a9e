"""The claims of the paper and our own: what each says, the rule it is judged by, and how a rule decides.

A claim is one place, a function from `Evidence` to its `Finding`:

    @claim("C8", "every question shifts at position 0", "198 of 198", "every question has a shift ...", 1.0)
    def shift_at_zero(e: Evidence) -> Finding:
        zero = e("position_zero")
        return Finding(here, judged(holds, zero.questions), zero.questions, control)

A rule is written before a run is looked at. Half to twice the paper's figure meets it, or half of it where
more is more of the same. A figure meets a bound if its interval reaches the bound. An interval beyond both
ends of a range decides nothing ("not testable"), and neither do fewer than `LEAST` questions.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple, TypeVar

from sst_interp.analyses.contrast import Contrast
from sst_interp.analyses.result import Result
from sst_interp.analyses.statistics.bootstrap import Interval, nothing, questions_words
from sst_interp.errors import SSTError, Untestable

HOLDS, FAILS, UNTESTED = "holds", "does not hold", "not testable"
LEAST = 6
"""Questions a verdict needs: with fewer, no two-sided sign test reaches p < 0.05."""
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
    """When it holds; otherwise it does not hold."""
    value: float = math.nan
    """The paper's figure as one number, to set `Finding.figure` beside."""


@dataclass(frozen=True)
class Finding:
    """What a run says about a claim in one comparison."""

    here: str
    """This run's figure with its interval."""
    verdict: str
    """`holds`, `does not hold`, or `not testable: ` and why."""
    figure: Interval = field(default_factory=lambda: nothing("no figure"))
    """The one number beside `Claim.value`, and the questions it rests on."""
    control: str = ""
    """The number a sceptic would ask for."""


@dataclass(frozen=True)
class Row:
    """One row of the ledger."""

    claim: Claim
    comparison: str
    finding: Finding

    @property
    def state(self) -> str:
        """`holds`, `does not hold` or `not testable`."""
        return self.finding.verdict.partition(": ")[0]

    @property
    def reason(self) -> str:
        """Why it is not testable; empty if it is."""
        return self.finding.verdict.partition(": ")[2]


@dataclass(frozen=True, eq=False)
class Evidence:
    """What a claim is judged by: the results of the analyses and the tables behind them."""

    contrast: Contrast
    """The comparison of the row; for a claim about the whole run, the leading one."""
    results: Mapping[str, Result]
    """`analysis.comparison`, or `analysis` if it is about the whole run -> its result."""
    missing: Mapping[str, str]
    """The same names -> why there is no result."""
    beside: Mapping[str, Any] = field(default_factory=dict)
    """`alpha`, `approximation`, `no_blend` (see `ledger.claims`)."""

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


class Registered(NamedTuple):
    """A claim and the function that judges it."""

    claim: Claim
    judge: Callable[..., Finding | Sequence[Finding]]
    per: Literal["comparison", "run"]
    """One row for each comparison, or one for the run."""
    measured: str | None
    """The command that measures it and keeps its rows with the run; None: it is judged from the tables."""


CLAIMS: dict[str, Registered] = {}
"""Id -> registered claim."""

R = TypeVar("R", bound=Callable[..., "Finding | Sequence[Finding]"])


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

    The arguments are fields of `Claim` and `Registered`. The function returns a `Finding`, or several (a row
    each), and raises `Untestable` if there is none. Raises SSTError if another module has registered the id.
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


def number(id: str) -> int:
    """The number in a claim's id, which orders the ledger; ids without one come last."""
    digits = re.search(r"\d+", id)
    return int(digits[0]) if digits else 10**6


def untestable(reason: str, here: str = "none", control: str = "") -> Finding:
    """A finding that says why there is none."""
    return Finding(here, f"{UNTESTED}: {reason}", control=control)


def judged(holds: bool, *needed: Interval, why: str | None = None) -> str:
    """The verdict; not testable for the reason `why`, or if one of the `needed` intervals decides nothing."""
    for interval in needed:
        if not interval.known:
            why = why or interval.reason or "no interval"
        why = why or too_few(interval.n_questions)
    if why:
        return f"{UNTESTED}: {why}"
    return HOLDS if holds else FAILS


def too_few(n_questions: int) -> str | None:
    """Why so few questions decide nothing, or None."""
    if n_questions >= LEAST:
        return None
    return f"{questions_words(n_questions)} cannot decide it ({LEAST} are needed)"


def too_wide(interval: Interval, low: float, high: float) -> str | None:
    """Why an interval decides nothing about a range, or None."""
    if interval.low < low and interval.high > high:
        return "the interval reaches beyond both ends of the range"
    return None


def reaches(interval: Interval, low: float = -math.inf, high: float = math.inf) -> bool:
    """Whether an interval has a point in [low, high]."""
    return interval.high >= low and interval.low <= high


def if_measured(what: str, words: Callable[[Evidence], str], e: Evidence) -> str:
    """`words(e)`, or that `what` was not measured and why."""
    try:
        return words(e)
    except SSTError as error:
        return f"{what} not measured: {error.message}"


def same_norm(e: Evidence) -> tuple[Any, Any]:
    """What the change itself and random changes of its norm do at shifted positions (rows of `Precedence`).

    Raises `Untestable` if they were not measured.
    """
    precedence = e("precedence")
    if not precedence.at_shifts:
        raise Untestable(precedence.no_perturbations or "no perturbed position shifts")
    return precedence.at_shifts["true"], precedence.at_shifts["random"]
