"""What out-of-fold scores are worth: rank order, decisions and probabilities, with questions as the unit.

A score above 0 says "positive". The area under the curve (AUC) is the chance that a positive question scores
higher than a negative one, over the pairs whose scores are comparable: all pairs, those of one fold, or those
scored by one probe. Intervals resample questions with the probes as they are; how much another training
sample would change, only permuted labels say (`validate`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import pandas as pd
from scipy.optimize import root_scalar
from scipy.stats import binom, hypergeom, kstest, rankdata

from sst_interp.analyses.statistics.along_texts import over_questions, pair_mean
from sst_interp.analyses.statistics.bootstrap import (
    RESAMPLES,
    Interval,
    as_columns,
    cluster_bootstrap,
    mean_over_questions,
    share_of_questions,
)

PAPER_QUESTIONS = 198
"""GPQA-Diamond: 48 of them must halt."""
PAPER_P = 0.0009
"""The paper's p-value, as printed."""
BINS = 5
"""Bins of predicted probability in a calibration table, with about as many questions each."""


class Pairs(NamedTuple):
    """Which pairs of a positive and a negative question are in order; both [question, question]."""

    higher: np.ndarray
    """How often the positive question (row) scored higher than the negative one (column); ties are half."""
    compared: np.ndarray
    """How often the two were compared."""

    @property
    def share(self) -> float:
        """The AUC; NaN without pairs."""
        total = self.compared.sum()
        return float(self.higher.sum() / total) if total else math.nan


def pairs_in_order(scores: np.ndarray, positive: np.ndarray, fold: np.ndarray | None = None) -> Pairs:
    """Pairs of questions by their scores [question]; with `fold` [question], only those of one fold."""
    compared = positive[:, None] & ~positive[None]
    if fold is not None:
        compared = compared & (fold[:, None] == fold[None])
    gap = scores[:, None] - scores[None]
    return Pairs(np.where(compared, (gap > 0) + 0.5 * (gap == 0), 0.0), compared.astype(float))


def pairs_scored(scores: np.ndarray, positive: np.ndarray) -> Pairs:
    """Pairs that were each scored by one probe: [pair, 2], the positive question first; the negatives of the
    first positive question come first.
    """
    higher, compared = np.zeros((2, len(positive), len(positive)))
    compared[np.ix_(positive, ~positive)] = 1
    gap = scores[:, 0] - scores[:, 1]
    higher[compared > 0] = (gap > 0) + 0.5 * (gap == 0)
    return Pairs(higher, compared)


def auc(pairs: Pairs, resamples: int = RESAMPLES, seed: int = 0) -> Interval:
    """The AUC; questions are resampled."""
    return over_questions(len(pairs.higher), lambda w: pair_mean(w, *pairs), resamples, seed)


def auc_difference(one: Pairs, other: Pairs, resamples: int = RESAMPLES, seed: int = 0) -> Interval:
    """One AUC minus another of the same questions, resampled together."""
    return over_questions(
        len(one.higher), lambda w: pair_mean(w, *one) - pair_mean(w, *other), resamples, seed
    )


def aucs(scores: np.ndarray, positive: np.ndarray, fold: np.ndarray | None = None) -> np.ndarray:
    """AUCs of many labellings at once: scores and labels [row, question] -> [row]; with `fold` likewise, the
    pairs of one fold.
    """
    fold = np.zeros(scores.shape, dtype=int) if fold is None else fold
    higher, compared = np.zeros(len(scores)), np.zeros(len(scores))
    for k in np.unique(fold):
        own = fold == k
        n1, n0 = (own & positive).sum(axis=1), (own & ~positive).sum(axis=1)
        ranks = rankdata(np.where(own, scores, -np.inf), axis=1)  # those of other folds are below all
        below = (~own).sum(axis=1)
        higher += np.where(own & positive, ranks, 0).sum(axis=1) - n1 * (below + (n1 + 1) / 2)
        compared += n1 * n0
    with np.errstate(invalid="ignore"):
        return higher / compared


class Decisions(NamedTuple):
    """What the decisions at a score of 0 get right."""

    sensitivity: Interval
    """Share of positive questions called positive (recall)."""
    specificity: Interval
    """Share of negative questions not called positive."""
    balanced: Interval
    """Mean of the two; one half for always and for never."""
    called: float
    """Share of all questions called positive."""


def decisions(
    positive: np.ndarray, called: np.ndarray, resamples: int = RESAMPLES, seed: int = 0
) -> Decisions:
    """Sensitivity, specificity and their mean: labels and calls [question], bool."""

    def share(right: np.ndarray, of: np.ndarray) -> Interval:
        return share_of_questions(np.where(of, right, np.nan), resamples, seed)

    def balanced(totals: np.ndarray) -> np.ndarray:
        with np.errstate(divide="ignore", invalid="ignore"):
            return (totals[..., 0] / totals[..., 1] + totals[..., 2] / totals[..., 3]) / 2

    sums = np.stack([positive & called, positive, ~positive & ~called, ~positive], axis=1)
    mean = cluster_bootstrap(sums, balanced, resamples, seed=seed)
    return Decisions(share(called, positive), share(~called, ~positive), mean, float(called.mean()))


def balanced_accuracies(
    positive: np.ndarray, called: np.ndarray, use: np.ndarray | None = None
) -> np.ndarray:
    """Of many labellings at once: [row, question] -> [row]; with `use` likewise, of those questions."""
    use = np.ones_like(positive) if use is None else use

    def share(right: np.ndarray, of: np.ndarray) -> np.ndarray:
        return (right & of).sum(axis=1) / np.maximum(of.sum(axis=1), 1)

    return (share(called, use & positive) + share(~called, use & ~positive)) / 2


def probabilities(scores: np.ndarray, positive: np.ndarray) -> np.ndarray:
    """Scores of rebalanced leave-one-out as probabilities [question]: a score of 0 is the share of positive
    questions in training.
    """
    share = (positive.sum() - 1) / (len(positive) - 2)
    return 1 / (1 + np.exp(-np.clip(scores + np.log(share / (1 - share)), -700, 700)))


def brier(chance: np.ndarray, positive: np.ndarray, resamples: int = RESAMPLES, seed: int = 0) -> Interval:
    """Mean squared distance of probability and outcome, 0 to 1; lower is better."""
    return mean_over_questions((chance - positive) ** 2, resamples, seed)


def calibration(
    chance: np.ndarray, positive: np.ndarray, bins: int = BINS, resamples: int = RESAMPLES, seed: int = 0
) -> pd.DataFrame:
    """Predicted against observed, in bins of about as many questions; equal predictions share a bin.

    Returns:
        Columns predicted (mean), observed with `_low` and `_high` (share positive), questions.
    """
    edges = np.unique(np.quantile(chance, np.linspace(0, 1, bins + 1)[1:-1], method="lower"))
    place, records = np.searchsorted(edges, chance, side="left"), []
    for k in np.unique(place):
        own = place == k
        observed = share_of_questions(positive[own].astype(float), resamples, seed)
        record = {"predicted": chance[own].mean()} | as_columns(observed=observed)
        records.append(record | {"questions": int(own.sum())})
    return pd.DataFrame(records)


class DimsRead(NamedTuple):
    """The dimensions that the probes of one cross-validation read."""

    table: pd.DataFrame
    """A row per (layer, dimension) that any probe reads: layer, dim, probes (how many read it), share."""
    count: float
    """Mean number of dimensions per probe."""
    share: float
    """The same as a share of the layer."""
    layers: dict[int, int]
    """Layer -> number of probes that read it."""
    stability: float
    """Agreement of the sets beyond chance (`stability`); NaN for one probe, or if all dimensions are read."""
    spread: float
    """Kolmogorov-Smirnov distance of the dimensions from an even spread over the indices, 0 to 1; each counts
    as often as it is read."""
    core: int
    """Number of dimensions that at least half of the probes read."""
    core_p: float
    """P-value that those lie evenly over the indices; NaN if there are none."""


def dims_read(read: Sequence[np.ndarray], layers: np.ndarray, d_model: int, n_layers: int) -> DimsRead:
    """Summarise the dimensions and the layer [probe] that each probe reads, of `n_layers` candidates."""
    probes = len(read)
    dims = np.concatenate([np.asarray(r, dtype=int) for r in read]) if probes else np.zeros(0, int)
    of = np.repeat(np.asarray(layers, dtype=int), [len(r) for r in read])
    code, times = np.unique(of * d_model + dims, return_counts=True)
    table = pd.DataFrame(
        {"layer": code // d_model, "dim": code % d_model, "probes": times, "share": times / max(probes, 1)}
    )
    count = len(dims) / probes if probes else math.nan
    core = table.loc[table["share"] >= 0.5, "dim"].to_numpy()
    values, counts = np.unique(np.asarray(layers, dtype=int), return_counts=True)
    spread = kstest((dims + 0.5) / d_model, "uniform", method="asymp").statistic if len(dims) else math.nan
    core_p = kstest((core + 0.5) / d_model, "uniform").pvalue if len(core) else math.nan
    agree = stability([len(r) for r in read], times, probes, d_model * n_layers)
    of_layer = dict(zip(values.tolist(), counts.tolist(), strict=True))
    return DimsRead(table, count, count / d_model, of_layer, agree, float(spread), len(core), float(core_p))


def stability(sizes: Sequence[int], times: np.ndarray, probes: int, candidates: int) -> float:
    """Agreement of sets beyond chance (Nogueira, Sechidis & Brown 2018): 1 if all are equal, 0 as for random
    sets of their sizes. `times`: in how many sets each member of any set is; `candidates`: all there are.
    """
    mean = float(np.mean(sizes)) / candidates if probes else math.nan
    if probes < 2 or not 0 < mean < 1:
        return math.nan
    share = np.asarray(times) / probes
    variance = (share * (1 - share)).sum() * probes / (probes - 1) / candidates
    return float(1 - variance / (mean * (1 - mean)))


class Hits(NamedTuple):
    """How many of the positive questions were called positive."""

    found: int
    of: int


PAPER = Hits(29, 48)
"""Must-halt questions in leave-one-out; the paper does not state the rate that its p-value is about."""


def binomial_p(hits: Hits, rate: float) -> float:
    """Chance of at least as many hits if each has this chance, independently."""
    return float(binom.sf(hits.found - 1, hits.of, rate))


def implied_rate(hits: Hits, p: float) -> float:
    """The rate that a binomial p-value of these hits implies (0.37 for the paper's)."""
    return float(root_scalar(lambda rate: binomial_p(hits, rate) - p, bracket=(1e-9, 1 - 1e-9)).root)


def fisher_p(hits: Hits, called: int, questions: int) -> float:
    """Chance of at least as many hits if as many calls fell on any of the questions."""
    return float(hypergeom.sf(hits.found - 1, questions, hits.of, called))


def binomial_readings(
    hits: Hits, called: int, questions: int, others: Mapping[str, float] | None = None, action: str = "halt"
) -> pd.DataFrame:
    """The paper's hits and a run's own against every rate (docs/probe.md says why the rate decides).

    Args:
        hits, called, questions: of the run; `called` counts all questions called positive.
        others: further p-values of the run's hits by name (permutation).
        action: for a positive question, `halt` or `iterate`.

    Returns:
        A row per reading: whose, found, of, against (in words), rate (NaN where it is not one number), p.
    """
    implied, everything = implied_rate(PAPER, PAPER_P), Hits(hits.of, hits.of)
    exact, always = "as many calls on any questions (Fisher, exact)", f"always-{action}"
    half, base = "one half", "share of positive questions"
    against = [
        ("paper", PAPER, "the rate its p = 0.0009 implies", implied),
        ("paper", PAPER, half, 0.5),
        ("paper", PAPER, base, PAPER.of / PAPER_QUESTIONS),
        ("this run", hits, "the rate the paper's p implies", implied),
        ("this run", hits, half, 0.5),
        ("this run", hits, base, hits.of / questions),
        ("this run", hits, "share of questions it calls positive", called / questions),
    ]
    rows = [(whose, *of, words, rate, binomial_p(of, rate)) for whose, of, words, rate in against]
    rows.append(("this run", *hits, exact, np.nan, fisher_p(hits, called, questions)))
    rows += [("this run", *hits, words, np.nan, p) for words, p in (others or {}).items()]
    rows.append((always, *everything, half, 0.5, binomial_p(everything, 0.5)))
    rows.append((always, *everything, exact, np.nan, fisher_p(everything, questions, questions)))
    return pd.DataFrame(rows, columns=["whose", "found", "of", "against", "rate", "p"])
