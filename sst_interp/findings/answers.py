"""Claims about the output, the answers and the blend (C4, C5, C10, C11, C14, C15), and those that take an
experiment of their own: the halting probe (C12, C13) and causal patching (C16, C16b).

The commands of the experiments take minutes and keep their rows with the run (`of_run.keep_findings`).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from sst_interp.analyses.output_change import PAPER_RANK, TokenReplacement
from sst_interp.analyses.result import Analysis, Result
from sst_interp.analyses.statistics.bootstrap import Interval, percent_text, points_text, questions_words
from sst_interp.errors import Untestable
from sst_interp.experiments.studies.errors import PAPER_ERROR, headline_row
from sst_interp.findings.claims import (
    CLAIMS,
    EVERYWHERE,
    LEAST,
    Evidence,
    Finding,
    Row,
    claim,
    if_measured,
    judged,
    reaches,
    same_norm,
    too_few,
    untestable,
)

REPLACED, BROKEN = 27.0, 0.15
ALPHA = {"mean": (0.0135, 0.054), "smallest": (0.0075, 0.03), "largest": (0.05, 0.2)}


class BlendWeights(NamedTuple):
    """Learned blend weights of a checkpoint over all layers and dimensions (C14)."""

    mean: float
    smallest: float
    largest: float
    start: float | None = None
    """Where training started, if known."""


def blend_weights(alpha: Any, start: float | None = None) -> BlendWeights:
    """Mean and range of `alpha` [layer, d_model], any array of numbers."""
    values = np.asarray(alpha, dtype=float)
    if not values.size:
        return BlendWeights(math.nan, math.nan, math.nan, start)
    return BlendWeights(float(values.mean()), float(values.min()), float(values.max()), start)


@claim(
    "C4", "a shift replaces half of the top 100 tokens, a stable position hardly any",
    "54 against 1 (medians)",
    "at shifts the interval reaches 27 (half), at stable positions a tenth of that at shifts or less, and "
    "the interval of the difference is above 0",
    54,
)  # fmt: skip
def replaced(e: Evidence) -> Finding:
    """Tokens replaced at shifts and at stable positions; beside it random changes of the same norm."""
    tokens: TokenReplacement = e("token_replacement")
    here = f"{tokens.shifted.text()} against {tokens.stable.text()}"
    last = tokens.last_shifted.estimate, tokens.last_stable.estimate
    control = f"by the last layer alone {_shown(*last)}; "
    control += if_measured("random changes", _replaced_at_random, e)
    if e.comparison == "free_running":
        control += f"; while both have read the same tokens {_shown(*tokens.same_tokens('replaced'))}"
    for group, why in ((tokens.shifted, "no position shifts"), (tokens.stable, "no position is stable")):
        if not math.isfinite(group.estimate):
            return untestable(f"{why} (overlap below {tokens.threshold:.4g})", here, control)
    holds = reaches(tokens.shifted, REPLACED) and reaches(tokens.stable, high=tokens.shifted.high / 10)
    holds = holds and tokens.difference.low > 0
    verdict = judged(holds, tokens.shifted, tokens.stable, tokens.difference)
    return Finding(here, verdict, tokens.shifted, control)


@claim(
    "C5", "the new winner comes from rank 50 or deeper", "50",
    "the deepest rank of a new most likely token is 50 or more (0-based)", 50,
)  # fmt: skip
def deepest_winner(e: Evidence) -> Finding:
    """The deepest rank of a new winner; beside it that of random changes of the same norm."""
    tokens: TokenReplacement = e("token_replacement")
    n = tokens.beyond.n_questions
    if e.comparison == "free_running":
        deepest = np.nanmax([*tokens.same_tokens("deepest_rank"), 0.0])
        control = f"while both have read the same tokens rank {deepest:.0f}"
    else:
        control = if_measured("random changes", _deepest_at_random, e)
    if tokens.deepest_rank is None:
        return untestable("the most likely token never changes", control=control)
    figure = Interval(tokens.deepest_rank, math.nan, math.nan, n, reason="a maximum has no interval")
    here = f"rank {tokens.deepest_rank:,}, deepest of {tokens.n_winners:,} new winners; beyond {PAPER_RANK} "
    here += tokens.beyond.text(percent=True)
    return Finding(here, judged(tokens.deepest_rank >= PAPER_RANK, why=too_few(n)), figure, control)


@claim(
    "C10", "thinking longer about every question breaks right answers",
    "51.0% at depth 1, 42.9% at depth 4; 30 of 101 broken",
    "the interval of the change of accuracy is below 0 and that of the broken share reaches 15% (half). "
    "Not testable if accuracy is no better than blind guessing",
    30 / 101,
    per="run",
)  # fmt: skip
def broken(e: Evidence) -> Finding:
    """Accuracy by flat depth and right answers broken; beside it wrong ones mended, and blind guessing."""
    answers = e("overthinking")
    guess = 1 / answers.choices if answers.choices else 0.0
    here = f"{percent_text(answers.accuracy.estimate)} at depth {answers.base}, "
    here += f"{percent_text(answers.deep_accuracy.estimate)} at depth {answers.deepest} "
    here += f"({points_text(answers.difference)}); {answers.broken} of {answers.right} broken"
    control = f"{answers.mended} of {answers.n_questions - answers.right} wrong answers mended (McNemar p = "
    control += f"{answers.p_value:.2g})"
    if math.isfinite(answers.changed.estimate):
        control += f"; {percent_text(answers.changed.estimate)} of the answers change at some depth"
    control += f"; blind guessing {percent_text(guess)}" if answers.choices else ""
    why = None if answers.right else f"no answer is right at depth {answers.base}"
    if answers.choices and answers.accuracy.known and answers.accuracy.low <= guess:
        why = why or f"accuracy at depth {answers.base} is not above blind guessing ({percent_text(guess)})"
    holds = answers.difference.high < 0 and reaches(answers.broken_share, BROKEN)
    verdict = judged(holds, answers.difference, answers.broken_share, why=too_few(answers.n_questions) or why)
    return Finding(here, verdict, answers.broken_share, control)


@claim(
    "C11", "the best depth per question (an oracle) beats the matched baseline", "61.1% against 46.0%",
    "the oracle is above the baseline and, if answers are lettered, above an oracle of blind guesses (both "
    "by the interval of the difference)",
    0.611 - 0.460,
    per="run",
)  # fmt: skip
def oracle_beats(e: Evidence) -> Finding:
    """The oracle over depths against the matched baseline; beside it an oracle of blind guesses."""
    answers = e("overthinking")
    here = f"oracle {answers.oracle.text(percent=True)}"
    control = f"an oracle of unrelated depths has {percent_text(answers.unrelated.estimate)}"
    lettered = math.isfinite(answers.blind.estimate)
    if lettered:
        control += f", one of blind new guesses {percent_text(answers.blind.estimate)}"
    if not answers.baseline.n_questions:
        return untestable(str(answers.baseline.reason), here, control)
    here += f", baseline {answers.baseline.text(percent=True)}"
    control = f"depth {answers.base} alone is {points_text(answers.base_over_baseline)} from it; {control}"
    holds = answers.over_baseline.low > 0 and (not lettered or answers.beyond_blind.low > 0)
    needed = (answers.over_baseline, answers.beyond_blind) if lettered else (answers.over_baseline,)
    return Finding(here, judged(holds, *needed), answers.over_baseline, control)


@claim(
    "C14", "the learned blend weights: mean, range", "0.027, [0.015, 0.10]",
    "the mean is 0.0135 to 0.054, the smallest 0.0075 to 0.03, the largest 0.05 to 0.2 (half to twice)",
    0.027,
    per="run",
)  # fmt: skip
def learned_blend(e: Evidence) -> Finding:
    """Mean and range of the learned weights; beside it their start."""
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
    "the interval of the relative error of the logits is at most 1.2e-3; not testable if it straddles that",
    1.2e-3,
    per="run",
)  # fmt: skip
def two_pass_error(e: Evidence) -> list[Finding]:
    """The two-pass error, a finding per model; beside it the change of tokens and loss."""
    _needs_a_blend(e)
    measured = e.beside.get("approximation")
    if measured is None:
        raise Untestable("no measurement of the approximation was given")
    if not measured.headline:
        raise Untestable("no two-pass error was measured")
    findings = []
    for model, error in measured.headline.items():
        row = headline_row(measured.schedules, model)
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
    """Tokens that the last layer's change and random ones of its norm replace at shifted positions, means."""
    true, random = same_norm(e)
    words = f"the last layer's change replaces {true['replaced']:.3g} (mean), a random one of the same norm "
    return words + f"{random['replaced']:.3g} ({questions_words(int(random['questions']))})"


def _deepest_at_random(e: Evidence) -> str:
    """The deepest rank of a new winner after a random change of the last layer, deepest pair."""
    rows = e.contrast.tables("nudges", e.comparison)
    rows = rows[((rows["site"] == "output") & (rows["direction"] == "random")).to_numpy(dtype=bool)]
    if rows.empty:
        raise Untestable("the run has none of the last layer")
    rank = rows.loc[(rows["b"] == rows["b"].max()).to_numpy(dtype=bool), "winner_rank"]
    new = int((rank > 0).sum())
    return f"random changes of the same norm reach rank {int(rank.max()):,} ({new:,} new winners)"


PAPER_LABEL, LEVEL = "must-halt", 0.05


def _measured_by(command: str) -> Callable[[Any], Result]:
    def elsewhere(_: Any) -> Result:
        raise Untestable(f"`sst-interp {command}` measures it")

    return elsewhere


KEPT = {
    about.name: about
    for about in (
        Analysis(
            "halting", _measured_by("probe"), "The halting probe",
            "Does position 0 say which questions must halt?", ("C12",), per="run", order=150,
        ),
        Analysis(
            "routing", _measured_by("probe"), "Routing",
            "What does choosing a depth per question gain?", ("C13",), per="run", order=160,
        ),
        Analysis(
            "patching", _measured_by("patch"), "Causal patching",
            "Does a shift cause the changed output?", ("C16", "C16b"), per="run", order=170,
        ),
    )
}  # fmt: skip
"""Result that is kept with a run -> its section of the report."""


@claim(
    "C12", "a probe of the state at position 0 tells which questions must halt",
    "29 of 48 in leave-one-out, p = 0.0009; 107 of 5,376 dimensions of layer 15 of 62",
    "for must-halt, with everything chosen inside the fold, the permutation p of the leave-one-out AUC is "
    "below 0.05 and its interval above one half. Not testable if accuracy is no better than blind guessing",
    29 / 48,
    per="run",
    measured="probe",
)  # fmt: skip
def probe_tells(probe: Any) -> Finding:
    """Hits, AUC and p of a `Halting`; beside them specificity and the alternatives."""
    dims = probe.dims
    here = f"{probe.hits} of {probe.n_positive} {probe.label} questions, AUC {probe.auc.text()}"
    here += f", p = {probe.p_auc:.2g}" if probe.permutations else ", not tested"
    here += f"; {dims.count:.0f} dimensions ({percent_text(dims.share)} of a layer)" if dims else ""
    tells = bool(probe.p_auc < LEVEL and probe.auc.low > 0.5)
    verdict = judged(tells, probe.auc, why=_not_by_this_probe(probe))
    return Finding(here, verdict, probe.sensitivity, _beside(probe))


@claim(
    "C13", "the depth that the probe picks breaks no right answer", "0 broken, 4 conservative errors",
    "routed out of fold by the must-halt probe, no answer that is right at the least depth breaks, and more "
    "are right than with the same depths dealt at random (interval above 0). Not testable if accuracy is no "
    "better than blind guessing",
    per="run",
    measured="probe",
)  # fmt: skip
def routed_breaks(probe: Any, routing: Any) -> Finding:
    """Answers that a `Routing` breaks; beside it flat depths and depths dealt at random."""
    if routing.no_probe:
        return untestable(routing.no_probe)
    row, flat = routing.row("probe"), routing.policies[routing.policies["kind"] == "flat"]
    interval = Interval(row["broken_share"], row["broken_share_low"], row["broken_share_high"], routing.right)
    beyond = Interval(row["beyond"], row["beyond_low"], row["beyond_high"], routing.n_questions)
    here = f"{row['broken']} of {routing.right} right answers broken, "
    here += f"{row['conservative']} conservative errors"
    control = f"{row['mended']} mended; accuracy {percent_text(row['accuracy'])}, over the same depths dealt "
    control += f"at random {points_text(beyond)}"
    for name, place in (("always-halt", 0), ("never-halt", -1)):
        one = flat.iloc[place]
        control += f"; {name} breaks {one['broken']}, accuracy {percent_text(one['accuracy'])}"
    if routing.right < LEAST:
        few = f"{questions_words(routing.right)} right at depth {routing.base}"
        return Finding(here, judged(False, why=few), interval, control)
    holds = row["broken"] == 0 and beyond.low > 0
    verdict = judged(holds, beyond, why=_not_by_this_probe(probe, tested=False))
    return Finding(here, verdict, interval, control)


@claim(
    "C16", "a shift causes the changed output (our own)", "not in the paper",
    "at shifted pairs below the last layer the other depth's state moves the logit difference its way in "
    "both directions (intervals of the recovered share above 0), and further than a random change and "
    "another question's change of the same norm (intervals of the differences above 0)",
    per="run",
    measured="patching",
)  # fmt: skip
def shift_causes(patching: Any) -> Finding:
    """What the other depth's state recovers (a `Patching`); beside it controls of the same norm."""
    recovered = list(patching.recovered.values())
    beyond = [interval for controls in patching.beyond.values() for interval in controls.values()]
    both = len(recovered) == 2
    holds = both and all(interval.low > 0 for interval in (*recovered, *beyond))
    here = "; ".join(f"{way} {i.text(percent=True)} recovered" for way, i in patching.recovered.items())
    parts = []
    for way, controls in patching.beyond.items():
        named = ", ".join(f"{interval.text(percent=True)} ({what})" for what, interval in controls.items())
        parts.append(f"{way}, {named}")
    control = f"beyond controls of the same norm: {'; '.join(parts)}"
    return Finding(here, judged(holds, *recovered, *beyond), recovered[0], control)


@claim(
    "C16b", "a shift matters more than its size (our own)", "not in the paper",
    "in a regression of the log effect of a patch below the last layer on its log norm, shifted pairs have a "
    "larger effect than stable ones (interval of the coefficient above 0)",
    per="run",
    measured="patching",
)  # fmt: skip
def beyond_its_size(patching: Any) -> Finding:
    """The effect of shifting at equal norm (a `Patching`); beside it the coefficient of the norm."""
    if patching.beyond_size is None or patching.size_slope is None:
        return untestable(str(patching.why_not))
    extra = patching.beyond_size
    here = f"{extra.text()} (log KL, shifted against stable, at equal norm)"
    control = f"coefficient of the log norm {patching.size_slope.text()}; "
    control += f"{patching.shifted:.0%} of the pairs shifted"
    return Finding(here, judged(extra.low > 0, extra), extra, control)


def probe_rows(halting: Any, routing: Any) -> list[Row]:
    """The rows of C12 and C13, for `claims(run, more=...)`.

    Args:
        halting: the `Halting` of a run, or the `Untestable` that was raised. The label must be `must-halt`.
        routing: the `Routing` of the same run by that probe, or the `Untestable`.
    """
    return [_measured_row("C12", halting), _measured_row("C13", halting, routing)]


def patching_rows(patching: Any) -> list[Row]:
    """The rows of C16 and C16b from a `Patching` (or the `Untestable`), for `claims(run, more=...)`."""
    if not isinstance(patching, Untestable) and not patching.recovered:
        patching = Untestable("no patched pair has shifted")
    return [_measured_row("C16", patching), _measured_row("C16b", patching)]


def _measured_row(id: str, *results: Any) -> Row:
    """The row of a claim that an experiment measured, or why one of its results does not exist."""
    why = next((result.message for result in results if isinstance(result, Untestable)), None)
    finding: Any = CLAIMS[id].judge(*results) if why is None else untestable(why)
    return Row(CLAIMS[id].claim, EVERYWHERE, finding)


def _not_by_this_probe(probe: Any, tested: bool = True) -> str | None:
    """Why this probe decides neither claim, or None."""
    if probe.label != PAPER_LABEL:
        return f"the claim is about {PAPER_LABEL}, this probe tells {probe.label}"
    if probe.at_chance:
        return probe.at_chance
    few = min(probe.n_positive, probe.n_questions - probe.n_positive)
    if few < LEAST:
        return f"the smaller class has {questions_words(few)} ({LEAST} are needed)"
    least = int(np.ceil(1 / LEVEL))
    if tested and probe.permutations < least:
        return f"{probe.permutations} permutations cannot reach p < {LEVEL} ({least} are needed)"
    return None


def _beside(probe: Any) -> str:
    negative = probe.n_questions - probe.n_positive
    let_go = negative - (probe.called - probe.hits)
    words = f"{let_go} of {negative} others let go (always-{probe.action} 0); leave-pair-out "
    words += f"{probe.pair_auc.estimate:.2f}"
    own = probe.readings[probe.readings["whose"] == "this run"].set_index("against")["p"]
    words += f"; hits as a binomial figure p = {own.iloc[0]:.2g} at the rate the paper's p implies, "
    words += f"{own.loc['one half']:.2g} at one half"
    if probe.permutations:
        words += f", {probe.p_hits:.2g} by permutation"
    plain = probe.comparison.iloc[1:-2]
    if len(plain):
        best = plain.iloc[int(np.argmax(plain["auc"].to_numpy()))]
        words += f"; best plain alternative {best['name']} {best['auc']:.2f}"
    return words + f"; with selection outside the fold {probe.leaky_auc.estimate:.2f}"
