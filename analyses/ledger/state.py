"""What a run says about the claims on the state (C1 to C3, C6 to C9), each with its control."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pandas as pd

from sst_interp.analyses.basin_shifts import PAPER_THRESHOLD, BasinShifts
from sst_interp.analyses.bf16_noise import Bf16Noise
from sst_interp.analyses.bimodality import Bimodality
from sst_interp.analyses.content import POSITION, SECOND_RUN, Content
from sst_interp.analyses.divergence import Divergence
from sst_interp.analyses.ledger.rules import Finding, judged, reaches, too_few, too_wide, untestable
from sst_interp.analyses.ledger.suite import Suite
from sst_interp.analyses.overlap import overlap_of, select
from sst_interp.analyses.parts.content_measures import interval_of
from sst_interp.analyses.parts.noise_floor import KINDS
from sst_interp.analyses.parts.start_up import StartUp
from sst_interp.analyses.position_zero import PositionZero
from sst_interp.analyses.precedence import Precedence
from sst_interp.analyses.statistics import bootstrap as tallies
from sst_interp.analyses.statistics.bootstrap import Interval, grouped_medians, percent_text, questions_words
from sst_interp.errors import SSTError

SHARE, LOWEST = (0.07, 0.28), 0.305
ROUNDINGS = (7.5, 14.5)
LEAST_CORRELATION, LEAST_SHARE = 0.1, 0.01


def share_shifted(suite: Suite, comparison: str) -> Finding:
    """C1: the shifted share; beside it the share at 0.99, and what noise shifts."""
    found = suite.get(BasinShifts, "basin_shifts", comparison)
    control = f"threshold {found.threshold:.4g} ({found.provenance}); at the paper's {PAPER_THRESHOLD} "
    control += f"{found.share_at_paper.text(percent=True)}; {noise_shifts(suite, found.threshold)}"
    verdict = judged(reaches(found.share, *SHARE), found.share, why=too_wide(found.share, *SHARE))
    here = f"{found.share.text(percent=True)} shifted"
    return Finding(here, verdict, found.share, control + _text_divergence(suite, comparison))


def two_modes(suite: Suite, comparison: str) -> Finding:
    """C2: layers with two modes within themselves; beside it what pooling layers makes of it."""
    found = suite.get(Bimodality, "bimodality", comparison)
    of = found.layers_tested
    reason = "layers are counted at a false discovery rate of 5%"
    share = found.layers_two / of if of else math.nan
    figure = Interval(share, math.nan, math.nan, found.n_questions, reason=reason)
    why = None if of else "too few questions to test any layer for two modes"
    pooled = {None: "not tested", True: "two modes", False: "one mode"}[found.pooled_two]
    control = f"all layers pooled: {pooled}"
    if found.between_layers is not None:
        control += f"; {found.between_layers.text(percent=True)} of the spread lies between layers"
    if found.identical is not None:
        control += f"; {found.identical.text(percent=True)} of the pairs bit-identical"
    here = f"{found.layers_two} of {of} layers tested have two modes"
    return Finding(here, judged(share > 0.5, why=why or too_few(found.n_questions)), figure, control)


def lowest_overlap(suite: Suite, comparison: str) -> Finding:
    """C3: the lowest overlap; beside it the median question's, the share of pairs, and the noise's lowest."""
    suite.get(BasinShifts, "basin_shifts", comparison)
    rows, _, _ = select(suite.of("pairs", comparison), comparison)
    values = overlap_of(rows, suite.choices.overlap)
    there = np.isfinite(values)
    own = pd.Series(values[there]).groupby(rows["question"].to_numpy()[there]).min()
    [median] = grouped_medians(own.index.to_numpy(), own.to_numpy(), [np.ones(len(own), dtype=bool)])
    lowest, n = float(own.min()), len(own)
    figure = Interval(lowest, math.nan, math.nan, n, reason="a minimum has no interval")
    low = tallies.share(rows["question"].to_numpy()[there], values[there] < LOWEST)
    control = f"{low.text(percent=True)} of {there.sum():,} pairs are that low; "
    control += f"noise: {_lowest_noise(suite)}{_text_divergence(suite, comparison)}"
    here = f"{lowest:.3g}; lowest of the median question {median.text()}"
    return Finding(here, judged(lowest < LOWEST, why=too_few(n)), figure, control)


def state_first(suite: Suite, comparison: str) -> Finding:
    """C6: argmax changes that no shift came before; beside it the shuffle, and nudges of the same size."""
    found = suite.get(Precedence, "precedence", comparison)
    orders = found.orders[
        (found.orders["given"] == "the argmax changes") & (found.orders["order"] == "before")
    ]
    given: dict[Any, Any] = orders.to_dict("records")[0]
    here = f"earlier {found.before.text(percent=True)}, same step {percent_text(found.together.estimate)}, "
    here += f"later or never {percent_text(found.against.estimate)}"
    why = too_few(found.against.n_questions)
    shifts = found.orders.loc[found.orders["given"] == "the state shifts", "positions"].sum()
    if not shifts:
        why = why or f"no position shifts (overlap below {found.threshold:.4g})"
    if found.against.estimate == 0 and not given["null_high"] > given["null_low"]:
        why = why or "nothing can come earlier, or shuffling changes nothing"
    first = bool(given["share"] > given["null"] and given["p"] < 0.05)
    control = f"shuffled over positions: earlier {percent_text(given['null'])} (p = {given['p']:.2g})"
    verdict = judged(found.against.estimate == 0 and first, why=why)
    return Finding(here, verdict, found.before, f"{control}; {_nudges(found)}")


def above_rounding(suite: Suite, comparison: str) -> Finding:
    """C7: the change in bf16 roundings; beside it the change over measured noise."""
    found = suite.get(Bf16Noise, "bf16_noise", comparison)
    holds = reaches(found.ratio, ROUNDINGS[0]) and reaches(found.deepest, ROUNDINGS[1])
    parts = []
    for kind, words in KINDS.items():
        floor = found.floor(kind)
        if floor is not None:
            n = questions_words(floor.ratio.n_questions)
            parts.append(f"{floor.ratio.text()} times what {words} changes ({n})")
            holds = holds and not (floor.ratio.known and floor.ratio.low <= 1)
    control = "; ".join(parts) or f"noise floor not testable: {found.no_floor}"
    control += (
        f"; {percent_text(found.identical.estimate)} bit-identical{_text_divergence(suite, comparison)}"
    )
    here = f"{found.ratio.text()}x, layer {found.deepest_layer} {found.deepest.text()}x"
    return Finding(here, judged(holds, found.ratio, found.deepest), found.ratio, control)


def shift_at_zero(suite: Suite, comparison: str) -> Finding:
    """C8: questions with a shift at position 0; beside it later positions and the start-up control."""
    found = suite.get(PositionZero, "position_zero", comparison)
    control = f"later positions: {found.later.text(percent=True)}; of the layers "
    control += (
        f"{percent_text(found.layers.estimate)} at 0, {percent_text(found.later_layers.estimate)} later. "
    )
    if suite.choices.prompt == "blend_off":
        control += "This run's own prompt was read without the recurrence."
    else:
        control += (found.control or StartUp(0, not_testable="no control")).words()
    control = control.removesuffix(".") + _text_divergence(suite, comparison)
    here = f"{found.n_shifted} of {found.n_questions} ({found.questions.text(percent=True)}) below "
    here += f"{found.threshold:.4g}"
    holds = found.n_shifted == found.n_questions
    return Finding(here, judged(holds, found.questions), found.questions, control)


def tied_to_content(suite: Suite, comparison: str) -> Finding:
    """C9: the strongest tie to content beyond position; beside it what position alone accounts for."""
    found = suite.get(Content, "content", comparison)
    position = found.row(POSITION)
    control = "position alone: not testable"
    if position is not None:
        control = f"position alone: {interval_of(position).text(percent=True)} of the variance"
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
    figure = interval_of(best)
    here = f"{best['measure']} with {best['of']}: {what} {figure.text()}, beyond position "
    here += f"{best['beyond']:.2g} (p {best['p_holm']:.2g} of {len(tested)} tests)"
    return Finding(here, judged(bool((clear & (size >= 1)).any()), figure), figure, control)


def noise_shifts(suite: Suite, threshold: float) -> str:
    """How much of the noise table lies below a threshold, kind by kind."""
    noise, parts = suite.tables["noise"], []
    try:
        below = overlap_of(noise, suite.choices.overlap)
    except SSTError:
        return "noise floor not testable: noise has no such overlap"
    for kind, words in KINDS.items():
        here = (noise["kind"] == kind).to_numpy(dtype=bool) & np.isfinite(below)
        if here.any():
            found = tallies.share(noise["question"].to_numpy()[here], below[here] < threshold)
            n = questions_words(found.n_questions)
            parts.append(f"{words} alone shifts {found.text(percent=True)} ({n})")
    return "; ".join(parts) or "noise floor not testable: the run has no noise table"


def _lowest_noise(suite: Suite) -> str:
    noise = suite.tables["noise"]
    try:
        values = overlap_of(noise, suite.choices.overlap)
    except SSTError:
        return "has no such overlap"
    values = values[np.isfinite(values)]
    return f"falls to {values.min():.4g}" if len(values) else "not measured"


def _text_divergence(suite: Suite, comparison: str) -> str:
    """In `free`: how many of the shifts are left when the same text is replayed."""
    if comparison != "free":
        return ""
    try:
        found = suite.get(Divergence, "divergence")
    except SSTError as error:
        return f"; text divergence not testable: {error.message}"
    if found.no_replay or not math.isfinite(found.explained.estimate):
        return f"; {percent_text(found.after.estimate)} of the shifts lie after the texts part"
    return f"; on one replayed text {found.left.text(percent=True)} of the shifts are left"


def _nudges(found: Precedence) -> str:
    """What random nudges of a shift's size do to the argmax."""
    table = found.beside_nudges
    if found.no_nudges or not len(table):
        return f"nudges not testable: {found.no_nudges or 'none'}"
    rows = table[(table["site"] == "output") & (table["where"] == "shifted")]
    by: dict[Any, dict[Any, Any]] = {row["direction"]: row for row in rows.to_dict("records")}
    if not {"true", "random"} <= by.keys():
        return "nudges not testable: no position with controls shifts"
    shown = []
    for row in (by["true"], by["random"]):
        ends = (row["changed"], row["changed_low"], row["changed_high"])
        shown.append(Interval(*ends, int(row["questions"]), reason="one question").text(percent=True))
    words = f"at shifts with controls the argmax changes in {shown[0]}, by random nudges of that size in "
    return words + f"{shown[1]} ({questions_words(int(by['random']['questions']))})"
