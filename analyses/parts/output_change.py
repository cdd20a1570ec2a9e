"""What changed at the output of each position, beside what changed in the state: shares and medians."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pandas as pd

from sst_interp.analyses.overlap import select
from sst_interp.analyses.parts.positions import at_positions, depth_pairs, position_overlaps
from sst_interp.analyses.statistics import bootstrap as tallies
from sst_interp.analyses.statistics.bootstrap import RESAMPLES, as_columns, grouped_medians

PAPER_RANK = 50
"""The rank from which the paper's deepest new winner came (claim C5)."""
RANKS = (1, 2, 5, 10, 20, PAPER_RANK + 1, 100)
"""Lower ends of the bins of winner ranks (0-based; rank 0 is no new winner)."""
MEASURED = ("replaced", "kl", "entropy_a", "entropy_b", "entropy_change", "winner_rank")
"""What gets a median per group of positions. `winner_rank` is of the positions with a new winner only."""

SOME, NONE, LAST, NOT_LAST = "a layer shifted", "no layer shifted", "last layer shifted", "last layer stable"
SAME, OTHER = "the same tokens read", "other tokens read"


def output_changes(
    outputs: pd.DataFrame,
    pairs: pd.DataFrame,
    comparison: str,
    a: int,
    b: int,
    threshold: float,
    kind: str = "cosine",
) -> tuple[pd.DataFrame, int]:
    """Rows of `outputs` of one comparison and one pair, with the overlaps at the same position.

    Returns:
        The rows, with the columns of `position_overlaps`, and how many were left out because an overlap or a
        value is missing or NaN.

    Raises:
        SSTError: if either table has no such rows, or the overlap was not captured.
    """
    rows, a, b = select(outputs, comparison, a, b)
    joined = at_positions(rows, position_overlaps(pairs, comparison, a, b, threshold, kind))
    needed = joined[["lowest", "replaced", "winner_rank", "argmax_changed", "same_prefix"]]
    there = ~needed.isna().any(axis=1).to_numpy()
    return joined[there].reset_index(drop=True), int((~there).sum())


def position_groups(rows: pd.DataFrame, comparison: str, threshold: float) -> dict[str, np.ndarray]:
    """Masks over the rows of `output_changes`, by name: shifted and stable positions, by any layer first,
    then by the last layer; in `free` also by whether both depths have read the same tokens.
    """
    some, last = rows["shifted"].to_numpy() > 0, rows["last"].to_numpy() < threshold
    groups = {SOME: some, NONE: ~some, LAST: last, NOT_LAST: ~last}
    if comparison == "free":
        same = rows["same_prefix"].to_numpy(dtype=bool)
        for words, mask in ((SAME, same), (OTHER, ~same)):
            groups |= {f"{SOME}, {words}": some & mask, f"{NONE}, {words}": ~some & mask}
    return groups


def group_table(
    rows: pd.DataFrame, groups: Mapping[str, np.ndarray], resamples: int = RESAMPLES, seed: int = 0
) -> pd.DataFrame:
    """A row per group of positions: how often the winner changes, and the medians of `MEASURED`.

    Args:
        rows: from `output_changes`, with `entropy_a` and `entropy_b` where they are known.
        groups: name -> mask over the rows.
        resamples: question resamples.
        seed: of the resampling.

    Returns:
        Columns where, positions, questions, `new_winner` (share) and each of `MEASURED`, both with `_low` and
        `_high`. `deepest_rank`: a maximum, which grows with the number of positions and has
        no interval; NaN where there is no new winner.
    """
    question, changed = rows["question"].to_numpy(), rows["argmax_changed"].to_numpy(dtype=bool)
    masks = list(groups.values())
    medians = {
        name: grouped_medians(question, measured(rows, name), masks, (), resamples, seed) for name in MEASURED
    }
    ranks, records = measured(rows, "winner_rank"), []
    for i, (where, mask) in enumerate(groups.items()):
        share = tallies.share(question[mask], changed[mask], resamples, seed)
        record: dict[str, object] = {
            "where": where,
            "positions": int(mask.sum()),
            "questions": share.n_questions,
        }
        record |= as_columns(new_winner=share, **{name: medians[name][i] for name in MEASURED})
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


def per_pair_table(
    outputs: pd.DataFrame, pairs: pd.DataFrame, comparison: str, threshold: float, kind: str, *resampling: int
) -> pd.DataFrame:
    """A row per (a, b) of one comparison: tokens replaced where some layer shifted and where none did.

    Args:
        outputs: the run's `outputs` table.
        pairs: its `pairs` table.
        comparison: "replayed", "within" or "free".
        threshold: overlap below which a (position, layer) pair has shifted.
        kind: which overlap.
        resampling: number of question resamples, and seed.

    Returns:
        Columns a, b, positions, questions, `share with a shift` (of the positions), the medians `shifted`,
        `stable` and `difference`, each with `_low` and `_high`, and `new_winner` (share).
    """
    records = []
    pairs = pairs[(pairs["comparison"] == comparison).to_numpy(dtype=bool)]
    outputs = outputs[(outputs["comparison"] == comparison).to_numpy(dtype=bool)]
    for a, b in sorted(depth_pairs(outputs) & depth_pairs(pairs)):
        rows, _ = output_changes(outputs, pairs, comparison, a, b, threshold, kind)
        question, some = rows["question"].to_numpy(), rows["shifted"].to_numpy() > 0
        medians = grouped_medians(question, rows["replaced"].to_numpy(), [some, ~some], [(0, 1)], *resampling)
        record: dict[str, float] = {
            "a": a,
            "b": b,
            "positions": len(rows),
            "questions": rows["question"].nunique(),
        }
        record["share with a shift"] = some.mean() if len(rows) else np.nan
        record |= as_columns(**dict(zip(("shifted", "stable", "difference"), medians, strict=True)))
        records.append(record | {"new_winner": rows["argmax_changed"].mean()})
    return pd.DataFrame(records)
