"""The explorer's data, from a run's tables: every comparison, pair and question, made small.

Each comparison is a block of arrays, question after question: cells [layer, position] and outputs [position].
`states` are the depths (in `within`, iterations) whose hidden states were compared; `pairs` name two of them.
Norms and cosines are differences to the pair before, relative L2 (of pairs from 1) to its value implied by
cosine and norms: that halves the file.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import pandas as pd

from sst_interp.analyses.contrast import overlap_of
from sst_interp.analyses.result import comparison_words
from sst_interp.errors import SSTError
from sst_interp.findings.report.packing import (
    DISTANCE,
    OUTPUT,
    SIZE,
    Places,
    Vocabulary,
    implied_l2,
    lens_arrays,
    lens_words,
    pack,
    token_arrays,
)
from sst_interp.models.choices import COMPARISONS
from sst_interp.runs.provenance import shows_text
from sst_interp.runs.schema import empty_table
from sst_interp.tables import visible

LARGEST = 9_300_000
"""Bytes of the data at most, for a file under 12 MB. A larger run shows its first questions, and says so."""
CELL = 2
"""Bytes of a row of `pairs`, at least."""
ANSWER = 80
"""Characters of an answer in the list, at most."""
LOWEST = 24
"""Lowest overlaps offered in each comparison."""
WORDS = {"teacher_forced": "depth", "within": "iteration", "free_running": "depth"}


@dataclass(frozen=True)
class Threshold:
    """Overlap below which a pair has shifted, its provenance, and the headline pair."""

    value: float
    provenance: str
    a: int
    b: int


def table_of(run: Any, name: str) -> pd.DataFrame:
    """A run's table; an empty one if it is missing or damaged."""
    try:
        table = getattr(run, name, None)
    except SSTError:
        table = None
    return table if table is not None and len(table) else empty_table(name)


def explorer_data(
    run: Any,
    thresholds: Mapping[str, Threshold],
    tokenizer: Any = None,
    questions: Iterable[int] | None = None,
    largest: int = LARGEST,
    scores: Mapping[int, float] | None = None,
    overlap_only: bool = False,
) -> dict[str, Any]:
    """JSON-ready data of the explorer.

    Args:
        run: name, recipe, manifest and tables.
        thresholds: per comparison to show.
        tokenizer: for token texts (None: ids); unrestricted runs only.
        questions: indices to show (None: all).
        largest: bytes of its JSON at most; one question is always kept.
        scores: of a probe, by question.
        overlap_only: leave out all but the overlaps, for the second of two runs.
    """
    tables = ("pairs", "outputs", "steps", "lens", "questions")
    pairs, outputs, steps, lens, asked = (table_of(run, t) for t in tables)
    only: tuple[str, ...] = ()
    if overlap_only:
        kind = run.recipe.choices.overlap
        only = ("cosine", "norm", kind) if kind == "relative_l2" else ("cosine", kind)
        outputs, steps, lens = outputs.iloc[:0], steps.iloc[:0], lens.iloc[:0]
    present = [c for c in COMPARISONS if c in thresholds and (pairs["comparison"] == c).any()]
    counts = pairs[pairs["comparison"].isin(present)].groupby("question").size()
    if questions is not None:
        counts = counts[counts.index.isin(list(questions))]
    fits = max(1, int((counts.cumsum() <= largest / CELL).sum()))
    while True:
        kept = [int(q) for q in counts.index[:fits]]
        vocabulary = Vocabulary() if shows_text(run) and not overlap_only else None
        shown = []
        for c in present:
            own, out = _of(pairs, c, kept), _of(outputs, c, kept)
            shown.append(
                _comparison(c, thresholds[c], run.recipe, own, out, steps, lens, kept, vocabulary, only)
            )
        data = {
            "questions": _labels(asked, kept, shows_text(run), scores or {}),
            "left_out": len(counts) - len(kept),
            "comparisons": shown,
            "codes": {"distance": DISTANCE.to_dict(), "size": SIZE.to_dict(), "output": OUTPUT.to_dict()},
            "tokens": vocabulary.texts(tokenizer) if vocabulary is not None else None,
            "lens": lens_words(run.name, lens),
            "overlap": run.recipe.choices.overlap,
        }
        size = len(json.dumps(data))
        if size <= largest or fits == 1:
            return data
        fits = max(1, min(fits - 1, int(0.98 * fits * largest / size)))


def _of(table: pd.DataFrame, comparison: str, kept: list[int]) -> pd.DataFrame:
    here = (table["comparison"] == comparison).to_numpy(dtype=bool)
    return table[here & table["question"].isin(kept).to_numpy(dtype=bool)]


def _labels(
    questions: pd.DataFrame, kept: list[int], text: bool, scores: Mapping[int, float]
) -> list[dict[str, Any]]:
    """Record id, correctness by depth and whether the answer changed, per question; its answers and the right
    one only where `text` may be shown.
    """
    labels = []
    for q in kept:
        rows = questions[(questions["question"] == q).to_numpy(dtype=bool)]
        label: dict[str, Any] = {"index": q, "id": visible(rows["id"].iloc[0]) if len(rows) else "no id"}
        if len(rows) and {"depth", "correct"} <= set(rows.columns):
            rows = rows.sort_values("depth")
            label["correct"] = [
                [int(d), bool(c)] for d, c in zip(rows["depth"], rows["correct"], strict=True)
            ]
            if "answer" in rows.columns:
                answers = [None if pd.isna(a) else str(a) for a in rows["answer"]]
                label["changed"] = answers[0] != answers[-1]
                if text:
                    label["answers"] = [None if a is None else visible(a)[:ANSWER] for a in answers]
                    label["gold"] = visible(rows["gold"].iloc[0])[:ANSWER]
        if math.isfinite(scores.get(q, math.nan)):
            label["score"] = round(scores[q], 4)
        labels.append(label)
    return labels


def _comparison(
    comparison: str,
    threshold: Threshold,
    recipe: Any,
    pairs: pd.DataFrame,
    outputs: pd.DataFrame,
    steps: pd.DataFrame,
    lens: pd.DataFrame,
    kept: list[int],
    vocabulary: Vocabulary | None,
    only: tuple[str, ...] = (),
) -> dict[str, Any]:
    """One comparison; `only` names the arrays that are embedded (empty: all)."""
    layers = np.unique(pairs["layer"].to_numpy())
    last = pairs.groupby("question")["position"].max()
    lengths = last.reindex(kept, fill_value=-1).to_numpy(dtype=np.int64) + 1
    places = Places(np.array(kept), lengths, layers)
    names = [(int(a), int(b)) for a, b in pairs[["a", "b"]].drop_duplicates().to_numpy()]
    names.sort(key=lambda ab: (ab[0] != 1, ab))
    states = sorted({n for ab in names for n in ab})
    arrays: dict[str, np.ndarray] = {f"norm.{n}": places.empty() for n in states}
    chosen: dict[tuple[int, int], tuple[pd.DataFrame, np.ndarray]] = {}
    for a, b in names:
        rows = pairs[(pairs["a"] == a).to_numpy() & (pairs["b"] == b).to_numpy()]
        at = places.cells(rows)
        chosen[a, b] = rows, at
        for n, column in ((a, "norm_a"), (b, "norm_b")):
            arrays[f"norm.{n}"][at] = SIZE.codes(rows[column].to_numpy())
    for (a, b), (rows, at) in chosen.items():
        cosine = DISTANCE.codes(1 - rows["cosine"].to_numpy(dtype=float))
        arrays[f"cosine.{a}.{b}"] = places.put(at, cosine)
        if a == 1:
            relative = DISTANCE.codes(rows["relative_l2"].to_numpy())
            implied = implied_l2(cosine, arrays[f"norm.{a}"][at], arrays[f"norm.{b}"][at])
            arrays[f"relative_l2.{a}.{b}"] = places.put(at, relative - implied)
        if recipe.choices.overlap == "lens_jaccard":
            jaccard = DISTANCE.codes(1 - rows["lens_jaccard"].to_numpy(dtype=float))
            arrays[f"lens_jaccard.{a}.{b}"] = places.put(at, jaccard)
    for chain in ([f"norm.{n}" for n in states], [f"cosine.{a}.{b}" for a, b in names]):
        for before, name in reversed(list(pairwise(chain))):  # the next depth differs little from the last
            arrays[name] = arrays[name] - arrays[before]
    arrays |= _outputs(outputs, places, names)
    arrays |= _steps(steps, places, comparison, states, max(recipe.depths))
    if vocabulary is not None:
        passes = {n: _pass(steps, comparison, n, max(recipe.depths)) for n in states}
        arrays |= token_arrays(passes, places, names, vocabulary)
        looked_into = {n: _pass(lens, comparison, n, max(recipe.depths)) for n in states}
        arrays |= lens_arrays(looked_into, places, vocabulary)
    headline = names.index((threshold.a, threshold.b)) if (threshold.a, threshold.b) in names else 0
    rows, _ = chosen[names[headline]]
    return {
        "comparison": comparison,
        "words": comparison_words(comparison),
        "unit": WORDS[comparison],
        "pairs": [list(ab) for ab in names],
        "states": states,
        "headline": headline,
        "threshold": threshold.value if math.isfinite(threshold.value) else None,
        "provenance": threshold.provenance,
        "lengths": lengths.tolist(),
        "layers": [int(x) for x in layers],
        "differs_from": _first_difference(rows, kept),
        "parts": _parts(rows, outputs, names[headline], kept),
        "shifted": _shifted(rows, kept, threshold.value, recipe.choices.overlap),
        "lowest": _lowest(rows, kept, recipe.choices.overlap),
        "block": pack({k: v for k, v in arrays.items() if k.split(".")[0] in only} if only else arrays),
    }


def _outputs(outputs: pd.DataFrame, places: Places, names: list[tuple[int, int]]) -> dict[str, np.ndarray]:
    """The output at each position, per pair: 1 + tokens replaced, 1 + rank of the new winner, KL, and flags
    (1: there is a row, 2: same prefix, 4: argmax changed).
    """
    arrays = {}
    outputs = places.inside(outputs)
    for a, b in names:
        rows = outputs[(outputs["a"] == a).to_numpy() & (outputs["b"] == b).to_numpy()]
        if rows.empty:
            continue
        at, key = places.positions(rows), f"{a}.{b}"
        same, changed = (rows[c].to_numpy(dtype=bool) for c in ("same_prefix", "argmax_changed"))
        arrays[f"flags.{key}"] = places.put(at, (1 + 2 * same + 4 * changed).astype(np.uint8), 1)
        arrays[f"replaced.{key}"] = places.put(at, (1 + rows["replaced"].to_numpy()).astype(np.uint8), 1)
        arrays[f"rank.{key}"] = places.put(at, (1 + rows["winner_rank"].to_numpy()).astype(np.uint32), 1)
        arrays[f"kl.{key}"] = places.put(at, OUTPUT.codes(rows["kl"].to_numpy()), 1)
    return arrays


def _pass(steps: pd.DataFrame, comparison: str, n: int, deepest: int) -> pd.DataFrame:
    """The rows of one state of a comparison."""
    text, depth, iteration = {
        "teacher_forced": ("own" if n == 1 else "depth1", n, n),
        "within": ("own", deepest, n),
        "free_running": ("own", n, n),
    }[comparison]
    here = (steps["text"] == text) & (steps["depth"] == depth) & (steps["iteration"] == iteration)
    return steps[here.to_numpy(dtype=bool)]


def _steps(
    steps: pd.DataFrame, places: Places, comparison: str, states: list[int], deepest: int
) -> dict[str, np.ndarray]:
    """Entropy and margin of each state's output distribution."""
    arrays = {}
    for n in states:
        rows = places.inside(_pass(steps, comparison, n, deepest))
        if len(rows):
            at = places.positions(rows)
            for column in ("entropy", "margin"):
                arrays[f"{column}.{n}"] = places.put(at, OUTPUT.codes(rows[column].to_numpy()), 1)
    return arrays


def _first_difference(rows: pd.DataFrame, kept: list[int]) -> list[int | None]:
    """First position with different tokens read, per question; None for never."""
    apart = rows[~rows["same_prefix"].to_numpy(dtype=bool)]
    first = apart.groupby("question")["position"].min().reindex(kept, fill_value=-1)
    return [int(p) if p >= 0 else None for p in first.to_numpy()]


def _parts(
    rows: pd.DataFrame, outputs: pd.DataFrame, pair: tuple[int, int], kept: list[int]
) -> list[int | None]:
    """Position of the first token that differs between the two texts, per question; None for never.

    It is read at the next position, where `same_prefix` ends; at the last one, the argmax says it.
    """
    parts = [p if p is None else p - 1 for p in _first_difference(rows, kept)]
    own = outputs[(outputs["a"] == pair[0]).to_numpy() & (outputs["b"] == pair[1]).to_numpy()]
    last = own.loc[own.groupby("question")["position"].idxmax()].set_index("question")
    for i, q in enumerate(kept):
        if (
            parts[i] is None
            and q in last.index
            and last.at[q, "same_prefix"]
            and last.at[q, "argmax_changed"]
        ):
            parts[i] = int(last["position"].loc[q])
    return parts


def _shifted(rows: pd.DataFrame, kept: list[int], threshold: float, kind: str) -> list[list[int]]:
    """[shifted pairs, pairs] of each question, before rounding."""
    overlap = overlap_of(rows, kind)
    table = pd.DataFrame({"q": rows["question"].to_numpy(), "o": overlap}).dropna()
    table["shifted"] = table["o"] < threshold
    counts = table.groupby("q")["shifted"].agg(["sum", "size"]).reindex(kept, fill_value=0)
    return counts.to_numpy(dtype=int).tolist()


def _lowest(rows: pd.DataFrame, kept: list[int], kind: str) -> list[list[int]]:
    """[question (place in `kept`), position, layer] of the lowest overlaps, at most one a position."""
    table = rows[["question", "position", "layer"]].assign(o=overlap_of(rows, kind)).dropna()
    table = table.sort_values("o", kind="stable").drop_duplicates(["question", "position"]).head(LOWEST)
    return [
        [kept.index(int(q)), int(p), int(x)]
        for q, p, x in table[["question", "position", "layer"]].to_numpy()
    ]
