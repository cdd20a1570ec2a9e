"""Divergence: where do two depths' texts part, and how many of the free-running shifts come from that?

In free-running each depth writes its own text. Once a token differs, the two depths read different tokens,
and their states differ for that reason alone. The texts part at the position whose output differs first: up
to and including it both depths have read the same tokens, so teacher-forced and free-running are one
computation there. Reported beside it: margin and entropy of the output there, the share of the shifts after
it, how many are left teacher-forced (both depths on depth 1's text), and whether the overlap predicts it.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go

from sst_interp.analyses.contrast import Contrast, at_positions
from sst_interp.analyses.plots import BLUE, GREY, ORANGE, VERMILLION, add_line, canvas, error_bars
from sst_interp.analyses.result import Shifts, analysis
from sst_interp.analyses.statistics.bootstrap import (
    Interval,
    Resampling,
    as_columns,
    bootstrap_ends,
    cluster_bootstrap,
    grouped_medians,
    none_seen_bound,
    percent_text,
    questions_words,
    ratio,
    share,
)
from sst_interp.analyses.statistics.permutation import concordance, holm
from sst_interp.errors import Untestable

WHEN = ("before", "at", "after")
"""Relative to the position where the texts part. A question whose texts never part is all before."""
READ = ("margin_a", "margin_b", "entropy_a", "entropy_b", "replaced", "kl")
SCORES = (
    "lowest overlap",
    "overlap of the last layer",
    "layers shifted",
    "lowest overlap one position before",
    "margin of the shallower depth",
    "entropy of the shallower depth",
)


@dataclass(frozen=True, eq=False)
class Divergence(Shifts):
    """Where two depths' texts part, and the shifts around it. All intervals resample questions."""

    named = "When texts part"
    shown = "per_pair"
    diverged: Interval
    """Share of questions whose texts part."""
    position: Interval
    """Median position of the first differing token, of those that part."""
    where: pd.DataFrame
    """A row per (a, b) and question: `position` of the first differing token (NaN: none), and `positions`,
    how many both texts have."""
    by_position: pd.DataFrame
    """Columns position, diverged (share of questions by then), diverged_low, diverged_high."""
    readings: pd.DataFrame
    """A row per quantity: median where the texts part, at other positions up to there, and the difference.
    Margins in logits, entropies and KL in nats; `_a` is of depth a."""
    shifts: pd.DataFrame
    """A row for before, at and after the divergence (`shift_table`)."""
    after: Interval
    """Share of the free-running shifts that lie after the first differing token."""
    explained: Interval
    """Share of the free-running shifts that are absent teacher-forced."""
    predictors: pd.DataFrame
    """A row per score: AUC for the position where the texts part (`predictor_table`)."""
    agreement: float
    """Largest difference of the lowest overlaps, teacher-forced and free-running, up to there: 0 but for
    rounding."""
    n_excluded: int
    """Positions left out because an overlap or a value is missing or NaN."""
    no_replay: str | None
    """Why there is nothing teacher-forced to compare with; None if there is."""
    per_pair: pd.DataFrame
    """A row per (a, b): questions, diverged, position, after, explained; the last four with ends."""

    @property
    def left(self) -> Interval:
        """Teacher-forced shifts as a share of the free-running ones: 1 - explained."""
        e = self.explained
        return replace(e, estimate=1 - e.estimate, low=1 - e.high, high=1 - e.low)

    @property
    def verdict(self) -> str:
        """How many shifts come from the texts, where those part, and whether the overlap predicts it."""
        n = questions_words(self.n_questions)
        if not self.diverged.estimate:
            bound = percent_text(none_seen_bound(self.n_questions))
            return f"No two texts part. {self.words.capitalize()}: {n}; at most {bound} of such do (95%)."
        shifts = np.isfinite(self.after.estimate)
        explained = np.isfinite(self.explained.estimate) and self.no_replay is None
        answer = "Texts part; how many shifts that makes is not known."
        if not shifts:
            answer = f"Texts part, but nothing shifts (below {self.threshold:.4g}): nothing to explain."
        elif explained and self.explained.low > 0:
            share = percent_text(self.explained.estimate)
            answer = f"{share} of the shifts come from the texts, not from the depth."
        elif explained:
            answer = "The shifts do not come from the texts."
        words = f"{answer} {self.words.capitalize()}: the texts of {percent_text(self.diverged.estimate)} of "
        words += f"{n} part, at position {self.position.text()} (median)."
        if shifts:
            words += f" {self.after.text(percent=True)} of the shifts lie after that"
            words += f"; teacher-forced {self.left.text(percent=True)} are left." if explained else "."
        if self.n_excluded:
            words += f" {self.n_excluded:,} positions with a missing overlap or value are left out."
        if self.no_replay:
            return f"{words} What is left teacher-forced is not known: {self.no_replay}."
        return words + predictors_words(self.predictors)

    def figure(self) -> go.Figure:
        """Share of questions whose texts have diverged, by position."""
        figure = canvas(
            "Where the texts of two depths part", f"{self.words}; {questions_words(self.n_questions)}",
            "generated position (0 emits the first token)", "share of questions diverged",
        )  # fmt: skip
        add_line(figure, self.by_position["position"], self.by_position, "diverged", "diverged", BLUE)
        return figure.update_yaxes(tickformat=".0%", rangemode="tozero")

    def figures(self) -> dict[str, go.Figure]:
        """`diverged`, `shifts`, and `predictors` where enough questions part after position 0."""
        figures = {"diverged": self.figure(), "shifts": self._shifts_around()}
        known = self.predictors.dropna(subset="within")
        return figures | ({"predictors": self._predictors(known)} if len(known) else {})

    def _shifts_around(self) -> go.Figure:
        """Shift rate before, at and after the first differing token, free-running and teacher-forced."""
        figure = canvas(
            "Shifts and the first differing token",
            self.subtitle,
            "position, relative to the first differing token",
            "shifted share of pairs",
        )
        for column, name, colour in (
            ("rate", "free-running: each depth's own text", VERMILLION),
            ("rate_teacher_forced", "teacher-forced: the same positions, depth 1's text", BLUE),
        ):
            values = self.shifts[column].to_numpy(dtype=float)
            low, high = (self.shifts[f"{column}_{end}"].to_numpy() for end in ("low", "high"))
            figure.add_bar(
                x=self.shifts["when"], y=values, name=name, marker={"color": colour},
                error_y=error_bars(values, low, high, GREY), hovertemplate="%{x}: %{y:.1%}<extra></extra>",
            )  # fmt: skip
        return figure.update_yaxes(tickformat=".0%", rangemode="tozero")

    def _predictors(self, known: pd.DataFrame) -> go.Figure:
        """How well each score says where the texts part."""
        figure = canvas(
            "Does the state predict where the texts part?",
            f"{self.words}; {known['questions'].max():.0f} questions that part after position 0",
            "AUC (one half is chance)",
            "",
        )
        for column, name, colour in (
            ("within", "within a question", BLUE),
            ("across", "between questions at one position", ORANGE),
        ):
            values, low, high = (
                known[f"{column}{end}"].to_numpy(dtype=float) for end in ("", "_low", "_high")
            )
            figure.add_scatter(
                x=values, y=known["score"], mode="markers", name=name, marker={"size": 10, "color": colour},
                error_x=error_bars(values, low, high, colour), hovertemplate="%{y}: %{x:.2f}<extra></extra>",
            )  # fmt: skip
        figure.add_vline(x=0.5, line={"color": GREY, "dash": "dot"})
        return figure.update_yaxes(autorange="reversed")


@analysis(
    "When texts part",
    "How much of the free-running shifts is only another text?",
    needs=("pairs", "outputs"),
    per="run",
    order=110,
)
def divergence(c: Contrast) -> Divergence:
    """Where free-running texts part, for every pair of depths; the deepest pair is the headline.

    Both comparisons are judged at the threshold of free-running, since their shifts are subtracted.

    Raises:
        Untestable: if the run has no free-running, or every position of it has a NaN.
    """
    free = c.to("free_running")
    outputs = free.all_outputs
    pairs = sorted(set(map(tuple, outputs[["a", "b"]].drop_duplicates().to_numpy().tolist())))
    # One comparison after the other: only one is in memory.
    read = {pair: (free.at(*pair).positions, free.at(*pair).readings) for pair in pairs}
    forced = replace(c.to("teacher_forced"), fixed=free.threshold)
    teacher_forced: dict[tuple[int, int], pd.DataFrame | str] = {}
    for pair in pairs:
        try:
            teacher_forced[pair] = forced.at(*pair).positions
        except Untestable as error:
            teacher_forced[pair] = error.message
    each = [_pair(free.at(*pair), outputs, *read[pair], teacher_forced[pair]) for pair in pairs]
    names = ("diverged", "position", "after", "explained")
    records = [
        {"a": e.a, "b": e.b, "questions": e.n_questions} | as_columns(**{n: getattr(e, n) for n in names})
        for e in each
    ]
    where = pd.concat([one.where for one in each], ignore_index=True)
    return replace(each[-1], per_pair=pd.DataFrame(records), where=where)


def _pair(
    c: Contrast,
    outputs: pd.DataFrame,
    free: pd.DataFrame,
    readings: pd.DataFrame,
    forced: pd.DataFrame | str,
) -> Divergence:
    """One pair of depths.

    Args:
        c: free-running at this pair.
        outputs: of free-running, every pair.
        free: `Contrast.positions` free-running.
        readings: `Contrast.readings` free-running.
        forced: `Contrast.positions` teacher-forced, or why there are none.
    """
    rows = outputs[((outputs["a"] == c.a) & (outputs["b"] == c.b)).to_numpy(dtype=bool)]
    known = ~rows[["same_prefix", "argmax_changed"]].isna().any(axis=1).to_numpy()
    rows = rows[known]
    if rows.empty:
        raise Untestable("every position of comparison 'free_running' has a NaN")
    divergence = divergence_positions(rows)
    parts = np.isfinite(divergence["position"].to_numpy())
    question = divergence["question"].to_numpy()
    same = with_divergence(rows[rows["same_prefix"].to_numpy(dtype=bool)], divergence)
    same = at_positions(same, readings)
    no_replay = None
    if isinstance(forced, str):
        no_replay, forced = forced, free[:0]
    theirs = {name: f"{name}_teacher_forced" for name in ("shifted", "lowest", "last")}
    both = at_positions(free, forced.drop(columns="layers").rename(columns=theirs))
    there = np.isfinite(both["lowest"].to_numpy())
    if no_replay is None:
        there &= np.isfinite(both["lowest_teacher_forced"].to_numpy(dtype=float))
    both = with_divergence(both[there], divergence)
    shifts, after, explained = shift_table(both, c.resampling)
    upto = both[both["when"].to_numpy() < 2]
    upto = at_positions(upto, same[["question", "position", "margin_a", "entropy_a"]])
    return Divergence(
        **c.judged,
        n_questions=len(divergence),
        diverged=share(question, parts, *c.resampling),
        position=grouped_medians(question, divergence["position"].to_numpy(), [parts], (), *c.resampling)[0],
        where=divergence.assign(a=c.a, b=c.b)[["a", "b", *divergence.columns]],
        by_position=diverged_by(divergence, c.resampling),
        readings=reading_table(same, c.resampling),
        shifts=shifts,
        after=after,
        explained=explained,
        predictors=predictor_table(upto, c.resampling),
        agreement=float((upto["lowest"] - upto["lowest_teacher_forced"]).abs().max()),
        n_excluded=int((~known).sum() + (~there).sum()),
        no_replay=no_replay,
        per_pair=pd.DataFrame(),
    )


def divergence_positions(free_running: pd.DataFrame) -> pd.DataFrame:
    """Where the texts of each question part.

    Args:
        free_running: `outputs` of free-running at one pair of depths.

    Returns:
        A row per question, ascending: `question`, `position` (NaN if the shorter text begins the other) and
        `positions`, how many both depths have.
    """
    same = free_running["same_prefix"].to_numpy(dtype=bool)
    changed = free_running["argmax_changed"].to_numpy(dtype=bool)
    position = free_running["position"].to_numpy(dtype=float)
    # The flag turns one position later; a text that ends there has no later position.
    at = np.where(same & changed, position, np.where(same, np.nan, position - 1))
    by = pd.DataFrame({"question": free_running["question"].to_numpy(), "position": at}).groupby("question")
    return by["position"].agg(position="min", positions="size").reset_index()


def with_divergence(table: pd.DataFrame, divergence: pd.DataFrame) -> pd.DataFrame:
    """The rows of questions in `divergence`, with `parts_at` and `when` (0, 1, 2: an index into `WHEN`)."""
    at = divergence.set_index("question")["position"]
    rows = table[table["question"].isin(at.index).to_numpy()]
    parts_at = rows["question"].map(at).to_numpy(dtype=float)
    position = rows["position"].to_numpy()
    return rows.assign(parts_at=parts_at, when=(position >= parts_at).astype(int) + (position > parts_at))


def diverged_by(divergence: pd.DataFrame, resampling: Resampling) -> pd.DataFrame:
    """Columns position, diverged (share of all questions whose texts have diverged by then) and its ends."""
    positions = np.arange(int(divergence["positions"].max()))
    done = divergence["position"].to_numpy()[:, None] <= positions
    estimate, low, high = bootstrap_ends(
        np.stack([done, np.ones_like(done)], axis=-1), ratio, resampling.resamples, seed=resampling.seed
    )
    return pd.DataFrame(
        {"position": positions, "diverged": estimate, "diverged_low": low, "diverged_high": high}
    )


def reading_table(rows: pd.DataFrame, resampling: Resampling) -> pd.DataFrame:
    """Medians where the texts part against the other positions up to there.

    Args:
        rows: from `with_divergence`, at positions where both depths have read the same tokens, with `READ`.
        resampling: of questions.

    Returns:
        A row per quantity: `divergence`, `other` and `difference`, each with `_low` and `_high`.
    """
    question, at = rows["question"].to_numpy(), rows["when"].to_numpy() == 1
    records = []
    for name in READ:
        values = rows[name].to_numpy(dtype=float) if name in rows.columns else np.full(len(rows), np.nan)
        medians = grouped_medians(question, values, [at, ~at], [(0, 1)], *resampling)
        columns = as_columns(**dict(zip(("divergence", "other", "difference"), medians, strict=True)))
        records.append({"quantity": name, **columns})
    return pd.DataFrame(records)


def shift_table(rows: pd.DataFrame, resampling: Resampling) -> tuple[pd.DataFrame, Interval, Interval]:
    """Shifts before, at and after the position where the texts part.

    Args:
        rows: a row per (question, position) with `when`, `layers` (pairs), `shifted` free-running, and
            `shifted_teacher_forced` at the same position (NaN if the run has no such comparison).
        resampling: of questions.

    Returns:
        A row per `WHEN`: pairs, `of_pairs`, `of_shifts` (share of the free-running shifts), `rate` and
        `rate_teacher_forced` (shifted share of the pairs there), the last three with `_low` and `_high`. Then
        the share of the free-running shifts that lie after, and the share that is absent teacher-forced.
    """
    codes, names = pd.factorize(rows["question"].to_numpy())
    flat, size = codes * 3 + rows["when"].to_numpy(), len(names) * 3
    free_running, teacher_forced, pairs = (
        np.bincount(flat, rows[c], size).reshape(-1, 3)
        for c in ("shifted", "shifted_teacher_forced", "layers")
    )
    columns: dict[str, object] = {"when": WHEN, "pairs": pairs.sum(axis=0).astype(int)}
    columns["of_pairs"] = ratio(np.stack(np.broadcast_arrays(pairs.sum(axis=0), pairs.sum()), -1))
    whole = np.broadcast_to(free_running.sum(axis=1, keepdims=True), free_running.shape)
    for name, top, bottom in (
        ("of_shifts", free_running, whole),
        ("rate", free_running, pairs),
        ("rate_teacher_forced", teacher_forced, pairs),
    ):
        ends = bootstrap_ends(
            np.stack([top, bottom], axis=-1), ratio, resampling.resamples, seed=resampling.seed
        )
        columns |= dict(zip((name, f"{name}_low", f"{name}_high"), ends, strict=True))
    of_all = [
        cluster_bootstrap(
            np.stack([top, whole[:, 0]], axis=1), ratio, resampling.resamples, seed=resampling.seed
        )
        for top in (free_running[:, 2], (free_running - teacher_forced).sum(axis=1))
    ]
    return pd.DataFrame(columns), of_all[0], of_all[1]


def predictor_table(rows: pd.DataFrame, resampling: Resampling) -> pd.DataFrame:
    """How well each of `SCORES` predicts where the texts part (`concordance`), all read teacher-forced.

    Args:
        rows: positions up to the divergence, with `when`, the readings, and `lowest`, `last` and `shifted`,
            each with the ending `_teacher_forced`.
        resampling: of questions, and of permutations.

    Returns:
        A row per score: AUC `within` questions, its `p`, `p_holm` (adjusted for the number of scores) and
        number of `questions`, and AUC `across` questions at the same position, both with `_low` and `_high`;
        `reason`: why there is none. NaN where not known.
    """
    rows = rows.sort_values(["question", "position"], kind="stable")
    question, position = rows["question"].to_numpy(), rows["position"].to_numpy()
    before = rows["lowest_teacher_forced"].shift().to_numpy(dtype=float)
    follows = (question == np.roll(question, 1)) & (position == np.roll(position, 1) + 1)
    follows[:1] = False

    def column(name: str) -> np.ndarray:
        return rows[name].to_numpy(dtype=float) if name in rows.columns else np.full(len(rows), np.nan)

    values = (
        -column("lowest_teacher_forced"),
        -column("last_teacher_forced"),
        column("shifted_teacher_forced"),
        np.where(follows, -before, np.nan),
        -column("margin_a"),
        column("entropy_a"),
    )
    event, records = rows["when"].to_numpy() == 1, []
    for name, score in zip(SCORES, values, strict=True):
        auc = concordance(question, position, event, score, *resampling)
        record = {"score": name, **as_columns(within=auc.within), "p": auc.p_value}
        record |= {"questions": auc.within.n_questions, **as_columns(across=auc.across)}
        records.append(record | {"reason": auc.within.reason})
    table = pd.DataFrame(records)
    table.insert(list(table.columns).index("p") + 1, "p_holm", holm(table["p"].to_numpy(dtype=float)))
    return table


def predictors_words(table: pd.DataFrame) -> str:
    """Whether the overlap predicts the divergence, beside the margin."""
    rows = table.set_index("score").to_dict("index")
    overlap, margin = rows["lowest overlap"], rows["margin of the shallower depth"]
    if not np.isfinite(overlap["within"]):
        return f" Whether the overlap predicts where is {overlap['reason']}."
    chance = overlap["p"] >= 0.05
    words = f" The lowest teacher-forced overlap {'does not predict' if chance else 'predicts'} where "
    words += f"(AUC {_auc(overlap, 'within')}, p = {overlap['p']:.2g}, {overlap['questions']:.0f} questions)"
    if np.isfinite(margin["within"]):
        words += f"; the margin alone has {_auc(margin, 'within')}"
    return words + "."


def _auc(row: Mapping[Hashable, Any], name: str) -> str:
    return f"{row[name]:.2f} [{row[f'{name}_low']:.2f}, {row[f'{name}_high']:.2f}]"
