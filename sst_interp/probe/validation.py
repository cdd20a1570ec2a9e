"""Out-of-fold scores: every question scored by probes that were chosen and trained without it.

Three schemes, one engine. A *split* says which questions are scored, which may be learnt from, and which
blocks the candidates are chosen without.

- `plain_leave_one_out`: each question in turn. Taking out a question changes the classes' shares in what is
  left, always against it, so scores pooled over questions are biased: a probe that knows only the base rate
  has an AUC of 0.
- `leave_one_out`: rebalanced. One question of the other class is left out, too (Austin, Pe'er & Korem 2025),
  so that every split has the same shares. (Both classes weigh the same in every loss here, which takes most
  of that bias away by itself; this takes the rest.)
- `folds`: stratified; scores are to be compared within a fold.
- `leave_pair_out`: each pair of a question of either class, scored by the same probe (Airola et al. 2011).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float
from torch import Tensor

from sst_interp.probe.design import Design
from sst_interp.probe.fitting import Inputs, Problems, fit
from sst_interp.probe.selection import Choice, Excluded, blocks_of, choose, random_keys

AT_ONCE = 12_000
"""Splits handled together: bounds memory, whatever the number of labellings."""


class Splits(NamedTuple):
    """What is left out, for each label row."""

    test: np.ndarray
    """Questions scored by a split, [row, split, question] bool."""
    use: np.ndarray
    """Questions learnt from, likewise."""
    excluded: Excluded
    """Sets of blocks that candidates are chosen without."""
    which: np.ndarray
    """[row, split]: index into `excluded`."""
    pairs: bool = False
    """Whether a split scores a question of each class."""


class Scores(NamedTuple):
    """Out-of-fold scores by label row."""

    logits: np.ndarray
    """[row, question]; of pairs: [row, split, 2], the question of class 1 first."""
    layer: np.ndarray
    """[row, split]: what was chosen."""
    dims: np.ndarray
    penalty: np.ndarray
    fitted: np.ndarray
    """[row, split]: balanced accuracy on the questions learnt from: how well labels can be memorised."""
    read: list[np.ndarray]
    """Dimensions read by each split of the first row; empty unless asked for."""


def rebalanced_partner(labels: np.ndarray, seed: int) -> np.ndarray:
    """A question of the other class for every question, [row, question]; one draw for all labellings."""
    n = labels.shape[1]
    draw = np.random.default_rng([seed, 1]).random((n, n), dtype=np.float32)
    ones = labels > 0.5
    other = ones[:, :, None] != ones[:, None, :]
    return np.where(other, draw, -1).argmax(axis=-1)


def leave_one_out(labels: np.ndarray, blocks: np.ndarray, seed: int) -> Splits:
    """A split per question, rebalanced; it is chosen for without the question's block."""
    plain = plain_leave_one_out(labels, blocks, seed)
    np.put_along_axis(plain.use, rebalanced_partner(labels, seed)[..., None], False, axis=2)
    return plain


def plain_leave_one_out(labels: np.ndarray, blocks: np.ndarray, seed: int) -> Splits:
    """A split per question."""
    rows, n = labels.shape
    test = np.broadcast_to(np.eye(n, dtype=bool), (rows, n, n))
    return Splits(test, ~test, tuple(frozenset({b}) for b in range(blocks.max() + 1)), blocks)


def folds(labels: np.ndarray, blocks: np.ndarray, seed: int) -> Splits:
    """A split per block."""
    n_blocks = blocks.max() + 1
    test = blocks[:, None, :] == np.arange(n_blocks)[:, None]
    which = np.broadcast_to(np.arange(n_blocks), (len(labels), n_blocks))
    return Splits(test, ~test, tuple(frozenset({b}) for b in range(n_blocks)), which)


def leave_pair_out(labels: np.ndarray, blocks: np.ndarray, seed: int) -> Splits:
    """A split per pair of a question of class 1 and one of class 0, for one label row."""
    ones, zeros = np.flatnonzero(labels[0] > 0.5), np.flatnonzero(labels[0] < 0.5)
    i, j = (g.ravel() for g in np.meshgrid(ones, zeros, indexing="ij"))
    test = np.zeros((1, len(i), labels.shape[1]), dtype=bool)
    test[0, np.arange(len(i)), i] = test[0, np.arange(len(i)), j] = True
    pairs = [frozenset(pair) for pair in zip(blocks[0, i].tolist(), blocks[0, j].tolist(), strict=True)]
    excluded = tuple(sorted(set(pairs), key=sorted))
    which = np.array([[excluded.index(pair) for pair in pairs]])
    return Splits(test, ~test, excluded, which, pairs=True)


SCHEMES: dict[str, Callable[[np.ndarray, np.ndarray, int], Splits]] = {
    "leave_one_out": leave_one_out,
    "plain_leave_one_out": plain_leave_one_out,
    "folds": folds,
    "leave_pair_out": leave_pair_out,
}


def score(
    design: Design,
    inputs: Inputs,
    labels: Float[Tensor, "row question"],
    schemes: Sequence[str] = ("leave_one_out",),
    repeat: int = 0,
    keep: bool = False,
    progress: Callable[[int], Any] | None = None,
) -> dict[str, Scores]:
    """Choose, train and score every split of every label row.

    Args:
        design: what kind of probe, and the candidates.
        inputs: what it reads.
        labels: 0 or 1. Each row is put through everything, alone: a permuted labelling is one more row.
        schemes: names of `SCHEMES`; what can be chosen once for several of them is. `leave_pair_out` takes
        one
            label row.
        repeat: another number divides the questions into other blocks.
        keep: return which dimensions were read.
        progress: called with the number of label rows done.
    """
    keys = random_keys(inputs.n_questions, design.seed, repeat)
    parts: dict[str, list[Scores]] = {scheme: [] for scheme in schemes}
    size = max(1, AT_ONCE // inputs.n_questions)
    for start in range(0, len(labels), size):
        rows = labels[start : start + size]
        blocks = blocks_of(rows.numpy(), design.blocks, keys)
        chosen: dict[Excluded, Choice] = {}
        for scheme in schemes:
            splits = SCHEMES[scheme](rows.numpy(), blocks, design.seed)
            if design.leak:
                splits = splits._replace(excluded=(frozenset(),), which=np.zeros_like(splits.which))
            if splits.excluded not in chosen:
                chosen[splits.excluded] = choose(design, inputs, rows, blocks, splits.excluded)
            choice = chosen[splits.excluded]
            parts[scheme].append(_score(design, inputs, rows, splits, choice, keep and start == 0))
        if progress is not None:
            progress(start + len(rows))
    return {scheme: _joined(found) for scheme, found in parts.items()}


def _joined(parts: list[Scores]) -> Scores:
    arrays = Scores._fields[:-1]
    whole = {name: np.concatenate([getattr(part, name) for part in parts]) for name in arrays}
    return Scores(**whole, read=parts[0].read)


def _score(
    design: Design, inputs: Inputs, labels: Tensor, splits: Splits, choice: Choice, keep: bool
) -> Scores:
    n_rows, n_splits = splits.which.shape
    row = np.repeat(np.arange(n_rows), n_splits)
    config = [c[row, splits.which.ravel()] for c in choice]
    use, test = (mask.reshape(n_rows * n_splits, -1) for mask in (splits.use, splits.test))
    fits = fit(design, inputs, labels, Problems(row, use, *config), keep)
    logits, y = fits.logits.numpy(), labels.numpy()[row] > 0.5
    if splits.pairs:
        sides = [np.where(test & side, logits, 0).sum(1) for side in (y, ~y)]
        found = np.stack(sides, -1).reshape(n_rows, n_splits, 2)
    else:  # each question is scored by one split
        found = np.where(test, logits, 0).reshape(n_rows, n_splits, -1).sum(1)
    fitted = _balanced_accuracy(logits > 0, y, use)
    read = [np.sort(dims.numpy()) for dims in fits.read[:n_splits]]
    layer, dims, penalty, fitted = (v.reshape(n_rows, n_splits) for v in (*config, fitted))
    return Scores(found, layer, dims, penalty, fitted, read)


def _balanced_accuracy(positive: np.ndarray, y: np.ndarray, use: np.ndarray) -> np.ndarray:
    def share(right: np.ndarray, of: np.ndarray) -> np.ndarray:
        return (right & of).sum(1) / np.maximum(of.sum(1), 1)

    return (share(positive, use & y) + share(~positive, use & ~y)) / 2
