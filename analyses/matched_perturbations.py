"""A change of the state against random changes of the same size: is its direction anything special? (C6)

The argmax is a function of the last layer's state. That it changes where the state does is therefore true by
construction, more often the further the state moves. A run with controls says what any change of that size
does (its table `nudges`); here the true change and the norm-matched perturbations are compared at the same
positions.
"""

from __future__ import annotations

import numpy as np
import pandas as pd

from sst_interp.analyses.contrast import Contrast, comparison_words
from sst_interp.analyses.statistics.bootstrap import (
    Interval,
    Resampling,
    bootstrap_ends,
    cluster_bootstrap,
    ratio,
)
from sst_interp.analyses.statistics.event_order import ORDERS, first_at, order_counts, orders
from sst_interp.errors import Untestable

PERTURBED = ("random", "elsewhere")
"""Directions of perturbations. `elsewhere`: where the state moves at another position of the same text."""
SITES = ("output", "stream")
WHERE = ("shifted", "stable")
COLUMNS = ("site", "direction", "where", "positions", "questions")
MEASURES = ("changed", "kl", "replaced")
OVERLAPS = ("cosine", "relative_l2")
"""Overlaps that a perturbation's layers have."""


def matched_perturbations(c: Contrast, shifted: pd.DataFrame) -> tuple[pd.DataFrame, pd.DataFrame]:
    """The tables of `beside_perturbations` and `perturbed_orders`.

    Args:
        c: the contrast; its run may have a table `nudges`.
        shifted: columns question, position, shifted: where the run's deepest pair has shifted (for `within`
            it is read off the perturbed pass: `shifted_within`).

    Raises:
        Untestable: if the run has no perturbations of this comparison at its positions.
    """
    if c.comparison == "free_running":
        raise Untestable("each depth reads its own text")
    rows = c.tables.get("nudges", c.comparison)
    if rows is None:
        words = comparison_words(c.comparison)
        raise Untestable(f"the run has no norm-matched perturbations ({words}; `controls` in its recipe)")
    if c.kind not in OVERLAPS:
        raise Untestable(f"norm-matched perturbations have no {c.kind}")
    if c.comparison == "within":
        shifted = shifted_within(rows, c.threshold, c.kind)
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


def shifted_within(rows: pd.DataFrame, threshold: float, kind: str) -> pd.DataFrame:
    """Which positions shift between iteration 1 and the deepest of the pass that was perturbed: columns
    question, position, shifted. It reads depth 1's text; the run's own `within` rows read another.
    """
    rows = rows[((rows["site"] == "stream") & (rows["direction"] == "true")).to_numpy(dtype=bool)]
    shifted = np.asarray((overlaps(rows, kind) < threshold).any(axis=1))
    return rows[["question", "position"]].assign(shifted=shifted)


def beside_perturbations(rows: pd.DataFrame, shifted: pd.DataFrame, resampling: Resampling) -> pd.DataFrame:
    """What true changes and perturbations of the same size do, at shifted and at stable positions; deepest
    pair.

    Args:
        rows: the run's `nudges` of one comparison.
        shifted: columns question, position, shifted.
        resampling: of questions.

    Returns:
        A row per site, direction and `where`: positions, questions; `changed` (share of argmaxes), `kl` and
        `replaced` (means), each with _low and _high; `difference` (of `changed`: true minus this direction,
        at the same positions) with _low and _high, NaN for the true change itself. No rows: none of them is
        at these positions.
    """
    resamples, seed = resampling
    rows = rows[(rows["b"] == rows["b"].max()).to_numpy(dtype=bool)]
    keys = ["question", "position"]
    rows = rows.astype(dict.fromkeys(keys, "int64")).merge(
        shifted.astype(dict.fromkeys(keys, "int64")), on=keys
    )
    codes, questions = pd.factorize(rows["question"].to_numpy(), sort=True)
    values = {
        "changed": rows["argmax_changed"].to_numpy(dtype=float),
        "kl": rows["kl"].to_numpy(dtype=float),
        "replaced": rows["replaced"].to_numpy(dtype=float),
    }
    there = np.isfinite(np.stack(list(values.values()))).all(axis=0)
    place = rows.groupby(keys, sort=False).ngroup().to_numpy()
    at_shift = rows["shifted"].to_numpy(dtype=bool)

    def sums(mask: np.ndarray, name: str) -> np.ndarray:
        """[question, 2]: total and number of the rows of a mask."""
        parts = [np.bincount(codes[mask], w, len(questions)) for w in (values[name][mask], None)]
        return np.stack(parts, axis=-1).astype(float)

    records = []
    for site in SITES:
        for where in WHERE:
            here = there & (rows["site"] == site).to_numpy() & (at_shift == (where == "shifted"))
            directions = {d: here & (rows["direction"] == d).to_numpy() for d in ("true", *PERTURBED)}
            for direction, mask in directions.items():
                if not mask.any():
                    continue
                record = [site, direction, where, len(np.unique(place[mask])), len(np.unique(codes[mask]))]
                used = np.bincount(codes[mask], minlength=len(questions)) > 0
                for name in MEASURES:
                    record += _ends(cluster_bootstrap(sums(mask, name)[used], ratio, resamples, seed=seed))
                gap = [np.nan] * 3
                if direction != "true":
                    same = directions["true"] & np.isin(place, place[mask])
                    both = np.stack([sums(same, "changed"), sums(mask, "changed")], axis=1)[used]
                    gap = _ends(cluster_bootstrap(both, _gap, resamples, seed=seed))
                records.append(record + gap)
    named = [f"{m}{end}" for m in (*MEASURES, "difference") for end in ("", "_low", "_high")]
    return pd.DataFrame(records, columns=[*COLUMNS, *named])


def perturbed_orders(rows: pd.DataFrame, threshold: float, kind: str, resampling: Resampling) -> pd.DataFrame:
    """When the last layer's state shifts, seen from the first change of the argmax, for changes without any
    thought in them: perturbations of the last layer's output that grow from b to b as the true change does.

    Returns:
        A row per direction (`true` among them, read in the same way) and entry of `ORDERS`: positions (and
        seeds), questions, share, low, high. No rows: no such perturbations.
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


def _ends(interval: Interval) -> list[float]:
    return [interval.estimate, interval.low, interval.high]
