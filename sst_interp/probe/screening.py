"""Which dimensions a probe reads, and on what scale: both from a problem's own training questions alone.

Dimensions are ranked by how far the two classes' means lie apart, in standard deviations (the order of a
two-sample t test). All problems share the questions, so the means of thousands of training sets are a few
matrix products with their masks.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

CONSTANT = 1e-6
"""A variance below this, of a dimension whose variance over all questions is 1, is rounding."""


class Moments(NamedTuple):
    """Means and scales of every dimension in each problem's training questions."""

    mean: Float[Tensor, "problem d"]
    scale: Float[Tensor, "problem d"]
    """1 / standard deviation; 0 where the dimension is constant."""


def precondition(x: Float[Tensor, "question d"]) -> tuple[Tensor, Tensor, Tensor]:
    """Inputs centred and scaled by all questions: (x, mean [d], scale [d]).

    It uses no label, and standardising in each fold undoes it exactly. It is there because a few dimensions
    of a language model are thousands of times larger than the rest, which sums of squares in fp32 do not
    survive. Constant dimensions become 0.
    """
    wide = x.double()
    mean, sd = wide.mean(0), wide.std(0, correction=0)
    constant = sd <= 1e-6 * wide.abs().amax(0)
    scale = torch.where(constant, 0.0, 1 / sd.clamp_min(torch.finfo(torch.float64).tiny))
    return ((wide - mean) * scale).float(), mean.float(), scale.float()


def moments(x: Float[Tensor, "question d"], use: Float[Tensor, "problem question"]) -> Moments:
    """Mean and scale of each dimension over the questions in `use` (1 or 0)."""
    n = use.sum(-1, keepdim=True).clamp_min(1)
    mean = use @ x / n
    variance = use @ x.square() / n - mean.square()
    return Moments(mean, torch.where(variance > CONSTANT, variance.clamp_min(CONSTANT).rsqrt(), 0.0))


def separation(
    x: Float[Tensor, "question d"],
    y: Float[Tensor, "problem question"],
    use: Float[Tensor, "problem question"],
    found: Moments,
) -> Float[Tensor, "problem d"]:
    """Distance of the two classes' means over the standard deviation, per dimension; 0 where it is
    constant.
    """
    n1 = (use * y).sum(-1, keepdim=True)
    n0 = use.sum(-1, keepdim=True) - n1
    ones = (use * y) @ x / n1.clamp_min(1)
    gap = (ones - found.mean).abs() * (n1 + n0) / n0.clamp_min(1)
    return gap * found.scale * ((n1 > 0) & (n0 > 0))


def gather(
    x: Float[Tensor, "question d"], dims: Int[Tensor, "problem k"], found: Moments
) -> Float[Tensor, "problem k question"]:
    """The chosen dimensions of all questions, standardised."""
    mean, scale = found.mean.gather(1, dims), found.scale.gather(1, dims)
    return (x.T[dims] - mean[..., None]) * scale[..., None]
