"""The claims of the paper and our own (C16), the rule by which each is judged, and how a rule decides.

The rules were written before a run was looked at (C16's after a look at three questions). Each can fail.
Where the paper gives a size, a run of another model need not meet it exactly: half to twice the paper's
figure will do, or half of it where more is more of the same. A figure meets a bound if its interval reaches
the bound, so that nothing is refuted by noise; an interval that reaches beyond both ends of a range decides
nothing and is "not testable". The same goes for fewer than `LEAST` questions.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from sst_interp.analyses.statistics.bootstrap import Interval, questions_words

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
    """The figure that `Row.figure` is set beside, if one number will do."""


@dataclass(frozen=True)
class Finding:
    """What a run says about a claim in one comparison."""

    here: str
    """This run's figure with its interval."""
    verdict: str
    """`holds`, `does not hold`, or `not testable: ` and why."""
    figure: Interval = field(default_factory=lambda: Interval(math.nan, math.nan, math.nan, 0))
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


C1 = Claim(
    "C1", "a small share of the (position, layer) pairs is reorganised, the rest stable", "14% (86% stable)",
    "the interval of the shifted share, at this run's threshold, reaches 7% to 28% (half to twice)", 0.14,
)  # fmt: skip
C2 = Claim(
    "C2", "stable and shifted are separate modes, not one spread", "yes",
    "more than half of the layers tested have two modes within themselves (false discovery rate 5%)",
)  # fmt: skip
C3 = Claim(
    "C3", "overlap at a shift falls as low as 0.30", "0.30",
    "the lowest overlap is 0.30 or less, to two decimals", 0.30,
)  # fmt: skip
C4 = Claim(
    "C4", "a shift replaces half of the top 100 tokens, a stable position hardly any",
    "54 against 1 (medians)",
    "the intervals reach 27 replaced at shifts (half) and a tenth of what shifts replace, or less, at stable "
    "positions; and that of the difference is above 0",
    54,
)  # fmt: skip
C5 = Claim(
    "C5", "the new winner comes from as deep as rank 50", "50",
    "the deepest rank a new most likely token came from is 50 or more (0-based)", 50,
)  # fmt: skip
C6 = Claim(
    "C6", "the state shifts before the argmax changes, never after", "always",
    "no argmax changes without a shift by then, and at an earlier step shifts come more often than if "
    "shuffled over positions (p < 0.05)",
    1.0,
)  # fmt: skip
C7 = Claim(
    "C7", "the change is many bf16 roundings, more in the deepest layer", "15x, deepest layer 29x (medians)",
    "the intervals reach 7.5 and, in the deepest layer, 14.5 (half); and the change is above every measured "
    "noise floor (interval of the ratio above 1)",
    15,
)  # fmt: skip
C8 = Claim(
    "C8", "every question shifts at position 0", "198 of 198",
    "every question has a shift in some layer at position 0, at one threshold in all comparisons (0.99 as in "
    "the paper, or the recipe's): up to there each has read the same text", 1.0,
)  # fmt: skip
C9 = Claim(
    "C9", "which positions shift depends on content", "yes",
    "something of the content goes with the change beyond position (p < 0.05 after Holm), by a rank "
    "correlation of 0.1 or more, or 1% of the variance or more",
)  # fmt: skip
C10 = Claim(
    "C10", "thinking longer about every question breaks right answers and costs accuracy",
    "51.0% at depth 1, 42.9% at depth 4; 30 of 101 broken",
    "the interval of the change of accuracy is below 0 and that of the broken share reaches 15% (half). "
    "Accuracy no better than blind guessing cannot be broken: not testable",
    30 / 101,
)  # fmt: skip
C11 = Claim(
    "C11", "the best of the depths (an oracle) beats the matched baseline", "61.1% against 46.0%",
    "the oracle is above the baseline and, where answers are lettered, above the oracle of blind new "
    "guesses, both by their intervals",
    0.611 - 0.460,
)  # fmt: skip
C12 = Claim(
    "C12", "a probe of the state at position 0 tells which questions must halt",
    "29 of 48 in leave-one-out, p = 0.0009; 107 of 5,376 dimensions of layer 15 of 62",
    "must-halt questions, everything chosen inside the fold: p < 0.05 with the labels permuted through all "
    "of it (rebalanced leave-one-out AUC), and the interval of the AUC is above one half. Labels of answers "
    "no better than blind guessing are noise: not testable",
    29 / 48,
)  # fmt: skip
C13 = Claim(
    "C13", "the depth that the probe picks breaks no right answer", "0 broken, 4 conservative errors",
    "routed out of fold by the must-halt probe, no answer that is right at the shallowest depth is broken, "
    "and more are right than if the same depths were dealt at random (interval above 0): halting always "
    "breaks none, either. Accuracy no better than blind guessing cannot be broken: not testable",
)  # fmt: skip
C14 = Claim(
    "C14", "learned blend weights: mean, range", "0.027, [0.015, 0.10]",
    "the mean is 0.0135 to 0.054, the smallest 0.0075 to 0.03, the largest 0.05 to 0.2 (half to twice)",
    0.027,
)  # fmt: skip
C15 = Claim(
    "C15", "the error of the two-pass approximation is of the order of alpha squared", "6e-4 to 1.2e-3",
    "the interval of the relative error of the logits is at most 1.2e-3; straddling it is not testable",
    1.2e-3,
)  # fmt: skip
C16 = Claim(
    "C16", "a shift causes the changed output (our own)", "not in the paper",
    "at shifted pairs below the last layer the other depth's state moves the logit difference its way, put "
    "in either direction (intervals of the recovered share above 0), and further than a random change and "
    "another question's change of the same size (intervals of the differences above 0)",
)  # fmt: skip
C16B = Claim(
    "C16b", "a shift matters more than its size (our own)", "not in the paper",
    "in a regression of the log effect of a patch below the last layer on the log of its size, shifted pairs "
    "have a larger effect than stable ones (interval of the coefficient above 0)",
)  # fmt: skip
