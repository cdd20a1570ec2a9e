"""The two-layer probe, many at once: one batched problem, full-batch steps, gradients written out.

    h     = relu(W z + b)            # `hidden` units on k standardised dimensions
    logit = u . h + c
    loss  = sum over questions of weight * cross-entropy(logit, y)  +  penalty / 2 * (|W|^2 + |u|^2)

`weight` gives both classes the same total, so a logit above 0 says "more likely than the base rate". All
problems of a batch start from the same weights and take the same number of steps (Adam, rate falling to 0),
so a fit depends on its data and the seed alone. Gradients are written out because autograd spends more time
on its own bookkeeping than such small products take.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

RATE = 0.1
"""First step's size; it falls to 0 linearly. A third of it needs three times as many steps for the same."""
BETA_1, BETA_2, EPSILON = 0.9, 0.99, 1e-8


class TwoLayer(NamedTuple):
    """Weights of many two-layer probes."""

    w: Float[Tensor, "problem hidden k"]
    b: Float[Tensor, "problem hidden"]
    u: Float[Tensor, "problem hidden"]
    c: Float[Tensor, " problem"]

    def logits(self, z: Float[Tensor, "problem k question"]) -> Float[Tensor, "problem question"]:
        """Above 0: more likely than the base rate."""
        h = torch.baddbmm(self.b[..., None], self.w, z).relu_()
        return torch.baddbmm(self.c[:, None, None], self.u[:, None], h)[:, 0]


def balanced_weights(
    y: Float[Tensor, "problem question"], use: Float[Tensor, "problem question"]
) -> Float[Tensor, "problem question"]:
    """Each class weighs one half, questions not in `use` nothing; a class alone weighs all."""
    ones, zeros = use * y, use * (1 - y)
    n1, n0 = ones.sum(-1, keepdim=True), zeros.sum(-1, keepdim=True)
    share = torch.where((n1 > 0) & (n0 > 0), 0.5, 1.0)
    return share * (ones / n1.clamp_min(1) + zeros / n0.clamp_min(1))


def train_two_layer(
    z: Float[Tensor, "problem k question"],
    y: Float[Tensor, "problem question"],
    weight: Float[Tensor, "problem question"],
    penalty: Float[Tensor, " problem"],
    hidden: int = 10,
    steps: int = 30,
    seed: int = 0,
) -> tuple[Float[Tensor, "problem question"], TwoLayer]:
    """Fit one probe per problem.

    Args:
        z: standardised inputs; questions with weight 0 are read but not learnt from.
        y: labels, 0 or 1.
        weight: of each question in the loss (`balanced_weights`).
        penalty: of each problem.
        hidden: units.
        steps: full-batch steps.
        seed: of the initial weights, the same for every problem.

    Returns:
        Logits of all questions, and the weights.
    """
    problems, k, questions = z.shape
    z = torch.cat([z, z.new_ones(problems, 1, questions)], 1)  # a constant input carries the bias
    zt, wide, n_w = z.transpose(1, 2), k + 1, hidden * (k + 1)
    # All weights of a problem in one row, so that a step of the optimiser is a few operations and not dozens.
    theta = _start(k, hidden, seed).to(z).repeat(problems, 1)
    gradient, first, second = (torch.zeros_like(theta) for _ in range(3))

    def parts(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return (
            x[:, :n_w].view(problems, hidden, wide),
            x[:, n_w:-1].view(problems, 1, hidden),
            x[:, -1:].unsqueeze(-1),
        )

    (w, u, c), (to_w, to_u, to_c) = parts(theta), parts(gradient)
    decay = penalty[:, None].to(z) * torch.ones_like(theta)
    decay[:, k:n_w:wide] = 0  # biases are free
    decay[:, -1] = 0
    h, back = z.new_empty(problems, hidden, questions), z.new_empty(problems, hidden, questions)
    y, weight = y[:, None], weight[:, None]
    for step in range(steps):
        torch.bmm(w, z, out=h)
        h.relu_()
        error = torch.baddbmm(c, u, h).sigmoid_().sub_(y).mul_(weight)
        to_u.copy_(torch.bmm(error, h.transpose(1, 2)))
        to_c.copy_(error.sum(-1, keepdim=True))
        torch.mul(u.transpose(1, 2), error, out=back)
        back.mul_(h > 0)
        to_w.copy_(torch.bmm(back, zt))
        gradient.addcmul_(decay, theta)
        first.lerp_(gradient, 1 - BETA_1)
        second.mul_(BETA_2).addcmul_(gradient, gradient, value=1 - BETA_2)
        size = second.sqrt().mul_((1 - BETA_2 ** (step + 1)) ** -0.5).add_(EPSILON)
        rate = RATE * (1 - step / steps) / (1 - BETA_1 ** (step + 1))
        theta.addcdiv_(first, size, value=-rate)
    found = TwoLayer(w[..., :k].clone(), w[..., k].clone(), u[:, 0].clone(), c[:, 0, 0].clone())
    return torch.baddbmm(c, u, torch.bmm(w, z).relu_())[:, 0], found


def _start(k: int, hidden: int, seed: int) -> Tensor:
    """Initial weights of one problem as a row: half He's size, biases 0."""
    generator = torch.Generator().manual_seed(seed)
    w = 0.5 * (2 / (k + 1)) ** 0.5 * torch.randn(hidden, k + 1, generator=generator)
    w[:, k] = 0
    u = 0.5 * hidden**-0.5 * torch.randn(hidden, generator=generator)
    return torch.cat([w.flatten(), u, torch.zeros(1)])
