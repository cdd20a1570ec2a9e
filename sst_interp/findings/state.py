"""Claims about the state and what it does to the output (C1 to C9), each with its control."""

from __future__ import annotations

import math
from functools import reduce
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from scipy import stats

from sst_interp.analyses.content import SHIFTED, second_run
from sst_interp.analyses.contrast import RESOLUTION, Contrast, at_positions, overlap_of, position_key
from sst_interp.analyses.modes import in_layers, spiked_layers
from sst_interp.analyses.noise import TINY
from sst_interp.analyses.position_zero import StartUp, as_any_position, at_zero, start_up, threshold_at_zero
from sst_interp.analyses.precedence import overlaps
from sst_interp.analyses.statistics.along_texts import correlations, matched
from sst_interp.analyses.statistics.bootstrap import LEVEL as INSIDE
from sst_interp.analyses.statistics.bootstrap import Interval, nothing, percent_text, questions_words
from sst_interp.analyses.statistics.clusters import (
    apart,
    cluster_quantile,
    cluster_share,
    in_factors,
    in_logs,
    mean_t,
    per_question,
    ratio_t,
)
from sst_interp.analyses.statistics.permutation import first_at
from sst_interp.errors import Untestable
from sst_interp.findings.claims import (
    CONTRADICTED,
    INCONCLUSIVE,
    SATURATED,
    SATURATES,
    SUPPORTED,
    Evidence,
    Finding,
    Part,
    claim,
    graded,
    if_measured,
    not_comparable,
)

NOISE = {"batch": "another batch shape", "fp32": "float32"}
"""Kind of noise in the table `noise` -> in words."""


def cut(c: Contrast) -> float:
    """The overlap below which a pair has shifted: the paper's 0.99, unless the recipe gives a number."""
    return threshold_at_zero(c).value


@claim(
    "C1", "few (position, layer) pairs shift, the rest is stable", "14% (86% stable)",
    "the share of pairs below 0.99 is between 7% and 28% by its interval, and C2 is supported (a cut "
    "through one mode divides no two kinds); 50 questions", 0.14,
)  # fmt: skip
def share_shifted(e: Evidence) -> Finding:
    """Share below 0.99; beside it what noise alone shifts."""
    c = e.contrast
    share = cluster_share(c.rows["question"].to_numpy()[c.there], c.overlap[c.there] < cut(c))
    part = Part("shifted", share, 0.07, 0.28, form="percent")
    found = graded(part, least=50, note=if_measured("noise", _noise_shifts, e))
    if found.grade != SUPPORTED:
        return found
    modes = e.finding("C2")
    if modes.grade == SUPPORTED:
        return found
    grade = CONTRADICTED if modes.grade == CONTRADICTED else INCONCLUSIVE
    return Finding(grade, found.here, f"C2 is {modes.grade}: two kinds are not shown", share, found.control)


@claim(
    "C2", "stable and shifted pairs are two modes, not one spread", "yes",
    "more than half of the layers have two modes within themselves (false discovery rate 5%); contradicted "
    "if at most a quarter have, and a mode of 14% put into the run's own overlaps is seen in 80% of them",
)  # fmt: skip
def two_modes(e: Evidence) -> Finding:
    """Layers with two modes within themselves; beside it their second mode's weight."""
    c = e.contrast
    table, cube = in_layers(c)
    tested = table["modes"] != "not tested"
    n, of = int(cube.any(axis=2).sum(axis=1).max()), int(tested.sum())
    if not of:
        reason = f"{questions_words(n)} are too few to test a layer for two modes"
        return graded(Part("layers with two modes", nothing(reason, n)), too_few=reason)
    two = ((table["modes"] == "two") & (table["p_layers"] < 1 - INSIDE)).to_numpy()
    share = float(two.sum() / of)
    # p of the claim: at what level would just more than half of the layers pass?
    p = float(np.sort(table.loc[tested, "p_layers"].where(table["modes"] == "two", 1.0).to_numpy())[of // 2])
    weight = float(np.mean(table.loc[two, "weight"])) if two.any() else math.nan
    found = Part("layers with two modes", Interval(share, share, share, n), 0.5, 1.01,
                 below=0.25, form="percent")  # fmt: skip
    missing = Part("weight of the lower mode", Interval(weight, weight, weight, n), form="percent")
    parts = [found, *([missing] if two.any() else [])]
    verdict = graded(*parts, p=p)
    here = f"two modes in {int(two.sum())} of {of} layers"
    here += f"; weight of the lower one {percent_text(weight)}" if two.any() else ""
    reason, grade = verdict.reason, verdict.grade
    if grade == CONTRADICTED:
        seen = spiked_layers(cube, RESOLUTION[c.kind], *c.resampling)
        reason = f"a mode of 14% put into these overlaps would be seen in {percent_text(seen)} of the layers"
        grade = CONTRADICTED if seen >= 0.8 else INCONCLUSIVE
    elif grade == INCONCLUSIVE and n >= 24:
        reason = "some layers have two modes, not most"
    return Finding(grade, f"{here}; p = {p:.2g}", reason, found.interval, p=p)


@claim(
    "C3", "the overlap falls to 0.30 at a shift", "0.30",
    "the 1% quantile of the overlaps of shifted pairs is between 0.20 and 0.45 by its interval; 50 questions",
    0.30,
)  # fmt: skip
def lowest_overlap(e: Evidence) -> Finding:
    """1% quantile of shifted overlaps; beside it that of noise."""
    c = e.contrast
    low = c.there & (c.overlap < cut(c))
    if not low.any():
        raise Untestable("no pair shifts")
    quantile = cluster_quantile(c.rows["question"].to_numpy()[low], c.overlap[low], 0.01)
    return graded(
        Part("1% quantile of shifted overlaps", quantile, 0.20, 0.45),
        least=50,
        note=if_measured("noise", lambda e: f"1% quantile of noise {np.quantile(_noise(e)[1], 0.01):.4g}", e),
    )


@claim(
    "C4", "a shift replaces half of the top 100 tokens, a stable position hardly any",
    "54 against 1 (medians)",
    "by the last layer, while both have read the same tokens: the median at shifts is between 27 and 81, at"
    " stable positions at most 5.4 (both by their intervals), and the change replaces more than random "
    "changes of the same norm", 54,
)  # fmt: skip
def replaced(e: Evidence) -> Finding:
    """Tokens replaced at shifts and at stable positions of the last layer; beside it random changes."""
    c = e.contrast
    rows = _with_last(e, c.outputs)
    question, tokens = rows["question"].to_numpy(), rows["replaced"].to_numpy(dtype=float)
    shifted = rows["last"].to_numpy() < cut(c)
    medians = [
        cluster_quantile(question[here], tokens[here], 0.5) if here.any() else nothing(f"no position {what}")
        for here, what in ((shifted, "shifts"), (~shifted, "is stable"))
    ]
    beyond = nothing("no norm-matched perturbations")
    try:
        beyond = _beyond_random(e)
    except Untestable as error:
        beyond = nothing(error.message)
    return graded(
        Part("replaced at shifts", medians[0], 27, 81),
        Part("at stable positions", medians[1], high=5.4),
        control=Part("at shifts beyond random changes (mean)", beyond, low=0),
    )


@claim(
    "C5", "the new winner comes from rank 50 or deeper", "50",
    "the 99% quantile of the rank (0-based) of a new most likely token is between 25 and 100 by its "
    "interval, and deeper than that of random changes of the same norm; 300 new winners of 50 questions", 50,
)  # fmt: skip
def deepest_winner(e: Evidence) -> Finding:
    """The 99% quantile of new winners' ranks; beside it that of random changes."""
    c = e.contrast
    rows = c.outputs[c.outputs["argmax_changed"].to_numpy(dtype=bool)]
    if rows.empty:
        raise Untestable("the most likely token never changes")
    rank = cluster_quantile(rows["question"].to_numpy(), rows["winner_rank"].to_numpy(), 0.99)
    few = None if len(rows) >= 300 else f"{len(rows):,} new winners, and 300 are needed"
    factor, note = nothing("no norm-matched perturbations"), ""
    try:
        random = _perturbed(e, "random")
        random = random[(random["winner_rank"] > 0).to_numpy(dtype=bool)]
        deep = cluster_quantile(random["question"].to_numpy(), random["winner_rank"].to_numpy(), 0.99)
        factor = in_factors(apart(in_logs(rank, 1), in_logs(deep, 1)))
        note = f"99% quantile with random changes {deep.text()}"
    except Untestable as error:
        factor = nothing(error.message)
    return graded(
        Part("99% quantile of the rank", rank, 25, 100),
        control=Part("over random changes", factor, low=1, form="factor"),
        least=50,
        too_few=few,
        note=note,
    )


@claim(
    "C6", "the state shifts before the argmax changes, never after", "always",
    "of the changes at step 2 or later (100 or more), at most 2% have no shift at that step or before, by "
    "the interval's upper end; and with a cut at which shifts are as frequent as changes, earlier less "
    "later shifts exceed what random changes of the same norm give. Saturated if 90% of all positions have "
    "shifted at step 1", 1.0,
)  # fmt: skip
def state_first(e: Evidence) -> Finding:
    """Earlier less later shifts, and shifts that come after; beside it random changes grown in step."""
    c = e.contrast
    steps = lowest_by_step(c)
    if len(steps.steps) < 2:
        raise Untestable("one step: nothing can come earlier")
    first, at = first_at(steps.changed), first_at(steps.lowest < cut(c))
    late = (first >= 1) & (first < len(steps.steps))
    n_late = int(late.sum())
    placebo = float((steps.lowest[:, 0] < cut(c)).mean())
    if not steps.changed.any():
        raise Untestable("the argmax never changes")
    after = (
        cluster_share(steps.question[late], (at > first)[late])
        if n_late
        else nothing("no change after step 1")
    )
    own = _earlier_less_later(steps.question, steps.lowest, steps.changed)
    beyond, random = nothing("no norm-matched perturbations"), None
    try:
        random = _random_order(e)
        beyond = apart(own, random)
    except Untestable as error:
        beyond = nothing(error.message)
    few = f"{n_late} changes at step 2 or later, and 100 are needed" if n_late < 100 else None
    saturated = None
    if placebo >= SATURATES:
        saturated = (
            f"{percent_text(placebo)} of all positions have shifted at step 1, so every change is preceded"
        )
    beside = f"earlier less later {own.text()}" + (f", random changes {random.text()}" if random else "")
    return graded(
        Part("no shift until after", after, high=0.02, form="percent"),
        control=Part("earlier less later, beyond random changes", beyond, low=0.0),
        too_few=few,
        saturated=saturated,
        note=f"{n_late:,} changes at step 2 or later; at equally frequent cuts {beside}",
    )


@claim(
    "C7", "the change is many bf16 roundings, most in the deepest layer", "15x, deepest layer 29x (medians)",
    "the change is more than twice the measured noise, and more in the deepest layer than over all layers "
    "(both by the interval over questions)", 15,
)  # fmt: skip
def above_rounding(e: Evidence) -> Finding:
    """The change over measured noise, and the deepest layer over all; beside it the change in roundings."""
    c = e.contrast
    rows = c.rows[np.isfinite(c.rows["bf16_ratio"].to_numpy(dtype=float))]
    if rows.empty:
        raise Untestable("no change in roundings is finite")
    last = rows[(rows["layer"] == rows["layer"].max()).to_numpy(dtype=bool)]
    every, deepest = (_log_medians(part, "bf16_ratio") for part in (rows, last))
    floor, which = nothing("noise was not measured"), ""
    try:
        floor, which = _over_noise(c)
    except Untestable as error:
        floor = nothing(error.message)
    median = float(np.median(rows["bf16_ratio"]))
    note = f"median change {median:.3g} bf16 roundings" + (f"; noise of {which}" if which else "")
    return graded(
        Part(
            "deepest layer over all", in_factors(mean_t((deepest - every).to_numpy())), low=1.0, form="factor"
        ),
        control=Part("over the measured noise", floor, low=2.0, form="factor"),
        note=note + _against_overlap(c, median),
    )


@claim(
    "C8", "every question shifts at position 0", "198 of 198",
    "95% of questions or more shift there in some layer (exact bound), and position 0 shifts in more of its"
    " layers than later positions do (interval above 0, p < 0.05 were 0 any position); 59 questions", 1.0,
)  # fmt: skip
def shift_at_zero(e: Evidence) -> Finding:
    """Layers shifted at position 0 less later, and questions with a shift there; beside it placebo
    positions.
    """
    c = e.contrast
    grid = c.grid
    if not grid.there[:, grid.positions == 0].any():
        raise Untestable("no pairs at position 0")
    zero = at_zero(grid, cut(c))
    known = np.isfinite(zero.any_zero)
    n, k = int(known.sum()), int(np.nansum(zero.any_zero))
    low = float(stats.beta.ppf(1 - INSIDE, k, n - k + 1)) if k else 0.0  # one-sided, Clopper and Pearson
    any_zero = Interval(k / n, low, float(stats.beta.ppf(INSIDE, k + 1, n - k)) if k < n else 1.0, n)
    some, here, later = (percent_text(mean_t(each).estimate) for each in zero[1:])
    note = f"placebo: {some} of later positions shift in some layer; layers {here} at 0, {later} later"
    start = start_up(c, cut(c)) if "blend_off" in c.beside else StartUp(0, not_testable="none was captured")
    if start.not_testable is None:
        off = percent_text(start.control_layers.estimate)
        note += f"; {off} at 0 with the prompt read without recurrence"
    return graded(
        Part("layers at 0 less later", mean_t(zero.layers_zero - zero.layers_later), low=0.0, form="points"),
        Part("questions that shift at 0", any_zero, 0.95, 1.01, form="percent"),
        least=59,
        p=as_any_position(grid, cut(c), *c.resampling),
        note=note,
    )


@claim(
    "C9", "which positions shift depends on content", "yes",
    "where a question shifts goes with where it shifts in a second run with reshuffled choices: a "
    "correlation of the shift indicators beyond that of other questions above 0.1 by its interval, p < "
    "0.05. Saturated if fewer than 2% or more than 90% of the pairs shift",
)  # fmt: skip
def tied_to_content(e: Evidence) -> Finding:
    """The correlation with a second run beyond position; beside it that of other questions."""
    c = e.contrast
    share = float((c.overlap[c.there] < cut(c)).mean())
    again, why = second_run(c, cut(c))
    saturated = (
        None if 0.02 <= share <= 0.9 else f"{percent_text(share)} of the pairs shift: where says little"
    )
    if again is None:
        return Finding(SATURATED, "none", saturated) if saturated else not_comparable(why)
    mine, theirs = again
    x, y = c.grid.shifted_share(cut(c))[mine], theirs[SHIFTED]
    table = correlations(x, y)
    keep = np.isfinite(np.diag(table))
    table = table[keep][:, keep]
    n = len(table)
    others = np.where(np.eye(n, dtype=bool), np.nan, table)
    by_position = (np.nanmean(others, axis=0) + np.nanmean(others, axis=1)) / 2 if n > 1 else np.zeros(n)
    tie = (
        mean_t(np.diag(table) - by_position)
        if n
        else nothing("no question shifts here and there in both runs")
    )
    p = matched(x, y, *c.resampling).p_other if n > 1 else math.nan
    note = (
        f"of the same question {np.diag(table).mean():.2g}, of others {by_position.mean():.2g}" if n else ""
    )
    return graded(Part("correlation beyond position", tie, low=0.1), saturated=saturated, p=p, note=note)


def _with_last(e: Evidence, rows: pd.DataFrame) -> pd.DataFrame:
    """Rows with `last`, the overlap of the last layer at their position; those without one are left out."""
    c = e.contrast
    pairs = c.rows.assign(last=c.overlap)
    pairs = pairs[(pairs["layer"] == pairs["layer"].max()).to_numpy(dtype=bool)]
    joined = at_positions(rows, pairs[["question", "position", "last"]])
    return joined[joined["last"].notna().to_numpy(dtype=bool)]


def _perturbed(e: Evidence, direction: str) -> pd.DataFrame:
    """Norm-matched perturbations of the last layer's output at the deepest pair."""
    if e.comparison == "free_running":
        raise Untestable("each depth reads its own text")
    rows: Any = e.contrast.tables("nudges", e.comparison)
    rows = rows[((rows["site"] == "output") & (rows["direction"] == direction)).to_numpy(dtype=bool)]
    if rows.empty:
        raise Untestable(f"the run has no {direction} changes of the last layer")
    return rows[(rows["b"] == rows["b"].max()).to_numpy(dtype=bool)]


def _beyond_random(e: Evidence) -> Interval:
    """Tokens replaced by the true change less by random ones of its norm, at shifts, mean per question."""
    keys = ["question", "position"]
    true = _with_last(e, _perturbed(e, "true")[[*keys, "replaced"]])
    true = true[(true["last"] < cut(e.contrast)).to_numpy(dtype=bool)]
    random = _perturbed(e, "random").astype({"question": "int64", "position": "int64"})
    both = true.merge(
        random.groupby(keys)["replaced"].mean().reset_index(), on=keys, suffixes=("", "_random")
    )
    gap = (both["replaced"] - both["replaced_random"]).groupby(both["question"]).mean()
    return mean_t(gap.to_numpy(dtype=float))


def _noise(e: Evidence) -> tuple[pd.DataFrame, np.ndarray]:
    """The rows of the `noise` table that have an overlap, and their overlaps."""
    noise = e.contrast.tables("noise")
    overlap = overlap_of(noise, e.contrast.kind)
    known = np.isfinite(overlap)
    if not known.any():
        raise Untestable("no overlap of it is finite")
    return noise[known], overlap[known]


def _noise_shifts(e: Evidence) -> str:
    """What share of the pairs noise alone brings below the cut."""
    noise, overlap = _noise(e)
    share = percent_text(float((overlap < cut(e.contrast)).mean()))
    return f"noise alone shifts {share} ({questions_words(noise['question'].nunique())})"


def _log_medians(rows: pd.DataFrame, column: str) -> pd.Series:
    """Log of each question's median."""
    medians: pd.Series = rows.groupby("question")[column].median().astype(float).clip(lower=TINY)
    return medians.map(math.log)


def _over_noise(c: Contrast) -> tuple[Interval, str]:
    """The change over the strictest measured noise, question by question, as a factor; and which noise it
    is.
    """
    noise = c.tables("noise")
    keys = position_key(c.rows)
    best: tuple[Interval, str] | None = None
    for (kind, depth), own in noise.groupby(["kind", "depth"], observed=True):
        here = np.isin(keys, np.unique(position_key(own)))
        both = _log_medians(c.rows[here], "relative_l2") - _log_medians(own, "relative_l2")
        silent = float((_log_medians(own, "relative_l2") <= math.log(2 * TINY)).mean())
        if not here.any() or silent > 0.5:  # bit-identical: no floor
            continue
        ratio = in_factors(mean_t(both.to_numpy()))
        if best is None or ratio.estimate < best[0].estimate:
            best = ratio, f"{NOISE.get(str(kind), str(kind))} at depth {depth}"
    if best is None:
        raise Untestable("at no position both a change and noise above 0 were measured")
    return best


def _against_overlap(c: Contrast, median: float) -> str:
    """Whether the overlaps say the same: a state that hardly turns and keeps its norm hardly changed."""
    rows = c.rows
    if c.kind != "cosine" or not {"norm_a", "norm_b"} <= set(rows.columns):
        return ""
    s = (rows["norm_b"] / rows["norm_a"]).to_numpy(dtype=float)
    said = np.sqrt(np.maximum((1 - s) ** 2 + 2 * s * np.maximum(1 - c.overlap, 0), 0))
    roundings = 256 * float(np.nanmedian(said))
    if not 0.25 < roundings / max(median, TINY) < 4:
        return f"; inconsistent with the overlaps and norms, which say {roundings:.2g} roundings"
    return ""


class LowestByStep(NamedTuple):
    """Positions of one comparison. A step is a depth or iteration that is compared with the first."""

    question: np.ndarray
    steps: tuple[int, ...]
    lowest: np.ndarray
    """[position, step]: the lowest overlap over layers."""
    changed: np.ndarray
    """[position, step]: the most likely token is not that of the first step."""


def lowest_by_step(c: Contrast) -> LowestByStep:
    """Lowest overlap and change of the argmax at every step, of the positions that have all of them."""
    outputs = c.all_outputs
    outputs = outputs[(outputs["a"] == 1).to_numpy(dtype=bool)]
    if outputs.empty:
        raise Untestable(f"no outputs of comparison {c.comparison!r} in this run")
    steps = tuple(int(b) for b in np.unique(outputs["b"].to_numpy()))
    lowest, changed = [], []
    for step in steps:
        own, rows = outputs[(outputs["b"] == step).to_numpy(dtype=bool)], c.at(1, step)
        low = pd.Series(rows.overlap).groupby(position_key(rows.rows)).min()
        lowest.append(low.dropna())
        changed.append(pd.Series(own["argmax_changed"].to_numpy(dtype=bool), index=position_key(own)))
    keys = reduce(np.intersect1d, [part.index.to_numpy() for part in (*lowest, *changed)])
    if not len(keys):
        raise Untestable(f"no position of comparison {c.comparison!r} has every overlap")
    low, moved = (np.stack([part.loc[keys].to_numpy() for part in parts], 1) for parts in (lowest, changed))
    return LowestByStep(keys >> 32, steps, low, moved)


def _earlier_less_later(question: np.ndarray, lowest: np.ndarray, changed: np.ndarray) -> Interval:
    """Share of late changes that a shift precedes, less the share that it follows or misses.

    `lowest` and `changed` are [position, step]. The cut is where shifts are as frequent as changes at the
    last step: two readouts of one distance then come first equally often.
    """
    level = np.quantile(lowest[:, -1], changed[:, -1].mean())
    x, y = first_at(lowest < level), first_at(changed)
    late = (y >= 1) & (y < changed.shape[1])
    if not late.any():
        return nothing("no change after step 1")
    gap = (x < y).astype(float) - (x > y)
    return ratio_t(per_question(question[late], gap[late], np.ones(int(late.sum()))))


def _random_order(e: Evidence) -> Interval:
    """The same for random changes of the last layer's output that grow in step with the true one."""
    c = e.contrast
    if c.comparison == "free_running":
        raise Untestable("each depth reads its own text")
    rows: Any = c.tables("nudges", c.comparison)
    rows = rows[((rows["site"] == "output") & (rows["direction"] == "random")).to_numpy(dtype=bool)]
    steps = len(rows["b"].unique())
    if c.kind not in rows.columns or steps < 2:
        raise Untestable("no random changes that grow in step")
    rows = rows.sort_values(["question", "position", "seed", "b"], kind="stable")
    whole = rows.groupby(["question", "position", "seed"])["b"].transform("size").to_numpy() == steps
    rows = rows[whole]
    lowest = overlaps(rows, c.kind)[:, -1].reshape(-1, steps)
    changed = rows["argmax_changed"].to_numpy(dtype=bool).reshape(-1, steps)
    known = np.isfinite(lowest).all(axis=1)
    question = rows["question"].to_numpy()[::steps]
    return _earlier_less_later(question[known], lowest[known], changed[known])
