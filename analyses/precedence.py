"""Precedence (claim C6): does the state move before the argmax does, in iterations and in layers?

At every position: the first iteration (`within`) or depth (`replayed`, `free`) at which the state of some
layer has shifted against iteration or depth 1, and the first at which the most likely token is another one.

Part of "the state moves first, and never after" is true by construction:

- The argmax is read from the last layer's output. It cannot change while that stays bit for bit what it was,
  and changes together with a large move of it whatever the direction. `by_construction` shows how much of the
  order nudges of the same size have; `beside_nudges`, how often they change the argmax.
- Where most positions shift at the first step, whatever else happens there comes together with a shift or
  after one. The column `null` shows what shuffling the shifts over positions gives.
- Lower layers are computed first, so in layers a shift always comes before the argmax. Only where it begins
  (`by_layer`) is an observation.

Not by construction: a shift at an *earlier* step more often than shuffling gives, and an argmax that changes
more (or less) often than nudges of the same size make it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go

from sst_interp.analyses.figures import precedence as precedence_figures
from sst_interp.analyses.overlap import overlap_of
from sst_interp.analyses.parts.event_order import first_at, order_counts, order_table
from sst_interp.analyses.parts.same_size import same_size
from sst_interp.analyses.parts.state_and_argmax import changed_by_state, state_and_argmax
from sst_interp.analyses.result import Result
from sst_interp.analyses.statistics import bootstrap as tallies
from sst_interp.analyses.statistics.bootstrap import RESAMPLES, Interval, questions_words
from sst_interp.choices import COMPARISONS
from sst_interp.errors import SSTError, unknown_name

UNKNOWN = Interval(math.nan, math.nan, math.nan, 0, reason="not testable")


@dataclass(frozen=True, eq=False)
class Precedence(Result):
    """Which came first, in one comparison. All intervals resample questions."""

    comparison: str
    kind: str
    """Which overlap."""
    threshold: float
    """A position counts as shifted where the overlap of some layer is below this."""
    steps: tuple[int, ...] = ()
    """The iterations or depths that are compared with the first, ascending."""
    n_positions: int = 0
    n_questions: int = 0
    n_excluded: int = 0
    """Positions left out: an overlap is NaN, or a depth's own text has ended."""
    orders: pd.DataFrame = field(default_factory=pd.DataFrame)
    """A row per `given` ("the argmax changes", "the state shifts") and order of the other: before, together,
    after, alone; positions, share, low, high, and what shuffling gives: null, null_low, null_high, p."""
    before: Interval = UNKNOWN
    """Of the positions whose argmax changes, share at which the state had shifted at an earlier step."""
    together: Interval = UNKNOWN
    """Share at which it shifted at the same step."""
    after: Interval = UNKNOWN
    """Share at which it shifted later: the claim says never."""
    alone: Interval = UNKNOWN
    """Share at which it never shifted: against the claim, too."""
    against: Interval = UNKNOWN
    """Share with no shift by then: later or never."""
    at_first_step: Interval = UNKNOWN
    """Share at which the argmax changed at the first step, where nothing can have come before."""
    changed: pd.DataFrame = field(default_factory=pd.DataFrame)
    """Columns step, where (shifted, stable), positions, questions, changed, low, high: how often the argmax
    differs at a step, given the state there."""
    difference: Interval = UNKNOWN
    """Of `changed` at the last step: shifted minus stable positions."""
    by_layer: pd.DataFrame = field(default_factory=pd.DataFrame)
    """Positions shifted at the last step by the lowest layer that shifted: columns layer, share (of argmaxes
    that changed), low, high, pairs (positions), questions."""
    beside_nudges: pd.DataFrame = field(default_factory=pd.DataFrame)
    """True changes against nudges of the same size (`same_size.beside_nudges`); empty without controls."""
    by_construction: pd.DataFrame = field(default_factory=pd.DataFrame)
    """Orders of the last layer's state and the argmax under nudges (`same_size.nudged_orders`)."""
    no_nudges: str | None = None
    """Why there are no nudges to compare with; None if there are."""
    not_testable: str | None = None
    """Why there is no result; None if there is one."""

    @property
    def title(self) -> str:
        """What was compared."""
        return f"Precedence: {self.words}"

    @property
    def words(self) -> str:
        """The comparison and its steps, in words."""
        if self.not_testable:
            return self.comparison
        what = "iterations" if self.comparison == "within" else "depths"
        return f"{self.comparison}, {what} 1 to {self.steps[-1]}"

    @property
    def table(self) -> pd.DataFrame:
        """Both orders: when the state shifted given that the argmax changes, and the other way round."""
        return self.orders

    @property
    def verdict(self) -> str:
        """The order, what shuffling gives, and what a nudge of the same size does."""
        if self.not_testable:
            return f"not testable: {self.not_testable}."
        return _verdict(self)

    def figure(self) -> go.Figure:
        """When the state shifted, seen from the change of the argmax, beside both nulls."""
        return self.figures()["order"]

    def figures(self) -> dict[str, go.Figure]:
        """order, changed, by_layer; each says so if there is nothing to show."""
        return precedence_figures.figures_of(self)


def _verdict(found: Precedence) -> str:
    given = found.orders[found.orders["given"] == "the argmax changes"].set_index("order")
    n = f"{found.n_positions:,} positions from {questions_words(found.n_questions)}"
    words = f"{found.words}: the argmax changes at {int(given['positions'].sum()):,} of {n}. "
    words += f"There some layer (overlap below {found.threshold:.4g}) had shifted at an earlier step in "
    words += f"{found.before.text(percent=True)}, at the same in {found.together.text(percent=True)}, later "
    words += f"in {found.after.text(percent=True)}, never in {found.alone.text(percent=True)}. "
    null, p = given["null"], given["p"]
    words += f"Shifts shuffled over the positions give {null['before']:.1%} earlier (p = {p['before']:.2g}) "
    words += f"and {null['together']:.1%} together. "
    if found.at_first_step.estimate > 0:
        words += f"{found.at_first_step.estimate:.1%} of the changes come at the first step, before which "
        words += "nothing can. "
    if found.comparison == "free":
        words += "Once two texts have parted, state and argmax differ because the tokens do. "
    if found.no_nudges:
        return words + f"How much of it any change of the same size gives is not testable: {found.no_nudges}."
    return words + _nudge_words(found.beside_nudges)


def _nudge_words(table: pd.DataFrame) -> str:
    """Whether the last layer's state does more at shifted positions than a random nudge of the same size."""
    rows: dict[Any, dict[Any, Any]] = {
        row["direction"]: row
        for row in table.to_dict("records")
        if (row["site"], row["where"]) == ("output", "shifted")
    }
    if not {"true", "random"} <= rows.keys():
        return "No position with controls shifts, so no nudge of a shift's size was made."
    true, nudge = rows["true"], rows["random"]
    low, high = nudge["difference_low"], nudge["difference_high"]
    ends = f" [{low:+.1%}, {high:+.1%}]" if math.isfinite(low) else ", no interval"
    words = f"At {true['positions']:,} shifted positions with controls the argmax changes in "
    words += f"{true['changed']:.1%}; if the last layer's state is moved as far in a random direction, in "
    words += f"{nudge['changed']:.1%} (difference {nudge['difference']:+.1%}{ends})"
    if low > 0:
        return words + ": more than its size explains."
    if high < 0:
        return words + ": less than any change of that size would do."
    return words + ": its size alone may explain it." if low <= 0 <= high else words + "."


def precedence(
    pairs: pd.DataFrame,
    outputs: pd.DataFrame,
    comparison: str = "within",
    threshold: float = 0.99,
    nudges: pd.DataFrame | None = None,
    kind: str = "cosine",
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> Precedence:
    """Which came first in one comparison, and beside nudges of the same size where the run has them.

    Args:
        pairs: the run's `pairs` table.
        outputs: its `outputs` table.
        comparison: "within" (in iterations), or "replayed" or "free" (in depths).
        threshold: overlap below which a (position, layer) pair has shifted; `BasinShifts.threshold`.
        nudges: the run's `nudges` table, if it has one.
        kind: which overlap.
        resamples: question resamples, and shuffles.
        seed: of both.

    Raises:
        SSTError: if the comparison is unknown, or the overlap was not captured.
    """
    if comparison not in COMPARISONS:
        raise unknown_name("comparison", comparison, COMPARISONS)
    overlap_of(pairs.iloc[:1], kind)  # an overlap that was not captured is an error, whatever else is missing
    try:
        rows = state_and_argmax(pairs, outputs, comparison, threshold, kind)
    except SSTError as error:
        return Precedence(comparison, kind, threshold, not_testable=error.message)
    question, steps, shifted, changed = rows.question, rows.steps, rows.shifted, rows.changed
    if not len(question):
        why = f"no position of comparison {comparison!r} has every overlap"
        return Precedence(comparison, kind, threshold, n_excluded=rows.n_excluded, not_testable=why)
    n_questions = len(np.unique(question))
    if not changed.any():
        why = f"the argmax never changes, at {len(question):,} positions of {questions_words(n_questions)}"
        return Precedence(comparison, kind, threshold, n_excluded=rows.n_excluded, not_testable=why)
    x, y = first_at(shifted), first_at(changed)
    counts = order_counts(question, x, y, len(steps))
    orders = [
        order_table(table, resamples, seed).assign(given=given)
        for given, table in (("the argmax changes", counts), ("the state shifts", counts.transpose(0, 2, 1)))
    ]
    ever = y < len(steps)

    def of_changes(mask: np.ndarray) -> Interval:
        return tallies.share(question[ever], mask[ever], resamples, seed)

    last, at_last = len(steps) - 1, shifted[:, -1]
    of_run = pd.DataFrame({"question": question, "position": rows.position, "shifted": at_last})
    beside, constructed, why = same_size(
        nudges, comparison, of_run, threshold, kind, resamples=resamples, seed=seed
    )
    table, difference = changed_by_state(rows, resamples, seed)
    return Precedence(
        comparison=comparison,
        kind=kind,
        threshold=threshold,
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
        by_layer=tallies.by(
            "layer", rows.lowest_layer[at_last], question[at_last], changed[at_last, -1], resamples, seed
        ),
        beside_nudges=beside,
        by_construction=constructed,
        no_nudges=why,
    )
