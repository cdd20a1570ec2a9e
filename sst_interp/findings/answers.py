"""What a run says about the claims on its output, answers and training (C4, C5, C10, C11, C14, C15)."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np

from sst_interp.analyses.output_change import PAPER_RANK, TokenReplacement
from sst_interp.analyses.statistics.bootstrap import Interval, percent_text, points_text, questions_words
from sst_interp.errors import SSTError, Untestable
from sst_interp.experiments.studies.errors import PAPER_ERROR, headline_row
from sst_interp.findings.claims import Evidence, Finding, claim, judged, reaches, too_few, untestable

REPLACED, BROKEN = 27.0, 0.15
ALPHA = {"mean": (0.0135, 0.054), "smallest": (0.0075, 0.03), "largest": (0.05, 0.2)}


class BlendWeights(NamedTuple):
    """The learned blend weights of a checkpoint, over all layers and dimensions (claim C14)."""

    mean: float
    smallest: float
    largest: float
    start: float | None = None
    """Where training started, if that is known."""


def blend_weights(alpha: Any, start: float | None = None) -> BlendWeights:
    """Mean and range of `alpha` [layer, d_model]: anything that numpy reads as numbers."""
    values = np.asarray(alpha, dtype=float)
    if not values.size:
        return BlendWeights(math.nan, math.nan, math.nan, start)
    return BlendWeights(float(values.mean()), float(values.min()), float(values.max()), start)


@claim(
    "C4", "a shift replaces half of the top 100 tokens, a stable position hardly any",
    "54 against 1 (medians)",
    "the intervals reach 27 replaced at shifts (half) and a tenth of what shifts replace, or less, at stable "
    "positions; and that of the difference is above 0",
    54,
)  # fmt: skip
def replaced(e: Evidence) -> Finding:
    """Tokens replaced at shifts and at stable positions; beside it random changes of the same size."""
    found: TokenReplacement = e("token_replacement")
    here = f"{found.shifted.text()} against {found.stable.text()}"
    last = found.last_shifted.estimate, found.last_stable.estimate
    control = f"by the last layer alone {_shown(*last)}; {_replaced_at_random(e)}"
    if e.comparison == "free_running":
        control += f"; while both have read the same tokens {_shown(*found.same_tokens('replaced'))}"
    for group, why in ((found.shifted, "no position shifts"), (found.stable, "no position is stable")):
        if not math.isfinite(group.estimate):
            return untestable(f"{why} (overlap below {found.threshold:.4g})", here, control)
    holds = reaches(found.shifted, REPLACED) and reaches(found.stable, high=found.shifted.high / 10)
    holds = holds and found.difference.low > 0
    return Finding(here, judged(holds, found.shifted, found.stable, found.difference), found.shifted, control)


@claim(
    "C5", "the new winner comes from as deep as rank 50", "50",
    "the deepest rank a new most likely token came from is 50 or more (0-based)", 50,
)  # fmt: skip
def deepest_winner(e: Evidence) -> Finding:
    """The deepest rank of a new winner; beside it how deep random changes of the same size reach."""
    found: TokenReplacement = e("token_replacement")
    n = found.beyond.n_questions
    if e.comparison == "free_running":
        deepest = np.nanmax([*found.same_tokens("deepest_rank"), 0.0])
        control = f"while both have read the same tokens rank {deepest:.0f}"
    else:
        control = _deepest_at_random(e)
    if found.deepest_rank is None:
        return untestable("the most likely token never changes", control=control)
    figure = Interval(found.deepest_rank, math.nan, math.nan, n, reason="a maximum has no interval")
    here = f"rank {found.deepest_rank:,}, deepest of {found.n_winners:,} new winners; beyond {PAPER_RANK} "
    here += found.beyond.text(percent=True)
    return Finding(here, judged(found.deepest_rank >= PAPER_RANK, why=too_few(n)), figure, control)


@claim(
    "C10", "thinking longer about every question breaks right answers and costs accuracy",
    "51.0% at depth 1, 42.9% at depth 4; 30 of 101 broken",
    "the interval of the change of accuracy is below 0 and that of the broken share reaches 15% (half). "
    "Accuracy no better than blind guessing cannot be broken: not testable",
    30 / 101,
    per="run",
)  # fmt: skip
def broken(e: Evidence) -> Finding:
    """Accuracy by flat depth and what it breaks; beside it what it mends, and blind guessing."""
    found = e("overthinking")
    guess = 1 / found.choices if found.choices else 0.0
    here = f"{percent_text(found.accuracy.estimate)} at depth {found.base}, "
    here += f"{percent_text(found.deep_accuracy.estimate)} at depth {found.deepest} "
    here += f"({points_text(found.difference)}); {found.broken} of {found.right} broken"
    control = f"{found.mended} of {found.n_questions - found.right} wrong answers mended (McNemar p = "
    control += f"{found.p_value:.2g})"
    if math.isfinite(found.changed.estimate):
        control += f"; {percent_text(found.changed.estimate)} of the answers change at some depth"
    control += f"; blind guessing {percent_text(guess)}" if found.choices else ""
    why = None if found.right else f"no answer is right at depth {found.base}"
    if found.choices and found.accuracy.known and found.accuracy.low <= guess:
        why = why or f"accuracy at depth {found.base} is not above blind guessing ({percent_text(guess)})"
    holds = found.difference.high < 0 and reaches(found.broken_share, BROKEN)
    verdict = judged(holds, found.difference, found.broken_share, why=too_few(found.n_questions) or why)
    return Finding(here, verdict, found.broken_share, control)


@claim(
    "C11", "the best of the depths (an oracle) beats the matched baseline", "61.1% against 46.0%",
    "the oracle is above the baseline and, where answers are lettered, above the oracle of blind new "
    "guesses, both by their intervals",
    0.611 - 0.460,
    per="run",
)  # fmt: skip
def oracle_beats(e: Evidence) -> Finding:
    """The oracle over depths against the matched baseline; beside it what blind guesses would give."""
    found = e("overthinking")
    here = f"oracle {found.oracle.text(percent=True)}"
    control = f"an oracle of unrelated depths has {percent_text(found.unrelated.estimate)}"
    lettered = math.isfinite(found.blind.estimate)
    if lettered:
        control += f", one of blind new guesses {percent_text(found.blind.estimate)}"
    if not found.baseline.n_questions:
        return untestable(str(found.baseline.reason), here, control)
    here += f", baseline {found.baseline.text(percent=True)}"
    control = f"depth {found.base} alone is {points_text(found.base_over_baseline)} from it; {control}"
    holds = found.over_baseline.low > 0 and (not lettered or found.beyond_blind.low > 0)
    needed = (found.over_baseline, found.beyond_blind) if lettered else (found.over_baseline,)
    return Finding(here, judged(holds, *needed), found.over_baseline, control)


@claim(
    "C14", "learned blend weights: mean, range", "0.027, [0.015, 0.10]",
    "the mean is 0.0135 to 0.054, the smallest 0.0075 to 0.03, the largest 0.05 to 0.2 (half to twice)",
    0.027,
    per="run",
)  # fmt: skip
def learned_blend(e: Evidence) -> Finding:
    """Mean and range of the learned weights; beside it where training started."""
    _needs_a_blend(e)
    weights: BlendWeights | None = e.beside.get("alpha")
    if weights is None:
        raise Untestable("no blend weights were given")
    here = f"{weights.mean:.3g}, [{weights.smallest:.3g}, {weights.largest:.3g}]"
    control = "where training started is not known"
    if weights.start is not None:
        control = (
            f"training started at {weights.start:.3g}: the mean moved by {weights.mean - weights.start:+.2g}"
        )
    numbers = {"mean": weights.mean, "smallest": weights.smallest, "largest": weights.largest}
    if not all(math.isfinite(v) for v in numbers.values()):
        return untestable("the weights are not all numbers", control=control)
    if weights.largest - weights.smallest <= 1e-6 * abs(weights.mean):
        return untestable("all weights are equal: the blend was set, not learned", here, control)
    holds = all(low <= numbers[name] <= high for name, (low, high) in ALPHA.items())
    figure = Interval(weights.mean, math.nan, math.nan, 0, reason="weights, not questions")
    return Finding(here, judged(holds), figure, control)


@claim(
    "C15", "the error of the two-pass approximation is of the order of alpha squared", "6e-4 to 1.2e-3",
    "the interval of the relative error of the logits is at most 1.2e-3; straddling it is not testable",
    1.2e-3,
    per="run",
)  # fmt: skip
def two_pass_error(e: Evidence) -> list[Finding]:
    """The two-pass error, a finding per model; beside it what it does to tokens and loss."""
    _needs_a_blend(e)
    found = e.beside.get("approximation")
    if found is None:
        raise Untestable("no measurement of the approximation was given")
    if not found.headline:
        raise Untestable("no two-pass error was measured")
    findings = []
    for model, error in found.headline.items():
        row = headline_row(found.schedules, model)
        if row is None:
            continue
        here = f"{error.text()} ({model}, alpha {row['alpha']:.3g} in {row['n_layers']} layers)"
        control = f"{percent_text(row['argmax'])} of the most likely tokens differ; loss "
        control += f"{row['loss_change']:+.2g} nats per token; alpha squared is {row['alpha'] ** 2:.2g}"
        why = "the interval straddles 1.2e-3" if error.low <= PAPER_ERROR[1] < error.high else None
        findings.append(Finding(here, judged(error.high <= PAPER_ERROR[1], error, why=why), error, control))
    return findings


def _needs_a_blend(e: Evidence) -> None:
    if e.beside.get("no_blend"):
        raise Untestable(e.beside["no_blend"])


def _shown(some: float, none: float) -> str:
    return " against ".join(f"{v:.3g}" if math.isfinite(v) else "none" for v in (some, none))


def _replaced_at_random(e: Evidence) -> str:
    """Tokens that the true change and random ones of its size replace at shifted positions, means."""
    try:
        found = e("precedence")
    except SSTError as error:
        return f"random changes not measured: {error.message}"
    if not found.at_shifts:
        return f"random changes not measured: {found.no_perturbations or 'no perturbed position shifts'}"
    true, random = found.at_shifts["true"], found.at_shifts["random"]
    words = f"the last layer's change replaces {true['replaced']:.3g} (mean), a random one of that size "
    return words + f"{random['replaced']:.3g} ({questions_words(int(random['questions']))})"


def _deepest_at_random(e: Evidence) -> str:
    """The deepest rank a new winner came from by random changes of the last layer, deepest pair."""
    try:
        rows = e.contrast.tables("nudges", e.comparison)
    except SSTError as error:
        return f"random changes not measured: {error.message}"
    rows = rows[((rows["site"] == "output") & (rows["direction"] == "random")).to_numpy(dtype=bool)]
    if rows.empty:
        return "random changes not measured"
    rank = rows.loc[(rows["b"] == rows["b"].max()).to_numpy(dtype=bool), "winner_rank"]
    return (
        f"random changes of that size reach rank {int(rank.max()):,} ({int((rank > 0).sum()):,} new winners)"
    )
