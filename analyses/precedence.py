"""Precedence (claim C6): does the state move before the argmax does, in iterations and in layers?

At every position: the first iteration (`within`) or depth at which some layer's state has shifted against
iteration or depth 1, and the first at which the argmax is another token. Three parts of the claim are true by
construction, and each has its control:

- The argmax is a function of the last layer's output: it changes only where that moves. Norm-matched
  perturbations (table `nudges`) show what any move of the same size does (`beside_perturbations`,
  `by_construction`).
- Where most positions shift at the first step, whatever happens there comes with a shift or after one. `null`
  is what shuffling the shifts over positions gives.
- Lower layers are computed first. Only where a shift begins (`by_layer`) is an observation.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import reduce
from itertools import product
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import plotly.graph_objects as go

from sst_interp.analyses.contrast import Contrast, position_key
from sst_interp.analyses.plots import BLUE, GREEN, GREY, ORANGE, SKY, Line, canvas, error_bars, lines
from sst_interp.analyses.result import Shifts, analysis, comparison_words
from sst_interp.analyses.statistics.bootstrap import (
    Interval,
    Resampling,
    as_columns,
    bootstrap_ends,
    by,
    cluster_bootstrap,
    nothing,
    points_text,
    questions_words,
    ratio,
    share,
)
from sst_interp.analyses.statistics.permutation import ORDERS, first_at, order_counts, order_table, orders
from sst_interp.errors import Untestable

CHANGES, SHIFTS = "the argmax changes", "the state shifts"
"""What is `given` in a row of `orders`."""
WHEN = {"before": "at an earlier step", "together": "at the same step", "after": "later", "alone": "never"}
PERTURBED = {"random": "same size, random", "elsewhere": "same size, as elsewhere in the text"}
"""Directions of perturbations. `elsewhere`: as the state moves at another position of the same text."""
SITES = {"output": "last layer's output", "stream": "stream states<br>handed in"}
RUN, SHUFFLED, TRUE = "this run, any layer", "shifts shuffled", "the true change"
LAST = "the true change, last layer only"
COLOURS = {
    RUN: BLUE, SHUFFLED: GREY, TRUE: SKY, LAST: SKY,
    PERTURBED["random"]: ORANGE, PERTURBED["elsewhere"]: GREEN,
}  # fmt: skip

Bar = tuple[str, str, float, float, float]  # label, series, share and its ends


@dataclass(frozen=True, eq=False)
class Precedence(Shifts):
    """Which came first, in one comparison. All intervals resample questions."""

    named = "State and argmax"
    shown = "orders"
    steps: tuple[int, ...]
    """Iterations or depths that are compared with the first, ascending."""
    n_positions: int
    n_excluded: int
    """Positions left out: an overlap is NaN, or a depth's own text has ended."""
    orders: pd.DataFrame
    """A row per `given` ("the argmax changes", "the state shifts") and order of the other (`order_table`)."""
    before: Interval
    """Of the positions whose argmax changes, share whose state had shifted at an earlier step ..."""
    together: Interval
    """... shifts at the same step ..."""
    after: Interval
    """... shifts later: the claim says never ..."""
    alone: Interval
    """... never shifts: against the claim, too."""
    against: Interval
    """after + alone."""
    at_first_step: Interval
    """Share at which the argmax changed at the first step, where nothing can have come before."""
    changed: pd.DataFrame
    """How often the argmax differs at a step, given the state there (`changed_by_state`)."""
    difference: Interval
    """Of `changed` at the last step: shifted minus stable positions."""
    by_layer: pd.DataFrame
    """Share of changed argmaxes by the lowest layer that has shifted at the last step."""
    beside_perturbations: pd.DataFrame
    """True changes against perturbations of the same norm; empty without controls."""
    by_construction: pd.DataFrame
    """Orders of the last layer's state and the argmax under perturbations (`perturbed_orders`)."""
    no_perturbations: str | None
    """Why there are no perturbations to compare with; None if there are."""

    @property
    def words(self) -> str:
        """The comparison and its steps, in words."""
        if self.comparison == "within":
            return f"within one pass, iterations 1 to {self.steps[-1]}"
        return f"{comparison_words(self.comparison)}, depths 1 to {self.steps[-1]}"

    @property
    def given(self) -> pd.DataFrame:
        """When the state shifted, of the positions whose argmax changes; index: order."""
        return self.orders[self.orders["given"] == CHANGES].set_index("order")

    @property
    def at_shifts(self) -> dict[str, Any]:
        """Rows of `beside_perturbations`, output at shifted positions, by direction; empty without both."""
        rows: dict[str, Any] = {
            row["direction"]: row
            for row in self.beside_perturbations.to_dict("records")
            if (row["site"], row["where"]) == ("output", "shifted")
        }
        return rows if {"true", "random"} <= rows.keys() else {}

    @property
    def verdict(self) -> str:
        """The order, what shuffling gives, and what a change of the same size does."""
        first: dict[Any, float] = self.given.loc["before"].to_dict()
        more, clear = first["share"] > first["null"], first["p"] < 0.05
        answer = "The state does not move first."
        if clear and more:
            answer = "The state moves before the argmax more often than by chance."
        elif clear:
            answer = "The state moves before the argmax less often than by chance."
        step = "iteration" if self.comparison == "within" else "depth"
        words = f"{answer} {self.words.capitalize()}: the argmax changes at "
        words += f"{int(self.given['positions'].sum()):,} of {self.n_positions:,} positions of "
        words += f"{questions_words(self.n_questions)}. Some layer (below {self.threshold:.4g}) had shifted "
        words += f"at an earlier {step} in {self.before.text(percent=True)}; shuffled shifts give "
        words += f"{first['null']:.1%} (p = {first['p']:.2g})."
        if self.comparison == "free_running":
            words += " Once two texts have parted, state and argmax differ because the tokens do."
        if self.no_perturbations:
            return f"{words} No random changes of the same size: {self.no_perturbations}."
        return words + self._beside_random

    @property
    def _beside_random(self) -> str:
        if not self.at_shifts:
            return " No perturbed position shifts."
        true, random = self.at_shifts["true"], self.at_shifts["random"]
        low, high = random["difference_low"], random["difference_high"]
        gap = Interval(random["difference"], low, high, int(random["questions"]), reason="one question")
        often = "more often" if low > 0 else "less often" if high < 0 else "as often, within the interval"
        words = f" At {true['positions']:,} shifts the true change flips the argmax {often}"
        words += f"{' than' if low > 0 or high < 0 else ' as'} a random change of the same size: "
        return words + f"{true['changed']:.1%} against {random['changed']:.1%} ({points_text(gap)})."

    def figure(self) -> go.Figure:
        """When the state shifted, where the argmax changes: the run, shuffled, and perturbed."""
        bars: list[Bar] = []
        for order, row in self.given.to_dict("index").items():
            label = WHEN[str(order)]
            bars.append((label, RUN, row["share"], row["low"], row["high"]))
            bars.append((label, SHUFFLED, row["null"], row["null_low"], row["null_high"]))
        for row in self.by_construction.to_dict("records"):
            series = PERTURBED.get(row["direction"], LAST)
            bars.append((WHEN[row["order"]], series, row["share"], row["low"], row["high"]))
        return _grouped(
            "When the state shifted, where the argmax changes", self.subtitle,
            "when the state shifted, seen from the argmax", "share of changed argmaxes", bars,
        )  # fmt: skip

    def figures(self) -> dict[str, go.Figure]:
        """`order`, `changed`, and `by_layer` if some position shifts."""
        figures = {"order": self.figure(), "changed": self._changed()}
        if len(self.by_layer):
            table = self.by_layer
            line = Line("argmax changed", table["layer"], table["share"], table["low"], table["high"])
            figures["by_layer"] = lines(
                "Where the shift begins", self.subtitle, "lowest shifted layer (0-based)",
                "argmax changed, share<br>of positions", [line], True,
            ).update_traces(showlegend=False)  # fmt: skip
        return figures

    def _changed(self) -> go.Figure:
        """How often the argmax changes at the last step: where the state shifted or not, and perturbed."""
        at_last = self.changed[self.changed["step"] == self.steps[-1]]
        bars: list[Bar] = [
            (f"{row['where']}:<br>all positions", RUN, row["changed"], row["low"], row["high"])
            for row in at_last.to_dict("records")
            if row["positions"]
        ]
        for row in self.beside_perturbations.to_dict("records"):
            series = PERTURBED.get(row["direction"], TRUE)
            ends = row["changed"], row["changed_low"], row["changed_high"]
            bars.append((f"{row['where']}:<br>{SITES[row['site']]}", series, *ends))
        return _grouped(
            "How often the argmax changes", self.subtitle,
            "where the state shifted or not, and what was changed", "share of positions", bars,
        )  # fmt: skip

    @property
    def subtitle(self) -> str:
        """As every figure's, with the number of positions."""
        return f"{super().subtitle} in some layer; {self.n_positions:,} positions"


@analysis(
    "State and argmax",
    "Does the state move before the argmax does?",
    claims=("C6",),
    needs=("pairs", "outputs"),
    order=80,
)
def precedence(c: Contrast) -> Precedence:
    """Which came first in one comparison, and beside random changes of the same size where the run has them.

    Raises:
        Untestable: if a pair (1, b) is missing, no position has every overlap, or the argmax never changes.
    """
    rows = state_and_argmax(c)
    question, steps, shifted, changed = rows.question, rows.steps, rows.shifted, rows.changed
    if not len(question):
        raise Untestable(f"no position of comparison {c.comparison!r} has every overlap")
    n_questions = len(np.unique(question))
    if not changed.any():
        n = questions_words(n_questions)
        raise Untestable(f"the argmax never changes, at {len(question):,} positions of {n}")
    x, y = first_at(shifted), first_at(changed)
    counts = order_counts(question, x, y, len(steps))
    orders = [
        order_table(table, *c.resampling).assign(given=given)
        for given, table in ((CHANGES, counts), (SHIFTS, counts.transpose(0, 2, 1)))
    ]
    ever = y < len(steps)

    def of_changes(mask: np.ndarray) -> Interval:
        return share(question[ever], mask[ever], *c.resampling)

    last, at_last = len(steps) - 1, shifted[:, -1]
    here = pd.DataFrame({"question": question, "position": rows.position, "shifted": at_last})
    beside, constructed, why = pd.DataFrame(), pd.DataFrame(), None
    try:
        beside, constructed = matched_perturbations(c, here)
    except Untestable as error:
        why = error.message
    table, difference = changed_by_state(rows, c.resampling)
    return Precedence(
        **{**c.judged, "a": 1, "b": steps[-1]},
        steps=steps,
        n_positions=len(question),
        n_questions=n_questions,
        n_excluded=rows.n_excluded,
        orders=pd.concat(orders, ignore_index=True)[["given", *orders[0].columns.drop("given")]],
        before=of_changes(x < y),
        together=of_changes(x == y),
        after=of_changes((x > y) & (x <= last)),
        alone=of_changes(x > last),
        against=of_changes(x > y),
        at_first_step=of_changes(y == 0),
        changed=table,
        difference=difference,
        by_layer=by(
            "layer", rows.lowest_layer[at_last], question[at_last], changed[at_last, -1], *c.resampling
        ),
        beside_perturbations=beside,
        by_construction=constructed,
        no_perturbations=why,
    )


class StateAndArgmax(NamedTuple):
    """Positions of one comparison, sorted. A step is an iteration or depth compared with the first."""

    question: np.ndarray
    position: np.ndarray
    steps: tuple[int, ...]
    shifted: np.ndarray
    """[position, step]: the overlap of some layer is below the threshold."""
    changed: np.ndarray
    """[position, step]: the most likely token is not that of the first iteration or depth."""
    lowest_layer: np.ndarray
    """[position]: the lowest layer that has shifted at the last step; -1: none has."""
    n_excluded: int
    """Positions left out: an overlap is NaN, or there is no row for some step."""


def state_and_argmax(c: Contrast) -> StateAndArgmax:
    """Shifts and changes of the argmax of one comparison, from the pairs (1, b) for every b."""
    outputs = c.all_outputs
    outputs = outputs[(outputs["a"] == 1).to_numpy(dtype=bool)]
    if outputs.empty:
        raise Untestable(f"no outputs of comparison {c.comparison!r} in this run")
    steps = tuple(int(b) for b in np.unique(outputs["b"].to_numpy()))
    states, tokens = [], []
    for step in steps:
        positions = c.at(1, step).positions
        known = np.isfinite(positions["lowest"].to_numpy())
        states.append((position_key(positions), known, positions["shifted"].to_numpy() > 0))
        of_step = outputs[(outputs["b"] == step).to_numpy(dtype=bool)]
        order = np.argsort(position_key(of_step), kind="stable")
        tokens.append((position_key(of_step)[order], of_step["argmax_changed"].to_numpy(dtype=bool)[order]))
    ever = reduce(np.union1d, [keys for keys, *_ in (*states, *tokens)])
    both = [keys[known] for keys, known, _ in states] + [keys for keys, _ in tokens]
    whole = reduce(np.intersect1d, both)
    return StateAndArgmax(
        question=whole >> 32,
        position=whole & 0xFFFFFFFF,
        steps=steps,
        shifted=np.stack([of[np.searchsorted(keys, whole)] for keys, _, of in states], axis=1),
        changed=np.stack([of[np.searchsorted(keys, whole)] for keys, of in tokens], axis=1),
        lowest_layer=_lowest_layer(c.at(1, steps[-1]), whole),
        n_excluded=len(ever) - len(whole),
    )


def changed_by_state(rows: StateAndArgmax, resampling: Resampling) -> tuple[pd.DataFrame, Interval]:
    """How often the argmax has changed at a step, given the state there.

    Returns:
        Columns step, where (shifted, stable), positions, questions, changed, low, high; and, at the last
        step, the share at shifted minus the share at stable positions.
    """
    records = []
    for k, step in enumerate(rows.steps):
        for where, here in (("shifted", rows.shifted[:, k]), ("stable", ~rows.shifted[:, k])):
            own = share(rows.question[here], rows.changed[here, k], *resampling)
            ends = own.estimate, own.low, own.high
            records.append((step, where, int(here.sum()), own.n_questions, *ends))
    columns = ["step", "where", "positions", "questions", "changed", "low", "high"]
    codes, names = pd.factorize(rows.question)
    shifted, changed = rows.shifted[:, -1], rows.changed[:, -1]
    cells = [
        np.bincount(codes, weights, len(names))
        for where in (shifted, ~shifted)
        for weights in (where & changed, where)
    ]
    sums = np.stack(cells, axis=1).reshape(-1, 2, 2)
    difference = cluster_bootstrap(sums, _gap, resampling.resamples, seed=resampling.seed)
    return pd.DataFrame(records, columns=columns), difference


def _lowest_layer(c: Contrast, whole: np.ndarray) -> np.ndarray:
    below = c.overlap < c.threshold
    keys, layer = position_key(c.rows)[below], c.rows["layer"].to_numpy()[below]
    keep = np.isin(keys, whole)
    order = np.argsort(-layer[keep], kind="stable")
    lowest = np.full(len(whole), -1)
    # The last one written is the lowest.
    lowest[np.searchsorted(whole, keys[keep][order])] = layer[keep][order]
    return lowest


def _grouped(title: str, subtitle: str, x: str, y: str, bars: list[Bar]) -> go.Figure:
    """Bars side by side with their 95% intervals; the legend below, where it hides no title."""
    figure = canvas(title, subtitle, x, y)
    labels = list(dict.fromkeys(label for label, *_ in bars))
    for series, colour in COLOURS.items():
        own = [bar for bar in bars if bar[1] == series]
        if not own:
            continue
        share, low, high = (np.array([bar[i] for bar in own], dtype=float) for i in (2, 3, 4))
        figure.add_bar(
            x=[bar[0] for bar in own], y=share, name=series, marker={"color": colour},
            error_y=error_bars(share, low, high, GREY), customdata=np.stack([low, high], axis=1),
            hovertemplate="%{x}: %{y:.1%} [%{customdata[0]:.1%}, %{customdata[1]:.1%}]<extra></extra>",
        )  # fmt: skip
    figure.update_xaxes(categoryorder="array", categoryarray=labels)
    figure.update_yaxes(tickformat=".0%", rangemode="tozero")
    legend = {"yref": "container", "yanchor": "bottom", "y": 0.01, "x": 0}
    return figure.update_layout(barmode="group", height=430, margin={"b": 140}, legend=legend)


def matched_perturbations(c: Contrast, shifted: pd.DataFrame) -> tuple[pd.DataFrame, pd.DataFrame]:
    """The tables of `beside_perturbations` and `perturbed_orders`.

    Args:
        c: the contrast; its run may have a table `nudges`.
        shifted: columns question, position, shifted (at the deepest pair). For `within`, whose perturbed pass
            reads depth 1's text, the true change says what shifted instead.

    Raises:
        Untestable: if the run has no perturbations of this comparison at its positions.
    """
    if c.comparison == "free_running":
        raise Untestable("each depth reads its own text")
    rows = c.tables.get("nudges", c.comparison)
    if rows is None:
        words = comparison_words(c.comparison)
        raise Untestable(f"the run has no norm-matched perturbations ({words}; `controls` in its recipe)")
    if c.kind not in rows.columns:
        raise Untestable(f"norm-matched perturbations have no {c.kind}")
    if c.comparison == "within":
        true = rows[((rows["site"] == "stream") & (rows["direction"] == "true")).to_numpy(dtype=bool)]
        moved = np.asarray((overlaps(true, c.kind) < c.threshold).any(axis=1))
        shifted = true[["question", "position"]].assign(shifted=moved)
    beside = beside_perturbations(rows, shifted, c.resampling)
    if beside.empty:
        raise Untestable("no perturbed position has all its overlaps")
    return beside, perturbed_orders(rows, c.threshold, c.kind, c.resampling)


def overlaps(rows: pd.DataFrame, kind: str) -> np.ndarray:
    """Overlap of each row of `nudges` in every layer it has: [row, layer]; rows of one site."""
    if not len(rows):
        return np.ones((0, 1))
    values = np.stack(rows[kind].to_list()).astype(float)
    return 1 - values if kind == "relative_l2" else values


def beside_perturbations(rows: pd.DataFrame, shifted: pd.DataFrame, resampling: Resampling) -> pd.DataFrame:
    """What true changes and norm-matched perturbations do, at shifted and at stable positions.

    Args:
        rows: the run's `nudges` of one comparison.
        shifted: columns question, position, shifted.
        resampling: of questions.

    Returns:
        A row per site, direction and `where`: positions, questions; `changed` (share of argmaxes), `kl`,
        `replaced` (means) and `difference` (`changed` of the true change minus this direction, at the same
        positions), each with `_low` and `_high`. No rows if the tables share no position.
    """
    how = resampling._asdict()
    rows = rows[(rows["b"] == rows["b"].max()).to_numpy(dtype=bool)]
    keys = {"question": "int64", "position": "int64"}
    rows = rows.astype(keys).merge(shifted.astype(keys), on=[*keys])
    codes, questions = pd.factorize(rows["question"].to_numpy(), sort=True)
    recorded = {"changed": "argmax_changed", "kl": "kl", "replaced": "replaced"}
    values = {name: rows[column].to_numpy(dtype=float) for name, column in recorded.items()}
    there = np.isfinite(np.stack(list(values.values()))).all(axis=0)
    place = rows.groupby([*keys], sort=False).ngroup().to_numpy()
    at_shift = rows["shifted"].to_numpy(dtype=bool)

    def sums(mask: np.ndarray, name: str) -> np.ndarray:
        """[question, 2]: total and number of the rows of a mask."""
        parts = [np.bincount(codes[mask], w, len(questions)) for w in (values[name][mask], None)]
        return np.stack(parts, axis=-1).astype(float)

    records = []
    for site, where in product(SITES, ("shifted", "stable")):
        here = there & (rows["site"] == site).to_numpy() & (at_shift == (where == "shifted"))
        directions = {d: here & (rows["direction"] == d).to_numpy() for d in ("true", *PERTURBED)}
        for direction, mask in directions.items():
            if not mask.any():
                continue
            used = np.bincount(codes[mask], minlength=len(questions)) > 0
            record: dict[str, Any] = {"site": site, "direction": direction, "where": where}
            record |= {"positions": len(np.unique(place[mask])), "questions": int(used.sum())}
            means = {name: cluster_bootstrap(sums(mask, name)[used], **how) for name in values}
            gap = nothing("the true change itself")
            if direction != "true":
                same = directions["true"] & np.isin(place, place[mask])
                both = np.stack([sums(same, "changed"), sums(mask, "changed")], axis=1)[used]
                gap = cluster_bootstrap(both, _gap, **how)
            records.append(record | as_columns(**means, difference=gap))
    return pd.DataFrame(records)


def perturbed_orders(rows: pd.DataFrame, threshold: float, kind: str, resampling: Resampling) -> pd.DataFrame:
    """When the last layer's state shifts, seen from the first change of the argmax, under perturbations of
    the last layer's output that grow from b to b as the true change does.

    Returns:
        A row per direction (`true` among them) and entry of `ORDERS`: positions (and seeds), questions,
        share, low, high.
    """
    rows = rows[(rows["site"] == "output").to_numpy()]
    steps = np.sort(rows["b"].unique())
    n_steps = max(len(steps), 1)
    keys = ["question", "position", "direction", "seed"]
    rows = rows.sort_values([*keys, "b"])
    whole = (rows.groupby(keys, observed=True)["b"].transform("size") == len(steps)).to_numpy(dtype=bool)
    rows = rows[whole]
    overlap = overlaps(rows, kind)[:, -1]
    usable = np.isfinite(overlap).reshape(-1, n_steps).all(axis=1)
    x = first_at((overlap < threshold).reshape(-1, n_steps))
    y = first_at(rows["argmax_changed"].to_numpy(dtype=bool).reshape(-1, n_steps))
    first = rows.iloc[::n_steps]
    tables = []
    for direction in ("true", *PERTURBED):
        here = usable & (first["direction"] == direction).to_numpy(dtype=bool)
        seen = orders(order_counts(first["question"].to_numpy()[here], x[here], y[here], len(steps)))
        seen = seen[seen.sum(axis=1) > 0]
        if not len(seen):
            continue
        sums = np.stack([seen, np.broadcast_to(seen.sum(axis=1, keepdims=True), seen.shape)], axis=-1)
        share, low, high = bootstrap_ends(sums, ratio, resampling.resamples, seed=resampling.seed)
        columns = {"direction": direction, "order": ORDERS, "positions": seen.sum(axis=0)}
        columns |= {"questions": len(seen), "share": share, "low": low, "high": high}
        tables.append(pd.DataFrame(columns))
    columns = ["direction", "order", "positions", "questions", "share", "low", "high"]
    return pd.concat(tables, ignore_index=True) if tables else pd.DataFrame(columns=columns)


def _gap(totals: np.ndarray) -> np.ndarray:
    """Difference of the two ratios in [..., 2, 2]."""
    shares = ratio(totals)
    return shares[..., 0] - shares[..., 1]
