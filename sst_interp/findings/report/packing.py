"""What the explorer embeds, packed: numbers by cell or position, and lists of tokens by position.

The page's script unpacks them (`unpack.js`).
"""

from __future__ import annotations

import base64
import gzip
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import pandas as pd

from sst_interp.runs.provenance import token_texts
from sst_interp.runs.recorder import LENS_TOP
from sst_interp.tables import visible


@dataclass(frozen=True)
class Places:
    """Index of a table's row in the flat arrays."""

    questions: np.ndarray
    lengths: np.ndarray
    layers: np.ndarray

    @property
    def starts(self) -> np.ndarray:
        """Where each question starts, in positions."""
        return np.concatenate([[0], np.cumsum(self.lengths)])[:-1]

    def positions(self, rows: pd.DataFrame) -> np.ndarray:
        """Index into the arrays [question, position]."""
        q = np.searchsorted(self.questions, rows["question"].to_numpy())
        return self.starts[q] + rows["position"].to_numpy(dtype=np.int64)

    def cells(self, rows: pd.DataFrame) -> np.ndarray:
        """Index into the arrays [question, layer, position]."""
        q = np.searchsorted(self.questions, rows["question"].to_numpy())
        layer = np.searchsorted(self.layers, rows["layer"].to_numpy())
        inside = layer * self.lengths[q] + rows["position"].to_numpy(dtype=np.int64)
        return self.starts[q] * len(self.layers) + inside

    def empty(self, per_position: int | None = None, dtype: type = np.uint16) -> np.ndarray:
        """Zeros ("missing") for every cell, or `per_position` for every position."""
        size = int(self.lengths.sum()) * (len(self.layers) if per_position is None else per_position)
        return np.zeros(size, dtype=dtype)

    def put(self, at: np.ndarray, codes: np.ndarray, per_position: int | None = None) -> np.ndarray:
        """The codes at their places, zeros elsewhere."""
        array = self.empty(per_position, codes.dtype.type)
        array[at] = codes
        return array

    def inside(self, rows: pd.DataFrame) -> pd.DataFrame:
        """The rows inside the arrays."""
        rows = rows[rows["question"].isin(self.questions).to_numpy(dtype=bool)]
        q = np.searchsorted(self.questions, rows["question"].to_numpy())
        return rows[rows["position"].to_numpy() < self.lengths[q]]


MISSING, ZERO = 0, 1
"""Codes of "no number" and of exactly 0 (and anything below it)."""


@dataclass(frozen=True)
class Decimals:
    """Codes of numbers from 10^low to 10^high with `digits` significant digits; others are clipped."""

    digits: int
    low: int
    high: int

    @cached_property
    def values(self) -> np.ndarray:
        """The number of every code from 2 on, ascending."""
        mantissas = range(10 ** (self.digits - 1), 10**self.digits)
        exponents = range(self.low - self.digits + 1, self.high - self.digits + 1)
        return np.array([float(f"{m}e{e}") for e in exponents for m in mantissas])

    @cached_property
    def bounds(self) -> np.ndarray:
        """Above `bounds[i]` a number rounds to `values[i + 1]` or more (JavaScript has the same)."""
        mantissas = range(10 ** (self.digits - 1), 10**self.digits)
        exponents = range(self.low - self.digits + 1, self.high - self.digits + 1)
        return np.array([float(f"{m}.5e{e}") for e in exponents for m in mantissas])[:-1]

    def codes(self, numbers: np.ndarray) -> np.ndarray:
        """uint16 codes of non-negative numbers; NaN becomes `MISSING`, 0 and below `ZERO`."""
        numbers = np.asarray(numbers, dtype=float)
        codes = 2 + np.searchsorted(self.bounds, np.nan_to_num(numbers), side="left")
        codes = np.where(numbers > 0, codes, ZERO)
        return np.where(np.isnan(numbers), MISSING, codes).astype(np.uint16)

    def numbers(self, codes: np.ndarray) -> np.ndarray:
        """The numbers of codes; NaN for `MISSING`."""
        return np.concatenate([[np.nan, 0.0], self.values])[codes]

    def to_dict(self) -> dict[str, int]:
        """For the page's script."""
        return {"digits": self.digits, "low": self.low, "high": self.high}


DISTANCE = Decimals(2, -7, 3)
"""Of 1 - overlap and of relative L2."""
SIZE = Decimals(2, -3, 8)
"""Of norms."""
OUTPUT = Decimals(3, -7, 4)
"""Of entropies, margins and divergences of the output."""


def implied_l2(cosine: np.ndarray, a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Codes of the relative L2 that rounded cosine distances and norms (all codes) imply.

    |b - a|^2 / |a|^2 = (1 - s)^2 + 2 s d with s = |b| / |a| and d = 1 - cosine. Only differences from it are
    embedded. Every operation is correctly rounded, so JavaScript gets the same code.
    """
    with np.errstate(divide="ignore", invalid="ignore"):
        s = SIZE.numbers(b) / SIZE.numbers(a)
        d = DISTANCE.numbers(cosine)
        return DISTANCE.codes(np.sqrt((1 - s) * (1 - s) + 2 * s * d))


def packed(data: bytes) -> str:
    """Compressed, in base64; the same bytes give the same text."""
    return base64.b64encode(gzip.compress(data, 6, mtime=0)).decode()


def pack(arrays: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """Arrays of unsigned integers as one block: `arrays` (name, length, bytes per number) and `gz`."""
    planes = []
    for array in arrays.values():
        little = np.ascontiguousarray(array.ravel(), dtype=array.dtype.newbyteorder("<"))
        planes.append(little.view(np.uint8).reshape(-1, array.dtype.itemsize).T.tobytes())
    layout = [[name, int(array.size), array.dtype.itemsize] for name, array in arrays.items()]
    return {"arrays": layout, "gz": packed(b"".join(planes))}


TOP = 10
"""Leading tokens kept of each state."""
MOVED = 8
"""Tokens kept of those that entered the top, and that left it, per pair: those of best rank."""


@dataclass
class Vocabulary:
    """The tokens shown, numbered from 1 as they come; 0 is none."""

    index: dict[int, int] = field(default_factory=dict)

    def of(self, ids: np.ndarray) -> np.ndarray:
        """Numbers of token ids, in the same shape; negative ids are none."""
        unique, inverse = np.unique(ids, return_inverse=True)
        for token in unique[unique >= 0].tolist():
            self.index.setdefault(token, len(self.index) + 1)
        numbers = np.array([self.index.get(t, 0) for t in unique.tolist()], dtype=np.uint32)
        return numbers[inverse].reshape(ids.shape)

    def texts(self, tokenizer: Any) -> dict[str, Any]:
        """`ids` and `texts`, from number 1 on, and whether there was a tokenizer."""
        ids = list(self.index)
        return {"ids": ids, "texts": shown_texts(tokenizer, ids), "known": tokenizer is not None}


def token_arrays(
    passes: Mapping[int, pd.DataFrame],
    places: Places,
    pairs: list[tuple[int, int]],
    vocabulary: Vocabulary,
) -> dict[str, np.ndarray]:
    """Per state `top.N` [position, TOP] and `token.N` [position]; per pair `entered.A.B` and `left.A.B`
    [position, MOVED] with `entered_rank.A.B` and `left_rank.A.B` (1 + rank). Empty without token ids.
    """
    arrays: dict[str, np.ndarray] = {}
    top: dict[int, tuple[np.ndarray, np.ndarray]] = {}
    for n, rows in passes.items():
        rows = places.inside(rows)
        rows = rows[rows["top100"].notna().to_numpy()] if "top100" in rows else rows.iloc[:0]
        if rows.empty:
            continue
        at, ids = places.positions(rows), np.stack(rows["top100"].tolist())
        top[n] = at, ids
        arrays[f"top.{n}"] = _spread(places, at, vocabulary.of(ids[:, :TOP]))
        token = rows["token"].fillna(-1).to_numpy(dtype=np.int64)
        arrays[f"token.{n}"] = places.put(at, vocabulary.of(token), 1)
    for a, b in pairs:
        if a not in top or b not in top:
            continue
        _, in_a, in_b = np.intersect1d(top[a][0], top[b][0], return_indices=True)
        at, before, after = top[a][0][in_a], top[a][1][in_a], top[b][1][in_b]
        for name, of, other in (("entered", after, before), ("left", before, after)):
            tokens, ranks = _not_in(of, other)
            arrays[f"{name}.{a}.{b}"] = _spread(places, at, vocabulary.of(tokens))
            arrays[f"{name}_rank.{a}.{b}"] = _spread(places, at, ranks)
    return arrays


def _not_in(of: np.ndarray, other: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The first `MOVED` ids of each row of `of` that `other` lacks (-1: none), and 1 + their rank."""
    tokens = np.full((len(of), MOVED), -1, dtype=np.int64)
    ranks = np.zeros((len(of), MOVED), dtype=np.uint8)
    for i, (row, has) in enumerate(zip(of, other, strict=True)):
        new = np.flatnonzero(~np.isin(row, has))[:MOVED]
        tokens[i, : len(new)], ranks[i, : len(new)] = row[new], new + 1
    return tokens, ranks


def _spread(places: Places, at: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """Rows [position, k] at their places, flat."""
    array = places.empty(rows.shape[1], rows.dtype.type).reshape(-1, rows.shape[1])
    array[at] = rows
    return array.ravel()


def shown_texts(tokenizer: Any, ids: Sequence[int]) -> list[str]:
    """A text per token with invisible characters escaped; without a tokenizer, the ids."""
    if tokenizer is None or not ids:
        return [f"#{i}" for i in ids]
    return [visible(text) or f"#{i}" for i, text in zip(ids, token_texts(tokenizer, ids), strict=True)]


LARGEST = 150_000
"""Lens token ids of a comparison embedded at most (0.5 to 0.8 bytes each, measured). Position 0 of every
question goes first, then question after question."""
NOT_RECORDED, LEFT_OUT, ROWS_FROM = 0, 1, 2
"""Values of `lens_row`: no row, a row that is not embedded, `ROWS_FROM` + a row's number."""


def lens_arrays(
    passes: Mapping[int, pd.DataFrame], places: Places, vocabulary: Vocabulary, largest: int = LARGEST
) -> dict[str, np.ndarray]:
    """`lens_row` [position], and per state `lens.N` [row, layer, LENS_TOP]: vocabulary numbers less those of
    the state before. Empty without recorded rows.

    Args:
        passes: rows of the `lens` table, per state of a comparison.
        places: of the comparison's cells.
        vocabulary: gets the embedded tokens.
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
    arrays: dict[str, np.ndarray] = {"lens_row": row}
    before = np.zeros((len(kept), len(places.layers), LENS_TOP), np.uint32)
    for n, rows in recorded.items():
        at = row[places.positions(rows)]
        embedded = at >= ROWS_FROM
        ids = np.full(before.shape, -1, np.int64)
        if embedded.any():
            top = np.stack(rows["top5"].to_numpy()[embedded]).reshape(embedded.sum(), len(places.layers), -1)
            ids[at[embedded] - ROWS_FROM, :, : top.shape[2]] = top
        numbers = vocabulary.of(ids)
        arrays[f"lens.{n}"] = (numbers - before).ravel()
        before = numbers
    return arrays


def lens_words(run_name: str, lens: pd.DataFrame) -> dict[str, Any]:
    """Tokens per layer, and what the page says where there are none."""
    wanted = "all" if len(lens) else "position0"
    where = "recorded at other positions only" if len(lens) else "not recorded in this run"
    return {
        "top": LENS_TOP,
        "missing": f'The logit lens was {where}. lens_tokens = "{wanted}" in the recipe records it: '
        f"sst-interp capture --run {visible(run_name)} --fresh",
        "left_out": "The logit lens of this position is in the run and not in this page, which stays small: "
        "run.question(id) shows it.",
    }
