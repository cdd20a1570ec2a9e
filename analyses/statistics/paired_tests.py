"""Wilcoxon and sign tests over questions, for many layers at once, and what many tests ask for.

One number per question and layer (its median over positions, say) is compared with a reference. Questions are
the unit: there are never more observations than questions. Effect sizes come first, since with enough
questions any difference has a small p-value.
"""

from __future__ import annotations

import numpy as np
import pandas as pd
from scipy.stats import binom, false_discovery_control, wilcoxon

from sst_interp.analyses.statistics.permutation import holm
from sst_interp.analyses.statistics.profiles import ranks


def benjamini_hochberg(p_values: np.ndarray) -> np.ndarray:
    """Benjamini and Hochberg's adjusted p-values: of those below 5%, at most 5% are false on average.

    NaN (not tested) stays NaN and does not count as a test. Never above Holm's.
    """
    p = np.asarray(p_values, dtype=float)
    out = np.full(p.shape, np.nan)
    tested = np.isfinite(p)
    if tested.any():
        out[tested] = false_discovery_control(p[tested])
    return out


def sign_test(above: np.ndarray, below: np.ndarray) -> np.ndarray:
    """Exact two-sided sign test: counts [...] of questions above and below the reference -> p-values [...].

    Ties are left out beforehand. NaN where no question is left.
    """
    above, below = np.asarray(above), np.asarray(below)
    n = above + below
    return np.where(n > 0, np.minimum(1, 2 * binom.cdf(np.minimum(above, below), n, 0.5)), np.nan)


def rank_biserial(differences: np.ndarray) -> np.ndarray:
    """Matched-pairs rank-biserial correlation, the effect size of Wilcoxon's test: [question, k] -> [k].

    (W+ - W-) / (W+ + W-), W the sums of the ranks of positive and of negative differences: 1 if all questions
    are above, -1 if all are below, 0 if they balance. Questions without a difference are left out.
    """
    gaps = np.where(differences == 0, np.nan, differences)
    ranked = ranks(np.abs(gaps).T).T
    top = np.nansum(np.sign(gaps) * ranked, axis=0)
    bottom = np.nansum(ranked, axis=0)
    return np.divide(top, bottom, out=np.full(top.shape, np.nan), where=bottom > 0)


def paired_tests(values: np.ndarray, reference: float = 0.0) -> pd.DataFrame:
    """Each column against a reference, questions as the unit, with control over the columns.

    Args:
        values: [question, k]; NaN where a question has none.
        reference: what there would be without an effect.

    Returns:
        A row per column: `questions`, `above` (share of questions above the reference; equal ones count as
        half), `effect` (`rank_biserial`), `sign_p` and `wilcoxon_p`, two-sided, and both adjusted over the
        columns: `sign_holm`, `sign_bh`, `wilcoxon_holm`, `wilcoxon_bh`. NaN where there is nothing to test.
    """
    values = np.asarray(values, dtype=float)
    gaps = values - reference
    n = np.isfinite(gaps).sum(axis=0)
    above, below = (gaps > 0).sum(axis=0), (gaps < 0).sum(axis=0)
    testable = above + below > 0
    wilcoxon_p = np.full(len(n), np.nan)
    if testable.any():
        some = np.where(gaps[:, testable] == 0, np.nan, gaps[:, testable])
        found = wilcoxon(some, axis=0, nan_policy="omit")  # pyright: ignore[reportCallIssue]
        wilcoxon_p[testable] = found.pvalue
    p = {"sign": sign_test(above, below), "wilcoxon": wilcoxon_p}
    columns = {
        "questions": n,
        "above": np.divide(above + (n - above - below) / 2, n, out=np.full(len(n), np.nan), where=n > 0),
        "effect": rank_biserial(gaps),
    }
    columns |= {f"{name}_p": values for name, values in p.items()}
    for name, values in p.items():
        columns |= {f"{name}_holm": holm(values), f"{name}_bh": benjamini_hochberg(values)}
    return pd.DataFrame(columns)
