"""Choosing layer, number of dimensions and penalty without the answer in hand.

Questions are divided into blocks, both classes evenly. To choose for a question in block a, probes are
trained without blocks a and b and judged by how well they tell the questions of b, for every other b in
turn. No label of block a takes part, neither its questions' own nor their neighbours'; and the probe
without a and b serves a and b alike, so that nesting costs B (B - 1) / 2 fits per candidate and not one per
question and block.

The judge is the cross-entropy with both classes weighing the same: it sees a score that is sure and wrong,
which the area under a curve does not. Candidates are tried one coordinate after the other: first the layer
(with the middle number of dimensions and the middle penalty), then the number, then the penalty.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from jaxtyping import Float
from torch import Tensor

from sst_interp.probe.design import Design
from sst_interp.probe.fitting import Inputs, Problems, fit

Excluded = tuple[frozenset[int], ...]
"""Sets of blocks, each of which something is chosen without."""


class Choice(NamedTuple):
    """What was chosen, [row, excluded]: by label row and set of blocks that it was chosen without."""

    layer: np.ndarray
    dims: np.ndarray
    penalty: np.ndarray


def random_keys(n_questions: int, seed: int, repeat: int = 0) -> np.ndarray:
    """One random number per question, the same for every labelling; others for another `repeat`."""
    return np.random.default_rng([seed, 0, repeat]).random(n_questions)


def blocks_of(labels: np.ndarray, blocks: int, keys: np.ndarray) -> np.ndarray:
    """Which block each question is in, [row, question]: each class dealt out in turn, in the order of `keys`.

    It is a function of the labels, so a permuted labelling gets blocks as even as the real one's.
    """
    order = np.argsort(keys, kind="stable")
    ones = labels[:, order] > 0.5
    before = np.where(ones, np.cumsum(ones, 1) - 1, np.cumsum(~ones, 1) - 1)
    # The second class goes on where the first left off, so that block sizes differ by one at most.
    dealt = (before + np.where(ones, 0, ones.sum(1, keepdims=True))) % blocks
    found = np.empty_like(dealt)
    found[:, order] = dealt
    return found


def choose(
    design: Design,
    inputs: Inputs,
    labels: Float[Tensor, "row question"],
    blocks: np.ndarray,
    excluded: Excluded,
) -> Choice:
    """The best candidate for every label row and every set of excluded blocks.

    Args:
        design: the candidates.
        inputs: what probes read.
        labels: 0 or 1.
        blocks: [row, question].
        excluded: sets of blocks; the empty set chooses for a probe that is trained on everything.
    """
    axes = (
        design.candidate_layers(inputs.n_layers),
        design.candidate_dims(inputs.d_model),
        design.candidate_penalties,
    )
    shape = len(labels), len(excluded)
    current = [np.full(shape, axis[len(axis) // 2]) for axis in axes]
    best: np.ndarray | None = None
    for place, axis in enumerate(axes):
        if len(axis) == 1:
            continue
        if best is None:
            best = _loss(design, inputs, labels, blocks, excluded, current)
        middle = axis[len(axis) // 2]  # judged already: it is what the earlier coordinates were chosen with
        chosen = current[place].copy()
        for value in axis:
            if value == middle:
                continue
            tried = [*current[:place], np.full(shape, value), *current[place + 1 :]]
            loss = _loss(design, inputs, labels, blocks, excluded, tried)
            better = loss < best
            chosen, best = np.where(better, value, chosen), np.where(better, loss, best)
        current[place] = chosen
    return Choice(*current)


def _loss(
    design: Design,
    inputs: Inputs,
    labels: Tensor,
    blocks: np.ndarray,
    excluded: Excluded,
    config: list[np.ndarray],
) -> np.ndarray:
    """Mean cross-entropy [row, excluded] on the other blocks, each told by a probe without it, too."""
    n_blocks, shape = design.blocks, (len(labels), len(excluded))
    cases = [(e, b) for e, out in enumerate(excluded) for b in range(n_blocks) if b not in out]
    unions = [sum(1 << block for block in {*excluded[e], b}) for e, b in cases]
    rows, which = (g.ravel() for g in np.indices((len(labels), len(cases))))
    of = np.array([e for e, _ in cases])[which]
    layer, dims, penalty = (c[rows, of] for c in config)
    left_out = np.array(unions)[which]
    # Two sets may need the same probe: it is fitted once.
    keys = np.stack([rows, left_out, layer, dims, np.unique(penalty, return_inverse=True)[1]], 1)
    _, first, back = np.unique(keys, axis=0, return_index=True, return_inverse=True)
    use = ((left_out[first, None] >> blocks[rows[first]]) & 1) == 0
    problems = Problems(rows[first], use, layer[first], dims[first], penalty[first])
    logits = fit(design, inputs, labels, problems).logits.numpy()
    # From probes to cases: the loss of the questions of block b, by class.
    y = labels.numpy() > 0.5
    loss, counts = np.zeros((2, *shape)), np.zeros((2, *shape))
    back = back.reshape(len(labels), -1)
    for case, (e, b) in enumerate(cases):
        wrong = np.logaddexp(0, np.where(y, -1, 1) * logits[back[:, case]])
        for side, of in enumerate((y, ~y)):
            counted = of & (blocks == b)
            loss[side, :, e] += np.where(counted, wrong, 0).sum(1)
            counts[side, :, e] += counted.sum(1)
    return (loss / np.maximum(counts, 1)).sum(0)
