"""Labels permuted over questions, each labelling put through everything: choosing, training, scoring.

    p = (b + 1) / (B + 1),    b: labellings of B that score at least as high as the real one

The inputs stay with their questions and the classes keep their sizes, so under the null that labels have
nothing to do with the states every labelling is as likely as the real one. Nothing is chosen beforehand with
the real labels, so whatever the choosing gains is in the null, too.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from sst_interp.probe.design import Design
from sst_interp.probe.fitting import Inputs
from sst_interp.probe.validation import Scores, score


def permuted(labels: np.ndarray, permutations: int, seed: int = 0) -> Float[Tensor, "row question"]:
    """The labels [question] in random orders, one per row. The same seed gives the same orders."""
    rng = np.random.default_rng([seed, 2])
    rows = np.tile(np.asarray(labels, dtype=np.float32), (permutations, 1))
    return torch.from_numpy(rng.permuted(rows, axis=1))


def permutation_scores(
    design: Design,
    inputs: Inputs,
    labels: np.ndarray,
    permutations: int = 1000,
    schemes: tuple[str, ...] = ("leave_one_out", "folds"),
    seed: int = 0,
    progress: Callable[[int], Any] | None = None,
) -> tuple[np.ndarray, dict[str, Scores]]:
    """Out-of-fold scores of permuted labels: (labels [permutation, question] bool, scores by scheme)."""
    rows = permuted(labels, permutations, seed)
    return rows.numpy() > 0.5, score(design, inputs, rows, schemes, progress=progress)
