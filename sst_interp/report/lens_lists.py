"""Which tokens the logit lens of every layer gives, where a run recorded it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd

from sst_interp.lens import LENS_TOP
from sst_interp.report.escaping import visible
from sst_interp.report.places import Places
from sst_interp.report.token_lists import Vocabulary

LARGEST = 150_000
"""Token ids of a comparison embedded at most (0.5 to 0.8 bytes each, measured); position 0 of 198 questions,
30 layers and 4 states is 118,800. Position 0 of every question goes first, then the rest of one question
after the other."""
NOT_RECORDED, LEFT_OUT, ROWS_FROM = 0, 1, 2
"""What `lens_row` says of a position: no row, a row that is not embedded, `ROWS_FROM` + a row's number."""


def lens_arrays(
    passes: Mapping[int, pd.DataFrame], places: Places, vocabulary: Vocabulary, largest: int = LARGEST
) -> dict[str, np.ndarray]:
    """`lens_row` [position], and per state `lens.N` [row, layer, LENS_TOP]: numbers of the vocabulary (0:
    none) less those of the state before, which often has the same. Empty without recorded rows.

    Args:
        passes: rows of the `lens` table, per state of a comparison.
        places: of the comparison's cells.
        vocabulary: grows by what is embedded.
        largest: token ids to embed at most.
    """
    recorded = {n: rows for n, rows in ((n, places.inside(r)) for n, r in passes.items()) if len(rows)}
    if not recorded:
        return {}
    here = np.unique(np.concatenate([places.positions(rows) for rows in recorded.values()]))
    inside = here - places.starts[np.searchsorted(places.starts, here, side="right") - 1]
    first_ones_first = here[np.argsort(inside > 0, kind="stable")]
    kept = first_ones_first[: max(1, largest // (len(recorded) * len(places.layers) * LENS_TOP))]
    row = places.put(here, np.full(len(here), LEFT_OUT, np.uint32), 1)
    row[kept] = ROWS_FROM + np.arange(len(kept), dtype=np.uint32)
    found: dict[str, np.ndarray] = {"lens_row": row}
    before = np.zeros((len(kept), len(places.layers), LENS_TOP), np.uint32)
    for n, rows in recorded.items():
        at = row[places.positions(rows)]
        embedded = at >= ROWS_FROM
        ids = np.full(before.shape, -1, np.int64)
        if embedded.any():
            top = np.stack(rows["top5"].to_numpy()[embedded]).reshape(embedded.sum(), len(places.layers), -1)
            ids[at[embedded] - ROWS_FROM, :, : top.shape[2]] = top
        numbers = vocabulary.of(ids)
        found[f"lens.{n}"] = (numbers - before).ravel()
        before = numbers
    return found


def lens_words(run_name: str, lens: pd.DataFrame) -> dict[str, Any]:
    """How many tokens a layer has, and what to say and to type where none are."""
    wanted = "all" if len(lens) else "position0"
    where = "recorded at other positions only" if len(lens) else "not recorded in this run"
    return {
        "top": LENS_TOP,
        "missing": f'The logit lens was {where}. lens_tokens = "{wanted}" in the recipe records it: '
        f"sst-interp capture --run {visible(run_name)} --fresh",
        "left_out": "The logit lens of this position is in the run and not in this page, which stays small: "
        "run.question(id) shows it.",
    }
