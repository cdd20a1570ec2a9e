"""What a way of choosing depths does with a run's questions: what it gets right, and what that costs."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import pandas as pd
import torch

from sst_interp.analyses.parts.answers import Answers, mean_of
from sst_interp.analyses.parts.position_traces import RULES
from sst_interp.analyses.parts.question_grid import share_of_questions
from sst_interp.analyses.statistics.along_texts import over_questions
from sst_interp.analyses.statistics.bootstrap import RESAMPLES, as_columns, cluster_bootstrap
from sst_interp.probe.selection import random_keys

if TYPE_CHECKING:
    from sst_interp.analyses.halting import Halting

FOLDS = 6
THRESHOLDS = 20
"""Candidate thresholds of a rule: quantiles of its numbers, never and always."""
ORACLE = "oracle over depths (not a policy)"
PROBE = "probe"


class Routed(NamedTuple):
    """What one policy does with every question."""

    name: str
    kind: str
    """`flat`, `policy` or `oracle`."""
    place: np.ndarray
    """Which of the captured depths each question gets [question]."""
    looks: int = 0
    """Passes spent at position 0 on looking."""


class Costs(NamedTuple):
    """What the depths got right and what they cost; of the questions in `answers`."""

    answers: Answers
    tokens: np.ndarray
    """Generated tokens [question, depth]."""

    @property
    def depths(self) -> np.ndarray:
        """Captured depths, ascending."""
        return np.asarray(self.answers.depths, dtype=int)

    def right(self, place: np.ndarray) -> np.ndarray:
        """Whether each question is right at its depth: place [..., question] -> the same."""
        return self.answers.correct[np.arange(len(self.tokens)), place]

    def passes(self, place: np.ndarray, looks: int = 0) -> np.ndarray:
        """Passes through the stack that each question takes, likewise."""
        return looks + self.depths[place] * self.tokens[np.arange(len(self.tokens)), place]


def costs_of(questions: pd.DataFrame, answers: Answers) -> Costs:
    """From a run's `questions` table; a token each where it does not say."""
    if "tokens" not in questions.columns:
        return Costs(answers, np.ones(answers.correct.shape))
    table = questions.pivot(index="question", columns="depth", values="tokens")
    return Costs(answers, table.loc[answers.questions, answers.depths].to_numpy(dtype=float))


def flat(costs: Costs) -> list[Routed]:
    """Every question at the same depth, for each depth."""
    depths, n = costs.depths, len(costs.tokens)
    names = {0: " (always-halt)", len(depths) - 1: " (never-halt)"}
    return [
        Routed(f"flat depth {depth}{names.get(k, '')}", "flat", np.full(n, k))
        for k, depth in enumerate(depths.tolist())
    ]


def oracle(costs: Costs) -> Routed:
    """The shallowest depth that is right, or the shallowest."""
    correct = costs.answers.correct
    return Routed(ORACLE, "oracle", np.where(correct.any(axis=1), correct.argmax(axis=1), 0))


def rules(costs: Costs, seen: dict[str, np.ndarray], seed: int = 0) -> list[Routed]:
    """Every rule with its threshold chosen on the other folds: most right, then fewest passes.

    Args:
        costs: of every depth.
        seen: the numbers of each rule, [iteration, question] (`position_traces.traces`).
        seed: of the folds.
    """
    depths, n = costs.depths, len(costs.tokens)
    fold = np.argsort(np.argsort(random_keys(n, seed))) % min(FOLDS, n)
    found = []
    for name, numbers in seen.items():
        levels = np.unique(np.quantile(numbers, np.linspace(0, 1, THRESHOLDS)))
        tensor, deepest = torch.from_numpy(numbers), int(depths[-1])
        each = [RULES[name](float(level), deepest) for level in [-np.inf, *levels, np.inf]]
        chosen = np.stack([rule.first_below(tensor).numpy() for rule in each])
        places = np.searchsorted(depths, chosen)  # a depth that was not captured: the next deeper one
        right, passes = costs.right(places), costs.passes(places)
        own = np.empty(n, dtype=int)
        for k in np.unique(fold):
            others = fold != k
            own[fold == k] = (right[:, others].sum(1) - 1e-9 * passes[:, others].sum(1)).argmax()
        found.append(Routed(name, "policy", places[own, np.arange(n)], looks=deepest))
    return found


def by_score(costs: Costs, probe: Halting, scores: np.ndarray, threshold: float = 0.0) -> Routed:
    """The probe: shallowest or deepest, by whether a score [question] is above the threshold."""
    halt = (scores > threshold) == (probe.action == "halt")
    return Routed(PROBE, "policy", np.where(halt, 0, len(costs.depths) - 1), looks=probe.iteration)


def curve(costs: Costs, probe: Halting, scores: np.ndarray) -> pd.DataFrame:
    """Columns threshold, accuracy, passes: the probe at every threshold."""
    records = []
    for threshold in [-np.inf, *np.unique(scores)]:
        routed = by_score(costs, probe, scores, threshold)
        passes = costs.passes(routed.place, routed.looks)
        records.append((threshold, costs.right(routed.place).mean(), passes.mean()))
    return pd.DataFrame(records, columns=["threshold", "accuracy", "passes"])


def scored(routed: Routed, costs: Costs, resamples: int = RESAMPLES, seed: int = 0) -> dict[str, object]:
    """A policy as a row of `Routing.policies`."""
    correct, place = costs.answers.correct, routed.place
    right, base, depth = costs.right(place), correct[:, 0], costs.depths[place]
    passes, most = costs.passes(place, routed.looks), costs.depths[-1] * costs.tokens[:, -1]
    dealt = np.eye(correct.shape[1])[place]
    deeper = np.arange(correct.shape[1])[None] > place[:, None]

    def beyond(weights: np.ndarray) -> np.ndarray:
        total = weights.sum(axis=-1)
        shares, accuracies = weights @ dealt / total[:, None], weights @ correct / total[:, None]
        return weights @ right / total - (shares * accuracies).sum(axis=-1)

    def saved(totals: np.ndarray) -> np.ndarray:
        return 1 - totals[..., 0] / totals[..., 1]

    options = resamples, seed
    columns = as_columns(
        accuracy=mean_of(right, None, *options),
        passes=mean_of(passes, None, *options),
        beyond=over_questions(len(place), beyond, *options),
        saved=cluster_bootstrap(np.stack([passes, most], 1), saved, resamples, seed=seed),
        broken_share=share_of_questions(np.where(base, ~right, np.nan), *options),
    )
    return {"name": routed.name, "kind": routed.kind, **columns} | {
        "mean_depth": float(depth.mean()),
        "broken": int((base & ~right).sum()),
        "mended": int((~base & right).sum()),
        "conservative": int((~right & (correct & deeper).any(axis=1)).sum()),
    }
