"""Logistic regression, many at once: all problems share their questions, so a step is two matrix products.

    logit = w . z + c
    loss  = sum over questions of weight * cross-entropy(logit, y)  +  penalty

`l2`: penalty = p * d / 2 * |w|^2 with d the number of dimensions, so that p means the same for any width: d
is the mean squared length of a standardised question. `l1`: penalty = p * |w|_1 * m with m the smallest for
which all weights are 0; a dimension is read if its weight is not 0. Solved by accelerated proximal gradient
steps (Beck & Teboulle 2009; restarted as O'Donoghue & Candes 2015), a fixed number of them.

Inputs are standardised within each problem's own training questions. That is an affine map of the inputs, so
it is put into the weights and the inputs are never copied.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

POWER_STEPS = 12
"""Steps of the power iteration for the largest curvature."""


class Linear(NamedTuple):
    """Weights of many logistic regressions, on standardised inputs."""

    w: Float[Tensor, "problem d"]
    c: Float[Tensor, " problem"]


def train_logistic(
    x: Float[Tensor, "question d"],
    mean: Float[Tensor, "problem d"],
    scale: Float[Tensor, "problem d"],
    y: Float[Tensor, "problem question"],
    weight: Float[Tensor, "problem question"],
    penalty: Float[Tensor, " problem"],
    l1: bool = False,
    steps: int = 100,
) -> tuple[Float[Tensor, "problem question"], Linear]:
    """Fit one logistic regression per problem.

    Args:
        x: inputs, shared by all problems.
        mean: of each dimension in a problem's training questions ...
        scale: ... and 1 / standard deviation; 0 for a dimension that is constant there.
        y: labels, 0 or 1.
        weight: of each question in the loss.
        penalty: of each problem, relative (see above).
        l1: which penalty.
        steps: how many.

    Returns:
        Logits of all questions, and the weights.
    """

    def forward(w: Tensor, c: Tensor) -> Tensor:
        scaled = w * scale
        return torch.addmm((c - (scaled * mean).sum(-1))[:, None], scaled, x.T)

    def gradient(logits: Tensor) -> tuple[Tensor, Tensor]:
        error = (logits.sigmoid() - y) * weight
        total = error.sum(-1)
        return scale * (error @ x - total[:, None] * mean), total

    w, c = torch.zeros_like(mean), torch.zeros_like(penalty)
    ridge, threshold = torch.zeros_like(penalty), torch.zeros_like(penalty)
    if l1:
        threshold = penalty * gradient(forward(w, c))[0].abs().amax(-1)
    else:
        ridge = penalty * x.shape[1]
    step = 1 / (_curvature(x, mean, scale, weight) + ridge)
    ahead_w, ahead_c, momentum = w, c, torch.ones_like(penalty)
    for _ in range(steps):
        to_w, to_c = gradient(forward(ahead_w, ahead_c))
        new_w = ahead_w - step[:, None] * (to_w + ridge[:, None] * ahead_w)
        new_c = ahead_c - step * to_c
        if l1:
            new_w = torch.sign(new_w) * (new_w.abs() - (step * threshold)[:, None]).clamp_min(0)
        overshot = ((ahead_w - new_w) * (new_w - w)).sum(-1) + (ahead_c - new_c) * (new_c - c) > 0
        momentum = torch.where(overshot, 1.0, momentum)
        following = (1 + (1 + 4 * momentum**2).sqrt()) / 2
        keep = torch.where(overshot, 0.0, (momentum - 1) / following)
        ahead_w, ahead_c = new_w + keep[:, None] * (new_w - w), new_c + keep * (new_c - c)
        w, c, momentum = new_w, new_c, following
    return forward(w, c), Linear(w, c)


def _curvature(x: Tensor, mean: Tensor, scale: Tensor, weight: Tensor) -> Tensor:
    """An upper bound (nearly always) of the loss's curvature: the largest eigenvalue of Z' diag(weight) Z /
    4, with a column of ones in Z for the constant. Power iteration comes from below, hence the tenth on
    top.
    """
    v = torch.ones_like(mean) * torch.where(torch.arange(mean.shape[1]) % 2 == 0, 1.0, -0.5)
    v, constant = v * (scale > 0), torch.ones_like(mean[:, 0])
    size = constant
    for _ in range(POWER_STEPS):
        size = (v.square().sum(-1) + constant**2).sqrt().clamp_min(torch.finfo(x.dtype).tiny)
        v, constant = v / size[:, None], constant / size
        scaled = v * scale
        z = torch.addmm((constant - (scaled * mean).sum(-1))[:, None], scaled, x.T) * weight
        total = z.sum(-1)
        v, constant = scale * (z @ x - total[:, None] * mean), total
    size = (v.square().sum(-1) + constant**2).sqrt()
    return 1.1 * size / 4 + 1e-6
