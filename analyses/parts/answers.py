"""The answers of a run as arrays [question, depth], and what does not need a model to say about them.

An answer that was not found (null) is wrong, and is an answer of its own where answers are compared: going
from C to no answer is a change.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import pandas as pd
from scipy.stats import binom

from sst_interp.analyses.statistics.bootstrap import RESAMPLES, Interval, as_columns, cluster_bootstrap
from sst_interp.analyses.statistics.permutation import holm

NO_ANSWER = -1
"""Code of an answer that was not found."""


class Answers(NamedTuple):
    """What was answered, of the questions that have a row at every depth."""

    questions: np.ndarray
    """Index of each question in the run, ascending [question]."""
    ids: np.ndarray
    """Record id of each question [question]; its index where the table has none."""
    depths: np.ndarray
    """Ascending [depth]."""
    correct: np.ndarray
    """[question, depth], bool."""
    codes: np.ndarray | None
    """[question, depth]: equal numbers are equal answers, `NO_ANSWER` is none. None: no answers recorded."""
    choices: int | None
    """How many lettered choices a question has, as far as the right answers tell; None: not lettered."""
    n_excluded: int
    """Questions left out: a depth is missing, or its `correct` is."""


def answers_of(questions: pd.DataFrame) -> Answers:
    """The answers of a `questions` table (docs/run-format.md).

    Columns question, depth and correct are needed; `id`, `answer` and `gold` are used where they are there.
    """
    depths = np.sort(questions["depth"].unique())
    correct = questions.pivot(index="question", columns="depth", values="correct")
    whole = correct.notna().all(axis=1)
    correct, keep = correct[whole], correct.index[whole]
    codes = None
    if "answer" in questions.columns:
        coded = questions.assign(code=pd.factorize(questions["answer"])[0])
        codes = coded.pivot(index="question", columns="depth", values="code").loc[keep].to_numpy(dtype=int)
    names = keep
    if "id" in questions.columns:
        names = questions.drop_duplicates("question").set_index("question")["id"].loc[keep]
    return Answers(
        questions=keep.to_numpy(),
        ids=names.to_numpy(),
        depths=depths,
        correct=correct.to_numpy(dtype=bool),
        codes=codes,
        choices=_choices(questions),
        n_excluded=int((~whole).sum()),
    )


def _choices(questions: pd.DataFrame) -> int | None:
    """The highest letter that is ever right or given; None if some right answer is not a single capital."""
    if "gold" not in questions.columns:
        return None
    gold = questions["gold"].dropna().astype(str)
    if not len(gold) or not gold.str.fullmatch("[A-Z]").all():
        return None
    seen = set(gold)
    if "answer" in questions.columns:
        given = questions["answer"].dropna().astype(str)
        seen |= set(given[given.str.fullmatch("[A-Z]")])
    return max(2, ord(max(seen)) - ord("A") + 1)


def mcnemar(broken: np.ndarray | int, mended: np.ndarray | int) -> np.ndarray:
    """Exact two-sided McNemar test: could as many be broken and mended by tossing a coin for each? [...]

    The sign test of the questions that changed; 1 where none did.
    """
    few, both = np.minimum(broken, mended), np.asarray(broken) + np.asarray(mended)
    return np.minimum(1.0, 2 * binom.cdf(few, both, 0.5))


def depths_permutation(correct: np.ndarray, resamples: int, seed: int = 0) -> float:
    """P-value of "depth makes no difference to accuracy": right and wrong permuted over depths in a question.

    The statistic is the variance of the accuracy over depths (Cochran's Q, by permutation). It needs
    questions that are right at some depths only; NaN if there are none. An oracle over depths is the same
    after every such permutation, so it needs other controls (`oracle`).
    """
    mixed = correct[correct.any(axis=1) & ~correct.all(axis=1)].astype(np.int8)
    if not len(mixed):
        return float("nan")
    rng, count = np.random.default_rng(seed), 0
    seen = mixed.sum(axis=0).var()
    step = max(1, 10_000_000 // mixed.size)
    for start in range(0, resamples, step):
        drawn = np.broadcast_to(mixed, (min(step, resamples - start), *mixed.shape))
        sums = rng.permuted(drawn, axis=2).sum(axis=1, dtype=np.int64)
        count += int((sums.var(axis=1) >= seen - 1e-9).sum())
    return (count + 1) / (resamples + 1)


def depth_table(found: Answers, resamples: int = RESAMPLES, seed: int = 0) -> pd.DataFrame:
    """A row per depth: accuracy, and what changes from the shallowest depth to this one.

    Returns:
        Columns depth, right, `accuracy` and `difference` (from the shallowest; both with `_low` and `_high`),
        broken, `without_answer` (of those, without an answer here), mended, `p` (exact McNemar), `p_holm`,
        `changed` (share of answers other than at the shallowest) and `unanswered`; the last three and
        `without_answer` are NaN where they are not known.
    """
    correct, codes, records = found.correct, found.codes, []
    base = correct[:, 0]
    for k, depth in enumerate(found.depths):
        here = correct[:, k]
        broken, mended = base & ~here, here & ~base
        accuracy, difference = (mean_of(x, None, resamples, seed) for x in (here, here * 1 - base))
        record = {"depth": int(depth), "right": int(here.sum())}
        record |= as_columns(accuracy=accuracy, difference=difference)
        record |= {"broken": int(broken.sum()), "mended": int(mended.sum())}
        record["p"] = float(mcnemar(broken.sum(), mended.sum())) if k else np.nan
        known = codes is not None
        record["without_answer"] = float((broken & (codes[:, k] == NO_ANSWER)).sum()) if known else np.nan
        record["changed"] = float((codes[:, k] != codes[:, 0]).mean()) if known else np.nan
        record["unanswered"] = float((codes[:, k] == NO_ANSWER).mean()) if known else np.nan
        records.append(record)
    table = pd.DataFrame(records)
    table.insert(list(table.columns).index("p") + 1, "p_holm", holm(table["p"].to_numpy(dtype=float)))
    return table


def mean_of(
    values: np.ndarray, where: np.ndarray | None = None, resamples: int = RESAMPLES, seed: int = 0
) -> Interval:
    """Mean over questions, or over those of a mask: values [question]; the interval resamples questions."""
    values = np.asarray(values, dtype=float)
    values = values if where is None else values[where]
    sums = np.stack([values, np.ones(len(values))], axis=1)
    return cluster_bootstrap(sums, resamples=resamples, seed=seed)
