"""What a halting rule sees at position 0, from a run's tables: one number per question and iteration.

They are the numbers of `sst_interp.halting`: the same rule gives the same depth in `model.generate` and here.
"""

from __future__ import annotations

import numpy as np
import pandas as pd

from sst_interp.halting import Convergence, Entropy, OutputChange, Threshold

RULES: dict[str, type[Threshold]] = {
    "convergence of the state": Convergence,
    "KL between iterations": OutputChange,
    "entropy": Entropy,
}


def traces(
    questions: np.ndarray, deepest: int, steps: pd.DataFrame, outputs: pd.DataFrame, pairs: pd.DataFrame
) -> dict[str, np.ndarray]:
    """The numbers of every rule that the tables have for every question: name -> [iteration, question].

    Args:
        questions: indices in the run.
        deepest: its deepest depth: the pass that is looked at.
        steps: for the entropy of each iteration.
        outputs: `within` rows, for KL(iteration i || i - 1).
        pairs: `within` rows, for the relative L2 change of each layer's state, of which the median is taken.
    """
    found = {}
    own = (steps["position"] == 0) & (steps["depth"] == deepest) & (steps["text"] == "own")
    rows = steps[own.to_numpy(dtype=bool)]
    found["entropy"] = _table(rows["question"], rows["iteration"], rows["entropy"], questions, deepest)
    rows = _neighbours(outputs)
    found["KL between iterations"] = _table(rows["question"], rows["b"], rows["kl"], questions, deepest)
    rows = _neighbours(pairs)
    change = rows.groupby(["question", "b"], observed=True)["relative_l2"].median().reset_index()
    found["convergence of the state"] = _table(
        change["question"], change["b"], change["relative_l2"], questions, deepest
    )
    whole = {name: numbers[RULES[name].first - 1 :] for name, numbers in found.items()}
    return {name: whole[name] for name in RULES if len(whole[name]) and np.isfinite(whole[name]).all()}


def _neighbours(table: pd.DataFrame) -> pd.DataFrame:
    """`within` rows at position 0, from one iteration to the next."""
    if not len(table):
        return table
    here = (table["position"] == 0) & (table["comparison"] == "within") & (table["b"] == table["a"] + 1)
    return table[here.to_numpy(dtype=bool)]


def _table(
    question: pd.Series, iteration: pd.Series, values: pd.Series, questions: np.ndarray, deepest: int
) -> np.ndarray:
    """[iteration, question], NaN where there is none."""
    place = pd.Index(questions).get_indexer(pd.Index(question))
    at = iteration.to_numpy(dtype=int) - 1
    known = (place >= 0) & (at >= 0) & (at < deepest)
    found = np.full((deepest, len(questions)), np.nan)
    found[at[known], place[known]] = values.to_numpy(dtype=float)[known]
    return found
