"""Hits of a probe as a binomial figure (claim C12), at every rate it may be held against.

The paper: 29 of 48 must-halt questions found in leave-one-out, p = 0.0009. A binomial p-value is about a rate
of hits without the probe, and the paper does not state the one it used. Three things are the matter with any:

- the answer is the rate: 29 of 48 is rare against 0.37, more so against the base rate (48 of 198), and
  ordinary against one half;
- hits are recall. A probe that always says "halt" has 48 of 48. What it says to the other questions decides,
  and that is in the *rate at which it says halt*: Fisher's exact test takes both margins as they are;
- leave-one-out probes share nearly all of their training questions, so hits are not independent tosses, and a
  choice of dimensions makes them less so. Only permuting the labels through everything has that in it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
import pandas as pd
from scipy.optimize import root_scalar
from scipy.stats import binom, hypergeom


class Hits(NamedTuple):
    """A count of positive questions found."""

    found: int
    of: int


PAPER = Hits(29, 48)
PAPER_QUESTIONS = 198
"""GPQA-Diamond: 48 of them must halt."""
PAPER_P = 0.0009
"""The paper's p-value, as printed."""


def binomial_p(hits: Hits, rate: float) -> float:
    """Chance of at least as many hits if each is found with this chance, independently."""
    return float(binom.sf(hits.found - 1, hits.of, rate))


def implied_rate(hits: Hits, p: float) -> float:
    """The rate without the probe that a binomial p-value of these hits implies (0.37 for the paper's)."""
    found = root_scalar(lambda rate: binomial_p(hits, rate) - p, bracket=(1e-9, 1 - 1e-9))
    return float(found.root)


def fisher_p(hits: Hits, called: int, questions: int) -> float:
    """Chance of at least as many hits if the same number of calls had fallen on any of the questions."""
    return float(hypergeom.sf(hits.found - 1, questions, hits.of, called))


def binomial_readings(
    hits: Hits,
    called: int,
    questions: int,
    others: Mapping[str, float] | None = None,
    action: str = "halt",
) -> pd.DataFrame:
    """The paper's hits and a run's own, read against every rate.

    Args:
        hits: of the run.
        called: how many of all its questions were called positive.
        questions: how many there are.
        others: further p-values of the run's hits by name (permutation).
        action: what is done with a positive question, for the name of the policy that always does it.

    Returns:
        A row per reading: whose, found, of, against (in words), rate (NaN where it is not one number), p.
    """
    implied, rows = implied_rate(PAPER, PAPER_P), []

    def add(whose: str, of: Hits, against: str, rate: float, p: float) -> None:
        rows.append((whose, *of, against, rate, p))

    add("paper", PAPER, "the rate its p = 0.0009 implies", implied, binomial_p(PAPER, implied))
    add("paper", PAPER, "one half", 0.5, binomial_p(PAPER, 0.5))
    share = PAPER.of / PAPER_QUESTIONS
    add("paper", PAPER, "share of positive questions", share, binomial_p(PAPER, share))
    for against, rate in (
        ("the rate the paper's p implies", implied),
        ("one half", 0.5),
        ("share of positive questions", hits.of / questions),
        ("share of questions it calls positive", called / questions),
    ):
        add("this run", hits, against, rate, binomial_p(hits, rate))
    exact = "as many calls on any questions (Fisher, exact)"
    add("this run", hits, exact, np.nan, fisher_p(hits, called, questions))
    for against, p in (others or {}).items():
        add("this run", hits, against, np.nan, p)
    everything = Hits(hits.of, hits.of)
    add(f"always-{action}", everything, "one half", 0.5, binomial_p(everything, 0.5))
    add(f"always-{action}", everything, exact, np.nan, fisher_p(everything, questions, questions))
    return pd.DataFrame(rows, columns=["whose", "found", "of", "against", "rate", "p"])
