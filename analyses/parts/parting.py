"""Where the texts of two depths part, what was read there, and which shifts lie before and after.

The texts part at the position whose output first differs: both depths have read the same tokens up to and
including it, and from the next position on they have not. Up to it `replayed` and `free` are one and the same
computation, so a shift there is not yet the text's doing; from the next one on `replayed` shows what the
shifts would have been on one text.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from typing import Any

import numpy as np
import pandas as pd

from sst_interp.analyses.statistics.bootstrap import (
    RESAMPLES,
    Interval,
    as_columns,
    bootstrap_ends,
    cluster_bootstrap,
    grouped_medians,
    ratio,
)
from sst_interp.analyses.statistics.permutation import concordance, holm

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


def parting_positions(free: pd.DataFrame) -> pd.DataFrame:
    """Where the texts of each question part.

    Args:
        free: rows of `outputs` of comparison `free` and one pair of depths.

    Returns:
        A row per question, ascending: `question`, `position` (NaN if the texts are the same to the end of
        the shorter) and `positions`, how many both depths have.
    """
    same = free["same_prefix"].to_numpy(dtype=bool)
    changed = free["argmax_changed"].to_numpy(dtype=bool)
    position = free["position"].to_numpy(dtype=float)
    # The flag turns one position later; a text that ends there has no later position.
    at = np.where(same & changed, position, np.where(same, np.nan, position - 1))
    by = pd.DataFrame({"question": free["question"].to_numpy(), "position": at}).groupby("question")
    found = by["position"].min()
    return pd.DataFrame(
        {"question": found.index.to_numpy(), "position": found.to_numpy(), "positions": by.size().to_numpy()}
    )


def with_parting(table: pd.DataFrame, parting: pd.DataFrame) -> pd.DataFrame:
    """The rows of questions in `parting`, with `parts_at` and `when` (0, 1, 2: an index into `WHEN`)."""
    at = parting.set_index("question")["position"]
    rows = table[table["question"].isin(at.index).to_numpy()]
    parts_at = rows["question"].map(at).to_numpy(dtype=float)
    position = rows["position"].to_numpy()
    return rows.assign(parts_at=parts_at, when=(position >= parts_at).astype(int) + (position > parts_at))


def parted_by(parting: pd.DataFrame, resamples: int = RESAMPLES, seed: int = 0) -> pd.DataFrame:
    """Columns position, parted (share of all questions whose texts have parted by then) and its ends."""
    positions = np.arange(int(parting["positions"].max()))
    done = parting["position"].to_numpy()[:, None] <= positions
    estimate, low, high = bootstrap_ends(
        np.stack([done, np.ones_like(done)], axis=-1), ratio, resamples, seed=seed
    )
    return pd.DataFrame({"position": positions, "parted": estimate, "parted_low": low, "parted_high": high})


def reading_table(rows: pd.DataFrame, resamples: int = RESAMPLES, seed: int = 0) -> pd.DataFrame:
    """Medians where the texts part against the other positions up to there.

    Args:
        rows: from `with_parting`, at positions where both depths have read the same tokens, with `READ`.
        resamples: question resamples.
        seed: of the resampling.

    Returns:
        A row per quantity: `parting`, `other` and `difference`, each with `_low` and `_high`.
    """
    question, at = rows["question"].to_numpy(), rows["when"].to_numpy() == 1
    records = []
    for name in READ:
        values = rows[name].to_numpy(dtype=float) if name in rows.columns else np.full(len(rows), np.nan)
        found = grouped_medians(question, values, [at, ~at], [(0, 1)], resamples, seed)
        columns = as_columns(**dict(zip(("parting", "other", "difference"), found, strict=True)))
        records.append({"quantity": name, **columns})
    return pd.DataFrame(records)


def shift_table(
    rows: pd.DataFrame, resamples: int = RESAMPLES, seed: int = 0
) -> tuple[pd.DataFrame, Interval, Interval]:
    """Shifts before, at and after the position where the texts part, and what the parting explains of them.

    Args:
        rows: a row per (question, position) with `when`, `layers` (pairs), `shifted` in `free`, and
            `shifted_replayed` at the same position (NaN if the run has no such comparison).
        resamples: question resamples.
        seed: of the resampling.

    Returns:
        The table, a row per `WHEN`: pairs, `of_pairs`, `of_shifts` (share of the shifts of `free`), `rate`
        and `rate_replayed` (shifted share of the pairs there), the last three with `_low` and `_high`. Then
        the share of the shifts of `free` that lie after, and the share that a replay of one text lacks.
    """
    codes, names = pd.factorize(rows["question"].to_numpy())
    flat, size = codes * 3 + rows["when"].to_numpy(), len(names) * 3
    free, replayed, pairs = (
        np.bincount(flat, rows[c], size).reshape(-1, 3) for c in ("shifted", "shifted_replayed", "layers")
    )
    columns: dict[str, object] = {"when": WHEN, "pairs": pairs.sum(axis=0).astype(int)}
    columns["of_pairs"] = ratio(np.stack(np.broadcast_arrays(pairs.sum(axis=0), pairs.sum()), -1))
    whole = np.broadcast_to(free.sum(axis=1, keepdims=True), free.shape)
    for name, top, bottom in (
        ("of_shifts", free, whole),
        ("rate", free, pairs),
        ("rate_replayed", replayed, pairs),
    ):
        ends = bootstrap_ends(np.stack([top, bottom], axis=-1), ratio, resamples, seed=seed)
        columns |= dict(zip((name, f"{name}_low", f"{name}_high"), ends, strict=True))
    of_all = [
        cluster_bootstrap(np.stack([top, whole[:, 0]], axis=1), ratio, resamples, seed=seed)
        for top in (free[:, 2], (free - replayed).sum(axis=1))
    ]
    return pd.DataFrame(columns), of_all[0], of_all[1]


def predictor_table(rows: pd.DataFrame, resamples: int = RESAMPLES, seed: int = 0) -> pd.DataFrame:
    """How well each of `SCORES` says where the texts part (`concordance`), from `replayed` alone.

    Args:
        rows: positions up to the parting, with `when`, the readings, and `lowest_replayed`, `last_replayed`
            and `shifted_replayed`.
        resamples: question resamples, and permutations.
        seed: of both.

    Returns:
        A row per score: AUC `within` questions, its `p`, `p_holm` (adjusted for the number of scores) and
        number of `questions`, and AUC `across` questions at the same position, both with `_low` and `_high`;
        `reason`: why there is none. NaN where not known.
    """
    rows = rows.sort_values(["question", "position"], kind="stable")
    question, position = rows["question"].to_numpy(), rows["position"].to_numpy()
    before = rows["lowest_replayed"].shift().to_numpy(dtype=float)
    follows = (question == np.roll(question, 1)) & (position == np.roll(position, 1) + 1)
    follows[:1] = False

    def column(name: str) -> np.ndarray:
        return rows[name].to_numpy(dtype=float) if name in rows.columns else np.full(len(rows), np.nan)

    values = (
        -column("lowest_replayed"),
        -column("last_replayed"),
        column("shifted_replayed"),
        np.where(follows, -before, np.nan),
        -column("margin_a"),
        column("entropy_a"),
    )
    event, records = rows["when"].to_numpy() == 1, []
    for name, score in zip(SCORES, values, strict=True):
        found = concordance(question, position, event, score, resamples, seed)
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
    words = f" The lowest overlap on the replayed text tells where with AUC {_auc(overlap, 'within')} within "
    words += f"questions (p = {overlap['p']:.2g}, {overlap['questions']:.0f} questions"
    words += ", no better than chance is shown" if overlap["p"] >= 0.05 else ""
    words += f") and {_auc(overlap, 'across')} between questions at the same position"
    if np.isfinite(margin["within"]):
        words += f"; the margin alone with {_auc(margin, 'within')} and {_auc(margin, 'across')}"
    return words + "."


def _auc(row: Mapping[Hashable, Any], name: str) -> str:
    return f"{row[name]:.2f} [{row[f'{name}_low']:.2f}, {row[f'{name}_high']:.2f}]"
