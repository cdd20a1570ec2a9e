"""The claims of the paper and our own: what each says, the rule it is judged by, and how a rule decides.

A claim is one place, a function from `Evidence` to its `Finding`:

    @claim("C8", "every question shifts at position 0", "198 of 198", "every question has a shift ...", 1.0)
    def shift_at_zero(e: Evidence) -> Finding:
        zero = e("position_zero")
        return Finding(here, judged(holds, zero.questions), zero.questions, control)

The ledger, the command and the report take it from there. The rule is written before a run is looked at, and
can fail. Where the paper gives a size, a run of another model need not meet it exactly: half to twice the
paper's figure will do, or half of it where more is more of the same. A figure meets a bound if its interval
reaches the bound, so that nothing is refuted by noise; an interval that reaches beyond both ends of a range
decides nothing and is "not testable". The same goes for fewer than `LEAST` questions.
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
"""Questions a verdict needs: with fewer no two-sided sign test over questions can reach 0.05."""
EVERYWHERE = "-"
"""The comparison of a claim that does not depend on one."""


@dataclass(frozen=True)
class Claim:
    """One claim of the paper (SST V2, Gemma-3-27B, GPQA-Diamond)."""

    id: str
    words: str
    paper: str
    """The paper's figure."""
    rule: str
    """When it holds; the opposite does not hold."""
    value: float = math.nan
    """The figure that `Finding.figure` is set beside, if one number will do."""


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
        return self.finding.verdict.split(":")[0]


@dataclass(frozen=True, eq=False)
class Evidence:
    """What a claim is read from: the results of the analyses, and the tables they came from."""

    contrast: Contrast
    """The comparison of the row; of a claim about the whole run, the leading one."""
    results: Mapping[str, Result]
    """`analysis.comparison`, or `analysis` where there is one for the run -> its result."""
    missing: Mapping[str, str]
    """The same names -> why there is no result."""
    beside: Mapping[str, Any] = field(default_factory=dict)
    """What was given beside the run: `alpha`, `approximation`, `no_blend` (see `ledger.claims`)."""

    @property
    def comparison(self) -> str:
        """Of the row."""
        return self.contrast.comparison

    def __call__(self, analysis: str) -> Any:
        """The result of an analysis in this comparison, or the one for the whole run.

        Raises:
            Untestable: if there is none; the message says why.
        """
        for key in (f"{analysis}.{self.comparison}", analysis):
            if key in self.results:
                return self.results[key]
            if key in self.missing:
                raise Untestable(self.missing[key])
        raise Untestable(f"{analysis} was not analysed")


class Registered(NamedTuple):
    """A claim, and what reads it."""

    claim: Claim
    read: Callable[..., Finding | Sequence[Finding]]
    per: Literal["comparison", "run"]
    """Whether it has a row for every comparison, or one for the run."""
    measured: str | None
    """The command that measures it and keeps its rows with the run; None: it is read from a run."""


CLAIMS: dict[str, Registered] = {}
"""Id -> every claim that has been registered."""

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
    """Register a function of `Evidence` as what reads a claim; the arguments are the fields of `Claim` and
    `Registered`. It returns a `Finding` (or several, a row each) and raises `Untestable` where there is none.

    Raises:
        SSTError: if another claim has the id.
    """

    def register(read: R) -> R:
        known = CLAIMS.get(id)
        if known is not None and known.read.__module__ != read.__module__:
            raise SSTError(
                f"two claims are called {id!r}: {known.read.__module__} and {read.__module__}",
                "give one of them another id",
            )
        CLAIMS[id] = Registered(Claim(id, words, paper, rule, value), read, per, measured)
        return read

    return register


def row_of(id: str, finding: Finding) -> Row:
    """The row of a claim that is measured apart from the ledger."""
    return Row(CLAIMS[id].claim, EVERYWHERE, finding)


def number(id: str) -> int:
    """Where a claim stands in the ledger: the number in its id; without one, last."""
    digits = re.search(r"\d+", id)
    return int(digits[0]) if digits else 10**6


def untestable(reason: str, here: str = "none", control: str = "") -> Finding:
    """A finding that says why there is none."""
    return Finding(here, f"{UNTESTED}: {reason}", control=control)


def judged(holds: bool, *needed: Interval, why: str | None = None) -> str:
    """The verdict: not testable for the reason `why`, or if an interval that is needed is not there."""
    for interval in needed:
        why = why or too_little(interval)
    if why:
        return f"{UNTESTED}: {why}"
    return HOLDS if holds else FAILS


def too_little(interval: Interval) -> str | None:
    """Why an interval decides nothing, or None if it can."""
    if not math.isfinite(interval.estimate):
        return interval.reason or "no number"
    if not interval.known:
        return interval.reason or "no interval"
    return too_few(interval.n_questions)


def too_few(n_questions: int) -> str | None:
    """Why that many questions decide nothing, or None if they can."""
    if n_questions >= LEAST:
        return None
    return f"{questions_words(n_questions)} cannot decide it ({LEAST} are needed)"


def too_wide(interval: Interval, low: float, high: float) -> str | None:
    """Why an interval decides nothing about a range: it reaches beyond both ends."""
    if interval.low < low and interval.high > high:
        return "the interval reaches beyond both ends of the range"
    return None


def reaches(interval: Interval, low: float = -math.inf, high: float = math.inf) -> bool:
    """Whether an interval has a point in [low, high]."""
    return interval.high >= low and interval.low <= high
