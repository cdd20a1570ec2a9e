"""Tokens replaced (claims C4, C5): does the output move where the state does?

At every position: how many of the 100 most likely tokens are replaced from one depth to another, from which
rank the new most likely token came, how far apart the distributions are, and how sharp each is. A position
has shifted if any of its layers has; beside it stands the last layer alone, of which the output is a
function: that it moves there is true by construction, how much is not.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np
import pandas as pd
import plotly.graph_objects as go

from sst_interp.analyses.contrast import Contrast, at_positions, overlap_of
from sst_interp.analyses.plots import BLUE, VERMILLION, add_line, canvas
from sst_interp.analyses.result import Shifts, analysis
from sst_interp.analyses.statistics.bootstrap import (
    Interval,
    Resampling,
    as_columns,
    grouped_medians,
    none_seen_bound,
    percent_text,
    questions_words,
    share,
)
from sst_interp.errors import SSTError, Untestable
from sst_interp.models.measures import TOP

PAPER_RANK = 50
"""The rank from which the paper's deepest new winner came (claim C5)."""
RANKS = (1, 2, 5, 10, 20, PAPER_RANK + 1, 100)
"""Lower ends of the bins of winner ranks (0-based; rank 0 is no new winner)."""
MEASURED = ("replaced", "kl", "entropy_a", "entropy_b", "entropy_change", "winner_rank")
"""What gets a median per group of positions. `winner_rank` is of the positions with a new winner only."""
LENS = "lens_jaccard"

SOME, NONE, LAST, NOT_LAST = "a layer shifted", "no layer shifted", "last layer shifted", "last layer stable"
SAME, OTHER = "the same tokens read", "other tokens read"
MEDIANS = ("shifted", "stable", "last_shifted", "last_stable", "difference", "last_difference")
SIDES = (("stable", NONE, BLUE), ("shifted", SOME, VERMILLION))


@dataclass(frozen=True, eq=False)
class TokenReplacement(Shifts):
    """The output at shifts and at stable positions. Medians are over positions; intervals resample
    questions.
    """

    named = "Tokens replaced"
    shown = "groups"
    groups: pd.DataFrame
    """A row per group of positions (`where`): positions, questions, share with a new winner (`new_winner`),
    medians of `MEASURED` (tokens of 100, nats, 0-based rank), each with `_low` and `_high`."""
    per_pair: pd.DataFrame
    """A row per (a, b): medians of tokens replaced where some layer shifted, where none did, and their
    difference; share of positions with a shift, and with a new winner. Never pooled."""
    shifted: Interval
    """Median of tokens replaced, of 100, at positions where some layer shifted."""
    stable: Interval
    """The same where none did."""
    last_shifted: Interval
    last_stable: Interval
    """Both by the last layer alone."""
    difference: Interval
    """shifted - stable."""
    last_difference: Interval
    ranks: pd.DataFrame
    """Columns rank (0-based, in a, of b's most likely token; lower end of a bin), to, shifted, stable:
    positions."""
    n_winners: int
    """Positions with a new winner."""
    deepest_rank: int | None
    """The deepest rank a new winner came from. A maximum grows with the number of positions, so it has no
    interval; `beyond` has one."""
    beyond: Interval
    """Share of the new winners that came from beyond the paper's rank."""
    by_layer: pd.DataFrame
    """Tokens replaced in the logit lens by layer (`lens_replacement`); empty if not measured."""
    no_layers: str | None
    """Why there is no `by_layer`."""
    histogram: pd.DataFrame
    """Columns replaced (0 to 100), shifted, stable: positions."""
    n_positions: int
    n_excluded: int
    """Positions left out because an overlap or a value is missing or NaN."""

    @property
    def subtitle(self) -> str:
        """As every figure's, with the number of positions."""
        return f"{super().subtitle}; {self.n_positions:,} positions"

    @property
    def verdict(self) -> str:
        """Shifted against stable, the sample size, and where the new winners came from."""
        words = f"{self._answer} {self.words.capitalize()}: {self.n_positions:,} positions of "
        words += f"{questions_words(self.n_questions)}; a layer shifted below {self.threshold:.4g}"
        if math.isfinite(self.difference.estimate):
            words += f"; difference of the medians {self.difference.text()}"
        words += ". "
        if self.deepest_rank is None:
            bound = percent_text(none_seen_bound(self.n_questions))
            words += f"The most likely token never changes; at most {bound} of such questions have a change."
        else:
            words += f"{self.n_winners:,} new winners come from as deep as rank {self.deepest_rank:,}; "
            beyond = self.beyond.text(percent=True)
            if not self.beyond.estimate:
                bound = percent_text(none_seen_bound(self.beyond.n_questions))
                beyond = f"none (at most {bound} of such questions have one, 95%)"
            words += f"from beyond rank {PAPER_RANK}: {beyond}."
        if self.comparison == "free_running":
            some, none = (f"{v:.3g}" if math.isfinite(v) else "none" for v in self.same_tokens("replaced"))
            words += f" While both depths had read the same tokens: {some} against {none}."
        if self.n_excluded:
            words += f" {self.n_excluded:,} positions with a missing overlap or value are left out."
        return words

    @property
    def _answer(self) -> str:
        some, none = (f"{group.estimate:.3g}" for group in (self.shifted, self.stable))
        if not math.isfinite(self.difference.estimate):
            if math.isfinite(self.shifted.estimate):
                return f"Every position has a shift; the median replaces {some} of 100 tokens."
            return f"No position has a shift; the median replaces {none} of 100 tokens."
        against = f"{some} of 100 tokens against {none}."
        if not self.difference.known:
            return f"A shift replaces {against}"
        if self.difference.low > 0:
            return f"A shift replaces more of the output: {against}"
        fewer = self.difference.high < 0
        return f"A shift replaces {'less' if fewer else 'no more'} of the output: {against}"

    def same_tokens(self, column: str) -> tuple[float, float]:
        """In free-running, a column of `groups` while both depths have read the same tokens: shifted,
        stable.
        """
        rows = self.groups.set_index("where")[column].to_dict()
        some, none = (float(rows.get(f"{where}, {SAME}", math.nan)) for where in (SOME, NONE))
        return some, none

    def figure(self) -> go.Figure:
        """How many positions replace how many of the top 100 tokens, as shares of each kind."""
        figure = canvas(
            "Tokens replaced in the top 100", self.subtitle,
            "tokens replaced, of the 100 most likely", "share of such positions",
        )  # fmt: skip
        for side, name, colour in SIDES:
            counts = self.histogram[side].to_numpy()
            if counts.sum():
                median = getattr(self, side).estimate
                figure.add_bar(
                    x=self.histogram["replaced"], y=counts / counts.sum(), opacity=0.65,
                    marker={"color": colour, "line": {"width": 0}},
                    name=f"{name} ({counts.sum():,}; median {median:.3g})",
                    hovertemplate="%{x} replaced: %{y:.2%}<extra></extra>",
                )  # fmt: skip
        figure.update_layout(barmode="overlay", bargap=0)
        return figure.update_yaxes(tickformat=".0%")

    def figures(self) -> dict[str, go.Figure]:
        """`replaced`; `ranks` if the most likely token changes; `by_layer` if the lens was measured."""
        figures = {"replaced": self.figure()}
        if self.n_winners:
            figures["ranks"] = self._ranks()
        if len(self.by_layer):
            figure = canvas(
                "Tokens replaced by layer, read with the logit lens", self.subtitle, "layer (0-based)",
                "tokens replaced of 100, median",
            )  # fmt: skip
            for side, _, colour in SIDES:
                name = f"that layer {'shifted' if side == 'shifted' else 'did not'}"
                add_line(figure, self.by_layer["layer"], self.by_layer, side, name, colour)
            figures["by_layer"] = figure.update_yaxes(rangemode="tozero")
        return figures

    def _ranks(self) -> go.Figure:
        figure = canvas(
            "Rank the new most likely token came from",
            self.subtitle,
            f"rank at {'iteration' if self.comparison == 'within' else 'depth'} {self.a} (0-based)",
            "positions with a new winner",
        )
        ends = self.ranks[["rank", "to"]].astype(str)
        labels = [lo if lo == hi else f"{lo} to {hi}" for lo, hi in ends.itertuples(index=False)]
        labels[-1] = f"{ends['rank'].iloc[-1]} or more"
        for side, name, colour in SIDES:
            figure.add_bar(
                x=labels, y=self.ranks[side], name=name, marker={"color": colour},
                hovertemplate="rank %{x}: %{y:,} positions<extra></extra>",
            )  # fmt: skip
        return figure.update_layout(barmode="stack")


@analysis(
    "Tokens replaced",
    "What does a shift do to the output?",
    claims=("C4", "C5"),
    needs=("pairs", "outputs"),
    order=70,
)
def token_replacement(c: Contrast) -> TokenReplacement:
    """Tokens replaced at shifts and at stable positions of one comparison.

    Raises:
        Untestable: if there are no outputs at this pair, or each has a NaN.
    """
    rows, n_excluded = output_changes(c)
    if rows.empty:
        raise Untestable(f"every position of comparison {c.comparison!r} has a NaN")
    rows = at_positions(rows, c.readings)
    question, replaced = rows["question"].to_numpy(), rows["replaced"].to_numpy(dtype=float)
    groups = position_groups(rows, c)
    first = list(groups.values())[:4]
    medians = grouped_medians(question, replaced, first, [(0, 1), (2, 3)], *c.resampling)
    changed = rows["argmax_changed"].to_numpy(dtype=bool)
    rank = rows["winner_rank"].to_numpy()[changed]
    by_layer, no_layers = pd.DataFrame(), None
    try:
        by_layer = lens_replacement(c)
    except SSTError as error:
        no_layers = error.message
    counts = [np.bincount(replaced[mask].astype(int), minlength=TOP + 1) for mask in first[:2]]
    return TokenReplacement(
        **c.judged,
        groups=group_table(rows, groups, c.resampling),
        per_pair=per_pair_table(c),
        **dict(zip(MEDIANS, medians, strict=True)),
        ranks=rank_table(rank, first[0][changed]),
        n_winners=int(changed.sum()),
        deepest_rank=int(rank.max()) if len(rank) else None,
        beyond=share(question[changed], rank > PAPER_RANK, *c.resampling),
        by_layer=by_layer,
        no_layers=no_layers,
        histogram=pd.DataFrame({"replaced": range(TOP + 1), "shifted": counts[0], "stable": counts[1]}),
        n_positions=len(rows),
        n_questions=rows["question"].nunique(),
        n_excluded=n_excluded,
    )  # fmt: skip


def output_changes(c: Contrast) -> tuple[pd.DataFrame, int]:
    """The outputs of a contrast, with the overlaps at the same position.

    Returns:
        The rows, with the columns of `Contrast.positions`, and how many were left out because an overlap or
        a value is missing or NaN.
    """
    joined = at_positions(c.outputs, c.positions)
    needed = joined[["lowest", "replaced", "winner_rank", "argmax_changed", "same_prefix"]]
    there = ~needed.isna().any(axis=1).to_numpy()
    return joined[there].reset_index(drop=True), int((~there).sum())


def position_groups(rows: pd.DataFrame, c: Contrast) -> dict[str, np.ndarray]:
    """Masks over the rows of `output_changes`, by name: shifted and stable positions, by any layer first,
    then by the last layer; in free-running also by whether both depths have read the same tokens.
    """
    some, last = rows["shifted"].to_numpy() > 0, rows["last"].to_numpy() < c.threshold
    groups = {SOME: some, NONE: ~some, LAST: last, NOT_LAST: ~last}
    if c.comparison == "free_running":
        same = rows["same_prefix"].to_numpy(dtype=bool)
        for words, mask in ((SAME, same), (OTHER, ~same)):
            groups |= {f"{SOME}, {words}": some & mask, f"{NONE}, {words}": ~some & mask}
    return groups


def group_table(rows: pd.DataFrame, groups: Mapping[str, np.ndarray], resampling: Resampling) -> pd.DataFrame:
    """A row per group of positions: how often the winner changes, and the medians of `MEASURED`.

    Args:
        rows: from `output_changes`, with `entropy_a` and `entropy_b` where they are known.
        groups: name -> mask over the rows.
        resampling: of questions.

    Returns:
        Columns where, positions, questions, `new_winner` (share) and each of `MEASURED`, both with `_low` and
        `_high`, and `deepest_rank`, NaN where there is no new winner.
    """
    question, changed = rows["question"].to_numpy(), rows["argmax_changed"].to_numpy(dtype=bool)
    masks = list(groups.values())
    medians = {
        name: grouped_medians(question, measured(rows, name), masks, (), *resampling) for name in MEASURED
    }
    ranks, records = measured(rows, "winner_rank"), []
    for i, (where, mask) in enumerate(groups.items()):
        winners = share(question[mask], changed[mask], *resampling)
        record: dict[str, object] = {
            "where": where,
            "positions": int(mask.sum()),
            "questions": winners.n_questions,
        }
        record |= as_columns(new_winner=winners, **{name: medians[name][i] for name in MEASURED})
        records.append(record | {"deepest_rank": np.nanmax(ranks[mask], initial=0) or np.nan})
    return pd.DataFrame(records)


def measured(rows: pd.DataFrame, name: str) -> np.ndarray:
    """One of `MEASURED` at every row; NaN where it is not known or does not apply."""
    if name == "entropy_change":
        return measured(rows, "entropy_b") - measured(rows, "entropy_a")
    if name not in rows.columns:
        return np.full(len(rows), np.nan)
    values = rows[name].to_numpy(dtype=float)
    return np.where(rows["argmax_changed"], values, np.nan) if name == "winner_rank" else values


def rank_table(rank: np.ndarray, shifted: np.ndarray) -> pd.DataFrame:
    """New winners by the rank they came from: columns rank and to (a bin's ends), shifted, stable.

    Args:
        rank: [row] 0-based rank in a of b's most likely token, at positions with a new winner.
        shifted: [row] whether a layer shifted there.
    """
    # A tie: the new winner was as likely as the old one, so its rank is 0. It goes to the first bin.
    index = np.maximum(np.searchsorted(RANKS, rank, side="right") - 1, 0)
    counts = [np.bincount(index[mask], minlength=len(RANKS)) for mask in (shifted, ~shifted)]
    ends = [str(end - 1) for end in RANKS[1:]] + ["more"]
    return pd.DataFrame({"rank": RANKS, "to": ends, "shifted": counts[0], "stable": counts[1]})


def per_pair_table(c: Contrast) -> pd.DataFrame:
    """A row per (a, b) of one comparison: tokens replaced where some layer shifted and where none did.

    Returns:
        Columns a, b, positions, questions, `share with a shift` (of the positions), the medians `shifted`,
        `stable` and `difference`, each with `_low` and `_high`, and `new_winner` (share).
    """
    records = []
    with_outputs = set(map(tuple, c.all_outputs[["a", "b"]].drop_duplicates().to_numpy().tolist()))
    for a, b in c.pairs_there:
        if (a, b) not in with_outputs:
            continue
        rows, _ = output_changes(c.at(a, b))
        question, some = rows["question"].to_numpy(), rows["shifted"].to_numpy() > 0
        replaced = rows["replaced"].to_numpy()
        medians = grouped_medians(question, replaced, [some, ~some], [(0, 1)], *c.resampling)
        record: dict[str, float] = {"a": a, "b": b, "positions": len(rows)}
        record |= {"questions": rows["question"].nunique()}
        record["share with a shift"] = some.mean() if len(rows) else np.nan
        record |= as_columns(**dict(zip(("shifted", "stable", "difference"), medians, strict=True)))
        records.append(record | {"new_winner": rows["argmax_changed"].mean()})
    return pd.DataFrame(records)


def replaced_of(jaccard: np.ndarray) -> np.ndarray:
    """Tokens replaced, of 100, between two top-100 sets of Jaccard index J: 100 (1 - J) / (1 + J).

    With c tokens in common J = c / (200 - c), which gives 100 - c. Whole numbers, as `outputs.replaced`.
    """
    jaccard = np.asarray(jaccard, dtype=float)
    return np.rint(TOP * (1 - jaccard) / (1 + jaccard))


def lens_replacement(c: Contrast) -> pd.DataFrame:
    """Tokens replaced in the logit lens's top 100, by layer, where that layer shifted and where it did not.

    Read from the run that stands beside this one as `lens`, or from this run itself.

    Returns:
        A row per layer: the medians `shifted`, `stable` and `difference`, each with `_low` and `_high`, and
        the number of positions of the first two. NaN where a layer has no such position.

    Raises:
        SSTError: if the lens was not captured, or the overlap is the lens itself (then shifted positions have
            more tokens replaced by definition).
    """
    if c.kind == LENS:
        raise Untestable("what shifted is itself read off the lens", 'choose overlap = "cosine"')
    beside = c.of_companion("lens")
    if beside is not None and beside.tables.get("pairs", c.comparison) is not None:
        read = replace(beside, pair=(c.a, c.b), fixed=c.threshold)
    else:
        read = c
    replaced, there = replaced_of(overlap_of(read.rows, LENS)), np.isfinite(read.overlap)
    question, layer = (read.rows[name].to_numpy()[there] for name in ("question", "layer"))
    replaced, below = replaced[there], read.overlap[there] < c.threshold
    records = []
    for one in np.unique(layer):
        here = layer == one
        values, shifted = replaced[here], below[here]
        medians = grouped_medians(question[here], values, [shifted, ~shifted], [(0, 1)], *c.resampling)
        record: dict[str, float] = {"layer": int(one)}
        record |= as_columns(**dict(zip(("shifted", "stable", "difference"), medians, strict=True)))
        known = np.isfinite(values)
        record |= {"positions_shifted": int((shifted & known).sum())}
        records.append(record | {"positions_stable": int((~shifted & known).sum())})
    return pd.DataFrame(records)
