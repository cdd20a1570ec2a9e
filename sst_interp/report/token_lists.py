"""Which tokens led before and after, which entered the top 100 and which left it, at every position."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pandas as pd

from sst_interp.report.places import Places
from sst_interp.report.tokens import shown_texts

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
