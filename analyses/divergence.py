"""Divergence: when two depths' texts part, how much of the free-running shifts is that, and can it be foretold?

In free-running each depth writes its own text. As soon as one token differs the two read different tokens, and
their states differ for that reason alone. This says where that happens, how undecided the output was there,
which share of the shifts lies after it, what is left of them on one text (teacher-forced), and whether the state
at that position is one by which it could be told.

The texts part at the position whose output first differs: both depths have read the same tokens up to and
including it, and from the next position on they have not. Up to it teacher-forced and free-running are one and the same
computation, so a shift there is not yet the text's doing.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go

from sst_interp.analyses.contrast import Contrast, at_positions, pair_words
from sst_interp.analyses.plots import BLUE, GREY, ORANGE, VERMILLION, add_line, canvas, error_bars
from sst_interp.analyses.result import Result, analysis
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
"""Relative to the position where the texts part; all of a question whose texts do not is before."""
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
class Divergence(Result):
    """Where two depths' texts part, and what that has to do with shifts. All intervals resample questions."""

    a: int
    b: int
    """Depths of the headline: 1 and the deepest."""
    threshold: float
    """Overlap below which a pair counts as shifted."""
    kind: str
    """Which overlap."""
    diverged: Interval
    """Share of questions whose texts part."""
    position: Interval
    """Median position of the first differing token, of those that part."""
    where: pd.DataFrame
    """A row per (a, b) and question: `position` of the first differing token (NaN: none), and `positions`,
    how many both texts have."""
    by_position: pd.DataFrame
    """Columns position, diverged (share of questions by then), parted_low, parted_high."""
    readings: pd.DataFrame
    """A row per quantity: median where the texts part, at other positions up to there, and the difference.
    Margins in logits, entropies and KL in nats; `_a` is of depth a."""
    shifts: pd.DataFrame
    """A row for before, at and after the divergence: share of pairs, share of the shifts of free-running, shift rate
    in free-running and on one text at the same positions (`shift_table`)."""
    after: Interval
    """Share of the shifts of free-running that lie after the first differing token."""
    explained: Interval
    """Share of the shifts of free-running that are not there on one text."""
    predictors: pd.DataFrame
    """A row per score: AUC for the position where the texts part (`predictor_table`)."""
    agreement: float
    """Largest difference between lowest overlaps of teacher-forced and free-running up to there: 0 but for rounding."""
    n_questions: int
    n_excluded: int
    """Positions left out because an overlap or a value is missing or NaN."""
    no_replay: str | None
    """Why nothing is said of teacher-forced; None if it is."""
    per_pair: pd.DataFrame | None = None
    """A row per (a, b): questions, diverged, position, after, explained, each of the last four with `_low` and
    `_high`."""

    @property
    def title(self) -> str:
        """What was compared."""
        return f"When texts part: {self.words}"

    @property
    def words(self) -> str:
        """The comparison and its pair, in words."""
        return pair_words("free_running", self.a, self.b)

    @property
    def left(self) -> Interval:
        """Shifts on one text as a share of those of free-running: 1 - explained."""
        e = self.explained
        return replace(e, estimate=1 - e.estimate, low=1 - e.high, high=1 - e.low)

    @property
    def table(self) -> pd.DataFrame:
        """A row per (a, b)."""
        return pd.DataFrame() if self.per_pair is None else self.per_pair

    @property
    def verdict(self) -> str:
        """Where the texts part, how many of the shifts are left on one text, and whether it can be told."""
        n = questions_words(self.n_questions)
        if not self.diverged.estimate:
            bound = percent_text(none_seen_bound(self.n_questions))
            return f"No two texts part. {self.words.capitalize()}: {n}; at most {bound} of such do (95%)."
        explained = np.isfinite(self.explained.estimate) and self.no_replay is None
        if not np.isfinite(self.after.estimate):
            words = f"Texts part, but nothing shifts (below {self.threshold:.4g}): nothing to explain."
        elif explained and self.explained.low > 0:
            explains = percent_text(self.explained.estimate)
            words = f"{explains} of the shifts come from the texts, not from the depth."
        elif explained:
            words = "The shifts do not come from the texts."
        else:
            words = "Texts part; how many shifts that makes is not known."
        words += (
            f" {self.words.capitalize()}: the texts of {percent_text(self.diverged.estimate)} of {n} part, "
        )
        words += f"at position {self.position.text()} (median)."
        if np.isfinite(self.after.estimate):
            of_pairs = self.shifts.set_index("when")["of_pairs"].to_dict()["after"]
            words += f" {self.after.text(percent=True)} of the shifts lie after that, as do "
            words += f"{percent_text(of_pairs)} of all pairs"
            if explained:
                words += f"; on one text {self.left.text(percent=True)} of the shifts are left"
            words += "."
        if self.n_excluded:
            words += f" {self.n_excluded:,} positions with a missing overlap or value are left out."
        if self.no_replay:
            return f"{words} What is left on one text is not known: {self.no_replay}."
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
        """Shift rate before, at and after the first differing token, in free-running and on one text."""
        figure = canvas(
            "Shifts and the first differing token",
            f"{self.words}; {questions_words(self.n_questions)}; shifted: overlap below {self.threshold:.4g}",
            "position, relative to the first differing token",
            "shifted share of pairs",
        )
        for column, name, colour in (
            ("rate", "free-running: each its own text", VERMILLION),
            ("rate_teacher_forced", "teacher-forced: the same positions on one text", BLUE),
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
            "Can it be told where the texts part?",
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
    """Where the texts of two depths part in free-running, for every pair of depths; the deepest is the headline.

    One threshold, that of free-running, for both comparisons, since their shifts are subtracted.

    Raises:
        Untestable: if the run has no free-running, or every position of it has a NaN.
    """
    free_running = c.to("free_running")
    outputs = free_running.all_outputs
    pairs = sorted(set(map(tuple, outputs[["a", "b"]].drop_duplicates().to_numpy().tolist())))
    # One comparison after the other: only one is held in memory.
    read = {pair: (free_running.at(*pair).positions, free_running.at(*pair).readings) for pair in pairs}
    own = replace(c.to("teacher_forced"), fixed=free_running.threshold)
    teacher_forced: dict[tuple[int, int], pd.DataFrame | str] = {}
    for pair in pairs:
        try:
            teacher_forced[pair] = own.at(*pair).positions
        except Untestable as error:
            teacher_forced[pair] = error.message
    each = [_pair(free_running.at(*pair), outputs, *read[pair], teacher_forced[pair]) for pair in pairs]
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
    free_running: pd.DataFrame,
    read: pd.DataFrame,
    teacher_forced: pd.DataFrame | str,
) -> Divergence:
    """One pair of depths: the outputs of free-running, the positions of both comparisons (or why there are none)
    and what was read there.
    """
    a, b = c.a, c.b
    rows = outputs[((outputs["a"] == a) & (outputs["b"] == b)).to_numpy(dtype=bool)]
    known = ~rows[["same_prefix", "argmax_changed"]].isna().any(axis=1).to_numpy()
    rows = rows[known]
    if rows.empty:
        raise Untestable("every position of comparison 'free_running' has a NaN")
    divergence = divergence_positions(rows)
    parts = np.isfinite(divergence["position"].to_numpy())
    question = divergence["question"].to_numpy()
    same = with_divergence(rows[rows["same_prefix"].to_numpy(dtype=bool)], divergence)
    same = at_positions(same, read)
    n_excluded, no_replay = int((~known).sum()), None
    if isinstance(teacher_forced, str):
        no_replay, teacher_forced = teacher_forced, free_running[:0]
    theirs = {name: f"{name}_teacher_forced" for name in ("shifted", "lowest", "last")}
    both = at_positions(free_running, teacher_forced.drop(columns="layers").rename(columns=theirs))
    there = np.isfinite(both["lowest"].to_numpy())
    if no_replay is None:
        there &= np.isfinite(both["lowest_teacher_forced"].to_numpy(dtype=float))
    both = with_divergence(both[there], divergence)
    shifts, after, explained = shift_table(both, c.resampling)
    upto = both[both["when"].to_numpy() < 2]
    upto = at_positions(upto, same[["question", "position", "margin_a", "entropy_a"]])
    return Divergence(
        a, b, c.threshold, c.kind,
        diverged=share(question, parts, *c.resampling),
        position=grouped_medians(question, divergence["position"].to_numpy(), [parts], (), *c.resampling)[0],
        where=divergence.assign(a=a, b=b)[["a", "b", *divergence.columns]],
        by_position=diverged_by(divergence, c.resampling),
        readings=reading_table(same, c.resampling),
        shifts=shifts,
        after=after,
        explained=explained,
        predictors=predictor_table(upto, c.resampling),
        agreement=float((upto["lowest"] - upto["lowest_teacher_forced"]).abs().max()),
        n_questions=len(divergence),
        n_excluded=n_excluded + int((~there).sum()),
        no_replay=no_replay,
    )  # fmt: skip


def divergence_positions(free_running: pd.DataFrame) -> pd.DataFrame:
    """Where the texts of each question part.

    Args:
        free_running: rows of `outputs` of comparison free-running and one pair of depths.

    Returns:
        A row per question, ascending: `question`, `position` (NaN if the texts are the same to the end of
        the shorter) and `positions`, how many both depths have.
    """
    same = free_running["same_prefix"].to_numpy(dtype=bool)
    changed = free_running["argmax_changed"].to_numpy(dtype=bool)
    position = free_running["position"].to_numpy(dtype=float)
    # The flag turns one position later; a text that ends there has no later position.
    at = np.where(same & changed, position, np.where(same, np.nan, position - 1))
    by = pd.DataFrame({"question": free_running["question"].to_numpy(), "position": at}).groupby("question")
    found = by["position"].min()
    return pd.DataFrame(
        {"question": found.index.to_numpy(), "position": found.to_numpy(), "positions": by.size().to_numpy()}
    )


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
        found = grouped_medians(question, values, [at, ~at], [(0, 1)], *resampling)
        columns = as_columns(**dict(zip(("divergence", "other", "difference"), found, strict=True)))
        records.append({"quantity": name, **columns})
    return pd.DataFrame(records)


def shift_table(rows: pd.DataFrame, resampling: Resampling) -> tuple[pd.DataFrame, Interval, Interval]:
    """Shifts before, at and after the position where the texts part, and what the divergence explains of them.

    Args:
        rows: a row per (question, position) with `when`, `layers` (pairs), `shifted` in free-running, and
            `shifted_teacher_forced` at the same position (NaN if the run has no such comparison).
        resampling: of questions.

    Returns:
        The table, a row per `WHEN`: pairs, `of_pairs`, `of_shifts` (share of the shifts of free-running), `rate`
        and `rate_teacher_forced` (shifted share of the pairs there), the last three with `_low` and `_high`. Then
        the share of the shifts of free-running that lie after, and the share that is missing on one text.
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
    """How well each of `SCORES` says where the texts part (`concordance`), from teacher-forced alone.

    Args:
        rows: positions up to the divergence, with `when`, the readings, and `lowest_teacher_forced`, `last_teacher_forced`
            and `shifted_teacher_forced`.
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
        found = concordance(question, position, event, score, *resampling)
        within = found.within
        record = {"score": name, **as_columns(within=within), "p": found.p_value}
        record |= {"questions": within.n_questions, **as_columns(across=found.across)}
        records.append(record | {"reason": within.reason})
    table = pd.DataFrame(records)
    table.insert(list(table.columns).index("p") + 1, "p_holm", holm(table["p"].to_numpy(dtype=float)))
    return table


def predictors_words(table: pd.DataFrame) -> str:
    """What `predictor_table` says of the overlap, beside the margin, as a sentence."""
    rows = table.set_index("score").to_dict("index")
    overlap, margin = rows["lowest overlap"], rows["margin of the shallower depth"]
    if not np.isfinite(overlap["within"]):
        return f" Whether the overlap tells where is {overlap['reason']}."
    chance = overlap["p"] >= 0.05
    words = f" The lowest overlap on one text {'does not tell' if chance else 'tells'} where "
    words += f"(AUC {_auc(overlap, 'within')}, p = {overlap['p']:.2g}, {overlap['questions']:.0f} questions)"
    if np.isfinite(margin["within"]):
        words += f"; the margin alone has {_auc(margin, 'within')}"
    return words + "."


def _auc(row: Mapping[Hashable, Any], name: str) -> str:
    return f"{row[name]:.2f} [{row[f'{name}_low']:.2f}, {row[f'{name}_high']:.2f}]"
