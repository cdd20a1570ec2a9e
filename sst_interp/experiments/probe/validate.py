"""Out-of-fold scores: every question scored by probes that were chosen and trained without it.

**Choosing.** Questions are divided into blocks. To choose for a question of block a, probes are trained
without blocks a and b and judged on b by the balanced cross-entropy, for every other b. No label of block a
takes part, and the probe without a and b serves both: B (B - 1) / 2 fits per candidate. Layers are tried
first (with the middle number of dimensions and penalty), then numbers of dimensions, then penalties.

**Scoring.** A *split* says which questions are scored, which are learnt from, and which blocks the candidates
are chosen without (`SCHEMES`).

**Permuting.** Labels are permuted over questions, and each labelling is put through everything:

    p = (b + 1) / (B + 1),    b: labellings of B that score at least as high as the real one
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from sst_interp.analyses.statistics.along_texts import p_value
from sst_interp.analyses.statistics.bootstrap import LEVEL, Interval, as_columns
from sst_interp.experiments.probe import SCALARS, Features, Labels
from sst_interp.experiments.probe.fit import Design, Inputs, LabelRows, Problems, fit
from sst_interp.experiments.probe.scores import (
    Decisions,
    Pairs,
    auc,
    auc_difference,
    aucs,
    balanced_accuracies,
    brier,
    decisions,
    pairs_in_order,
    pairs_scored,
    probabilities,
)
from sst_interp.runs.fleet import Fleet, each

AT_ONCE = 12_000
"""Splits handled together: bounds memory."""
MOST_PAIRS = 30_000
"""Leave-pair-out trains a probe per pair: beyond this many there is none."""
NULL = ("auc", "fold_auc", "balanced", "hits", "called", "fitted")
NAMES = {"two_layer": "two-layer probe", "l2": "logistic regression, L2", "l1": "logistic regression, L1"}
Progress = Callable[[str, int, int], Any]
Excluded = tuple[frozenset[int], ...]
"""Sets of blocks; something is chosen without each of them."""


class Choice(NamedTuple):
    """The chosen candidate, [row, excluded]: by label row and excluded set of blocks."""

    layer: np.ndarray
    dims: np.ndarray
    penalty: np.ndarray


class Splits(NamedTuple):
    """Which questions each split scores and learns from."""

    test: np.ndarray
    """Questions scored by a split, [row, split, question] bool."""
    use: np.ndarray
    """Questions learnt from, likewise."""
    excluded: Excluded
    which: np.ndarray
    """[row, split]: index into `excluded`."""
    pairs: bool = False
    """Whether a split scores a question of each class."""


class Scores(NamedTuple):
    """Out-of-fold scores by label row."""

    logits: np.ndarray
    """[row, question]; of pairs: [row, split, 2], the question of class 1 first."""
    layer: np.ndarray
    """[row, split]: the chosen candidate, with the next two."""
    dims: np.ndarray
    penalty: np.ndarray
    fitted: np.ndarray
    """[row, split]: balanced accuracy on the questions learnt from."""
    read: list[np.ndarray]
    """Dimensions read by each split of the first row; empty unless asked for."""


def random_keys(n_questions: int, seed: int, repeat: int = 0) -> np.ndarray:
    """One random number per question, the same for every labelling; others for another `repeat`."""
    return np.random.default_rng([seed, 0, repeat]).random(n_questions)


def blocks_of(labels: np.ndarray, blocks: int, keys: np.ndarray) -> np.ndarray:
    """The block of each question [row, question]: each class is dealt out in turn, in the order of `keys`, so
    that a permuted labelling gets blocks as even as the real one.
    """
    order = np.argsort(keys, kind="stable")
    ones = labels[:, order] > 0.5
    before = np.where(ones, np.cumsum(ones, 1) - 1, np.cumsum(~ones, 1) - 1)
    # The second class goes on where the first left off, so that block sizes differ by one at most.
    dealt = (before + np.where(ones, 0, ones.sum(1, keepdims=True))) % blocks
    of_question = np.empty_like(dealt)
    of_question[:, order] = dealt
    return of_question


def choose(
    design: Design, inputs: Inputs, labels: LabelRows, blocks: np.ndarray, excluded: Excluded
) -> Choice:
    """The best candidate for every label row (0 or 1) and every excluded set of blocks [row, question]; the
    empty set chooses for a probe that is trained on everything.
    """
    layers, dims = design.candidate_layers(inputs.n_layers), design.candidate_dims(inputs.d_model)
    axes = layers, dims, design.candidate_penalties
    shape = len(labels), len(excluded)
    current = [np.full(shape, axis[len(axis) // 2]) for axis in axes]
    best: np.ndarray | None = None
    for place, axis in enumerate(axes):
        if len(axis) == 1:
            continue
        # The middle is what the earlier coordinates were chosen with: it is judged once, the first time.
        values = [value for value in axis if value != axis[len(axis) // 2]]
        tried = [[*current[:place], np.full(shape, value), *current[place + 1 :]] for value in values]
        losses = _losses(
            design, inputs, labels, blocks, excluded, [current, *tried] if best is None else tried
        )
        best, losses = (losses[0], losses[1:]) if best is None else (best, losses)
        chosen = current[place].copy()
        for value, loss in zip(values, losses, strict=True):
            better = loss < best
            chosen, best = np.where(better, value, chosen), np.where(better, loss, best)
        current[place] = chosen
    return Choice(*current)


def _losses(
    design: Design,
    inputs: Inputs,
    labels: Tensor,
    blocks: np.ndarray,
    excluded: Excluded,
    tried: Sequence[Sequence[np.ndarray]],
) -> list[np.ndarray]:
    """Mean cross-entropy [row, excluded] of every (layer, dims, penalty) that is tried, each [row, excluded]:
    each of the other blocks is scored by a probe that is trained without it, too.
    """
    cases = [(e, b) for e, out in enumerate(excluded) for b in range(design.blocks) if b not in out]
    unions = np.array([sum(1 << block for block in {*excluded[e], b}) for e, b in cases])
    of = np.array([e for e, _ in cases])
    rows = np.arange(len(labels))[:, None]
    parts, backs, n = [], [], 0
    for layer, dims, penalty in tried:
        # Two sets may need the same probe: it is fitted once.
        which = np.unique(penalty, return_inverse=True)[1].reshape(penalty.shape)
        columns = np.broadcast_arrays(rows, unions, layer[:, of], dims[:, of], which[:, of])
        key = np.zeros(columns[0].shape, dtype=np.int64)
        for column in columns:
            key = key * (int(column.max()) + 1) + column
        _, first, back = np.unique(key, return_index=True, return_inverse=True)
        row, case = np.divmod(first, len(cases))
        use = ((unions[case, None] >> blocks[row]) & 1) == 0
        parts.append(Problems(row, use, *(c[row, of[case]] for c in (layer, dims, penalty))))
        backs.append(back.reshape(key.shape) + n)
        n += len(first)
    problems = Problems(*(np.concatenate(column) for column in zip(*parts, strict=True)))
    logits = fit(design, inputs, labels, problems).logits.numpy()
    # From probes to cases: the loss of the questions of block b, by class.
    y = labels.numpy() > 0.5
    wrong = np.logaddexp(0, np.where(y, -1, 1)[problems.row] * logits)
    back = np.stack(backs)
    shape = len(labels), len(excluded)
    loss, counts = np.zeros((2, len(tried), *shape)), np.zeros((2, *shape))
    for case, (e, b) in enumerate(cases):
        own = wrong[back[:, :, case]]
        for side, counted in enumerate((y & (blocks == b), ~y & (blocks == b))):
            loss[side, :, :, e] += np.where(counted, own, 0).sum(-1)
            counts[side, :, e] += counted.sum(1)
    return list((loss / np.maximum(counts, 1)[:, None]).sum(0))


def rebalanced_partner(labels: np.ndarray, seed: int) -> np.ndarray:
    """A question of the other class for every question, [row, question]; one draw for all labellings."""
    n = labels.shape[1]
    draw = np.random.default_rng([seed, 1]).random((n, n), dtype=np.float32)
    ones = labels > 0.5
    other = ones[:, :, None] != ones[:, None, :]
    return np.where(other, draw, -1).argmax(axis=-1)


def leave_one_out(labels: np.ndarray, blocks: np.ndarray, seed: int) -> Splits:
    """A split per question, rebalanced: one of the other class is left out, too, so that every split has the
    same shares of both (Austin, Pe'er & Korem 2025).
    """
    plain = plain_leave_one_out(labels, blocks, seed)
    np.put_along_axis(plain.use, rebalanced_partner(labels, seed)[..., None], False, axis=2)
    return plain


def plain_leave_one_out(labels: np.ndarray, blocks: np.ndarray, seed: int) -> Splits:
    """A split per question. What is left always has fewer of its class, so pooled scores are biased: a probe
    that knows only the base rate has an AUC of 0.
    """
    rows, n = labels.shape
    test = np.broadcast_to(np.eye(n, dtype=bool), (rows, n, n))
    return Splits(test, ~test, tuple(frozenset({b}) for b in range(blocks.max() + 1)), blocks)


def folds(labels: np.ndarray, blocks: np.ndarray, seed: int) -> Splits:
    """A split per block; scores compare within a fold only."""
    n_blocks = blocks.max() + 1
    test = blocks[:, None, :] == np.arange(n_blocks)[:, None]
    which = np.broadcast_to(np.arange(n_blocks), (len(labels), n_blocks))
    return Splits(test, ~test, tuple(frozenset({b}) for b in range(n_blocks)), which)


def leave_pair_out(labels: np.ndarray, blocks: np.ndarray, seed: int) -> Splits:
    """A split per pair of questions of class 1 and 0 (Airola et al. 2011), for one label row."""
    ones, zeros = np.flatnonzero(labels[0] > 0.5), np.flatnonzero(labels[0] < 0.5)
    i, j = (g.ravel() for g in np.meshgrid(ones, zeros, indexing="ij"))
    test = np.zeros((1, len(i), labels.shape[1]), dtype=bool)
    test[0, np.arange(len(i)), i] = test[0, np.arange(len(i)), j] = True
    pairs = [frozenset(pair) for pair in zip(blocks[0, i].tolist(), blocks[0, j].tolist(), strict=True)]
    excluded = tuple(sorted(set(pairs), key=sorted))
    which = np.array([[excluded.index(pair) for pair in pairs]])
    return Splits(test, ~test, excluded, which, pairs=True)


SCHEMES = {each.__name__: each for each in (leave_one_out, plain_leave_one_out, folds, leave_pair_out)}


def score(
    design: Design,
    inputs: Inputs,
    labels: LabelRows,
    schemes: Sequence[str] = ("leave_one_out",),
    repeat: int = 0,
    keep: bool = False,
    progress: Callable[[int], Any] | None = None,
) -> dict[str, Scores]:
    """Choose, train and score every split of every label row (0 or 1), each row alone.

    Args:
        design, inputs, labels: the probe, what it reads, and what it tells.
        schemes: names of `SCHEMES`; `leave_pair_out` takes one label row.
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
    return {scheme: _joined(some) for scheme, some in parts.items()}


def _joined(parts: Sequence[Scores]) -> Scores:
    """Scores of label rows one after another; `read` is of the first."""
    arrays = {name: np.concatenate([getattr(part, name) for part in parts]) for name in Scores._fields[:-1]}
    return Scores(**arrays, read=parts[0].read)


class _Permuting:
    """What a worker scores: some rows of permuted labels."""

    def __init__(
        self, design: Design, inputs: Inputs, rows: LabelRows, size: int, schemes: Sequence[str]
    ) -> None:
        self.design, self.inputs, self.rows, self.size, self.schemes = design, inputs, rows, size, schemes

    def __call__(self, start: int, told: Callable[[int], Any]) -> dict[str, Scores]:
        """The scores of `size` rows from `start`."""
        return score(self.design, self.inputs, self.rows[start : start + self.size], self.schemes)


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
        out_of_fold = np.stack(sides, -1).reshape(n_rows, n_splits, 2)
    else:  # each question is scored by one split
        out_of_fold = np.where(test, logits, 0).reshape(n_rows, n_splits, -1).sum(1)
    fitted = balanced_accuracies(y, logits > 0, use)
    read = [np.sort(dims.numpy()) for dims in fits.read[:n_splits]]
    layer, dims, penalty, fitted = (v.reshape(n_rows, n_splits) for v in (*config, fitted))
    return Scores(out_of_fold, layer, dims, penalty, fitted, read)


def permuted(labels: np.ndarray, permutations: int, seed: int = 0) -> LabelRows:
    """The labels [question] in random orders, one per row. The same seed gives the same orders."""
    rng = np.random.default_rng([seed, 2])
    rows = np.tile(np.asarray(labels, dtype=np.float32), (permutations, 1))
    return torch.from_numpy(rng.permuted(rows, axis=1))


def pair_auc(design: Design, inputs: Inputs, y: LabelRows, resamples: int) -> Interval:
    """The leave-pair-out AUC of one labelling; none where there are more than `MOST_PAIRS` pairs."""
    positive = y[0].numpy() > 0.5
    n = int(positive.sum() * (~positive).sum())
    if n > MOST_PAIRS:
        reason = f"{n:,} pairs to leave out; at most {MOST_PAIRS:,} are"
        return Interval(math.nan, math.nan, math.nan, len(positive), reason=reason)
    scores = score(design, inputs, y, ("leave_pair_out",))["leave_pair_out"].logits[0]
    return auc(pairs_scored(scores, positive), resamples, design.seed)


def in_folds(own: Scores, design: Design, inputs: Inputs, y: LabelRows, repeats: int) -> tuple[float, Pairs]:
    """The AUC within folds: of the first division alone, and the pairs of all divisions."""
    positive = y[0].numpy() > 0.5
    higher = compared = np.zeros((len(positive), len(positive)))
    first = math.nan
    for repeat in range(max(repeats, 1)):
        scores = own if repeat == 0 else score(design, inputs, y, ("folds",), repeat)["folds"]
        fold = blocks_of(y.numpy(), design.blocks, random_keys(len(positive), design.seed, repeat))[0]
        pairs = pairs_in_order(scores.logits[0], positive, fold)
        first = pairs.share if repeat == 0 else first
        higher, compared = higher + pairs.higher, compared + pairs.compared
    return first, Pairs(higher, compared)


def inverted(area: float, null: np.ndarray, n: int) -> tuple[Interval, float]:
    """An AUC with the interval that its permutation test gives when it is inverted, and the one-sided p.

    The null is taken to keep its shape at other true values, so that the interval runs from the AUC less
    the distance of the upper quantile of the null from its middle to the AUC less that of the lower one.
    The null is of one division into folds, the AUC may be of several, which spreads less: p and interval
    are on the safe side.

    Args:
        area: the AUC of the real labels.
        null: AUCs of permuted labels.
        n: questions.
    """
    null = np.asarray(null, dtype=float)
    null = null[np.isfinite(null)]
    if len(null) < 2 or not math.isfinite(area):
        return Interval(area, math.nan, math.nan, n, reason="no labels were permuted"), math.nan
    low, high = np.quantile(null - null.mean(), [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Interval(area, float(area - high), float(area - low), n), p_value(null, area, 1)


def auc_in_folds(
    design: Design, inputs: Inputs, positive: np.ndarray, repeats: int, permutations: int
) -> tuple[Interval, float]:
    """The AUC in repeated stratified folds alone, with its interval and p (`inverted`)."""
    y = torch.from_numpy(positive[None].astype(np.float32))
    _, pairs = in_folds(score(design, inputs, y, ("folds",))["folds"], design, inputs, y, repeats)
    rows = permuted(positive, permutations, design.seed)
    labels = rows.numpy() > 0.5
    blocks = blocks_of(labels.astype(np.float32), design.blocks, random_keys(len(positive), design.seed))
    null = aucs(score(design, inputs, rows, ("folds",))["folds"].logits, labels, blocks)
    return inverted(pairs.share, null, len(positive))


def null_scores(
    design: Design,
    inputs: Inputs,
    positive: np.ndarray,
    permutations: int,
    progress: Progress | None,
    fleet: Fleet | None = None,
) -> pd.DataFrame:
    """The scores of permuted labels, a row per permutation (columns `NULL`); a fleet divides them up."""
    if permutations < 1:
        return pd.DataFrame(columns=list(NULL), dtype=float)
    told = None if progress is None else lambda done: progress("permutations", done, permutations)
    rows = permuted(positive, permutations, design.seed)
    labels, schemes = rows.numpy() > 0.5, ("leave_one_out", "folds")
    if fleet is None:
        loo, folds = score(design, inputs, rows, schemes, progress=told).values()
    else:
        size = max(1, AT_ONCE // inputs.n_questions)  # as `score` cuts them: the same shapes, the same bits
        starts, parts = range(0, len(rows), size), {}

        def done(start: int, part: dict[str, Scores]) -> None:
            parts[start] = part
            if told is not None:
                told(sum(len(scores["folds"].logits) for scores in parts.values()))

        name = lambda start: f"permutations from {start}"  # noqa: E731
        each(fleet, partial(_Permuting, design, inputs, rows, size, schemes), starts, done, name)
        loo, folds = (_joined([parts[start][scheme] for start in starts]) for scheme in schemes)
    blocks = blocks_of(labels.astype(np.float32), design.blocks, random_keys(len(positive), design.seed))
    called = loo.logits > 0
    areas = aucs(loo.logits, labels), aucs(folds.logits, labels, blocks)
    decided = balanced_accuracies(labels, called), (labels & called).sum(axis=1), called.sum(axis=1)
    return pd.DataFrame(dict(zip(NULL, (*areas, *decided, loo.fitted.mean(axis=1)), strict=True)))


def constants(action: str) -> tuple[str, str]:
    """Names of the two policies without a probe: `always-halt` and `never-halt`."""
    return f"always-{action}", f"never-{action}"


def plain_probes(features: Features, design: Design) -> list[tuple[str, Inputs, Design]]:
    """The plain alternatives to a probe whose inputs vary: name, what it reads, and how."""
    states, layers = Inputs(features.states), design.layers
    linear = replace(design, kind="l2", penalties=(), steps=0)
    usable = [x for x in range(states.n_layers) if x not in features.constant]
    drawn = int(np.random.default_rng([design.seed, 3]).choice(usable))
    plain = [
        (NAMES[kind], states, replace(linear, kind=kind, layers=layers))
        for kind in ("l2", "l1")
        if kind != design.kind
    ]
    first = replace(linear, layers=(0,))
    plain.append((f"L2, random layer ({drawn})", states, replace(linear, layers=(drawn,))))
    if 0 in usable:
        plain.append(("L2, layer 0", states, first))
    scalars = features.scalars
    there = [
        i for i in range(len(SCALARS))
        if bool(torch.isfinite(scalars[:, i]).all()) and float(scalars[:, i].std()) > 0
    ]  # fmt: skip
    for i in there:
        plain.append((SCALARS[i], Inputs(scalars[:, None, [i]]), first))
    if len(there) > 1:
        plain.append(("these together", Inputs(scalars[:, None, there]), first))
    return plain


def comparison(
    features: Features, scores: pd.DataFrame, labels: Labels, design: Design, resamples: int, p: float
) -> pd.DataFrame:
    """The probe (its scores, design and permutation p), the plain alternatives, always and never.

    All are scored in the same leave-one-out and compared on the same resampled questions.

    Returns:
        A row each: name, auc, sensitivity, specificity, balanced, brier, `probe_minus` (the probe's AUC minus
        this one's), each with `_low` and `_high`; called (share of questions) and p (the probe's only).
    """
    positive, options, probe = labels.positive, (resamples, design.seed), NAMES[design.kind]
    n, y = len(positive), torch.from_numpy(labels.positive[None].astype(np.float32))
    pairs = pairs_in_order(scores["score"].to_numpy(), positive)

    def row(name: str, own: np.ndarray, chance: np.ndarray, said: Decisions) -> dict[str, Any]:
        theirs = pairs_in_order(own, positive)
        minus, own_p = Interval(math.nan, math.nan, math.nan, n), p
        if name != probe:
            minus, own_p = auc_difference(pairs, theirs, *options), math.nan
        numbers = as_columns(auc=auc(theirs, *options), sensitivity=said.sensitivity)
        numbers |= as_columns(specificity=said.specificity, balanced=said.balanced)
        numbers |= as_columns(brier=brier(chance, positive, *options)) | {"called": said.called}
        return {"name": name, **numbers, **as_columns(probe_minus=minus), "p": own_p}

    own = scores["score"].to_numpy()
    rows = [row(probe, own, scores["probability"].to_numpy(), decisions(positive, own > 0, *options))]
    for name, inputs, plain in plain_probes(features, design):
        own = score(plain, inputs, y)["leave_one_out"].logits[0]
        rows.append(row(name, own, probabilities(own, positive), decisions(positive, own > 0, *options)))
    for name, call in zip(constants("halt" if labels.halts else "iterate"), (1.0, 0.0), strict=True):
        # The same for every sample of questions: the ends are the number itself.
        right, wrong, half = (Interval(share, share, share, n) for share in (call, 1 - call, 0.5))
        rows.append(row(name, np.full(n, call), np.full(n, call), Decisions(right, wrong, half, call)))
    return pd.DataFrame(rows)
