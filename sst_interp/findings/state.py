"""Claims about the state (C1 to C3, C6 to C9), each with its control."""

from __future__ import annotations

import math

import numpy as np
import pandas as pd

from sst_interp.analyses.content import POSITION, SECOND_RUN
from sst_interp.analyses.contrast import PAPER_THRESHOLD, overlap_of
from sst_interp.analyses.statistics.bootstrap import (
    Interval,
    grouped_medians,
    percent_text,
    questions_words,
    share,
)
from sst_interp.errors import Untestable
from sst_interp.findings.claims import (
    Evidence,
    Finding,
    claim,
    if_measured,
    judged,
    reaches,
    same_norm,
    too_few,
    too_wide,
    untestable,
)

SHARE, LOWEST = (0.07, 0.28), 0.305
ROUNDINGS = (7.5, 14.5)
LEAST_CORRELATION, LEAST_SHARE = 0.1, 0.01
NOISE = {"batch": "another batch shape", "fp32": "float32"}
"""Kind of noise in the table `noise` -> in words."""


@claim(
    "C1", "few (position, layer) pairs shift, the rest is stable", "14% (86% stable)",
    "the interval of the shifted share, at this run's threshold, reaches 7% to 28% (half to twice)", 0.14,
)  # fmt: skip
def share_shifted(e: Evidence) -> Finding:
    """The shifted share; beside it the share at 0.99, and what noise shifts."""
    shifts = e("basin_shifts")
    here = f"{shifts.share.text(percent=True)} shifted, below {shifts.threshold:.4g}"
    control = f"threshold: {shifts.provenance}; "
    if shifts.threshold != PAPER_THRESHOLD:
        control += f"below the paper's {PAPER_THRESHOLD} {percent_text(shifts.share_at_paper.estimate)}; "
    control += if_measured("noise", _noise_shifts, e) + _on_one_text(e)
    verdict = judged(reaches(shifts.share, *SHARE), shifts.share, why=too_wide(shifts.share, *SHARE))
    return Finding(here, verdict, shifts.share, control)


@claim(
    "C2", "stable and shifted pairs are two modes, not one spread", "yes",
    "more than half of the layers tested have two modes within themselves (false discovery rate 5%)",
)  # fmt: skip
def two_modes(e: Evidence) -> Finding:
    """Layers with two modes within themselves; beside it the modes over all layers."""
    modes = e("bimodality")
    of = modes.layers_tested
    share_two = modes.layers_two / of if of else math.nan
    reason = "layers are counted at a false discovery rate of 5%"
    figure = Interval(share_two, math.nan, math.nan, modes.n_questions, reason=reason)
    why = None if of else "too few questions to test any layer for two modes"
    control = {
        None: "all layers pooled: not tested",
        True: "all layers pooled: two modes",
        False: "all layers pooled: one mode",
    }[modes.pooled_two]
    between = modes.between_layers
    if between is not None and math.isfinite(between.estimate):
        control += f"; {percent_text(between.estimate)} of the spread lies between layers"
    here = f"two modes in {modes.layers_two} of {of} layers"
    return Finding(here, judged(share_two > 0.5, why=why or too_few(modes.n_questions)), figure, control)


@claim(
    "C3", "the overlap falls to 0.30 at a shift", "0.30",
    "the lowest overlap is 0.30 or less, to two decimals", 0.30,
)  # fmt: skip
def lowest_overlap(e: Evidence) -> Finding:
    """The lowest overlap; beside it the median question's, the share of pairs, and the noise's lowest."""
    c = e.contrast
    question, values = c.rows["question"].to_numpy()[c.there], c.overlap[c.there]
    own = pd.Series(values).groupby(question).min()
    everyone = np.ones(len(own), dtype=bool)
    [median] = grouped_medians(own.index.to_numpy(), own.to_numpy(), [everyone], (), *c.resampling)
    lowest, n = float(own.min()), len(own)
    low = share(question, values < LOWEST, *c.resampling)
    figure = Interval(lowest, math.nan, math.nan, n, reason="a minimum has no interval")
    control = f"{percent_text(low.estimate)} of {len(values):,} pairs are that low; "
    control += if_measured("noise", _lowest_noise, e) + _on_one_text(e)
    here = f"{lowest:.3g}; in the median question {median.text()}"
    return Finding(here, judged(lowest < LOWEST, why=too_few(n)), figure, control)


@claim(
    "C6", "the state shifts before the argmax changes, never after", "always",
    "no argmax changes without a shift at that step or before, and earlier shifts are more frequent than if "
    "shuffled over positions (p < 0.05)",
    1.0,
)  # fmt: skip
def state_first(e: Evidence) -> Finding:
    """Argmax changes without an earlier shift; beside it the shuffle, and random changes of the same norm."""
    precedence = e("precedence")
    before: dict[str, float] = precedence.given.loc["before"].to_dict()
    here = f"earlier {precedence.before.text(percent=True)}, "
    here += f"same step {percent_text(precedence.together.estimate)}, "
    here += f"later or never {percent_text(precedence.against.estimate)}"
    why = too_few(precedence.against.n_questions)
    shifts = precedence.orders.loc[precedence.orders["given"] == "the state shifts", "positions"].sum()
    if not shifts:
        why = why or f"no position shifts (overlap below {precedence.threshold:.4g})"
    if precedence.against.estimate == 0 and not before["null_high"] > before["null_low"]:
        why = why or "nothing can come earlier, or shuffling changes nothing"
    first = bool(before["share"] > before["null"] and before["p"] < 0.05)
    control = f"earlier if shuffled: {percent_text(before['null'])} (p = {before['p']:.2g}); "
    control += if_measured("random changes", _random_flips, e)
    return Finding(
        here, judged(precedence.against.estimate == 0 and first, why=why), precedence.before, control
    )


@claim(
    "C7", "the change is many bf16 roundings, most in the deepest layer", "15x, deepest layer 29x (medians)",
    "the intervals reach 7.5 and, in the deepest layer, 14.5 (half), and the change is above all measured "
    "noise (interval of the ratio above 1)",
    15,
)  # fmt: skip
def above_rounding(e: Evidence) -> Finding:
    """The change in bf16 roundings; beside it the change over measured noise."""
    noise = e("bf16_noise")
    holds = reaches(noise.ratio, ROUNDINGS[0]) and reaches(noise.deepest, ROUNDINGS[1])
    parts, n = [], 0
    for kind, words in NOISE.items():
        floor = noise.floor(kind)
        if floor is not None:
            parts.append(f"{floor.ratio.text()} times what {words} changes")
            n = floor.ratio.n_questions
            holds = holds and not (floor.ratio.known and floor.ratio.low <= 1)
    control = f"{'; '.join(parts)} ({questions_words(n)})"
    if not parts:
        control = f"noise not measured: {noise.no_floor}"
    here = f"{noise.ratio.text()}x, layer {noise.deepest_layer} {noise.deepest.text()}x"
    verdict = judged(holds, noise.ratio, noise.deepest)
    return Finding(here, verdict, noise.ratio, control + _on_one_text(e))


@claim(
    "C8", "every question shifts at position 0", "198 of 198",
    "at position 0 every question has a shift in some layer, below 0.99 (or the recipe's threshold) in every "
    "comparison, since all have read the same text there", 1.0,
)  # fmt: skip
def shift_at_zero(e: Evidence) -> Finding:
    """Questions with a shift at position 0; beside it later positions and the start-up control."""
    zero = e("position_zero")
    control = f"later positions {percent_text(zero.later.estimate)}; layers shifted: "
    control += f"{percent_text(zero.layers.estimate)} at 0, "
    control += f"{percent_text(zero.later_layers.estimate)} later; "
    start_up = zero.control
    if e.contrast.choices.prompt == "blend_off":
        control += "this run's own prompt was read without the recurrence"
    elif start_up is None or start_up.not_testable:
        control += f"start-up not controlled: {start_up.not_testable if start_up else 'no control'}"
    else:
        control += f"{percent_text(start_up.control_layers.estimate)} at 0 with the prompt read without the "
        control += "recurrence"
    here = f"{zero.n_shifted} of {zero.n_questions} ({zero.questions.text(percent=True)}), below "
    here += f"{zero.threshold:.4g}"
    verdict = judged(zero.n_shifted == zero.n_questions, zero.questions)
    return Finding(here, verdict, zero.questions, control)


@claim(
    "C9", "which positions shift depends on content", "yes",
    "some measure of content goes with the change beyond position (p < 0.05 after Holm), with a rank "
    "correlation of 0.1 or more, or 1% of the variance or more",
)  # fmt: skip
def tied_to_content(e: Evidence) -> Finding:
    """The strongest tie to content beyond position; beside it the share of position alone."""
    content = e("content")
    position = content.row(POSITION)
    control = "position alone: not testable"
    if position is not None:
        control = f"position alone: {percent_text(float(position['estimate']))} of the variance"
    control += f"; second run: {content.missing[SECOND_RUN]}" if SECOND_RUN in content.missing else ""
    tested = content.measures.dropna(subset=["p_holm", "beyond"])
    if content.content_found is None or tested.empty:
        why = "too few questions to tell content from position"
        if tested.empty:
            reasons = "; ".join(dict.fromkeys(content.missing.values()))
            why = f"no measure of content could be tested ({reasons})"
        return untestable(too_few(content.n_questions) or why, control=control)
    least = np.where(tested["measure"].str.startswith("class"), LEAST_SHARE, LEAST_CORRELATION)
    size = np.abs(tested["beyond"].to_numpy(dtype=float)) / least
    clear = tested["p_holm"].to_numpy(dtype=float) < 0.05
    best = tested.iloc[int(np.argmax(np.where(clear, size + 1e9, size)))]
    what = "share of the variance" if best["measure"].startswith("class") else "rank correlation"
    n, note = int(best["questions"]), best["note"]
    figure = Interval(best["estimate"], best["low"], best["high"], n, reason=note)
    here = f"{best['measure']}, {best['of']}: {what} {figure.text()}, beyond position {best['beyond']:.2g} "
    here += f"(p = {best['p_holm']:.2g})"
    return Finding(here, judged(bool((clear & (size >= 1)).any()), figure), figure, control)


def _noise_shifts(e: Evidence) -> str:
    """What share of the pairs noise alone brings below the threshold, by kind of noise."""
    threshold, parts, n = e("basin_shifts").threshold, [], 0
    noise, overlap = _noise(e)
    for kind, words in NOISE.items():
        here = (noise["kind"] == kind).to_numpy(dtype=bool)
        if here.any():
            shifted = share(
                noise["question"].to_numpy()[here], overlap[here] < threshold, *e.contrast.resampling
            )
            parts.append(f"{words} alone shifts {percent_text(shifted.estimate)}")
            n = shifted.n_questions
    return f"{'; '.join(parts)} ({questions_words(n)})"


def _lowest_noise(e: Evidence) -> str:
    return f"noise falls to {_noise(e)[1].min():.4g}"


def _noise(e: Evidence) -> tuple[pd.DataFrame, np.ndarray]:
    """The rows of the `noise` table that have an overlap, and their overlaps."""
    noise = e.contrast.tables("noise")
    overlap = overlap_of(noise, e.contrast.kind)
    known = np.isfinite(overlap)
    if not known.any():
        raise Untestable("no overlap of it is finite")
    return noise[known], overlap[known]


def _on_one_text(e: Evidence) -> str:
    """In free-running, what share of the shifts is left when both depths read one text."""
    if e.comparison != "free_running":
        return ""
    try:
        divergence = e("divergence")
    except Untestable as error:
        return f"; whether that is the texts is not testable: {error.message}"
    if divergence.no_replay or not math.isfinite(divergence.explained.estimate):
        return f"; {percent_text(divergence.after.estimate)} of the shifts lie after the texts diverge"
    return f"; on one text {percent_text(divergence.left.estimate)} of the shifts are left"


def _random_flips(e: Evidence) -> str:
    """How often the argmax changes at a shift, and by a random change of the same norm."""
    true, random = same_norm(e)
    words = f"the argmax changes at {percent_text(true['changed'])} of the shifts, by random changes of the "
    words += f"same norm at {percent_text(random['changed'])}"
    return words + f" ({questions_words(int(random['questions']))})"
