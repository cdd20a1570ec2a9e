"""Tokens by class: digit, punctuation, start of a word or piece of one, as the caller divides them.

At a generated position one token is read (the one before it in the text) and one is emitted. What position 0
reads is the last token of the prompt, which a run does not record.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import pandas as pd

from sst_interp.analyses.parts.question_grid import Grid
from sst_interp.analyses.statistics import bootstrap as tallies
from sst_interp.analyses.statistics.bootstrap import RESAMPLES

TokenClass = Mapping[int, str] | Callable[[np.ndarray], Sequence[str] | np.ndarray]
"""Token id -> class name: a mapping (other ids are "other"), or a function of an array of ids."""


def token_grid(
    steps: pd.DataFrame | None, comparison: str, grid: Grid, token_class: TokenClass | None
) -> tuple[dict[str, np.ndarray] | None, str]:
    """Ids of the tokens `read` and `emitted` at each position, [question, position], NaN where unknown.

    Returns:
        None and the reason if the run stores none.
    """
    if steps is None or "token" not in steps:
        return None, "the run has no steps table"
    if steps["token"].isna().all():
        return None, "the run stores no tokens"
    if token_class is None:
        return None, "no token classes were given"
    text, depth, iteration = (steps[c].to_numpy() for c in ("text", "depth", "iteration"))
    here = (text == "own") & (depth == (depth.max() if comparison == "within" else grid.a))
    rows = steps.loc[here & (iteration == grid.a), ["question", "position", "token"]]
    before = rows.assign(position=rows["position"].astype("int64") + 1)
    return {"read": grid.of_table(before, "token"), "emitted": grid.of_table(rows, "token")}, ""


def classes_of(tokens: np.ndarray, token_class: TokenClass) -> tuple[np.ndarray, list[str]]:
    """Class of every token: codes of the shape of `tokens`, -1 where there is none, and the names."""
    there = np.isfinite(tokens)
    ids, inverse = np.unique(tokens[there].astype(np.int64), return_inverse=True)
    if isinstance(token_class, Mapping):
        named = [token_class.get(int(i), "other") for i in ids]
    else:
        named = [str(name) for name in token_class(ids)]
    of_id, names = pd.factorize(np.asarray(named, dtype=object), sort=True)
    codes = np.full(tokens.shape, -1)
    codes[there] = of_id[inverse]
    return codes, [str(name) for name in names]


def rates_by_class(
    role: str,
    codes: np.ndarray,
    names: list[str],
    grid: Grid,
    threshold: float,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> pd.DataFrame:
    """Shift rate of the (position, layer) pairs by class of the token, with question-level intervals."""
    there = grid.there & (codes >= 0)[..., None]
    q, p, _ = np.nonzero(there)
    found = tallies.by("class", codes[q, p], q, grid.shifted(threshold)[there], resamples, seed)
    found["class"] = [names[i] for i in found["class"]]
    columns = ["class", "share", "low", "high", "pairs", "questions"]
    return found[columns].assign(role=role)[["role", *columns]]
