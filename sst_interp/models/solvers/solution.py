"""What a parallel solution can say for itself: how it was found, and whether it solves the equations.

Both solvers (`layerwise`, `sweeps`) return a `Solution`; `spot_check` recomputes a few of its positions with
the sequential code itself, each from the solution's own state before it: a local check, which together with
the observed contraction bounds the distance to a sequential run.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from numbers import Real
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from sst_interp.errors import SSTError
from sst_interp.models.choices import shown

TOLERANCE = {torch.float64: 1e-11, torch.float32: 1e-5, torch.bfloat16: 2.0**-6, torch.float16: 2.0**-9}
"""Default tolerance by dtype: relative change of a state in the last sweep, at the worst (row, layer,
position). A few units of the dtype's rounding, measured on SmolLM2 (docs/measurements.md)."""


@dataclass(frozen=True)
class Certificate:
    """How a set of states was computed, and how far it can be from the sequential ones."""

    method: str
    """`sequential` (exact by definition), `layerwise`, `sweeps`, `two_pass` or `blend_off`."""
    sweeps: int = 0
    """Sweeps used: over the whole stack, or the most that any layer's FFN took (`layerwise`)."""
    mean_sweeps: float = float("nan")
    """`layerwise`: mean over layers (one sweep recomputes the FFN of the links that still move)."""
    residual: float = 0.0
    """`sweeps`: largest relative change of a carried state in the last sweep, over rows, layers and
    positions. `layerwise`: the largest such change that was small enough not to be passed on."""
    residuals: tuple[float, ...] = ()
    """The same after every sweep (`layerwise`: largest over layers)."""
    converged: bool = True
    """The residual is below the tolerance, or the sweeps are enough to make every position exact. `layerwise`
    goes on until one of the two holds, so there it is always true."""
    checked: int = 0
    """Positions recomputed one by one from the solution, as `sequential` would."""
    argmax_agreement: float = float("nan")
    """Share of checked positions whose most likely token is the same."""
    logit_error: float = float("nan")
    """Largest relative L2 difference of logits at a checked position."""

    @property
    def contraction(self) -> float:
        """Observed factor by which the residual shrinks per sweep: geometric mean of the last half."""
        r = [x for x in self.residuals if x > 0]
        if len(r) < 2:
            return float("nan")
        tail = r[len(r) // 2 - 1 :] if len(r) > 2 else r
        return (tail[-1] / tail[0]) ** (1 / (len(tail) - 1))


@dataclass
class Solution:
    """States of all positions of a batch of sequences."""

    resid_post: Float[Tensor, "layer row position iteration d_model"] | None
    """Layer outputs; None where they were not asked for."""
    last: Float[Tensor, "row position iteration d_model"]
    """The last layer's outputs: what the logits are read from."""
    incoming: dict[int, Float[Tensor, "layer row d_model"]]
    """The state that each position to be checked starts from, by position."""
    certificate: Certificate


def picks(positions: int, n: int) -> list[int]:
    """`n` evenly spread positions, the first and the last among them."""
    return torch.linspace(0, positions - 1, min(n, positions)).round().long().unique().tolist() if n else []


def check_tolerance(tolerance: Any) -> float | None:
    """A tolerance as a number; None stays None (the dtype's default).

    Raises:
        SSTError: no number from 0 up to 1. At 1 a state that has nothing to do with the solution would pass.
    """
    if tolerance is None:
        return None
    number = isinstance(tolerance, Real) and not isinstance(tolerance, bool)
    value = float(tolerance) if number else math.nan
    if not 0 <= value < 1:
        raise SSTError(
            f"tolerance = {shown(tolerance)} is not a number from 0 and below 1",
            "for example tolerance = 1e-5, or leave it out",
        )
    return value


def relative_change(
    new: Float[Tensor, "... d_model"], old: Float[Tensor, "... d_model"]
) -> Float[Tensor, ...]:
    """|new - old| / |new|, state by state; an overflow is an error.

    Raises:
        SSTError: the states are no longer finite.
    """
    wide = torch.promote_types(new.dtype, torch.float32)
    new, old = new.to(wide), old.to(wide)
    change = (new - old).norm(dim=-1) / new.norm(dim=-1).clamp_min(1e-30)
    if not bool(torch.isfinite(change).all()):
        raise SSTError(
            "the states overflow: the blend does not contract on this backbone",
            "use a smaller alpha, replay(method='sequential'), or the choice prompt = 'blend_off'",
        )
    return change
