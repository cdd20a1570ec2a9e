"""The lists of tokens that the explorer shows: an output's own, and the logit lens of every layer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pandas as pd

from sst_interp.findings.report.packing import Places
from sst_interp.runs.provenance import token_texts
from sst_interp.runs.recorder import LENS_TOP
from sst_interp.tables import visible

TOP = 10
"""Leading tokens kept of each state."""
MOVED = 8
"""Tokens kept that entered, and that left, of each pair: those of the best rank."""


@dataclass
class Vocabulary:
    """The tokens that are shown, numbered from 1 as they come; 0 is none."""

    index: dict[int, int] = field(default_factory=dict)

    def of(self, ids: np.ndarray) -> np.ndarray:
        """Numbers of token ids; negative ids are none. Same shape."""
        unique, inverse = np.unique(ids, return_inverse=True)
        for token in unique[unique >= 0].tolist():
            self.index.setdefault(token, len(self.index) + 1)
        numbers = np.array([self.index.get(t, 0) for t in unique.tolist()], dtype=np.uint32)
        return numbers[inverse].reshape(ids.shape)

    def texts(self, tokenizer: Any) -> dict[str, Any]:
        """`ids` and `texts`, from number 1 on, and whether the texts are texts."""
        ids = list(self.index)
        return {"ids": ids, "texts": shown_texts(tokenizer, ids), "known": tokenizer is not None}


def arrays(
    passes: Mapping[int, pd.DataFrame],
    places: Places,
    pairs: list[tuple[int, int]],
    vocabulary: Vocabulary,
) -> dict[str, np.ndarray]:
    """Per state `top.N` [position, TOP] and `token.N` [position]; per pair `entered.A.B` and `left.A.B`
    [position, MOVED] with `entered_rank.A.B` and `left_rank.A.B` (1 + rank). Empty without recorded ids.
    """
    found: dict[str, np.ndarray] = {}
    top: dict[int, tuple[np.ndarray, np.ndarray]] = {}
    for n, rows in passes.items():
        rows = places.inside(rows)
        rows = rows[rows["top100"].notna().to_numpy()] if "top100" in rows else rows.iloc[:0]
        if rows.empty:
            continue
        at, ids = places.positions(rows), np.stack(rows["top100"].tolist())
        top[n] = at, ids
        found[f"top.{n}"] = _spread(places, at, vocabulary.of(ids[:, :TOP]))
        token = rows["token"].fillna(-1).to_numpy(dtype=np.int64)
        found[f"token.{n}"] = places.put(at, vocabulary.of(token), 1)
    for a, b in pairs:
        if a not in top or b not in top:
            continue
        _, in_a, in_b = np.intersect1d(top[a][0], top[b][0], return_indices=True)
        at, before, after = top[a][0][in_a], top[a][1][in_a], top[b][1][in_b]
        for name, of, other in (("entered", after, before), ("left", before, after)):
            tokens, ranks = _not_in(of, other)
            found[f"{name}.{a}.{b}"] = _spread(places, at, vocabulary.of(tokens))
            found[f"{name}_rank.{a}.{b}"] = _spread(places, at, ranks)
    return found


def _not_in(of: np.ndarray, other: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The first `MOVED` ids of each row of `of` that `other` lacks (-1: none), and 1 + their rank."""
    tokens = np.full((len(of), MOVED), -1, dtype=np.int64)
    ranks = np.zeros((len(of), MOVED), dtype=np.uint8)
    for i, (row, has) in enumerate(zip(of, other, strict=True)):
        new = np.flatnonzero(~np.isin(row, has))[:MOVED]
        tokens[i, : len(new)], ranks[i, : len(new)] = row[new], new + 1
    return tokens, ranks


def _spread(places: Places, at: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """Rows [position, k] where they belong, flat."""
    array = places.empty(rows.shape[1], rows.dtype.type).reshape(-1, rows.shape[1])
    array[at] = rows
    return array.ravel()


def shown_texts(tokenizer: Any, ids: Sequence[int]) -> list[str]:
    """A text per token, in which what is invisible is escaped. Without a tokenizer, the ids."""
    if tokenizer is None or not ids:
        return [f"#{i}" for i in ids]
    return [visible(text) or f"#{i}" for i, text in zip(ids, token_texts(tokenizer, ids), strict=True)]


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
