"""How many of the top 100 tokens change in each layer, read with the logit lens (claim C4)."""

from __future__ import annotations

import numpy as np
import pandas as pd

from sst_interp.analyses.overlap import overlap_of, select
from sst_interp.analyses.statistics.bootstrap import RESAMPLES, as_columns, grouped_medians
from sst_interp.errors import SSTError
from sst_interp.measures import TOP

LENS = "lens_jaccard"


def replaced_of(jaccard: np.ndarray) -> np.ndarray:
    """Tokens replaced, of 100, between two top-100 sets of Jaccard index J: 100 (1 - J) / (1 + J).

    With c tokens in common J = c / (200 - c), which gives 100 - c. Whole numbers, as `outputs.replaced`.
    """
    jaccard = np.asarray(jaccard, dtype=float)
    return np.rint(TOP * (1 - jaccard) / (1 + jaccard))


def lens_replacement(
    pairs: pd.DataFrame,
    comparison: str,
    a: int | None = None,
    b: int | None = None,
    threshold: float = 0.99,
    kind: str = "cosine",
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> pd.DataFrame:
    """Tokens replaced in the logit lens's top 100, by layer, where that layer shifted and where it did not.

    Args:
        pairs: the run's `pairs` table, with `lens_jaccard`.
        comparison: "replayed", "within" or "free".
        a: depth or iteration of the first state; default: the pair (1, deepest).
        b: of the second.
        threshold: overlap below which a (position, layer) pair has shifted.
        kind: which overlap says what shifted.
        resamples: question resamples.
        seed: of the resampling.

    Returns:
        A row per layer: the medians `shifted`, `stable` and `difference`, each with `_low` and `_high` and
        the number of positions of the first two. NaN where a layer has no such position.

    Raises:
        SSTError: if there are no such pairs, the lens was not captured, or `kind` is the lens itself (then
            shifted positions have more tokens replaced by definition).
    """
    if kind == LENS:
        raise SSTError("what shifted is itself read off the lens", 'choose overlap = "cosine"')
    columns = ["question", "comparison", "layer", "a", "b", *(c for c in (kind, LENS) if c in pairs.columns)]
    rows, a, b = select(pairs[columns], comparison, a, b)
    replaced, overlaps = replaced_of(overlap_of(rows, LENS)), overlap_of(rows, kind)
    rows = rows.assign(replaced=replaced, overlap=overlaps)[np.isfinite(overlaps)]
    records = []
    for layer, of_layer in rows.groupby("layer", sort=True):
        question, values = of_layer["question"].to_numpy(), of_layer["replaced"].to_numpy()
        shifted = of_layer["overlap"].to_numpy() < threshold
        found = grouped_medians(question, values, [shifted, ~shifted], [(0, 1)], resamples, seed)
        record: dict[str, float] = {"layer": float(layer)}  # type: ignore[arg-type]
        record |= as_columns(**dict(zip(("shifted", "stable", "difference"), found, strict=True)))
        known = np.isfinite(values)
        record |= {"positions_shifted": float((shifted & known).sum())}
        record |= {"positions_stable": float((~shifted & known).sum())}
        records.append(record)
    table = pd.DataFrame(records)
    whole = ["layer", "positions_shifted", "positions_stable"]
    return table.astype(dict.fromkeys(whole, int)) if records else table
