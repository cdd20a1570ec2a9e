"""What a run says about the claims on its output, answers and training (C4, C5, C10, C11, C14, C15)."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import pandas as pd

from sst_interp.analyses.ledger.rules import Finding, judged, reaches, too_few, untestable
from sst_interp.analyses.ledger.suite import Suite
from sst_interp.analyses.overthinking import Overthinking
from sst_interp.analyses.parts.answers import answers_of
from sst_interp.analyses.parts.output_change import NONE, PAPER_RANK, SAME, SOME
from sst_interp.analyses.precedence import Precedence
from sst_interp.analyses.statistics.bootstrap import Interval, percent_text, points_text, questions_words
from sst_interp.analyses.token_replacement import TokenReplacement
from sst_interp.errors import SSTError

if TYPE_CHECKING:
    from sst_interp.experiments.studies.errors import ApproximationError

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


def replaced(suite: Suite, comparison: str) -> Finding:
    """C4: tokens replaced at shifts and at stable positions; beside it nudges of the same size."""
    found = suite.get(TokenReplacement, "token_replacement", comparison)
    here = f"{found.shifted.text()} against {found.stable.text()}"
    control = f"by the last layer alone {found.last_shifted.text()} against {found.last_stable.text()}; "
    control += _nudged(suite, comparison) + _same_tokens(found, "replaced")
    for group, why in ((found.shifted, "no position shifts"), (found.stable, "no position is stable")):
        if not math.isfinite(group.estimate):
            return untestable(f"{why} (overlap below {found.threshold:.4g})", here, control)
    holds = reaches(found.shifted, REPLACED) and reaches(found.stable, high=found.shifted.high / 10)
    holds = holds and found.difference.low > 0
    return Finding(here, judged(holds, found.shifted, found.stable, found.difference), found.shifted, control)


def deepest_winner(suite: Suite, comparison: str) -> Finding:
    """C5: the deepest rank of a new winner; beside it the share from beyond, and how deep nudges reach."""
    found = suite.get(TokenReplacement, "token_replacement", comparison)
    n = found.beyond.n_questions
    control = _deepest_nudged(suite, comparison) + _same_tokens(found, "deepest_rank")
    if found.deepest_rank is None:
        return untestable("the most likely token never changes", control=control)
    figure = Interval(found.deepest_rank, math.nan, math.nan, n, reason="a maximum has no interval")
    here = f"rank {found.deepest_rank:,}, deepest of {found.n_winners:,} new winners; beyond {PAPER_RANK} "
    here += found.beyond.text(percent=True)
    return Finding(here, judged(found.deepest_rank >= PAPER_RANK, why=too_few(n)), figure, control)


def broken(suite: Suite) -> Finding:
    """C10: accuracy by flat depth and what it breaks; beside it what it mends, and blind guessing."""
    found = suite.get(Overthinking, "overthinking")
    choices = answers_of(suite.tables["questions"]).choices
    guess = 1 / choices if choices else 0.0
    here = f"{found.accuracy.text(percent=True)} at depth {found.base}, "
    here += f"{found.deep_accuracy.text(percent=True)} at depth {found.deepest} "
    here += f"({points_text(found.difference)}); {found.broken} of {found.right} broken"
    control = f"{found.mended} of {found.n_questions - found.right} wrong answers mended (McNemar p = "
    control += f"{found.p_value:.2g}); depths exchangeable p = {found.p_depths:.2g}; "
    control += f"{found.changed.text(percent=True)} of the answers change at some depth"
    control += f"; blind guessing {percent_text(guess)}" if choices else ""
    why = None if found.right else f"no answer is right at depth {found.base}"
    if choices and found.accuracy.known and found.accuracy.low <= guess:
        why = why or f"accuracy at depth {found.base} is not above blind guessing ({percent_text(guess)})"
    holds = found.difference.high < 0 and reaches(found.broken_share, BROKEN)
    verdict = judged(holds, found.difference, found.broken_share, why=too_few(found.n_questions) or why)
    return Finding(here, verdict, found.broken_share, control)


def oracle_beats(suite: Suite, baseline: bool) -> Finding:
    """C11: the oracle over depths against the matched baseline; beside it what blind guesses would give."""
    found = suite.get(Overthinking, "overthinking")
    here = f"oracle {found.oracle.text(percent=True)}, baseline {found.baseline.text(percent=True)}"
    control = f"without an oracle, depth {found.base} less baseline: {points_text(found.base_over_baseline)}"
    control += f"; oracle were the depths unrelated {percent_text(found.unrelated.estimate)}"
    lettered = math.isfinite(found.blind.estimate)
    if lettered:
        control += f"; had new answers been blind guesses {percent_text(found.blind.estimate)} (oracle "
        control += f"{points_text(found.beyond_blind)})"
    if not baseline:
        here = f"oracle {found.oracle.text(percent=True)}"
        control = control.split("; ", 1)[1]
        return untestable("no run of the matched baseline was given", here, control)
    if not found.baseline.n_questions:
        return untestable("the baseline has none of these questions", here, control)
    holds = found.over_baseline.low > 0 and (not lettered or found.beyond_blind.low > 0)
    needed = (found.over_baseline, found.beyond_blind) if lettered else (found.over_baseline,)
    return Finding(here, judged(holds, *needed), found.over_baseline, control)


def learned_blend(weights: BlendWeights | None) -> Finding:
    """C14: mean and range of the learned weights; beside it where training started."""
    if weights is None:
        return untestable("no blend weights were given")
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


def two_pass_error(found: ApproximationError | None) -> list[Finding]:
    """C15: the two-pass error, a finding per model; beside it what it does to tokens and loss."""
    if found is None:
        return [untestable("no measurement of the approximation was given")]
    from sst_interp.experiments.studies.errors import PAPER_ERROR, headline_row

    findings = []
    for model, error in found.headline.items():
        row = headline_row(found.schedules, model)
        if row is None:
            continue
        here = f"{model}, alpha {row['alpha']:.3g} in {row['n_layers']} layers: {error.text()}"
        control = (
            f"{percent_text(row['argmax'])} of the most likely tokens differ; loss {row['loss_change']:+.2g} "
        )
        control += f"nats per token; alpha squared is {row['alpha'] ** 2:.2g}"
        if math.isfinite(found.layerwise):
            control += f"; the solution taken as exact is {found.layerwise:.1g} from the sequential one"
        why = "the interval straddles 1.2e-3" if error.low <= PAPER_ERROR[1] < error.high else None
        findings.append(Finding(here, judged(error.high <= PAPER_ERROR[1], error, why=why), error, control))
    return findings


def _nudged(suite: Suite, comparison: str) -> str:
    """Tokens that the true change and random nudges of its size replace at shifted positions, means."""
    try:
        found = suite.get(Precedence, "precedence", comparison)
    except SSTError as error:
        return f"nudges not testable: {error.message}"
    table = found.beside_nudges
    if found.no_nudges or table.empty:
        return f"nudges not testable: {found.no_nudges or 'none'}"
    rows = table[(table["site"] == "output") & (table["where"] == "shifted")]
    by: dict[Any, dict[Any, Any]] = {row["direction"]: row for row in rows.to_dict("records")}
    if not {"true", "random"} <= by.keys():
        return "nudges not testable: no position with controls shifts"
    words = f"at shifts with controls the last layer's change replaces {by['true']['replaced']:.3g} (mean), "
    words += f"random nudges of that size {by['random']['replaced']:.3g} "
    return words + f"({questions_words(int(by['random']['questions']))})"


def _deepest_nudged(suite: Suite, comparison: str) -> str:
    """The deepest rank a new winner came from by random nudges of the last layer, deepest pair."""
    rows: pd.DataFrame = suite.of("nudges", comparison)
    rows = rows[((rows["site"] == "output") & (rows["direction"] == "random")).to_numpy(dtype=bool)]
    if rows.empty:
        return "nudges not testable: the run has none of this comparison"
    rank = rows.loc[(rows["b"] == rows["b"].max()).to_numpy(dtype=bool), "winner_rank"]
    return f"random nudges of that size: rank {int(rank.max()):,}, deepest of {int((rank > 0).sum()):,}"


def _same_tokens(found: TokenReplacement, column: str) -> str:
    """In `free`: the same while both depths have read the same tokens."""
    if found.comparison != "free":
        return ""
    rows = found.groups.set_index("where")[column].to_dict()
    some, none = (float(rows.get(f"{where}, {SAME}", math.nan)) for where in (SOME, NONE))
    shown = [f"{v:.3g}" if math.isfinite(v) else "none" for v in (some, none)]
    if column == "replaced":
        return f"; while both have read the same tokens {shown[0]} against {shown[1]}"
    deepest = np.nanmax([some, none, 0.0])
    return f"; while both have read the same tokens {deepest:.0f}"
