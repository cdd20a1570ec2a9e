"""Claims about the answers and the blend (C10, C11, C14, C15), and those that an experiment measures: the
halting probe (C12, C13) and causal patching (C16, C16b).

The commands of the experiments take minutes and keep their rows with the run (`of_run.keep_findings`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from sst_interp.analyses.answers import Answers, answers_of, margin_changes, mcnemar
from sst_interp.analyses.contrast import Tables
from sst_interp.analyses.result import Analysis, Result
from sst_interp.analyses.statistics.bootstrap import Interval, nothing, percent_text, questions_words
from sst_interp.analyses.statistics.clusters import (
    cluster_share,
    mean_t,
)
from sst_interp.errors import Untestable
from sst_interp.findings.claims import (
    CLAIMS,
    CONTRADICTED,
    EVERYWHERE,
    INCONCLUSIVE,
    LEVEL,
    SUPPORTED,
    Evidence,
    Finding,
    Part,
    Row,
    claim,
    graded,
    not_comparable,
)

ALPHA = {"1% quantile": (0.0075, 0.03), "99% quantile": (0.05, 0.2)}
MUST_HALT = 35
"""Must-halt questions that tell an AUC of 0.75 from one half; 0.65 takes 70."""


class BlendWeights(NamedTuple):
    """Learned blend weights of a checkpoint over all layers and dimensions (C14)."""

    mean: float
    smallest: float
    largest: float
    start: float | None = None
    """Where training started, if known."""
    bounds: tuple[float, float] | None = None
    """Between which training kept them; None: not bounded, or not known."""


def blend_weights(
    alpha: Any, start: float | None = None, bounds: tuple[float, float] | None = None
) -> BlendWeights:
    """Mean, 1% and 99% quantile of `alpha` [layer, d_model], any array of numbers."""
    values = np.asarray(alpha, dtype=float)
    if not values.size:
        return BlendWeights(math.nan, math.nan, math.nan, start, bounds)
    low, high = np.quantile(values, [0.01, 0.99])
    return BlendWeights(float(values.mean()), float(low), float(high), start, bounds)


@claim(
    "C10", "thinking longer about every question breaks right answers",
    "51.0% at depth 1, 42.9% at depth 4; 30 of 101 broken",
    "the paired difference of accuracy, deepest less shallowest depth, is below 0 by its interval; "
    "contradicted if the interval lies above -4 points (half of the paper's); 260 questions", 0.429 - 0.510,
    per="run",
)  # fmt: skip
def broken(e: Evidence) -> Finding:
    """The paired difference; beside it answers broken and mended."""
    answers = _answers(e)
    first, last = answers.correct[:, 0], answers.correct[:, -1]
    broke, mended = int((first & ~last).sum()), int((last & ~first).sum())
    n, p = len(first), float(mcnemar(broke, mended))
    note = (
        f"{broke} of {int(first.sum())} right answers broken, {mended} of {n - int(first.sum())} wrong ones "
    )
    note += f"mended (exact McNemar p = {p:.2g}); accuracy {percent_text(first.mean())} at depth "
    note += f"{answers.depths[0]}, {percent_text(last.mean())} at depth {answers.depths[-1]}"
    with suppress(Untestable):
        right, wrong = margin_changes(e.contrast.tables("questions"))
        note += f"; the right choice's margin changes by {mean_t(right).text()}, "
        note += f"{mean_t(right - wrong).text()} beyond a wrong one's"
    difference = mean_t(last * 1.0 - first)
    part = Part("deepest less shallowest", difference, high=0, above=-0.04, below=-math.inf, form="points")
    return graded(part, least=260, why=_guesses(answers), p=p, note=note)


@claim(
    "C11", "the best depth per question (an oracle) beats the matched baseline", "61.1% against 46.0%",
    "the oracle over the depths exceeds the oracle over as many re-draws (sampled answers) of the same "
    "model, by the interval; contradicted if the interval lies below 4 points; 200 questions", 0.611 - 0.460,
    per="run",
)  # fmt: skip
def oracle_beats(e: Evidence) -> Finding:
    """The oracle over depths less that over re-draws; beside it the matched baseline."""
    answers = _answers(e)
    some = answers.correct.any(axis=1)
    note = f"oracle over depths {percent_text(some.mean())}"
    if (baseline := e.contrast.beside.get("baseline")) is not None:
        theirs = answers_of(baseline("questions")).correct[:, 0]
        note += f", matched baseline {percent_text(theirs.mean())}"
    difference = nothing("no re-draws were captured: a run NAME-redraws that samples its answers")
    if (redraws := e.contrast.beside.get("redraws")) is not None:
        difference = mean_t(_over_redraws(answers, redraws, len(answers.depths)))
    part = Part("over the oracle of re-draws", difference, low=0, below=0.04, form="points")
    return graded(part, least=200, why=_guesses(answers), note=note)


@claim(
    "C14", "the learned blend weights: mean, range", "0.027, [0.015, 0.10]",
    "in two trainings or more that no bounds confine, from starts that differ by a factor of 2, the 1% "
    "quantile is 0.0075 to 0.03 and the 99% quantile 0.05 to 0.2", 0.027,
    per="run",
)  # fmt: skip
def learned_blend(e: Evidence) -> Finding:
    """Mean, 1% and 99% quantile of the learned weights; beside it start and bounds."""
    _needs_a_blend(e)
    given = e.beside.get("alpha")
    if given is None:
        raise Untestable("no blend weights were given")
    every: Sequence[BlendWeights] = [given] if isinstance(given, BlendWeights) else list(given)
    here = "; ".join(f"{w.mean:.3g}, [{w.smallest:.3g}, {w.largest:.3g}]" for w in every[:3])
    starts = [w.start for w in every if w.start]
    known = [w for w in every if all(map(math.isfinite, w[:3]))]
    note = f"started at {', '.join(f'{s:.3g}' for s in starts)}" if starts else "the start is not known"
    why = None
    if len(known) < len(every):
        why = "the weights are not all numbers"
    elif any(w.largest - w.smallest <= 1e-6 * abs(w.mean) for w in every):
        why = "all weights are equal: the blend was set, not learned"
    elif any(w.bounds for w in every):
        low, high = next(w.bounds for w in every if w.bounds)
        why = f"training kept the weights between {low:g} and {high:g}"
    elif len(starts) < 2 or max(starts) < 2 * min(starts):
        why = "one start: where the weights end may say where they began"
    figure = Interval(every[0].mean, math.nan, math.nan, 0, reason="weights, not questions")
    if why is not None:
        return not_comparable(why, here, note)
    ends = [(w.smallest, w.largest) for w in every]
    inside = [all(a <= v <= b for v, (a, b) in zip(pair, ALPHA.values(), strict=True)) for pair in ends]
    grade = SUPPORTED if all(inside) else INCONCLUSIVE if any(inside) else CONTRADICTED
    return Finding(grade, here, "" if grade != INCONCLUSIVE else "the starts disagree", figure, note)


@claim(
    "C15", "the error of the two-pass approximation is of the order of alpha squared", "6e-4 to 1.2e-3",
    "the slope of log error on log alpha is between 1.7 and 2.3 by its interval, for logits and for states "
    "and for every number of blended layers; 4 alphas and 8 texts", 2.0,
    per="run",
)  # fmt: skip
def two_pass_error(e: Evidence) -> Finding:
    """The slopes over alpha; beside it the error over alpha squared."""
    _needs_a_blend(e)
    errors: pd.DataFrame | None = e.beside.get("approximation")
    if errors is None or errors.empty:
        raise Untestable("no two-pass error was measured at several alphas (`sst-interp study run two-pass`)")
    rows = errors[((errors["method"] == "sweeps") & (errors["sweeps"] == 1) & (errors["groups"] == 1)
                   & (errors["reference"] == "layerwise") & (errors["alpha_low"] == errors["alpha_high"])
                   )]  # fmt: skip
    by_text = rows.groupby(["n_layers", "question", "alpha"])[["error2", "norm2", "state", "positions"]].sum()
    relative: pd.Series = (by_text["error2"] / by_text["norm2"]) ** 0.5
    logits = relative.unstack("alpha")
    states = (by_text["state"] / by_text["positions"]).unstack("alpha")
    parts, few = [], []
    for layers in logits.index.unique("n_layers"):
        for what, table in (("logits", logits), ("states", states)):
            own = table.loc[layers].dropna(axis=1, thresh=2).dropna()
            if own.shape[1] < 4:
                few.append(f"{own.shape[1]} alphas in {layers} layers")
                continue
            x = np.log(own.columns.to_numpy(dtype=float))
            slope = (np.log(own.to_numpy(dtype=float)) @ (x - x.mean())) / ((x - x.mean()) ** 2).sum()
            parts.append(
                Part(f"slope of {what}, {layers} layers", mean_t(slope), 1.7, 2.3, shown=len(parts) < 3)
            )
    if not parts:
        raise Untestable(f"4 alphas are needed, and there are {' and '.join(dict.fromkeys(few)) or 'none'}")
    alpha = logits.columns.to_numpy(dtype=float)
    factor = logits.groupby(level=0).median() / alpha**2
    note = f"error over alpha squared {np.nanmin(factor):.3g} to {np.nanmax(factor):.3g}"
    texts = parts[0].interval.n_questions
    few = None if texts >= 8 else f"{texts} texts, and 8 are needed"
    return graded(*parts, least=8, too_few=few, note=note)


def _needs_a_blend(e: Evidence) -> None:
    if e.beside.get("no_blend"):
        raise Untestable(e.beside["no_blend"])


def _answers(e: Evidence) -> Answers:
    answers = answers_of(e.contrast.tables("questions"))
    if not len(answers.correct):
        raise Untestable("no question has a row at every depth")
    if len(answers.depths) < 2:
        raise Untestable(f"the run has one depth, {answers.depths[0]}")
    return answers


def _guesses(answers: Answers) -> str | None:
    """Why right and wrong say nothing, or None: the accuracy is not above blind guessing."""
    if not answers.choices:
        return None
    guess, first = 1 / answers.choices, answers.correct[:, 0]
    accuracy = cluster_share(np.arange(len(first)), first)
    if accuracy.known and accuracy.low <= guess:
        return f"accuracy at depth {answers.depths[0]} is not above blind guessing ({percent_text(guess)})"
    return None


def _over_redraws(answers: Answers, redraws: Tables, depths: int) -> np.ndarray:
    """Right at some depth, less the chance of being right in as many re-draws, by question; NaN without
    them.

    The rows of a question in `redraws` are its re-draws. More of them than depths give the mean over all
    choices.
    """
    table = redraws("questions")
    drawn = table.groupby("id")["correct"].agg(["sum", "size"])
    drawn = drawn.reindex(pd.Index(answers.ids))
    right, of = drawn["sum"].to_numpy(dtype=float), drawn["size"].to_numpy(dtype=float)
    none = np.ones(len(right))
    for k in range(depths):
        none *= np.clip(of - right - k, 0, None) / np.where(of > k, of - k, np.nan)
    return answers.correct.any(axis=1) - (1 - none)


PAPER_LABEL = "must-halt"


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
    "for must-halt, everything chosen inside the fold: the AUC in repeated stratified folds is 0.65 or more"
    " and its permutation p below 0.05; contradicted if the upper end is below 0.60. 35 must-halt questions"
    " and 35 others",
    29 / 48,
    per="run",
    measured="probe",
)  # fmt: skip
def probe_tells(probe: Any) -> Finding:
    """AUC in folds and its p; beside it the paper's leave-one-out."""
    n = min(probe.n_positive, probe.n_questions - probe.n_positive)
    note = f"leave-one-out: {probe.hits} of {probe.n_positive} hits, AUC {probe.auc.text()}, "
    note += f"p = {probe.p_auc:.2g}"
    dims = probe.dims
    note += f"; {dims.count:.0f} dimensions ({percent_text(dims.share)} of a layer)" if dims else ""
    note += f"; with selection outside the fold {probe.leaky_auc.estimate:.2f}"
    return folds_grade(
        probe.tested_auc, probe.p_tested, n, probe.permutations, _not_by_this_probe(probe), note
    )


def folds_grade(
    auc: Interval, p: float, smaller: int, permutations: int, why: str | None = None, note: str = ""
) -> Finding:
    """The grade of C12 from the AUC in folds, its permutation p, and the size of the smaller class."""
    few = None
    if smaller < MUST_HALT:
        few = f"the smaller class has {questions_words(smaller)}, and {MUST_HALT} are needed"
    elif permutations < 1 / LEVEL:
        few = f"{permutations} permutations cannot reach p < {LEVEL}"
    part = Part("AUC in folds", auc, low=0.5, below=0.60)
    found = graded(part, why=why, too_few=few, note=note, p=p)
    here = f"{part.text()}; p = {p:.2g}; {smaller} in the smaller class"
    grade, reason = found.grade, found.reason
    if why is None and few is None:
        tells = p < LEVEL and auc.estimate >= 0.65
        grade = SUPPORTED if tells else CONTRADICTED if auc.high < 0.60 else INCONCLUSIVE
        reason = "about 70 must-halt questions tell an AUC of 0.65" if grade == INCONCLUSIVE else ""
    return Finding(grade, here, reason, auc, note, p)


@claim(
    "C13", "the depth that the probe picks breaks no right answer", "0 broken, 4 conservative errors",
    "routed out of fold by the must-halt probe, fewer right answers break than with the same depths dealt "
    "at random (interval below 0); contradicted if routing avoids less than a fifth of what dealing breaks. "
    "35 must-halt questions. None broken is what the paper shows in sample",
    per="run",
    measured="probe",
)  # fmt: skip
def routed_breaks(probe: Any, routing: Any) -> Finding:
    """Answers that a `Routing` breaks less those that dealing its depths at random breaks."""
    if routing.no_probe:
        return not_comparable(routing.no_probe)
    row = routing.row("probe")
    spared = routing.interval(row, "spared")
    note = f"{row['broken']} of {routing.right} right answers broken, {row['conservative']} conservative "
    note += f"errors; {row['mended']} mended"
    n = min(probe.n_positive, probe.n_questions - probe.n_positive)
    return routed_grade(spared, float(row["dealt_broken"]), n, _not_by_this_probe(probe), note)


def routed_grade(
    spared: Interval, dealt: float, smaller: int, why: str | None = None, note: str = ""
) -> Finding:
    """The grade of C13.

    Args:
        spared: share of all questions that routing breaks, less that with the same depths dealt at random.
        dealt: share that dealing breaks.
        smaller: questions of the smaller class.
        why: why it is not comparable.
        note: beside it.
    """
    few = None
    if smaller < MUST_HALT:
        few = f"the smaller class has {questions_words(smaller)}, and {MUST_HALT} are needed"
    part = Part(
        "broken beyond dealt at random", spared, high=0, above=-dealt / 5, below=-math.inf, form="points"
    )
    return graded(
        part, why=why, too_few=few, note=f"dealing breaks {percent_text(dealt)} of questions; {note}"
    )


@claim(
    "C16", "a shift matters more than its size (our own)", "not in the paper",
    "in a regression of the log effect of a patch below the last layer on its log norm, shifted pairs have "
    "a larger effect than stable ones (interval of the coefficient above 0); 40 questions",
    per="run",
    measured="patching",
)  # fmt: skip
def beyond_its_size(patching: Any) -> Finding:
    """The effect of shifting at equal norm (a `Patching`); beside it the coefficient of the norm."""
    if patching.beyond_size is None or patching.size_slope is None:
        return not_comparable(str(patching.why_not))
    note = f"coefficient of the log norm {patching.size_slope.text()}"
    note += f"; {patching.shifted:.0%} of the pairs shifted"
    part = Part("log KL, shifted less stable at equal norm", patching.beyond_size, low=0)
    return graded(part, least=40, note=note)


@claim(
    "C16b", "a depth's state carries its output (our own)", "not in the paper",
    "at shifted pairs below the last layer the other depth's state moves the logit difference its way in "
    "both directions (intervals above 0), and further than a random change and another question's change of"
    " the same norm (intervals of the differences above 0); 40 questions",
    per="run",
    measured="patching",
)  # fmt: skip
def state_carries(patching: Any) -> Finding:
    """What the other depth's state recovers (a `Patching`); beside it controls of the same norm."""
    parts = [Part(f"recovered {way}", i, low=0, form="percent") for way, i in patching.recovered.items()]
    parts += [
        Part(f"{way}, beyond {what}", interval, low=0, form="percent", shown=False)
        for way, controls in patching.beyond.items() for what, interval in controls.items()
    ]  # fmt: skip
    why = None if len(patching.recovered) == 2 else "both directions are needed"
    note = "beyond controls of the same norm: " + "; ".join(part.text() for part in parts if not part.shown)
    return graded(*parts, least=40, why=why, note=note)


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
    finding: Any = CLAIMS[id].judge(*results) if why is None else not_comparable(why)
    return Row(CLAIMS[id].claim, EVERYWHERE, finding)


def _not_by_this_probe(probe: Any) -> str | None:
    """Why this probe decides neither claim, or None."""
    if probe.label != PAPER_LABEL:
        return f"the claim is about {PAPER_LABEL}, this probe tells {probe.label}"
    return probe.at_chance
