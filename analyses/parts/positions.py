"""From pairs and steps to positions: what the layers of one position say together, and what was read there.

The output changes at a position, the state at a position in each of its layers. To ask whether the one goes
with the other, a position counts as *shifted* if any of its layers shifted, or, read per layer, if its last
layer did.
"""

from __future__ import annotations

import numpy as np
import pandas as pd

from sst_interp.analyses.overlap import overlap_of, select

READ = ("entropy", "margin")
"""What is known of a next-token distribution, per pass and iteration (`steps`)."""


def position_overlaps(
    pairs: pd.DataFrame,
    comparison: str,
    a: int | None = None,
    b: int | None = None,
    threshold: float = 0.99,
    kind: str = "cosine",
) -> pd.DataFrame:
    """Overlaps of one comparison and one pair (default: the deepest), over the layers of each position.

    Args:
        pairs: the run's `pairs` table.
        comparison: "replayed", "within" or "free".
        a: depth or iteration of the first state; default: the pair (1, deepest).
        b: of the second.
        threshold: overlap below which a (position, layer) pair has shifted.
        kind: which overlap (`overlap_of`).

    Returns:
        A row per (question, position), sorted: `layers`, `shifted` (how many of them), `lowest` overlap, and
        `last`: that of the last layer. `lowest` is NaN where any of them is.

    Raises:
        SSTError: if there are no such pairs, or the overlap was not captured.
    """
    columns = ["question", "comparison", "position", "layer", "a", "b"]
    rows, a, b = select(pairs[[*columns, *(c for c in [kind] if c in pairs.columns)]], comparison, a, b)
    values = overlap_of(rows, kind)
    layer, key = rows["layer"].to_numpy(), _key(rows)
    codes, keys = pd.factorize(key, sort=True)
    lowest = np.full(len(keys), np.inf)
    with np.errstate(invalid="ignore"):
        np.minimum.at(lowest, codes, values)  # a NaN stays one
    last = np.full(len(keys), np.nan)
    at_last = layer == layer.max()
    last[codes[at_last]] = values[at_last]
    return pd.DataFrame(
        {
            "question": keys >> 32,
            "position": keys & 0xFFFFFFFF,
            "layers": np.bincount(codes, minlength=len(keys)),
            "shifted": np.bincount(codes, values < threshold, len(keys)).astype(int),
            "lowest": lowest,
            "last": last,
        }
    )


def readings(steps: pd.DataFrame | None, comparison: str, a: int, b: int) -> pd.DataFrame:
    """Entropy (nats) and margin (logits) of both outputs that a comparison compares.

    Args:
        steps: the run's `steps` table; None or empty: nothing is known.
        comparison: "replayed", "within" or "free".
        a: depth or iteration of the first output.
        b: of the second.

    Returns:
        A row per (question, position): `entropy_a`, `entropy_b`, `margin_a`, `margin_b`. Which pass and
        iteration a and b are stands in docs/run-format.md.
    """
    columns = ["question", "position", *(f"{name}_{side}" for name in READ for side in "ab")]
    needed = {"question", "text", "depth", "position", "iteration", *READ}
    if steps is None or not len(steps) or not needed <= set(steps.columns):
        return pd.DataFrame(columns=columns, dtype=float)
    depth, iteration = steps["depth"].to_numpy(), steps["iteration"].to_numpy()
    if comparison == "within":
        deepest = depth.max()
        cells = ("own", deepest, a), ("own", deepest, b)
    else:
        cells = ("own", a, a), ("depth1" if comparison == "replayed" else "own", b, b)
    sides = []
    for side, (of_text, of_depth, of_iteration) in zip("ab", cells, strict=True):
        here = (depth == of_depth) & (iteration == of_iteration)
        here &= (steps["text"] == of_text).to_numpy(dtype=bool)
        rows = steps.loc[here, ["question", "position", *READ]]
        sides.append(rows.rename(columns={name: f"{name}_{side}" for name in READ}))
    return sides[0].merge(sides[1], on=["question", "position"])[columns]


def at_positions(table: pd.DataFrame, other: pd.DataFrame, how: str = "left") -> pd.DataFrame:
    """`table` with the columns of `other` at the same question and position; NaN where there is none."""
    keys = ["question", "position"]
    typed = other.astype({key: "int64" for key in keys})
    fresh = [c for c in typed.columns if c in keys or c not in table.columns]
    return table.astype({key: "int64" for key in keys}).merge(typed[fresh], on=keys, how=how)  # type: ignore[arg-type]


def depth_pairs(table: pd.DataFrame) -> set[tuple[int, int]]:
    """The pairs (a, b) that have rows."""
    codes = np.unique((table["a"].to_numpy(dtype=np.int64) << 32) | table["b"].to_numpy(dtype=np.int64))
    return {(int(code >> 32), int(code & 0xFFFFFFFF)) for code in codes}


def _key(rows: pd.DataFrame) -> np.ndarray:
    """Question and position in one int64, in the order of both."""
    return (rows["question"].to_numpy(dtype=np.int64) << 32) | rows["position"].to_numpy(dtype=np.int64)
