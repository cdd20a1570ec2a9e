"""Synthetic states at position 0, with a planted signal of known strength."""

from __future__ import annotations

import numpy as np
import torch

from sst_interp.experiments.probe import Features, Labels, features_of


def labels(positive: np.ndarray, **changes) -> Labels:
    """Labels of these questions."""
    n = len(positive)
    fields = {
        "name": "must-halt",
        "definition": "must-halt: planted",
        "questions": np.arange(n),
        "ids": np.array([f"record-{i}" for i in range(n)]),
        "positive": np.asarray(positive, dtype=bool),
        "halts": True,
        "shallowest": 1,
        "deepest": 4,
        "n_excluded": 0,
    }
    return Labels(**(fields | changes))


def states(
    questions: int = 60,
    layers: int = 3,
    d_model: int = 24,
    positive: int = 20,
    strength: float = 0.0,
    dims: int = 3,
    layer: int = 1,
    seed: int = 0,
) -> tuple[Features, Labels]:
    """States and labels: the first `dims` dimensions of `layer` are shifted by `strength` standard deviations
    where a question is positive. Every other one is noise; questions share three directions, and scales
    differ by dimension as a language model's do.
    """
    rng = np.random.default_rng(seed)
    own = rng.permutation(np.arange(questions) < positive)
    x = rng.normal(size=(questions, layers, d_model))
    x += rng.normal(size=(questions, layers, 3)) @ (0.5 * rng.normal(size=(3, d_model)))
    x /= x.std(axis=0)
    x[own, layer, :dims] += strength
    x = 50 * rng.normal(size=d_model) + x * np.exp(rng.normal(size=d_model))
    scalars = np.stack(
        [rng.integers(80, 200, questions), rng.exponential(size=questions), rng.random(questions)], 1
    )
    return features_of(torch.from_numpy(x).float(), torch.from_numpy(scalars).float()), labels(own)
