"""Many probes on one set of questions: whatever is left out, chosen or permuted, every fit goes through here.

A *problem* is one fit: whose labels, which questions it may learn from, which layer, how many dimensions,
which penalty. Problems with the same layer and number of dimensions are trained together, as many at a time
as stay in the cache, and such groups are spread over the cores. What a problem gives does not depend on the
others or on the number of cores.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from sst_interp.probe.design import Design
from sst_interp.probe.linear import train_logistic
from sst_interp.probe.networks import balanced_weights, train_two_layer
from sst_interp.probe.screening import gather, moments, precondition, separation

TOGETHER = 500_000
"""Numbers that one batched fit works on: as many as keep a core busy without leaving its cache."""


class Inputs:
    """The states all problems read: `[question, layer, d_model]`, preconditioned once per layer."""

    def __init__(self, states: Float[Tensor, "question layer d_model"]) -> None:
        self.n_questions, self.n_layers, self.d_model = states.shape
        parts = [precondition(states[:, layer]) for layer in range(self.n_layers)]
        self.x = [x.contiguous() for x, _, _ in parts]
        self.mean, self.scale = (torch.stack([part[i] for part in parts]) for i in (1, 2))


class Problems(NamedTuple):
    """What to fit, one row per problem; arrays of equal length."""

    row: np.ndarray
    """Whose labels: a row of the label table."""
    use: np.ndarray
    """Questions to learn from, bool [problem, question]."""
    layer: np.ndarray
    dims: np.ndarray
    """How many dimensions."""
    penalty: np.ndarray


class Fits(NamedTuple):
    """What came out, in the order of the problems."""

    logits: Float[Tensor, "problem question"]
    """Of all questions, those learnt from included. Above 0: more likely than the base rate."""
    read: list[Int[Tensor, " k"]]
    """Dimensions each probe reads, the most separated first; empty unless asked for."""
    weights: list[tuple[Tensor, ...]]
    """Per problem: the weights, each of them one tensor; empty unless asked for."""


@torch.no_grad()
def fit(
    design: Design,
    inputs: Inputs,
    labels: Float[Tensor, "row question"],
    problems: Problems,
    keep: bool = False,
) -> Fits:
    """Fit every problem.

    Args:
        design: the kind of probe.
        inputs: what it reads.
        labels: 0 or 1.
        problems: what to fit.
        keep: return which dimensions were read, and the weights.
    """
    n = len(problems.row)
    logits = torch.empty(n, inputs.n_questions)
    read: list[Tensor] = [torch.empty(0)] * n if keep else []
    weights: list[tuple[Tensor, ...]] = [()] * n if keep else []

    def one(where: np.ndarray) -> None:
        first = where[0]
        x, k = inputs.x[problems.layer[first]], int(problems.dims[first])
        y = labels[torch.from_numpy(problems.row[where])]
        use = torch.from_numpy(problems.use[where].astype(np.float32))
        penalty = torch.from_numpy(problems.penalty[where].astype(np.float32))
        found, weight = moments(x, use), balanced_weights(y, use)
        if design.kind == "two_layer":
            seen = torch.ones_like(use) if design.leak else use
            dims = separation(x, y, seen, found).topk(k, dim=1).indices
            z = gather(x, dims, found)
            out, params = train_two_layer(z, y, weight, penalty, design.hidden, design.n_steps, design.seed)
        else:
            l1, dims = design.kind == "l1", None
            out, params = train_logistic(
                x, found.mean, found.scale, y, weight, penalty, l1, design.n_steps
            )  # fmt: skip
        logits[torch.from_numpy(where)] = out
        for i, problem in enumerate(where if keep else ()):
            own = dims[i] if dims is not None else params[0][i].nonzero()[:, 0]
            read[problem] = own
            weights[problem] = (found.mean[i], found.scale[i], *(p[i] for p in params))

    with _spread() as pool:
        list(pool.map(one, _groups(problems, design, inputs)))
    return Fits(logits, read, weights)


def _groups(problems: Problems, design: Design, inputs: Inputs) -> Iterator[np.ndarray]:
    """Problems with the same layer and number of dimensions, as many at a time as go together."""
    key = problems.layer.astype(np.int64) * (1 << 32) + problems.dims
    order = np.argsort(key, kind="stable")
    ends = np.flatnonzero(np.diff(key[order])) + 1
    for group in np.split(order, ends) if len(order) else ():
        if design.kind == "two_layer":
            numbers = 2 * (design.hidden + int(problems.dims[group[0]])) * inputs.n_questions
        else:
            numbers = 4 * (inputs.n_questions + inputs.d_model)
        size = max(8, TOGETHER // numbers)
        for start in range(0, len(group), size):
            yield group[start : start + size]


@contextmanager
def _spread() -> Iterator[ThreadPoolExecutor]:
    """As many threads as torch would use, each with a core of its own: products this small do not gain from
    two cores, and a batch computed by one gives the same bits whatever the number.
    """
    cores = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with ThreadPoolExecutor(cores, initializer=lambda: torch.set_num_threads(1)) as pool:
            yield pool
    finally:
        torch.set_num_threads(cores)
