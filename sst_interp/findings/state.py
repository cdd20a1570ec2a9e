"""What a run says about the claims on the state (C1 to C3, C6 to C9), each with its control."""

from __future__ import annotations

import math
from typing import Any

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
from sst_interp.errors import SSTError, Untestable
from sst_interp.findings.claims import (
    Evidence,
    Finding,
    claim,
    judged,
    reaches,
    too_few,
    too_wide,
    untestable,
)

SHARE, LOWEST = (0.07, 0.28), 0.305
ROUNDINGS = (7.5, 14.5)
LEAST_CORRELATION, LEAST_SHARE = 0.1, 0.01
NOISE = {"batch": "another batch shape", "fp32": "float32"}
"""Kinds of the table `noise`, in words."""


@claim(
    "C1", "a small share of the (position, layer) pairs is reorganised, the rest stable", "14% (86% stable)",
    "the interval of the shifted share, at this run's threshold, reaches 7% to 28% (half to twice)", 0.14,
)  # fmt: skip
def share_shifted(e: Evidence) -> Finding:
    """The shifted share; beside it the share at 0.99, and what noise shifts."""
    shifts = e("basin_shifts")
    here = f"{shifts.share.text(percent=True)} shifted, below {shifts.threshold:.4g}"
    control = f"{shifts.provenance}; "
    if shifts.threshold != PAPER_THRESHOLD:
        control += f"below the paper's {PAPER_THRESHOLD} {percent_text(shifts.share_at_paper.estimate)}; "
    control += _noise_shifts(e, shifts.threshold) + _on_one_text(e)
    verdict = judged(reaches(shifts.share, *SHARE), shifts.share, why=too_wide(shifts.share, *SHARE))
    return Finding(here, verdict, shifts.share, control)


@claim(
    "C2", "stable and shifted are separate modes, not one spread", "yes",
    "more than half of the layers tested have two modes within themselves (false discovery rate 5%)",
)  # fmt: skip
def two_modes(e: Evidence) -> Finding:
    """Layers with two modes within themselves; beside it what pooling layers makes of it."""
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
    here = f"layers with two modes: {modes.layers_two} of {of}"
    return Finding(here, judged(share_two > 0.5, why=why or too_few(modes.n_questions)), figure, control)


@claim(
    "C3", "overlap at a shift falls as low as 0.30", "0.30",
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
    control = f"{percent_text(low.estimate)} of {len(values):,} pairs are that low; {_lowest_noise(e)}"
    here = f"{lowest:.3g}; in the median question {median.text()}"
    return Finding(here, judged(lowest < LOWEST, why=too_few(n)), figure, control + _on_one_text(e))


@claim(
    "C6", "the state shifts before the argmax changes, never after", "always",
    "no argmax changes without a shift by then, and at an earlier step shifts come more often than if "
    "shuffled over positions (p < 0.05)",
    1.0,
)  # fmt: skip
def state_first(e: Evidence) -> Finding:
    """Argmax changes that no shift came before; beside it the shuffle, and changes of the same size."""
    found = e("precedence")
    before: dict[str, float] = found.given.loc["before"].to_dict()
    here = f"earlier {found.before.text(percent=True)}, same step {percent_text(found.together.estimate)}, "
    here += f"later or never {percent_text(found.against.estimate)}"
    why = too_few(found.against.n_questions)
    shifts = found.orders.loc[found.orders["given"] == "the state shifts", "positions"].sum()
    if not shifts:
        why = why or f"no position shifts (overlap below {found.threshold:.4g})"
    if found.against.estimate == 0 and not before["null_high"] > before["null_low"]:
        why = why or "nothing can come earlier, or shuffling changes nothing"
    first = bool(before["share"] > before["null"] and before["p"] < 0.05)
    control = f"earlier if shuffled: {percent_text(before['null'])} (p = {before['p']:.2g}); "
    verdict = judged(found.against.estimate == 0 and first, why=why)
    return Finding(here, verdict, found.before, control + _random_flips(found))


@claim(
    "C7", "the change is many bf16 roundings, more in the deepest layer", "15x, deepest layer 29x (medians)",
    "the intervals reach 7.5 and, in the deepest layer, 14.5 (half); and the change is above every measured "
    "noise floor (interval of the ratio above 1)",
    15,
)  # fmt: skip
def above_rounding(e: Evidence) -> Finding:
    """The change in bf16 roundings; beside it the change over measured noise."""
    found = e("bf16_noise")
    holds = reaches(found.ratio, ROUNDINGS[0]) and reaches(found.deepest, ROUNDINGS[1])
    parts, n = [], 0
    for kind, words in NOISE.items():
        floor = found.floor(kind)
        if floor is not None:
            parts.append(f"{floor.ratio.text()} times what {words} changes")
            n = floor.ratio.n_questions
            holds = holds and not (floor.ratio.known and floor.ratio.low <= 1)
    control = f"{'; '.join(parts)} ({questions_words(n)})"
    if not parts:
        control = f"noise not measured: {found.no_floor}"
    here = f"{found.ratio.text()}x, layer {found.deepest_layer} {found.deepest.text()}x"
    verdict = judged(holds, found.ratio, found.deepest)
    return Finding(here, verdict, found.ratio, control + _on_one_text(e))


@claim(
    "C8", "every question shifts at position 0", "198 of 198",
    "every question has a shift in some layer at position 0, at one threshold in all comparisons (0.99 as in "
    "the paper, or the recipe's): up to there each has read the same text", 1.0,
)  # fmt: skip
def shift_at_zero(e: Evidence) -> Finding:
    """Questions with a shift at position 0; beside it later positions and the start-up control."""
    found = e("position_zero")
    control = f"later positions {percent_text(found.later.estimate)}; layers shifted: "
    control += (
        f"{percent_text(found.layers.estimate)} at 0, {percent_text(found.later_layers.estimate)} later; "
    )
    start_up = found.control
    if e.contrast.choices.prompt == "blend_off":
        control += "this run's own prompt was read without the recurrence"
    elif start_up is None or start_up.not_testable:
        control += f"start-up not controlled: {start_up.not_testable if start_up else 'no control'}"
    else:
        control += f"{percent_text(start_up.control_layers.estimate)} at 0 with the prompt read without the "
        control += "recurrence"
    here = f"{found.n_shifted} of {found.n_questions} ({found.questions.text(percent=True)}), below "
    here += f"{found.threshold:.4g}"
    verdict = judged(found.n_shifted == found.n_questions, found.questions)
    return Finding(here, verdict, found.questions, control)


@claim(
    "C9", "which positions shift depends on content", "yes",
    "something of the content goes with the change beyond position (p < 0.05 after Holm), by a rank "
    "correlation of 0.1 or more, or 1% of the variance or more",
)  # fmt: skip
def tied_to_content(e: Evidence) -> Finding:
    """The strongest tie to content beyond position; beside it what position alone accounts for."""
    found = e("content")
    position = found.row(POSITION)
    control = "position alone: not testable"
    if position is not None:
        control = f"position alone: {percent_text(float(position['estimate']))} of the variance"
    control += f"; second run: {found.missing[SECOND_RUN]}" if SECOND_RUN in found.missing else ""
    tested = found.measures.dropna(subset=["p_holm", "beyond"])
    if found.content_found is None or tested.empty:
        why = "too few questions to tell content from position"
        if tested.empty:
            reasons = "; ".join(dict.fromkeys(found.missing.values()))
            why = f"nothing of the content could be tested ({reasons})"
        return untestable(too_few(found.n_questions) or why, control=control)
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


def _noise_shifts(e: Evidence, threshold: float) -> str:
    """How much of the noise table lies below a threshold, kind by kind."""
    try:
        noise, below = _noise_overlaps(e)
    except SSTError as error:
        return f"noise not measured: {error.message}"
    parts, n = [], 0
    for kind, words in NOISE.items():
        here = (noise["kind"] == kind).to_numpy(dtype=bool) & np.isfinite(below)
        if here.any():
            found = share(noise["question"].to_numpy()[here], below[here] < threshold, *e.contrast.resampling)
            parts.append(f"{words} alone shifts {percent_text(found.estimate)}")
            n = found.n_questions
    return f"{'; '.join(parts)} ({questions_words(n)})" if parts else "noise not measured"


def _lowest_noise(e: Evidence) -> str:
    try:
        _, values = _noise_overlaps(e)
    except SSTError as error:
        return f"noise not measured: {error.message}"
    values = values[np.isfinite(values)]
    return f"noise falls to {values.min():.4g}" if len(values) else "noise not measured"


def _noise_overlaps(e: Evidence) -> tuple[pd.DataFrame, np.ndarray]:
    noise = e.contrast.tables("noise")
    return noise, overlap_of(noise, e.contrast.kind)


def _on_one_text(e: Evidence) -> str:
    """In free-running: how many of the shifts are left when both depths read one text."""
    if e.comparison != "free_running":
        return ""
    try:
        found = e("divergence")
    except Untestable as error:
        return f"; whether that is the texts is not testable: {error.message}"
    if found.no_replay or not math.isfinite(found.explained.estimate):
        return f"; {percent_text(found.after.estimate)} of the shifts lie after the texts part"
    return f"; on one text {percent_text(found.left.estimate)} of the shifts are left"


def _random_flips(found: Any) -> str:
    """What random changes of a shift's size do to the argmax."""
    if not found.at_shifts:
        return f"random changes not measured: {found.no_perturbations or 'no perturbed position shifts'}"
    true, random = found.at_shifts["true"], found.at_shifts["random"]
    words = f"the argmax changes at {percent_text(true['changed'])} of the shifts, by random changes of that "
    return words + f"size at {percent_text(random['changed'])} ({questions_words(int(random['questions']))})"
